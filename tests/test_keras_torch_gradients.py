"""Gradients in any memory of torch: our Adamax for Keras takes what Keras takes, and exactly."""

import pytest
from support.keras_pairs import (
    RULE,
    Adamax,
    assert_same,
    everything,
    keras,
    make_grads,
    make_variables,
)
from support.keras_torch import torch

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def transposed(grad):
    return grad.mT.contiguous().mT if grad.ndim > 1 else grad


def with_gaps(grad):
    return torch.stack([grad, grad], -1)[..., 0]


def negated(grad):
    return torch._neg_view(-grad)


def sparse(grad):
    return grad.to_sparse() if grad.ndim else grad


def that_requires_grad(grad):
    return grad.clone().requires_grad_()


def as_variable(grad):
    return keras.Variable(grad.numpy())


@pytest.mark.parametrize(
    "change",
    [transposed, with_gaps, negated, sparse, that_requires_grad],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_in_other_memory_have_the_same_bits(change, dtype):
    plain, changed = make_variables(dtype), make_variables(dtype)
    ours, other = Adamax(**RULE, global_clipnorm=1.0), Adamax(**RULE, global_clipnorm=1.0)
    for call in range(3):
        ours.apply(make_grads(call), plain)
        other.apply([change(grad) for grad in make_grads(call)], changed)
    assert_same(everything(other, changed), everything(ours, plain))


@pytest.mark.parametrize("change", [transposed, that_requires_grad, as_variable])
def test_nothing_is_recorded_for_autograd(change):
    """Outside of no_grad(), as in a training loop of one's own."""
    variables = make_variables()
    variables[0]._value = torch.nn.Parameter(with_gaps(variables[0]._value.detach()))
    variables[1].constraint = keras.constraints.NonNeg()
    variables[2].overwrite_with_gradient = True
    optimizer = Adamax(**RULE, use_ema=True)
    assert torch.is_grad_enabled()
    for call in range(2):
        optimizer.apply([change(grad) for grad in make_grads(call)], variables)
    with pytest.raises(ValueError, match="grads"):
        optimizer.apply([*make_grads(2)[:3], torch.ones(4, 5, 3)], variables)
    for variable in [*variables, *optimizer.variables]:
        assert variable._value.grad_fn is None
        assert variable._value.is_leaf
    assert [v._value.requires_grad for v in variables] == [True] * 4
