"""State in fewer bits and remainders of weights on Keras' torch backend, and both as numbers."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np
import torch

from adamax_ext import _core, _settings, arrays, checkpoint, low_state

Strides: TypeAlias = tuple[int, ...]
_INTEGERS = ("int8", "uint8", "int16")


def dtype_of(kind: str | None, shape: Sequence[int], state_bits: int) -> str | None:
    """Return the dtype of such state of a variable of that shape; None if it is Keras' own."""
    bits = low_state.bits_of(state_bits, math.prod(shape))
    return (
        low_state.DTYPES[bits][low_state.STATE.index(kind)]
        if bits < 32 and kind in low_state.STATE
        else None
    )


def require_storable(variables: Sequence[Any], state_bits: int, weight_rounding: str) -> None:
    """Raise TypeError for a variable that cannot be stored so."""
    for i, variable in enumerate(variables):
        label = f"variables[{i}] (variable '{variable.path}') has dtype {variable.dtype}, "
        if state_bits < 32 and variable.dtype == "float64":
            raise TypeError(
                f"{label}whose state is float64; expected float32, float16 or bfloat16 with "
                f"state_bits {state_bits}"
            )
        if weight_rounding != "nearest" and variable.dtype == "float16":
            raise TypeError(
                f"{label}which weight_rounding {weight_rounding!r} does not know; expected "
                "bfloat16, or weight_rounding 'nearest'"
            )


class _Kept(NamedTuple):
    """What belongs to a variable."""

    weight: Any
    momentum: Any
    norm: Any
    norm_scale: Any
    remainder: Any
    strides: Strides


class Stored:
    """What an optimizer keeps beside Keras' state: scales of norms, and remainders of weights.

    There is one for each variable, or None. `strides` are those of its state when that was made.
    """

    def __init__(self, optimizer: Any) -> None:
        state = list(zip(optimizer._trainable_variables, optimizer._m, optimizer._u, strict=True))
        self.epsilon = float(optimizer.epsilon)  # first moments in 8 bits are relative to it
        self.strides = [() if u is None else tuple(u._value.stride()) for _, _, u in state]
        self.norm_scales = [None if u is None else _new_scale(optimizer, w, u) for w, _, u in state]
        self.remainders = [
            optimizer.add_stored(w, "remainder", "int16")
            if u is not None and w.dtype == "bfloat16" and optimizer.weight_rounding == "remainder"
            else None
            for w, _, u in state
        ]

    def _kept(self, optimizer: Any) -> Iterator[_Kept]:
        lists = (optimizer._trainable_variables, optimizer._m, optimizer._u)
        rows = zip(*lists, self.norm_scales, self.remainders, self.strides, strict=True)
        return (_Kept(*row) for row in rows)

    def _keras_layout(self, optimizer: Any) -> tuple[list[Any], list[Any]]:
        """Return the variables that Keras has too, and those whose weights are appended."""
        beside = {id(v) for v in (*self.norm_scales, *self.remainders) if v is not None}
        joined = [kept.weight for kept in self._kept(optimizer) if kept.remainder is not None]
        return [v for v in optimizer._variables if id(v) not in beside], joined

    def numbers(self, optimizer: Any) -> list[Any]:
        """Return all in Keras' layout, and at last the float32 weights that have remainders."""
        number_of: dict[int, Any] = {}
        for kept in self._kept(optimizer):
            if kept.norm_scale is not None:
                codes = {kind: _host(getattr(kept, kind), kept.strides) for kind in low_state.STATE}
                codes["norm_scale"] = _host(kept.norm_scale, (1,))
                decoded = low_state.decoded(codes, self.epsilon)
                number_of |= {id(getattr(kept, kind)): decoded[kind] for kind in low_state.STATE}
            if kept.remainder is not None:
                halves, low = (_host(v, kept.strides) for v in (kept.weight, kept.remainder))
                joined = number_of[id(kept.weight)] = np.empty_like(low, np.float32)
                _core.join_weights(halves, low, joined)
        of_keras, joined_ones = self._keras_layout(optimizer)
        return [
            number_of[id(v)] if id(v) in number_of else v.numpy() for v in (*of_keras, *joined_ones)
        ]

    def load(self, optimizer: Any, store: Mapping[str, Any]) -> None:
        """Set everything from `numbers`, or from what Keras saved: then remainders become 0."""
        of_keras, joined_ones = self._keras_layout(optimizer)
        expected = [*of_keras, *joined_ones]
        count = len(store.keys())
        if count not in (len(of_keras), len(expected)):
            warnings.warn(
                f"Skipping variable loading for optimizer '{optimizer.name}', because it has "
                f"{len(expected)} variables whereas the saved optimizer has {count} variables. ",
                stacklevel=3,
            )
            return
        number_of = {}
        for i, variable in enumerate(expected[:count]):
            label, shape = f"store['{i}'] ('{variable.path}')", tuple(variable.shape)
            is_count, is_double = variable is optimizer._iterations, variable.dtype == "float64"
            dtype = "int64" if is_count else "float64" if is_double else "float32"
            value = number_of[id(variable)] = checkpoint.as_numbers(
                label, store[str(i)], shape, dtype
            )
            if is_count:
                _settings.integer(label, value.item(), 0, np.iinfo(variable.dtype).max)
        bits: list[tuple[Any, arrays.HostArray]] = []
        for kept in self._kept(optimizer):
            if kept.norm is not None:
                low_state.require_norms(kept.weight.path, {"norm": number_of[id(kept.norm)]})
            if kept.norm_scale is not None:
                state = {
                    kind: _ordered(number_of.pop(id(getattr(kept, kind))), kept.strides)
                    for kind in low_state.STATE
                }
                codes = low_state.encoded(state, optimizer.state_bits, self.epsilon)
                bits += [(getattr(kept, kind), array) for kind, array in codes.items()]
            if kept.remainder is not None:
                joined = number_of.get(id(kept.weight))
                lower = np.zeros(kept.weight.shape, np.int16)
                if joined is not None:
                    halves, lower = _split(joined, kept.strides)
                    lower[halves != _host(kept.weight, kept.strides)] = 0  # others now
                bits.append((kept.remainder, lower))
        for variable in of_keras:
            if id(variable) in number_of:
                variable.assign(number_of[id(variable)])
        for variable, array in bits:
            _write(variable, array)

    def require_fitting(self, optimizer: Any, weights: Sequence[Any]) -> None:
        """Raise ValueError for what is no value of each variable, as it is stored."""
        variables = optimizer._variables
        if len(weights) != len(variables):
            raise ValueError(
                f"weights must have one entry for each of the {len(variables)} variables, in which "
                f"state is as it is stored; received {len(weights)}: load_own_variables() takes "
                "numbers, and what Keras saved"
            )
        for i, (weight, variable) in enumerate(zip(weights, variables, strict=True)):
            dtype = keras.backend.standardize_dtype(weight.dtype)
            is_other = variable.dtype in _INTEGERS and dtype != variable.dtype
            if is_other or tuple(weight.shape) != tuple(variable.shape):
                raise ValueError(
                    f"weights[{i}] must have dtype {variable.dtype} and shape "
                    f"{tuple(variable.shape)} as '{variable.path}' has; received {dtype} and "
                    f"{tuple(weight.shape)}"
                )

    def overwrite(self, weights: Sequence[Any], averages: Sequence[Any]) -> None:
        """Overwrite weights that have remainders, and these, with the averages."""
        rows = zip(weights, averages, self.remainders, self.strides, strict=True)
        for weight, average, remainder, strides in rows:
            if remainder is not None:
                for variable, array in zip(
                    (weight, remainder), _split(_host(average, strides), strides), strict=True
                ):
                    _write(variable, array)


