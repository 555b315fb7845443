"""LossScaleOptimizer: what it skips, that it steps like Adamax, its scale, its checkpoints."""

import json
import math
import types

import numpy as np
import pytest
from adamax_ext import Adamax, LossScaleOptimizer, schedules
from support.bits import assert_same_bits, dtype_of, every_pair
from support.frameworks import load_keras

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPES = {"kernel": (83, 50), "bias": (5,), "gain": ()}  # the first is of two blocks
INF, NAN = math.inf, math.nan


def make_weights(dtype="float32"):
    rng = np.random.default_rng(3)
    return {n: np.array(rng.normal(size=s), dtype_of(dtype)) for n, s in SHAPES.items()}


def make_grads(call, dtype="float32", scale=1.0):
    rng = np.random.default_rng(100 + call)
    return [np.array(rng.normal(size=s) * scale, dtype_of(dtype)) for s in SHAPES.values()]


def poisoned(grads, variable, element, value):
    grads = [g.copy() for g in grads]
    grads[variable].reshape(-1)[element] = value
    return grads


def everything(optimizer, weights):
    """All that a skipped call must leave as it is, apart from scale and counter."""
    adamax = getattr(optimizer, "inner_optimizer", optimizer)
    return [array.copy() for array in (*weights.values(), *adamax.variables)]


def assert_same(actual, expected):
    for i, (array, other) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(array, other, f"array {i} of everything")


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@every_pair
def test_a_gradient_that_is_not_finite_is_skipped(param, grad, value):
    """Wherever it is: first, last, beside the edge of a block, in any variable."""
    weights = make_weights(param)
    optimizer = LossScaleOptimizer(Adamax(0.1, use_ema=True, weight_decay=0.1), 1024.0)
    optimizer.apply(make_grads(0, grad), list(weights.values()))
    places = [(0, 0), (0, 91), (0, 4095), (0, 4096), (0, -1), (1, 0), (1, -1), (2, 0)]
    for n, (variable, element) in enumerate(places):
        before = everything(optimizer, weights)
        assert optimizer.apply(poisoned(make_grads(1, grad), variable, element, value)) == 1
        assert_same(everything(optimizer, weights), before)
        assert optimizer.dynamic_scale == 1024.0 / 2 ** (n + 1)
        assert optimizer.step_counter == 0


LARGEST = {"float16": 65504.0, "bfloat16": 3.3895314e38, "float32": 3.4028235e38, "float64": 1e308}


@pytest.mark.parametrize("settings", [{}, {"clipnorm": 1.0}], ids=str)
@every_pair
def test_huge_finite_gradients_are_finite(param, grad, settings):
    """For float64 even where their squares, or the sum of them, are not."""
    weights, expected = make_weights(param), make_weights(param)
    optimizer = LossScaleOptimizer(Adamax(**settings), 2.0**20)
    plain = Adamax(**settings, loss_scale_factor=2.0**20)
    grads = [np.full(s, LARGEST[grad], dtype_of(grad)) for s in SHAPES.values()]
    grads[0][::2] *= -1
    assert optimizer.apply(grads, list(weights.values())) == 1
    assert plain.apply(grads, list(expected.values())) == 1
    assert_same(everything(optimizer, weights), everything(plain, expected))
    assert (optimizer.dynamic_scale, optimizer.step_counter) == (2.0**20, 1)


@pytest.mark.parametrize(("dtype", "huge"), [("float32", 1e38), ("float64", 1e308)])
def test_a_finite_gradient_is_finite_however_small_the_scale(dtype, huge):
    """Although it overflows when it is unscaled, as in Adamax and in Keras."""
    weight, expected = np.ones((2, 3), dtype)
    optimizer, plain = LossScaleOptimizer(Adamax(), 0.25), Adamax(loss_scale_factor=0.25)
    grad = np.array([huge, 1.0, 2.0], dtype)
    optimizer.apply([grad], [weight])
    plain.apply([grad], [expected])
    assert (optimizer.dynamic_scale, optimizer.step_counter) == (0.25, 1)
    assert_same_bits(weight, expected, "weight")


