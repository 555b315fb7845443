"""The native step of JAX with averages, clipped values, loss scales and leaves without gradients.

On the host and on an emulated GPU, by XLA's C structures; the expected bits are `update`'s.
"""

import importlib

import adamax_ext
import numpy as np
import pytest
from adamax_ext import _core
from support import emulated
from support.bits import assert_same_bits, spread
from support.xla_calls import EXECUTE, INVALID_ARGUMENT, Refused, Runtime, Step, call

NUMBERS = {"learning_rate": 0.0371, "b1": 0.83, "b2": 0.957, "eps": 3.1e-5, "weight_decay": 0.213}
RULES = {"decay": "decoupled", "epsilon_mode": "outside"}
SIZES = [5, 0, 1, 1001]
MOMENTUM = 0.75
CASES = [
    {},
    {"clipvalue": 0.4},
    {"ema": True},
    {"decayed": 0},
    {"decayed": 2},
    {"decayed": 3},
    {"loss_scale": 3.0},
    {"loss_scale": np.float32(3.0)},
    {"gradients": 2, "ema": True},
    {"gradients": 3, "ema": True, "decayed": 1, "clipvalue": 0.4, "loss_scale": np.float32(3.0)},
]


class Averaged(Step):
    """A step that has also averages, and gradients of the first variables only."""

    def __init__(self, sizes, case, dtype=np.float32):
        rng = np.random.default_rng(3)
        pairs = [[spread(rng, n, dtype) for _ in range(2)] for n in sizes]
        settings = NUMBERS | RULES | {k: v for k, v in case.items() if k == "clipvalue"}
        scale, arrays = case.get("loss_scale", 1.0), []
        if isinstance(scale, np.float32):
            arrays = [np.array(scale)]
        super().__init__(pairs, settings | {"loss_scale": scale}, arrays=arrays)
        if arrays:
            del self.attributes["loss_scale"]
        if "decayed" in case:
            self.attributes["decayed"] = np.array(case["decayed"], np.int64)
        self.averages = []
        if case.get("ema"):
            self.attributes["ema_momentum"] = np.array(MOMENTUM)
            self.averages = [
                np.full(w.shape, 7, m.dtype) for w, m in zip(self.params, self.mu, strict=True)
            ]
        del self.grads[case.get("gradients", len(sizes)) :]

    def call(self, capsule, runtime=None):
        results = [*self.params, *self.mu, *self.nu, *self.averages]
        arguments = [*results, self.count, *self.grads, *self.arrays]
        call(capsule, arguments, results, self.attributes, runtime, stage=EXECUTE)
        self.count += 1


def host_step(twin, case, t):
    """Do the same with `update`, for one variable after the other."""
    for i, (w, m, u) in enumerate(zip(twin.params, twin.mu, twin.nu, strict=True)):
        if i >= len(twin.grads):
            average = twin.averages[i]
            average[...] = w if t == 1 else MOMENTUM * average + (1 - MOMENTUM) * w
            continue
        options = {"average": twin.averages[i], "ema_momentum": MOMENTUM} if twin.averages else {}
        adamax_ext.update(
            *(w, twin.grads[i], m, u),
            **{"step": t, "learning_rate": NUMBERS["learning_rate"], "beta_1": NUMBERS["b1"]},
            **{"beta_2": NUMBERS["b2"], "epsilon": NUMBERS["eps"], **RULES},
            weight_decay=NUMBERS["weight_decay"] if i < case.get("decayed", 9) else 0.0,
            grad_scale=1 / float(case.get("loss_scale", 1.0)),
            clipvalue=case.get("clipvalue"),
            **options,
        )


def assert_equal(step, twin, label):
    for kind in ("params", "mu", "nu", "averages"):
        for i, pair in enumerate(zip(getattr(step, kind), getattr(twin, kind), strict=True)):
            if kind == "averages" and i >= len(step.grads):
                # Of those without gradients the expected number is rounded otherwise.
                np.testing.assert_allclose(*pair, rtol=1e-6)
            else:
                assert_same_bits(*pair, f"{kind} {i} {label}")


def check_steps(case, handler):
    step, twin = Averaged(SIZES, case), Averaged(SIZES, case)
    rng = np.random.default_rng(8)
    for t in range(1, 5):
        for grad, other in zip(step.grads, twin.grads, strict=True):
            grad[...] = other[...] = spread(rng, grad.size, grad.dtype)
        step.call(handler())
        host_step(twin, case, t)
        assert_equal(step, twin, f"at step {t}")


def host():
    return _core.xla_step


def gpu():
    return importlib.import_module("adamax_ext._cuda").xla_step


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_host(case):
    check_steps(case, host)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_an_emulated_gpu(case):
    emulated.run(check_steps, case, gpu)


def check_not_finite(handler):
    case = {"loss_scale": np.float32(np.nan)}
    step = Averaged(SIZES, case)
    step.call(handler())
    assert all(np.isnan(w).all() for w in step.params)


def test_a_loss_scale_that_is_nan_makes_all_weights_nan():
    check_not_finite(host)
    emulated.run(check_not_finite, gpu)


def check_refusal(handler):
    step = Averaged(SIZES, {"loss_scale": 0.0})
    before = [w.copy() for w in step.params]
    with pytest.raises(Refused, match="grad_scale must be finite, or NaN") as caught:
        step.call(handler())
    assert caught.value.args[1] == INVALID_ARGUMENT
    for w, copy in zip(step.params, before, strict=True):
        assert_same_bits(w, copy, "weights")


def test_a_loss_scale_of_zero_is_refused():
    check_refusal(host)
    emulated.run(check_refusal, gpu)


def check_replay():
    """In a graph: another scale and another step at each replay, of two groups with averages."""
    case = {"loss_scale": np.float32(3.0), "decayed": 2, "ema": True}
    step, twin = Averaged(SIZES, case), Averaged(SIZES, case)
    runtime = Runtime()
    runtime.device_memory_free = lambda args: None  # the graph goes on using it
    with emulated.captured(7):
        step.call(gpu(), runtime)
    step.count[...] = 0
    for t in range(1, 5):
        step.arrays[0][...] = t + 2
        emulated.replay(7)
        step.count[...] = t
        host_step(twin, case | {"loss_scale": t + 2}, t)
        assert_equal(step, twin, f"at step {t}")


def test_a_captured_step_reads_the_loss_scale_at_each_replay():
    emulated.run(check_replay)
