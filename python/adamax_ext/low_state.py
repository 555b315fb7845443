"""State in 16 or 8 bits: which arrays hold it, and what they stand for in float32."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from adamax_ext import _core, arrays

BITS = (32, 16, 8)
ROUNDINGS = ("nearest", "stochastic", "remainder")
BLOCK = 256  # elements that share a scale in 8 bits
DEFAULTS = {"state_bits": 32, "weight_rounding": "nearest", "seed": 0}
_SMALLEST = 4096  # fewer elements keep float32 state where others have 8 bits
STATE = ("momentum", "norm")
DTYPES = {16: ("bfloat16", "bfloat16"), 8: ("int8", "uint8")}  # of STATE, by their bits
FIRST_SCALES = {16: 1.0, 8: 0.0}  # of norms, before the first step

# Arrays of one variable by kind.
Kinds: TypeAlias = dict[str, arrays.Array]
HostKinds: TypeAlias = dict[str, arrays.HostArray]


def bits_of(state_bits: int, size: int) -> int:
    """Return the bits in which a variable of so many elements keeps its state."""
    return 32 if state_bits == 8 and size < _SMALLEST else state_bits


def require_8_bits(beta_1: float, beta_2: float, epsilon: float) -> None:
    """Raise ValueError for settings with which first moments have no bound that a code can have."""
    if beta_1 >= beta_2:
        raise ValueError(
            "beta_1 must be below beta_2 with state_bits 8, where first moments are kept relative "
            f"to norms; received beta_1={beta_1}, beta_2={beta_2}"
        )
    require_epsilon(epsilon)


def require_epsilon(epsilon: float) -> None:
    """Raise ValueError for one that first moments in 8 bits cannot be relative to."""
    if epsilon < 2.0**-86:
        raise ValueError(
            f"epsilon must be >= 2**-86 with state_bits 8, which keep no smaller norms; received "
            f"{epsilon}"
        )


def require_norms(name: str, kept: HostKinds) -> None:
    """Raise ValueError for a norm or a scale below zero, and for a scale that is not finite.

    Norms themselves can be infinite or NaN, after such a gradient.
    """
    for kind in ("norm", "norm_scale"):
        if kind in kept:
            values = kept[kind]
            values = arrays.widened(values) if values.dtype == np.uint16 else values
            if (values < 0).any():
                raise ValueError(
                    f"{kind} of '{name}' must not be below zero; received {np.nanmin(values)}"
                )
    if "norm_scale" in kept and not np.isfinite(kept["norm_scale"]).all():
        raise ValueError(
            f"norm_scale of '{name}' must be finite; received {kept['norm_scale'].max()}"
        )


def makers(
    variable: Any, name: str, index: int, state_bits: int, weight_rounding: str
) -> dict[str, Callable[[], arrays.Array]]:
    """Return what makes each array of a variable before the first step: momentum, norm, and more.

    TypeError if such a variable has no state in so few bits.
    """
    shape, _, of_weights, *_ = _core.describe(variable, "variables", index)
    if state_bits < 32 and of_weights == "float64":
        raise TypeError(
            f"variables[{index}] (variable '{name}') has dtype float64, whose state is float64; "
            f"expected float32, float16 or bfloat16 with state_bits {state_bits}"
        )
    size = math.prod(shape)
    bits = bits_of(state_bits, size)
    dtypes: dict[str, str | None] = dict(zip(STATE, DTYPES.get(bits, (None, None)), strict=True))
    if weight_rounding == "remainder" and of_weights == "bfloat16":
        dtypes["remainder"] = "int16"
    made: dict[str, Callable[[], arrays.Array]] = {
        kind: partial(arrays.zeros_for, variable, "variables", index, dtype)
        for kind, dtype in dtypes.items()
    }
    if bits < 32:
        count, first = number_of_scales(bits, size), FIRST_SCALES[bits]
        made["norm_scale"] = partial(arrays.scales_for, variable, "variables", index, count, first)
    return made


def number_of_scales(bits: int, size: int) -> int:
    """Return how many numbers the scales of so many norms are."""
    return 1 if bits == 16 else -(-size // BLOCK)


def decoded(kept: HostKinds, epsilon: float) -> HostKinds:
    """Return momentum and norm in float32; all arrays are in the memory order of their variable."""
    state = {kind: np.empty_like(kept[kind], np.float32) for kind in STATE}
    _core.decode_state(
        kept["momentum"],
        kept["norm"],
        kept["norm_scale"],
        epsilon,
        to_momentum=state["momentum"],
        to_norm=state["norm"],
    )
    return state


def encoded(state: HostKinds, bits: int, epsilon: float) -> HostKinds:
    """Return float32 state in 16 or 8 bits, to nearest; as `decoded` about memory order."""
    kept = {
        kind: np.empty_like(state[kind], arrays.host_dtype(dtype))
        for kind, dtype in zip(STATE, DTYPES[bits], strict=True)
    }
    kept["norm_scale"] = np.empty(number_of_scales(bits, state["norm"].size), np.float32)
    _core.encode_state(state["momentum"], state["norm"], epsilon, **kept)
    return kept


def in_memory_order(kept: HostKinds, order: Sequence[int]) -> HostKinds:
    """Return it with momentum and norm as they lie in memory where that is their order of axes."""
    return kept | {kind: arrays.in_memory_order(kept[kind], order) for kind in STATE}


def reordered(kept: HostKinds, before: Sequence[int], after: Sequence[int]) -> HostKinds:
    """Return state in 8 bits with the blocks of another memory order.

    Norms are rounded once more; what stands for the first moment is relative to them, and stays.
    """
    state = decoded(in_memory_order(kept, before), epsilon=1.0)
    again = encoded(in_memory_order(state, after), 8, epsilon=1.0)
    return {**again, "momentum": kept["momentum"]}
