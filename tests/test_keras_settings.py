"""Settings, rate and count of our Adamax for Keras, assigned at any time, as Keras takes them."""

import numpy as np
import pytest
from support.keras_pairs import (
    BACKEND,
    EMA,
    RULE,
    Adamax,
    Pair,
    as_numpy,
    assert_same,
    everything,
    keras,
    make_grads,
    make_tensor,
    make_variables,
    only_torch,
    train,
)

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CHANGES = [
    {"beta_1": 0.5},
    {"beta_2": 0.5},
    {"epsilon": 0.3},
    {"weight_decay": 1.0},
    {"weight_decay": None},
    {"clipnorm": 0.3},
    {"clipvalue": 0.1},
    {"global_clipnorm": 0.3},
    {"global_clipnorm": 0.3, "clipvalue": 0.01},  # the norm counts
    {"clipnorm": 0.0},
    {"clipnorm": -1.0, "clipvalue": 0.1},
    {"ema_momentum": 0.1},
    {"ema_overwrite_frequency": 2},
    {"ema_overwrite_frequency": None},
    {"use_ema": False},
    {"loss_scale_factor": 3.0},
    {"learning_rate": 0.3},
    {"learning_rate": lambda: 0.3},
    {"beta_1": make_tensor(0.5)},
    {"beta_2": np.float32(0.5)},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_an_assigned_setting_counts_from_the_next_step_on(change):
    pair = Pair(**RULE, **EMA)
    pair.train(range(2))
    for optimizer, _ in pair.each():
        for name, value in change.items():
            setattr(optimizer, name, value)
    pair.train(range(2, 6))
    pair.assert_near(5e-6)


@pytest.mark.parametrize("now", [None, 4])
def test_another_number_of_micro_batches(now):
    pair = Pair(**RULE, gradient_accumulation_steps=2)
    pair.train(range(5))
    for optimizer, _ in pair.each():
        optimizer.gradient_accumulation_steps = now
    pair.train(range(5, 13))
    pair.assert_near()


def make_schedule():
    return keras.optimizers.schedules.PiecewiseConstantDecay([1, 4], [0.1, 0.02, 0.004])


@pytest.mark.parametrize("steps", [None, 3])
def test_a_schedule_sees_the_completed_calls(steps):
    pair = Pair(**{**RULE, "learning_rate": make_schedule()}, gradient_accumulation_steps=steps)
    pair.train(range(7))
    pair.assert_near()
    for optimizer, _ in pair.each():
        with pytest.raises(TypeError, match="LearningRateSchedule"):
            optimizer.learning_rate = 0.1


def test_a_rate_is_replaced_by_a_schedule():
    pair = Pair(**RULE)
    pair.train(range(2))
    for optimizer, _ in pair.each():
        optimizer.learning_rate = make_schedule()
    pair.train(range(2, 6))
    pair.assert_near()


def test_a_callable_rate_is_asked_once_an_update():
    """On JAX in each call: a condition decides over all that was computed."""
    asked = []
    optimizer = Adamax(lambda: asked.append(1) or 0.1, gradient_accumulation_steps=2)
    variables = make_variables()
    for call in range(6):
        train(optimizer, variables, [call])
    assert len(asked) == (3 if BACKEND == "torch" else 6)


@pytest.mark.parametrize("write", [
    lambda variable: variable.assign(40),
    pytest.param(lambda variable: variable._value.data.fill_(40), marks=only_torch),
    lambda variable: setattr(variable, "_value", make_tensor(40, "int32")),
], ids=["assign", "data", "replace"])  # fmt: skip
def test_assigned_iterations_count(write):
    pair = Pair(**{**RULE, "learning_rate": make_schedule(), "beta_1": 0.99})
    pair.train(range(2))
    for optimizer, _ in pair.each():
        write(optimizer._iterations)
    pair.train(range(2, 4))
    assert int(pair.ours.iterations) == 42
    pair.assert_near()


# ---- Windows of gradient accumulation ------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_without_a_gradient_in_the_whole_window_a_variable_is_skipped():
    pair = Pair(**RULE, gradient_accumulation_steps=2)
    pair.train(range(2))
    for optimizer, variables in pair.each():
        for call in range(2, 4):
            optimizer.apply([None, *make_grads(call)[1:]], variables)
    pair.train(range(4, 6))
    pair.assert_near()


def test_a_variable_that_is_frozen_within_a_window_stays_as_it_is():
    variables = make_variables()
    optimizer = Adamax(**RULE, gradient_accumulation_steps=3)
    train(optimizer, variables, range(4))
    variables[0].trainable = False
    frozen = as_numpy(variables[0])
    for call in range(4, 9):
        optimizer.apply(make_grads(call)[1:], variables[1:])
    assert_same(variables[:1], [frozen])


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("is_built", [True, False])
def test_a_window_is_resumed_where_a_gradient_then_misses(is_built):
    """The accumulators that were loaded hold gradients, of which the plan has to know."""
    settings = {**RULE, "gradient_accumulation_steps": 3}
    variables = make_variables()
    optimizer = Adamax(**settings)
    train(optimizer, variables, range(5))
    resumed, copies = Adamax(**settings), make_variables(seed=1)
    resumed.build(copies)
    if is_built:
        train(resumed, copies, range(3))  # so there is a plan, at the begin of a window
    for copy, variable in zip(copies, variables, strict=True):
        copy.assign(variable.numpy())
    resumed.set_weights([v.numpy() for v in optimizer.variables])
    for o, v in ((optimizer, variables), (resumed, copies)):
        o.apply([None, *make_grads(5)[1:]], v)
        train(o, v, range(6, 9))
    assert_same(everything(resumed, copies), everything(optimizer, variables))


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_loading_the_begin_of_a_window_forgets_the_gradients_of_another():
    settings = {**RULE, "gradient_accumulation_steps": 2}
    pair = Pair(**settings)
    pair.train(range(2))
    saved = [v.numpy() for v in pair.ours.variables]
    weights = [v.numpy() for v in pair.variables]
    train(pair.ours, pair.variables, [2])
    pair.ours.set_weights(saved)
    for variable, weight in zip(pair.variables, weights, strict=True):
        variable.assign(weight)
    for optimizer, variables in pair.each():
        for call in range(2, 4):
            optimizer.apply([None, *make_grads(call)[1:]], variables)
    pair.train(range(4, 6))
    pair.assert_near()