def test_variables_of_several_dtypes_are_looked_at_together():
    """From the first call on, which builds the optimizer all the same."""
    pairs = [("float64", "float64"), ("float16", "float16"), ("float32", "float16")]
    weights = [np.ones(9, dtype) for dtype, _ in pairs]
    optimizer = LossScaleOptimizer(Adamax(), 64.0)
    for bad in range(len(pairs)):
        grads = [np.full(9, 1e300 if dtype == "float64" else 1.0, dtype) for _, dtype in pairs]
        grads[bad][4] = NAN
        assert optimizer.apply_gradients(zip(grads, weights, strict=True)) == 0
    assert optimizer.dynamic_scale == 8.0
    assert all(np.array_equal(weight, np.ones(9)) for weight in weights)
    assert not any(array.any() for state in optimizer.state.values() for array in state.values())


def test_absent_gradients_are_neither_finite_nor_bad():
    weights = make_weights()
    optimizer = LossScaleOptimizer(Adamax(0.1), 8.0)
    optimizer.build(weights)
    before = [*everything(optimizer, weights), *optimizer.variables]
    assert optimizer.apply([]) == 0
    with pytest.raises(ValueError, match="every entry is None"):
        optimizer.apply([None, None, None])
    with pytest.raises(ValueError, match="has 9 elements"):
        optimizer.apply([np.ones(9, np.float32), *make_grads(0)[1:]])
    assert_same([*everything(optimizer, weights), *optimizer.variables], before)
    with pytest.warns(UserWarning, match="no gradient for 'bias'"):
        optimizer.apply([make_grads(0)[0], None, make_grads(0)[2]])
    assert optimizer.apply(poisoned(make_grads(0)[:1], 0, 7, INF), [weights["kernel"]]) == 1
    assert (optimizer.dynamic_scale, optimizer.step_counter) == (4.0, 0)


SETTINGS = [
    {},
    {"weight_decay": 0.2, "beta_1": 0.5, "epsilon": 0.1},
    {"clipvalue": 0.3},
    {"clipnorm": 0.7},
    {"global_clipnorm": 0.9},
    {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 3},
    {"gradient_accumulation_steps": 3},
    {"gradient_accumulation_steps": 3, "clipnorm": 0.7},
    {"gradient_accumulation_steps": 2, "global_clipnorm": 0.7, "use_ema": True},
    {"learning_rate": schedules.InverseTimeDecay(0.1, 5, 0.5), "gradient_accumulation_steps": 2},
]
# Calls with a bad gradient: first, last, two in a row, and at every place among micro-batches.
BAD_CALLS = {0, 4, 8, 9, 13, 18, 26, 29}


@pytest.mark.parametrize("initial_scale", [2.0**10, 1000.0, 3e-5])
@every_pair
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_good_steps_have_the_bits_of_adamax(settings, param, grad, initial_scale):
    """As if the bad calls had never been: what was accumulated before them is kept."""
    weights, expected = make_weights(param), make_weights(param)
    optimizer = LossScaleOptimizer(Adamax(**settings), initial_scale, dynamic_growth_steps=4)
    plain, scale, counter = Adamax(**settings), initial_scale, 0
    optimizer.build(weights)
    plain.build(expected)
    for call in range(30):
        assert (optimizer.dynamic_scale, optimizer.step_counter) == (scale, counter)
        grads = make_grads(call, grad, scale)
        if call in BAD_CALLS:
            grads = poisoned(grads, call % 3, -1, (INF, -INF, NAN)[call % 3])
            scale, counter = scale / 2, 0
        else:
            plain.loss_scale_factor = scale
            plain.apply(grads)
            scale, counter = (scale * 2, 0) if counter == 3 else (scale, counter + 1)
        assert optimizer.apply(grads) == plain.calls
        assert optimizer.iterations == plain.iterations
        assert_same(everything(optimizer, weights), everything(plain, expected))
    optimizer.finalize_variable_values()
    plain.finalize_variable_values()
    assert_same(everything(optimizer, weights), everything(plain, expected))


def test_a_scale_that_left_the_range_of_float32_still_works():
    """Thousands of good steps, or of bad ones, must not end in an error or in a lost checkpoint."""
    for initial_scale, value in ((2.0**100, 1.0), (2.0**-100, NAN)):
        optimizer = LossScaleOptimizer(Adamax(), initial_scale, dynamic_growth_steps=1)
        optimizer.build([np.ones(3, np.float32)])
        for _ in range(1200):
            optimizer.apply([np.full(3, value, np.float32)])
        optimizer.load_own_variables(stored(optimizer))
        optimizer.load_state_dict(optimizer.state_dict())


