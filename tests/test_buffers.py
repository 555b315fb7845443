"""What memory is accepted: every object that has some, every layout, scalars and nothing."""

import array
import subprocess
import sys
from multiprocessing import shared_memory

import numpy as np
import pytest
from adamax_ext import Adamax
from support.memory import (
    DATA,
    DEVICE,
    OFFSET,
    READ_ONLY,
    ROLES,
    STRIDES,
    DLPackOnly,
    OldDLPack,
    Patched,
    anonymous_mmap,
    as_arrays,
    buffers,
    contents,
    holders,
    numpy_at_byte,
    on,
    step,
    torch_alias,
    torch_tensor,
    values,
)

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
