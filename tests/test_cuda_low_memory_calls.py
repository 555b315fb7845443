"""Calls with many variables, state in fewer bits, on an emulated GPU: settings, replays, launches.

The bits are the program's. The kernels run thread by thread on the host
(tests/cpp/emulated_cuda.cpp).
"""

import itertools

import numpy as np
import pytest
from support import emulated
from support.bits import assert_same_bits, rounded
from support.cuda_api import CudaCall, group_of
from support.emulated import log_of
from support.low_memory import STORAGES
from support.low_memory_cuda import DeviceTwins, clipped
from support.steps import EMA_MOMENTUM, RULES, SETTINGS

STREAM = 7


class Training:
    """Variables of every storage in three groups, on an emulated GPU and in the program."""

    def __init__(self, sizes, *, seed=1, average=True, accumulates=False, odd=0):
        self.rng = np.random.default_rng(seed)
        self.twins = [
            DeviceTwins(
                self.rng,
                size,
                storage,
                average=average,
                accumulates=accumulates,
                odd=odd,
                variable=i,
                seed=i % 3 + 2**40,
            )
            for i, (size, storage) in enumerate(zip(sizes, itertools.cycle(STORAGES), strict=False))
        ]
        rules = [RULES[2], RULES[5], RULES[4]]
        self.groups = [
            {**SETTINGS, **rule, "beta_1": beta_1, "clipvalue": clipvalue}
            for rule, beta_1, clipvalue in zip(
                rules, (0.83, 0.0, 0.9), (None, 0.61, None), strict=True
            )
        ]
        self.steps = [1, 2, 2**33]
        self.maximize = [False, True, False]

    def drop_clipvalues(self):
        for group in self.groups:
            group["clipvalue"] = None

    def draw_gradients(self, **options):
        for twins in self.twins:
            twins.draw_gradient(**options)

    def made_groups(self, **device):
        """For the call; `device` are lists of arrays, one a group."""
        return [
            group_of(
                **group,
                step=step,
                maximize=maximize,
                seed=k + 2**40,
                ema_momentum=EMA_MOMENTUM,
                **{name: arrays[k] for name, arrays in device.items()},
            )
            for k, (group, step, maximize) in enumerate(
                zip(self.groups, self.steps, self.maximize, strict=True)
            )
        ]

    def call(self, groups=None, without=(), **settings):
        variables = [
            twins.variable(i % 3, has_grad=i not in without) for i, twins in enumerate(self.twins)
        ]
        return CudaCall(variables, groups or self.made_groups(), **settings)

    def unscaled(self, i, scale=1.0):
        return self.twins[i].unscaled(-scale if self.maximize[i % 3] else scale)

    def step(self, *, scale=1.0, micro_batches=1, without=(), overwrite=False, **clip):
        """Let the program do an update."""
        updated, gradients = [], []
        for i, twins in enumerate(self.twins):
            h = self.unscaled(i, scale) if i not in without else np.zeros(twins.size, np.float32)
            if micro_batches > 1:
                with np.errstate(all="ignore"):
                    h = (twins.accumulator + h) * np.float32(1 / micro_batches)
                twins.accumulator[...] = 0
            elif i in without:
                twins.update_average(self.steps[i % 3], overwrite=overwrite)
                continue
            updated.append(i)
            gradients.append(h)
        for i, h in zip(updated, clipped(gradients, **clip), strict=True):
            settings = {**self.groups[i % 3], "step": self.steps[i % 3]}
            self.twins[i].update(h, overwrite=overwrite, **settings)
        self.steps = [step + 1 for step in self.steps]

    def require_same(self, label):
        for i, twins in enumerate(self.twins):
            twins.require_same(f"{label}: {i}")

    def copies(self):
        return [twins.copies() for twins in self.twins]

    def require_unchanged(self, before, label):
        for i, (twins, copies) in enumerate(zip(self.twins, before, strict=True)):
            twins.require_unchanged(copies, f"{label}: {i}")


SIZES = [1, 255, 256, 257, 700, 1030, 64, 4099, 512]
VARIABLES = [SIZES[i % len(SIZES)] for i in range(2 * len(STORAGES))]
CLIPS = [{}, {"clipnorm": 0.7}, {"global_clipnorm": 0.7}]


# ---- Settings ------------------------------------------------------------------------------------


def check_settings(clip, micro_batches, odd):
    for average, overwrite in ((False, False), (True, False), (True, True)):
        training = Training(
            VARIABLES, seed=odd, average=average, accumulates=micro_batches > 1, odd=odd
        )
        if clip:
            training.drop_clipvalues()
        for step in range(3):
            for batch in range(micro_batches - 1):
                training.draw_gradients()
                skipped = [4] if batch else []
                training.call(
                    without=skipped, grad_scale=0.37, micro_batches=micro_batches, phase=0
                ).step()
                for i, twins in enumerate(training.twins):
                    if i not in skipped:
                        twins.accumulator += training.unscaled(i, 0.37)
            training.draw_gradients(special=step == 1 and not clip)
            # Without a gradient: the average alone, or what was accumulated.
            without = ((3, 26), (), (3, 10, 11, 25, 26, 40))[step]
            if not average and micro_batches == 1:
                without = ()
            settings = {"micro_batches": micro_batches, "overwrite": overwrite, **clip}
            call = training.call(without=without, grad_scale=0.37, **settings)
            training.step(scale=0.37, without=without, **settings)
            call.step()
            training.require_same(f"step {step} with {settings}")


@pytest.mark.parametrize("odd", [0, 2])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_every_combination_of_settings(clip, micro_batches, odd):
    emulated.run(check_settings, clip, micro_batches, odd)


