"""Gradients in any memory and dtype: our Adamax for Keras takes what Keras takes, and exactly."""

import numpy as np
import pytest
from support.keras_pairs import (
    RULE,
    Adamax,
    Theirs,
    as_numpy,
    assert_same,
    everything,
    keras,
    make_grads,
    make_variables,
    no_grad,
    train,
    with_64_bits,
)

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def as_variable(grad):
    return keras.Variable(as_numpy(grad))


@pytest.mark.parametrize(
    "change",
    [as_numpy, as_variable],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_in_other_memory_have_the_same_bits(change, dtype):
    plain, changed = make_variables(dtype), make_variables(dtype)
    ours, other = Adamax(**RULE, global_clipnorm=1.0), Adamax(**RULE, global_clipnorm=1.0)
    for call in range(3):
        ours.apply(make_grads(call), plain)
        other.apply([change(grad) for grad in make_grads(call)], changed)
    assert_same(everything(other, changed), everything(ours, plain))


def test_a_gradient_that_is_a_variable_of_the_optimizer():
    """Counts as it was before the step."""
    plain, shared = make_variables(), make_variables()
    ours, other = Adamax(**RULE), Adamax(**RULE)
    train(ours, plain, range(1))
    train(other, shared, range(1))
    grads = make_grads(1)
    ours.apply([as_numpy(v) for v in (plain[0], ours._m[1], grads[2], plain[3])], plain)
    with no_grad():
        other.apply([shared[0]._value, other._m[1]._value, grads[2], shared[3]._value[:]], shared)
    assert_same(everything(other, shared), everything(ours, plain))


@pytest.mark.parametrize(
    ("dtype", "of_grads"),
    [
        ("float32", "float64"),
        ("float64", "float32"),
        ("bfloat16", "float32"),
        ("bfloat16", "float64"),
        ("float16", "float32"),
        ("float16", "bfloat16"),
        ("bfloat16", "float16"),
        ("float32", "int64"),
    ],
)
def test_gradients_of_other_dtypes_are_cast(dtype, of_grads):
    """To the dtype of the variable as Keras does; a float32 one of a 16-bit variable is not."""
    with with_64_bits(dtype, of_grads):
        check_cast(dtype, of_grads)


def check_cast(dtype, of_grads):
    variables, cast = make_variables(dtype), make_variables(dtype)
    ours, expected = Adamax(**RULE), Adamax(**RULE)
    is_wider = of_grads == "float32" and dtype != "float64"
    for call in range(3):
        grads = [10 * g for g in make_grads(call, of_grads)]
        ours.apply(grads, variables)
        taken = grads if is_wider else [keras.ops.cast(g, dtype) for g in grads]
        expected.apply(taken, cast)
    assert_same(everything(ours, variables), everything(expected, cast))
    assert abs(as_numpy(ours._m[0])).max() > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_state_of_16_bit_variables_is_float32(dtype):
    settings = {**RULE, "use_ema": True, "gradient_accumulation_steps": 2}
    variables = make_variables(dtype)
    optimizer = Adamax(**settings)
    train(optimizer, variables, range(3), dtype)
    assert [v.dtype for v in optimizer.variables[2:]] == ["float32"] * 16
    arrays = everything(optimizer, [])[2:]
    assert [array.dtype for array in arrays] == [np.float32] * 16
    assert (as_numpy(optimizer._m[0]).view(np.uint32) & 0xFFF).any()
    theirs = Theirs(**settings)
    theirs.build(variables)
    assert [v.path for v in theirs.variables[2:]] == [
        v.path.replace(optimizer.name, theirs.name) for v in optimizer.variables[2:]
    ]
    doubles = Adamax(**settings)
    with with_64_bits("float64"):
        doubles.build(make_variables("float64"))
    assert {v.dtype for v in doubles.variables[2:]} == {"float64"}
