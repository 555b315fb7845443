"""`Adamax` bit for bit like the NumPy program: every setting alone and together, on every ISA."""

import functools
import itertools
import multiprocessing
import os
import re
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor

import adamax_ext
import numpy as np
import pytest
from adamax_ext import Adamax, _core, schedules
from reference import BLOCK, ReferenceAdamax
from support import (
    assert_same_bits,
    dtype_of,
    each_thread_count,
    every_16_bit_dtype,
    every_isa,
    is_testable,
    memory_order,
    rounded,
    run_on,
    spread,
    widened,
)

# Name, dtype, dtype of the gradient, shape, memory order: every pair, every kind of shape.
VARIABLES = [
    ("kernel", "float32", "float32", (5, 7), "C"),
    ("fortran/kernel", "float32", "float16", (6, 11), "F"),
    ("gain", "float32", "float32", (), "C"),
    ("empty", "float32", "float32", (0, 3), "C"),
    ("bias", "float32", "bfloat16", (83,), "C"),
    ("double/kernel", "float64", "float64", (3, 4, 9), "F"),
    ("half/kernel", "float16", "float16", (37,), "C"),
    ("half/bias", "float16", "float32", (2, 17), "C"),
    ("brain/kernel", "bfloat16", "bfloat16", (45,), "C"),
    ("brain/bias", "bfloat16", "float32", (9, 2), "F"),
]
VARIABLES = [row for row in VARIABLES if is_testable(row[1], row[2])]
PLAIN = {"learning_rate": 0.0371, "beta_1": 0.83, "beta_2": 0.957, "epsilon": 3.1e-5}
KINDS = {"momentum": "m", "norm": "u", "average": "average", "gradient_accumulator": "accumulator"}


class MixedReference(ReferenceAdamax):
    """The program on variables of several dtypes: each is rounded to its own at every store."""

    def build(self, variables):
        # In the order of memory, in which sums are taken.
        super().build([widened(memory_order(v)) for v in variables])
        self.storages = {id(w): v.dtype for w, v in zip(self.variables, variables, strict=True)}

    def apply(self, grads):
        super().apply([None if g is None else memory_order(g) for g in grads])

    def _store(self, w):
        self.storage = self.storages[id(w)]
        super()._store(w)


def assert_same_state(ours, theirs, variables, label):
    """Require equal bits of every weight and every state array, and equal counts."""
    names = list(ours.state)
    for i, (name, v) in enumerate(zip(names, variables, strict=True)):
        weights = rounded(theirs.variables[i], v.dtype)
        assert_same_bits(memory_order(v), weights, f"weights of {name} after {label}")
        for kind, array in ours.state[name].items():
            expected = getattr(theirs, KINDS[kind])[i]
            assert_same_bits(memory_order(array), expected, f"{kind} of {name} after {label}")
    assert ours._calls == theirs.calls, label


class Rates:
    """A rate of its own for every step that asks; the next one shows if it was asked twice."""

    def __init__(self):
        self.asked = 0

    def __call__(self):
        self.asked += 1
        return 0.05 / self.asked


def rates_of_both(kind):
    if kind == "callable":
        return Rates(), Rates()
    schedule = schedules.ExponentialDecay(0.05, decay_steps=3, decay_rate=0.7)

    def program(calls):
        return schedule(calls)

    program.is_schedule = True
    return schedule, program


def check_run(settings, *, variables=VARIABLES, calls=7, skipped=(), rate=None, excluded=()):
    """Drive both optimizers with the same gradients; compare everything after every call.

    `skipped` holds (call, index of a variable) without a gradient; `excluded` names of variables
    without weight decay.
    """
    rng = np.random.default_rng(7)
    settings = {**PLAIN, **settings}
    names = [row[0] for row in variables]
    weights = [
        spread(rng, shape, dtype_of(dtype)).copy(order=order)
        for _, dtype, _, shape, order in variables
    ]
    our_rate, their_rate = rates_of_both(rate) if rate else [settings["learning_rate"]] * 2
    ours = Adamax(**settings | {"learning_rate": our_rate})
    indices = [names.index(name) for name in excluded]
    theirs = MixedReference(**settings | {"learning_rate": their_rate}, excluded=indices)
    if excluded:  # the first by its memory, the others by name
        patterns = [f"^{re.escape(name)}$" for name in excluded[1:]]
        ours.exclude_from_weight_decay([weights[indices[0]]], patterns)
    ours.build(weights, names)
    theirs.build(weights)
    for call in range(calls):
        grads = [
            None
            if (call, i) in skipped
            else spread(rng, shape, dtype_of(grad)).copy(order=order) * dtype_of(grad).type(1.5)
            for i, (_, _, grad, shape, order) in enumerate(variables)
        ]
        expected = [names[i] for i, g in enumerate(grads) if g is None]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert ours.apply(grads) == call + 1
        assert [all(name in str(w.message) for name in expected) for w in caught] == [True] * bool(
            expected
        )
        theirs.apply(grads)
        assert_same_state(ours, theirs, weights, f"call {call} with {settings}")
        assert ours.iterations == (call + 1) // (ours.gradient_accumulation_steps or 1)


