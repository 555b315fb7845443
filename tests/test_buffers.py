"""What memory is accepted; and every refusal: its message names the argument and nothing has changed."""

import array
import ctypes
import mmap
import subprocess
import sys
from multiprocessing import shared_memory

import numpy as np
import pytest
from adamax_ext import Adamax, update

SUPPORTED = {
    "float32": ("float32", "float16", "bfloat16"),
    "float64": ("float64",),
    "float16": ("float16", "float32"),
    "bfloat16": ("bfloat16", "float32"),
}
WRITTEN = ("param", "m", "u", "average")
ROLES = ("param", "grad", "m", "u", "average")
SHAPE = (4, 3)


def values(seed, shape=SHAPE, dtype="float32"):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    return np.array(np.random.default_rng(seed).uniform(0.5, 1.5, shape), dtype)


def buffers(shape=SHAPE, dtype="float32"):
    """One array for each buffer of `update`, in the order of its arguments."""
    return {role: values(seed, shape, dtype) for seed, role in enumerate(ROLES)}


def step(buffers):
    param, grad, m, u, average = buffers.values()
    update(param, grad, m, u, step=2, learning_rate=0.1, average=average)


def contents(objects):
    """The bits of what among `objects` is, or wraps, an array that can be read."""
    arrays = [getattr(o, "array", o) for o in objects]
    return [np.asarray(a).tobytes() for a in arrays if isinstance(a, (np.ndarray, array.array, JAX))]


# ---- Objects with memory -----------------------------------------------------------------------------


class DLPackOnly:
    """Lends `array` by DLPack and by nothing else."""

    device = (1, 0)

    def __init__(self, source):
        self.array = source

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, max_version=None, copy=None):
        assert self.device == (1, 0), "memory of a device was asked for"
        return self.array.__dlpack__(max_version=max_version, copy=copy)


class OldDLPack(DLPackOnly):
    def __dlpack__(self, stream=None):  # before DLPack 1.0 there was no max_version
        return self.array.__dlpack__()


class OnDevice(DLPackOnly):
    device = (2, 0)


class OnCuda:
    __cuda_array_interface__ = {"shape": SHAPE, "typestr": "<f4", "data": (64, False), "version": 3}


class BrokenDLPack(DLPackOnly):
    def __dlpack__(self, **_):
        raise RuntimeError("the library says no")


class NoCapsule(DLPackOnly):
    def __dlpack__(self, **_):
        return 1


class Patched(DLPackOnly):
    """Lends a DLPack tensor of NumPy with other values, or functions of them, in some of its words."""

    WORDS = ["version", "context", "deleter", "flags", "data", "device", "ndim_and_dtype", "shape", "strides", "byte_offset"]

    def __init__(self, source, **words):
        super().__init__(source)
        self.words = words

    def __dlpack__(self, **_):
        capsule = self.array.__dlpack__(max_version=(1, 0))
        signature = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
        pointer = signature(("PyCapsule_GetPointer", ctypes.pythonapi))
        address = pointer(capsule, b"dltensor_versioned")
        words = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint64))
        for name, value in self.words.items():
            i = self.WORDS.index(name)
            words[i] = value(words[i]) if callable(value) else value
        return capsule


ONES = (ctypes.c_int64 * 65)(*[1] * 65)


def with_65_axes(source, **words):
    ones, more = ctypes.addressof(ONES), 65 - source.ndim
    words = {"shape": ones, "strides": ones, **words}
    return Patched(source, ndim_and_dtype=lambda word: word + more, **words)


def torch_tensor(source, **options):
    return pytest.importorskip("torch").tensor(source, **options)


def torch_alias(source):
    return pytest.importorskip("torch").from_numpy(source)


def without_storage(source):
    tensor = torch_tensor(source)
    tensor.untyped_storage().resize_(0)
    return tensor


def jax_array(source):
    return pytest.importorskip("jax.numpy").asarray(source)


def numpy_at_byte(offset):
    def make(source):
        view = np.ndarray(source.shape, source.dtype, bytearray(source.nbytes + offset), offset)
        view[...] = source
        return view

    return make


def on(make_bytes):
    def make(source):
        view = memoryview(make_bytes(source.nbytes)).cast("B").cast(source.dtype.char)
        np.asarray(view)[...] = source
        return view

    return make


def released(source):
    view = memoryview(bytearray(source.nbytes)).cast("f", source.shape)
    view.release()
    return view


def closed_mmap(source):
    memory = mmap.mmap(-1, source.nbytes)
    memory.close()
    return memory


# ---- Accepted ----------------------------------------------------------------------------------------

MAKERS = {
    "NumPy": np.array,
    **{f"NumPy at byte {offset}": numpy_at_byte(offset) for offset in (1, 4, 31)},
    "NumPy on mmap": lambda a: np.asarray(on(lambda size: mmap.mmap(-1, size))(a)),
    "array.array": lambda a: array.array(a.dtype.char, a.tolist()),
    "bytearray": on(bytearray),
    "mmap": on(lambda size: mmap.mmap(-1, size)),
    "ctypes": np.ctypeslib.as_ctypes,
    "torch": torch_tensor,
    "torch that requires grad": lambda a: torch_tensor(a, requires_grad=True),
    "DLPack": DLPackOnly,
    "DLPack before 1.0": OldDLPack,
    "DLPack with byte_offset": lambda a: Patched(a, data=lambda p: p - 24, byte_offset=24),
    "DLPack without strides": lambda a: Patched(a, strides=0),
    "DLPack pinned for CUDA": lambda a: Patched(a, device=3),
}


