"""The native handler of JAX refuses what it cannot step, and changes nothing then.

Calls without JAX, by XLA's C structures.
"""

import numpy as np
import pytest
from adamax_ext import _core
from support.bits import assert_same_bits
from support.xla_calls import (
    EXECUTE,
    INVALID_ARGUMENT,
    Refused,
    Runtime,
    Step,
    call,
    version_of,
)

NUMBERS = {"learning_rate": 0.1, "b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.1}
RULES = {"decay": "decoupled", "epsilon_mode": "inside"}


def variable(size=5, dtype=np.float32):
    return np.linspace(-1, 1, size).astype(dtype), np.linspace(2, 1, size).astype(dtype)


def without(settings, *names):
    return {name: value for name, value in settings.items() if name not in names}


def refused(step, message, capsule=_core.xla_step, **options):
    """Call, and require an error with that message, and that no memory was written."""
    arrays = [*step.params, *step.grads, *step.mu, *step.nu, step.count, *step.arrays]
    before = [array.copy() for array in arrays]
    with pytest.raises(Refused, match=message) as caught:
        step.call(capsule, **options)
    assert caught.value.args[1] == INVALID_ARGUMENT
    for array, copy in zip(arrays, before, strict=True):
        assert_same_bits(array, copy, "an array")


def test_a_step_without_jax():
    import adamax_ext

    step = Step([variable(), variable(7)], NUMBERS | RULES)
    twins = [[a.copy() for a in arrays] for arrays in zip(*[step.params, step.grads], strict=True)]
    for t in range(1, 4):
        step.call(_core.xla_step)
        assert step.count == t
    for i, (w, g) in enumerate(twins):
        m, u = np.zeros_like(w), np.zeros_like(w)
        for t in range(1, 4):
            adamax_ext.update(
                *(w, g, m, u),
                **{"step": t, "learning_rate": 0.1, "beta_1": 0.8, "beta_2": 0.95},
                **{"epsilon": 1e-3, "weight_decay": 0.1, "epsilon_mode": "inside"},
            )
        assert_same_bits(step.params[i], w, "weights")
        assert_same_bits(step.mu[i], m, "mu")
        assert_same_bits(step.nu[i], u, "nu")


@pytest.mark.parametrize("handler", ["xla_step", "xla_refuse"])
def test_handlers_say_the_lowest_version(handler):
    assert version_of(getattr(_core, handler)) == (0, 1, 0)


@pytest.mark.parametrize("stage", range(EXECUTE))
def test_before_it_is_executed_nothing_is_read(stage):
    step = Step([variable()], {})  # without a single setting
    step.call(_core.xla_step, stage=stage)
    assert step.count == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("names", [("learning_rate",), ("b1", "eps"), tuple(NUMBERS)], ids=str)
def test_settings_that_are_arrays(names, dtype):
    arrays = [np.array(NUMBERS[name], dtype).reshape((1,) * i) for i, name in enumerate(names)]
    given = Step([variable()], without(NUMBERS, *names) | RULES, arrays=arrays)
    rounded = {name: float(dtype(NUMBERS[name])) for name in names}
    told = Step([variable()], NUMBERS | rounded | RULES)
    for step in (given, told, given, told):
        step.call(_core.xla_step)
    for kind in ("params", "mu", "nu"):
        assert_same_bits(getattr(given, kind)[0], getattr(told, kind)[0], kind)


def with_arrays(change, variables=((5, np.float32),), settings=NUMBERS | RULES, **options):
    step = Step([variable(*v) for v in variables], settings, **options)
    change(step)
    return step


def set_item(name, value):
    return lambda step: getattr(step, name).__setitem__(0, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_item("grads", np.ones(4, np.float32)), r"grads\[0\] has 4 elements; expected 5"),
        (set_item("mu", np.ones((2, 3), np.float32)), r"mu\[0\] has 6 elements; expected 5"),
        (set_item("nu", np.ones(0, np.float32)), r"nu\[0\] has 0 elements; expected 5"),
        (set_item("nu", np.ones(5)), r"nu\[0\] has another type than mu"),
        (set_item("params", np.ones(5, np.int32)), r"params\[0\] has XLA's type 4; expected fl"),
        (set_item("grads", np.ones(5, np.int32)), r"grads\[0\] has XLA's type 4; expected flo"),
        (set_item("grads", np.ones(5)), "float64"),
        (lambda s: setattr(s, "count", np.zeros(2, np.int32)), "count must be one int32; rec.* 2 "),
        (lambda s: setattr(s, "count", np.zeros(0, np.int32)), "count must be one int32; rec.* 0 "),
        (lambda s: setattr(s, "count", np.zeros((), np.int64)), "count must be one int32.*type 5"),
        (lambda s: setattr(s, "count", np.array(-1, np.int32)), "step must be >= 1; received 0"),
        (lambda s: s.arrays.append(np.ones(())), "3 kinds .* 0 settings .* 3 results and 6 arg"),
        (lambda s: s.mu.pop(), "3 kinds .* 0 settings .* 2 results and 4 arguments"),
    ],
)
def test_buffers(change, message):
    refused(with_arrays(change), message)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(2, np.float32), "learning_rate must be one float32 or float64; received 2 el"),
        (np.ones(0, np.float64), "learning_rate must be one float32 or float64; received 0 el"),
        (np.ones((), np.float16), "learning_rate must be one float32 .*; received 1.* type 10"),
        (np.ones((), np.int32), "learning_rate must be one float32 or float64; rec.* type 4"),
    ],
)
def test_rates(array, message):
    settings = without(NUMBERS, "learning_rate") | RULES
    refused(Step([variable()], settings, arrays=[array]), message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (NUMBERS, "decay|epsilon_mode"),
        (NUMBERS | without(RULES, "decay"), "decay"),
        (NUMBERS | without(RULES, "epsilon_mode"), "epsilon_mode"),
        (NUMBERS | RULES | {"decay": "L2"}, "decay"),
        (NUMBERS | RULES | {"epsilon_mode": ""}, "epsilon_mode"),
        (without(NUMBERS, "b1") | RULES, "b1 must be one float32 .* received 5 elements"),
        (NUMBERS | RULES | {"b1": 1.0}, r"beta_1 must be in \[0, 1\); received 1"),
        (NUMBERS | RULES | {"b2": "0.9"}, "b2 is an attribute of another type"),
        (NUMBERS | RULES | {"decay": 3.0}, "decay is an attribute of another type"),
    ],
)
def test_attributes(settings, message):
    refused(Step([variable()], settings), message)


