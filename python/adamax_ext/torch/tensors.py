"""Tensors as the native step takes them: the local part, real numbers, one dense memory order."""

from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamax_ext.torch.storage import state_dtype


class Variable(NamedTuple):
    """A parameter with all that its step reads and writes."""

    param: Any
    grad: Any
    exp_avg: Tensor
    exp_inf: Tensor
    step: Tensor
    exp_inf_scale: Any = None  # of a norm in fewer bits
    remainder: Any = None  # what a bfloat16 weight does not hold
    number: int | None = None  # among all of the optimizer; None in a group without options
    first_element: int = 0  # of a part, where random numbers are drawn

    @classmethod
    def at(cls, arrays: list[Any], i: int) -> "Variable":
        """Return the variable at position `i` among the entries of many."""
        *tensors, extras = arrays[WIDTH * i : WIDTH * (i + 1)]
        return cls(*tensors, *(extras or ()))

    def put(self, arrays: list[Any], i: int) -> None:
        """Replace that variable."""
        arrays[WIDTH * i : WIDTH * (i + 1)] = [*self[: WIDTH - 1], self[WIDTH - 1 :]]

    @property
    def state(self) -> dict[str, Any]:
        """Return what is kept from step to step, by its key."""
        kept = zip(KEYS + OPTIONAL_KEYS, self[2:-2], strict=True)
        return {key: value for key, value in kept if value is not None}

    @property
    def written(self) -> list[Any]:
        """Return what a step writes."""
        return [self.param, *self.state.values()]

    @property
    def is_in_blocks(self) -> bool:
        """Whether scales go with stretches of the memory of the state."""
        return self.exp_inf_scale is not None and self.exp_avg.dtype == torch.int8


KEYS, OPTIONAL_KEYS = Variable._fields[2:5], Variable._fields[5:-2]  # of a state
WIDTH = 2 + len(KEYS) + 1  # entries of a variable among those of many; the last has the rest


def share_memory(arrays: list[Any], unfit: Iterable[int]) -> bool:
    """Whether a variable that is gathered may share memory with what another one has.

    `arrays` has the entries of each variable, one after the other; `unfit` are to be gathered.
    """
    storages = [
        (_storage_of(variable.grad), [_storage_of(tensor) for tensor in variable.written])
        for variable in (Variable.at(arrays, i) for i in range(len(arrays) // WIDTH))
    ]
    written = Counter(chain.from_iterable(own for _, own in storages))
    readers = Counter(grad for grad, _ in storages)
    return any(
        written[grad] > own.count(grad)
        or any(
            written[storage] > own.count(storage) or readers[storage] > (grad == storage)
            for storage in own
        )
        for grad, own in map(storages.__getitem__, unfit)
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
        param, grad, exp_avg, exp_inf, step, scale, remainder, number, first = variable
        if grad.layout != torch.strided:
            raise RuntimeError(f"{name} does not support sparse gradients")
        for key, kept in zip(KEYS + OPTIONAL_KEYS, variable[2:-2], strict=True):
            if not isinstance(kept, Tensor) and (key in KEYS or kept is not None):
                raise RuntimeError(f"{key} of a state must be a tensor; received {kept!r}")
        for tensor in variable.written + [grad] * writes_gradient:
            require_writable(tensor)
        self.copies: list[tuple[Tensor, Tensor]] = []  # and what each stands for
        own_grad = grad
        if _storage_of(grad) in map(_storage_of, variable.written):  # it may lie across that
            grad = grad.clone()
        if param.is_complex():
            param, grad, exp_avg, exp_inf = map(
                torch.view_as_real, (param, grad.resolve_conj(), exp_avg, exp_inf)
            )
        order = torch.empty_like(param)  # dense, and as the parameter if that is dense
        wide = state_dtype(param)
        if variable.is_in_blocks and exp_avg.shape == param.shape:  # which were made in its order
            order = torch.empty_like(exp_avg, dtype=param.dtype, device=param.device)
            if exp_inf.stride() != exp_avg.stride():
                raise RuntimeError(
                    "exp_avg and exp_inf in 8 bits must have the same strides; received "
                    f"{exp_avg.stride()} and {exp_inf.stride()}"
                )

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
        # Moments in another float dtype are computed in full; where there may be fewer bits, and of
        # a dtype that would not hold them, the native step says what is wrong.
        is_full = scale is None and number is None
        is_full &= exp_avg.is_floating_point() and exp_inf.is_floating_point()
        exp_avg = plain(exp_avg, wide if is_full else exp_avg.dtype)
        exp_inf = plain(exp_inf, wide if is_full else exp_inf.dtype)
        if remainder is not None:
            remainder = plain(remainder, remainder.dtype)
        count = step
        is_plain = step.is_floating_point() and step.itemsize >= 4
        if not (is_plain and (step.is_cpu or step.device == param.device)):
            count = step.to("cpu", torch.float64)
            self.copies.append((count, step))
        self.variable = Variable(
            param, grad, exp_avg, exp_inf, count, scale, remainder, number, first
        )


def scatter(gathered: Iterable[Gathered]) -> None:
    """Copy back what was computed in other memory."""
    for one in gathered:
        for copy, tensor in one.copies:
            tensor.copy_(copy)
