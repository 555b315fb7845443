"""JAX's handler for a GPU, on an emulated one: numbers in device memory, scratch memory, streams.

XLA's side of the call is support/xla_calls.py.
"""

import importlib

import adamax_ext
import numpy as np
import pytest
from support import emulated
from support.bits import assert_same_bits, compute_dtype, dtype_of, every_pair, spread
from support.emulated import log_of
from support.xla_calls import (
    FUNCTIONS,
    INTERNAL,
    INVALID_ARGUMENT,
    Api,
    Refused,
    Runtime,
    Step,
    version_of,
)

NUMBERS = {"learning_rate": 0.0371, "b1": 0.83, "b2": 0.957, "eps": 3.1e-5, "weight_decay": 0.213}
RULES = {"decay": "decoupled", "epsilon_mode": "inside"}
SIZES = [5, 0, 1, 1001, 70_000]


def handler():
    return importlib.import_module("adamax_ext._cuda").xla_step


def variables(param="float32", grad="float32", sizes=SIZES):
    rng = np.random.default_rng(3)
    return [(spread(rng, n, dtype_of(param)), spread(rng, n, dtype_of(grad))) for n in sizes]


def check_steps(param, grad, rules, rate_dtype, sizes=SIZES, before=0):
    """Take the rate from memory where it has a dtype, and as an attribute where not."""
    rules = RULES | rules
    settings = NUMBERS | rules
    pairs = variables(param, grad, sizes)
    rate = None if rate_dtype is None else np.zeros((), rate_dtype)
    if rate is not None:
        del settings["learning_rate"]
    step = Step(pairs, settings, before, [] if rate is None else [rate])
    host = [(w.copy(), np.zeros(w.size, compute_dtype(w.dtype))) for w, _ in pairs]
    host = [(w, m, m.copy()) for w, m in host]
    rng = np.random.default_rng(5)
    for t in range(before + 1, before + 6):
        number = NUMBERS["learning_rate"]
        if rate is not None:
            rate[...] = number = number * t
            number = float(rate)
        for _, g in pairs:
            g[...] = spread(rng, g.size, g.dtype)
        step.call(handler())
        for i, ((w, m, u), (_, g)) in enumerate(zip(host, pairs, strict=True)):
            adamax_ext.update(
                *(w, g, m, u),
                **{"step": min(t, 2**31), "learning_rate": number, "beta_1": NUMBERS["b1"]},
                **{"beta_2": NUMBERS["b2"], "epsilon": NUMBERS["eps"], **rules},
                weight_decay=NUMBERS["weight_decay"],
            )
            for name, array, wanted in (
                ("params", step.params, w),
                ("mu", step.mu, m),
                ("nu", step.nu, u),
            ):
                assert_same_bits(array[i], wanted, f"{name} {i} at step {t}")


@pytest.mark.parametrize("rate", [None, "float32", "float64"])
@pytest.mark.parametrize("rules", [{}, {"decay": "l2", "epsilon_mode": "outside"}], ids=str)
def test_steps_have_the_bits_of_the_host(rules, rate):
    emulated.run(check_steps, "float32", "float32", rules, rate)


@every_pair
def test_storages(param, grad):
    emulated.run(check_steps, param, grad, {}, "float32", [0, 7, 300])


def test_many_variables():
    emulated.run(check_steps, "float32", "float32", {}, "float32", [3] * 700)


@pytest.mark.parametrize("before", [2**24, 2**31 - 3])
def test_large_counts(before):
    emulated.run(check_steps, "float64", "float64", {}, None, [9], before)


def check_no_variables():
    for sizes in ([], [0, 0]):
        step = Step(variables(sizes=sizes), NUMBERS | RULES)
        assert "update" not in str(log_of(lambda step=step: step.call(handler())))


def test_a_step_of_nothing_does_nothing():
    emulated.run(check_no_variables)


# ---- What the device and the runtime are asked ---------------------------------------------------


def check_log():
    runtime = Runtime(stream=0x1234)
    step = Step(variables(), NUMBERS | RULES)
    log = log_of(lambda: step.call(handler(), runtime))
    # No copy, no wait, no memory but XLA's.
    assert log == [
        f"launch {kernel} on device 0 stream {0x1234}" for kernel in ("groups", "update")
    ]
    assert sorted(runtime.log) == sorted(
        ["device_ordinal_get", "stream_get", "device_memory_allocate", "device_memory_free"]
    )
    assert runtime.memory == {}
    assert runtime.log[-1] == "device_memory_free"


def test_a_step_is_two_launches_on_the_stream_of_the_call():
    emulated.run(check_log)


def check_other_device():
    runtime = Runtime(device=1)
    step = Step(variables(), NUMBERS | RULES)
    log = log_of(lambda: step.call(handler(), runtime))
    assert [line.partition(" on ")[2] for line in log] == ["device 1 stream 7"] * 2


