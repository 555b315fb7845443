"""`Adamax` with state in fewer bits and rounded weights: the bits of the program, all settings."""

import itertools
import warnings

import numpy as np
import pytest
from adamax_ext import Adamax, LossScaleOptimizer, _core
from support import reference_lowmem as program
from support.bits import dtype_of, is_testable, memory_order, rounded, spread, widened
from support.low_memory import (
    LowMemoryReference,
    assert_same,
    assert_same_training,
    every_option,
    needs_bfloat16,
)
from support.runs import AVERAGES, CLIPPINGS, MICRO_BATCHES, rates_of_both
from support.steps import SETTINGS

# Name, dtype, dtype of the gradient, shape, memory order; more and fewer than 4096 elements.
VARIABLES = [
    ("kernel", "float32", "float32", (70, 60), "C"),
    ("bias", "float32", "bfloat16", (83,), "C"),
    ("brain/kernel", "bfloat16", "bfloat16", (64, 3, 29), "F"),
    ("brain/bias", "bfloat16", "float32", (17, 15), "C"),
    ("half", "float16", "float16", (4097,), "C"),
    ("empty", "float32", "float32", (0, 3), "C"),
    ("scalar", "bfloat16", "bfloat16", (), "C"),
]
VARIABLES = [row for row in VARIABLES if is_testable(row[1], row[2])]


def variables_for(rounding):
    """float16 has no other rounding than to nearest."""
    return [row for row in VARIABLES if rounding == "nearest" or row[1] != "float16"]


def make_weights(rng, variables):
    return [
        np.array(spread(rng, shape, dtype_of(dtype)), order=order)
        for _, dtype, _, shape, order in variables
    ]


def make_gradients(rng, variables, skipped=()):
    return [
        None if i in skipped else np.array(spread(rng, shape, dtype_of(grad), -9, 4), order=order)
        for i, (_, _, grad, shape, order) in enumerate(variables)
    ]


def apply_quietly(optimizer, gradients):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no gradient
        optimizer.apply(gradients)


def check_run(bits, rounding, *, calls=6, rate=None, skipped=(), excluded=(), **settings):
    rng = np.random.default_rng(1)
    variables = variables_for(rounding)
    weights = make_weights(rng, variables)
    rates = rates_of_both(rate) if rate else [0.037, 0.037]
    settings = {**SETTINGS, **settings, "state_bits": bits, "weight_rounding": rounding, "seed": 9}
    ours = Adamax(**settings | {"learning_rate": rates[0]})
    names = [row[0] for row in variables]
    chosen = [names.index(name) for name in excluded if name in names]
    theirs = LowMemoryReference(**settings | {"learning_rate": rates[1]}, excluded=chosen)
    ours.exclude_from_weight_decay(var_names=[f"^{name}$" for name in excluded])
    ours.build(weights, names)
    theirs.build(weights)
    for call in range(calls):
        missing = [i for number, i in skipped if number == call and i < len(variables)]
        gradients = make_gradients(rng, variables, missing)
        apply_quietly(ours, gradients)
        theirs.apply(gradients)
        assert_same_training(ours, theirs, weights, f"call {call} with {settings}")
    return ours, weights


@every_option
@pytest.mark.parametrize("averages", AVERAGES, ids=["", "ema", "overwrite"])
@pytest.mark.parametrize("micro_batches", MICRO_BATCHES, ids=["1", "2", "3"])
def test_averages_and_micro_batches(bits, rounding, averages, micro_batches):
    skipped = {(0, 0), (1, 2), (2, 2), (3, 3), (4, 0), (5, 1)}
    check_run(bits, rounding, skipped=skipped, **averages, **micro_batches)


@every_option
@pytest.mark.parametrize("clipping", CLIPPINGS, ids=lambda c: next(iter(c), "none"))
def test_clipping_decay_scale_and_rates(bits, rounding, clipping):
    decay = {"weight_decay": 0.213, "excluded": ("kernel", "brain/bias")}
    check_run(bits, rounding, calls=3, loss_scale_factor=3.7, rate="schedule", **decay, **clipping)
    check_run(bits, rounding, calls=3, rate="callable", gradient_accumulation_steps=2, **clipping)


@pytest.mark.parametrize(
    ("settings", "step"), [({"state_bits": 8}, 2**40), ({"weight_rounding": "stochastic"}, 7)]
)
def test_numbers_follow_from_the_number_of_the_update(settings, step):
    rng = np.random.default_rng(2)
    variables = variables_for("stochastic")
    weights = make_weights(rng, variables)
    ours, theirs = Adamax(0.1, **settings), LowMemoryReference(learning_rate=0.1, **settings)
    ours.build(weights)
    theirs.build(weights)
    ours.iterations = theirs.calls = step
    for _ in range(2):
        gradients = make_gradients(rng, variables)
        ours.apply(gradients)
        theirs.apply(gradients)
        assert_same_training(ours, theirs, weights, f"update {step}")


