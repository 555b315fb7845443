"""The functional step, bit for bit like the NumPy program, on every instruction set."""

import hashlib
import itertools
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import adamax_ext
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.bits import (
    PAIRS,
    bits,
    dtype_of,
    every_dtype,
    every_pair,
    is_testable,
    spread,
)
from support.isas import each_thread_count, every_isa, run_on
from support.steps import (
    RULES,
    SETTINGS,
    assert_same_step,
    check_rules,
    check_special_values,
    do_update,
    random_arrays,
)

# ---- Rules, pairs, values ---------------------------------------------------------------------


@every_isa
@every_pair
def test_every_rule_and_pair(isa, param, grad):
    run_on(isa, check_rules, param, grad)


@every_isa
@every_pair
def test_all_combinations_of_special_values(isa, param, grad):
    run_on(isa, check_special_values, param, grad)


def check_quiet_tiny_state(dtype):
    T = np.dtype(dtype).type
    tiny = reference.tiny(T)
    around = np.array([np.nextafter(tiny, T(0)), tiny, np.nextafter(tiny, T(1))])
    # Halved exactly, m and u land just below the limit, on it and above it.
    m = np.concatenate([2 * around, -2 * around, [T(1), T(-1), np.finfo(T).tiny]])
    arrays = {"param": np.ones_like(m), "grad": np.zeros_like(m), "m": m, "u": np.abs(m)}
    halves = {"learning_rate": 0.1, "beta_1": 0.5, "beta_2": 0.5, "epsilon": 1e-7}
    assert_same_step(arrays, "the first step", step=1, **halves)
    assert list(arrays["m"][:6]) == [0, tiny, around[2], 0, -tiny, -around[2]]
    assert list(arrays["u"][:3]) == [0, tiny, around[2]]
    for step in range(2, 970):
        assert_same_step(arrays, f"step {step}", step=step, **halves)
    assert not arrays["m"].any()
    assert not arrays["u"].any()


@every_isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tiny_state_becomes_zero_exactly_at_the_limit(isa, dtype):
    run_on(isa, check_quiet_tiny_state, dtype)


def check_tiny_epsilon_inside(dtype):
    T = np.dtype(dtype).type
    for epsilon in (float(np.finfo(T).tiny), 0.0):
        u = np.array([0, np.finfo(T).tiny, reference.tiny(T) / 2, 1, 1], T)
        grad = np.array([0 if epsilon else 1, 0, 0, 0, 2 * np.finfo(T).tiny], T)
        arrays = {"param": np.ones_like(u), "grad": grad, "m": np.zeros_like(u), "u": u}
        for step in range(1, 100 if epsilon else 10):  # later u is 0, and torch has NaN too
            settings = {"learning_rate": 0.1, "beta_1": 0.5, "beta_2": 0.5, "epsilon": epsilon}
            assert_same_step(arrays, f"step {step}", step=step, epsilon_mode="inside", **settings)
        assert np.isfinite(arrays["param"]).all()
        assert (arrays["u"] > 0).all()


@every_isa
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_tiny_epsilon_inside_is_divided_by(isa, dtype):
    """As torch does; zero by zero would be NaN."""
    run_on(isa, check_tiny_epsilon_inside, dtype)


rates = st.one_of(st.just(0.0), st.floats(1e-9, 1e9))
betas = st.one_of(st.just(0.0), st.floats(0, 1, exclude_max=True))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    pair=st.sampled_from([pair for pair in PAIRS if is_testable(*pair)]),
    seed=st.integers(0, 99),
    hyperparameters=st.fixed_dictionaries(
        {
            "step": st.integers(1, 2**53),
            "learning_rate": rates,
            "beta_1": betas,
            "beta_2": betas,
            "epsilon": st.floats(1e-40, 1e30),
            "weight_decay": rates,
            "decay": st.sampled_from(["decoupled", "l2"]),
            "epsilon_mode": st.sampled_from(["outside", "inside"]),
            "clipvalue": st.one_of(st.none(), st.floats(1e-30, 1e30)),
            "grad_scale": st.one_of(st.floats(1e-40, 1e30), st.floats(-1e30, -1e-40)),
            "ema_momentum": st.floats(0, 1),
        }
    ),
)
def test_any_hyperparameters(pair, seed, hyperparameters):
    arrays = random_arrays(np.random.default_rng(seed), 37, *pair)
    assert_same_step(arrays, f"{pair} {hyperparameters}", **hyperparameters)


# ---- Norms ------------------------------------------------------------------------------------

