"""LossScaleOptimizer: what it refuses, at construction and later."""

import math

import pytest
from adamax_ext import Adamax, LossScaleOptimizer

INF, NAN = math.inf, math.nan

ABOVE_0, FROM_1 = "^initial_scale must be .*; received", "^dynamic_growth_steps must be an integer"
OUTSIDE = r"^initial_scale must be a number in \[2\*\*-126, 2\*\*126\]; received"
WRAPPED = LossScaleOptimizer(Adamax())
REFUSED = [
    *((x, {}, TypeError, "must be an Adamax; received") for x in (None, Adamax, WRAPPED)),
    *((None, {"initial_scale": x}, ValueError, ABOVE_0) for x in (0, -1.0, NAN, INF)),
    *((None, {"initial_scale": x}, ValueError, OUTSIDE) for x in (2.0**130, 1e-60, 2.0**-127)),
    *((None, {"name": x}, TypeError, "name must be a string; received") for x in (3, b"name")),
    *((None, {"initial_scale": x}, TypeError, ABOVE_0) for x in (None, "1", True, 1j)),
    *((None, {"dynamic_growth_steps": x}, ValueError, FROM_1) for x in (0, -3, 1.5, None, True)),
    *((None, {name: 1.0}, TypeError, name) for name in ("unknown", "clipnorm")),
]


@pytest.mark.parametrize(("inner", "arguments", "error", "message"), REFUSED)
def test_constructor_refuses(inner, arguments, error, message):
    adamax = Adamax(loss_scale_factor=3.0)
    with pytest.raises(error, match=message):
        LossScaleOptimizer(adamax if arguments else inner, **arguments)
    assert adamax.loss_scale_factor == 3.0
    optimizer = LossScaleOptimizer(Adamax())
    before = optimizer.get_config()
    for name in arguments.keys() & before.keys():
        with pytest.raises(error, match=message):
            setattr(optimizer, name, arguments[name])
    assert optimizer.get_config() == before


@pytest.mark.parametrize("name", ["dynamic_scale", "step_counter"])
@pytest.mark.parametrize("value", [2.0**127, 1e-60, 0.0, -1, NAN, "1", None])
def test_scale_and_counter_are_checked_when_assigned(name, value):
    optimizer = LossScaleOptimizer(Adamax(), 8.0)
    with pytest.raises((ValueError, TypeError), match=f"^{name} must be "):
        setattr(optimizer, name, value)
    assert (optimizer.dynamic_scale, optimizer.step_counter) == (8.0, 0)


def test_from_config_refuses_other_inner_optimizers():
    config = WRAPPED.get_config()
    config["inner_optimizer"]["class_name"] = "Adam"
    with pytest.raises(ValueError, match="must be an Adamax; received 'Adam'"):
        LossScaleOptimizer.from_config(config)


@pytest.mark.parametrize("config", [{}, {"inner_optimizer": "adamax"}], ids=str)
def test_from_config_names_a_missing_inner_optimizer(config):
    with pytest.raises(ValueError, match=r"^inner_optimizer must be an Adamax; received"):
        LossScaleOptimizer.from_config(config)


@pytest.mark.parametrize(("name", "value"), [("initial_scale", 8.0), ("inner_optimizer", Adamax())])
def test_what_only_the_constructor_takes_cannot_be_assigned(name, value):
    optimizer = LossScaleOptimizer(Adamax(), initial_scale=4.0)
    with pytest.raises(ValueError, match=f"^{name} cannot be assigned"):
        setattr(optimizer, name, value)
    assert optimizer.dynamic_scale == 4.0
