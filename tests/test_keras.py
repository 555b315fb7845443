"""Adamax against the live Keras optimizer: each setting, configs and saved state both ways."""

import inspect
import json
import types
from dataclasses import dataclass

import numpy as np
import pytest
from adamax_ext import Adamax, low_state, schedules
from support.frameworks import load_keras

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPES = {"kernel": (7, 13), "bias": (13,), "gain": (), "deep_kernel": (3, 4, 5), "deep_bias": (5,)}
STEPS = 100


@pytest.fixture(scope="module")
def keras():
    return load_keras()


@dataclass(frozen=True)
class Precision:
    """What both compute in, and what may then lie between them.

    Errors are relative to the largest magnitude of an array: in single elements of `m`, and of the
    weights, terms of either sign cancel and leave the rounding errors of what they were before.
    """

    dtype: str
    state: float
    weights: float

    def require_close(self, actual, expected, tolerance, what):
        actual, expected = np.asarray(actual), np.asarray(expected)
        assert actual.shape == expected.shape, what
        difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
        assert np.isfinite(difference).all(), what
        assert difference.max() <= tolerance * np.abs(expected).max(), what


FLOAT32 = Precision("float32", 1e-6, 2e-6)
FLOAT64 = Precision("float64", 1e-13, 1e-13)


@pytest.fixture(params=[FLOAT32, FLOAT64], ids=lambda precision: precision.dtype)
def precision(request, keras):
    """Keras computing rates and state in this dtype: float64 shows formulas that rounding hides."""
    before = keras.config.floatx()
    keras.config.set_floatx(request.param.dtype)
    try:
        if request.param.dtype not in str(keras.ops.convert_to_tensor(0.1).dtype):
            pytest.skip(f"the {keras.backend.backend()} backend of keras computes in float32 only")
        yield request.param
    finally:
        keras.config.set_floatx(before)


def make_weights(dtype="float32"):
    rng = np.random.default_rng(7)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def make_grads(call, dtype="float32"):
    """Gradients of different size from call to call, now and then zero for one variable."""
    rng = np.random.default_rng(1000 + call)
    # A scalar is its own largest element: with a mean, its `m` does not cancel.
    grads = [rng.normal(0.0 if shape else 2.0, size=shape) for shape in SHAPES.values()]
    size = 10 ** rng.uniform(-1.0, 0.5)
    return [np.array(g * size * (rng.random() > 0.1), dtype) for g in grads]


class Pair:
    """Our optimizer and Keras', each on its own copy of the same weights."""

    def __init__(self, keras, ours, theirs, dtype="float32"):
        self.keras, self.ours, self.theirs, self.dtype = keras, ours, theirs, dtype
        self.weights = make_weights(dtype)
        self.variables = [
            keras.Variable(value.copy(), name=name, dtype=dtype)
            for name, value in self.weights.items()
        ]

    def build(self):
        self.ours.build(self.weights)
        self.theirs.build(self.variables)
        return self

    def train(self, calls, before_call=lambda call: None):
        for call in calls:
            before_call(call)
            self.ours.apply(make_grads(call, self.dtype))
            self.train_theirs(make_grads(call, self.dtype))

    def train_theirs(self, grads):
        self.theirs.apply([self.keras.ops.convert_to_tensor(g) for g in grads], self.variables)

    def require_equal(self, precision, skip=()):
        """Compare weights, and the state in Keras' order, where Keras tells by name what it is."""
        for weight, variable in zip(self.weights.values(), self.variables, strict=True):
            precision.require_close(weight, variable.numpy(), precision.weights, variable.name)
        ours, theirs = self.ours.variables, self.theirs.variables
        assert [a.shape for a in ours] == [tuple(v.shape) for v in theirs]
        for array, variable in zip(ours, theirs, strict=True):
            if variable.name == "iteration":
                assert array == int(variable.numpy())
            elif variable.name == "learning_rate":  # ours is written as float32 in any case
                assert array == np.float32(variable.numpy())
            elif not variable.name.endswith(skip):
                is_average = variable.name.endswith("_average")
                tolerance = precision.weights if is_average else precision.state
                precision.require_close(array, variable.numpy(), tolerance, variable.name)