BLOCK = reference.BLOCK
EDGES = [k * BLOCK + d for k in (1, 2, 16, 48) for d in (-17, -16, -1, 0, 1, 15, 16)]
NORM_SIZES = [0, 1, 15, 16, 17, 31, 32, 33, *EDGES]


def norm_with_threads(buffers):
    norms = [adamax_ext.global_norm(buffers) for _ in each_thread_count()]
    assert norms == norms[:1] * 4
    return norms[0]


def check_norms(dtype):
    rng = np.random.default_rng(4)
    arrays = []
    for size in NORM_SIZES:
        array = np.ndarray(size, dtype_of(dtype), bytearray(size * 8 + 1), 1)  # an odd address
        array[...] = spread(rng, size, dtype_of(dtype), low=-10, high=4)
        arrays.append(array)
        for shown in (array, array[::-1].copy()):
            assert adamax_ext.global_norm([shown]) == reference.global_norm([shown]), size
    assert norm_with_threads(arrays) == reference.global_norm(arrays)
    arrays[20][-1] = np.inf
    assert norm_with_threads(arrays) == math.inf
    arrays[-1][70_000] = np.nan
    assert math.isnan(adamax_ext.global_norm(arrays))
    assert adamax_ext.global_norm([]) == 0
    assert adamax_ext.global_norm([np.array(-2.5, dtype_of(dtype))]) == 2.5


@every_isa
@every_dtype
def test_norms_at_the_edges_of_blocks(isa, dtype):
    run_on(isa, check_norms, dtype)


def huge_arrays():
    """More than 4096 blocks of 4096, so that the sums of blocks are folded twice.

    From several elements on: another order of additions is often lost in the rounding of a norm.
    """
    values = np.random.default_rng(5).standard_normal(BLOCK**2 + 3 * BLOCK + 5, np.float32)
    values = values * values * values
    return [values[first:] for first in (0, 1, 4)]


@pytest.fixture(scope="module")
def huge_norms():
    return [reference.global_norm([array]) for array in huge_arrays()]


def norms_of_huge_arrays():
    return [norm_with_threads([array]) for array in huge_arrays()]


@every_isa
def test_norms_of_more_blocks_than_fit_in_one(isa, huge_norms):
    assert run_on(isa, norms_of_huge_arrays) == huge_norms


# ---- Instruction sets -------------------------------------------------------------------------


def digest_of_a_step():
    """Return a hash of the bits that a few steps leave, with every rule, pair and stream."""
    rng = np.random.default_rng(6)
    hashed = hashlib.sha256()
    for pair, rule in itertools.product(filter(lambda p: is_testable(*p), PAIRS), RULES):
        arrays = random_arrays(rng, 100_003, *pair)
        for step in (1, 2):
            do_update(arrays, step=step, **SETTINGS, **rule)
        for array in arrays.values():
            hashed.update(bits(array).tobytes())
        hashed.update(str(adamax_ext.global_norm(list(arrays.values()))).encode())
    return hashed.hexdigest()


def test_all_isas_leave_one_hash():
    isas = adamax_ext.available_isas()
    assert len(set(isas)) == len(isas)
    assert isas[0] == "scalar"
    assert len({run_on(isa, digest_of_a_step) for isa in isas}) == 1


def first_uses(name):
    """Return the errors with which every first use of the kernels refuses the ISA `name`."""
    os.environ["ADAMAX_EXT_ISA"] = name
    w, g, m, u = (np.ones(3, np.float32) for _ in range(4))
    errors = []
    for use in (
        adamax_ext.active_isa,
        adamax_ext.build_info,
        lambda: adamax_ext.update(w, g, m, u, step=1),
        lambda: adamax_ext.global_norm([g]),
        lambda: adamax_ext.Adamax().apply([g], [w]),
    ):
        with pytest.raises(ValueError, match="ADAMAX_EXT_ISA") as error:
            use()
        errors.append(str(error.value))
    assert all((array == 1).all() for array in (w, g, m, u))
    return errors


def auto_isa(name):
    os.environ["ADAMAX_EXT_ISA"] = name
    return adamax_ext.active_isa()


def test_wrong_isa_is_refused_at_first_use_and_auto_takes_the_best():
    isas = adamax_ext.available_isas()
    unsupported = sorted({"avx2", "avx512"} - set(isas))
    for auto in ("auto", ""):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            for wrong in ("sse9", "AVX2", "scalar ", *unsupported):
                for message in process.submit(first_uses, wrong).result():
                    assert repr(wrong) in message
                    assert all(valid in message for valid in ("auto", *isas))
            assert process.submit(auto_isa, auto).result() == isas[-1]
