"""On torch a step of our Adamax for Keras is one native call in place, also under Dynamo."""

import functools

import numpy as np
import pytest
from support.keras_models import assert_models_near, fit, make_model
from support.keras_pairs import (
    RULE,
    Adamax,
    Theirs,
    assert_same,
    everything,
    keras,
    make_grads,
    make_tensor,
    make_variables,
    train,
)
from support.keras_torch import torch

from adamax_ext.keras.torch_step import Step  # isort: skip - needs keras

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_a_step_is_one_native_call_in_place():
    variables = make_variables()
    optimizer = Adamax(**RULE, use_ema=True, global_clipnorm=1.0, gradient_accumulation_steps=2)
    optimizer.build(variables)
    tensors = [v._value for v in [*variables, *optimizer.variables]]
    version = variables[0]._value._version
    train(optimizer, variables, range(4))
    kept = [v._value for v in [*variables, *optimizer.variables]]
    assert all(a is b for a, b in zip(kept, tensors, strict=True))
    assert optimizer._step._plan.calls == 4
    assert variables[0]._value._version == version + 2  # autograd sees the two updates


def test_a_failed_step_takes_back_what_gradients_overwrote():
    variables = make_variables()
    variables[2].overwrite_with_gradient = True
    optimizer = Adamax(**RULE, gradient_accumulation_steps=2)
    train(optimizer, variables, range(3))
    before = everything(optimizer, variables)
    with pytest.raises(ValueError, match="grads"):
        optimizer.apply([*make_grads(3)[:3], make_tensor(np.ones((4, 5, 3)))], variables)
    assert_same(everything(optimizer, variables), before)


@pytest.mark.filterwarnings("ignore")  # of Dynamo and Inductor
def test_fit_with_jit_compile(monkeypatch):
    """Dynamo sees all of the training step; what it hands over need not be compiled for this."""
    are_traced, run = [], Step.run

    def noted(*arguments):
        are_traced.append(torch.compiler.is_compiling())
        return run(*arguments)

    monkeypatch.setattr(Step, "run", noted)
    expected = fit(make_model(Theirs(**RULE, clipnorm=0.3), jit_compile=False))
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = fit(make_model(Adamax(**RULE, clipnorm=0.3), jit_compile=True))
    assert are_traced == [False] * 8
    assert int(model.optimizer.iterations) == 8
    assert_models_near(model, expected)


def test_a_symbolic_scope_is_left_to_keras():
    variables = make_variables()
    optimizer = Adamax(**RULE)
    optimizer.build(variables)
    with keras.SymbolicScope():
        train(optimizer, variables, range(1))
    assert optimizer._step is None
