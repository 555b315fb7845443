"""A variable with state in 16 or 8 bits or rounded weights on an emulated GPU: the program's bits.

At its sizes, places in memory and places of random numbers. The kernels run thread by thread on the
host (tests/cpp/emulated_cuda.cpp).
"""

import itertools
from unittest import mock

import adamax_ext
import numpy as np
import pytest
from support import emulated
from support.cuda_api import CudaCall, group_of
from support.emulated import on_cuda
from support.low_memory import (
    STORAGES,
    Twins,
    check_nans,
    check_zeroed_weights,
    needs_bfloat16,
)
from support.low_memory_cuda import DeviceTwins, random_gradient
from support.steps import EMA_MOMENTUM, RULES, SETTINGS

every_storage = pytest.mark.parametrize("storage", STORAGES, ids="-".join(["%s"] * 4).__mod__)
# Around the tiles and the blocks of the kernel: 256 and 1024 elements.
EDGES = [1, 2, 31, 32, 33, 128, 255, 256, 257, 511, 513, 1023, 1024, 1025, 4095, 4096, 4097]
ODDS = [0, 0, 0, 1, 2, 4, 8, 12]  # bytes: packets, elements, and neither


def all_rules():
    return itertools.cycle(itertools.product(RULES, (None, 0.61)))


# ---- Sizes and places in memory ------------------------------------------------------------------


def stepping_there():
    """What is asked of the module for arrays of the host is done by the GPU."""
    update = adamax_ext.update

    def lent(value):
        return on_cuda(value) if isinstance(value, np.ndarray) else value

    def update_there(*arrays, **arguments):
        update(*map(lent, arrays), **{name: lent(value) for name, value in arguments.items()})

    return mock.patch.object(adamax_ext, "update", update_there)


def check_update(storage):
    rng = np.random.default_rng(3)
    rules, odds = all_rules(), itertools.cycle(ODDS)
    with stepping_there():
        for size in [*EDGES, *rng.integers(1, 1101, 25), 69_999, 70_000, 70_001]:
            rule, clipvalue = next(rules)
            settings = {**SETTINGS, **rule, "clipvalue": clipvalue}
            twins = Twins(rng, size, storage, odd=next(odds), is_fresh=size % 2 == 0)
            for step in range(1, 3 if size > 69_000 else 5):
                gradient = random_gradient(rng, size, special=step == 2)
                twins.step(gradient, f"{size}, {settings}", step=step, grad_scale=0.37, **settings)


@every_storage
def test_update(storage):
    emulated.run(check_update, storage)


def check_there(check, *arguments):
    with stepping_there():
        check(*arguments)


@needs_bfloat16
@pytest.mark.parametrize("rounding", ["stochastic", "remainder"])
def test_every_nan_stays_one(rounding):
    emulated.run(check_there, check_nans, rounding)


@needs_bfloat16
def test_weights_that_somebody_sets_to_zero_are_zero():
    emulated.run(check_there, check_zeroed_weights)


def check_many_steps(storage):
    rng = np.random.default_rng(8)
    twins = DeviceTwins(rng, 1100, storage, is_fresh=True)
    for step in range(1, 21):
        twins.draw_gradient(special=step % 5 == 2)
        if step == 11:  # blocks without any gradient
            twins.gradient[256:512] = 0
            twins.buffers["grad"][...] = twins.gradient
        twins.update(twins.unscaled(), step=step, **SETTINGS)
        group = group_of(**SETTINGS, step=step, ema_momentum=EMA_MOMENTUM, seed=2**63 + 7)
        CudaCall([twins.variable()], [group]).step()
        twins.require_same(f"step {step}")


@every_storage
def test_many_steps(storage):
    emulated.run(check_many_steps, storage)


def check_surroundings(odd):
    rng = np.random.default_rng(odd)
    for storage, size in itertools.product(STORAGES, (1, 100, 256, 257, 1300)):
        twins = DeviceTwins(rng, size, storage, odd=odd, accumulates=True)
        twins.draw_gradient()
        CudaCall([twins.variable()], [group_of(**SETTINGS)], micro_batches=2).step()
        twins.require_clean_surroundings(f"{size} of {storage} at {odd}")


@pytest.mark.parametrize("odd", sorted({*ODDS}))
def test_nothing_else_is_written(odd):
    emulated.run(check_surroundings, odd)


# ---- Places of random numbers --------------------------------------------------------------------


def check_places(first_element):
    rng = np.random.default_rng(5)
    for storage, variable in itertools.product(STORAGES, (0, 2**32 - 1)):
        place = {"first_element": first_element, "variable": variable, "seed": 2**64 - 1}
        twins = DeviceTwins(rng, 1400, storage, **place)
        twins.draw_gradient()
        twins.update(twins.unscaled(), step=2**40, **SETTINGS)
        group = group_of(**SETTINGS, step=2**40, seed=2**64 - 1, ema_momentum=EMA_MOMENTUM)
        CudaCall([twins.variable()], [group]).step()
        twins.require_same(f"{storage}, {place}")


# Of weights 2^33 elements have the same keys, of momentum 2^34.
@pytest.mark.parametrize(
    "first_element", [256, 2**32, 2**33 - 512, 2**33, 2**34 - 512, 2**34, 2**62 - 1024]
)
def test_parts_of_variables(first_element):
    emulated.run(check_places, first_element)


def check_index_arithmetic(storage, begin):
    """A variable of which only the last tiles run, beyond the first keys."""
    rng = np.random.default_rng(5)
    twins = DeviceTwins(rng, 1400, storage, first_element=begin)
    twins.draw_gradient()
    large = {}
    for name, array in twins.buffers.items():
        start = begin // 256 if name == "norm_scale" else begin
        large[name] = emulated.sparse(start + array.size, array.dtype)
        large[name][start:] = array
        twins.buffers[name] = large[name][start:]
    place = twins.place
    variable = twins.variable()
    for name, array in large.items():
        setattr(variable, name, array.ctypes.data)
    variable.size, variable.first_element = begin + 1400, 0
    twins.update(twins.unscaled(), step=2, **SETTINGS)
    emulated.set_first_element(begin)
    try:
        group = group_of(**SETTINGS, step=2, seed=place["seed"], ema_momentum=EMA_MOMENTUM)
        CudaCall([variable], [group]).step()
    finally:
        emulated.set_first_element(0)
    twins.require_same(f"{storage} from {begin} on")


@pytest.mark.parametrize("begin", [2**32 + 1024, 2**33 - 1024, 2**34 + 2048])
@pytest.mark.parametrize("storage", [("bfloat16", "bfloat16", 8, "stochastic")])
def test_index_arithmetic(storage, begin):
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    emulated.run(check_index_arithmetic, storage, begin)
