"""Schedules: values by hand, parity with Keras in float64, configs both ways, every refusal."""

import copy
import inspect
import json
import math
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
from adamax_ext import schedules
from adamax_ext.schedules import (
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    LearningRateSchedule,
    PiecewiseConstantDecay,
    PolynomialDecay,
)
from support.frameworks import load_keras

HALF = math.sqrt(0.5)


@pytest.fixture
def keras64():
    """Keras with float64 schedules, so that rounding neither blurs a formula nor moves a stair."""
    keras = load_keras()
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    try:
        if "float64" not in str(keras.ops.convert_to_tensor(0.1).dtype):
            pytest.skip(f"the {keras.backend.backend()} backend of keras computes in float32 only")
        yield keras
    finally:
        keras.config.set_floatx(before)


# Schedule, and the rate at some steps worked out by hand.
BY_HAND = [
    (ExponentialDecay(0.5, 10, 0.25), {0: 0.5, 5: 0.25, 10: 0.125, 15: 0.0625, 20: 0.03125}),
    (ExponentialDecay(0.5, 10, 0.25, staircase=True), {9: 0.5, 10: 0.125, 19: 0.125, 20: 0.03125}),
    (ExponentialDecay(0.5, 4, 0), {0: 0.5, 1: 0.0}),
    (PiecewiseConstantDecay([2, 5], [3, 2, 1]), {0: 3, 2: 3, 3: 2, 5: 2, 6: 1, 99: 1}),
    (PiecewiseConstantDecay([2.5], [3, 2]), {2: 3, 3: 2}),
    (PiecewiseConstantDecay([], [0.25]), {0: 0.25, 9: 0.25}),
    (PolynomialDecay(1.0, 8, 0.5, power=2), {0: 1.0, 4: 0.625, 6: 0.53125, 8: 0.5, 20: 0.5}),
    (
        PolynomialDecay(1.0, 8, 0.5, power=2, cycle=True),
        {0: 1.0, 4: 0.625, 8: 0.5, 9: 0.5 * (7 / 16) ** 2 + 0.5, 16: 0.5, 18: 0.53125},
    ),
    (PolynomialDecay(1.0, 8, 0.5, power=0), {0: 1.0, 8: 1.0, 9: 1.0}),
    (PolynomialDecay(1.0, 0.1, 0.5, power=0.5, cycle=True), {n: 0.5 for n in range(1, 99)}),
    (InverseTimeDecay(0.5, 4, 2), {0: 0.5, 2: 0.25, 4: 0.5 / 3, 6: 0.125}),
    (InverseTimeDecay(0.5, 4, 2, staircase=True), {3: 0.5, 4: 0.5 / 3, 7: 0.5 / 3, 8: 0.1}),
    (CosineDecay(2.0, 8, 0.5), {0: 2.0, 2: 1.5 + HALF / 2, 4: 1.5, 8: 1.0, 50: 1.0}),
    (
        CosineDecay(1.0, 8, 0.5, warmup_target=2.0, warmup_steps=4),
        {0: 1.0, 1: 1.25, 3: 1.75, 4: 2.0, 8: 1.5, 10: 1.5 - HALF / 2, 12: 1.0, 99: 1.0},
    ),
    (CosineDecay(1.0, 8, warmup_target=2.0), {0: 2.0, 4: 1.0, 8: 0.0}),
    (CosineDecay(1.0, 8, warmup_steps=4), {0: 1.0, 4: 0.5, 8: 0.0}),
    (
        CosineDecayRestarts(2.0, 4, t_mul=3, m_mul=0.5, alpha=0.25),
        {0: 2.0, 2: 1.25, 3: 1.25 - 0.75 * HALF, 4: 1.25, 10: 0.875, 16: 0.875, 52: 0.6875},
    ),
    (CosineDecayRestarts(2.0, 4, 1, 0.5), {2: 1.0, 4: 1.0, 6: 0.5, 8: 0.5, 10: 0.25}),
    (LearningRateSchedule.from_callable(lambda step: np.float32(2**-step)), {0: 1.0, 3: 0.125}),
]