@every_option
def test_a_loss_scale_that_skips_a_step(bits, rounding):
    """A call with an infinite gradient changes nothing, and no random number is used up."""
    rng = np.random.default_rng(3)
    variables = variables_for(rounding)
    weights = make_weights(rng, variables)
    settings = {"state_bits": bits, "weight_rounding": rounding, "seed": 2}
    inner = Adamax(0.05, **settings)
    ours = LossScaleOptimizer(inner, initial_scale=8.0)
    theirs = LowMemoryReference(learning_rate=0.05, **settings)
    ours.build(weights)
    theirs.build(weights)
    for call in range(5):
        gradients = make_gradients(rng, variables)
        if call in (1, 3):
            gradients[1].flat[3] = np.inf
        theirs.loss_scale_factor = ours.dynamic_scale
        ours.apply(gradients)
        if call not in (1, 3):
            theirs.apply(gradients)
        assert_same_training(inner, theirs, weights, f"call {call}")
    assert ours.dynamic_scale == 2.0


@every_option
def test_finalize_and_what_an_average_overwrites(bits, rounding):
    ours, weights = check_run(bits, rounding, calls=2, use_ema=True, ema_momentum=0.871)
    averages = [memory_order(kinds["average"]).copy() for kinds in ours.state.values()]
    ours.finalize_variable_values()
    for w, average, kinds in zip(weights, averages, ours.state.values(), strict=True):
        if "remainder" in kinds:
            half, low = program.bf16_split(average)
            assert_same(memory_order(w).view(np.uint16), half, "weights")
            assert_same(memory_order(kinds["remainder"]), low, "remainder")
        else:
            assert_same(memory_order(w), rounded(average, w.dtype), "weights")


@needs_bfloat16
def test_an_average_begins_with_the_remainders():
    """Where no first update makes it, because the count of updates was set."""
    rng = np.random.default_rng(4)
    weights = [np.array(spread(rng, (3, 5), dtype_of("bfloat16")), order="F")]
    ours = Adamax(1e-4, use_ema=True, weight_rounding="remainder")
    ours.build(weights)
    remainder = ours.state["variable_0"]["remainder"]
    remainder[...] = rng.integers(-32768, 32768, remainder.shape)
    ours.iterations = 5
    masters = program.bf16_join(weights[0].view(np.uint16), remainder)
    assert not np.array_equal(masters, widened(weights[0]))
    np.testing.assert_array_equal(ours.state["variable_0"]["average"], masters)
    assert_same(ours.variables[-1], masters, "float32 weights")


def test_without_a_gradient_nothing_changes():
    """State and scales too: its norm does not decay."""
    rng = np.random.default_rng(5)
    weights = [spread(rng, 5000, np.float32) for _ in range(2)]
    for bits in (16, 8):
        ours = Adamax(state_bits=bits)
        ours.build(weights)
        ours.apply([spread(rng, 5000, np.float32) for _ in range(2)])
        before = [a.copy() for a in (weights[1], *ours.state["variable_1"].values())]
        apply_quietly(ours, [spread(rng, 5000, np.float32), None])
        after = weights[1], *ours.state["variable_1"].values()
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)


# ---- What is kept -------------------------------------------------------------------------------


