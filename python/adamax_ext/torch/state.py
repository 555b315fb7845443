"""The state of a parameter as torch keeps it: new, counted, and loaded."""

from typing import Any

import torch
from torch import Tensor

from adamax_ext import low_state
from adamax_ext.torch import storage
from adamax_ext.torch.parts import is_distributed, parts_of
from adamax_ext.torch.tensors import KEYS, OPTIONAL_KEYS


def new_state(param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """Return the state of a parameter that was never stepped."""
    storage.require_storable(param, group, f"a parameter of shape {tuple(param.shape)}")
    state = {"step": new_count(param, group["capturable"])}
    for key, dtype in storage.dtypes(param, group).items():
        state[key] = _new(key, param, group, dtype)
    return state


def new_count(param: Tensor, capturable: bool, value: float = 0.0) -> Tensor:
    """Return a number of completed steps as torch keeps it."""
    is_double = torch.get_default_dtype() == torch.float64
    return torch.tensor(
        value,
        dtype=torch.float64 if is_double else torch.float32,
        device=param.device if capturable else None,
    )


def _new(key: str, param: Tensor, group: dict[str, Any], dtype: torch.dtype) -> Tensor:
    if key != "exp_inf_scale":
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    bits = storage.state_bits(param, group)
    if bits == 8 and is_distributed(param):  # in 16 bits it is the same on all ranks
        return parts_of(param).new_scales(param.device, dtype)
    shape, first = (low_state.number_of_scales(bits, param.numel()),), low_state.FIRST_SCALES[bits]
    return torch.full(shape, first, dtype=dtype, device=param.device)


def loaded_state(
    given: dict[str, Any], param: Tensor, group: dict[str, Any], name: Any, has_remainder: bool
) -> dict[str, Any]:
    """Return tensors of a state that was saved as they are kept for `param`, without its count.

    Raises ValueError, with the `name` of the parameter in the file, if it was kept otherwise; also
    where a remainder is not there, if it was saved with some.
    """
    bits, expected = storage.state_bits(param, group), storage.dtypes(param, group)
    state: dict[str, Any] = {}
    for key in (*KEYS[:2], *OPTIONAL_KEYS):
        value: Any = given.get(key)
        dtype = expected.get(key)
        is_tensor = torch.is_tensor(value)
        if bits == 32 and key in KEYS:
            if is_tensor:
                state[key] = _placed(value, param, expected[key])
        elif key == "remainder" and value is None and dtype is not None and not has_remainder:
            state[key] = _new(key, param, group, dtype)  # the weights were all there was
        elif (value.dtype if is_tensor else value) != dtype:
            raise ValueError(
                f"{key} of parameter {name!r} in state_dict is "
                f"{f'of {value.dtype}' if is_tensor else repr(value)}; expected {dtype} for a "
                f"parameter of {param.numel()} elements of {param.dtype} with "
                f"state_bits={group.get('state_bits', 32)} and "
                f"weight_rounding={group.get('weight_rounding', 'nearest')!r}"
            )
        elif dtype is not None:
            if not is_distributed(param) and not is_distributed(value):
                _require_whole(key, value, param, bits, name)
            is_in_blocks = bits == 8 and key != "remainder"
            state[key] = value.to(param.device) if is_in_blocks else _placed(value, param, dtype)
    return state


def _require_whole(key: str, value: Tensor, param: Tensor, bits: int, name: Any) -> None:
    is_scale = key == "exp_inf_scale"
    shape = (low_state.number_of_scales(bits, param.numel()),) if is_scale else tuple(param.shape)
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{key} of parameter {name!r} in state_dict has shape {tuple(value.shape)}; expected "
            f"{shape}"
        )
    if is_scale and not value.is_meta and not bool((value.isfinite() & (value >= 0)).all()):
        raise ValueError(
            f"{key} of parameter {name!r} in state_dict must be finite and >= 0; received values "
            f"from {value.min().item()} to {value.max().item()}"
        )


def _placed(value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what was loaded in this dtype, and in the place and memory order of `param`."""
    if value.shape != param.shape or is_distributed(param):
        return value.to(param.device, dtype)
    moment = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
    same = (value.dtype, value.device, value.stride()) == (dtype, moment.device, moment.stride())
    return value if same else moment.copy_(value)
