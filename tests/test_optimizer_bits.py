"""`Adamax` bit for bit like the NumPy program: every setting alone and together, on every ISA."""

import itertools
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor

import adamax_ext
import numpy as np
import pytest
from adamax_ext import Adamax, _core
from support.bits import assert_same_bits, dtype_of, every_16_bit_dtype, every_pair, rounded, spread
from support.isas import each_thread_count, every_isa, run_on
from support.reference import BLOCK
from support.runs import (
    AVERAGES,
    CLIPPINGS,
    DECAYS,
    MICRO_BATCHES,
    SCALES,
    SKIPPED,
    MixedReference,
    assert_same_state,
    check_run,
)
from support.steps import SETTINGS, native


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
def test_many_steps_that_are_lost_in_rounding(dtype):
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "clipnorm": 0.5, **AVERAGES[2]}
    check_run(settings, variables=[("w", dtype, dtype, (301,), "C")], calls=60)


# ---- Values, sizes, threads -------------------------------------------------------------------


def check_poison(dtype):
    for clipping, poison, batches in itertools.product(
        CLIPPINGS[1:], (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, 3e38), (None, 2)
    ):
        settings = {**SETTINGS, **clipping, "use_ema": True, "gradient_accumulation_steps": batches}
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


def count_threads():
    array, counts = np.ones(2**24, np.float32), []
    for threads in each_thread_count():
        assert adamax_ext.get_num_threads() == threads
        adamax_ext.global_norm([array])
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in /proc")
def test_as_many_threads_run_as_these_tests_ask_for():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        counts = process.submit(count_threads).result()
    assert [count - counts[0] for count in counts] == [0, 1, 2, 6]


# ---- Tails and alignment ----------------------------------------------------------------------

WIDTH = 16  # elements of the widest vector
SHORT = list(range(4 * WIDTH + 4))
LONG = [8191, 8192, 8211]  # from 8,192 on a loop begins with what lies before a cache line
STREAMS = ("variables", "m", "u", "average", "accumulator")


def lay_out(arrays, offset, byte_offset):
    """Copy `arrays`, one a length, into rows of guards; return all the memory, and the copies."""
    dtype = arrays[0].dtype
    width = arrays[-1].size + 2 * WIDTH  # the longest, its offset, and guards on both sides
    memory = np.full(len(arrays) * width * dtype.itemsize + byte_offset, 0xA5, np.uint8)
    rows = np.ndarray((len(arrays), width), dtype, memory, byte_offset)
    views = [row[offset : offset + array.size] for row, array in zip(rows, arrays, strict=True)]
    for view, array in zip(views, arrays, strict=True):
        view[...] = array
    return memory, views


