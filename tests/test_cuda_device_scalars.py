"""Numbers in device memory, on an emulated GPU: bits of the host, graphs, loss scales, vetoes."""

import itertools

import numpy as np
import pytest
from support import emulated
from support.bits import assert_same_bits, rounded, spread, widened
from support.cuda_api import CudaCall, group_of, variable_of
from support.device_twins import Twins
from support.emulated import log_of
from support.steps import SETTINGS, random_arrays

STREAM = 7


def launch(name):
    return f"launch {name} on device 0 stream {STREAM}"


# ---- Bits, and replays ---------------------------------------------------------------------------


def check_steps(num_variables, num_groups, on_device):
    twins = Twins(num_variables, num_groups, average=num_groups != 17, on_device=on_device)
    for step in range(20):
        twins.change_numbers()
        twins.call().step()
        twins.step_host()
        twins.assert_same(f"step {step}")


GROUPS = [(3, 1), (40, 16), (40, 17), (300, 300)]


@pytest.mark.parametrize("on_device", ["all", "steps", "some"])
@pytest.mark.parametrize(("num_variables", "num_groups"), GROUPS)
def test_steps_have_the_bits_of_the_host(num_variables, num_groups, on_device):
    emulated.run(check_steps, num_variables, num_groups, on_device)


def check_replays(num_variables, num_groups, settings):
    """A graph has nothing of this host: all that is told to it lies in device memory."""
    twins = Twins(num_variables, num_groups, average=num_groups != 16, clips=not settings)
    scale, found_inf = np.ones(1, np.float32), np.zeros(1, np.float32)
    call = twins.call(loss_scale=scale, found_inf=found_inf, **settings)
    before = twins.copies()
    call.capture(STREAM)
    twins.assert_unchanged(before, "a capture")
    vetoes = 0
    for replay in range(20):
        twins.change_numbers()
        scale[0] = (1.0, 1024.0, 3.7)[replay % 3]
        found_inf[0] = (0.0, 1.0, 0.0, 0.5, 0.0, 0.0, np.nan)[replay % 7]
        before = twins.copies()
        emulated.replay(STREAM)
        if found_inf[0] == 0:
            twins.step_host(grad_scale=1 / float(scale[0]), **settings)
            twins.assert_same(f"replay {replay}")
        else:
            twins.assert_unchanged(before, f"replay {replay}, which was vetoed")
            vetoes += 1
    assert vetoes == 8


@pytest.mark.parametrize("settings", [{}, {"clipnorm": 0.7}, {"global_clipnorm": 0.7}], ids=str)
@pytest.mark.parametrize(("num_variables", "num_groups"), GROUPS)
def test_replays_have_the_bits_of_the_host(num_variables, num_groups, settings):
    emulated.run(check_replays, num_variables, num_groups, settings)


def check_rates_of_zero():
    """As torch.distributed.checkpoint does to have state made."""
    twins = Twins(8, 4)
    twins.change_numbers(rate=0.0)
    twins.call().step()
    twins.step_host()
    twins.assert_same("a step with a rate of 0")


def test_a_rate_of_zero():
    emulated.run(check_rates_of_zero)


# ---- Counts --------------------------------------------------------------------------------------


def one_variable(dtype="float32", **settings):
    """Arrays of a variable, and a group of them."""
    arrays = random_arrays(np.random.default_rng(1), 9, dtype, dtype)
    return arrays, group_of(**{**SETTINGS, **settings})


def check_counts():
    late = {"beta_1": 1 - 1e-7}  # for which steps beyond 2^24 are still not alike
    for dtype, before, after in (
        (np.float32, 2**24 - 1, 2**24),
        (np.float32, 2**24, 2**24),  # where float32 ends, and torch's count with it
        (np.float64, 2**24, 2**24 + 1),
        (np.float64, 2**53, 2**53),
        (np.int32, 2**30, 2**30 + 1),
    ):
        for raises, phase in itertools.product((True, False), (0, 1)):
            count = np.array([before], dtype)
            arrays, group = one_variable("float64", **late, device_step=count, raises_step=raises)
            arrays["accumulator"] = np.zeros(9)
            CudaCall([variable_of(arrays, 0)], [group], phase=phase).step()
            # The accumulation of gradients is no update.
            assert count[0] == (after if raises and phase == 1 else before), (dtype, before)
            if phase == 1:
                twin, group = one_variable("float64", **late, step=after)
                CudaCall([variable_of(twin, 0)], [group]).step()
                assert_same_bits(arrays["param"], twin["param"], f"weights at {after}")


