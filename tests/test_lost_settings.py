"""Settings that float32 loses are refused by name, before anything is written; float64 has them."""

import adamax_ext
import pytest
from adamax_ext import Adamax
from support.bits import every_dtype
from support.memory import buffers, contents, values

# Of `update`: rounded to zero, or to infinity.
LOST = [
    ("learning_rate", 1e38),  # over 1 - beta_1
    ("epsilon", 1e-46),
    ("grad_scale", 1e-50),
    ("grad_scale", -1e-50),
    ("grad_scale", 1e50),
    ("clipvalue", 1e-50),
    ("epsilon", 1e39),
    ("weight_decay", 1e42),
]
# Of float64 too.
LOST_EVERYWHERE = [
    {"learning_rate": 1e308},
    {"learning_rate": 1e200, "weight_decay": 1e200},
]
# Of `Adamax`, which has a factor of the loss in place of the scale.
LOST_BY_OPTIMIZER = [row for row in LOST if row[0] != "grad_scale"]
LOST_BY_OPTIMIZER += [("loss_scale_factor", 1e50), ("loss_scale_factor", 1e-50)]


def step(arrays, **settings):
    param, grad, m, u, average = arrays.values()
    adamax_ext.update(param, grad, m, u, average=average, step=1, **settings)


@every_dtype
@pytest.mark.parametrize(("name", "value"), LOST)
def test_update(dtype, name, value):
    arrays = buffers(7, "float64" if dtype == "float64" else "float32")
    arrays["param"], arrays["grad"] = (values(seed, 7, dtype) for seed in (0, 1))
    before = contents(arrays.values())
    if dtype == "float64":
        step(arrays, **{name: value})
        assert contents(arrays.values()) != before
        return
    with pytest.raises(ValueError, match=f"{name}\\b.* must be .*; received "):
        step(arrays, **{name: value})
    assert contents(arrays.values()) == before
    step(arrays)


@every_dtype
@pytest.mark.parametrize(("name", "value"), LOST_BY_OPTIMIZER)
def test_apply(dtype, name, value):
    variables = [values(0, 7, "float64"), values(1, 7, dtype)]
    grads = [values(2, 7, "float64"), values(3, 7, dtype)]
    optimizer = Adamax(use_ema=True, **{name: value})
    optimizer.build(variables)
    before = contents([*variables, *optimizer.variables])
    if dtype == "float64":
        assert optimizer.apply(grads) == 1
        assert contents([*variables, *optimizer.variables]) != before
        return
    with pytest.raises(ValueError, match=f"{name}\\b.* must be .*; received "):
        optimizer.apply(grads)
    assert contents([*variables, *optimizer.variables]) == before
    assert optimizer.calls == 0


@every_dtype
@pytest.mark.parametrize("settings", LOST_EVERYWHERE, ids=str)
def test_what_overflows_even_in_double(dtype, settings):
    variable, grad = values(0, 7, dtype), values(1, 7, dtype)
    optimizer = Adamax(**settings)
    optimizer.build([variable])
    (state,) = optimizer.state.values()
    before = contents([variable, *state.values()])
    with pytest.raises(ValueError, match=f"^{list(settings)[-1]} must be .*; received "):
        optimizer.apply([grad])
    assert contents([variable, *state.values()]) == before