def as_arrays(objects):
    plain = [o.detach() if hasattr(o, "detach") else getattr(o, "array", o) for o in objects]
    return [np.asarray(o) for o in plain]


@pytest.mark.parametrize("roles", [*ROLES, ROLES], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_objects_with_memory(make, dtype, roles):
    expected = buffers(7, dtype)
    passed = {role: make(a.copy()) if role in roles else a for role, a in buffers(7, dtype).items()}
    holders = [sys.getrefcount(getattr(o, "array", o)) for o in passed.values()]
    step(expected)
    step(passed)
    assert contents(as_arrays(passed.values())) == contents(expected.values())
    assert [sys.getrefcount(getattr(o, "array", o)) for o in passed.values()] == holders


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_objects_with_memory_in_an_optimizer(make):
    results = []
    for make_ in (np.array, make):
        optimizer, parameters = Adamax(0.1), [make_(values(seed, 7)) for seed in (0, 1)]
        optimizer.build(parameters)
        for seed in (2, 4):
            optimizer.apply([make_(values(seed, 7)), make_(values(seed + 1, 7))])
        results.append(contents([*as_arrays(parameters), *optimizer.variables]))
    assert results[0] == results[1]


LAYOUTS = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "permuted": lambda a: np.ascontiguousarray(a.transpose(2, 0, 1)).transpose(1, 2, 0),
    "length 1": lambda a: np.lib.stride_tricks.as_strided(a, (2, 1, 3, 4), (48, 4, 16, 4)),
}


@pytest.mark.parametrize("kind", [np.asarray, torch_alias, DLPackOnly], ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_dense_layouts(layout, kind):
    expected = buffers((2, 3, 4))
    passed = {role: layout(a) for role, a in buffers((2, 3, 4)).items()}
    step(expected)
    step({role: kind(a) for role, a in passed.items()})
    for role in ROLES:
        np.testing.assert_array_equal(passed[role].reshape(2, 3, 4), expected[role])


@pytest.mark.parametrize("kind", [np.array, torch_tensor, DLPackOnly], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2)], ids=str)
def test_scalars_and_empty_buffers(shape, kind):
    flat = buffers(np.prod(shape, dtype=int))
    passed = {role: kind(a.reshape(shape).copy()) for role, a in flat.items()}
    step(flat)
    step(passed)
    assert contents(as_arrays(passed.values())) == contents(flat.values())
    optimizer = Adamax()
    optimizer.build([passed["param"]])
    assert optimizer.apply([passed["grad"]]) == 1


@pytest.mark.parametrize("dtype", SUPPORTED)
def test_a_numpy_scalar_is_a_gradient_of_a_scalar(dtype):
    results = []
    for convert in (np.asarray, lambda grad: grad[()]):
        param = values(0, (), dtype)
        Adamax(0.1).apply([convert(values(1, (), dtype))], [param])
        results.append(contents([param]))
    assert results[0] == results[1] != contents([values(0, (), dtype)])


READ_ONLY = {
    "NumPy": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "memoryview": lambda a: memoryview(a.tobytes()).cast("f", a.shape),
    "DLPack": lambda a: DLPackOnly(READ_ONLY["NumPy"](a)),
    "jax": jax_array,
}


@pytest.mark.parametrize("make", READ_ONLY.values(), ids=READ_ONLY)
def test_a_gradient_may_be_read_only(make):
    expected, passed = buffers(), buffers()
    step(expected)
    step({**passed, "grad": make(passed["grad"])})
    assert contents(passed.values()) == contents(expected.values())


def test_a_negated_view_of_torch_keeps_its_sign():
    gradient = torch_tensor([1 + 2j]).conj().imag  # dense; torch has 2 in memory and a mark for the sign
    changed = []
    for grad in (gradient, np.array([-2], np.float32)):
        changed.append(np.ones(1, np.float32))
        update(changed[-1], grad, np.zeros(1, np.float32), np.zeros(1, np.float32), step=1)
    assert changed[0] == changed[1] > 1


def test_no_framework_is_imported():
    script = (
        "import sys, numpy as np, adamax_ext; w, g = np.ones(3), np.ones(3); o = adamax_ext.Adamax();"
        "o.build([w]); o.apply([g]); adamax_ext.update(w, g, g.copy(), g.copy(), step=1);"
        "print({'torch', 'jax', 'tensorflow', 'keras', 'cupy', 'ml_dtypes'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.stderr) == ("set()\n", "")


def test_shared_memory_is_given_back_after_success_and_refusal():
    memory = shared_memory.SharedMemory(create=True, size=16)
    expected, passed = buffers(4), buffers(4)
    lent = memory.buf.cast("f")
    lent[:] = memoryview(passed["param"])
    passed["param"] = lent
    try:
        step(passed)
        with pytest.raises(ValueError, match="average has 5 elements"):
            step({**passed, "average": values(9, 5)})
        step(expected)
        assert bytes(memory.buf[:16]) == expected["param"].tobytes()
    finally:
        lent.release()  # a BufferError while somebody holds it
        memory.close()
        memory.unlink()


# ---- Refused -----------------------------------------------------------------------------------------
