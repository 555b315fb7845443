"""Steps on an emulated GPU: the real bindings, launches and kernels have the program's bits.

The kernels run thread by thread on the host (tests/cpp/emulated_cuda.cpp); what needs a real GPU is
in test_cuda.py.
"""

import itertools
import sys
import types
import warnings

import adamax_ext
import numpy as np
import pytest
from adamax_ext import Adamax, LossScaleOptimizer
from support import emulated, reference
from support.bits import (
    PAIRS,
    assert_same_bits,
    bits,
    dtype_of,
    every_pair,
    is_testable,
    spread,
)
from support.emulated import CudaArray, TableArray, on_cuda
from support.memory import unaligned
from support.runs import (
    AVERAGES,
    CLIPPINGS,
    DECAYS,
    MICRO_BATCHES,
    SCALES,
    SKIPPED,
    check_run,
)
from support.steps import EMA_MOMENTUM, RULES, SETTINGS, expected_update

# Around the chunks of the kernels: 256 doubles, 512 others; around the columns and blocks of sums.
EDGES = [255, 256, 257, 511, 512, 513, 1023, 1025, 1029, 4095, 4096, 4097]
SIZES = [*range(1, 71), *EDGES, 3 * 4096 + 5]
OFFSETS = [0, 0, 0, 1, 2, 3, 4, 6, 8, 12, 13]  # bytes: whole vectors, elements, and neither
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 2.0**-102, 3e38]


def special(rng, shape, dtype):
    array = spread(rng, shape, dtype)
    some = rng.random(np.shape(array)) < 0.2
    with np.errstate(all="ignore"):
        array[some] = rng.choice(SPECIAL, some.sum()).astype(dtype)
    return array


# ---- Bits ----------------------------------------------------------------------------------------


def check_update(param, grad):
    rng = np.random.default_rng(3)
    dtypes = {"param": dtype_of(param), "grad": dtype_of(grad)}
    state = np.dtype(np.float64 if param == "float64" else np.float32)
    rules = itertools.cycle(itertools.product(RULES, (None, 0.61), (1, 4)))
    for size in SIZES * 2:
        rule, clipvalue, step = next(rules)
        arrays, memory = {}, {}
        for role in ("param", "grad", "m", "u", "average"):
            values = special(rng, size, dtypes.get(role, state))
            values = np.abs(values) if role == "u" else values
            arrays[role], memory[role] = unaligned(values, rng.choice(OFFSETS))
        settings = {**SETTINGS, **rule, "clipvalue": clipvalue, "step": step}
        expected = expected_update(arrays, grad_scale=0.37, **settings)
        lent = {role: on_cuda(array) for role, array in arrays.items()}
        adamax_ext.update(**lent, grad_scale=0.37, ema_momentum=EMA_MOMENTUM, **settings)
        for role, array in expected.items():
            assert_same_bits(arrays[role], array, f"{role} of {size}, {settings}")
            arrays[role].view(np.uint8)[...] = 0xA5
            assert np.all(memory[role] == 0xA5), f"memory around {role} of {size} was written"


@every_pair
def test_update(param, grad):
    emulated.run(check_update, param, grad)


def check_combinations(clipping, micro_batches):
    for average, (decay, excluded), scale, skipped in itertools.product(
        AVERAGES, DECAYS, SCALES, ((), SKIPPED)
    ):
        settings = {**clipping, **micro_batches, **average, **decay, **scale}
        check_run(settings, skipped=skipped, excluded=excluded, calls=6, place=on_cuda)


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=str)
@pytest.mark.parametrize("micro_batches", MICRO_BATCHES, ids=str)
def test_every_combination_of_settings(clipping, micro_batches):
    emulated.run(check_combinations, clipping, micro_batches)


def check_many_steps():
    sizes = [0, 1, 3, 2**16 + 7, 70_001]
    variables = [(f"v{i}", "float32", "float32", (n,), "C") for i, n in enumerate(sizes)]
    settings = {"global_clipnorm": 0.7, "weight_decay": 0.1, **AVERAGES[2]}
    check_run(settings, variables=variables, calls=20, place=TableArray)


def test_many_steps():
    emulated.run(check_many_steps)


def check_chunks(micro_batches):
    pairs = [(param, grad) for param, grad in PAIRS if is_testable(param, grad)]
    variables = [
        (f"{param}/{grad}/{n}", param, grad, (n,), "C") for param, grad in pairs for n in EDGES
    ]
    settings = {"global_clipnorm": 0.7, **AVERAGES[1], **micro_batches}
    skipped = {(call, i) for call in (1, 2) for i in range(call, len(variables), 3)}
    check_run(settings, variables=variables, skipped=skipped, calls=4, place=on_cuda)


@pytest.mark.parametrize("micro_batches", MICRO_BATCHES[:2], ids=str)
def test_edges_of_chunks(micro_batches):
    emulated.run(check_chunks, micro_batches)


def check_many_variables(count):
    """More than a table holds, more than the tile of sums that a clip adds at a time."""
    rng = np.random.default_rng(count)
    sizes = itertools.islice(itertools.cycle((1, 3, 513, 2, 1100, 7)), count)
    weights = [spread(rng, n, np.float64) for n in sizes]
    twins = [w.copy() for w in weights]
    optimizers = [Adamax(global_clipnorm=0.7), Adamax(global_clipnorm=0.7)]
    optimizers[0].build([CudaArray(w) for w in weights])
    optimizers[1].build(twins)
    grads = [spread(rng, w.size, np.float64) for w in weights]
    optimizers[0].apply([CudaArray(g) for g in grads])
    optimizers[1].apply(grads)
    for i, (device, host) in enumerate(zip(weights, twins, strict=True)):
        assert_same_bits(device, host, f"weights {i} of {count}")


