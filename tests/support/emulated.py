"""An emulated GPU: the module _cuda of tests/cpp/emulated_cuda.cpp, and arrays on its devices.

The memory of a device array is that of a NumPy array, `host`. This module is the arrays' library.
"""

import contextlib
import ctypes
import functools
import importlib.util
import mmap
import multiprocessing
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from support.building import REPOSITORY, cpp_compiler
from support.memory import AXES_AND_DTYPE, DATA, DEVICE, Patched

SOURCES = ["tests/cpp/emulated_*.cpp", "csrc/cuda/*.cpp", "csrc/core/*.cpp"]
SOURCES += ["csrc/xla/call.cpp", "csrc/xla/cuda.cpp"]
# The types that the library of the arrays has: as CuPy's, without bfloat16.
float32, float64, int8, uint8 = np.float32, np.float64, np.int8, np.uint8
int16, uint16 = np.int16, np.uint16
CUDA = 2  # DLPack's type of device
GONE = object()
_device_1 = np.zeros(1 << 16, np.uint8)  # all memory of device 1
_device_1_used = 0
_WORK = ctypes.CFUNCTYPE(None)
_queued = []  # kept alive


@functools.cache
def built():
    """Build the module; skip if there is no compiler."""
    target = Path(tempfile.mkdtemp()) / "_cuda.so"
    subprocess.run(
        [cpp_compiler(), "-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-shared"]
        + [f"-I{REPOSITORY / folder}" for folder in ("csrc", "csrc/include")]
        + [f"-I{sysconfig.get_path('include')}", "-fvisibility=hidden", "-o", str(target)]
        + [str(source) for pattern in SOURCES for source in sorted(REPOSITORY.glob(pattern))],
        check=True,
    )
    return target


def load(path):
    """Make the module `adamax_ext._cuda` of this process, and of no other."""
    spec = importlib.util.spec_from_file_location("_cuda", path)
    sys.modules["adamax_ext._cuda"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


@functools.cache
def _process():
    pool = ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=load, initargs=(built(),)
    )
    return pool


def run(check, *arguments):
    """Return `check(*arguments)` from a process with an emulated GPU; what it raises is raised."""
    return _process().submit(check, *arguments).result()


# ---- The emulated machine ------------------------------------------------------------------------


def library():
    """Return the module as a library, with controls for tests."""
    loaded = ctypes.CDLL(sys.modules["adamax_ext._cuda"].__spec__.origin)
    loaded.emulated_log.restype = ctypes.c_char_p
    return loaded


def log_of(function):
    """Return what the device was asked while `function` ran, a line each."""
    loaded = library()
    loaded.emulated_clear_log()
    function()
    return loaded.emulated_log().decode().splitlines()


@contextlib.contextmanager
def captured(stream):
    """Let a stream be captured into a CUDA graph, a new one."""
    capture = library().emulated_capture
    library().emulated_forget_graphs()
    capture(ctypes.c_size_t(stream), 1)
    try:
        yield
    finally:
        capture(ctypes.c_size_t(stream), 0)


def replay(stream):
    """Do what was captured of a stream, with the arguments that it had."""
    library().emulated_replay(ctypes.c_size_t(stream))


def when_synchronized(work):
    """Let the device be busy with `work`, on a stream that is not told: wait for all of them."""
    _queued.append(_WORK(work))
    library().emulated_pending(_queued[-1])


def finish():
    """Let the device do what it has to do."""
    library().emulated_finish()


def set_first_element(element):
    """Leave out the chunks of elementwise launches that come before `element`."""
    library().emulated_first_element(ctypes.c_uint64(element))


def set_machine(driver=13000, runtime=13000, devices=2, capability=86, error=""):
    library().emulated_machine(driver, runtime, devices, capability, error.encode())


# ---- Arrays --------------------------------------------------------------------------------------


class Device:
    def __init__(self, number):
        self.number = number

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def changed(interface, entries):
    """Return it with other entries; GONE removes one."""
    return {key: value for key, value in (interface | entries).items() if value is not GONE}


class CudaArray:
    """As CuPy's and Numba's arrays: __cuda_array_interface__, with the stream it is in use on."""

    def __init__(self, host, stream=7, **changes):
        self.host, self.stream, self.changes = host, stream, changes

    @property
    def device(self):
        return Device(int(np.shares_memory(self.host, _device_1)))

    @property
    def __cuda_array_interface__(self):
        interface = {**self.host.__array_interface__, "version": 3, "stream": self.stream}
        return changed(interface, self.changes)