def check_lengths(param, grad, byte_shift, lengths):
    """Accumulate, clip, update and average n elements for every n, at every offset."""
    rng = np.random.default_rng(2)
    storage = dtype_of(param)
    shared = {**SETTINGS, "weight_decay": 0.213, "ema_momentum": 0.871}
    program = MixedReference(
        **shared, global_clipnorm=4.3, gradient_accumulation_steps=2, use_ema=True
    )
    program.build([spread(rng, n, storage) for n in lengths])
    for kind in STREAMS[1:]:
        setattr(program, kind, [abs(spread(rng, n, program.m[0].dtype)) for n in lengths])
    kinds = {kind: [a.copy() for a in getattr(program, kind)] for kind in STREAMS}
    calls = [[spread(rng, n, dtype_of(grad)) for n in lengths] for _ in range(4)]

    def with_gaps(call, grads):
        return [None if n % 5 == call else g for n, g in zip(lengths, grads, strict=True)]

    for call, grads in enumerate(calls):
        program.apply(with_gaps(call, grads))
    for offset in range(WIDTH):
        # Streams begin at unlike places of a vector, and with a shift at odd addresses.
        def place(kind, arrays, offset=offset):
            dtype = storage if kind == "variables" else arrays[0].dtype
            k = STREAMS.index(kind) + 1
            return lay_out(
                [rounded(a, dtype) for a in arrays], offset, k * (byte_shift + dtype.itemsize)
            )

        placed = {kind: place(kind, arrays) for kind, arrays in kinds.items()}
        params, momentum, norm, averages, accumulators = (views for _, views in placed.values())
        plan = _core.Plan(
            tuple(params),
            [str(n) for n in lengths],
            [0] * len(lengths),
            momentum=momentum,
            norm=norm,
            averages=averages,
            accumulators=accumulators,
        )
        for call, grads in enumerate(calls):
            _, lent = lay_out(grads, offset, byte_shift)
            group = native(_core.Group, **shared, step=call // 2 + 1)
            what = {"global_clipnorm": 4.3, "micro_batches": 2, "accumulate_only": call % 2 == 0}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plan.step(tuple(with_gaps(call, lent)), None, [group], native(_core.Call, **what))
        for kind in STREAMS:
            expected, _ = place(kind, getattr(program, kind))
            wrong = np.flatnonzero(placed[kind][0] != expected)
            assert not wrong.size, f"{kind} at offset {offset}: byte {wrong[0]}"


@every_isa
@every_pair
@pytest.mark.parametrize("byte_shift", [0, 1, 3])
def test_every_length_and_offset_between_guards(isa, param, grad, byte_shift):
    run_on(isa, check_lengths, param, grad, byte_shift, SHORT)


@every_isa
@every_pair
def test_long_ones_at_every_offset(isa, param, grad):
    run_on(isa, check_lengths, param, grad, 0, LONG)


# ---- Bookkeeping ------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("clipping", CLIPPINGS, ids=str)
@pytest.mark.parametrize("average", AVERAGES, ids=str)
def test_micro_batches_equal_one_batch_as_large(k, clipping, average):
    """Whole numbers, so that sums and means are exact."""
    rng = np.random.default_rng(9)
    settings = {**SETTINGS, **clipping, **average, "weight_decay": 0.213, "loss_scale_factor": 4.0}
    start = [spread(rng, n, d) for n, d in [(53, "float32"), (7, "float64"), (9, "float16")]]
    small, large = Adamax(**settings, gradient_accumulation_steps=k), Adamax(**settings)
    ours, theirs = ([w.copy() for w in start] for _ in range(2))
    small.build(ours)
    large.build(theirs)
    for _ in range(5):
        mean = [rng.integers(-9, 10, w.shape) for w in start]
        parts = [[rng.integers(-9, 10, w.shape) for w in start] for _ in range(k - 1)]
        rest = [k * total - sum(others) for total, *others in zip(mean, *parts, strict=True)]
        for part in (*parts, rest):
            small.apply([g.astype(w.dtype) for g, w in zip(part, start, strict=True)])
        large.apply([g.astype(w.dtype) for g, w in zip(mean, start, strict=True)])
        states = small.state.values(), large.state.values()
        for w, expected, a, b in zip(ours, theirs, *states, strict=True):
            assert_same_bits(w, expected, "weights")
            assert not a["gradient_accumulator"].any()
            for kind, array in b.items():
                assert_same_bits(a[kind], array, kind)
    assert small.iterations == large.iterations == 5
    assert small.calls == 5 * k


@pytest.mark.filterwarnings("ignore:no gradient for 'a'")
def test_no_gradient_in_the_last_micro_batch():
    one, norms = np.ones(3, np.float32), []
    optimizer = Adamax(gradient_accumulation_steps=2)
    optimizer.build({"a": one.copy(), "b": one.copy()})
    for gradient in (one, None, one, one, None, None):
        optimizer.apply([gradient, one])
        norms.append(optimizer.state["a"]["norm"].max())
    assert norms == [0, 0.5, 0.5, 1, 1, 1]
    assert optimizer.iterations == 3


def test_state_counts_and_order():
    weights = {"a": np.ones(3, np.float32), "b": np.ones((2, 2), np.float64)}
    a, b = weights.values()
    optimizer = Adamax(learning_rate=0.25, use_ema=True, gradient_accumulation_steps=2)
    optimizer.build(weights)
    state = [optimizer.state[name] for name in weights]
    live = [s[kind] for kind in ("average", "gradient_accumulator") for s in state]
    live += [s[kind] for s in state for kind in ("momentum", "norm")]
    for call in range(1, 6):
        assert optimizer.apply([]) == call - 1
        with pytest.raises(ValueError, match="None"):
            optimizer.apply([None, None])
        grads = [np.full_like(w, 0.5 * call) for w in (b, a)]
        assert optimizer.apply_gradients(zip(grads, (b, a), strict=True)) == call
        assert optimizer.iterations == call // 2
        iteration, rate, *arrays = optimizer.variables
        assert (iteration.dtype, iteration, rate.dtype, rate) == (np.int64, call, np.float32, 0.25)
        assert all(x is y for x, y in zip(arrays, live, strict=True))
    with pytest.warns(UserWarning, match="'b'"):
        optimizer.apply([a.copy(), None])
    assert not optimizer.state["b"]["gradient_accumulator"].any()  # used without a last gradient
    optimizer.finalize_variable_values([b])
    assert (b == optimizer.state["b"]["average"]).all()
    assert (a != optimizer.state["a"]["average"]).all()