def test_counts():
    emulated.run(check_counts)


def check_wrong_counts():
    """What the host would refuse is seen in the weights, and nothing hangs."""
    for dtype, count in itertools.product((np.float32, np.float64), (-1, -7, 1e30, np.nan, np.inf)):
        arrays, group = one_variable(device_step=np.array([count], dtype))
        CudaCall([variable_of(arrays, 0)], [group]).step()
        assert np.isnan(arrays["param"]).all(), count
    arrays, group = one_variable(device_step=np.array([-2], np.int32))
    CudaCall([variable_of(arrays, 0)], [group]).step()
    assert np.isnan(arrays["param"]).all()


def test_wrong_counts():
    emulated.run(check_wrong_counts)


def check_accumulation():
    """Micro-batches with a loss scale in device memory; a veto of one of them changes nothing."""
    count, scale, found_inf = (np.array([n], np.float32) for n in (4, 8, 0))
    arrays, group = one_variable(device_step=count)
    arrays["accumulator"] = np.zeros(9, np.float32)
    twin = {role: array.copy() for role, array in arrays.items()}
    twin_group = group_of(**{**SETTINGS, "step": 5})
    rng = np.random.default_rng(4)
    for batch, vetoes in enumerate((0, 1, 0, 0)):
        found_inf[0] = vetoes
        arrays["grad"][...] = twin["grad"][...] = spread(rng, 9, np.float32)
        what = {"micro_batches": 3, "phase": int(batch == 3)}
        variable = variable_of(arrays, 0)
        CudaCall([variable], [group], loss_scale=scale, found_inf=found_inf, **what).step()
        if not vetoes:
            CudaCall([variable_of(twin, 0)], [twin_group], grad_scale=0.125, **what).step()
        for role, array in twin.items():
            assert_same_bits(arrays[role], array, f"{role} after micro-batch {batch}")
    assert count[0] == 5


def test_accumulation():
    emulated.run(check_accumulation)


# ---- GradScaler ----------------------------------------------------------------------------------


def check_written_gradients(scale):
    twins = Twins(40, 17)
    memory, found_inf = np.array([scale], np.float32), np.zeros(1, np.float32)
    factor = 1 / float(memory[0])
    call = twins.call(loss_scale=memory, found_inf=found_inf, writes_gradients=1)
    for step in range(6):
        twins.change_numbers()
        found_inf[0] = step % 2
        before = twins.copies()
        call.step()
        if step % 2:
            twins.assert_unchanged(before, f"step {step}, which was vetoed")
            continue
        # The weights are of the gradient before it is rounded to be written.
        twins.step_host(grad_scale=factor)
        for arrays in twins.host:
            h = widened(arrays["grad"])
            arrays["grad"] = rounded(h * h.dtype.type(factor), arrays["grad"].dtype)
        twins.assert_same(f"step {step}")


@pytest.mark.parametrize("scale", [65536.0, 3.7, 1.0, 2.0**-7, -2.5])
def test_gradients_are_written_back_unscaled(scale):
    emulated.run(check_written_gradients, scale)


def check_special_gradients():
    """Signs of zero and NaN, also where a group ascends; each gradient keeps its own sign."""
    values = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -6e-8, 3e38, 0.1], np.float32)
    for dtype, maximize in itertools.product(("float32", "float16"), (False, True)):
        arrays = random_arrays(np.random.default_rng(1), 9, dtype, dtype)
        with np.errstate(all="ignore"):
            arrays["grad"][...] = values.astype(dtype)
            expected = (widened(arrays["grad"]) * np.float32(0.5)).astype(dtype)
        group = group_of(**SETTINGS, maximize=maximize)
        scale = np.full(1, 2, np.float32)
        variables = [variable_of(arrays, 0)]
        CudaCall(variables, [group], loss_scale=scale, writes_gradients=1).step()
        assert_same_bits(arrays["grad"], expected, f"gradient of {dtype}, {maximize}")