class DLPackArray(Patched):
    """DLPack's method alone, which is told a stream on which the memory must be ready."""

    def __init__(self, host):
        axes, kind = host.ndim, {"float": 2, "bfloat": 4}[host.dtype.name.rstrip("0123456789")]
        word = axes | kind << 32 | 8 * host.itemsize << 40 | 1 << 48
        words = {DEVICE: CUDA, AXES_AND_DTYPE: word, DATA: host.ctypes.data}
        super().__init__(host.view(f"u{host.itemsize}"), words)
        self.host, self.streams, self.device = host, [], Device(0)

    def __dlpack_device__(self):
        return (CUDA, 0)

    def __dlpack__(self, *, stream, **_):
        self.streams.append(stream)
        self.compute()
        return super().__dlpack__()

    def compute(self):
        """What the library has still to do; nothing by default."""


class BothArray(DLPackArray):
    """DLPack and __cuda_array_interface__, with `entries` about streams."""

    def __init__(self, host, **entries):
        super().__init__(host)
        self.entries = entries

    @property
    def __cuda_array_interface__(self):
        return changed(self.host.__array_interface__, self.entries)


class JaxArray(BothArray):
    """As a JAX array: both, but the interface is read-only, of version 2, and tells no stream."""

    def __init__(self, host):
        super().__init__(host, version=2, data=(host.ctypes.data, True))


class Tensor(ctypes.Structure):
    """A DLTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


class Exchange(ctypes.Structure):
    """DLPack's C exchange table."""

    AS_TENSOR = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Tensor))
    STREAM = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int32, ctypes.c_void_p)
    _fields_ = [
        ("version", ctypes.c_uint32 * 2),
        ("older", ctypes.c_void_p),
        ("not_used", ctypes.c_void_p * 3),
        ("as_tensor", AS_TENSOR),
        ("stream", STREAM),
    ]


class TableArray:
    """As a torch tensor: the C exchange table, which tells the library's current stream."""

    current_stream = 9

    def __init__(self, host):
        self.device = Device(0)
        self.become(host)

    def become(self, host):
        """Get other memory, as by an assignment to `data`."""
        self.host = host
        strides = [stride // host.itemsize for stride in host.strides]
        self.numbers = [(ctypes.c_int64 * len(list_))(*list_) for list_ in (host.shape, strides)]

    def __dlpack_device__(self):
        return (CUDA, 0)


@Exchange.AS_TENSOR
def _as_tensor(array, out):
    host, (shape, strides) = array.host, map(ctypes.addressof, array.numbers)
    code = {"i": 0, "u": 1, "f": 2, "V": 4}[host.dtype.kind]
    out[0] = Tensor(
        host.ctypes.data, (CUDA, 0), host.ndim, code, 8 * host.itemsize, 1, shape, strides, 0
    )
    return 0


@Exchange.STREAM
def _stream(_type, _device, out):
    ctypes.cast(out, ctypes.POINTER(ctypes.c_size_t))[0] = TableArray.current_stream
    return 0


_TABLE = Exchange((1, 3), None, (None, None, None), _as_tensor, _stream)
_NAME = b"dlpack_exchange_api"
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
TableArray.__dlpack_c_exchange_api__ = _new_capsule(ctypes.addressof(_TABLE), _NAME, None)

# The library of an array is looked for by the name of its type's outermost package.
sys.modules["emulated"] = sys.modules[__name__]
for _type in (CudaArray, DLPackArray, BothArray, JaxArray, TableArray):
    _type.__module__ = "emulated"


def on_cuda(host):
    """Return the array as CuPy has it; bfloat16, which CuPy lacks, by DLPack alone."""
    return DLPackArray(host) if host.dtype.name == "bfloat16" else CudaArray(host)


def sparse(size, dtype):
    """Return zeros that take memory only where they are touched."""
    no_reserve = 0x4000  # Linux' MAP_NORESERVE, which Python 3.10 to 3.12 do not name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, size * np.dtype(dtype).itemsize, flags=flags), dtype)


def on_device_1(size, dtype):
    """Return a CUDA array of ones on the second device."""
    global _device_1_used
    begin = _device_1.ctypes.data
    library().emulated_device_1(ctypes.c_size_t(begin), ctypes.c_size_t(begin + _device_1.size))
    start = _device_1_used
    _device_1_used += size * np.dtype(dtype).itemsize
    host = _device_1[start:_device_1_used].view(dtype)
    host[...] = 1
    return CudaArray(host)


def full(shape, fill_value, dtype):
    """As every array library's, on the first device."""
    return CudaArray(np.full(shape, fill_value, dtype))


def zeros_like(array, dtype):
    """As every array library's: with shape, memory order and device of `array`."""
    if array.device.number == 1:
        other = on_device_1(array.host.size, dtype)
        other.host[...] = 0
        return other
    host = np.zeros_like(array.host, dtype)
    return TableArray(host) if isinstance(array, TableArray) else CudaArray(host)