def test_scale_loss():
    optimizer = LossScaleOptimizer(Adamax(), 8.0, dynamic_growth_steps=2)
    assert optimizer.scale_loss(0.5) == 4.0
    assert_same_bits(optimizer.scale_loss(np.ones(2, np.float32)), np.full(2, 8, "f"), "loss")
    optimizer.build([np.ones(3, np.float32)])
    for value, expected in [(INF, 4.0), (1, 4.0), (1, 8.0), (1, 8.0), (NAN, 4.0), (1, 4.0)]:
        optimizer.apply([np.full(3, value, np.float32)])
        assert optimizer.scale_loss(1.0) == expected


def test_it_stands_for_its_inner_optimizer():
    inner = Adamax(0.5, loss_scale_factor=7.0, weight_decay=0.5)
    optimizer = LossScaleOptimizer(inner)
    assert (inner.loss_scale_factor, inner.scale_loss(3.0), optimizer.built) == (None, 3.0, False)
    optimizer.exclude_from_weight_decay(var_names=["b"])
    weights = {name: np.ones(2, np.float32) for name in "ab"}
    optimizer.build(weights)
    optimizer.apply([np.zeros(2, np.float32)] * 2)
    assert (weights["a"].tolist(), weights["b"].tolist()) == ([0.75, 0.75], [1.0, 1.0])
    assert optimizer.state["b"]["norm"] is inner.state["b"]["norm"]
    optimizer.learning_rate = 0.25
    assert (inner.learning_rate, optimizer.learning_rate, optimizer.iterations) == (0.25, 0.25, 1)


def stored(optimizer):
    store = {}
    optimizer.save_own_variables(store)
    return store


WAYS = {
    "file": lambda a, b, path: (a.save(path), b.load(path)),
    "state_dict": lambda a, b, path: b.load_state_dict(a.state_dict()),
    "own_variables": lambda a, b, path: b.load_own_variables(stored(a)),
}
each_way = pytest.mark.parametrize("way", WAYS)


def train(optimizer, calls, convert=np.asarray):
    """Train with bad gradients among them, which only Adamax itself is spared."""
    for call in calls:
        grads = make_grads(call)
        if call in BAD_CALLS and not isinstance(optimizer, Adamax):
            grads = poisoned(grads, 0, 0, INF)
        optimizer.apply([convert(grad) for grad in grads])


def trained(calls, settings, wrapped=True, scale=2.0**12):
    weights, optimizer = make_weights(), Adamax(**settings)
    if wrapped:
        optimizer = LossScaleOptimizer(optimizer, scale, dynamic_growth_steps=4)
    optimizer.build(weights)
    train(optimizer, range(calls))
    return optimizer, weights


@each_way
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_saves_and_loads_with_its_inner_optimizer(settings, way, tmp_path):
    source, weights = trained(11, settings)
    target, others = trained(3, settings, scale=1.0)
    WAYS[way](source, target, tmp_path / "file")
    for name, weight in others.items():
        weight[...] = weights[name]
    for calls in (range(0), range(11, 30)):
        train(source, calls)
        train(target, calls)
        assert_same(everything(target, others), everything(source, weights))
        assert_same(target.variables, source.variables)


@each_way
@pytest.mark.parametrize("wrapped", [True, False])
def test_plain_and_wrapped_refuse_the_checkpoints_of_each_other(wrapped, way, tmp_path):
    source, _ = trained(5, {}, wrapped)
    target, _ = trained(2, {}, not wrapped)
    before = [array.copy() for array in target.variables]
    message = "received 12" if wrapped else "received 8"
    if way != "own_variables":
        message = "must have the keys" if wrapped else "must have a 'loss_scale'"
    with pytest.raises(ValueError, match=message):
        WAYS[way](source, target, tmp_path / "file")
    assert_same(target.variables, before)


