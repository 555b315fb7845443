"""What memory is accepted, and every refusal: its message names the argument, and nothing changed."""

import array
import ctypes
import mmap
import re
import subprocess
import sys
from multiprocessing import shared_memory

import adamax_ext
import numpy as np
import pytest
import reference
from adamax_ext import Adamax, update

SETTINGS = {"learning_rate": 0.01, "beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-5}
SUPPORTED = [
    *[("float32", grad) for grad in ("float32", "float16", "bfloat16")],
    *[("float64", "float64"), ("float16", "float16"), ("float16", "float32")],
    *[("bfloat16", "bfloat16"), ("bfloat16", "float32")],
]
FLOATS = ("float32", "float64", "float16", "bfloat16")


def dtype_of(name):
    return getattr(pytest.importorskip("ml_dtypes"), name) if name == "bfloat16" else np.dtype(name)


def values(shape, seed, dtype="float32"):
    random = np.random.default_rng(seed)
    return np.asarray(random.uniform(0.5, 1.5, shape)).astype(dtype_of(dtype))


def bits(*arrays):
    return [np.asarray(a).tobytes() for a in arrays]


# ---- Objects with memory: each maker returns one with the values of an array, and a NumPy view of it ----


def within(memory, source, offset):
    """A view of `source`'s shape and type at `offset` bytes into `memory`, filled with its values."""
    view = np.ndarray(source.shape, source.dtype, memory, offset)
    view[...] = source
    return view


class DLPackOnly:
    """Lends an array by ``__dlpack__`` alone; the device is a class attribute, so that fakes differ."""

    device = (1, 0)

    def __init__(self, source):
        self.array = source

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        assert self.device == (1, 0), "memory of a device was asked for"
        return self.array.__dlpack__(max_version=max_version, copy=copy)


class OldDLPack(DLPackOnly):
    def __dlpack__(self, stream=None):  # before DLPack 1.0: no max_version
        return self.array.__dlpack__()


class OnDevice(DLPackOnly):
    device = (2, 0)


class OnCuda:
    __cuda_array_interface__ = {"shape": (4, 3), "typestr": "<f4", "data": (64, False), "version": 3}


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *[(name, ctypes.c_int32) for name in ("device_type", "device_id", "ndim")],
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        *[(name, ctypes.POINTER(ctypes.c_int64)) for name in ("shape", "strides")],
        ("byte_offset", ctypes.c_uint64),
    ]


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = [
        *[("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p)],
        *[("deleter", DELETER), ("flags", ctypes.c_uint64), ("tensor", DLTensor)],
    ]


class HandMade(DLPackOnly):
    """A DLPack capsule filled by hand, and a count of those that are lent at present."""

    def __init__(self, source, *, major=1, flags=0, strides=True, axes=None, **fields):
        super().__init__(source)
        self.lent, self.total, self.name = 0, 0, b"dltensor_versioned"
        self.shape = source.shape if axes is None else (1,) * (axes - source.ndim) + source.shape
        axes = len(self.shape)
        steps = [s // source.itemsize for s in source.strides]
        steps = (ctypes.c_int64 * axes)(*[1] * (axes - len(steps)), *steps)
        lengths = (ctypes.c_int64 * axes)(*self.shape)
        tensor = DLTensor(source.ctypes.data - 8, 1, 0, axes, 2, 8 * source.itemsize, 1, lengths)
        tensor.byte_offset = 8
        if strides:
            tensor.strides = steps
        for field, value in fields.items():
            setattr(tensor, field, value)
        self.managed = Managed(major, 0, None, DELETER(self.returned), flags, tensor)
        self.managed_keeps = (steps, lengths)

    def returned(self, _):
        self.lent -= 1

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        self.lent, self.total = self.lent + 1, self.total + 1
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p] + [
            ctypes.c_void_p
        ]
        return make(ctypes.addressof(self.managed), self.name, None)


def from_torch(source):
    torch = pytest.importorskip("torch")
    if source.dtype.name != "bfloat16":
        return (tensor := torch.from_numpy(source.copy())), tensor.numpy()
    tensor = torch.from_numpy(source.view(np.int16).copy()).view(torch.bfloat16)
    return tensor, tensor.view(torch.int16).numpy().view(source.dtype)


def from_ctypes(source):
    code = {"f": ctypes.c_float, "d": ctypes.c_double}[source.dtype.char]
    made = code
    for length in reversed(source.shape):
        made = made * length
    made = made()
    return made, within((ctypes.c_char * source.nbytes).from_buffer(made), source, 0)


def from_flat(source, make):
    """`make` gives a one-dimensional writable buffer of bytes, cast to the shape and type of `source`."""
    cast = memoryview(make(source.nbytes)).cast("B").cast(source.dtype.char, source.shape)
    return cast, within(cast, source, 0)


def from_array_module(source):
    made = array.array(source.dtype.char, source.ravel().tolist())
    return made, np.frombuffer(made, source.dtype)


def from_shared(source):
    memory = shared_memory.SharedMemory(create=True, size=source.nbytes)
    memory.unlink()
    view = within(memory.buf, source, 0)
    view.base.obj.close = lambda: None  # the mapping lives as long as its last view
    return view, view


def both(made):
    return made, made


def wrapped(kind):
    return lambda source: (kind(kept := source.copy()), kept)


MAKERS = {
    "numpy": lambda source: both(source.copy()),
    **{
        f"numpy at byte {n}": lambda source, n=n: both(within(bytearray(source.nbytes + n), source, n))
        for n in (1, 4, 31)
    },
    "numpy subclass": lambda source: both(source.copy().view(np.recarray)),
    "numpy on mmap": lambda source: both(within(mmap.mmap(-1, source.nbytes), source, 0)),
    "array.array": from_array_module,
    "bytearray": lambda source: from_flat(source, bytearray),
    "mmap": lambda source: from_flat(source, lambda size: mmap.mmap(-1, size)),
    "shared memory": lambda source: from_flat(source, shared_bytes),
    "ctypes": from_ctypes,
    "torch": from_torch,
    "torch parameter": lambda source: torch_parameter(source),
    "DLPack": wrapped(DLPackOnly),
    "DLPack before 1.0": wrapped(OldDLPack),
    "DLPack with byte_offset": wrapped(HandMade),
    "DLPack without strides": wrapped(lambda source: HandMade(source, strides=False)),
    "DLPack pinned by CUDA": wrapped(lambda source: HandMade(source, device_type=3)),
}
