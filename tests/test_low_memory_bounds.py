"""Nothing beyond the arrays of a variable is touched, whatever a call does with them."""

import ctypes
import itertools
import mmap
import warnings

import numpy as np
import pytest
from adamax_ext import _core
from support.bits import dtype_of
from support.isas import every_isa, run_on
from support.low_memory import STORAGES
from support.steps import native

DTYPES = {32: (np.float32, np.float32), 16: (np.uint16, np.uint16), 8: (np.int8, np.uint8)}


def guarded(count, dtype, value=0):
    """Return an array that ends where memory that cannot be touched begins."""
    page, bytes_of = mmap.PAGESIZE, count * np.dtype(dtype).itemsize
    pages = -(-bytes_of // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    guard = ctypes.c_void_p(address + pages * page)
    assert protect(guard, ctypes.c_size_t(page), 0) == 0
    array = np.frombuffer(memory, np.uint8, bytes_of, pages * page - bytes_of).view(dtype)
    array[...] = value
    return array


def check_bounds(storage):
    """Steps, micro-batches, averages alone: of a variable whose last tile is a short one."""
    param, grad, bits, rounding = storage
    kinds = DTYPES[bits] if param != "float64" else (np.float64, np.float64)
    computed = np.float64 if param == "float64" else np.float32
    has_remainder = rounding == "remainder" and param == "bfloat16"
    for size in (1, 255, 300, 4097 + 250):
        scales = {32: 0, 16: 1, 8: -(-size // 256)}[bits]
        plan = _core.Plan(
            (guarded(size, dtype_of(param), 1), np.ones(3, np.float32)),
            ["variable", "other"],
            [0, 0],
            momentum=[guarded(size, kinds[0]), np.zeros(3, np.float32)],
            norm=[guarded(size, kinds[1]), np.zeros(3, np.float32)],
            averages=[guarded(size, computed), np.zeros(3, np.float32)],
            accumulators=[guarded(size, computed), np.zeros(3, np.float32)],
            norm_scales=[guarded(scales, np.float32, bits == 16) if scales else None, None],
            remainders=[guarded(size, np.int16) if has_remainder else None, None],
            weight_rounding=rounding,
        )
        gradient, other = guarded(size, dtype_of(grad), 0.5), np.ones(3, np.float32)
        groups = (native(_core.Group, step=3),)
        for micro_batches, overwrite in itertools.product((1, 2), (False, True)):
            settings = {"micro_batches": micro_batches, "overwrite": overwrite, "clipnorm": 1.0}
            plan.step((gradient, other), None, groups, native(_core.Call, **settings))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is one without a gradient
            plan.step((None, other), None, groups, native(_core.Call))
        plan.finalize(None)


@every_isa
@pytest.mark.parametrize("storage", STORAGES, ids=["-".join(map(str, s)) for s in STORAGES])
def test_nothing_beyond_the_arrays_is_touched(isa, storage):
    run_on(isa, check_bounds, storage)
