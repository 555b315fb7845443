"""`convert_state`: a checkpoint with its state in another number of bits."""

from typing import Any

import numpy as np

from adamax_ext import _settings, checkpoint, low_state


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
        to the norm and it.

    Returns
    -------
    dict
        What an optimizer with these `state_bits` loads. To float32 it is exact; to fewer bits,
        everything is rounded to nearest.

    Raises
    ------
    ValueError
        An argument out of range; no such `state_dict`, or one of format version 1.
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
        converted[name] = _converted(name, kinds, order, state_bits, epsilon)
        if order is not None and converted[name]["norm"].dtype == np.uint8:
            kept_orders[name] = order
    entries = checkpoint.format_entries(state_bits, rounding, seed, kept_orders)
    others = {k: v for k, v in state_dict.items() if k not in checkpoint.LOW_MEMORY}
    return {**others, **entries, "state": converted}


def _converted(
    name: str, kinds: low_state.HostKinds, order: Any, state_bits: int, epsilon: float
) -> low_state.HostKinds:
    if not kinds.keys() >= {"momentum", "norm"}:
        raise ValueError(f"state of '{name}' must have momentum and norm; received {sorted(kinds)}")
    kept = {kind: np.array(array, order="C") for kind, array in kinds.items()}
    dtype, bits = kept["momentum"].dtype, low_state.bits_of(state_bits, kept["momentum"].size)
    if dtype.itemsize * 8 == bits:
        return kept
    if state_bits < 32 and dtype == np.float64:
        raise TypeError(
            f"momentum of '{name}' has dtype float64, that of a float64 variable; expected float32 "
            f"to convert it to state_bits {state_bits}"
        )
    if "norm_scale" in kept:
        axes = range(kept["norm"].ndim)  # C order
        codes = low_state.in_memory_order(kept, axes if order is None else order)
        kept |= low_state.in_memory_order(low_state.decoded(codes, epsilon), axes)
        del kept["norm_scale"]
    return kept if bits == 32 else kept | low_state.encoded(kept, bits, epsilon)
