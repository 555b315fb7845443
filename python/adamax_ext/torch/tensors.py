"""Tensors as the native step takes them: the local part, real numbers, one dense memory order."""

from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

# In which state is kept, and the arithmetic done, where it is not the dtype of the parameter.
_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}


def state_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of the moments of a parameter."""
    return _WIDER.get(param.dtype, param.dtype)


class Variable(NamedTuple):
    """A parameter with all that its step reads and writes."""

    param: Any
    grad: Any
    exp_avg: Tensor
    exp_inf: Tensor
    step: Tensor


WIDTH = len(Variable._fields)  # of one in a list of tensors of many


def is_distributed(tensor: Any) -> bool:
    """Whether this is a DTensor, of which each process has a part."""
    return hasattr(tensor, "placements")


def placed(variable: Variable, i: int) -> Variable:
    """Return DTensors of which this process has the same parts as of the parameter, itself one.

    `i` is the position among all variables of the step. Raises RuntimeError for what torch's own
    step does not take either.
    """
    param, grad, exp_avg, exp_inf, step = variable
    with torch.no_grad():
        grad = _placed_as(param, grad, f"grads[{i}]")
        exp_avg = _placed_as(param, exp_avg, f"exp_avg[{i}]")
        exp_inf = _placed_as(param, exp_inf, f"exp_inf[{i}]")
    return Variable(param, grad, exp_avg, exp_inf, step)


def local(variable: Variable) -> Variable:
    """Return the parts of DTensors that this process has; of other tensors, all."""
    return Variable(*(ready(getattr(tensor, "_local_tensor", tensor)) for tensor in variable))


def _placed_as(param: Any, tensor: Any, label: str) -> Any:
    if not is_distributed(tensor):
        raise RuntimeError(
            f"got mixed torch.Tensor and DTensor: {label} of shape {tuple(tensor.shape)} is no "
            f"DTensor, but its parameter of shape {tuple(param.shape)} is one"
        )
    if tensor.device_mesh != param.device_mesh:
        raise RuntimeError(
            f"{label} and its parameter are on different meshes: got {tensor.device_mesh} and "
            f"{param.device_mesh}"
        )
    if tensor.placements == param.placements:
        return tensor
    return tensor.redistribute(placements=param.placements)


def ready(tensor: Any) -> Any:
    """Return what a collective gave, which may still be under way."""
    return tensor.wait() if hasattr(tensor, "wait") else tensor


def share_memory(arrays: list[Tensor], unfit: Iterable[int]) -> bool:
    """Whether a variable that is gathered may share memory with what another one has.

    `arrays` has the tensors of each Variable, one after the other; `unfit` are to be gathered.
    """
    storages = [_storage_of(tensor) for tensor in arrays]
    variables = [storages[begin : begin + WIDTH] for begin in range(0, len(arrays), WIDTH)]
    written = Counter(chain.from_iterable([param, *kept] for param, _, *kept in variables))
    readers = Counter(grad for param, grad, *_ in variables if grad != param)
    return any(
        written[grad] > (grad == param)
        or any(written[storage] > 1 or readers[storage] > 0 for storage in (param, *kept))
        for param, grad, *kept in map(variables.__getitem__, unfit)
    )


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.numel() > 0 else id(tensor)


def require_writable(tensor: Tensor) -> None:
    """Raise RuntimeError for a tensor that `copy_` cannot write."""
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    if any(stride == 0 and size > 1 for size, stride in axes):
        raise RuntimeError(
            "unsupported operation: more than one element of a parameter or its state refers to a "
            f"single memory location; received shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride()}"
        )
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "a parameter or its state was made in inference mode and has gaps in memory; such a "
            "tensor can be stepped in inference mode alone"
        )


class Gathered:
    """A variable in memory that the native step takes, and the way back.

    Raises RuntimeError for what torch's own step does not take either.
    """

    def __init__(self, variable: Variable, name: str, writes_gradient: bool) -> None:
        param, grad, exp_avg, exp_inf, step = variable
        if grad.layout != torch.strided:
            raise RuntimeError(f"{name} does not support sparse gradients")
        for key, kept in zip(Variable._fields[2:], variable[2:], strict=True):
            if not isinstance(kept, Tensor):
                raise RuntimeError(f"{key} of a state must be a tensor; received {kept!r}")
        written = [param, exp_avg, exp_inf, step] + [grad] * writes_gradient
        for tensor in written:
            require_writable(tensor)
        self.copies: list[tuple[Tensor, Tensor]] = []  # and what each stands for
        own_grad = grad
        if _storage_of(grad) == _storage_of(param):  # it may lie across what is written
            grad = grad.clone()
        if param.is_complex():
            param, grad, exp_avg, exp_inf = map(
                torch.view_as_real, (param, grad.resolve_conj(), exp_avg, exp_inf)
            )
        order = torch.empty_like(param)  # dense, and as the parameter if that is dense
        wide = state_dtype(param)

        def plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            if tensor.shape != order.shape:
                raise RuntimeError(
                    f"gradient and state must have the shape {tuple(order.shape)} of their "
                    f"parameter; received {tuple(tensor.shape)}"
                )
            if (
                (tensor.dtype, tensor.device) == (dtype, order.device)
                and tensor.stride() == order.stride()
                and not tensor.is_neg()
            ):
                return tensor
            copy = torch.empty_like(order, dtype=dtype).copy_(tensor)
            self.copies.append((copy, tensor))
            return copy

        grad = plain(grad, param.dtype if grad.dtype == param.dtype else wide)
        unscaled = torch.view_as_complex(grad) if own_grad.is_complex() else grad
        self.copies = [(unscaled, own_grad)] if writes_gradient else []
        param = plain(param, param.dtype)
        exp_avg, exp_inf = plain(exp_avg, wide), plain(exp_inf, wide)
        count = step
        is_plain = step.is_floating_point() and step.itemsize >= 4
        if not (is_plain and (step.is_cpu or step.device == param.device)):
            count = step.to("cpu", torch.float64)
            self.copies.append((count, step))
        self.variable = Variable(param, grad, exp_avg, exp_inf, count)


def scatter(gathered: Iterable[Gathered]) -> None:
    """Copy back what was computed in other memory."""
    for one in gathered:
        for copy, tensor in one.copies:
            tensor.copy_(copy)
