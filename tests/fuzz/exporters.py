"""Objects that lend memory by each protocol, as a description says; they count what they lend.

Memory that is lent by DLPack is poisoned for AddressSanitizer while nobody borrows it.
"""

import ctypes
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

_C = ctypes.CDLL(None)
_malloc, _free = _C.malloc, _C.free
_malloc.restype, _malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_free.argtypes = [ctypes.c_void_p]
_poison, _unpoison = _C["__asan_poison_memory_region"], _C["__asan_unpoison_memory_region"]
_poison.argtypes = _unpoison.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

# DLPack's code and bits of each dtype; the first four are those of weights.
DTYPES = {
    "float32": (2, 32), "float64": (2, 64), "float16": (2, 16), "bfloat16": (4, 16),
    "int8": (0, 8), "uint8": (1, 8), "int16": (0, 16), "uint16": (1, 16),
}  # fmt: skip
OTHER_DTYPES = ["int32", "uint64", "complex64", "bool", ">f4", "longdouble"]
FORMATS = {"float32": "f4", "float64": "f8", "float16": "f2", "int8": "i1", "uint8": "u1"}
FORMATS |= {"int16": "i2", "uint16": "u2"}


def numpy_dtype(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


class Memory:
    """So many bytes, with nothing of the same allocation behind them."""

    def __init__(self, size):
        self.size, self.address, self.loans = size, _malloc(size), 0

    def lend(self):
        self.loans += 1
        _unpoison(self.address, self.size)

    def take_back(self):
        self.loans -= 1
        if self.loans == 0:
            _poison(self.address, self.size)

    def array(self):
        return np.frombuffer((ctypes.c_char * self.size).from_address(self.address), np.uint8)

    def free(self):
        _unpoison(self.address, self.size)
        _free(self.address)


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("axes", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class Managed(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", Tensor),
    )  # fmt: skip


class Table(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("before", ctypes.c_void_p),
        ("unused", ctypes.c_void_p * 3), ("tensor_of", ctypes.c_void_p),
        ("stream_of", ctypes.c_void_p),
    )  # fmt: skip


_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_lent = {}  # by the address of what was exported


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(address):
    _lent[address].is_deleted()


_DELETER = ctypes.cast(_delete, ctypes.c_void_p).value


@dataclass
class Loan:
    """What one __dlpack__ call lent: to be deleted once if it was taken, and else never."""

    exporter: "Exporter"
    managed: ctypes.Structure
    name: bytes
    deleted: int = 0

    def __post_init__(self):
        self.arrays = self.exporter.kept
        self.capsule = _capsule(ctypes.addressof(self.managed), self.name, None)

    def is_deleted(self):
        self.deleted += 1
        self.exporter.memory.take_back()

    def check(self):
        was_taken = self.exporter.says.capsule_name is None and "used_" in repr(self.capsule)
        expected = was_taken and self.exporter.says.has_deleter
        assert self.deleted == expected, f"{self.deleted} calls of a deleter, not {expected}"
        if not expected:
            self.exporter.memory.take_back()
        del _lent[ctypes.addressof(self.managed)]


@dataclass(repr=False)
class Description:
    """What an exporter says of its memory; strides are in elements."""

    protocol: str
    dtype: str
    shape: list[int]
    strides: list[int] | None
    offset: int = 0  # in bytes, where its elements begin in the memory
    axes: int | None = None  # if it is not the number of lengths
    lanes: int = 1
    device: tuple[int, int] = (1, 0)
    device_of_tensor: tuple[int, int] | None = None  # if it is another one
    version: tuple[int, int] = (1, 1)
    flags: int = 0
    byte_offset: int = 0  # of the tensor; `data` is so much less
    is_null: bool = False
    has_shape: bool = True
    has_deleter: bool = True
    capsule_name: bytes | None = None
    entries: dict = field(default_factory=dict)  # of an array interface, in place of the right ones

    def __repr__(self):
        usual = vars(Description("", "", [], []))
        return str({key: value for key, value in vars(self).items() if value != usual[key]})


class Exporter:
    """Base of the objects: one description of one memory."""

    def __init__(self, says, memory):
        self.says, self.memory, self.loans, self.kept = says, memory, [], None
        self.address = memory.address + says.offset

    def fill(self, tensor):
        says = self.says
        axes = len(says.shape) if says.axes is None else says.axes
        lengths = says.shape + [1] * min(max(axes - len(says.shape), 0), 70)
        strides = None if says.strides is None else says.strides + [1] * len(lengths)
        self.kept = (
            (ctypes.c_int64 * max(len(lengths), 1))(*lengths),
            strides and (ctypes.c_int64 * len(strides))(*strides),
        )
        tensor.data = None if says.is_null else (self.address - says.byte_offset) % 2**64
        tensor.device_type, tensor.device_id = says.device_of_tensor or says.device
        tensor.axes, tensor.lanes = axes, says.lanes
        tensor.code, tensor.bits = DTYPES.get(says.dtype, (5, 32))
        tensor.shape = ctypes.addressof(self.kept[0]) if says.has_shape else None
        tensor.strides = ctypes.addressof(self.kept[1]) if strides else None
        tensor.byte_offset = says.byte_offset

    def end(self):
        """No call is running any more."""
        for loan in self.loans:
            loan.check()
        self.loans.clear()  # they hold this one


class DLPack(Exporter):
    def __dlpack_device__(self):
        return self.says.device

    def export(self, managed, name):
        self.fill(managed.tensor)
        managed.deleter = _DELETER if self.says.has_deleter else None
        name = name if self.says.capsule_name is None else self.says.capsule_name
        loan = _lent[ctypes.addressof(managed)] = Loan(self, managed, name)
        self.memory.lend()
        self.loans.append(loan)
        return loan.capsule

    def __dlpack__(self, *, max_version=None, copy=None, stream=None):
        managed = ManagedVersioned(*self.says.version, flags=self.says.flags)
        return self.export(managed, b"dltensor_versioned")


class OldDLPack(DLPack):
    def __dlpack__(self, stream=None):
        return self.export(Managed(), b"dltensor")


class Lasting(Exporter):
    """Lends as long as it lives."""

    def __init__(self, says, memory):
        super().__init__(says, memory)
        memory.lend()

    def end(self):
        self.memory.take_back()


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Tensor))
def _tensor_of(exporter, tensor):
    exporter.fill(tensor.contents)
    return 0


