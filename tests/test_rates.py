"""Learning rates: what is refused at construction, what overflows, starting elsewhere."""

import functools
import math
from fractions import Fraction

import adamax_ext
import numpy as np
import pytest
from adamax_ext import Adamax, LossScaleOptimizer, schedules
from support.frameworks import load_keras

from_callable = schedules.LearningRateSchedule.from_callable


def bits(*arrays):
    return [array.tobytes() for array in arrays]


@pytest.mark.parametrize("start", [0, 50, np.int64(50)])
@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("build_first", [False, True])
def test_training_can_start_elsewhere(build_first, steps, start):
    seen, parameter, gradient = [], np.ones(3), np.full(3, 0.5)
    settings = {"gradient_accumulation_steps": steps}
    schedule = from_callable(lambda step: seen.append(step) or 0.1)
    optimizer = Adamax(schedule, **settings)
    if build_first:
        optimizer.build([parameter])
        optimizer.apply([gradient])
    optimizer.iterations = start
    raw = start * (steps or 1) + (1 if build_first and steps else 0)  # where a window has begun
    assert (optimizer.iterations, optimizer.calls) == (start, raw)
    seen.clear()
    for _ in range(4):
        optimizer.apply([gradient], [parameter])
    assert optimizer.calls == raw + 4
    assert seen == [step for step in range(raw, raw + 4) if (step + 1) % (steps or 1) == 0]
    expected, m, u = np.ones(3), np.zeros(3), np.zeros(3)
    if not build_first and steps is None:
        for step in range(start + 1, start + 5):
            adamax_ext.update(expected, gradient, m, u, step=int(step), learning_rate=0.1)
        assert bits(parameter) == bits(expected)
    saved = optimizer.state_dict()
    optimizer.iterations = 7
    optimizer.load_state_dict(saved)
    assert optimizer.calls == raw + 4


@pytest.mark.parametrize("value", [-1, 1.0, True, None, "3", 2**53, math.nan], ids=repr)
@pytest.mark.parametrize("steps", [None, 3])
def test_iterations_are_checked(steps, value):
    for optimizer in (
        adamax := Adamax(gradient_accumulation_steps=steps),
        LossScaleOptimizer(adamax),
    ):
        with pytest.raises(ValueError, match=r"^iterations must be an integer [><]= .*; received"):
            optimizer.iterations = value
        assert (optimizer.iterations, adamax.calls) == (0, 0)
    optimizer.iterations = 5
    assert (adamax.iterations, adamax.calls) == (5, 5 * (steps or 1))


FROM_CALLABLE = r"^learning_rate must be .*schedules\.LearningRateSchedule\.from_callable"
NOT_CALLABLES = {
    "lambda": lambda step: 0.1,
    "two": lambda step, epoch: 0.1,
    "keyword": lambda *, step: 0.1,
    "partial": functools.partial(lambda a, b: 0.1, 1),
    "method": Fraction(1, 2).__pow__,
    "class": schedules.CosineDecay,
    "optax": lambda: pytest.importorskip("optax").exponential_decay(0.1, 10, 0.9),
    "optax constant": lambda: pytest.importorskip("optax").constant_schedule(0.1),
}


@pytest.mark.parametrize("name", NOT_CALLABLES)
def test_a_function_of_the_step_is_refused_at_construction(name):
    rate = NOT_CALLABLES[name]() if "optax" in name else NOT_CALLABLES[name]
    optimizer = Adamax(lambda: 0.5)
    with pytest.raises(TypeError, match=FROM_CALLABLE):
        Adamax(rate)
    with pytest.raises(TypeError, match=FROM_CALLABLE):
        optimizer.learning_rate = rate
    assert optimizer.learning_rate == 0.5
    if "optax" in name:  # what the message tells
        wrapped = from_callable(lambda step: float(rate(step)))
        assert Adamax(wrapped).learning_rate == np.float32(0.1)


@pytest.mark.parametrize(
    "rate",
    [
        lambda step=0: 0.5,
        lambda *steps: 0.5,
        functools.partial(lambda a: a, 0.5),
        dict(a=0.5).popitem,
    ],
    ids=range(4),
)
def test_what_can_be_called_without_arguments_is_a_rate(rate):
    Adamax(rate)
    Adamax(0.1).learning_rate = rate


