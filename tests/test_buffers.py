"""What memory is accepted; and refusals, whose message names the argument, that change nothing."""

import array
import ctypes
import mmap
import re
import subprocess
import sys
from itertools import combinations
from multiprocessing import shared_memory

import numpy as np
import pytest
from adamax_ext import Adamax, update
from support import PAIRS, compute_dtype, dtype_of, every_dtype, is_testable

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


@every_dtype
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


# ---- Refused -------------------------------------------------------------------------------------

DTYPES = ("int32", "uint8", "bool", "complex64", str(np.dtype(np.longdouble)), ">f4", "object")
# For which arguments, the error, its message with a place for the name of the case, and the cases.
REFUSALS = [
    (WRITTEN, BufferError, "is read-only", READ_ONLY),
    (WRITTEN, BufferError, "is read-only; expected memory", {"scalar": lambda a: a.flat[0]}),
    (WRITTEN, BufferError, "arrays of its library are immutable", {"jax array": jax_array}),
    (WRITTEN, BufferError, "exported a copy", {"copy": lambda a: Patched(a, {FLAGS: 2})}),
    (
        *(ROLES, TypeError, "is a {}; expected an object that exports memory"),
        {"list": np.ndarray.tolist, "float": lambda a: 0.5, "str": lambda a: "weights"},
    ),
    (("param", "m", "u"), TypeError, "is a {}; expected an object", {"NoneType": lambda a: None}),
    (ROLES, TypeError, "has dtype {}", {x: lambda a, x=x: a.astype(x) for x in DTYPES}),
    (
        *(ROLES, TypeError, "has dtype .*{}"),
        {
            "int64": lambda a: torch_tensor(a.astype(np.int64)),
            "bool": lambda a: torch_tensor(a.astype(bool)),
            "'i'": lambda a: memoryview(a.view(np.int32)),
            "'B'": lambda a: bytearray(a.nbytes),
            "lanes": lambda a: Patched(a, {AXES_AND_DTYPE: float32_word(2, lanes=2)}),
        },
    ),
    (
        *(OTHERS, ValueError, "has {} elements; expected the 12 of"),
        {"9": lambda a: a[:3], "15": lambda a: values(9, (5, 3)), "1": lambda a: a[:1, :1]},
    ),
    (
        *(OTHERS, ValueError, r"has shape {} \(in elements\); expected the layout of"),
        {
            r"\(12,\) .*": np.ravel,
            r"\(3, 4\) .*": lambda a: a.reshape(3, 4),
            r".* strides \(1, 4\)": np.asfortranarray,
            r"\(4, 3\) with strides \(1, 4\)": lambda a: a.reshape(3, 4).T,
        },
    ),
    (
        *(ROLES, ValueError, r"with strides \({}\) .*expected (dense|the layout)"),
        {
            "6, 2": lambda a: np.repeat(a, 2, 1)[:, ::2],
            "4, 1": lambda a: np.ones((4, 4), a.dtype)[:, :3],
            "3, -1": lambda a: a[:, ::-1],
            "0, 1": lambda a: torch_tensor(a[:1]).expand(SHAPE),
            "1, 1": lambda a: np.lib.stride_tricks.as_strided(a, SHAPE, (4, 4)),
        },
    ),
    (
        *(ROLES, ValueError, "has a stride of {} bytes; expected whole elements"),
        {"15": lambda a: np.zeros(SHAPE, [("first", np.float32), ("second", np.int8)])["first"]},
    ),
    (
        *(ROLES, ValueError, r"is on a device \(.*{}\)"),
        {
            "DLPack type 2, number 0": OnDevice,
            "2, number 1": lambda a: Patched(a, {DEVICE: 2 + (1 << 32)}),
            "": lambda a: OnCuda(),
        },
    ),
    (
        *(ROLES, BufferError, "did not export its memory: it may be closed"),
        {"released": closed(lambda n: memoryview(bytearray(n))), "mmap": closed(anonymous_mmap)},
    ),
    (
        *(ROLES, BufferError, "has no memory: it was freed or never allocated"),
        {"torch": torch_without_storage, "null": lambda a: Patched(a, {DATA: 0})},
    ),
    (
        *(ROLES, BufferError, "did not export its memory by DLPack"),
        {"meta": lambda a: torch_tensor(a, device="meta"), "broken": BrokenDLPack},
    ),
    (ROLES, ValueError, "is a {} view, whose memory", {"negated": torch_negated}),
    (ROLES, BufferError, "no DLPack capsule", {"number": NoCapsule}),
    (ROLES, BufferError, "version 2; expected", {"DLPack 2": lambda a: Patched(a, {VERSION: 2})}),
    (
        *(ROLES, ValueError, "has {} axes; expected at most 64"),
        {
            "65": lambda a: with_axes(a, 65),
            "100000": lambda a: with_axes(a, 100_000),
            "10000[0]": lambda a: with_axes(a, 100_000, strides=None),
        },
    ),
]


