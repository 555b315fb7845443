"""What Keras takes in a step, ours takes too: subsets, missing gradients, constraints, marks."""

import re
import warnings

import numpy as np
import pytest
from support.keras_pairs import (
    RULE,
    Adamax,
    Pair,
    Theirs,
    assert_same,
    everything,
    keras,
    make_grads,
    make_tensor,
    make_variables,
    only_jax,
    only_torch,
    train,
)

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# ---- Gradients that are missing, and variables that are not passed -------------------------------


def messages_of(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in caught if "__array__" not in str(w.message)]


def test_a_missing_gradient_warns_in_keras_words_and_skips():
    pair = Pair(**RULE)
    said = []
    for optimizer, variables in pair.each():
        grads = make_grads(0)
        grads[1] = None
        said.append(messages_of(lambda o=optimizer, g=grads, v=variables: o.apply(g, v)))
        said.append(messages_of(lambda o=optimizer, g=grads: o.apply(g)))
    assert said[0] == said[1] == said[2] == said[3]
    assert "['bias']" in said[0][0]
    pair.train(range(1, 3))
    pair.assert_near()


def test_without_any_gradient_nothing_changes():
    pair = Pair(**RULE)
    pair.train(range(2))
    before = everything(pair.ours, pair.variables)
    for optimizer, variables in pair.each():
        with pytest.raises(ValueError, match=r"^No gradients provided for any variable\.$"):
            optimizer.apply([None] * 4, variables)
        optimizer.apply([], [])
    assert_same(everything(pair.ours, pair.variables), before)


def test_some_of_the_variables_in_another_order():
    pair = Pair(**RULE, global_clipnorm=1.0, use_ema=True)
    pair.train(range(2))
    for optimizer, variables in pair.each():
        grads = make_grads(2)
        optimizer.apply([grads[3], grads[0]], [variables[3], variables[0]])
        optimizer.apply_gradients(zip(make_grads(3)[1:2], variables[1:2], strict=True))
    pair.train(range(4, 6))
    pair.assert_near()


def test_apply_gradients_returns_the_iterations():
    variables = make_variables()
    optimizer = Adamax()
    returned = optimizer.apply_gradients(zip(make_grads(0), variables, strict=True))
    assert returned is optimizer._iterations
    assert int(returned) == 1


def test_what_does_not_fit_is_refused_in_keras_words():
    pair = Pair(**RULE)
    other = keras.Variable(np.ones(3, "float32"))
    for call, kind in (
        (lambda o, v: o.apply(make_grads(0)[:1], [other]), ValueError),
        (lambda o, v: o.apply(make_grads(0)[:2]), ValueError),
        (lambda o, v: type(o)().apply(make_grads(0)), ValueError),
    ):
        said = []
        for optimizer, variables in pair.each():
            with pytest.raises(kind) as caught:
                call(optimizer, variables)
            said.append(str(caught.value))
        assert said[0] == said[1]


def bad_shape(grads, variables):
    return [*grads[:3], make_tensor(np.ones((4, 5, 3)))], variables


def too_few(grads, variables):
    return grads[:3], variables


def too_many(grads, variables):
    return [*grads, grads[0]], variables


def twice(grads, variables):
    return [grads[0], grads[0]], [variables[0], variables[0]]


@pytest.mark.parametrize("spoil", [bad_shape, too_few, too_many, twice])
@pytest.mark.parametrize("steps", [None, 3])
def test_a_step_is_all_or_nothing(spoil, steps):
    variables = make_variables()
    variables[1].constraint = keras.constraints.UnitNorm()
    optimizer = Adamax(**RULE, use_ema=True, gradient_accumulation_steps=steps)
    train(optimizer, variables, range(2))
    before = everything(optimizer, variables)
    with pytest.raises(ValueError, match=r"grads|variables"):
        optimizer.apply(*spoil(make_grads(2), variables))
    assert_same(everything(optimizer, variables), before)
    optimizer.apply(make_grads(2), variables)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("learning_rate", float("nan"), marks=only_torch),
        ("beta_1", 1.5),
        ("epsilon", -1.0),
        ("weight_decay", -0.1),
        ("loss_scale_factor", 0.0),
    ],
)
def test_a_setting_out_of_range_is_named(name, value):
    variables = make_variables()
    optimizer = Adamax()
    optimizer.build(variables)
    setattr(optimizer, name, value)
    before = everything(optimizer, variables)
    with pytest.raises(ValueError, match=name):
        train(optimizer, variables, range(1))
    for now, old in zip(everything(optimizer, variables), before, strict=True):
        np.testing.assert_array_equal(now, old)