CLIPPINGS = [{}, {"clipnorm": 1.7}, {"clipvalue": 0.61}, {"global_clipnorm": 4.3}]
MICRO_BATCHES = [{}, {"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 3}]
AVERAGES = [
    {},
    {"use_ema": True, "ema_momentum": 0.871},
    {"use_ema": True, "ema_momentum": 0.871, "ema_overwrite_frequency": 2},
]
DECAYS = [({}, ()), ({"weight_decay": 0.213}, ("half/kernel", "kernel", "fortran/kernel"))]
SCALES = [{}, {"loss_scale_factor": 3.7}]
SKIPPED = {(0, 0), (2, 1), (2, 4), (3, 4), (3, 5), (4, 6), (5, 0), (5, 2), (5, 7)}


def check_combinations(clipping, micro_batches):
    for average, (decay, excluded), scale, skipped in itertools.product(
        AVERAGES, DECAYS, SCALES, ((), SKIPPED)
    ):
        settings = {**clipping, **micro_batches, **average, **decay, **scale}
        check_run(settings, skipped=skipped, excluded=excluded)


@every_isa
@pytest.mark.parametrize("clipping", CLIPPINGS, ids=str)
@pytest.mark.parametrize("micro_batches", MICRO_BATCHES, ids=str)
def test_every_combination_of_settings(isa, clipping, micro_batches):
    run_on(isa, check_combinations, clipping, micro_batches)


@pytest.mark.parametrize("micro_batches", MICRO_BATCHES, ids=str)
@pytest.mark.parametrize("rate", ["schedule", "callable"])
@pytest.mark.parametrize("beta_1", [0.0, 0.83])
def test_rates_that_change(micro_batches, rate, beta_1):
    settings = {**micro_batches, **AVERAGES[2], "beta_1": beta_1, "weight_decay": 0.213}
    check_run(settings, rate=rate, calls=9)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_1": 0.0, "beta_2": 0.0},
        {"learning_rate": 0, "weight_decay": 0.213},
        {"use_ema": True, "ema_momentum": 0.0, "ema_overwrite_frequency": 1},
        {"use_ema": True, "ema_momentum": 1, "ema_overwrite_frequency": 3},
        {"use_ema": False, "ema_overwrite_frequency": 1},
        {"clipnorm": 1e9},
        {"global_clipnorm": 1e-9},
        {"loss_scale_factor": 2.0**40, "gradient_accumulation_steps": 7, "clipvalue": 1e-13},
    ],
    ids=str,
)
def test_settings_at_their_limits(settings):
    check_run(settings, calls=15)


@every_16_bit_dtype
def test_storage_of_the_program(dtype):
    """The program as it is, with its own `storage`, for many steps at a rate lost in rounding."""
    storage = dtype_of(dtype)
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "clipnorm": 0.5}
    settings |= {"use_ema": True, "ema_overwrite_frequency": 5}
    rng = np.random.default_rng(8)
    weights = [spread(rng, 301, storage), spread(rng, (7, 9), storage)]
    ours, theirs = Adamax(**settings), ReferenceAdamax(**settings, storage=storage)
    ours.build(weights)
    theirs.build([widened(w) for w in weights])
    for call in range(60):
        grads = [spread(rng, w.shape, storage) for w in weights]
        ours.apply(grads)
        theirs.apply(grads)
        for i, state in enumerate(ours.state.values()):
            assert_same_bits(weights[i], rounded(theirs.variables[i], storage), f"call {call}")
            for kind, array in state.items():
                assert_same_bits(array, getattr(theirs, KINDS[kind])[i], f"{kind}, call {call}")


# ---- Norms that are not finite, edges of blocks, threads, tails -------------------------------


def check_poison(dtype):
    for clipping, poison, batches in itertools.product(
        CLIPPINGS[1:], (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, 3e38), (None, 2)
    ):
        settings = {**PLAIN, **clipping, "use_ema": True, "gradient_accumulation_steps": batches}
        weights = [np.ones(n, dtype_of(dtype)) for n in (40, 17)]
        ours, theirs = Adamax(**settings), MixedReference(**settings)
        ours.build(weights)
        theirs.build(weights)
        for call in range(4):
            with np.errstate(over="ignore"):
                grads = [np.full_like(w, poison if call < 3 else 0.5) for w in weights]
            grads[0][call % 2 :: 3] = -0.25 if poison in (np.inf, 3e38) else 0.0
            ours.apply(grads)
            theirs.apply(grads)
            assert_same_state(ours, theirs, weights, f"{poison} with {settings}, call {call}")


@every_isa
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_gradients_that_are_not_finite_or_all_zero(isa, dtype):
    run_on(isa, check_poison, dtype)


# Around the 4096 of a block and the 65,536 that a thread takes at a time; small ones share a chunk.
SIZES = [70_001, 3, 16 * BLOCK, 0, 3 * 16 * BLOCK + 4097, 1, BLOCK, BLOCK - 1, 2 * BLOCK + 1, 17]
LARGE = [(f"v{i}", "float32", "float32", (n,), "C") for i, n in enumerate(SIZES)]
LARGE += [(f"{row[0]}_double", "float64", "float64", *row[3:]) for row in LARGE]
LARGE += [("half", "float16", "float16", (100_003,), "C")]


def check_threads(settings):
    for _ in each_thread_count():
        check_run(settings, variables=LARGE, calls=3, skipped={(1, 2), (1, 10)})


@every_isa
@pytest.mark.parametrize("clipping", CLIPPINGS[1::2], ids=str)
@pytest.mark.parametrize("micro_batches", MICRO_BATCHES[:2], ids=str)
def test_threads_chunks_and_blocks(isa, clipping, micro_batches):
    run_on(isa, check_threads, {**clipping, **micro_batches, **AVERAGES[2], "weight_decay": 0.213})