@pytest.mark.parametrize(("schedule", "expected"), BY_HAND)
def test_values_by_hand(schedule, expected):
    rates = {step: schedule(step) for step in expected}
    assert all(type(rate) is float for rate in rates.values())
    assert rates == pytest.approx(expected, rel=1e-14, abs=1e-16)


@pytest.mark.parametrize("t_mul", [1, 1.5, 2, 3, 5, 7, 10])
def test_every_period_begins_at_the_full_rate(t_mul):
    """Rounding may leave it in the period before: Keras in float32 says 0 at 64 + 96, t_mul 1.5."""
    schedule, length, start = CosineDecayRestarts(0.1, 1024, t_mul), Fraction(1024), Fraction(0)
    for _ in range(8):
        if start.denominator == 1:
            assert schedule(int(start)) == pytest.approx(0.1, rel=1e-12)
            assert start == 0 or schedule(int(start) - 1) < 1e-6
        start, length = start + length, length * Fraction(t_mul)


# Class and its arguments in Keras' order; together they set each one to other than its default.
CONFIGS = [
    ("ExponentialDecay", 0.1, 70, 0.93),
    ("ExponentialDecay", 0.3, 12.5, 1.01, True, "stairs"),
    ("PiecewiseConstantDecay", [10, 200, 550], [0.4, 0.1, 0.2, 0.0]),
    ("PiecewiseConstantDecay", [99.5], [1e-3, 1e-4], "two"),
    ("PolynomialDecay", 0.1, 700),
    ("PolynomialDecay", 0.1, 90, 0.02, 0.5),
    ("PolynomialDecay", 0.1, 90, 0.02, 2.5, True, "cycles"),
    ("InverseTimeDecay", 0.1, 7, 0.3),
    ("InverseTimeDecay", 0.1, 64, 1.7, True, "stairs"),
    ("CosineDecay", 0.1, 900),
    ("CosineDecay", 0.01, 500, 0.05, "warm", 0.2, 130),
    ("CosineDecay", 0.1, 500, 0.0, "only a target", 0.2),
    ("CosineDecay", 0.1, 500, 0.0, "only steps", None, 100),
    ("CosineDecayRestarts", 0.1, 100),
    ("CosineDecayRestarts", 0.1, 64, 1.5, 0.8, 0.1, "slower"),
    ("CosineDecayRestarts", 0.1, 110, 1.0, 0.9),
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=str)


def build(module, config):
    return getattr(module, config[0])(*config[1:])


@each_config
def test_thousand_steps_equal_keras(config, keras64):
    ours, theirs = build(schedules, config), build(keras64.optimizers.schedules, config)
    expected = [float(theirs(step)) for step in range(1000)]
    assert [ours(step) for step in range(1000)] == pytest.approx(expected, rel=1e-12, abs=1e-14)


@each_config
def test_round_trip(config):
    schedule = build(schedules, config)
    written = schedules.serialize(schedule)
    before = copy.deepcopy(written)
    assert tuple(written["config"].values())[: len(config) - 1] == config[1:]
    assert schedules.deserialize(written) == schedule
    assert type(schedule).from_config(written["config"]) == schedule
    assert written == before == json.loads(json.dumps(written))
    for again in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert again == schedule
        assert again(123) == schedule(123)


@each_config
def test_configs_move_between_keras_and_here(config):
    keras = load_keras()
    ours, theirs = build(schedules, config), build(keras.optimizers.schedules, config)
    written = keras.optimizers.schedules.serialize(theirs)
    assert schedules.serialize(ours) == written
    assert list(ours.get_config()) == list(theirs.get_config())
    assert schedules.deserialize(written) == ours
    held = keras.optimizers.Adamax(learning_rate=theirs).get_config()["learning_rate"]
    assert schedules.deserialize(held) == ours
    back = keras.optimizers.schedules.deserialize(schedules.serialize(ours))
    assert type(back) is type(theirs)
    assert back.get_config() == theirs.get_config()