def refusals(*roles):
    return pytest.mark.parametrize(
        ("make", "role", "error", "message"),
        [
            pytest.param(make, role, error, message.format(name), id=f"{message}-{name}-{role}")
            for for_roles, error, message, makers in REFUSALS
            for name, make in makers.items()
            for role in roles
            if role in for_roles
        ],
    )


@refusals(*ROLES)
def test_update_refuses(make, role, error, message):
    good = buffers()
    passed = {**good, role: make(values(9))}
    watched = [*good.values(), passed[role]]
    before, held = contents(watched), holders(watched)
    with pytest.raises(error, match=f"^{role} .*{message}"):
        step(passed)
    assert contents(watched) == before
    assert holders(watched) == held


@refusals("param")
def test_build_refuses(make, role, error, message):
    variables = [values(0), make(values(9)), values(1)]
    before = contents(variables)
    optimizer = Adamax()
    for build in (optimizer.build, lambda variables: optimizer.apply([values(2)] * 3, variables)):
        with pytest.raises(error, match=rf"^variables\[1\] .*{message}"):
            build(variables)
        assert contents(variables) == before
        assert (optimizer.built, optimizer.state, len(optimizer.variables)) == (False, {}, 2)
    assert optimizer.apply([values(2), values(3)], variables[::2]) == 1


@refusals("grad")
def test_a_refused_last_gradient_leaves_the_first_variable_alone(make, role, error, message):
    bad = make(values(9))
    optimizer, parameters, grads = Adamax(use_ema=True), [values(0), values(1)], [values(2)] * 2
    optimizer.build({"first": parameters[0], "last": parameters[1]})
    optimizer.apply(grads)
    watched = [*parameters, *grads, *optimizer.variables]
    before, held = contents([*watched, bad]), holders([bad])
    with pytest.raises(error, match=rf"^grads\[1\] \(variable 'last'\) .*{message}"):
        optimizer.apply([grads[0], bad])
    assert contents([*watched, bad]) == before
    assert holders([bad]) == held
    assert optimizer.apply(grads) == 2


@pytest.mark.parametrize("grad", sorted({grad for _, grad in PAIRS}))
@pytest.mark.parametrize("param", sorted({param for param, _ in PAIRS}))
def test_pairs_of_dtypes(param, grad):
    if not is_testable(param, grad):
        pytest.skip("bfloat16 needs ml_dtypes")
    state = str(compute_dtype(dtype_of(param)))
    good, optimizer = {**buffers(dtype=state), "param": values(0, dtype=param)}, Adamax()
    good["grad"] = values(1, dtype=param)
    passed = {**good, "grad": values(1, dtype=grad)}
    optimizer.build([passed["param"]])
    watched = [*passed.values(), *optimizer.variables]
    before = contents(watched)
    if (param, grad) in PAIRS:
        step(passed)
        assert optimizer.apply([passed["grad"]]) == 1
    else:
        taken = " or ".join(g for p, g in PAIRS if p == param)
        both = f"has dtype {grad} but {{}} has dtype {param}, which takes gradients of dtype "
        both += taken + "$"
        with pytest.raises(TypeError, match="^grad " + both.format("param")):
            step(passed)
        first = r"s\[0\] \(variable 'variable_0'\) "
        with pytest.raises(TypeError, match=f"^grad{first}" + both.format("variable" + first[:-1])):
            optimizer.apply([passed["grad"]])
        assert contents(watched) == before
    for role in ("m", "u", "average"):
        for other in filter(is_testable, {grad for _, grad in PAIRS} - {state}):
            with pytest.raises(TypeError, match=f"^{role} has dtype {other}; expected {state} for"):
                step({**good, role: values(3, dtype=other)})


