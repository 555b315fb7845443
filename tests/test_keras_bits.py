"""Our Adamax for Keras gives the bits of `adamax_ext.Adamax` on NumPy arrays."""

import adamax_ext
import numpy as np
import pytest
from support.keras_pairs import (
    BACKEND,
    EMA,
    SHAPES,
    Adamax,
    as_numpy,
    assert_same,
    make_grads,
    make_variables,
    only_jax,
    with_64_bits,
)

ml_dtypes = pytest.importorskip("ml_dtypes", reason="NumPy has no bfloat16 without ml_dtypes")

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BASE = {"learning_rate": 2.0**-6}  # as Keras keeps it, in float32
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


# On JAX norms and accumulation are XLA's: those bits are not ours.
XLAS = {"clipnorm", "global_clipnorm", "gradient_accumulation_steps"}
if BACKEND == "jax":
    CASES = [(case[0] | dict.fromkeys(case[0].keys() & XLAS), *case[1:]) for case in CASES]


@pytest.mark.parametrize("way", ["apply", pytest.param("compiled", marks=only_jax)])
@pytest.mark.parametrize(("settings", "dtype", "of_grads"), CASES, ids=str)
def test_twenty_steps_have_the_same_bits(settings, dtype, of_grads, way):
    with with_64_bits(dtype):
        check_twenty_steps(settings, dtype, of_grads, way)


def check_twenty_steps(settings, dtype, of_grads, way):
    variables = make_variables(dtype)
    arrays = [as_numpy(v) for v in variables]
    ours, numpys = Adamax(**settings), adamax_ext.Adamax(**settings)
    ours.exclude_from_weight_decay(variables[1:2])
    numpys.exclude_from_weight_decay(arrays[1:2])
    if way == "compiled":
        from support.keras_jax import Compiled

        apply = Compiled(ours, variables).apply
    else:
        ours.build(variables)
        apply = ours.apply
    for call in range(20):
        grads = make_grads(call, of_grads)
        numpys.apply([as_numpy(grad) for grad in grads], arrays)
        apply(grads)
    expected = [*arrays, *numpys.variables[2:]]
    kept = [*variables, *ours.variables[2:]]
    assert len(kept) >= 3 * len(SHAPES)
    assert_same(kept, expected)
    assert all(np.isfinite(array.astype("float64")).all() for array in expected)
    assert int(ours.iterations) == numpys.iterations
