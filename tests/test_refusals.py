"""Refusals of memory: the message names the argument, and nothing has changed."""

import re
from itertools import combinations

import numpy as np
import pytest
from adamax_ext import Adamax
from support.bits import PAIRS, compute_dtype, dtype_of, is_testable
from support.frameworks import load_torch
from support.memory import (
    AXES_AND_DTYPE,
    BEYOND,
    DATA,
    DEVICE,
    FLAGS,
    HAS_VERSION,
    LENGTHS,
    OTHERS,
    READ_ONLY,
    ROLES,
    SHAPE,
    VERSION,
    WRITTEN,
    BrokenDLPack,
    DLPackOnly,
    NoCapsule,
    OnCuda,
    OnDevice,
    Patched,
    anonymous_mmap,
    as_arrays,
    buffers,
    closed,
    contents,
    float32_word,
    holders,
    jax_array,
    step,
    torch_alias,
    torch_negated,
    torch_tensor,
    torch_without_storage,
    values,
    with_axes,
)

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
            "uint8": lambda a: bytearray(a.nbytes),
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
            "DLPack type 10, number 1": lambda a: Patched(a, {DEVICE: 10 + (1 << 32)}),
            "DLPack type 2, number -1": lambda a: Patched(a, {DEVICE: 2 - (1 << 32)}),
            "DLPack type 13, number -1": lambda a: OnDevice(a, (13, -1)),
        },
    ),
    (
        # No test has a GPU that this process could use: see test_cuda_refusals.py and test_cuda.py.
        *(ROLES, RuntimeError, r"is on a CUDA device: .*CUDA {}"),
        {"": OnDevice, "(kernels|driver)": lambda a: OnCuda()},
    ),
    (
        *(ROLES, BufferError, "did not export its memory: it may be closed, freed or deleted"),
        {
            "released": closed(lambda n: memoryview(bytearray(n))),
            "mmap": closed(anonymous_mmap),
            "torch": torch_without_storage,
            "null": lambda a: Patched(a, {DATA: 0}),
            "broken": BrokenDLPack,
        },
    ),
    (ROLES, ValueError, "on the {} device", {"meta": lambda a: torch_tensor(a, device="meta")}),
    (ROLES, ValueError, "is a {} view, whose memory", {"negated": torch_negated}),
    (ROLES, BufferError, "no DLPack capsule", {"number": NoCapsule}),
    (ROLES, BufferError, "version 2; expected", {"DLPack 2": lambda a: Patched(a, {VERSION: 2})}),
    (
        *(ROLES, ValueError, "has {} axes; expected 0 to 64"),
        {
            "-1": lambda a: with_axes(a, -1),
            "65": lambda a: with_axes(a, 65),
            "100000": lambda a: with_axes(a, 100_000),
            "10000[0]": lambda a: with_axes(a, 100_000, strides=None),
        },
    ),
    (ROLES, ValueError, "a null pointer as its shape", {"": lambda a: Patched(a, {LENGTHS: 0})}),
    (
        *(ROLES, ValueError, "has a shape that no memory has"),
        {"2^62 elements": lambda a: with_axes(a, 1, lengths=BEYOND)},
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
            message = f"{role} has dtype {other}; expected {state} for"
            if (role, other, state) == ("m", "bfloat16", "float32"):  # it could be state in 16 bits
                message = "u has dtype float32; expected bfloat16 or uint16, beside a first moment"
            with pytest.raises(TypeError, match="^" + message):
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


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_gradient_that_moved_into_written_memory(shift):
    memory = values(9, 36)
    optimizer, between, other = Adamax(), memory[12:24], values(2, 12)
    optimizer.build({"a": memory[:12], "b": memory[24:]})
    assert optimizer.apply([between, other]) == 1  # where the next gradient is expected
    before = contents([memory, *optimizer.variables])
    with pytest.raises(ValueError, match=r"^grads\[0\] .* overlaps variables\[[01]\]"):
        optimizer.apply([memory[12 + shift : 24 + shift], other])
    assert contents([memory, *optimizer.variables]) == before
    assert optimizer.apply([between, other]) == 2


# ---- Parameters that change between steps --------------------------------------------------------

BUILT_WITH = "the optimizer was built with float32"
CHANGES = {
    "another dtype": (lambda a: a.astype("f8"), TypeError, f"has dtype float64; {BUILT_WITH}"),
    "larger": (lambda a: values(9, (5, 3)), ValueError, "15 elements; expected the 12 of the var"),
    "smaller": (lambda a: a[:1], ValueError, "3 elements; expected the 12 of the variable at b"),
    "another layout": (np.asfortranarray, ValueError, "expected the layout of the variable at b"),
    "read-only": (
        *(READ_ONLY["NumPy"], BufferError),
        "is read-only" if HAS_VERSION else "did not export",  # NumPy itself refuses to lend it
    ),
    "broken": (lambda a: None, BufferError, "did not export its memory"),
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
    torch = load_torch()
    tensor, view = torch.ones(4), memoryview(bytearray(16)).cast("f")
    optimizer, first, grads = Adamax(), np.ones(4, np.float32), [np.ones(4, np.float32)] * 3
    optimizer.build([first, tensor, view])
    tensor.untyped_storage().resize_(0)
    with pytest.raises(BufferError, match=r"^variables\[1\] .* did not export its memory"):
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