# ---- Overlap -------------------------------------------------------------------------------------

# Two stretches of the same memory.
OVERLAPS = {
    "same": (slice(0, 12), slice(0, 12)),
    "partial": (slice(0, 12), slice(11, 23)),
    "partial, swapped": (slice(11, 23), slice(0, 12)),
}
overlaps = pytest.mark.parametrize(("one", "two"), OVERLAPS.values(), ids=OVERLAPS)
ALIASES = [np.asarray, torch_alias, DLPackOnly]


@pytest.mark.parametrize("alias", ALIASES, ids=lambda f: f.__name__)
@overlaps
@pytest.mark.parametrize("roles", list(combinations(ROLES, 2)), ids="-".join)
def test_update_refuses_overlap(roles, one, two, alias):
    memory = values(9, 30)
    passed = {**buffers(12), roles[0]: memory[one], roles[1]: alias(memory[two])}
    before = contents([memory, *passed.values()])
    if roles == ("param", "grad") and one == two:  # read before it is written
        expected = dict(zip(ROLES, map(np.array, as_arrays(passed.values())), strict=True))
        step(expected)
        step(passed)
        expected["grad"] = expected["param"]
        assert contents(as_arrays(passed.values())) == contents(expected.values())
        return
    either_way = "|".join(f"^{a} overlaps {b} in memory" for a, b in (roles, roles[::-1]))
    with pytest.raises(ValueError, match=either_way):
        step(passed)
    assert contents([memory, *passed.values()]) == before


def test_a_gradient_with_the_address_but_not_the_size_of_its_parameter_is_refused():
    memory = np.ones(16, np.float32)
    passed = {**buffers(8), "param": memory.view(np.float16)[:8], "grad": memory[:8]}
    with pytest.raises(ValueError, match=r"^grad overlaps param in memory, which the step writes"):
        step(passed)
    assert (memory == 1).all()


def test_neighbours_do_not_overlap():
    memory = values(0, 60)
    expected, passed = (dict(zip(ROLES, np.split(m, 5), strict=True)) for m in (memory * 1, memory))
    step(expected)
    step(passed)
    assert contents(passed.values()) == contents(expected.values())
    step(dict.fromkeys(ROLES, memory[:0]))  # nothing overlaps nothing


@pytest.mark.parametrize("alias", ALIASES, ids=lambda f: f.__name__)
@overlaps
def test_build_refuses_overlap(one, two, alias):
    memory = values(9, 30)
    optimizer = Adamax(use_ema=True)
    a, c = (f"variables[{i}] (variable '{name}')" for i, name in ((0, "a"), (2, "c")))
    either_way = "|".join(re.escape(f"{x} overlaps {y} in memory") for x, y in ((a, c), (c, a)))
    with pytest.raises(ValueError, match=f"^({either_way})"):
        optimizer.build({"a": memory[one], "b": values(1), "c": alias(memory[two])})
    assert (optimizer.built, optimizer.state, len(optimizer.variables)) == (False, {}, 2)
    assert optimizer.apply([values(1, 15), values(2, 15)], [memory[:15], memory[15:]]) == 1


KINDS = ("momentum", "norm", "average", "gradient_accumulator")
WRITTEN_PLACES = {
    "variables[0] (variable 'a')": lambda memory, state: memory[6:18],
    "variables[1] (variable 'b')": lambda memory, state: memory[12:],
    **{
        f"{kind}[{i}] (variable '{'ab'[i]}')": lambda _, state, i=i, kind=kind: state["ab"[i]][kind]
        for kind in KINDS
        for i in (0, 1)
    },
}


