"""Settings and variables of our Adamax for Keras with state in fewer bits, and what it refuses."""

import numpy as np
import pytest
from support.keras_low_memory import (
    Twins,
    as_stored,
    as_tensor,
    everything,
    make_gradients,
    require_equal,
)
from support.keras_pairs import Adamax, Theirs, keras

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_variables_are_named_after_those_of_keras():
    optimizer = Adamax(state_bits=8, weight_rounding="remainder", name="low")
    shapes = {"kernel": ((64, 65), "bfloat16"), "bias": ((65,), "bfloat16")}
    optimizer.build([keras.Variable(np.zeros(s), dtype=d, name=n) for n, (s, d) in shapes.items()])
    assert [(v.path, v.dtype, tuple(v.shape)) for v in optimizer.variables[2:]] == [
        ("low/kernel_momentum", "int8", (64, 65)),
        ("low/kernel_norm", "uint8", (64, 65)),
        ("low/bias_momentum", "float32", (65,)),
        ("low/bias_norm", "float32", (65,)),
        ("low/kernel_norm_scale", "float32", (17,)),
        ("low/kernel_remainder", "int16", (64, 65)),
        ("low/bias_remainder", "int16", (65,)),
    ]
    assert not any(v.trainable or as_stored(v).any() for v in optimizer.variables[2:])
    halves = Adamax(state_bits=16)
    halves.build([keras.Variable(np.zeros(3, "f"))])
    assert [v.dtype for v in halves.variables[2:]] == ["bfloat16", "bfloat16", "float32"]
    assert as_stored(halves.variables[-1]).tolist() == [1.0]


def test_defaults_add_nothing():
    ours, theirs = Adamax(name="adamax"), Theirs(name="adamax")
    for optimizer in (ours, theirs):
        optimizer.build([keras.Variable(np.zeros((64, 65), "f"), name="kernel")])
    described = [[(v.path, v.dtype, v.shape) for v in o.variables] for o in (ours, theirs)]
    assert described[0] == described[1]
    assert ours.get_config() == theirs.get_config()
    assert (ours.state_bits, ours.weight_rounding, ours.seed) == (32, "nearest", 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"state_bits": 8},
        {"weight_rounding": "stochastic", "seed": 2**64 - 1},
        {"state_bits": 16, "weight_rounding": "remainder"},
        {"seed": 3},
    ],
    ids=str,
)
def test_a_config_has_what_is_not_the_default(settings):
    optimizer = Adamax(0.02, **settings, name="adamax")
    config = optimizer.get_config()
    assert config == {**Theirs(0.02, name="adamax").get_config(), **settings}
    again = Adamax.from_config(dict(config))
    assert again.get_config() == config
    serialized = keras.optimizers.serialize(optimizer)
    assert keras.optimizers.deserialize(serialized).get_config() == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state_bits": 4}, "state_bits must be 32, 16 or 8; received 4"),
        ({"state_bits": "8"}, "state_bits must be 32, 16 or 8; received '8'"),
        ({"weight_rounding": "up"}, "weight_rounding must be 'nearest', 'stochastic' or 'remai"),
        ({"seed": -1}, "seed must be an integer >= 0; received -1"),
        ({"seed": 0.5}, r"seed must be an integer >= 0; received 0\.5"),
    ],
    ids=str,
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match="^" + message):
        Adamax(**settings)


@pytest.mark.parametrize("name", ["state_bits", "weight_rounding", "seed"])
def test_settings_are_fixed(name):
    optimizer = Adamax()
    with pytest.raises(AttributeError, match=name):
        setattr(optimizer, name, 8)


@pytest.mark.parametrize(
    ("dtype", "settings", "message"),
    [
        ("float64", {"state_bits": 8}, "has dtype float64, whose state is float64; expected"),
        ("float64", {"state_bits": 16}, "has dtype float64, whose state is float64; expected"),
        (
            "float16",
            {"weight_rounding": "stochastic"},
            "has dtype float16, which weight_rounding 'stochastic' does not know; expected bfloat",
        ),
    ],
)
def test_variables_that_are_refused(dtype, settings, message):
    optimizer = Adamax(**settings)
    variables = [
        keras.Variable(np.ones(3), dtype=d, name=n) for d, n in (("float32", "a"), (dtype, "b"))
    ]
    with pytest.raises(TypeError, match=rf"^variables\[1\] \(variable 'b'\) {message}"):
        optimizer.build(variables)
    assert not optimizer.built
    assert len(optimizer.variables) == 2
    optimizer.build(variables[:1])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("beta_1", 0.96, "beta_1 must be below beta_2 with state in 8 bits"),
        # What stands for the first moments is relative to it.
        ("epsilon", 1.0, r"epsilon cannot be assigned after build.*received 1\.0"),
    ],
)
def test_assigned_settings_that_8_bits_cannot_have(name, value, message):
    twins = Twins(8, "nearest")
    twins.train(range(1))
    before = everything(twins.ours, twins.variables)
    setattr(twins.ours, name, value)
    with pytest.raises(ValueError, match="^" + message):
        twins.ours.apply([as_tensor(g) for g in make_gradients(twins.arrays, 1)])
    require_equal(everything(twins.ours, twins.variables), before)
