"""The tensors of an optimizer on Keras' torch backend, as the native step takes them."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import keras
import torch
from torch import Tensor

from adamax_ext import _core
from adamax_ext.torch.tensors import require_writable

# Not `value`, which can be a copy in another dtype, or of a stateless scope.
_tensor_of = attrgetter("_value")
_is_overwritten = attrgetter("_overwrite_with_gradient")

# Pairs of parameter and gradient that the native step takes.
_PAIRS = {(getattr(torch, param), getattr(torch, grad)) for param, grad, _ in _core.storages}


class Number:
    """The value of tensors of one element, read from a GPU only after they were written."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int, int, Any]] = {}  # by id of the tensor

    def of(self, tensor: Tensor) -> Any:
        """Return the number that the tensor has now."""
        if tensor.is_cpu:
            return tensor.item()
        _, *place, number = self._known.get(id(tensor), (None, -1, -1, None))
        if place != [tensor.data_ptr(), tensor._version]:
            number = self._note(tensor, tensor.item())
        return number

    def write(self, tensor: Tensor, number: Any) -> None:
        """Overwrite the tensor, on its device and in the order of the work there."""
        tensor.fill_(number)
        if not tensor.is_cpu:
            self._note(tensor, number)

    def _note(self, tensor: Tensor, number: Any) -> Any:
        self._known[id(tensor)] = (tensor, tensor.data_ptr(), tensor._version, number)
        return number


class Tensors:
    """The weights and state of an optimizer that are stepped, and what stands for some of them.

    One that has gaps in memory, or state in another memory order than its weight, is copied before
    a step and back after it. What is `stored` in fewer bits keeps the memory order that it was made
    in, by which blocks and random numbers go.
    """

    def __init__(self, optimizer: Any) -> None:
        variables = optimizer._trainable_variables
        self._all = variables
        self._kinds = _kinds(optimizer)
        self._overwritten = list(map(_is_overwritten, variables))
        self.has_overwritten = any(self._overwritten)
        uses_averages, accumulates = self._kinds
        stored = optimizer._stored
        lists = {"weights": variables, "momentum": optimizer._m, "norm": optimizer._u}
        if uses_averages:
            lists["averages"] = optimizer._model_variables_moving_average
        if accumulates:
            lists["accumulators"] = optimizer._accumulated_gradients
        if stored is not None:
            lists |= {"norm_scales": stored.norm_scales, "remainders": stored.remainders}
        # Keras makes no moments for variables that are to be overwritten.
        places = [
            i
            for i, (momentum, is_overwritten) in enumerate(
                zip(optimizer._m, self._overwritten, strict=True)
            )
            if momentum is not None and not is_overwritten
        ]
        stepped = [[kept[i] for kept in lists.values()] for i in places]
        self.variables = [kept[0] for kept in stepped]
        self._sources = [v for v in chain.from_iterable(stepped) if v is not None]
        self._known = list(map(_tensor_of, self._sources))
        self._state = [v._value for kept in stepped for v in kept[1:] if v is not None]
        # What the optimizer has, and not what stands for it.
        self.own_accumulators = (
            [optimizer._accumulated_gradients[i]._value for i in places] if accumulates else []
        )
        self._addresses = _addresses(self._state)
        self._layouts = list(map(_layout, self._known))
        self._copies: list[tuple[Tensor, Tensor]] = []  # and what each stands for
        dense = [
            self._dense(
                [None if v is None else v._value for v in kept],
                None if stored is None else stored.strides[i],
            )
            for i, kept in zip(places, stepped, strict=True)
        ]
        columns = dict(zip(lists, zip(*dense, strict=True), strict=True)) if dense else {}
        self.weights = columns.get("weights", ())
        self.momentum, self.norm = columns.get("momentum", ()), columns.get("norm", ())
        self.averages, self.accumulators, self.norm_scales, self.remainders = (
            columns.get(kind, ()) if kind in lists else None
            for kind in ("averages", "accumulators", "norm_scales", "remainders")
        )
        self._weight_of = {id(v): w for v, w in zip(self.variables, self.weights, strict=True)}

    def _dense(
        self, tensors: list[Tensor | None], strides: tuple[int, ...] | None
    ) -> list[Tensor | None]:
        """Return the weight of a variable and its state, in one dense memory order.

        It is that of `strides`, or that of the weight, if the weight is dense.
        """
        weight = tensors[0]
        assert weight is not None
        if strides is None:
            strides = torch.empty_like(weight).stride()
        for i, tensor in enumerate(tensors):
            if tensor is None:
                continue
            is_like_weight = tensor.shape == weight.shape  # and no scales
            wanted = strides if is_like_weight else torch.empty_like(tensor).stride()
            if tensor.stride() != wanted:
                require_writable(tensor)
                copy = torch.empty_strided(
                    tensor.shape, wanted, dtype=tensor.dtype, device=weight.device
                )
                tensors[i] = copy
                self._copies.append((copy, tensor))
        return tensors

    def are_those_of(self, optimizer: Any) -> bool:
        """Whether the optimizer still has these tensors, in this memory.

        Of weights the native step itself sees where they are.
        """
        return (
            self._all is optimizer._trainable_variables
            and self._kinds == _kinds(optimizer)
            and self._overwritten == list(map(_is_overwritten, self._all))
            and are_same(list(map(_tensor_of, self._sources)), self._known)
            and _addresses(self._state) == self._addresses
        )

    def have_their_layouts(self) -> bool:
        """Whether dtypes and memory orders are what they were."""
        return list(map(_layout, self._known)) == self._layouts

    def weights_of(self, variables: list[Any]) -> tuple[Tensor, ...] | None:
        """Return the tensors that the native step knows variables by; None stands for all."""
        if are_same(variables, self.variables):
            return None
        return tuple([self._weight_of.get(id(v), v._value) for v in variables])

    def gather(self) -> None:
        """Copy what is stepped in other memory there."""
        if self._copies:
            copy_each((tensor, copy) for copy, tensor in self._copies)

    def scatter(self) -> None:
        """Copy it back."""
        if self._copies:
            copy_each(self._copies)

    def fitting(self, grads: Sequence[Any], weights: Iterable[Tensor]) -> Iterator[Tensor]:
        """Return gradients as Keras reads them, in dtype and memory order of their weights."""
        written = {_storage_of(t) for t in chain(self.weights, self._state)}
        for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            tensor = keras.ops.convert_to_tensor(grad)
            if tensor.layout != torch.strided:
                tensor = tensor.to_dense()
            if tensor.shape != weight.shape:
                raise ValueError(
                    f"grads[{i}] must have the shape {tuple(weight.shape)} of its variable; "
                    f"received {tuple(tensor.shape)}"
                )
            is_pair = (weight.dtype, tensor.dtype) in _PAIRS
            dtype = tensor.dtype if is_pair else weight.dtype
            if (
                (tensor.dtype, tensor.device) != (dtype, weight.device)
                or tensor.stride() != weight.stride()
                or tensor.is_neg()
                or _storage_of(tensor) in written
            ):
                tensor = torch.empty_like(weight, dtype=dtype).copy_(tensor.detach())
            yield tensor


@torch.no_grad()
def copy_each(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the first of each pair to the second."""
    for source, target in pairs:
        target.copy_(source)


def are_same(items: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two sequences have the same objects: those of Keras and torch cannot tell by ==."""
    return len(items) == len(others) and all(map(is_, items, others))


def _kinds(optimizer: Any) -> tuple[bool, bool]:
    """Return whether there are averages and accumulators in use."""
    return bool(optimizer.use_ema), bool(optimizer.gradient_accumulation_steps)


def _addresses(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