def pair_of(keras, settings, dtype="float32"):
    theirs = dict(settings)
    if isinstance(settings.get("learning_rate"), schedules.LearningRateSchedule):
        config = schedules.serialize(settings["learning_rate"])
        theirs["learning_rate"] = keras.optimizers.schedules.deserialize(config)
    return Pair(keras, Adamax(**settings), keras.optimizers.Adamax(**theirs), dtype)


SCHEDULES = [
    schedules.ExponentialDecay(0.05, 30, 0.4, staircase=True),
    schedules.PiecewiseConstantDecay([20, 70], [0.04, 0.01, 0.02]),
    schedules.PolynomialDecay(0.05, 40, 0.01, 2.0, cycle=True),
    schedules.InverseTimeDecay(0.05, 15, 0.8),
    schedules.CosineDecay(0.01, 60, 0.1, warmup_target=0.05, warmup_steps=20),
    schedules.CosineDecayRestarts(0.05, 25, 1.5, 0.8, 0.1),
]
# With this rate and weight decays like 0.25, Keras' factor of 1 - rate * decay is exact in float32;
# rounded it would by itself bring Keras past the tolerance in a hundred steps.
BASE = {"learning_rate": 2.0**-6}
STAIRS = schedules.PiecewiseConstantDecay([40], [2.0**-5, 2.0**-7])
RULE = {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 0.02, "weight_decay": 0.125}
EMA = {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 7}
SETTINGS = [
    {},
    {"learning_rate": 0.02},
    *({"learning_rate": schedule} for schedule in SCHEDULES),
    {"learning_rate": SCHEDULES[0], "gradient_accumulation_steps": 3},
    {**BASE, "beta_1": 0.6},
    {**BASE, "beta_1": 0.0},
    {**BASE, "beta_2": 0.7},
    {**BASE, "beta_2": 0.0},
    {**BASE, "epsilon": 0.3},
    {**BASE, "weight_decay": 0.25},
    {**BASE, "clipnorm": 2.5},
    {**BASE, "clipvalue": 0.4},
    {**BASE, "global_clipnorm": 9.0},
    {**BASE, "use_ema": True},
    {**BASE, "use_ema": True, "ema_momentum": 0.0},
    {**BASE, **EMA},
    {**BASE, "loss_scale_factor": 300.0, "epsilon": 0.01},
    {**BASE, "gradient_accumulation_steps": 7},
    {**BASE, "gradient_accumulation_steps": 3, "clipnorm": 1.0, "weight_decay": 0.5},
    {**BASE, "gradient_accumulation_steps": 3, "clipvalue": 0.3, "loss_scale_factor": 7.0},
    {**BASE, "gradient_accumulation_steps": 3, "global_clipnorm": 4.0, "loss_scale_factor": 7.0},
    {"learning_rate": STAIRS, **RULE, **EMA, "global_clipnorm": 5.0, "loss_scale_factor": 64.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_hundred_steps_equal_keras(settings, precision, keras):
    if precision is FLOAT64 and {"clipnorm", "global_clipnorm"} & set(settings):
        precision = Precision("float64", 1e-7, 1e-7)  # Keras on torch rounds these norms to float32
    pair = pair_of(keras, settings, precision.dtype).build()
    for end in (1, 10, STEPS):
        pair.train(range(pair.ours.calls, end))
        pair.require_equal(precision)
        assert pair.ours.iterations == int(pair.theirs.iterations)
        assert pair.ours.learning_rate == pytest.approx(float(pair.theirs.learning_rate), rel=1e-6)
    pair.ours.finalize_variable_values()
    pair.theirs.finalize_variable_values(pair.variables)
    pair.require_equal(precision)


def test_every_setting_is_compared():
    arguments = inspect.signature(Adamax).parameters.keys()
    assert {key for s in SETTINGS for key in s} == arguments - {"name"} - low_state.DEFAULTS.keys()


def test_a_callable_rate_equals_keras(precision, keras):
    now = {}
    settings = {"learning_rate": lambda: now["rate"], "weight_decay": 0.25}
    pair = pair_of(keras, settings, precision.dtype).build()
    assert len(pair.ours.variables) == 1 + 2 * len(SHAPES)
    pair.train(range(STEPS), lambda call: now.update(rate=0.05 / (1 + call)))
    pair.require_equal(precision)


def test_setting_the_rate_during_training_equals_keras(precision, keras):
    pair = pair_of(keras, BASE, precision.dtype).build()
    later = schedules.serialize(SCHEDULES[3])

    def before_call(call):
        if call == 30:
            pair.ours.learning_rate = pair.theirs.learning_rate = 0.05
        if call == 60:
            pair.require_equal(precision)
            pair.ours.learning_rate = schedules.deserialize(later)
            pair.theirs.learning_rate = pair.keras.optimizers.schedules.deserialize(later)

    pair.train(range(STEPS), before_call)
    pair.require_equal(precision)


# Which variables are excluded by list, which expressions, and which variables that makes.
EXCLUSIONS = [
    (["kernel", "gain"], [], {"kernel", "gain"}),
    ([], ["bias"], {"bias", "deep_bias"}),
    ([], ["^bias$", "d.*kernel"], {"bias", "deep_kernel"}),
    (["gain"], ["^deep"], {"gain", "deep_kernel", "deep_bias"}),
    ([], [], set()),
]


@pytest.mark.parametrize(("listed", "expressions", "excluded"), EXCLUSIONS)
def test_exclusion_from_weight_decay_equals_keras(listed, expressions, excluded, precision, keras):
    pair = pair_of(keras, {**BASE, "weight_decay": 0.5}, precision.dtype)
    everywhere = pair_of(keras, {**BASE, "weight_decay": 0.5}, precision.dtype).build()
    pair.ours.exclude_from_weight_decay([pair.weights[name] for name in listed], expressions)
    theirs = [variable for variable in pair.variables if variable.name in listed]
    pair.theirs.exclude_from_weight_decay(theirs, expressions)
    pair.build()
    pair.train(range(STEPS))
    pair.require_equal(precision)
    everywhere.train(range(STEPS))
    same = {n for n in SHAPES if np.array_equal(pair.weights[n], everywhere.weights[n])}
    assert same == set(SHAPES) - excluded


@pytest.mark.parametrize("frequency", [None, 4])
def test_averages_count_updates_where_keras_counts_micro_batches(frequency, precision, keras):
    """So ours under accumulation is compared with Keras on batches three times as large."""
    settings = {**BASE, **EMA, "ema_overwrite_frequency": frequency}
    pair = pair_of(keras, settings, precision.dtype)
    pair.ours = Adamax(**settings, gradient_accumulation_steps=3)
    pair.build()
    for update in range(20):
        batches = [make_grads(3 * update + i, precision.dtype) for i in range(3)]
        for grads in batches:
            pair.ours.apply(grads)
        pair.train_theirs([(a + b + c) / 3 for a, b, c in zip(*batches, strict=True)])
    averages = [v for v in pair.theirs.variables if v.name.endswith("_average")]
    for (name, state), variable in zip(pair.ours.state.items(), pair.variables, strict=True):
        for ours, theirs in ((state["average"], averages.pop(0)), (pair.weights[name], variable)):
            precision.require_close(ours, theirs.numpy(), precision.weights, name)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_configs_move_both_ways(settings, keras):
    pair = pair_of(keras, {**settings, "name": "mine"})
    written, expected = pair.ours.get_config(), pair.theirs.get_config()
    assert list(written) == list(expected)
    if isinstance(written["learning_rate"], float):  # Keras keeps it as float32
        assert expected["learning_rate"] == np.float32(written["learning_rate"])
        expected["learning_rate"] = written["learning_rate"]
    assert written == expected == json.loads(json.dumps(written))

    theirs = keras.optimizers.deserialize({"class_name": "Adamax", "config": dict(written)})
    assert theirs.get_config() == pair.theirs.get_config()

    config, before = pair.theirs.get_config(), pair.theirs.get_config()
    ours = Adamax.from_config(types.MappingProxyType(config))
    assert config == before == ours.get_config()
    assert Adamax.from_config(written).get_config() == written
    for key, value in settings.items():
        if key != "learning_rate":
            assert getattr(ours, key) == value


def test_arguments_order_and_defaults_equal_keras(keras):
    parameters = inspect.signature(keras.optimizers.Adamax.__init__).parameters.values()
    theirs = [(p.name, p.default) for p in parameters if p.name not in ("self", "name", "kwargs")]
    ours = inspect.signature(Adamax).parameters.values()
    own = [("name", "adamax"), *low_state.DEFAULTS.items()]
    assert [(p.name, p.default) for p in ours] == [*theirs, *own]


# Settings, and after how many calls the state moves: in the middle of averaging and accumulating.
TRANSFERS = [
    ({**BASE, "weight_decay": 0.25}, 10),
    ({"learning_rate": SCHEDULES[2]}, 33),
    ({**BASE, **EMA}, 10),
    ({**BASE, "gradient_accumulation_steps": 4, "clipnorm": 2.0}, 11),
    ({**BASE, "gradient_accumulation_steps": 4}, 2),
    ({**BASE, "gradient_accumulation_steps": 4, "use_ema": True}, 11),
]


@pytest.fixture(params=["dict", "h5"])
def store(request):
    if request.param == "dict":
        yield {}
        return
    h5py = pytest.importorskip("h5py", reason="a store in HDF5 needs h5py")
    with h5py.File("store", "w", driver="core", backing_store=False) as file:
        yield file.create_group("vars")


@pytest.mark.parametrize("to_ours", [True, False], ids=["from_keras", "to_keras"])
@pytest.mark.parametrize(("settings", "calls"), TRANSFERS, ids=str)
def test_state_moves_and_training_continues(settings, calls, to_ours, store, keras):
    source, target = pair_of(keras, settings).build(), pair_of(keras, settings).build()
    source.train(range(calls))
    # After the move one continues what the other began: ours of `left` beside Keras' of `right`.
    left, right = (target, source) if to_ours else (source, target)
    sender, receiver = (right.theirs, left.ours) if to_ours else (left.ours, right.theirs)
    sender.save_own_variables(store)
    assert set(store) == {str(i) for i in range(len(sender.variables))}
    assert int(np.array(store["0"])) == calls  # micro-batches included
    receiver.load_own_variables(store)
    for i, variable in enumerate(receiver.variables):
        assert np.array_equal(variable if to_ours else variable.numpy(), np.array(store[str(i)]))
    moved = Pair(keras, left.ours, right.theirs)
    moved.weights, moved.variables = left.weights, right.variables
    for weight, variable in zip(moved.weights.values(), moved.variables, strict=True):
        if to_ours:
            weight[...] = variable.numpy()
        else:
            variable.assign(weight.copy())
    assert moved.ours.calls == calls
    assert moved.ours.iterations == int(moved.theirs.iterations)
    moved.train(range(calls, calls + 30))
    averages_differ = moved.ours.use_ema and moved.ours.gradient_accumulation_steps
    moved.require_equal(FLOAT32, skip=("_average",) if averages_differ else ())


def test_variables_have_the_order_and_meaning_of_keras(keras):
    settings = {**BASE, "use_ema": True, "gradient_accumulation_steps": 3}
    pair = pair_of(keras, settings).build()
    names = [variable.name for variable in pair.theirs.variables]
    assert names[:2] == ["iteration", "learning_rate"]
    of_keras = {f"{name}_{kind}": array for name, kinds in pair.ours.state.items()
                for kind, array in kinds.items()}  # fmt: skip
    for name, array in zip(names[2:], pair.ours.variables[2:], strict=True):
        assert of_keras[name] is array