OVERFLOWING = [
    schedules.ExponentialDecay(1e-7, 1, 1.1),
    schedules.ExponentialDecay(1e300, 1000, 10),
    schedules.CosineDecayRestarts(0.1, 10, 1.0, 10.0),
    schedules.PolynomialDecay(1e308, 10**9, 1e308, power=0.0),
    schedules.InverseTimeDecay(1e308, 1, 0.0),
    from_callable(lambda step: math.exp(step)),
    from_callable(lambda step: 10**step),
    from_callable(lambda step: math.inf),
    lambda: math.exp(1000),
]


@pytest.mark.parametrize("rate", OVERFLOWING, ids=range(len(OVERFLOWING)))
def test_a_rate_that_overflows_is_refused(rate):
    parameter, gradient = np.ones(3, np.float32), np.ones(3, np.float32)
    optimizer = Adamax(rate)
    optimizer.build([parameter])
    optimizer.iterations = 8000
    before = bits(parameter, *optimizer.variables)
    with pytest.raises(
        ValueError, match=r"^learning_rate must be .*; received (inf|1e\+308|10{99})"
    ):
        optimizer.apply([gradient])
    assert bits(parameter, *optimizer.variables) == before
    assert optimizer.calls == 8000


# ---- Schedules of Keras --------------------------------------------------------------------------

OF_KERAS = [
    ("ExponentialDecay", 0.5, 10, 0.25),
    ("PiecewiseConstantDecay", [2, 5], [0.5, 0.25, 0.125]),
    ("PolynomialDecay", 0.5, 8, 0.25, 2.0, True),
    ("InverseTimeDecay", 0.5, 4, 2.0),
    ("CosineDecay", 0.125, 8, 0.5, "warm", 0.5, 4),
    ("CosineDecayRestarts", 0.5, 4, 3.0, 0.5),
]


@pytest.mark.parametrize("config", OF_KERAS, ids=lambda config: config[0])
def test_a_schedule_of_keras_is_taken_by_its_config(config):
    keras = load_keras()
    name, *arguments = config
    theirs = getattr(keras.optimizers.schedules, name)(*arguments)
    ours = getattr(schedules, name)(*arguments)
    optimizer, other = Adamax(theirs), Adamax(lambda: 0.5)
    other.learning_rate = theirs
    for each in (optimizer, other):
        assert each.get_config()["learning_rate"] == schedules.serialize(ours)
        each.iterations = 7
        assert each.learning_rate == ours(7)
    back = keras.optimizers.Adamax.from_config(optimizer.get_config())
    assert back.get_config()["learning_rate"] == schedules.serialize(ours)


def test_a_schedule_of_ones_own_for_keras_is_refused():
    base = load_keras().optimizers.schedules

    class Own(base.LearningRateSchedule):
        def __call__(self, step=0):  # would pass for a callable without arguments
            return 0.1

    class Changed(base.ExponentialDecay):
        def __call__(self, step):
            return 0.1

    for rate in (Own(), Changed(0.1, 10, 0.5), base.ExponentialDecay):
        with pytest.raises(TypeError, match=FROM_CALLABLE):
            Adamax(rate)
    assert Adamax(from_callable(lambda step: float(Own()(step)))).learning_rate == 0.1


@pytest.mark.parametrize("is_built_first", [False, True])
def test_an_average_that_starts_elsewhere_starts_with_the_weights(is_built_first):
    weights = np.full(3, 2.0, np.float32)
    optimizer = Adamax(use_ema=True, ema_momentum=0.75)
    if is_built_first:
        optimizer.build([weights])
    optimizer.iterations = 50
    optimizer.apply([np.ones(3, np.float32)], [weights])
    (state,) = optimizer.state.values()
    assert (state["average"] == np.float32(2.0 * 0.75) + weights * np.float32(0.25)).all()


def test_iterations_stay_when_the_accumulation_count_is_set_after_them():
    optimizer = Adamax()
    optimizer.iterations = 50
    optimizer.gradient_accumulation_steps = 4
    assert (optimizer.iterations, optimizer.calls) == (50, 200)


def test_a_first_step_that_was_interrupted_was_not_done():
    def interrupt():
        raise KeyboardInterrupt

    optimizer = Adamax(interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.apply([np.ones(3, np.float32)], [np.ones(3, np.float32)])
    assert not optimizer.built
