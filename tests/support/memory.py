"""Objects of every kind that have memory, and buffers for a step."""

import ctypes
import mmap
import sys

import numpy as np
import pytest
from adamax_ext import update

from support.bits import dtype_of
from support.frameworks import load_torch

WRITTEN = ("param", "m", "u", "average")
ROLES = ("param", "grad", "m", "u", "average")
OTHERS = ROLES[1:]  # than the parameter, with which they are compared
HAS_VERSION = np.lib.NumpyVersion(np.__version__) >= "2.1.0"  # what NumPy lends by DLPack
SHAPE = (4, 3)


def values(seed, shape=SHAPE, dtype="float32"):
    return np.array(np.random.default_rng(seed).uniform(0.5, 1.5, shape), dtype_of(dtype))


def buffers(shape=SHAPE, dtype="float32"):
    """One array for each buffer of `update`, in the order of its arguments."""
    return {role: values(seed, shape, dtype) for seed, role in enumerate(ROLES)}


def step(buffers):
    param, grad, m, u, average = buffers.values()
    update(param, grad, m, u, step=2, learning_rate=0.1, average=average)


def contents(objects):
    """The bits of what among `objects` is, or wraps, a readable array."""
    arrays = [getattr(o, "array", o) for o in objects]
    is_readable = [isinstance(a, np.ndarray) or "jax" in type(a).__module__ for a in arrays]
    return [np.asarray(a).tobytes() for a, yes in zip(arrays, is_readable, strict=True) if yes]


def holders(objects):
    """How many hold the array behind each DLPack object: one more after a step is a leak."""
    return [sys.getrefcount(o.array) for o in objects if isinstance(o, DLPackOnly)]


def as_arrays(objects):
    plain = [o.detach() if hasattr(o, "detach") else getattr(o, "array", o) for o in objects]
    return [np.asarray(o) for o in plain]


# ---- Objects with memory -------------------------------------------------------------------------


def lent(array, **arguments):
    """The capsule of NumPy, which has neither arguments nor a version before 2.1."""
    return array.__dlpack__(**(arguments if HAS_VERSION else {}))


class DLPackOnly:
    """Lends `array` by DLPack and by nothing else."""

    device = (1, 0)

    def __init__(self, source):
        self.array = source

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, max_version=None, copy=None):
        assert self.device == (1, 0), "memory of a device was asked for"
        return lent(self.array, max_version=max_version, copy=copy)


class OldDLPack(DLPackOnly):
    def __dlpack__(self, stream=None):  # before DLPack 1.0 there was no max_version
        return self.array.__dlpack__()


class OnDevice(DLPackOnly):
    def __init__(self, source, device=(2, 0)):
        super().__init__(source)
        self.device = device


class OnCuda:
    @property
    def __cuda_array_interface__(self):
        raise AssertionError("memory of a device was asked for")


class BrokenDLPack(DLPackOnly):
    def __dlpack__(self, **_):
        raise RuntimeError("the library says no")


class NoCapsule(DLPackOnly):
    def __dlpack__(self, **_):
        return 1


VERSION, FLAGS, DATA, DEVICE, AXES_AND_DTYPE, LENGTHS, STRIDES, OFFSET = 0, 3, 4, 5, 6, 7, 8, 9
ONES = (ctypes.c_int64 * 100_000)(*[1] * 100_000)
BEYOND = (ctypes.c_int64 * 1)(2**62)  # elements of four bytes: more than there are addresses


class Patched(DLPackOnly):
    """Lends a DLPack tensor of NumPy with some of its 64-bit words replaced.

    Words before the data are not there where NumPy lends without a version.
    """

    def __init__(self, source, words):
        super().__init__(source)
        self.words = words
        if not HAS_VERSION and min(words) < DATA:
            pytest.skip("needs NumPy 2.1, whose DLPack has a version and flags")

    def __dlpack__(self, **_):
        capsule = lent(self.array, max_version=(1, 0))
        name, first = (b"dltensor_versioned", 0) if HAS_VERSION else (b"dltensor", DATA)
        signature = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
        pointer = signature(("PyCapsule_GetPointer", ctypes.pythonapi))
        words = ctypes.cast(pointer(capsule, name), ctypes.POINTER(ctypes.c_int64))
        for index, word in self.words.items():
            words[index - first] = word
        return capsule


def float32_word(axes, lanes=1):
    return axes & 0xFFFFFFFF | 2 << 32 | 32 << 40 | lanes << 48


def with_axes(source, axes, strides=ONES, lengths=ONES):
    ones = {
        LENGTHS: ctypes.addressof(lengths),
        STRIDES: ctypes.addressof(strides) if strides else 0,
    }
    return Patched(source, {AXES_AND_DTYPE: float32_word(axes), **ones})


def torch_tensor(source, **options):
    return load_torch().tensor(source, **options)


def torch_alias(source):
    return load_torch().from_numpy(source)


def torch_negated(source):
    return load_torch()._neg_view(torch_tensor(source))


def torch_without_storage(source):
    tensor = torch_tensor(source)
    tensor.untyped_storage().resize_(0)
    return tensor


def jax_array(source):
    return pytest.importorskip("jax.numpy", reason="needs jax").asarray(source)


def numpy_at_byte(offset):
    def make(source):
        view = np.ndarray(source.shape, source.dtype, bytearray(source.nbytes + offset), offset)
        view[...] = source
        return view

    return make


def unaligned(values, offset):
    """Return a copy that begins at so many bytes after a multiple of 16, and all of its memory."""
    memory = np.full(values.nbytes + 64, 0xA5, np.uint8)
    begin = -memory.ctypes.data % 16 + 16 + offset
    array = memory[begin : begin + values.nbytes].view(values.dtype)
    array[...] = values
    return array, memory


def anonymous_mmap(size):
    return mmap.mmap(-1, size)


def on(make_bytes):
    def make(source):
        view = memoryview(make_bytes(source.nbytes)).cast("B").cast(source.dtype.char)
        np.asarray(view)[...] = source
        return view

    return make


def closed(make_bytes):
    def make(source):
        memory = make_bytes(source.nbytes)
        memory.release() if isinstance(memory, memoryview) else memory.close()
        return memory

    return make


def read_only_dlpack(array):
    if not HAS_VERSION:
        pytest.skip("needs NumPy 2.1, which lends read-only memory by DLPack")
    return DLPackOnly(READ_ONLY["NumPy"](array))


READ_ONLY = {
    "NumPy": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "memoryview": lambda a: memoryview(a.tobytes()).cast("f", a.shape),
    "DLPack": read_only_dlpack,
    "jax": jax_array,
}