def test_special_gradients_are_written_back():
    emulated.run(check_special_gradients)


# ---- Launches, captures, refusals ----------------------------------------------------------------


def check_launches():
    groups, squares, clip, update = map(launch, ("groups", "squares", "clip", "update"))
    found_inf = np.zeros(1, np.float32)
    one = random_arrays(np.random.default_rng(1), 5, "float32", "float32")
    del one["average"]
    variables = [variable_of(one, k) for k in range(300)]
    numbers = [np.zeros(1, np.float32) for _ in range(300)]

    def log(count, **settings):
        settings_of_all = [group_of(**SETTINGS, device_step=number) for number in numbers[:count]]
        return log_of(CudaCall(variables[:count], settings_of_all, **settings).step)

    # The numbers of the host travel as arguments, of which a launch has those of 215 groups.
    assert log(1) == log(215) == [groups, update]
    assert log(216) == log(300, found_inf=found_inf) == [groups, groups, update]
    assert log(17, global_clipnorm=1.0, found_inf=found_inf) == [groups, squares, clip, update]
    assert log(17, phase=2) == []  # there is no average to write


def test_launches():
    emulated.run(check_launches)


def check_refused_captures():
    all_, some, none = (Twins(5, 3, on_device=which) for which in ("all", "some", "none"))
    for twins in (all_, some, none):
        twins.change_numbers()
    refused = [
        some.call(),
        none.call(),
        none.call(loss_scale=np.ones(1, np.float32)),
        all_.call(other=5),  # which would be waited for
        all_.call(has_event=1),
        all_.call(phase=2),  # needs no step, and no number in device memory
    ]
    for call in refused:

        def step(call=call):
            with pytest.raises(RuntimeError, match=r"captured.*step numbers that the host tells"):
                call.step(STREAM)

        before = [all_.copies(), some.copies(), none.copies()]
        with emulated.captured(STREAM):
            assert log_of(step) == []
        for twins, copies in zip((all_, some, none), before, strict=True):
            twins.assert_unchanged(copies, "a refused capture")
        call.step(STREAM)


def test_captures_that_are_refused():
    emulated.run(check_refused_captures)


REFUSALS = {
    "require_finite must be false where numbers are taken from device memory": {
        "require_finite": 1
    },
    "writes_gradients must be false without a loss scale": {"writes_gradients": 1},
    "writes_gradients must be false where gradients are accumulated; received 1": {
        "micro_batches": 2,
        "loss_scale": np.ones(1, np.float32),
        "writes_gradients": 1,
    },
}


def check_refusal(message, settings):
    twins = Twins(3, 2)
    twins.change_numbers()
    before = twins.copies()
    call = twins.call(**settings)
    with pytest.raises(RuntimeError, match=message):
        call.step()
    twins.assert_unchanged(before, "a refused step")


@pytest.mark.parametrize("message", REFUSALS)
def test_refused(message):
    emulated.run(check_refusal, message, REFUSALS[message])


def check_refused_numbers():
    """Numbers of the host are checked as ever where another one lies in device memory."""
    for number, message in (
        ({"learning_rate": np.inf, "device_step": np.zeros(1, np.float32)}, "learning_rate must"),
        ({"step": 0, "device_learning_rate": np.zeros(1, np.float32)}, "step must be >= 1"),
        ({"beta_1": 1.0, "device_step": np.zeros(1, np.float32)}, "beta_1 must be"),
        ({"epsilon": 1e-60, "device_step": np.zeros(1, np.float32)}, "epsilon must be a number"),
    ):
        arrays, group = one_variable(**number)
        with pytest.raises(RuntimeError, match=message):
            CudaCall([variable_of(arrays, 0)], [group]).step()


def test_refused_numbers():
    emulated.run(check_refused_numbers)