@pytest.mark.parametrize("name", sorted({config[0] for config in CONFIGS}))
def test_arguments_order_and_defaults_equal_keras(name):
    theirs = getattr(load_keras().optimizers.schedules, name)
    ours = inspect.signature(getattr(schedules, name)).parameters.values()
    expected = inspect.signature(theirs).parameters.values()
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in expected]


def test_numbers_become_plain_python():
    schedule = ExponentialDecay(np.float32(0.5), np.int64(10), 1, np.bool_(True))
    assert repr(list(schedule.get_config().values())[:4]) == "[0.5, 10, 1.0, True]"
    schedule = PiecewiseConstantDecay(np.array([1, 2]), np.array([1, 2, 3], np.float32))
    assert repr(list(schedule.get_config().values())[:2]) == "[[1, 2], [1.0, 2.0, 3.0]]"


def test_a_config_shares_nothing_with_its_schedule():
    boundaries = [1, 2]
    schedule = PiecewiseConstantDecay(boundaries, [3, 2, 1])
    boundaries.append(7)
    schedule.get_config()["boundaries"].append(7)
    assert schedule.get_config()["boundaries"] == [1, 2]


NAN, INF = math.nan, math.inf
NUMBER, FLAG, LIST, TEXT = "a real number", "True or False", "a list of numbers", "a string or None"
FROM_0, ABOVE_0, FROM_1 = "finite and >= 0", "finite and > 0", "finite and >= 1"
LONGER, INCREASING = "one longer than boundaries", "strictly increasing"
# Class, arguments, the bad one, what it must be, and how the received value is shown.
BAD_ARGUMENTS = [
    (ExponentialDecay, (-0.1, 10, 0.5), "initial_learning_rate", FROM_0, "-0.1"),
    (ExponentialDecay, (NAN, 10, 0.5), "initial_learning_rate", FROM_0, "nan"),
    (ExponentialDecay, ("0.1", 10, 0.5), "initial_learning_rate", NUMBER, "'0.1'"),
    (ExponentialDecay, (True, 10, 0.5), "initial_learning_rate", NUMBER, "True"),
    (ExponentialDecay, (0.1, 0, 0.5), "decay_steps", ABOVE_0, "0"),
    (ExponentialDecay, (0.1, None, 0.5), "decay_steps", NUMBER, "None"),
    (ExponentialDecay, (0.1, 10, -0.5), "decay_rate", FROM_0, "-0.5"),
    (ExponentialDecay, (0.1, 10, 0.5, "no"), "staircase", FLAG, "'no'"),
    (ExponentialDecay, (0.1, 10, 0.5, True, 7), "name", TEXT, "7"),
    (PiecewiseConstantDecay, (3, [1.0]), "boundaries", LIST, "3"),
    (PiecewiseConstantDecay, ([3], "ab"), "values", LIST, "'ab'"),
    (PiecewiseConstantDecay, ([1, -3], [1, 1, 1]), "boundaries[1]", FROM_0, "-3"),
    (PiecewiseConstantDecay, ([3], [1, INF]), "values[1]", FROM_0, "inf"),
    (PiecewiseConstantDecay, ([3], [1]), "values", LONGER, "PiecewiseConstantDecay("),
    (PiecewiseConstantDecay, ([3, 3], [1, 2, 3]), "boundaries", INCREASING, "Piecewise"),
    (PiecewiseConstantDecay, ([5, 3], [1, 2, 3]), "boundaries", INCREASING, "Piecewise"),
    (PolynomialDecay, (0.1, INF), "decay_steps", ABOVE_0, "inf"),
    (PolynomialDecay, (0.1, 10, -1), "end_learning_rate", FROM_0, "-1"),
    (PolynomialDecay, (0.1, 10, 0.1, -1), "power", FROM_0, "-1"),
    (PolynomialDecay, (0.1, 10, 0.1, 1, None), "cycle", FLAG, "None"),
    (InverseTimeDecay, (0.1, -3, 0.5), "decay_steps", ABOVE_0, "-3"),
    (InverseTimeDecay, (0.1, 10, 1j), "decay_rate", NUMBER, "1j"),
    (CosineDecay, (0.1, 0), "decay_steps", ABOVE_0, "0"),
    (CosineDecay, (0.1, 10, -0.1), "alpha", FROM_0, "-0.1"),
    (CosineDecay, (0.1, 10, 0, "n", -1), "warmup_target", FROM_0, "-1"),
    (CosineDecay, (0.1, 10, 0, "n", 1, -1), "warmup_steps", FROM_0, "-1"),
    (CosineDecay, (0.1, 10, 0, "n", 1, None), "warmup_steps", NUMBER, "None"),
    (CosineDecayRestarts, (0.1, 0), "first_decay_steps", ABOVE_0, "0"),
    (CosineDecayRestarts, (0.1, 10, 0.5), "t_mul", FROM_1, "0.5"),
    (CosineDecayRestarts, (0.1, 10, 2, -1), "m_mul", FROM_0, "-1"),
    (CosineDecayRestarts, (0.1, 10, 2, 1, NAN), "alpha", FROM_0, "nan"),
]


