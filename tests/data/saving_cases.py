"""What the tests of saving save: optimizers, data, and the recipe of the golden file."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from adamax_ext import Adamax, LossScaleOptimizer, checkpoint, schedules
from safetensors.numpy import save_file
from support.bits import dtype_of, is_testable

DATA = Path(__file__).parent
TWO = {"kernel": ((3, 5), "float32", "C"), "bias": ((5,), "float32", "C")}
SHAPES = {
    "double": ((4, 3), "float64", "C"),
    "half": ((7,), "float16", "C"),
    "fortran": ((3, 4), "float32", "F"),
    "scalar": ((), "float32", "C"),
    "empty": ((0, 3), "float32", "C"),
    "encoder/layer/0/kernel": ((2, 2), "float32", "C"),
    "/": ((2,), "float64", "C"),
    "": ((2,), "float32", "C"),
    "größe/重み": ((3,), "float32", "C"),
}


def a_callable_rate():
    return 0.015


def a_rate_of_the_step(step):
    return 0.03 / (1 + step)


@dataclass(frozen=True)
class Case:
    settings: dict = field(default_factory=dict)
    weights: dict = field(default_factory=lambda: TWO)  # name -> shape, dtype, memory order
    exclude: dict | None = None  # in each run: no file tells it
    new_rate: float | None = None  # set after three steps
    loss_scale: dict | None = None

    @property
    def is_low_memory(self):
        """Whether state, or weights, are kept in what Keras' layout has no room for."""
        return bool({"state_bits", "weight_rounding"} & self.settings.keys())


CASES = {
    "defaults": Case(),
    "learning_rate": Case({"learning_rate": 0.1}),
    "beta_1": Case({"beta_1": 0.5}),
    "beta_2": Case({"beta_2": 0.75}),
    "epsilon": Case({"epsilon": 0.01}),
    "weight_decay": Case({"weight_decay": 0.3}),
    "clipnorm": Case({"clipnorm": 0.7}),
    "clipvalue": Case({"clipvalue": 0.4}),
    "global_clipnorm": Case({"global_clipnorm": 0.9}),
    "use_ema": Case({"use_ema": True}),
    "ema_momentum": Case({"use_ema": True, "ema_momentum": 0.5}),
    "ema_overwrite_frequency": Case({"use_ema": True, "ema_overwrite_frequency": 3}),
    "loss_scale_factor": Case({"loss_scale_factor": 8.0}),
    "accumulation, 2 of 3": Case({"gradient_accumulation_steps": 3}),
    "accumulation, 5 of 7": Case({"gradient_accumulation_steps": 7}),
    "name": Case({"name": "another"}),
    "schedule": Case({"learning_rate": schedules.CosineDecay(0.1, 12, warmup_steps=3)}),
    "schedule from a function": Case(
        {"learning_rate": schedules.LearningRateSchedule.from_callable(a_rate_of_the_step)}
    ),
    "callable": Case({"learning_rate": a_callable_rate}),
    "rate set": Case(new_rate=1 / 3),
    "excluded by name": Case({"weight_decay": 0.5}, exclude={"var_names": ["^bi"]}),
    "excluded by memory": Case({"weight_decay": 0.5}, exclude={"var_list": ["kernel"]}),
    "all layouts": Case({"weight_decay": 0.1}, SHAPES),
    "all layouts and arrays": Case(
        {"use_ema": True, "gradient_accumulation_steps": 4, "clipnorm": 2.0}, SHAPES
    ),
    "bfloat16": Case({"use_ema": True, "learning_rate": 0.1}, {"w": ((2, 9), "bfloat16", "F")}),
    "state_bits": Case({"state_bits": 16, "seed": 7, "weight_rounding": "stochastic"}),
    "8 bits": Case({"state_bits": 8, "use_ema": True}, {"w": ((70, 3, 20), "float32", "F"), **TWO}),
    "remainder": Case(
        {"weight_rounding": "remainder", "state_bits": 8, "use_ema": True, "seed": 2**64 - 1},
        {"w": ((70, 60), "bfloat16", "F"), "b": ((2, 9), "bfloat16", "C")},
    ),
    "no variables": Case(weights={}),
    "loss scale": Case(loss_scale={"initial_scale": 64.0, "dynamic_growth_steps": 3}),
    "everything": Case(
        {
            "learning_rate": schedules.ExponentialDecay(0.1, 4, 0.5),
            "beta_1": 0.8,
            "weight_decay": 0.2,
            "global_clipnorm": 1.5,
            "use_ema": True,
            "ema_momentum": 0.75,
            "ema_overwrite_frequency": 2,
            "gradient_accumulation_steps": 2,
        },
        SHAPES,
        exclude={"var_names": ["重"], "var_list": ["half", "fortran"]},
        loss_scale={"initial_scale": 4.0, "dynamic_growth_steps": 4},
    ),
}


if not is_testable("bfloat16"):
    del CASES["bfloat16"], CASES["remainder"]


