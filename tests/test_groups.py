"""Groups: one native call with settings of each variable has the bits of one `update` each."""

import itertools
import re

import numpy as np
import pytest
from adamax_ext import _core
from support import emulated, reference
from support.bits import PAIRS, assert_same_bits, bits, is_testable, spread
from support.emulated import TableArray
from support.isas import each_thread_count, every_isa, run_on
from support.memory import unaligned
from support.steps import EMA_MOMENTUM, SETTINGS, do_update, expected_update, native, random_arrays

SIZES = [0, 1, 17, 255, 4097, 3, 70_001, 64, 1001, 65_537, 2]
OFFSETS = [0, 1, 4, 13, 2]  # bytes


def settings_of(k):
    """Settings of group `k`, in all of which it differs from its neighbours."""
    return {
        "learning_rate": 0.0031 * (k % 50 + 1),
        "beta_1": 0.13 * (k % 8),
        "beta_2": 0.999 - 0.03 * (k % 9),
        "epsilon_mode": ("inside", "outside")[k % 2],
        "epsilon": 0.0 if k % 4 == 2 else 1e-5 * (k + 1),
        "weight_decay": (0.1, 0.0, 0.23)[k % 3],
        "decay": ("l2", "decoupled")[k // 2 % 2],
        "clipvalue": (0.4, None, 0.9, 1.7)[k // 3 % 4],
        "ema_momentum": 0.05 + 0.017 * (k % 50),
        "step": (1, 5, 1000, 2**40)[k % 4] + k // 4,
    }


def is_ascending(k):
    return k % 5 == 3


def plan_of(variables, groups, place=np.asarray):
    """Return a plan for variables, each with the arrays of `update` and perhaps an accumulator."""

    def all_of(role):
        return [place(arrays[role]) for arrays in variables] if role in variables[0] else None

    return _core.Plan(
        tuple(all_of("param")),
        [f"v{i}" for i in range(len(variables))],
        groups,
        momentum=all_of("m"),
        norm=all_of("u"),
        averages=all_of("average"),
        accumulators=all_of("accumulator"),
    )


def check_groups(num_variables, num_groups, pairs=PAIRS, place=np.asarray):
    """Return what the device was asked in each step, if `place` is that of an emulated one."""
    rng, logs, scale = np.random.default_rng(8), [], -0.37
    pairs = itertools.cycle(filter(lambda pair: is_testable(*pair), pairs))
    sizes = itertools.cycle(SIZES) if num_variables < 100 else itertools.repeat(5)
    chosen = [i * 3 % num_groups for i in range(num_variables)]
    dtypes, ours, theirs = [], [], []
    for size, pair, _ in zip(sizes, pairs, chosen, strict=False):
        arrays = random_arrays(rng, size, *pair)
        dtypes.append(arrays["grad"].dtype)
        theirs.append(arrays)
        ours.append({role: unaligned(a, rng.choice(OFFSETS))[0] for role, a in arrays.items()})
    plan = plan_of(ours, chosen, place)
    for steps in range(3):
        settings = [settings_of(k) for k in range(num_groups)]
        for k, group in enumerate(settings):
            group["step"] += steps * (k + 1)
        native_groups = [
            native(_core.Group, **group, maximize=is_ascending(k))
            for k, group in enumerate(settings)
        ]
        for mine, other, dtype in zip(ours, theirs, dtypes, strict=True):
            other["grad"] = spread(rng, other["grad"].size, dtype)
            mine["grad"] = unaligned(other["grad"], rng.choice(OFFSETS))[0]
        grads = tuple(place(arrays["grad"]) for arrays in ours)
        call = native(_core.Call, grad_scale=scale)

        def step(grads=grads, groups=native_groups, call=call):
            assert plan.step(grads, None, groups, call)

        logs.append(step() if place is np.asarray else emulated.log_of(step))
        for i, (k, mine, other) in enumerate(zip(chosen, ours, theirs, strict=True)):
            do_update(other, grad_scale=-scale if is_ascending(k) else scale, **settings[k])
            for role, array in other.items():
                assert_same_bits(mine[role], array, f"{role} of variable {i}, {settings[k]}")
    assert plan.calls == 3
    return logs


def check_groups_with_threads():
    for _ in each_thread_count():
        check_groups(40, 7)


@every_isa
def test_groups_are_steps_of_their_own(isa):
    run_on(isa, check_groups_with_threads)


@pytest.mark.parametrize("groups", [[(0.8, 3), (0.8, 4), (0.6, 4), (0.6, 4), (0.8, 3)]], ids=str)
def test_groups_that_share_a_beta_or_a_step_with_the_one_before(groups):
    variables = [random_arrays(np.random.default_rng(i), 9, "float32", "float32") for i in range(5)]
    expected = [
        expected_update(arrays, **{**SETTINGS, "beta_1": beta_1}, step=step)
        for arrays, (beta_1, step) in zip(variables, groups, strict=True)
    ]
    settings = [{**SETTINGS, "beta_1": beta_1, "step": step} for beta_1, step in groups]
    native_groups = [native(_core.Group, **each, ema_momentum=EMA_MOMENTUM) for each in settings]
    grads = tuple(arrays["grad"] for arrays in variables)
    plan_of(variables, range(5)).step(grads, None, native_groups, _core.Call())
    for mine, wanted, group in zip(variables, expected, groups, strict=True):
        assert_same_bits(mine["param"], wanted["param"], f"weights of {group}")


def check_launches():
    TableArray.current_stream = 9  # other tests change it
    update = "launch update on device 0 stream 9"
    storages = sum(is_testable(*pair) for pair in PAIRS)
    logs = check_groups(40, 7, place=TableArray)
    assert logs == [[update] * storages] * 3, logs
    logs = check_groups(40, 23, place=TableArray)  # of float32 and of float64
    more = ["upload", "upload", *[update] * storages]
    assert logs == [more] * 3, logs
    logs = check_groups(200, 200, [("float32", "float32")], TableArray)
    assert logs == [["upload", update]] * 3, logs


def test_one_launch_for_all_groups():
    emulated.run(check_launches)


def check_ascent(place):
    """Ascending is descending with the opposite gradients, accumulated and clipped too."""
    for clip in ({}, {"clipnorm": 0.3}, {"global_clipnorm": 0.4}):
        rng, runs = np.random.default_rng(6), []
        start = [random_arrays(rng, size, "float32", "float32") for size in (5, 4099)]
        grads = [[spread(rng, size, np.float32) for size in (5, 4099)] for _ in range(4)]
        for sign in (1, -1):
            variables = [{role: a.copy() for role, a in arrays.items()} for arrays in start]
            for arrays in variables:
                arrays["accumulator"] = np.zeros_like(arrays["m"])
            plan = plan_of(variables, [0, 1], place)
            for call, some in enumerate(grads):
                shared = {**SETTINGS, "step": call // 2 + 1}
                groups = [
                    native(_core.Group, **shared, maximize=sign < 0),
                    native(_core.Group, **shared, maximize=sign > 0),
                ]
                what = {**clip, "micro_batches": 2, "accumulate_only": call % 2 == 0}
                signed = (place(sign * some[0]), place(-sign * some[1]))
                assert plan.step(signed, None, groups, native(_core.Call, **what))
            runs.append(variables)
        for ours, theirs in zip(*runs, strict=True):
            for role in ("param", "m", "u", "average"):
                assert_same_bits(ours[role], theirs[role], f"{role} with {clip}")
        assert not np.array_equal(runs[0][0]["param"], start[0]["param"])


def test_ascent():
    check_ascent(np.asarray)


def test_ascent_on_a_gpu():
    emulated.run(check_ascent, TableArray)


# ---- Refusals ------------------------------------------------------------------------------------

# What is wrong with the last group, with the call, and the message.
REFUSED = [
    ({"epsilon": 0.0}, {}, "epsilon must be finite and > 0; received 0"),
    ({"epsilon": -1e-9, "epsilon_mode": "inside"}, {}, "epsilon must be finite and >= 0; received"),
    ({"learning_rate": np.nan}, {}, "learning_rate must be finite; received nan"),
    ({"learning_rate": -np.inf}, {}, "learning_rate must be finite; received -inf"),
    ({"beta_1": 1.0}, {}, "beta_1 must be in [0, 1); received 1"),
    ({"beta_2": -0.1}, {}, "beta_2 must be in [0, 1); received -0.1"),
    ({"weight_decay": np.inf}, {}, "weight_decay must be finite and >= 0; received inf"),
    ({"clipvalue": 0.0}, {}, "clipvalue must be finite and > 0; received 0"),
    ({"clipvalue": 1.0}, {"clipnorm": 1.0}, "clipvalue must be unset where a norm is clipped"),
    ({"ema_momentum": 1.5}, {}, "ema_momentum must be in [0, 1]; received 1.5"),
    ({"step": 0}, {}, "step must be >= 1; received 0"),
    ({}, {"clipnorm": 0.0}, "clipnorm must be finite and > 0; received 0"),
    ({}, {"global_clipnorm": np.nan}, "global_clipnorm must be finite and > 0; received nan"),
    ({}, {"grad_scale": np.inf}, "grad_scale must be finite, or NaN; received inf"),
    ({}, {"micro_batches": 0}, "micro_batches must be >= 1; received 0"),
    ({}, {"micro_batches": 2}, "variables[0] must have an accumulator when gradients are accum"),
    ({}, {"accumulate_only": True}, "variables[0] must have an accumulator when gradients are"),
    ({}, {"overwrite": True}, "variables[0] must have an average to be overwritten with it"),
    (None, {}, "variables[2] must have a group below the number of groups, 2; received 2"),
]


@pytest.mark.parametrize(("group", "call", "message"), REFUSED, ids=[row[2] for row in REFUSED])
def test_a_refused_group_changes_nothing(group, call, message):
    variables = [random_arrays(np.random.default_rng(i), 5, "float32", "float32") for i in range(3)]
    for arrays in variables:
        del arrays["average"]
    plan, before = plan_of(variables, [0, 1, 2]), repr(variables)
    good = [native(_core.Group) for _ in range(3)]
    bad = good[:2] if group is None else [*good[:2], native(_core.Group, **group)]
    grads = tuple(arrays["grad"] for arrays in variables)
    where = r".* \(in groups\[2\]\)$" if group else ""
    with pytest.raises(ValueError, match="^" + re.escape(message) + where):
        plan.step(grads, None, bad, native(_core.Call, **call))
    assert (repr(variables), plan.calls) == (before, 0)
    assert plan.step(grads, None, good, _core.Call())


@pytest.mark.parametrize("name", ["decay", "epsilon_mode"])
def test_a_refused_word(name):
    for wrong in ("L2", "", None, 1):
        with pytest.raises(ValueError, match=f"^{name} must be '.*' or '.*'; received {wrong!r}$"):
            native(_core.Group, **{name: wrong})


# ---- The sign of a scale -------------------------------------------------------------------------


def check_negative_scale(place):
    for clip, size, scale in itertools.product(
        ({}, {"clipnorm": 1.7}, {"global_clipnorm": 1e30}), (1e30, 1e20), (-1e10, 1e10)
    ):
        arrays = random_arrays(np.random.default_rng(4), 70, "float32", "float32")
        arrays["grad"][...] *= np.float32(size)
        before = arrays["grad"].copy()
        with np.errstate(all="ignore"):  # finite as it was passed, which is what counts
            h = arrays["grad"] * np.float32(scale)
            norm = reference.global_norm([h])
            if "clipnorm" in clip:
                h *= np.float32(1.7 / max(norm, 1.7))
            elif clip:
                h *= np.float32(min(1e30 / norm, 1.0) if np.isfinite(norm) else np.nan)
        expected = expected_update({**arrays, "grad": h}, step=3, **SETTINGS, ema_momentum=0.99)
        plan = plan_of([arrays], [0], place)
        call = native(_core.Call, **clip, grad_scale=scale, require_finite=True)
        group = native(_core.Group, step=3, **SETTINGS)
        assert plan.step((place(arrays["grad"]),), None, [group], call) is True
        for role in ("param", "m", "u", "average"):
            assert_same_bits(arrays[role], expected[role], f"{role} with {clip}, {scale}")
        assert_same_bits(arrays["grad"], before, "the gradient")
        arrays["grad"][3] = np.inf
        before = {role: bits(array) for role, array in arrays.items()}
        assert plan.step((place(arrays["grad"]),), None, [group], call) is False
        assert all((bits(arrays[role]) == old).all() for role, old in before.items())
        assert plan.calls == 1


@every_isa
def test_a_scale_may_be_negative_with_finite_gradients(isa):
    run_on(isa, check_negative_scale, np.asarray)


def test_a_scale_may_be_negative_on_a_gpu():
    emulated.run(check_negative_scale, TableArray)
