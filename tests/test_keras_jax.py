"""Keras on JAX: what its native step gets of Keras' settings, compiled and on two devices."""

import threading

import numpy as np
import pytest
from support import jax_devices
from support.keras_jax import Compiled, jax
from support.keras_models import assert_models_near, fit, make_model
from support.keras_pairs import (
    EMA,
    RULE,
    Adamax,
    Pair,
    Theirs,
    as_numpy,
    assert_near,
    assert_same,
    everything,
    keras,
    make_grads,
    make_tensor,
    make_variables,
    train,
    with_64_bits,
)

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

KINDS = (Adamax, Theirs)


# ---- The ways of `fit` ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compiled",
    [{"jit_compile": True}, {"jit_compile": False}, {"jit_compile": "auto"}, {"run_eagerly": True}],
    ids=str,
)
def test_fit_compiled_or_not(compiled):
    settings = {**RULE, **EMA, "global_clipnorm": 0.3, "loss_scale_factor": 8.0}
    models = [fit(make_model(kind(**settings), **compiled), epochs=1) for kind in KINDS]
    assert_models_near(*models)
    assert int(models[0].optimizer.iterations) == 4


def test_a_step_compiles_to_one_native_call():
    variables = make_variables()
    settings = {**RULE, **EMA, "loss_scale_factor": 8.0, "clipvalue": 0.5}
    compiled = Compiled(Adamax(**settings), variables)
    state = [v.value for v in compiled.optimizer.variables]
    arguments = state, make_grads(0), [v.value for v in variables]
    text = compiled.step.lower(*arguments).compile().as_text()
    assert text.count('custom_call_target="adamax_ext_step"') == 1


# ---- Settings together ---------------------------------------------------------------------------

TOGETHER = [
    {"clipnorm": 0.3, "loss_scale_factor": 8.0},
    {"global_clipnorm": 0.3, "loss_scale_factor": 8.0},
    {"global_clipnorm": 1e6, "loss_scale_factor": 3.0},
    {"clipvalue": 0.05, "loss_scale_factor": 8.0},
    {**EMA, "ema_overwrite_frequency": 2, "loss_scale_factor": 8.0, "clipnorm": 0.3},
    {**EMA, "gradient_accumulation_steps": 2, "loss_scale_factor": 8.0},
    {"gradient_accumulation_steps": 3, "clipvalue": 0.05, "loss_scale_factor": 8.0},
]


@pytest.mark.parametrize("settings", TOGETHER, ids=str)
def test_settings_together(settings):
    """With some weights that do not decay, and scaled gradients."""
    pair = Pair(**{**RULE, "weight_decay": 2.0}, **settings)
    for optimizer, variables in pair.each():
        optimizer.exclude_from_weight_decay(var_list=[variables[0], variables[2]])
        compiled = Compiled(optimizer, variables)
        for call in range(7):
            compiled.apply(make_grads(call))
    pair.assert_near(5e-6)
    assert pair.ours.loss_scale_factor == settings.get("loss_scale_factor")


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("missing", [0, 3])
def test_variables_without_a_gradient_are_averaged_too(missing):
    pair = Pair(**RULE, **EMA)
    pair.train(range(2))
    for optimizer, variables in pair.each():
        for call in range(2, 7):
            grads = make_grads(call)
            grads[missing] = None
            variables[missing].assign(variables[missing] + 1.0)  # somebody else trains it
            optimizer.apply(grads, variables)
    pair.assert_near()


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_variables(dtype, steps):
    """As near to a training in float32 as their rounding allows."""
    settings = {**RULE, "gradient_accumulation_steps": steps}
    variables, wide = make_variables(dtype), make_variables()
    optimizer, expected = Adamax(**settings), Adamax(**settings)
    for call in range(6):
        grads = make_grads(call, dtype)
        optimizer.apply(grads, variables)
        expected.apply([keras.ops.cast(grad, "float32") for grad in grads], wide)
    for ours, theirs in zip(optimizer._m, expected._m, strict=True):
        assert_same([ours], [theirs])
    for ours, theirs in zip(variables, wide, strict=True):
        a, b = as_numpy(ours).astype("f"), as_numpy(theirs)
        assert ours.dtype == dtype
        assert np.abs(a - b).max() < 0.05


def test_averages_under_accumulation_count_calls_as_in_keras():
    pair = Pair(**RULE, **EMA, gradient_accumulation_steps=2)
    pair.train(range(7))
    pair.assert_near()


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_gradient_missing_in_a_window_counts_as_in_keras():
    pair = Pair(**RULE, gradient_accumulation_steps=3)
    for optimizer, variables in pair.each():
        for call in range(6):
            grads = make_grads(call)
            optimizer.apply([None if call % 3 == 1 else grads[0], *grads[1:]], variables)
    pair.assert_near()


# ---- What goes wrong -----------------------------------------------------------------------------


def test_a_loss_scale_is_still_there_after_an_exception():
    variables = make_variables()
    optimizer = Adamax(**RULE, loss_scale_factor=8.0)
    train(optimizer, variables, range(2))
    before = everything(optimizer, variables)
    with pytest.raises(ValueError, match="No gradients"):
        optimizer.apply([None] * 4, variables)
    assert optimizer.loss_scale_factor == 8.0
    assert_same(everything(optimizer, variables), before)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("clip", ["global_clipnorm", "clipnorm"])
