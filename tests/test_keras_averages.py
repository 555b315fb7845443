"""Averages of the weights, where no update has begun them yet."""

import numpy as np
import pytest
from support.keras_pairs import (
    Adamax,
    Theirs,
    assert_near,
    keras,
    make_grads,
    make_variables,
    only_torch,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
EMA = {"use_ema": True, "ema_momentum": 0.75}


@pytest.mark.parametrize("calls", [1, 3])
def test_training_ends_before_the_first_update(calls):
    """The weights stay as they are: they were not averaged with zeros."""
    variables, twins = make_variables(), make_variables()
    before = [variable.numpy().copy() for variable in variables]
    ours = Adamax(**EMA, gradient_accumulation_steps=4)
    train(ours, variables, range(calls))
    ours.finalize_variable_values(variables)
    theirs = Theirs(**EMA, gradient_accumulation_steps=4)
    train(theirs, twins, range(calls))
    theirs.finalize_variable_values(twins)
    for variable, twin, old in zip(variables, twins, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), old)
        np.testing.assert_allclose(twin.numpy(), old, rtol=1e-6)


@only_torch
def test_averages_begin_with_the_weights_of_the_first_update():
    variables = make_variables()
    optimizer = Adamax(0.1, **EMA, gradient_accumulation_steps=2)
    train(optimizer, variables, range(2))
    averages = optimizer._model_variables_moving_average
    for variable, average in zip(variables, averages, strict=True):
        np.testing.assert_array_equal(average.numpy(), variable.numpy())


@only_torch
def test_an_average_is_no_part_of_autograds_graph():
    variables = make_variables()
    optimizer = Adamax(**EMA, gradient_accumulation_steps=4)
    optimizer.apply(make_grads(0), variables)  # without no_grad, as users write it
    for average in optimizer._model_variables_moving_average:
        assert not average._value.requires_grad


@only_torch
def test_rates_of_a_schedule_are_not_kept():
    """Only variables are read once where they lie on a GPU."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.9)
    variables = make_variables()
    optimizer = Adamax(schedule)
    train(optimizer, variables, range(5))
    assert len(optimizer._step._number._known) <= 2


@only_torch
def test_accumulation_in_inference_mode():
    import torch

    with torch.inference_mode():
        variables, twins = make_variables(), make_variables()
        ours = Adamax(0.1, gradient_accumulation_steps=2)
        theirs = Theirs(0.1, gradient_accumulation_steps=2)
        train(ours, variables, range(4))
        train(theirs, twins, range(4))
        assert_near(ours, variables, theirs, twins)
