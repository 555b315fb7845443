"""The state of a parameter as torch keeps it: new, counted, and loaded."""

import torch
from torch import Tensor

from adamax_ext.torch.tensors import Variable, is_distributed, state_dtype

STATE_KEYS = Variable._fields[2:]


def new_state(param: Tensor, capturable: bool) -> dict[str, Tensor]:
    """Return the state of a parameter that was never stepped."""

    def zeros() -> Tensor:
        return torch.zeros_like(
            param, dtype=state_dtype(param), memory_format=torch.preserve_format
        )

    return {"step": new_count(param, capturable), "exp_avg": zeros(), "exp_inf": zeros()}


def new_count(param: Tensor, capturable: bool, value: float = 0.0) -> Tensor:
    """Return a number of completed steps as torch keeps it."""
    is_double = torch.get_default_dtype() == torch.float64
    return torch.tensor(
        value,
        dtype=torch.float64 if is_double else torch.float32,
        device=param.device if capturable else None,
    )


def as_moment(value: Tensor, param: Tensor) -> Tensor:
    """Return a moment that was loaded, in the dtype, place and memory order of one of `param`."""
    dtype = state_dtype(param)
    if value.shape != param.shape or is_distributed(param):
        return value.to(param.device, dtype)
    moment = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
    same = (value.dtype, value.device, value.stride()) == (dtype, moment.device, moment.stride())
    return value if same else moment.copy_(value)