def test_a_norm_that_is_not_finite_makes_weights_nan(clip, bad):
    variables = make_variables()
    optimizer = Adamax(**RULE, **{clip: 1.0})
    grads = make_grads(0)
    grads[1] = make_tensor(np.full(13, bad))
    optimizer.apply(grads, variables)
    chosen = variables if clip == "global_clipnorm" else variables[1:2]
    assert all(np.isnan(as_numpy(v)).all() for v in chosen)


def test_a_norm_of_scaled_16_bit_gradients_does_not_overflow():
    """Keras divides them first; the squares of those that are scaled do not fit in float16."""
    settings = {**RULE, "global_clipnorm": 0.5, "loss_scale_factor": 1024.0}
    variables, twins = make_variables("float16"), make_variables("float16")
    ours, theirs = Adamax(**settings), Theirs(**settings)
    for call in range(3):
        grads = [keras.ops.cast(grad * 512.0, "float16") for grad in make_grads(call)]
        ours.apply(grads, variables)
        theirs.apply(grads, twins)
    for variable, twin in zip(variables, twins, strict=True):
        np.testing.assert_allclose(as_numpy(variable), as_numpy(twin), atol=0.02)


def test_a_float64_norm_is_not_rounded_to_float32():
    settings = {**RULE, "global_clipnorm": 0.5, "loss_scale_factor": 3.3}
    with with_64_bits("float64"):
        variables, twins = make_variables("float64"), make_variables("float64")
        ours, theirs = Adamax(**settings), Theirs(**settings)
        for call in range(3):
            for optimizer, own in ((ours, variables), (theirs, twins)):
                optimizer.apply(make_grads(call, "float64"), own)
        for m, other in zip(ours._m, theirs._m, strict=True):
            np.testing.assert_allclose(as_numpy(m), as_numpy(other), rtol=1e-12, atol=1e-14)


def test_another_thread_sees_the_loss_scale_while_a_step_is_traced():
    seen = []

    def rate():  # Keras asks for it within apply
        thread = threading.Thread(target=lambda: seen.append(optimizer.loss_scale_factor))
        thread.start()
        thread.join()
        return 0.1

    optimizer = Adamax(rate, loss_scale_factor=8.0)
    train(optimizer, make_variables(), range(1))
    assert set(seen) == {8.0}


# ---- Two devices ---------------------------------------------------------------------------------


def check_shards():
    assert jax.device_count() == 2
    sharding, spec = jax.sharding.NamedSharding, jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2,), ("x",))
    settings = {**RULE, **EMA, "global_clipnorm": 0.5, "loss_scale_factor": 8.0}
    shapes = [(8, 3), (3, 6), (5,)]
    specs = [spec("x", None), spec(None, "x"), spec()]
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape).astype("f") for shape in shapes]
    cut, whole = ([keras.Variable(v) for v in values] for _ in range(2))
    ours, theirs = Compiled(Adamax(**settings), cut), Compiled(Theirs(**settings), whole)
    kinds = (ours.optimizer._m, ours.optimizer._u, ours.optimizer._model_variables_moving_average)
    where = [sharding(mesh, s) for s in specs]
    for variable in ours.optimizer.variables:
        variable._value = jax.device_put(variable.value, sharding(mesh, spec()))
    for kind in (cut, *kinds):
        for variable, place in zip(kind, where, strict=True):
            variable._value = jax.device_put(variable.value, place)
    for call in range(5):
        rng = np.random.default_rng(call)
        grads = [10 * rng.normal(size=shape).astype("f") for shape in shapes]
        ours.apply([jax.device_put(g, place) for g, place in zip(grads, where, strict=True)])
        theirs.apply(grads)
        for kind in (cut, *kinds):
            for variable, place in zip(kind, where, strict=True):
                assert variable.value.sharding.is_equivalent_to(place, variable.ndim)
    assert_near(ours.optimizer, cut, theirs.optimizer, whole, 5e-6)


def test_a_norm_is_that_of_all_shards_and_averages_are_cut_alike():
    jax_devices.run(check_shards)


# ---- What only torch has -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state_bits": 8}, "state_bits must be 32 on Keras' JAX backend: adamax_ext.* received 8"),
        ({"weight_rounding": "remainder"}, "weight_rounding must be 'nearest' on .*'remainder'"),
        ({"seed": 3}, "seed must be 0 on Keras' JAX backend: .* received 3"),
    ],
    ids=str,
)
def test_state_in_fewer_bits_and_roundings_are_refused(settings, message):
    with pytest.raises(NotImplementedError, match="^" + message):
        Adamax(**settings)


def test_their_defaults_are_taken():
    settings = {"state_bits": 32, "weight_rounding": "nearest", "seed": 0}
    assert Adamax(**settings, name="a").get_config() == Theirs(name="a").get_config()
    with pytest.raises(ValueError, match=r"^state_bits must be 32, 16 or 8; received 4"):
        Adamax(state_bits=4)