@every_option
def test_arrays_that_are_kept(bits, rounding):
    weights = make_weights(np.random.default_rng(6), variables_for(rounding))
    ours = Adamax(state_bits=bits, weight_rounding=rounding)
    ours.build(weights)
    dtypes = {16: ("uint16", "uint16"), 8: ("int8", "uint8")}
    for w, kinds in zip(weights, ours.state.values(), strict=True):
        is_low = bits == 16 or (bits == 8 and w.size >= 4096)
        of_momentum, of_norm = dtypes[bits] if is_low else ("float32", "float32")
        expected = {"momentum": of_momentum, "norm": of_norm}
        if is_low:
            expected["norm_scale"] = "float32"
        if rounding == "remainder" and w.dtype.name == "bfloat16":
            expected["remainder"] = "int16"
        assert {kind: array.dtype.name for kind, array in kinds.items()} == expected
        for kind, array in kinds.items():
            if kind == "norm_scale":
                assert array.shape == ((1,) if bits == 16 else (-(-w.size // 256),))
                assert (array == (1 if bits == 16 else 0)).all()
            else:
                assert array.shape == w.shape
                assert array.flags.f_contiguous == w.flags.f_contiguous
                assert not array.any()


def test_bytes_of_state():
    """Half as many, and a quarter, with a float32 for each 256 elements."""
    bytes_of = {}
    for bits in (32, 16, 8):
        ours = Adamax(state_bits=bits)
        ours.build([np.zeros((1000, 1000), np.float32), np.zeros(4096, np.float32)])
        arrays = [array for kinds in ours.state.values() for array in kinds.values()]
        bytes_of[bits] = sum(array.nbytes for array in arrays) / 1_004_096
    assert bytes_of[32] == 8
    assert 4 < bytes_of[16] < 4.001
    assert 2 < bytes_of[8] <= 2.02


def test_decoded_state():
    ours, weights = check_run(8, "nearest", calls=2)
    for name, w in zip(ours.state, weights, strict=True):
        decoded, kept = ours.decoded_state(name), ours.state[name]
        assert list(decoded) == ["momentum", "norm"]
        for kind, array in decoded.items():
            assert (array.shape, array.dtype.name) == (w.shape, "float32")
            assert not np.shares_memory(array, kept[kind])
        if "norm_scale" not in kept:
            np.testing.assert_equal(decoded, {k: kept[k] for k in decoded})
            continue
        state = program.LowState(w.size, 8, SETTINGS["epsilon"])
        for kind in ("momentum", "norm"):
            codes = getattr(state, kind).ravel()
            codes[: w.size] = memory_order(kept[kind])
            setattr(state, kind, codes.reshape(-1, 256))
        state.scale = kept["norm_scale"]
        for array, expected in zip(decoded.values(), state.read(), strict=True):
            assert_same(
                array.ravel("F" if kept["norm"].flags.f_contiguous else "C"), expected, name
            )
    with pytest.raises(ValueError, match=r"^name must be one of \['kernel', .*received 'other'"):
        ours.decoded_state("other")
    with pytest.raises(ValueError, match=r"^the optimizer has no state yet"):
        Adamax().decoded_state("kernel")


def test_decoded_state_of_doubles_is_double():
    ours = Adamax()
    ours.build([np.ones(3)])
    ours.apply([np.ones(3)])
    assert {a.dtype.name for a in ours.decoded_state("variable_0").values()} == {"float64"}


@needs_bfloat16
@pytest.mark.parametrize("kind", ["momentum", "norm", "norm_scale", "remainder"])
def test_a_gradient_in_memory_that_is_written(kind):
    bfloat16 = dtype_of("bfloat16")
    weights = [np.ones(4096, bfloat16), np.ones(8, bfloat16)]
    ours = Adamax(state_bits=8, weight_rounding="remainder")
    ours.build(weights)
    memory = ours.state["variable_0"][kind].view(np.uint8)[:16].view(bfloat16)
    with pytest.raises(ValueError, match=rf"^grads\[1\] .* overlaps {kind}\[0\] \(variable 'var"):
        ours.apply([np.ones(4096, bfloat16), memory])
    assert (weights[0] == 1).all()


@needs_bfloat16
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"norm_scales": None},
            ValueError,
            r"norm_scale\[0\] \(variable 'w'\) must be given where",
        ),
        ({"norm_scales": [None]}, ValueError, r"norm_scale\[0\] .* must be given where"),
        (
            {"remainders": [None]},
            ValueError,
            r"remainder\[0\] \(variable 'w'\) must be given where",
        ),
        ({"weight_rounding": "nearest"}, ValueError, r"remainder\[0\] .* must be None where"),
        ({"weight_rounding": "up"}, ValueError, "weight_rounding must be 'nearest', "),
        (
            {"norm": [np.zeros(9, np.int8)]},
            TypeError,
            r"norm\[0\] .* has dtype int8; expected uint8",
        ),
        ({"averages": [np.zeros(9, np.int8)]}, TypeError, r"average\[0\] .* has dtype int8"),
    ],
    ids=str,
)
def test_a_plan_refuses(change, error, message):
    kept = {
        "momentum": [np.zeros(9, np.int8)],
        "norm": [np.zeros(9, np.uint8)],
        "averages": None,
        "accumulators": None,
        "norm_scales": [np.zeros(1, np.float32)],
        "remainders": [np.zeros(9, np.int16)],
        "weight_rounding": "remainder",
    }
    variables = (np.ones(9, dtype_of("bfloat16")),)
    _core.Plan(variables, ["w"], [0], **kept)
    with pytest.raises(error, match="^" + message):
        _core.Plan(variables, ["w"], [0], **{**kept, **change})