@pytest.mark.parametrize("place", WRITTEN_PLACES)
def test_apply_refuses_a_gradient_in_written_memory(place):
    memory = values(9, 24)
    optimizer = Adamax(use_ema=True, gradient_accumulation_steps=2)
    optimizer.build({"a": memory[:12], "b": memory[12:]})
    optimizer.apply([values(1, 12), values(2, 12)])
    before = contents([memory, *optimizer.variables])
    message = f"grads[0] (variable 'a') overlaps {place} in memory, which the step writes"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        optimizer.apply([WRITTEN_PLACES[place](memory, optimizer.state), values(2, 12)])
    assert contents([memory, *optimizer.variables]) == before
    assert optimizer.apply([memory[:12], values(2, 12)]) == 2  # exactly its own parameter


# ---- Parameters that change between steps --------------------------------------------------------

BUILT_WITH = "the optimizer was built with float32"
CHANGES = {
    "another dtype": (lambda a: a.astype("f8"), TypeError, f"has dtype float64; {BUILT_WITH}"),
    "larger": (lambda a: values(9, (5, 3)), ValueError, "15 elements; expected the 12 of the var"),
    "smaller": (lambda a: a[:1], ValueError, "3 elements; expected the 12 of the variable at b"),
    "another layout": (np.asfortranarray, ValueError, "expected the layout of the variable at b"),
    "read-only": (READ_ONLY["NumPy"], BufferError, "is read-only"),
    "broken": (lambda a: None, BufferError, "did not export its memory by DLPack"),
}


@pytest.mark.parametrize(("change", "error", "message"), CHANGES.values(), ids=CHANGES)
def test_a_parameter_that_changed(change, error, message):
    changing, grads = DLPackOnly(values(1)), [values(2), values(3)]
    optimizer, first = Adamax(), values(0)
    optimizer.apply(grads, [first, changing])
    good, watched = changing.array, [first, changing.array, *optimizer.variables]
    before, changing.array = contents(watched), change(changing.array)
    for _ in range(2):
        with pytest.raises(error, match=r"^variables\[1\] \(variable 'variable_1'\) .*" + message):
            optimizer.apply(grads)
        assert contents(watched) == before
    changing.array = good
    assert optimizer.apply(grads) == 2


def test_a_parameter_that_was_closed_or_freed():
    torch = pytest.importorskip("torch")
    tensor, view = torch.ones(4), memoryview(bytearray(16)).cast("f")
    optimizer, first, grads = Adamax(), np.ones(4, np.float32), [np.ones(4, np.float32)] * 3
    optimizer.build([first, tensor, view])
    tensor.untyped_storage().resize_(0)
    with pytest.raises(BufferError, match=r"^variables\[1\] .* has no memory: it was freed"):
        optimizer.apply(grads)
    tensor.untyped_storage().resize_(16)
    view.release()
    with pytest.raises(BufferError, match=r"^variables\[2\] .* did not export its memory"):
        optimizer.apply(grads)
    assert (first == 1).all()
    assert not optimizer.calls


def test_a_parameter_that_moved():
    moving, closing, grads = DLPackOnly(values(0)), DLPackOnly(values(1)), [values(2), values(3)]
    optimizer = Adamax()
    optimizer.apply(grads, [moving, closing])
    old, place = moving.array, np.zeros(30, np.float32)
    untouched = contents([old])
    moving.array = place[:12].reshape(SHAPE)
    moving.array[...] = old
    closing.array, other = None, closing.array
    with pytest.raises(BufferError, match=r"^variables\[1\]"):
        optimizer.apply(grads)
    closing.array = other
    with pytest.raises(ValueError, match=r"^grads\[1\] .* overlaps variables\[0\]"):
        optimizer.apply([grads[0], place[6:18].reshape(SHAPE)])
    assert contents([moving]) == untouched
    assert optimizer.apply([old, grads[1]]) == 2  # its old place is any memory now
    assert contents([old]) == untouched != contents([moving])
    closing.array = moving.array
    before = contents([moving, *optimizer.variables])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^variables\[.\] .* overlaps variables\[.\]"):
            optimizer.apply(grads)
    assert contents([moving, *optimizer.variables]) == before