@pytest.mark.parametrize("count", [46, 47, 48, 406, 407, 408, 2047, 2048, 2049, 2 * 2048 + 33])
def test_many_variables(count):
    emulated.run(check_many_variables, count)


def check_norms():
    rng = np.random.default_rng(5)
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        arrays = [spread(rng, n, dtype_of(dtype)) for n in (1, 16, 4096, 0, 70_001)]
        ours = adamax_ext.global_norm([on_cuda(a) for a in arrays])
        assert ours == reference.global_norm(arrays), dtype
        for size, offset in itertools.product([*range(1, 34), *EDGES, 768, 1000], (0, 1)):
            array, _ = unaligned(spread(rng, size, dtype_of(dtype)), offset)
            ours = adamax_ext.global_norm([on_cuda(array)])
            assert ours == reference.global_norm([array]), f"{size} of {dtype} at {offset}"
    # Three levels of sums: more than 4096 blocks of 4096.
    large = np.ones(4096 * 4096 + 5000, np.float32)
    large[::7] = 0.3
    assert adamax_ext.global_norm([CudaArray(large)]) == adamax_ext.global_norm([large])
    for value in (np.nan, np.inf):
        large[123_456] = value
        assert bits(np.array(adamax_ext.global_norm([CudaArray(large)]))) == bits(np.array(value))
    assert adamax_ext.global_norm([CudaArray(large[:0])]) == 0.0


def test_norms():
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    emulated.run(check_norms)


def check_index_arithmetic(size):
    """A variable beyond 2^31 elements, of which the last chunks run, and one behind it."""
    rng = np.random.default_rng(size)
    begin = size // 4096 * 4096 - 2 * 4096
    sizes = [size, 5000]
    variables = [emulated.sparse(n, np.float32) for n in sizes]
    grads = [emulated.sparse(n, np.float32) for n in sizes]
    parts = []
    for large, small in (variables, grads):
        parts.append([large[begin:], small])
        for part in parts[-1]:
            part[...] = spread(rng, part.size, np.float32)
    twins, twin_grads = ([part.copy() for part in pair] for pair in parts)
    optimizers = [Adamax(use_ema=True), Adamax(use_ema=True)]
    optimizers[0].build([SparseArray(v) for v in variables])
    optimizers[1].build(twins)
    emulated.set_first_element(begin)
    try:
        optimizers[0].apply([SparseArray(g) for g in grads])
    finally:
        emulated.set_first_element(0)
    optimizers[1].apply(twin_grads)
    states = [optimizer.state for optimizer in optimizers]
    for i, twin in enumerate(twins):
        kinds = {kind: states[0][f"variable_{i}"][kind].host for kind in ("momentum", "norm")}
        for kind, array in {"weights": variables[i], **kinds}.items():
            expected = twin if kind == "weights" else states[1][f"variable_{i}"][kind]
            assert_same_bits(array[-twin.size :], expected, f"{kind} of {sizes[i]}")


class SparseArray(CudaArray):
    """An array whose library makes sparse ones."""


SparseArray.__module__ = "sparse_library"


@pytest.mark.parametrize("size", [2**31 + 4103, 2**32 + 4103])
def test_index_arithmetic(size):
    emulated.run(use_sparse_library)
    emulated.run(check_index_arithmetic, size)


def use_sparse_library():
    sys.modules["sparse_library"] = types.SimpleNamespace(
        float32=np.float32,
        zeros_like=lambda array, dtype: CudaArray(emulated.sparse(array.host.size, dtype)),
    )


def check_large_norm():
    large = emulated.sparse(2**31 + 4103, np.float16)
    large[-7:] = np.arange(1, 8)
    assert adamax_ext.global_norm([CudaArray(large)]) == 140**0.5


def test_norm_of_more_than_2_31_elements():
    emulated.run(check_large_norm)


# ---- Dynamic loss scale --------------------------------------------------------------------------


def check_loss_scale(dtype, clipping):
    rng = np.random.default_rng(2)
    weights = [spread(rng, n, dtype) for n in (17, 5000)]
    twin = [w.copy() for w in weights]
    optimizers = []
    for variables in ([CudaArray(w) for w in weights], twin):
        inner = Adamax(gradient_accumulation_steps=2, use_ema=True, **clipping)
        optimizers.append(LossScaleOptimizer(inner, initial_scale=8.0, dynamic_growth_steps=3))
        optimizers[-1].build(variables)
    for call in range(12):
        grads = [spread(rng, w.size, dtype) for w in weights]
        if call in (2, 6, 7):  # first the one that accumulates, then those that update
            grads[call == 2][call] = np.nan if call == 6 else -np.inf
        if call == 9 and dtype == np.float64:
            grads[0][:] = 1e200  # whose sum of squares overflows, and nothing else
        if call in (4, 10):  # in one micro-batch of the window
            grads[0] = None
        if call in (5, 6, 7, 8):  # in all of a window: its average alone is due
            grads[1] = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizers[0].apply([None if g is None else CudaArray(g) for g in grads])
            optimizers[1].apply(grads)
        scales = [(o.dynamic_scale, o.step_counter, o.inner_optimizer.calls) for o in optimizers]
        assert scales[0] == scales[1], call
        for device, host in zip(weights, twin, strict=True):
            assert_same_bits(device, host, f"weights after call {call}")
        for name, kinds in optimizers[1].state.items():
            for kind, array in kinds.items():
                ours = optimizers[0].state[name][kind].host
                assert_same_bits(ours, array, f"{kind} of {name} after call {call}")


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_loss_scale(dtype, clipping):
    emulated.run(check_loss_scale, dtype, clipping)