# ---- Settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state_bits": 4}, "state_bits must be 32, 16 or 8; received 4"),
        ({"state_bits": "8"}, "state_bits must be 32, 16 or 8; received '8'"),
        ({"state_bits": 8.0}, "state_bits must be 32, 16 or 8; received 8.0"),
        ({"state_bits": None}, "state_bits must be 32, 16 or 8; received None"),
        (
            {"weight_rounding": "up"},
            "weight_rounding must be 'nearest', 'stochastic' or 'remainder'",
        ),
        ({"weight_rounding": True}, "weight_rounding must be .* received True"),
        ({"weight_rounding": np.ones(2)}, "weight_rounding must be .* received array"),
        ({"seed": -1}, "seed must be an integer >= 0; received -1"),
        ({"seed": 2**64}, "seed must be an integer <= 18446744073709551615; received 1844"),
        ({"seed": 0.5}, "seed must be an integer >= 0; received 0.5"),
        (
            {"state_bits": 8, "beta_1": 0.9, "beta_2": 0.9},
            r"beta_1 must be below beta_2 with state_bits 8.*received beta_1=0\.9, beta_2=0\.9",
        ),
        ({"state_bits": 8, "epsilon": 1e-27}, r"epsilon must be >= 2\*\*-86 .* received 1e-27"),
    ],
    ids=str,
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match="^" + message):
        Adamax(**settings)


def test_settings_as_integers_of_numpy():
    ours = Adamax(state_bits=np.int64(8), seed=np.uint64(2**64 - 1))
    assert (type(ours.state_bits), type(ours.seed)) == (int, int)


def test_an_assigned_beta_stays_below_the_other_with_8_bits():
    ours = Adamax(state_bits=8)
    for name, value in (("beta_1", 0.9995), ("beta_2", 0.5)):
        with pytest.raises(ValueError, match=r"^beta_1 must be below beta_2 with state_bits 8"):
            setattr(ours, name, value)
    assert (ours.beta_1, ours.beta_2) == (0.9, 0.999)


def test_epsilon_is_fixed_by_build_with_8_bits():
    """What stands for the first moments is relative to it."""
    for bits in (16, 8):
        ours = Adamax(state_bits=bits)
        ours.epsilon = 1e-6
        ours.build([np.ones(3, np.float32)])
        if bits == 16:
            ours.epsilon = 1e-5
            continue
        with pytest.raises(ValueError, match=r"^epsilon cannot be assigned after build.*1e-05"):
            ours.epsilon = 1e-5
        assert ours.epsilon == 1e-6


@pytest.mark.parametrize(
    ("name", "value"), [("state_bits", 8), ("weight_rounding", "stochastic"), ("seed", 3)]
)
def test_settings_are_fixed_by_build(name, value):
    ours = Adamax()
    setattr(ours, name, value)
    setattr(ours, name, getattr(Adamax(), name))
    ours.build([np.ones(3, np.float32)])
    with pytest.raises(ValueError, match=rf"^{name} cannot be assigned after build"):
        setattr(ours, name, value)
    assert getattr(ours, name) == getattr(Adamax(), name)


@pytest.mark.parametrize(
    ("weights", "settings", "message"),
    [
        (np.ones(5), {"state_bits": 8}, r"variables\[0\] \(variable 'w'\) has dtype float64"),
        (np.ones(5), {"state_bits": 16}, r"variables\[0\] \(variable 'w'\) has dtype float64"),
        (
            np.ones(5, np.float16),
            {"weight_rounding": "stochastic"},
            r"variables\[0\] \(variable 'w'\) has dtype float16, which weight_rounding 'stoch",
        ),
        (
            np.ones(5, np.float16),
            {"weight_rounding": "remainder", "state_bits": 16},
            r"variables\[0\] \(variable 'w'\) has dtype float16, which weight_rounding 'remainder'",
        ),
        (np.ones(5, np.int8), {"state_bits": 8}, r"variables\[0\].* has dtype int8"),
    ],
    ids=str,
)
def test_variables_that_are_refused(weights, settings, message):
    ours = Adamax(**settings)
    with pytest.raises(TypeError, match="^" + message):
        ours.build({"w": weights})
    assert not ours.built


def test_what_has_nothing_to_round_takes_every_rounding():
    """float32 and float64 weights with any `weight_rounding` are those with "nearest"."""
    results = []
    for rounding, seed in itertools.product(("nearest", "stochastic", "remainder"), (0, 5)):
        weights = [np.ones(700, np.float32), np.ones(9)]
        ours = Adamax(0.1, weight_rounding=rounding, seed=seed)
        ours.build(weights)
        ours.apply([np.arange(1, 701, dtype=np.float32), np.arange(1.0, 10)])
        results.append([w.tobytes() for w in weights])
        assert all(set(kinds) == {"momentum", "norm"} for kinds in ours.state.values())
    assert results == results[:1] * 6


def test_float16_weights_with_state_in_8_bits():
    """Any bits of state will do for them; to nearest."""
    check_run(8, "nearest", calls=2)
