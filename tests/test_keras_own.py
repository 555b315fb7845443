"""Keras' own tests of Adamax, and those of its base class that hold for it, on our class.

All of keras/src/optimizers/adamax_test.py run. Of optimizer_test.py those in BASE run, with our
class in place of the one that each names. The others do not: they expect the numbers of SGD where
those of Adamax differ (SGDS), test functions that know no class of ours (OTHERS), or TensorFlow's
own variables and checkpoints (TENSORFLOWS).
"""

import types

import pytest
from support.keras_pairs import Adamax

pytest.importorskip("absl", reason="Keras' tests need absl")
pytest.importorskip("keras.src.optimizers.adamax_test", reason="this Keras came without its tests")
from keras.src import optimizers
from keras.src.optimizers import adamax_test, optimizer_test

# Of Keras, whose variables do not yet say `copy` to NumPy 2, and of what a test is about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Skipping variable loading:UserWarning"),
]

BASE = {
    "test_iterations_counter",
    "test_empty_gradients",
    "test_clip_args",
    "test_clip_norm",
    "test_clip_value",
    "test_global_clip_norm",
    "test_ema",
    "test_constraints_are_applied",
    "test_set_weights",
    "test_gradient_accumulation",
    "test_callable_learning_rate",
    "test_overwrite_with_gradient",
    "test_gradient_accumulation_with_weigth_decay",
    "test_setting_lr_to_callable_untracks_lr_var",
    "test_pickleable_optimizers",
}
SGDS = {
    "test_ema_with_model_fit",
    "test_static_loss_scaling",
    "test_overwrite_with_gradient_with_gradient_accumulation",
}
OTHERS = {"test_get_method", "test_optimizer_auto_naming"}
TENSORFLOWS = {"test_tf_checkpointing", "test_mixed_with_tf_variables"}


def get(identifier):
    """As ``keras.optimizers.get``, which knows our class by its registered name."""
    config = (
        identifier if isinstance(identifier, dict) else {"class_name": identifier, "config": {}}
    )
    assert config["class_name"] == "adamax"
    return optimizers.get({**config, "class_name": "adamax_ext>Adamax"})


OURS = types.SimpleNamespace(Adam=Adamax, SGD=Adamax, get=get, schedules=optimizers.schedules)


class TestAdamax(adamax_test.AdamaxTest):
    @pytest.fixture(autouse=True)
    def on_our_class(self, monkeypatch):
        monkeypatch.setattr(adamax_test, "Adamax", Adamax)


def split(name):
    """Return the name of a test, and the number of its parameters or nothing."""
    test = name.rstrip("0123456789")
    return test, name[len(test) :]


class TestOptimizer(optimizer_test.OptimizerTest):
    @pytest.fixture(autouse=True)
    def on_our_class(self, monkeypatch):
        monkeypatch.setattr(optimizer_test, "optimizers", OURS)


ALL = {name for name in dir(optimizer_test.OptimizerTest) if name.startswith("test")}
for name in ALL:
    test, number = split(name)
    if test not in BASE or number not in ("", "6"):  # the seventh of their optimizers is Adamax
        setattr(TestOptimizer, name, None)


def test_every_test_of_keras_is_named_here():
    assert {split(name)[0] for name in ALL} == BASE | SGDS | OTHERS | TENSORFLOWS
