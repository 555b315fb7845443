"""`convert_state`: a checkpoint with its state in another number of bits."""

from typing import Any

import numpy as np

from adamax_ext import _settings, arrays, checkpoint, low_state


def convert_state(
    state_dict: dict[str, Any], state_bits: int, epsilon: float = 1e-7
) -> dict[str, Any]:
    """Return a `state_dict` with first moments and norms in another number of bits.

    Parameters
    ----------
    state_dict : dict
        Of an `Adamax` or a `LossScaleOptimizer`; stays as it is.
    state_bits : {32, 16, 8}
        As in `Adamax`: with 8, variables with fewer than 4096 elements have float32.
    epsilon : float > 0
        That of the optimizer. It matters from and to 8 bits, where first moments are kept relative
        to the norm and it, and must be at least 2**-86.

    Returns
    -------
    dict
        What an optimizer with these `state_bits` loads. To float32 it is exact; to fewer bits,
        everything is rounded to nearest.

    Raises
    ------
    ValueError
        An argument out of range; no such `state_dict`, or one of format version 1; arrays that are
        not what its state_bits say; a norm or a scale below zero, or a scale that is not finite.
    TypeError
        State of a float64 variable, which has no fewer bits.
    """
    state_bits = _settings.one_of("state_bits", state_bits, low_state.BITS)
    epsilon = _settings.positive("epsilon", epsilon)
    own = state_dict
    if isinstance(state_dict, dict):
        own = {key: value for key, value in state_dict.items() if key != "loss_scale"}
    checkpoint.require_format(own)
    if own["format_version"] == 1:
        raise ValueError(
            "format_version must be 2 or 3 to convert the state; received 1: load it, and save "
            "again"
        )
    saved_bits = _settings.one_of(
        "state_bits of the state_dict", own.get("state_bits", 32), low_state.BITS
    )
    if 8 in (saved_bits, state_bits):
        low_state.require_epsilon(epsilon)
    state = checkpoint.host_state(own["state"])
    rounding = checkpoint.rounding_of(own)
    seed = _settings.seed("seed of the state_dict", own.get("seed", 0))
    shapes = {name: kinds["norm"].shape for name, kinds in state.items() if "norm" in kinds}
    expected = {n: tuple(i for i, x in enumerate(s) if x > 1) for n, s in shapes.items()}
    checkpoint.memory_orders(own, expected)
    orders = own.get("memory_order", {})
    converted, kept_orders = {}, {}
    for name, kinds in state.items():
        order = orders.get(name)
        converted[name] = _converted(name, kinds, order, saved_bits, state_bits, epsilon)
        if order is not None and converted[name]["norm"].dtype == np.uint8:
            kept_orders[name] = order
    entries = checkpoint.format_entries(state_bits, rounding, seed, kept_orders)
    others = {k: v for k, v in state_dict.items() if k not in checkpoint.LOW_MEMORY}
    return {**others, **entries, "state": converted}


def _converted(
    name: str,
    kinds: low_state.HostKinds,
    order: Any,
    saved_bits: int,
    state_bits: int,
    epsilon: float,
) -> low_state.HostKinds:
    if not kinds.keys() >= set(low_state.STATE):
        raise ValueError(
            f"state of '{name}' must have momentum and norm; received {sorted(map(str, kinds))}"
        )
    dtype, size = kinds["momentum"].dtype, kinds["norm"].size
    if state_bits < 32 and dtype == np.float64:
        raise TypeError(
            f"momentum of '{name}' has dtype float64, that of a float64 variable; expected float32 "
            f"to convert it to state_bits {state_bits}"
        )
    before, bits = low_state.bits_of(saved_bits, size), low_state.bits_of(state_bits, size)
    _require_bits(name, kinds, before)
    low_state.require_norms(name, kinds)
    kept = {kind: np.array(array, order="C") for kind, array in kinds.items()}
    if before == bits:
        return kept
    if before < 32:
        axes = range(kept["norm"].ndim)  # C order
        codes = low_state.in_memory_order(kept, axes if order is None else order)
        kept |= low_state.in_memory_order(low_state.decoded(codes, epsilon), axes)
        del kept["norm_scale"]
    return kept if bits == 32 else kept | low_state.encoded(kept, bits, epsilon)


def _require_bits(name: str, kinds: low_state.HostKinds, bits: int) -> None:
    """Raise ValueError unless momentum and norm, and their scales, are arrays of so many bits."""
    norm, is_double = kinds["norm"], kinds["momentum"].dtype == np.float64
    dtypes = low_state.DTYPES.get(bits, ("float64" if is_double else "float32",) * 2)
    expected = {kind: array for kind, array in kinds.items() if kind != "norm_scale"}
    for kind, dtype in zip(low_state.STATE, map(arrays.host_dtype, dtypes), strict=True):
        expected[kind] = np.broadcast_to(np.zeros((), dtype), norm.shape)
    if bits < 32:
        expected["norm_scale"] = np.zeros(low_state.number_of_scales(bits, norm.size), np.float32)
    checkpoint.fitting({name: kinds}, {name: expected}, frozenset())