def test_the_device_of_the_call_is_used():
    emulated.run(check_other_device)


def check_capture():
    """XLA may make a graph of a program: the count is in memory, so that every replay is a step."""
    step = Step(variables(), NUMBERS | RULES)
    twin = Step([(w.copy(), g.copy()) for w, g in variables()], NUMBERS | RULES)
    runtime = Runtime()
    runtime.device_memory_free = lambda args: None  # the graph goes on using it
    with emulated.captured(7):
        step.call(handler(), runtime)
    step.count[...] = 0
    for t in range(1, 4):
        emulated.replay(7)
        twin.call(handler())
        step.count[...] = t  # JAX does, in the graph
        for ours, theirs in zip(step.params, twin.params, strict=True):
            assert_same_bits(ours, theirs, f"weights at step {t}")


def test_a_captured_step_is_another_one_at_each_replay():
    emulated.run(check_capture)


def test_the_handler_says_the_lowest_version():
    assert emulated.run(check_version) == (0, 1, 0)


def check_version():
    return version_of(handler())


def check_stages():
    step = Step(variables(), {})
    for stage in range(3):
        assert log_of(lambda stage=stage: step.call(handler(), Runtime(), stage=stage)) == []
    assert step.count == 0


def test_before_it_is_executed_nothing_is_done():
    emulated.run(check_stages)


# ---- Refusals ------------------------------------------------------------------------------------


def refuse(step, message, code, runtime):
    """Call, and require an error, no work on the device, and that no memory is kept."""
    arrays = [*step.params, *step.mu, *step.nu, step.count]
    before = [array.copy() for array in arrays]

    def call():
        with pytest.raises(Refused, match=message) as caught:
            step.call(handler(), runtime)
        assert caught.value.args[1] == code

    assert log_of(call) == []
    assert runtime.memory == {}
    for array, copy in zip(arrays, before, strict=True):
        assert_same_bits(array, copy, "an array")


def check_array_settings():
    for name in NUMBERS.keys() - {"learning_rate"}:
        settings = {key: value for key, value in NUMBERS.items() if key != name} | RULES
        step = Step(variables(), settings, arrays=[np.array(NUMBERS[name], np.float32)])
        message = f"{name} is an array; on a GPU only learning_rate and loss_scale .*static_args"
        refuse(step, message, INVALID_ARGUMENT, Runtime())


def test_other_settings_as_arrays_are_refused():
    emulated.run(check_array_settings)


def check_old_runtime():
    last = Api.functions.offset + 8 * FUNCTIONS["device_ordinal_get"][0]
    step = Step(variables(), NUMBERS | RULES)
    refuse(step, "0.6 or newer", INTERNAL, Runtime(api_size=last))
    step.call(handler(), Runtime(api_size=last + 8))
    step.call(handler(), Runtime(api_size=last + 80))  # a newer one
    assert step.count == 2


def test_a_runtime_that_does_not_tell_the_device_is_refused():
    emulated.run(check_old_runtime)


def check_failures():
    for function, what in (
        ("stream_get", "stream"),
        ("device_ordinal_get", "number of the GPU"),
        ("device_memory_allocate", "scratch memory"),
    ):
        runtime = Runtime()
        runtime.fails = (function,)
        refuse(Step(variables(), NUMBERS | RULES), f"XLA gives no {what}", INTERNAL, runtime)


def test_what_the_runtime_cannot_give():
    emulated.run(check_failures)


def check_wrong_calls():
    step = Step(variables(), NUMBERS | RULES | {"b1": 1.5})
    refuse(step, "beta_1 must be", INVALID_ARGUMENT, Runtime())
    step = Step(variables(), NUMBERS | RULES)
    step.count = np.zeros(2, np.int32)
    refuse(step, "count must be one int32", INVALID_ARGUMENT, Runtime())
    step = Step(variables(), NUMBERS | RULES)
    step.grads[3] = np.ones(7, np.float32)
    refuse(step, r"grads\[3\] has 7 elements; expected 1001", INVALID_ARGUMENT, Runtime())


def test_calls_that_do_not_fit_are_refused():
    emulated.run(check_wrong_calls)


def check_unusable():
    emulated.set_machine(capability=61)
    try:
        refuse(Step(variables(), NUMBERS | RULES), r"6\.1|capability", INTERNAL, Runtime())
    finally:
        emulated.set_machine()


def test_a_device_without_kernels_is_refused():
    emulated.run(check_unusable)


def check_wrong_numbers():
    """What no one checks in device memory is seen in the weights."""
    settings = {key: value for key, value in NUMBERS.items() if key != "learning_rate"} | RULES
    for rate, count in ((np.nan, 0), (0.1, -5)):
        step = Step(variables(), settings, count, [np.array(rate, np.float32)])
        step.call(handler())
        assert all(np.isnan(w).all() for w in step.params)


def test_wrong_numbers_in_device_memory_make_nan():
    emulated.run(check_wrong_numbers)
