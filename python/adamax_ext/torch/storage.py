"""In what the options of a group keep its state, and the float32 weights of bfloat16 parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adamax_ext import _settings, low_state

# A group has all of these or, where they are as here, none: it then is one of torch's.
DEFAULTS = low_state.DEFAULTS

_MOMENTS = {
    bits: tuple(getattr(torch, name) for name in names) for bits, names in low_state.DTYPES.items()
}
# In which full state is kept, and the arithmetic done, where it is not the dtype of the parameter.
_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}


def options(group: dict[str, Any]) -> tuple[int, str, int]:
    """Return the options of a group in their order; ValueError for one that is out of range."""
    bits, rounding, seed = (group.get(name, value) for name, value in DEFAULTS.items())
    return (
        _settings.one_of("state_bits", bits, low_state.BITS),
        _settings.one_of("weight_rounding", rounding, low_state.ROUNDINGS),
        _settings.seed("seed", seed),
    )


def complete(group: dict[str, Any]) -> None:
    """Give a group all options, or none. ValueError for one that is out of range."""
    given = dict(zip(DEFAULTS, options(group), strict=True))
    for name in DEFAULTS:
        group.pop(name, None)
    if given != DEFAULTS:
        group.update(given)


def require_valid(group: dict[str, Any], index: int, states: Mapping[Tensor, Any]) -> None:
    """Raise TypeError for a parameter that the options of its group cannot be of.

    ValueError for an option out of range, and where there is state in other bits. `index` is the
    position of the group in the optimizer.
    """
    options(group)
    names = group.get("param_names")
    for i, param in enumerate(group["params"]):
        label = repr(names[i]) if names else f"params[{i}] of param_groups[{index}]"
        require_storable(param, group, label)
        state = states.get(param)
        if not state:
            continue
        expected = state_bits(param, group)
        kept = 32
        if "exp_inf_scale" in state:
            kept = 8 if getattr(state.get("exp_inf"), "dtype", None) == torch.uint8 else 16
        if kept != expected:
            raise ValueError(
                f"state_bits of param_groups[{index}] must stay as they were once there is state, "
                f"which is not converted: that of {label} is in {kept} bits; received "
                f"{group.get('state_bits', 32)}"
            )


def require_storable(param: Tensor, group: dict[str, Any], label: str) -> None:
    """Raise TypeError, naming the parameter, where the options of its group cannot be its own."""
    bits, rounding, _ = options(group)
    computed = state_dtype(param)
    if bits != 32 and computed != torch.float32:
        raise TypeError(
            f"{label} has dtype {param.dtype}, whose state cannot be kept in state_bits={bits}; "
            "expected float32, bfloat16 or float16, or a group of its own with state_bits=32"
        )
    if rounding != "nearest" and param.dtype in (torch.float16, torch.complex32):
        raise TypeError(
            f"{label} has dtype {param.dtype}, which weight_rounding={rounding!r} does not know; "
            "expected bfloat16, or a group of its own with weight_rounding='nearest'"
        )


def state_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of the full moments of a parameter."""
    return _WIDER.get(param.dtype, param.dtype)


def state_bits(param: Tensor, group: dict[str, Any]) -> int:
    """Return the bits in which the state of a parameter is kept."""
    return low_state.bits_of(group.get("state_bits", 32), param.numel())


def dtypes(param: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
    """Return those of the tensors of a state but for its count of steps, by key."""
    bits = state_bits(param, group)
    full = state_dtype(param)
    kept = dict(zip(("exp_avg", "exp_inf"), _MOMENTS.get(bits, (full, full)), strict=True))
    if bits != 32:
        kept["exp_inf_scale"] = torch.float32
    if group.get("weight_rounding") == "remainder" and param.dtype == torch.bfloat16:
        kept["remainder"] = torch.int16
    return kept
