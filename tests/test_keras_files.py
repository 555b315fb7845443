"""Models and optimizers of Keras with our Adamax: files, both ways with Keras' own, and copies."""

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from support.keras_pairs import (
    BACKEND,
    RULE,
    Adamax,
    Theirs,
    as_numpy,
    assert_same,
    everything,
    keras,
)

pytest.importorskip("h5py", reason="Keras' files need h5py")

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CASES = [
    (RULE, "float32", 5),
    ({**RULE, "use_ema": True, "ema_overwrite_frequency": 3}, "float32", 5),
    ({**RULE, "gradient_accumulation_steps": 4}, "float32", 6),  # within a window
    (RULE, "mixed_bfloat16", 5),
    (RULE, "bfloat16", 5),
    ({**RULE, "gradient_accumulation_steps": 4}, "bfloat16", 6),
]
if BACKEND == "jax":  # which compiles each training: the first are part of the others
    CASES = [CASES[1], CASES[3], CASES[5]]


@pytest.fixture(autouse=True)
def float32_afterwards():
    yield
    keras.config.set_dtype_policy("float32")


def make_model(kind, settings, policy="float32"):
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(2)
    layers = [keras.layers.Dense(9, activation="tanh", name="a"), keras.layers.Dense(3, name="b")]
    model = keras.Sequential([keras.Input((5,)), *layers], name="net")
    model.compile(kind(**settings), loss="mse")
    return model


def fit(model, begin, end):
    """Steps of one batch each, so that a training can be cut anywhere."""
    for step in range(begin, end):
        rng = np.random.default_rng(step)
        x, y = rng.normal(size=(8, 5)).astype("f"), rng.normal(size=(8, 3)).astype("f")
        model.train_on_batch(x, y)


def move_whole(model, kind, path):
    """By a file of the whole model, of which the class of the optimizer is a part."""
    name = f"{path}.keras"
    model.save(name)
    if type(model.optimizer) is kind:
        return keras.models.load_model(name)
    # A process that knows of our class takes it by its name.
    loaded = keras.models.load_model(name, compile=False)
    other = kind.from_config(model.optimizer.get_config())
    loaded.compile(other, loss="mse")
    other.build(loaded.trainable_variables)
    other.set_weights([v.numpy() for v in model.optimizer.variables])
    return loaded


def move_weights(model, kind, path):
    """By a file of weights, optimizer included."""
    name = f"{path}.weights.h5"
    model.save_weights(name)
    loaded = make_model(kind, {}, model.dtype_policy.name)
    loaded.compile(kind.from_config(model.optimizer.get_config()), loss="mse")
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(name)
    return loaded


@pytest.mark.parametrize("move", [move_whole, move_weights])
@pytest.mark.parametrize("to", ["ours", "keras"])
@pytest.mark.parametrize(("settings", "policy", "steps"), CASES, ids=str)
def test_training_goes_on_after_a_move(settings, policy, steps, to, move, tmp_path):
    """Ours to ours with the same bits; between the classes as near as the dtype allows."""
    source = make_model(Adamax if to == "keras" else Theirs, settings, policy)
    fit(source, 0, steps)
    moved = move(source, Adamax if to == "ours" else Theirs, tmp_path / "model")
    assert type(moved.optimizer) is not type(source.optimizer)
    assert int(moved.optimizer._iterations) == steps
    rounding = 2**-8 if policy == "bfloat16" else 0.0  # Keras' state has 16 bits there
    for ours, theirs in zip(moved.optimizer.variables, source.optimizer.variables, strict=True):
        ours, theirs = ours.numpy().astype("f"), theirs.numpy().astype("f")
        np.testing.assert_allclose(ours, theirs, rtol=rounding)
    fit(source, steps, steps + 6)
    fit(moved, steps, steps + 6)
    tolerance = 0.1 if policy == "bfloat16" else 5e-5
    for ours, theirs in zip(source.weights, moved.weights, strict=True):
        a, b = ours.numpy().astype("f"), theirs.numpy().astype("f")
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("move", [move_whole, move_weights])
@pytest.mark.parametrize(("settings", "policy", "steps"), CASES, ids=str)
def test_our_files_keep_the_bits(settings, policy, steps, move, tmp_path):
    source = make_model(Adamax, settings, policy)
    fit(source, 0, steps)
    moved = move(source, Adamax, tmp_path / "model")
    if policy == "bfloat16":
        m = as_numpy(moved.optimizer._m[0])
        assert m.dtype == np.float32
        assert (m.view(np.uint32) & 0xFFFF).any()  # not rounded on the way
    fit(source, steps, steps + 6)
    fit(moved, steps, steps + 6)
    assert_same(
        everything(moved.optimizer, moved.trainable_variables),
        everything(source.optimizer, source.trainable_variables),
    )


def test_the_file_names_our_class(tmp_path):
    model = make_model(Adamax, RULE)
    fit(model, 0, 2)
    config = keras.saving.serialize_keras_object(model.optimizer)
    assert config["registered_name"] == "adamax_ext>Adamax"
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is Adamax
    assert again.get_config() == model.optimizer.get_config()
    assert type(keras.optimizers.deserialize(config)) is Adamax
    theirs = Theirs.from_config(model.optimizer.get_config())
    assert theirs.get_config() == model.optimizer.get_config()


WITHOUT_US = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "adamax_ext":
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocked())
import keras
known = {"adamax_ext>Adamax": keras.optimizers.Adamax}
model = keras.models.load_model(sys.argv[1], custom_objects=known)
assert isinstance(model.optimizer, keras.optimizers.Adamax)
print(int(model.optimizer.iterations), float(model.optimizer._m[0].numpy().max()))
"""


def test_a_model_loads_where_adamax_ext_is_not_installed(tmp_path):
    model = make_model(Adamax, RULE)
    fit(model, 0, 3)
    model.save(tmp_path / "model.keras")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, str(tmp_path / "model.keras")],
        env={**os.environ, "KERAS_BACKEND": BACKEND},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", str(float(model.optimizer._m[0].numpy().max()))]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_model_train_on_with_the_same_bits(copied):
    model = make_model(Adamax, {**RULE, "gradient_accumulation_steps": 4})
    fit(model, 0, 6)
    other = copied(model)
    assert type(other.optimizer) is Adamax
    fit(model, 6, 12)
    before = everything(model.optimizer, model.trainable_variables)
    fit(other, 6, 12)
    assert_same(everything(other.optimizer, other.trainable_variables), before)
    assert_same(everything(model.optimizer, model.trainable_variables), before)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
@pytest.mark.filterwarnings("ignore:Skipping variable loading")  # as for Keras' own
def test_copies_of_an_optimizer_have_its_settings(copied):
    optimizer = Adamax(**RULE, clipnorm=1.0)
    assert copied(optimizer).get_config() == optimizer.get_config()
    fit(make_model(lambda: optimizer, {}), 0, 1)
    other = copied(optimizer)
    assert type(other) is Adamax
    assert getattr(other, "_step", None) is None or BACKEND == "jax"
    assert other.get_config() == optimizer.get_config()