_TABLE = Table(1, 3, tensor_of=ctypes.cast(_tensor_of, ctypes.c_void_p))
_TABLE_NAME = b"dlpack_exchange_api"  # of a capsule, which does not copy it


class DLPackTable(Lasting):
    __dlpack_c_exchange_api__ = _capsule(ctypes.addressof(_TABLE), _TABLE_NAME, None)


class CudaArray(Lasting):
    @property
    def __cuda_array_interface__(self):
        says, size = self.says, numpy_dtype(self.says.dtype).itemsize
        interface = {
            "data": (0 if says.is_null else self.address, bool(says.flags & 1)),
            "typestr": "<" + FORMATS.get(says.dtype, "i4"),
            "shape": tuple(says.shape),
            "strides": None if says.strides is None else tuple(s * size for s in says.strides),
            "version": 3,
        }
        return interface | says.entries


class ArrayInterface(Lasting):
    """What nobody takes, because nobody says how long the memory lives."""

    @property
    def __array_interface__(self):
        return CudaArray.__cuda_array_interface__.fget(self)


def _array(says, memory):
    """Return an array; ValueError where NumPy has no such array."""
    dtype = numpy_dtype(says.dtype)
    strides = None if says.strides is None else [s * dtype.itemsize for s in says.strides]
    try:
        array = np.ndarray(says.shape, dtype, memory.array(), says.offset, strides)
    except TypeError as error:  # without strides, where the memory is too small
        raise ValueError(*error.args) from error
    if array.shape != tuple(says.shape):  # as for a length of -1
        raise ValueError("another shape")
    array.flags.writeable = not says.flags & 1
    return array


class NumPy(Lasting):
    def __init__(self, says, memory):
        super().__init__(says, memory)
        self.object = _array(says, memory)


class View(NumPy):
    def __init__(self, says, memory):
        super().__init__(says, memory)
        self.object = memoryview(self.object)


PROTOCOLS = {
    "NumPy": NumPy, "view": View, "DLPack": DLPack, "old DLPack": OldDLPack,
    "table": DLPackTable, "CUDA": CudaArray, "array interface": ArrayInterface,
}  # fmt: skip


def export(says, memory):
    """Return an exporter; what is to be passed is its `object`, or itself."""
    return PROTOCOLS[says.protocol](says, memory)
