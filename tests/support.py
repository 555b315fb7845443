"""What tests of bits share: comparison, dtypes, data, forced instruction sets and threads."""

import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import adamax_ext
import numpy as np
import pytest
from adamax_ext import _core

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

# Parameter and gradient dtypes that are accepted together (SPEC.md, section 1).
PAIRS = (
    ("float32", "float32"),
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("float64", "float64"),
    ("float16", "float16"),
    ("float16", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
)


def is_testable(*dtypes):
    """Whether NumPy has all these dtypes here."""
    return ml_dtypes is not None or "bfloat16" not in dtypes


def _table(names, rows):
    needs = pytest.mark.skipif(ml_dtypes is None, reason="bfloat16 needs ml_dtypes")
    marks = [() if is_testable(*row) else needs for row in rows]
    return pytest.mark.parametrize(
        names,
        [pytest.param(*row, marks=mark) for row, mark in zip(rows, marks, strict=True)],
    )


every_pair = _table("param, grad", PAIRS)
every_16_bit_dtype = _table("dtype", [("float16",), ("bfloat16",)])
every_dtype = _table("dtype", [("float32",), ("float64",), ("float16",), ("bfloat16",)])
every_isa = pytest.mark.parametrize("isa", adamax_ext.available_isas())


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)


def compute_dtype(dtype):
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def widened(array):
    """Return a copy in the compute type; exact."""
    with np.errstate(all="ignore"):
        return array.astype(compute_dtype(array.dtype))


def rounded(array, dtype):
    """Return a copy rounded to `dtype` by NumPy or ml_dtypes."""
    with np.errstate(all="ignore"):
        return array.astype(dtype)


def bits(array):
    """Return the bit patterns of a float array as integers; every NaN becomes the same one."""
    patterns = np.ascontiguousarray(array).view(f"u{array.itemsize}").reshape(array.shape)
    return np.where(np.isnan(array), np.iinfo(patterns.dtype).max, patterns)


def assert_same_bits(actual, expected, label):
    """Require equal dtype, shape and bits; -0.0 differs from 0.0, but any NaN equals any NaN."""
    assert actual.dtype == expected.dtype, f"{label}: {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{label}: {actual.shape}, not {expected.shape}"
    wrong = np.flatnonzero(bits(actual) != bits(expected))
    if wrong.size:
        first = wrong[0]
        got, wanted = actual.ravel()[first], expected.ravel()[first]
        raise AssertionError(
            f"{label}: {wrong.size} of {actual.size} elements differ, first element {first}: "
            f"{got!r}, not {wanted!r}"
        )


def spread(rng, size, dtype, low=-6.0, high=2.0):
    """Return values of both signs with magnitudes from 2^low to 2^high and every bit in use."""
    values = rng.uniform(1, 2, size) * np.exp2(rng.uniform(low, high, size))
    return (values * rng.choice([-1.0, 1.0], size)).astype(dtype)


def memory_order(array):
    """Return the elements in the order in which they lie in memory, as one axis."""
    return getattr(array, "host", array).ravel(order="K")  # `host`: of an emulated device


@functools.cache
def _process(isa):
    # Spawned, not forked: the instruction set is chosen once a process, at first use.
    return ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=_force, initargs=(isa,)
    )


def _force(isa):
    os.environ["ADAMAX_EXT_ISA"] = isa


def _checked(isa, check, arguments):
    result = check(*arguments)
    assert adamax_ext.active_isa() == isa, f"{adamax_ext.active_isa()} ran, not {isa}"
    return result


def run_on(isa, check, *arguments):
    """Return `check(*arguments)` from a process in which `isa` is forced and proved to have run.

    `check` is a function at the top of a module; what it raises is raised here. The process of an
    ISA is started once and serves all tests.
    """
    return _process(isa).submit(_checked, isa, check, arguments).result()


def each_thread_count():
    """Yield 1, 2, 3 and 7 while that many threads are used, on however few processors."""
    before = adamax_ext.get_num_threads()
    _core._override_cpu_limit(8)
    try:
        for threads in (1, 2, 3, 7):
            adamax_ext.set_num_threads(threads)
            yield threads
    finally:
        _core._override_cpu_limit(0)
        adamax_ext.set_num_threads(before)
