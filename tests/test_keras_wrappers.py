"""Our Adamax inside of what Keras wraps around optimizers, and in its other ways to train."""

import numpy as np
import pytest
from support.keras_models import assert_models_near, fit, make_model
from support.keras_pairs import (
    BACKEND,
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
    only_torch,
    train,
    with_64_bits,
)

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


KINDS = (Adamax, Theirs)


@pytest.fixture(autouse=True)
def float32_afterwards():
    yield
    keras.config.set_dtype_policy("float32")


# ---- Wrappers and callbacks ----------------------------------------------------------------------


def apply(optimizer, variables, grads):
    """Step where Keras' LossScaleOptimizer can: on JAX its conditions cannot assign."""
    if BACKEND == "jax":
        from support.keras_jax import Compiled

        Compiled(optimizer, variables).apply(grads)
    else:
        optimizer.apply(grads, variables)


def test_loss_scaling_skips_what_is_not_finite():
    wrapped, variables = [], []
    for kind in KINDS:
        mine = make_variables()
        optimizer = keras.optimizers.LossScaleOptimizer(kind(**RULE), 2.0**4, 3)
        for call in range(8):
            grads = [16 * grad for grad in make_grads(call)]
            if call in (2, 5):
                grads[0] = make_tensor(np.full((7, 13), np.inf))
            apply(optimizer, mine, grads)
        wrapped.append(optimizer)
        variables.append(mine)
    assert int(wrapped[0].iterations) == 6
    assert_near(wrapped[0], variables[0], wrapped[1], variables[1])


def test_a_float16_model_gets_loss_scaling_around_ours():
    keras.config.set_dtype_policy("mixed_float16")
    models = [fit(make_model(kind(**RULE))) for kind in KINDS]
    for model, kind in zip(models, KINDS, strict=True):
        assert type(model.optimizer) is keras.optimizers.LossScaleOptimizer
        assert isinstance(model.optimizer.inner_optimizer, kind)
    assert_models_near(*models, tolerance=1e-3)


def test_several_optimizers_in_one():
    results = []
    for kind in KINDS:
        groups = keras.optimizers.OptimizerMap(kind(0.001), {".*a/.*": kind(**RULE)})
        model = fit(make_model(keras.optimizers.MultiOptimizer(groups, loss_scale_factor=8.0)))
        results.append(model)
        assert [int(o.iterations) for o in model.optimizer.optimizers] == [8, 8]
    assert results[0].optimizer.optimizers[0].loss_scale_factor == 8.0
    assert_models_near(*results)


def test_weights_swapped_with_averages():
    """For each validation, and back: in place, where the next step expects them."""
    results = []
    for kind in KINDS:
        model = make_model(kind(**RULE, use_ema=True, ema_momentum=0.7))
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        validation = np.ones((4, 5), "f"), np.ones((4, 3), "f")
        results.append(fit(model, callbacks=[swap], validation_data=validation))
    assert_models_near(*results)


def test_averages_are_written_at_the_end_of_fit():
    model = fit(make_model(Adamax(**RULE, use_ema=True, ema_momentum=0.7)))
    averages = model.optimizer._model_variables_moving_average
    assert_same([v._value for v in model.trainable_variables], [v._value for v in averages])


# ---- Layers frozen and thawed, clones, more than one model ---------------------------------------


@only_torch  # on JAX Keras wants another compile() then
def test_layers_frozen_after_the_optimizer_was_built():
    results = []
    for kind in KINDS:
        model = fit(make_model(kind(**RULE)))
        model.get_layer("a").trainable = False
        kept = as_numpy(model.get_layer("a").kernel)
        fit(model)
        assert_same([model.get_layer("a").kernel], [kept])
        model.get_layer("a").trainable = True
        results.append(fit(model))
    assert_models_near(*results)


# ---- Stateless calls, dtype policies, loops of one's own -----------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clipnorm": 0.5},
        {"use_ema": True},
        {"gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_stateless_calls_change_nothing_and_return_what_a_step_gives(settings):
    settings = {**RULE, "weight_decay": None, **settings}
    variables = make_variables()
    optimizer = Adamax(**settings)
    train(optimizer, variables, range(3))
    before = everything(optimizer, variables)
    values, state = optimizer.stateless_apply(
        [v._value for v in optimizer.variables], make_grads(3), [v._value for v in variables]
    )
    assert_same(everything(optimizer, variables), before)
    train(optimizer, variables, [3])
    for given, variable in zip([*values, *state], [*variables, *optimizer.variables], strict=True):
        a, b = as_numpy(given), as_numpy(variable)
        assert np.abs(a - b).max() <= 2e-6 * np.abs(b).max(), variable.path


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16", "float64"])
def test_dtype_policies(policy):
    """As near to Keras, whose state has the dtype of the weights, as that allows."""
    with with_64_bits(policy):
        check_policy(policy)


def check_policy(policy):
    keras.config.set_dtype_policy(policy)
    model, theirs = (fit(make_model(kind(**RULE))) for kind in KINDS)
    inner = model.optimizer
    dtype = model.trainable_variables[0].dtype
    assert dtype == {"mixed_bfloat16": "float32"}.get(policy, policy)
    assert {v.dtype for v in inner._m + inner._u} == {
        "float64" if policy == "float64" else "float32"
    }
    tolerance = {"float64": 1e-6, "mixed_bfloat16": 1e-3}.get(policy, 0.1)
    assert_models_near(model, theirs, tolerance)


def test_in_an_autocast_scope_the_variables_themselves_are_stepped():
    from keras.src.backend.common.variables import AutocastScope

    pair = Pair(**RULE)
    pair.train(range(1))
    train(pair.theirs, pair.their_variables, [1])
    with AutocastScope("bfloat16"):
        assert pair.variables[0].value.dtype == make_tensor(0, "bfloat16").dtype
        train(pair.ours, pair.variables, [1])
    pair.assert_near()


def gradients_of_loss(model, x):
    if BACKEND == "torch":
        import torch

        loss = ((model(x) - 1) ** 2).mean()
        return torch.autograd.grad(loss, [v.value for v in model.trainable_variables])
    import jax

    def loss_of(values):
        y, _ = model.stateless_call(values, [], x)
        return ((y - 1) ** 2).mean()

    return jax.grad(loss_of)([v.value for v in model.trainable_variables])


def test_a_custom_training_loop():
    results = []
    for kind in KINDS:
        model = make_model(kind(**RULE))
        optimizer, rng = model.optimizer, np.random.default_rng(1)
        for _ in range(5):
            grads = gradients_of_loss(model, make_tensor(rng.normal(size=(8, 5))))
            optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        results.append(model)
    assert_models_near(*results)