def check_finalize():
    training = Training(VARIABLES)
    training.call(phase=2).step()
    for twins in training.twins:
        twins.update_average(0, overwrite=True)
    training.require_same("the end")


def test_averages_are_written_at_the_end():
    emulated.run(check_finalize)


def check_many_variables(count):
    """Of one storage, more than a table holds, of updates or of the numbers of variables."""
    for storage in (STORAGES[0], STORAGES[-1]):
        rng = np.random.default_rng(count)
        sizes = itertools.islice(itertools.cycle((1, 3, 257, 2, 1100, 7)), count)
        twins = [
            DeviceTwins(rng, size, storage, variable=i, seed=9) for i, size in enumerate(sizes)
        ]
        for one in twins:
            one.draw_gradient()
            one.update(one.unscaled(), step=3, **SETTINGS)
        group = group_of(**SETTINGS, step=3, seed=9, ema_momentum=EMA_MOMENTUM)
        CudaCall([one.variable() for one in twins], [group]).step()
        for i, one in enumerate(twins):
            one.require_same(f"{i} of {count}")


@pytest.mark.parametrize("count", [30, 31, 56, 57, 267, 268, 485])
def test_many_variables(count):
    emulated.run(check_many_variables, count)


# ---- Numbers in device memory --------------------------------------------------------------------


def check_replays(clip):
    training = Training(VARIABLES)
    if clip:
        training.drop_clipvalues()
    training.steps = [1, 3, 7]
    counts = [np.array([n], t) for n, t in zip((0, 2, 6), ("f4", "f8", "i4"), strict=True)]
    scale, found_inf = np.ones(1, np.float32), np.zeros(1, np.float32)
    groups = training.made_groups(device_step=counts)
    for group in groups:
        group.step = -5  # is not looked at
    call = training.call(groups, loss_scale=scale, found_inf=found_inf, **clip)
    before = training.copies()
    call.capture(STREAM)
    training.require_unchanged(before, "a capture")
    for replay in range(8):
        training.draw_gradients()
        scale[0] = (1.0, 1024.0, 3.7)[replay % 3]
        found_inf[0] = replay % 4 == 2
        if found_inf[0]:
            before = training.copies()
            emulated.replay(STREAM)
            training.require_unchanged(before, f"replay {replay}, which was vetoed")
        else:
            training.step(scale=1 / float(scale[0]), **clip)
            emulated.replay(STREAM)
            training.require_same(f"replay {replay}")
        assert [count[0] + 1 for count in counts] == training.steps


@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_replays(clip):
    emulated.run(check_replays, clip)


def check_written_gradients():
    training = Training(VARIABLES)
    scale, found_inf = np.full(1, 3.7, np.float32), np.zeros(1, np.float32)
    factor = 1 / float(scale[0])
    for step in range(3):
        training.draw_gradients(special=step == 1)
        found_inf[0] = step == 2
        before = training.copies()
        settings = {"loss_scale": scale, "found_inf": found_inf}
        call = training.call(**settings, writes_gradients=1)
        call.step()
        if step == 2:
            training.require_unchanged(before, "a veto")
            continue
        training.step(scale=factor)  # of the gradient before it is rounded to be written
        for twins in training.twins:
            with np.errstate(all="ignore"):
                twins.gradient = rounded(twins.unscaled(factor), twins.gradient.dtype)
        training.require_same(f"step {step}")


def test_gradients_are_written_back_unscaled():
    emulated.run(check_written_gradients)


def check_infinite_gradients():
    training = Training(VARIABLES)
    training.draw_gradients()
    training.twins[-1].buffers["grad"][-1] = np.inf
    before = training.copies()
    with pytest.raises(RuntimeError, match="not finite"):
        training.call(require_finite=1).step()
    training.require_unchanged(before, "an infinite gradient")
    training.draw_gradients()
    training.call(require_finite=1).step()
    training.step()
    training.require_same("a finite gradient")


def test_an_infinite_gradient_changes_nothing():
    emulated.run(check_infinite_gradients)


# ---- Launches ------------------------------------------------------------------------------------


def check_launches():
    rng = np.random.default_rng(1)
    groups, numbers, update, average = (
        f"launch {name} on device 0 stream {STREAM}"
        for name in ("groups", "numbers", "update", "average")
    )
    float32 = DeviceTwins(rng, 5, ("float32", "float32", 8, "nearest")).variable()
    half = DeviceTwins(rng, 5, ("bfloat16", "bfloat16", 32, "remainder")).variable()
    plain = DeviceTwins(rng, 5, ("float32", "float32", 32, "nearest")).variable()
    group = group_of(**SETTINGS)
    on_device = group_of(**SETTINGS, device_step=np.zeros(1, np.float32))

    def log(variables, group=group, **settings):
        return log_of(CudaCall(variables, [group], **settings).step)

    assert log([plain]) == [update]
    assert log([float32]) == log([float32] * 30) == [numbers, update]
    assert log([float32, half, plain]) == [numbers, update, update, update]
    assert log([float32, half], on_device) == [groups, numbers, update, update]
    assert log([float32] * 485) == [numbers, numbers, update, update]
    assert log([float32, half], phase=2) == [average, average]


def test_launches():
    emulated.run(check_launches)


def check_zero_steps():
    """As a host cannot be told: the weights are NaN, and nothing hangs."""
    twins = DeviceTwins(np.random.default_rng(1), 300, ("float32", "float32", 16, "nearest"))
    twins.draw_gradient()
    group = group_of(**SETTINGS, device_step=np.array([-3.0], np.float32))
    CudaCall([twins.variable()], [group]).step()
    assert_same_bits(twins.buffers["param"], np.full(300, np.nan, np.float32), "weights")


def test_wrong_counts():
    emulated.run(check_zero_steps)