@pytest.mark.parametrize(("cls", "arguments", "name", "bound", "shown"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(cls, arguments, name, bound, shown):
    error = TypeError if bound in (NUMBER, FLAG, LIST, TEXT) else ValueError
    with pytest.raises(error, match=f"^{re.escape(f'{name} must be {bound}, received {shown}')}"):
        cls(*arguments)


MINE = {"class_name": "CosineDecay", "config": {}, "module": "mine"}
NOPE = {"class_name": "Nope", "config": {}}
BAD_CONFIGS = [
    (None, TypeError, "config must be a mapping with class_name and config, received None"),
    ({"class_name": "CosineDecay"}, TypeError, "received {'class_name': 'CosineDecay'}"),
    (NOPE, ValueError, "unknown schedule 'Nope' of module 'keras.optimizers.schedules'"),
    (NOPE, ValueError, "or one of keras.optimizers.schedules: ExponentialDecay, Piecewise"),
    (MINE, ValueError, "of module 'mine'"),
    ({**NOPE, "class_name": "CosineDecay", "config": {"x": 1}}, TypeError, "argument 'x'"),
]


@pytest.mark.parametrize(("config", "error", "message"), BAD_CONFIGS)
def test_bad_configs_are_refused(config, error, message):
    with pytest.raises(error, match=re.escape(message)):
        schedules.deserialize(config)


def inverse_root(step):
    return 1 / math.sqrt(step + 1)


class Constant(LearningRateSchedule):
    """A user's own schedule."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate

    def get_config(self):
        return {"rate": self.rate}


class Unsaved(LearningRateSchedule):
    """A user's own schedule without a config."""

    def __call__(self, step):
        return 0.1


def test_from_callable():
    schedule = LearningRateSchedule.from_callable(inverse_root)
    for again in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert again(3) == 0.5
    for save in (schedule.get_config, lambda: schedules.serialize(schedule)):
        with pytest.raises(TypeError, match="cannot serialize a function, <function inverse_root"):
            save()
    with pytest.raises(TypeError, match=r"fn must be a function of the step, received 0\.1"):
        LearningRateSchedule.from_callable(0.1)


def test_own_schedules():
    config = schedules.serialize(Constant(0.5))
    assert (config["module"], config["class_name"]) == (__name__, "Constant")
    assert Constant.from_config(config["config"])(7) == 0.5
    with pytest.raises(ValueError, match=r"'Constant' of module .*: pass it in custom_objects"):
        schedules.deserialize(config)
    with pytest.raises(NotImplementedError, match=r"Unsaved must define get_config\(\)"):
        schedules.serialize(Unsaved())
    with pytest.raises(TypeError, match="schedule must be a LearningRateSchedule, received 0"):
        schedules.serialize(0)
    with pytest.raises(TypeError, match="abstract"):
        LearningRateSchedule()
