"""What memory is accepted, and objects of every kind that have some."""

import array
import ctypes
import mmap
import subprocess
import sys
from multiprocessing import shared_memory

import numpy as np
import pytest
from adamax_ext import Adamax, update
from support import dtype_of

WRITTEN = ("param", "m", "u", "average")
ROLES = ("param", "grad", "m", "u", "average")
OTHERS = ROLES[1:]  # than the parameter, with which they are compared
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


class Patched(DLPackOnly):
    """Lends a DLPack tensor of NumPy with some of its 64-bit words replaced."""

    def __init__(self, source, words):
        super().__init__(source)
        self.words = words

    def __dlpack__(self, **_):
        capsule = self.array.__dlpack__(max_version=(1, 0))
        signature = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
        pointer = signature(("PyCapsule_GetPointer", ctypes.pythonapi))
        words = ctypes.cast(pointer(capsule, b"dltensor_versioned"), ctypes.POINTER(ctypes.c_int64))
        for index, word in self.words.items():
            words[index] = word
        return capsule


def float32_word(axes, lanes=1):
    return axes | 2 << 32 | 32 << 40 | lanes << 48


def with_axes(source, axes, strides=ONES):
    ones = {LENGTHS: ctypes.addressof(ONES), STRIDES: ctypes.addressof(strides) if strides else 0}
    return Patched(source, {AXES_AND_DTYPE: float32_word(axes), **ones})


def torch_tensor(source, **options):
    return pytest.importorskip("torch").tensor(source, **options)


def torch_alias(source):
    return pytest.importorskip("torch").from_numpy(source)


def torch_negated(source):
    return pytest.importorskip("torch")._neg_view(torch_tensor(source))


def torch_without_storage(source):
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


# ---- Accepted ------------------------------------------------------------------------------------

MAKERS = {
    "NumPy": np.array,
    **{f"NumPy at byte {offset}": numpy_at_byte(offset) for offset in (1, 4, 31)},
    "NumPy on mmap": lambda a: np.asarray(on(anonymous_mmap)(a)),
    "array.array": lambda a: array.array(a.dtype.char, a.tolist()),
    "bytearray": on(bytearray),
    "mmap": on(anonymous_mmap),
    "ctypes": np.ctypeslib.as_ctypes,
    "torch": torch_tensor,
    "torch that requires grad": lambda a: torch_tensor(a, requires_grad=True),
    "DLPack": DLPackOnly,
    "DLPack before 1.0": OldDLPack,
    "DLPack with offset": lambda a: Patched(a, {DATA: a.ctypes.data - 24, OFFSET: 24}),
    "DLPack without strides": lambda a: Patched(a, {STRIDES: 0}),
    "DLPack pinned for CUDA": lambda a: Patched(a, {DEVICE: 3}),
}


@pytest.mark.parametrize("roles", [*ROLES, ROLES], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_objects_with_memory(make, dtype, roles):
    expected = buffers(7, dtype)
    passed = {role: make(a.copy()) if role in roles else a for role, a in buffers(7, dtype).items()}
    before = holders(passed.values())
    step(expected)
    step(passed)
    assert contents(as_arrays(passed.values())) == contents(expected.values())
    assert holders(passed.values()) == before


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
    assert Adamax().apply([passed["grad"]], [passed["param"]]) == 1


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_numpy_scalar_is_a_gradient_of_a_scalar(dtype):
    parameters = [values(0, (), dtype) for _ in range(3)]
    Adamax(0.1).apply([grad := values(1, (), dtype), grad[()]], parameters[:2])
    assert parameters[0] == parameters[1] != parameters[2]


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


def test_no_framework_is_imported():
    script = (
        "import sys, numpy as np, adamax_ext; w, g = np.ones(3), np.ones(3);"
        "adamax_ext.Adamax().apply([g], [w]); adamax_ext.update(w, g, g + 1, g + 1, step=1);"
        "print({'torch', 'jax', 'tensorflow', 'keras', 'cupy', 'ml_dtypes'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.stderr) == ("set()\n", "")


def test_shared_memory_is_given_back_after_success_and_refusal():
    memory = shared_memory.SharedMemory(create=True, size=16)
    expected, passed = buffers(4), buffers(4)
    lent = memory.buf[:16].cast("f")
    lent[:] = memoryview(passed["param"])
    passed["param"] = lent
    try:
        step(passed)
        with pytest.raises(ValueError, match="average has 5 elements"):
            step({**passed, "average": values(9, 5)})
        step(expected)
        assert lent.tolist() == expected["param"].tolist()
    finally:
        lent.release()  # a BufferError while somebody holds it
        memory.close()
        memory.unlink()
