"""Arrays of state: NumPy on the host, made by the parameter's own library on a GPU."""

import math
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from adamax_ext import _core

_CACHE_LINE = 64  # bytes; a vector is no longer
HostArray: TypeAlias = np.ndarray[Any, Any]
# What state is kept in: a NumPy array, or a device array of another library.
Array: TypeAlias = Any


def zeros_for(variable: Any, role: str, index: int, dtype: str | None = None) -> Array:
    """Return zeros with shape, memory order and device of `variable`, in its compute type.

    Or in `dtype`, where bfloat16 is uint16 if there is no other.
    """
    shape, strides, own_dtype, computed, address, _, device = _core.describe(variable, role, index)
    if device >= 0:
        library, in_memory = _library_of(variable, role, index, dtype or computed)
        with variable.device:  # CuPy allocates on the current one otherwise
            return library.zeros_like(variable, dtype=in_memory)
    if dtype is not None:
        return _zeros(shape, strides, host_dtype(dtype))
    # At the same place in a cache line, element for element, as a loop aligns both at once.
    return _zeros(shape, strides, computed, address * (1 if computed == own_dtype else 2))


def scales_for(variable: Any, role: str, index: int, length: int, first: float) -> Array:
    """Return so many float32 numbers, all `first`, in one axis, on the device of `variable`."""
    *_, device = _core.describe(variable, role, index)
    if device < 0:
        return np.full(length, first, np.float32)
    library, in_memory = _library_of(variable, role, index, "float32")
    with variable.device:
        return library.full((length,), first, dtype=in_memory)


def _library_of(variable: Any, role: str, index: int, dtype: str) -> tuple[Any, Any]:
    """Return the library of a device array, and its name for the dtype or for the same bits."""
    for base in type(variable).__mro__:
        library = sys.modules.get(base.__module__.partition(".")[0])
        name = dtype if hasattr(library, dtype) else host_dtype(dtype)
        if library is not None and hasattr(library, "zeros_like") and hasattr(library, name):
            return library, getattr(library, name)
    raise TypeError(
        f"{role}[{index}] is a {type(variable).__name__} on a GPU, whose library cannot make the "
        "optimizer's state; expected a torch tensor or a CuPy array"
    )


def _zeros(shape: Sequence[int], strides: Sequence[int], dtype: str, address: int = 0) -> HostArray:
    """Return zeros whose axes lie in memory in the order that `strides` tell.

    They begin in a cache line where `address` does, as far as whole elements allow.
    """
    slowest_first = sorted(range(len(shape)), key=lambda axis: -strides[axis])
    itemsize = np.dtype(dtype).itemsize
    size = math.prod(shape) * itemsize
    memory = np.zeros(size + _CACHE_LINE, np.uint8)
    begin = (address // itemsize * itemsize - memory.ctypes.data) % _CACHE_LINE
    array = (
        memory[begin : begin + size].view(dtype).reshape([shape[axis] for axis in slowest_first])
    )
    return array.transpose(np.argsort(slowest_first))


def memory_order(array: Any, role: str, index: int) -> tuple[int, ...]:
    """Return the axes that are longer than 1 in their order in memory, the slowest first."""
    shape, strides, *_ = _core.describe(array, role, index)
    axes = [axis for axis, length in enumerate(shape) if length > 1]
    return tuple(sorted(axes, key=lambda axis: -strides[axis]))


def in_memory_order(array: HostArray, order: Sequence[int]) -> HostArray:
    """Return an array whose axes that are longer than 1 lie in memory in that order."""
    axes = [*order, *(axis for axis in range(array.ndim) if axis not in order)]
    return np.asarray(array.transpose(axes), order="C").transpose(np.argsort(axes))


def host_dtype(dtype: str) -> str:
    """Return the name of the dtype in which NumPy holds the same bits."""
    return "uint16" if dtype == "bfloat16" else dtype


def shape_and_dtype(array: Array) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return both as NumPy has them."""
    if isinstance(array, np.ndarray):
        return array.shape, array.dtype
    shape, _, dtype, *_ = _core.describe(array, "state", 0)
    return shape, np.dtype(host_dtype(dtype))


def as_host(array: Any, name: str) -> HostArray:
    """Return what exports memory, or holds numbers, as NumPy's; ValueError if NumPy cannot read it.

    It is no copy if it need not be. What NumPy does not know becomes float32: the bfloat16 of
    torch, and the void of two bytes in which HDF5 keeps it.
    """
    try:
        if hasattr(array, "detach"):  # a torch tensor, which may require grad or be on a GPU
            array = array.detach().cpu()
            array = array.float() if str(array.dtype) == "torch.bfloat16" else array
        if not isinstance(array, np.ndarray) and _is_on_device(array):
            shape, strides, dtype, *_ = _core.describe(array, name, -1)
            copy = _zeros(shape, strides, dtype)
            _core.copy(copy, array)
            array = copy
        elif hasattr(array, "__dlpack__") and not hasattr(array, "__array__"):
            array = np.from_dlpack(array)
        host: HostArray = np.asarray(array)
    except (TypeError, ValueError, RuntimeError, BufferError, LookupError) as error:
        raise ValueError(
            f"{name} must be an array that NumPy can read; received {type(array).__name__}: {error}"
        ) from error
    if host.dtype == np.dtype("V2"):
        host = widened(np.array(host, order="C").view(np.uint16))
    return host


def widened(patterns: HostArray) -> HostArray:
    """Return the bits of bfloat16 as float32."""
    # NumPy 1 makes int64 of a single number and the 16 of Python.
    return np.asarray(patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)


def as_stored(array: Array) -> HostArray:
    """Return state, or a weight, as NumPy's in its memory order; bfloat16 as uint16.

    It is no copy if it need not be.
    """
    if isinstance(array, np.ndarray):
        return array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    shape, strides, dtype, *_ = _core.describe(array, "state", 0)
    copy = _zeros(shape, strides, host_dtype(dtype))
    _core.copy(copy, array)
    return copy


def to_host(array: Array) -> HostArray:
    """Return a NumPy copy of state in C order, as checkpoint files need it."""
    return np.array(as_stored(array), order="C")


def assign(array: Array, values: HostArray) -> None:
    """Overwrite all elements with `values`, which have the same shape."""
    if isinstance(array, np.ndarray):
        array[...] = values
        return
    shape, strides, dtype, *_ = _core.describe(array, "state", 0)
    host = _zeros(shape, strides, host_dtype(dtype))
    host[...] = values
    _core.copy(array, host)


def _is_on_device(array: Any) -> bool:
    if hasattr(array, "__dlpack_device__"):
        return array.__dlpack_device__()[0] in (2, 13)  # CUDA's memory, and what it manages
    return hasattr(array, "__cuda_array_interface__")