def _new_scale(optimizer: Any, weight: Any, norm: Any) -> Any:
    """Return what codes of norms are relative to, at the beginning; None for numbers."""
    bits = {dtypes[1]: bits for bits, dtypes in low_state.DTYPES.items()}.get(norm.dtype)
    if bits is None:
        return None
    shape = (low_state.number_of_scales(bits, math.prod(norm.shape)),)
    initializer = keras.initializers.Constant(low_state.FIRST_SCALES[bits])
    return optimizer.add_stored(weight, "norm_scale", "float32", shape, initializer)


def _host(variable: Any, strides: Strides) -> arrays.HostArray:
    """Return a copy in this memory order, with the bits that are stored."""
    tensor = variable._value.detach()
    if tensor.stride() != strides:
        like = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
        tensor = like.copy_(tensor)
    return arrays.as_stored(tensor)


def _ordered(numbers: arrays.HostArray, strides: Strides) -> arrays.HostArray:
    """Return float32 numbers in this memory order."""
    array: arrays.HostArray = torch.empty_strided(
        numbers.shape, strides, dtype=torch.float32
    ).numpy()
    array[...] = numbers
    return array


def _split(joined: arrays.HostArray, strides: Strides) -> tuple[arrays.HostArray, arrays.HostArray]:
    """Return float32 weights as bfloat16 and what is left."""
    joined = _ordered(joined, strides)
    halves, remainders = np.empty_like(joined, np.uint16), np.empty_like(joined, np.int16)
    _core.split_weights(joined, halves, remainders)
    return halves, remainders


def _write(variable: Any, array: arrays.HostArray) -> None:
    """Overwrite a variable with the bits that are to be stored."""
    if array.dtype == np.uint16:
        source = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        source = torch.from_numpy(array)
    with torch.no_grad():
        variable._value.copy_(source)