def array(shape, dtype, order, seed):
    """Small multiples of 1/8, exact in every type and the same with every NumPy."""
    values = (np.arange(np.prod(shape, dtype=int)) * 7 + seed * 5) % 23 - 11
    return np.array((values / 8).reshape(shape), dtype_of(dtype), order=order)


def make(case, weights=None):
    """Return weights by name, fresh ones by default, and an optimizer, not built."""
    if weights is None:
        weights = {n: array(*spec, seed) for seed, (n, spec) in enumerate(case.weights.items())}
    optimizer = Adamax(**case.settings)
    if case.loss_scale:
        optimizer = LossScaleOptimizer(optimizer, **case.loss_scale)
    if case.exclude:
        buffers = [weights[name] for name in case.exclude.get("var_list", [])]
        optimizer.exclude_from_weight_decay(buffers, case.exclude.get("var_names"))
    return weights, optimizer


def train(case, weights, optimizer, steps):
    for step in steps:
        grads = [array(*s, 31 * step + i) for i, s in enumerate(case.weights.values())]
        if case.loss_scale and step in (1, 6):
            grads[0][:1] = np.inf
        optimizer.apply(grads, list(weights.values()))
        if case.new_rate and step == 2:
            optimizer.learning_rate = case.new_rate


def bits(x):
    return str(x.dtype), x.shape, x.tobytes()


def snapshot(optimizer, weights=None):
    """Return everything that training changes, comparable with ==."""
    saved = optimizer.state_dict()
    arrays = {f"{n}|{k}": bits(a) for n, of in saved.pop("state").items() for k, a in of.items()}
    arrays |= {f"weight {name}": bits(w) for name, w in (weights or {}).items()}
    rates = optimizer.learning_rate.hex(), optimizer.iterations
    return {**saved, **arrays, "rates": rates, "keys": list(optimizer.state)}


FULL = Case(
    {"weight_decay": 0.1, "use_ema": True, "gradient_accumulation_steps": 2},
    {"w": ((2, 3), "float32", "C"), "layer/b": ((4,), "float64", "C")},
    exclude={"var_names": ["b"]},
)
SCALED = Case(weights=FULL.weights, loss_scale={"initial_scale": 8.0, "dynamic_growth_steps": 9})
SCHEDULED = Case({"learning_rate": schedules.CosineDecay(0.1, 12)}, FULL.weights)


def trained(case, steps=3):
    weights, optimizer = make(case)
    optimizer.build(weights)
    train(case, weights, optimizer, range(steps))
    return weights, optimizer


def refused(optimizer, weights, error, match, load, *arguments):
    before = snapshot(optimizer, weights)
    with pytest.raises(error, match=match):
        load(*arguments)
    assert snapshot(optimizer, weights) == before


GOLDEN = Case(
    {
        "learning_rate": 0.1,
        "weight_decay": 0.25,
        "use_ema": True,
        "ema_momentum": 0.5,
        "gradient_accumulation_steps": 2,
    },
    {
        "dense/kernel": ((2, 3), "float32", "F"),
        "größe": ((3,), "float16", "C"),
        "scale": ((), "float64", "C"),
    },
    exclude={"var_names": ["scale"]},
)


def trained_for_golden(version):
    """Five calls, of which the last one, from version 2 on, has no gradient for "scale"."""
    weights, optimizer = trained(GOLDEN, 4)
    chosen = list(GOLDEN.weights)[: 3 if version == 1 else 2]
    grads = [array(*GOLDEN.weights[name], 31 * 4 + i) for i, name in enumerate(chosen)]
    optimizer.apply(grads, [weights[name] for name in chosen])
    return weights, optimizer


def write_golden():
    """Make the golden files; run in tests/: ``from data.saving_cases import *; write_golden()``.

    Those of an old version stay as they were written once; a new version gets files of its own.
    """
    version = checkpoint.FORMAT_VERSION
    weights, optimizer = trained_for_golden(version)
    optimizer.save(DATA / f"checkpoint_v{version}.safetensors")
    arrays = {f"before {name}": np.array(w, order="C") for name, w in weights.items()}
    train(GOLDEN, weights, optimizer, range(5, 11))
    arrays |= {f"after {name}": np.array(w, order="C") for name, w in weights.items()}
    save_file(arrays, DATA / f"checkpoint_v{version}_weights.safetensors")


# What the tests of files write, one over the other.
OLD, NEW = (
    {
        "format_version": 2,
        "calls": calls,
        "state": {f"v{n}": {"norm": np.full(n, calls, np.float32)} for n in (1, 500, 100_000)},
    }
    for calls in (1, 2)
)


def is_new(path):
    """Whether the file holds NEW; fails unless it then holds OLD, and each of them entirely."""
    received = checkpoint.read(path)
    new = received["calls"] == 2
    np.testing.assert_equal(received, NEW if new else OLD)
    return new


def names(folder):
    return [path.name for path in folder.iterdir()]
