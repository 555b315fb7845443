"""Training with Keras on torch and state in fewer bits: dtype policies, small steps, compiled."""

import functools

import numpy as np
import pytest
from support import reference_lowmem as program
from support.keras_low_memory import as_stored, everything, require_equal
from support.keras_models import fit, make_model
from support.keras_pairs import Adamax, keras
from support.keras_torch import torch
from support.low_memory import assert_same

LOW = {"state_bits": 16, "weight_rounding": "remainder", "learning_rate": 0.02}


@pytest.fixture(autouse=True)
def float32_afterwards():
    yield
    keras.config.set_dtype_policy("float32")
    keras.config.set_floatx("float32")


def train_policy(policy, **settings):
    keras.config.set_dtype_policy(policy)
    return fit(make_model(Adamax(**{**LOW, **settings})))


def test_fit_under_dtype_policies():
    """Of "mixed_bfloat16" the weights are float32, with nothing to round."""
    models = {policy: train_policy(policy) for policy in ("mixed_bfloat16", "bfloat16")}
    remainders = {p: m.optimizer._stored.remainders for p, m in models.items()}
    assert remainders["mixed_bfloat16"] == [None] * 4
    assert all(as_stored(r).any() for r in remainders["bfloat16"])
    for model in models.values():
        assert {v.dtype for v in model.optimizer._m} == {"bfloat16"}
        assert int(model.optimizer.iterations) == 8


def test_fit_where_floatx_is_bfloat16():
    """Of Keras the rate is, too; what belongs to codes is not."""
    keras.config.set_floatx("bfloat16")
    model = train_policy("bfloat16")
    assert model.optimizer._learning_rate.dtype == "bfloat16"
    assert {v.dtype for v in model.trainable_variables} == {"bfloat16"}
    assert {v.dtype for v in model.optimizer._stored.norm_scales} == {"float32"}
    assert all(as_stored(r).any() for r in model.optimizer._stored.remainders)


def test_small_steps_are_not_lost():
    """A weight of 1 and steps of 1e-4: to nearest it stays; with its remainder it is as float32."""
    ends = {}
    for dtype, rounding in (
        ("float32", "nearest"),
        ("bfloat16", "nearest"),
        ("bfloat16", "remainder"),
    ):
        weight = keras.Variable(np.ones(300), dtype=dtype)
        optimizer = Adamax(1e-4, weight_rounding=rounding)
        for _ in range(200):
            optimizer.apply([torch.ones(300)], [weight])
        ends[dtype, rounding] = as_stored(weight)
    full = ends["float32", "nearest"]
    assert (full < 0.99).all()
    assert_same(ends["bfloat16", "nearest"], program.bf16_nearest(np.ones(300, "f")), "nearest")
    assert_same(ends["bfloat16", "remainder"], program.bf16_split(full)[0], "remainder")


@pytest.mark.filterwarnings("ignore")  # of Dynamo and Inductor
def test_fit_with_jit_compile(monkeypatch):
    results = []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for compiled in (False, True):
        torch._dynamo.reset()
        keras.config.set_dtype_policy("bfloat16")
        model = fit(make_model(Adamax(**LOW), jit_compile=compiled))
        results.append(everything(model.optimizer, model.trainable_variables))
    require_equal(*results)
