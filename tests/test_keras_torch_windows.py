"""On torch windows of accumulation are native: what our Adamax does there unlike Keras' own."""

import numpy as np
import pytest
from support.keras_pairs import (
    EMA,
    RULE,
    Adamax,
    Pair,
    assert_same,
    everything,
    make_grads,
    make_variables,
    train,
)
from support.keras_torch import torch

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_numbers_on_a_gpu_are_read_again_only_after_they_were_written(monkeypatch):
    """With tensors that say they are not on the CPU."""
    from adamax_ext.keras.torch_tensors import Number

    class Remote(torch.Tensor):
        is_cpu = False
        reads = 0

        def item(self):
            Remote.reads += 1
            return super().item()

    tensor, number = torch.tensor(5).as_subclass(Remote), Number()
    assert [number.of(tensor) for _ in range(3)] == [5, 5, 5]
    assert Remote.reads == 1
    number.write(tensor, 6)
    assert number.of(tensor) == 6
    assert Remote.reads == 1
    with torch.no_grad():
        tensor.copy_(torch.tensor(9))
    assert number.of(tensor) == 9
    tensor.data = torch.tensor(11)
    assert number.of(tensor) == 11
    assert number.of(torch.tensor(3).as_subclass(Remote)) == 3


def test_averages_count_updates_where_keras_counts_micro_batches():
    """So Keras gets one batch that is as large as three of ours."""
    settings = {**RULE, **EMA, "ema_overwrite_frequency": 2}
    pair = Pair(**settings)
    pair.ours = Adamax(**settings, gradient_accumulation_steps=3)
    pair.ours.build(pair.variables)
    for update in range(5):
        batches = [make_grads(3 * update + i) for i in range(3)]
        for grads in batches:
            pair.ours.apply(grads, pair.variables)
        means = [sum(grads) / 3 for grads in zip(*batches, strict=True)]
        pair.theirs.apply(means, pair.their_variables)
    for optimizer, variables in pair.each():
        optimizer.finalize_variable_values(variables)
    for ours, theirs in zip(pair.variables, pair.their_variables, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_gradient_missing_in_some_micro_batches_counts_as_zero():
    settings = {**RULE, "gradient_accumulation_steps": 3}
    some, zero = make_variables(), make_variables()
    ours, expected = Adamax(**settings), Adamax(**settings)
    for call in range(6):
        grads = make_grads(call)
        is_missing = call % 3 != 1
        expected.apply([grads[0] * (not is_missing), *grads[1:]], zero)
        ours.apply([None if is_missing else grads[0], *grads[1:]], some)
    assert_same(everything(ours, some), everything(expected, zero))


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_window_goes_on_in_memory_that_is_copied():
    """Where accumulators are no dense memory, others stand for them."""
    settings = {**RULE, "gradient_accumulation_steps": 3}
    plain, gaps = make_variables(), make_variables()
    expected, optimizer = Adamax(**settings), Adamax(**settings)
    for o, v in ((expected, plain), (optimizer, gaps)):
        train(o, v, range(3))
        o.apply([None, *make_grads(3)[1:]], v)
        if o is optimizer:
            for kept in o._accumulated_gradients:
                kept._value = torch.stack([kept._value, kept._value], -1)[..., 0]
        train(o, v, [4])
        o.apply([None, None, *make_grads(5)[2:]], v)
        train(o, v, range(6, 9))
    assert_same(everything(optimizer, gaps), everything(expected, plain))