@pytest.mark.parametrize("to_ours", [True, False], ids=["from_keras", "to_keras"])
@pytest.mark.parametrize("settings", [{}, SETTINGS[7]], ids=str)
def test_scale_steps_and_state_equal_keras(settings, to_ours):
    keras = load_keras()
    source = (trained(11, settings), trained_by_keras(keras, 11, settings))
    target = (trained(3, settings, scale=1.0), trained_by_keras(keras, 3, settings, scale=1.0))
    ours, weights = (target if to_ours else source)[0]
    theirs, variables = (source if to_ours else target)[1]
    sender, receiver = (theirs, ours) if to_ours else (ours, theirs)
    receiver.load_own_variables(stored(sender))
    for weight, variable in zip(weights.values(), variables, strict=True):
        if to_ours:
            weight[...] = variable.numpy()
        variable.assign(weight.copy())
    for calls in (range(0), range(11, 30)):
        train(ours, calls)
        train(theirs, calls, keras.ops.convert_to_tensor)
        own = {"step_counter": ours.step_counter, "dynamic_scale": ours.dynamic_scale}
        assert {v.name: float(v.numpy()) for v in theirs.variables[2:4]} == own
        arrays = [*ours.variables, *weights.values()]
        for array, variable in zip(arrays, [*theirs.variables, *variables], strict=True):
            # Of the largest element: where `m` cancels, older roundings are left.
            tolerance = 2e-6 * np.abs(variable.numpy()).max()
            np.testing.assert_allclose(array, variable.numpy(), 0, tolerance, err_msg=variable.name)
    assert ours.inner_optimizer.calls == int(stored(theirs)["4"])


def trained_by_keras(keras, calls, settings, scale=2.0**12):
    variables = [keras.Variable(value, name=name) for name, value in make_weights().items()]
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adamax(**settings), scale, 4)
    optimizer.build(variables)
    train(optimizer, range(calls), keras.ops.convert_to_tensor)
    return optimizer, variables


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_configs_move_between_keras_and_here(settings):
    keras = load_keras()
    ours = LossScaleOptimizer(Adamax(**settings), 128.0, 7, "mine")
    theirs = keras.optimizers.LossScaleOptimizer.from_config(ours.get_config())
    config, before = theirs.get_config(), theirs.get_config()
    again = LossScaleOptimizer.from_config(types.MappingProxyType(config))
    assert config == before
    assert config.keys() == ours.get_config().keys()
    inner = again.inner_optimizer.get_config()
    assert inner == config["inner_optimizer"]["config"]
    inner["learning_rate"] = ours.inner_optimizer.get_config()["learning_rate"]  # not in float32
    assert inner == ours.inner_optimizer.get_config()
    assert (again.initial_scale, again.dynamic_growth_steps, again.name) == (128.0, 7, "mine")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_config(settings):
    optimizer = LossScaleOptimizer(Adamax(**settings), 100, 7, "mine")
    config, before = optimizer.get_config(), optimizer.get_config()
    again = LossScaleOptimizer.from_config(types.MappingProxyType(config))
    assert config == before == again.get_config() == json.loads(json.dumps(config))
    assert config["inner_optimizer"]["config"] == Adamax(**settings).get_config()
    own = {"name": "loss_scale_optimizer", "initial_scale": 2.0**15, "dynamic_growth_steps": 2000}
    assert LossScaleOptimizer(Adamax()).get_config().items() >= own.items()


@pytest.mark.parametrize(("edge", "value"), [(2.0**126, 1.0), (2.0**-126, NAN)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_at_the_edge_of_its_range_a_scale_stays_and_works(dtype, edge, value):
    """Gradients of zero stay zero, others become small or large, and none becomes NaN."""
    weights, optimizer = np.ones(3, dtype), LossScaleOptimizer(Adamax(0.5), edge, 1)
    optimizer.build([weights])
    for gradient in (0.0, value, 0.0 * value, 1.0):
        optimizer.apply([np.full(3, gradient, dtype)])
        assert np.isfinite(weights).all()
        assert 2.0**-126 <= optimizer.dynamic_scale <= 2.0**126
    assert optimizer.iterations == (4 if value == 1 else 2)
    assert not np.isnan(optimizer.state["variable_0"]["norm"]).any()


def test_growth_steps_below_the_counter_still_double_the_scale():
    optimizer = LossScaleOptimizer(Adamax(), 8.0, dynamic_growth_steps=9)
    optimizer.build([np.ones(3)])
    optimizer.step_counter = 5
    optimizer.dynamic_growth_steps = 3
    optimizer.apply([np.ones(3)])
    assert (optimizer.dynamic_scale, optimizer.step_counter) == (16.0, 0)


def test_a_factor_that_is_assigned_to_the_inner_optimizer_is_without_effect():
    """The scale is the one that changes."""
    weights, expected = make_weights(), make_weights()
    optimizer, other = (LossScaleOptimizer(Adamax(), 8.0) for _ in range(2))
    optimizer.inner_optimizer.loss_scale_factor = 2.0
    assert optimizer.apply(make_grads(0), list(weights.values())) == 1
    assert other.apply(make_grads(0), list(expected.values())) == 1
    assert_same(everything(optimizer, weights), everything(other, expected))
