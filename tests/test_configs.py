"""Configs of older Keras, and of schedules of one's own."""

import copy

import pytest
from adamax_ext import Adamax, schedules
from adamax_ext import LossScaleOptimizer as LossScale

SCHEDULE = schedules.ExponentialDecay(0.5, 10, 0.25)


class Halving(schedules.LearningRateSchedule):
    """A schedule of one's own, as it is passed in `custom_objects`."""

    def __init__(self, start):
        self.start = start

    def __call__(self, step):
        return self.start / 2**step

    def get_config(self):
        return {"start": self.start}


KERAS_2 = {
    "name": "Adamax",
    "weight_decay": None,
    "clipnorm": None,
    "global_clipnorm": None,
    "clipvalue": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "jit_compile": False,
    "is_legacy_optimizer": False,
    "learning_rate": 0.25,
    "beta_1": 0.5,
    "beta_2": 0.999,
    "epsilon": 1e-7,
}
LEGACY = {"name": "Adamax", "learning_rate": 0.25, "decay": 0.0, "beta_1": 0.5, "beta_2": 0.999}
SERIALIZED = {"module": "keras.optimizers", "class_name": "Adamax", "registered_name": None}


def through_both(config, custom_objects=None):
    """Adamax from its config, and from that of a LossScaleOptimizer around it; nothing changes."""
    outer = {"inner_optimizer": {**SERIALIZED, "config": config}, "dynamic": True}
    before = copy.deepcopy(outer)
    made = Adamax.from_config(config, custom_objects=custom_objects)
    inner = LossScale.from_config(outer, custom_objects=custom_objects).inner_optimizer
    assert outer == before
    assert inner.get_config() == made.get_config()
    return made


@pytest.mark.parametrize(
    "config", [KERAS_2, LEGACY, LEGACY | {"decay": None}, LEGACY | {"decay": 0}]
)
@pytest.mark.parametrize("more", [{}, {"jit_compile": True, "is_legacy_optimizer": True}])
def test_configs_of_older_keras(config, more):
    optimizer = through_both(config | more)
    assert (optimizer.learning_rate, optimizer.beta_1, optimizer.epsilon) == (0.25, 0.5, 1e-7)


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (Adamax, LEGACY | {"decay": 0.1}, r"decay of the config must be None or 0.*received 0\.1"),
        (Adamax, LEGACY | {"decay": "no"}, "decay of the config must be .* received 'no'"),
        (Adamax, KERAS_2 | {"jit_compile": "x"}, "jit_compile of the config must be .*d 'x'"),
        (Adamax, KERAS_2 | {"is_legacy_optimizer": 7}, "is_legacy_optimizer of the config must be"),
        (
            LossScale,
            {"inner_optimizer": {}, "dynamic": False},
            "dynamic of the config must be True",
        ),
    ],
)
def test_what_older_keras_did_with_them_is_refused(make, config, message):
    with pytest.raises(ValueError, match="^" + message):
        make.from_config(config)


@pytest.mark.parametrize("key", ["Halving", "mine>Halving"])
def test_schedules_of_ones_own_are_passed_to_from_config(key):
    config = Adamax(Halving(0.5)).get_config()
    config["learning_rate"]["registered_name"] = "mine>Halving"
    optimizer = through_both(config, {key: Halving})
    optimizer.iterations = 3
    assert optimizer.learning_rate == 0.0625
    for objects in (None, {}, {"Other": Halving}):
        with pytest.raises(ValueError, match=r"unknown schedule 'Halving' of .* in custom_objects"):
            Adamax.from_config(config, objects)
    assert through_both(Adamax(SCHEDULE).get_config(), {}).learning_rate == 0.5