@only_jax
def test_a_rate_that_is_not_finite_makes_all_weights_nan():
    """As Keras': an error in a compiled step would come when the variables are gone."""
    variables = make_variables()
    train(Adamax(float("nan")), variables, range(1))
    assert all(np.isnan(variable.numpy()).all() for variable in variables)


# ---- Constraints, decay, variables that gradients overwrite --------------------------------------


@pytest.mark.parametrize("steps", [None, 3])
def test_constraints_are_applied_after_the_update(steps):
    pair = Pair(**RULE, gradient_accumulation_steps=steps)
    for _, variables in pair.each():
        variables[0].constraint = keras.constraints.MaxNorm(0.5)
        variables[3].constraint = keras.constraints.NonNeg()
    pair.train(range(6))
    pair.assert_near()
    assert pair.variables[3].numpy().min() == 0.0


def test_averages_see_the_weights_before_the_constraint():
    pair = Pair(**RULE, use_ema=True, ema_momentum=0.5)
    for _, variables in pair.each():
        variables[0].constraint = keras.constraints.MaxNorm(0.5)
    pair.train(range(3))
    pair.assert_near()


def test_exclusion_from_decay_before_and_after_building():
    pair = Pair(**{**RULE, "weight_decay": 2.0})
    pair.train(range(2))
    for optimizer, variables in pair.each():
        optimizer.exclude_from_weight_decay(var_list=[variables[2]], var_names=["^bias$", "deep"])
    pair.train(range(2, 4))
    for optimizer, _ in pair.each():
        optimizer.exclude_from_weight_decay()
    pair.train(range(4, 6))
    pair.assert_near()


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("use_ema", [False, True])
def test_gradients_overwrite_variables_that_ask_for_it(steps, use_ema):
    settings = {**RULE, "gradient_accumulation_steps": steps, "use_ema": use_ema and not steps}
    results = []
    for kind in (Adamax, Theirs):
        variables = make_variables()
        variables[0].overwrite_with_gradient = variables[2].overwrite_with_gradient = True
        variables[0].constraint = keras.constraints.NonNeg()  # which Keras leaves out there
        optimizer = kind(**settings)
        train(optimizer, variables, range(5))
        optimizer.apply(make_grads(5)[:1], variables[:1])  # nothing else
        assert optimizer._m[0] is None
        results.append((optimizer, variables))
    (ours, variables), (theirs, their_variables) = results
    for mine, other in zip(
        [*variables, *ours.variables], [*their_variables, *theirs.variables], strict=True
    ):
        np.testing.assert_allclose(mine.numpy(), other.numpy(), rtol=2e-5, atol=1e-6)
    assert int(ours._iterations) == 6


def test_a_mark_that_is_set_after_building():
    pair = Pair(**RULE)
    pair.train(range(2))
    for _, variables in pair.each():
        variables[1].overwrite_with_gradient = True
    pair.train(range(2, 4))
    for _, variables in pair.each():
        variables[1].overwrite_with_gradient = False
    pair.train(range(4, 6))
    pair.assert_near()


def test_errors_name_gradients_by_position():
    optimizer = Adamax()
    with pytest.raises(ValueError, match=re.escape("grads[3]")):
        optimizer.apply(*bad_shape(make_grads(0), make_variables()))
