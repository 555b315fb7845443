"""Arrays of state: NumPy on the host, made by the parameter's own library on a GPU."""

import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from adamax_ext import _core

HostArray: TypeAlias = np.ndarray[Any, Any]
# What state is kept in: a NumPy array, or a device array of another library.
Array: TypeAlias = Any


def zeros_for(variable: Any, role: str, index: int) -> Array:
    """Return zeros with shape, memory order and device of `variable`, in its compute type."""
    shape, strides, dtype, _, _, device = _core.describe(variable, role, index)
    if device < 0:
        return _zeros(shape, strides, dtype)
    for base in type(variable).__mro__:
        library = sys.modules.get(base.__module__.partition(".")[0])
        if library is not None and hasattr(library, "zeros_like") and hasattr(library, dtype):
            with variable.device:  # CuPy allocates on the current one otherwise
                return library.zeros_like(variable, dtype=getattr(library, dtype))
    raise TypeError(
        f"{role}[{index}] is a {type(variable).__name__} on a GPU, whose library cannot make the "
        "optimizer's state; expected a torch tensor or a CuPy array"
    )


def _zeros(shape: Sequence[int], strides: Sequence[int], dtype: str) -> HostArray:
    """Return zeros whose axes lie in memory in the order that `strides` tell."""
    slowest_first = sorted(range(len(shape)), key=lambda axis: -strides[axis])
    array = np.zeros([shape[axis] for axis in slowest_first], dtype)
    return array.transpose(np.argsort(slowest_first))


def shape_and_dtype(array: Array) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return both as NumPy has them."""
    if isinstance(array, np.ndarray):
        return array.shape, array.dtype
    shape, _, dtype, *_ = _core.describe(array, "state", 0)
    return shape, np.dtype(dtype)


def to_host(array: Any) -> HostArray:
    """Return a NumPy copy in C order, as checkpoint files need it."""
    if not isinstance(array, np.ndarray) and _is_on_device(array):
        shape, strides, dtype, *_ = _core.describe(array, "state", 0)
        copy = _zeros(shape, strides, dtype)
        _core.copy(copy, array)
        array = copy
    return np.array(array, order="C")


def assign(array: Array, values: HostArray) -> None:
    """Overwrite all elements with `values`, which have the same shape."""
    if isinstance(array, np.ndarray):
        array[...] = values
        return
    shape, strides, dtype, *_ = _core.describe(array, "state", 0)
    host = _zeros(shape, strides, dtype)
    host[...] = values
    _core.copy(array, host)


def _is_on_device(array: Any) -> bool:
    if hasattr(array, "__dlpack_device__"):
        return array.__dlpack_device__()[0] in (2, 13)  # CUDA's memory, and what it manages
    return hasattr(array, "__cuda_array_interface__")
