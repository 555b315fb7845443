"""Our Adamax for Keras gives the bits of `adamax_ext.Adamax` on NumPy arrays."""

import adamax_ext
import numpy as np
import pytest
from support.keras_torch import SHAPES, Adamax, make_grads, make_variables, torch

ml_dtypes = pytest.importorskip("ml_dtypes", reason="NumPy has no bfloat16 without ml_dtypes")

BASE = {"learning_rate": 2.0**-6}  # as Keras keeps it, in float32
EMA = {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 3}
RULE = {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 0.02, "weight_decay": 0.125}
CASES = [
    (BASE, "float32", "float32"),
    ({**BASE, **RULE}, "float32", "bfloat16"),
    (
        {**BASE, **RULE, **EMA, "global_clipnorm": 2.0, "loss_scale_factor": 3.0},
        "float32",
        "float32",
    ),
    ({**BASE, **EMA, "gradient_accumulation_steps": 4, "clipnorm": 1.0}, "float32", "float32"),
    ({**BASE, **RULE, "clipvalue": 0.5}, "float64", "float64"),
    ({**BASE, **RULE, **EMA}, "bfloat16", "bfloat16"),
    ({**BASE, **RULE, "gradient_accumulation_steps": 3}, "bfloat16", "float32"),
    ({**BASE, **EMA, "global_clipnorm": 2.0}, "float16", "float32"),
]


def as_numpy(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.numpy().copy()


@pytest.mark.parametrize(("settings", "dtype", "of_grads"), CASES, ids=str)
def test_twenty_steps_have_the_same_bits(settings, dtype, of_grads):
    variables = make_variables(dtype)
    arrays = [as_numpy(v._value) for v in variables]
    ours, numpys = Adamax(**settings), adamax_ext.Adamax(**settings)
    ours.exclude_from_weight_decay(variables[1:2])
    numpys.exclude_from_weight_decay(arrays[1:2])
    for call in range(20):
        grads = make_grads(call, of_grads)
        ours.apply(grads, variables)
        numpys.apply([as_numpy(grad) for grad in grads], arrays)
    expected = [*arrays, *numpys.variables[2:]]
    kept = [*variables, *ours.variables[2:]]
    assert len(kept) >= 3 * len(SHAPES)
    for array, variable in zip(expected, kept, strict=True):
        bits = as_numpy(variable._value)
        assert bits.dtype == array.dtype
        assert bits.tobytes() == array.tobytes(), variable.path
        assert np.isfinite(array.astype("float64")).all()
    assert int(ours.iterations) == numpys.iterations