def test_an_attribute_of_another_scalar_type():
    step = Step([variable()], NUMBERS | RULES)
    step.attributes["eps"] = np.array(1e-3, np.float32)
    refused(step, "eps is a number of another type")


def test_results_that_lie_elsewhere():
    step = Step([variable()], NUMBERS | RULES)
    results = [*step.params, *step.mu, *step.nu]
    for i in range(3):
        others = [a.copy() if k == i else a for k, a in enumerate(results)]
        before = [a.copy() for a in (*results, *others)]
        with pytest.raises(Refused, match=f"result {i} does not lie where its argument is"):
            call(_core.xla_step, [*results, step.count, *step.grads], others, step.attributes)
        for array, copy in zip((*results, *others), before, strict=True):
            assert_same_bits(array, copy, "an array")


def test_one_bad_variable_of_many_changes_none():
    step = Step([variable(n) for n in range(1, 9)], NUMBERS | RULES)
    step.grads[-1] = np.ones(99, np.float32)
    refused(step, r"grads\[7\] has 99 elements; expected 8")


@pytest.mark.parametrize("settings", [{}, NUMBERS | RULES], ids=["none", "all"])
def test_a_gpu_without_kernels_is_refused(settings):
    step = Step([variable()], settings)
    refused(step, "no kernels for this GPU.*ADAMAX_EXT_CUDA=ON", _core.xla_refuse)
    step.call(_core.xla_refuse, stage=0)


def test_the_host_asks_the_runtime_for_nothing():
    runtime = Runtime()
    Step([variable()], NUMBERS | RULES).call(_core.xla_step, runtime)
    assert runtime.log == []
