"""Dtypes, data and comparison for tests of bits."""

import numpy as np
import pytest

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
