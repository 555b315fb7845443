"""Settings: refused values and their messages, good ones, learning rates, configs, threads."""

import inspect
import json
import math
import os
import re
import subprocess
import sys
from fractions import Fraction
from importlib.metadata import version

import adamax_ext
import numpy as np
import pytest
from adamax_ext import Adamax, _core, schedules

LEAST, BELOW_ONE = math.ulp(0.0), math.nextafter(1.0, 0.0)
NOT_NUMBERS = (True, np.True_, "0.1", [0.1], 1j, np.array([0.1]), {})
WRONG_TYPE = (TypeError, ValueError)
NOT_FINITE = (math.nan, np.float32("nan"), math.inf, -math.inf, 10**400)
NOT_INTEGERS = (2.0, np.float64(2), "2", True, math.nan, [2], -3, 0)
# Arguments, what else is refused with ValueError, good values at the edges.
REAL = [
    (("learning_rate",), (-LEAST, -1), (0, 0.0, 1, np.float16(0.5), Fraction(1, 2))),
    (("beta_1", "beta_2"), (-LEAST, 1, 1.5), (0, BELOW_ONE, np.float32(0.5))),
    (("epsilon",), (0, -0.0, -1e-7), (LEAST, 1, np.float64(0.5))),
    (("weight_decay",), (-LEAST, -1), (0, 0.5, None)),
    (("clipnorm", "clipvalue", "global_clipnorm"), (0, -1.0), (LEAST, 1, 1e300, None)),
    (("ema_momentum",), (-LEAST, math.nextafter(1, 2)), (0, 1, 0.5)),
    (("loss_scale_factor",), (0, -2.0), (1, 2**15, 0.5, None)),
]
INTEGERS = [("ema_overwrite_frequency", 1), ("gradient_accumulation_steps", 2)]
FIXED = ("use_ema", "gradient_accumulation_steps")  # once built
OPTIONAL = {name for name, p in inspect.signature(Adamax).parameters.items() if p.default is None}


def bad_settings():
    for names, out_of_range, _ in REAL:
        for name in names:
            nothing = () if name in OPTIONAL else (None,)
            yield from ((name, value, WRONG_TYPE) for value in (*NOT_NUMBERS, *nothing))
            yield from ((name, value, ValueError) for value in (*NOT_FINITE, *out_of_range))
    for name, least in INTEGERS:
        yield from ((name, value, ValueError) for value in (*NOT_INTEGERS, least - 1))
    yield from (("use_ema", value, TypeError) for value in (0, 1, "yes", None))
    yield from (("name", value, TypeError) for value in (None, 3, b"adamax"))


def named(table):
    return [pytest.param(*row, id=f"{row[0]}={row[1]!r:.20}") for row in table]


@pytest.mark.parametrize(("name", "value", "error"), named(bad_settings()))
def test_refused_settings(name, value, error):
    message = rf"^{name} must be .*; received {re.escape(repr(value))}$"
    with pytest.raises(error, match=message):
        Adamax(**{name: value})
    optimizer = Adamax()
    before = optimizer.get_config()
    with pytest.raises(error, match=message):
        setattr(optimizer, name, value)
    optimizer.build([np.ones(3)])
    if name not in FIXED:
        with pytest.raises(error, match=message):
            setattr(optimizer, name, value)
    assert optimizer.get_config() == before


@pytest.mark.parametrize(
    ("name", "value"),
    named(
        [(name, value) for names, _, good in REAL for name in names for value in good]
        + [(name, value) for name, least in INTEGERS for value in (None, least, np.int32(7), 2**40)]
        + [("use_ema", True), ("use_ema", np.False_), ("name", "")]
    ),
)
def test_good_settings(name, value):
    optimizer, assigned = Adamax(**{name: value}), Adamax()
    setattr(assigned, name, value)
    for each in (optimizer, assigned):
        stored = getattr(each, name)
        assert stored == value
        assert type(stored) in (type(None), float, int, bool, str)  # what a config can hold
        assert each.apply([np.ones(3)], [np.ones(3)]) == 1


def test_at_most_one_clip():
    clips = {"clipnorm": 1.0, "clipvalue": 2.0, "global_clipnorm": 3.0}
    for left_out in (*clips, None):
        given = {name: None if name == left_out else value for name, value in clips.items()}
        received = ", ".join(f"{name}={value}" for name, value in given.items())
        with pytest.raises(ValueError, match=f"^at most one of .*; received {received}$"):
            Adamax(**given)


def test_at_most_one_clip_by_assignment():
    optimizer = Adamax(clipnorm=1.0)
    for build in (False, True):
        if build:
            optimizer.build([np.ones(3)])
        for name in ("clipvalue", "global_clipnorm"):
            with pytest.raises(ValueError, match=rf"^at most one .*clipnorm=1\.0.* {name}=2\.0"):
                setattr(optimizer, name, 2)
            assert (optimizer.clipnorm, getattr(optimizer, name)) == (1, None)
    optimizer.clipnorm = None
    optimizer.clipvalue = 2


ASSIGNED = [
    *({name: 0.25} for name in ("beta_1", "beta_2", "epsilon", "weight_decay", "ema_momentum")),
    *({name: 0.5} for name in ("clipnorm", "clipvalue", "global_clipnorm", "loss_scale_factor")),
    {"ema_overwrite_frequency": 2},
]


@pytest.mark.parametrize("settings", ASSIGNED, ids=str)
def test_assigned_settings_take_effect_with_the_next_call(settings):
    def trained(early, late):
        parameters = [np.ones(3), np.ones(2)]
        optimizer = Adamax(use_ema=True, **early)
        optimizer.exclude_from_weight_decay(var_names=["1"])
        optimizer.build(parameters)
        begin = optimizer.state_dict()
        for step in range(8):
            if step == 3:  # begin anew, with other settings
                for name, value in late.items():
                    setattr(optimizer, name, value)
                optimizer.load_state_dict(begin)
                for parameter in parameters:
                    parameter[...] = 2
            optimizer.apply([np.arange(3.0) + 9 - step, np.full(2, 0.125)])
        return bits(*parameters, *optimizer.variables)

    assert trained({}, settings) == trained(settings, {}) != trained({}, {})


@pytest.mark.parametrize("value", [True, False, None, 2, 3])
@pytest.mark.parametrize("name", FIXED)
def test_what_has_arrays_is_fixed_by_build(name, value):
    optimizer = Adamax(use_ema=True, gradient_accumulation_steps=2)
    optimizer.build([np.ones(3)])
    before = optimizer.get_config()
    error = TypeError if name == "use_ema" and value not in (True, False) else ValueError
    with pytest.raises(error, match=rf"^{name} "):
        setattr(optimizer, name, value)
    assert optimizer.get_config() == before


@pytest.mark.parametrize("keyword", ["lr", "decay", "amsgrad", "beta1", "foreach"])
def test_unknown_keywords(keyword):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
        Adamax(**{keyword: 0.1})


def test_arguments_and_defaults():
    parameters = inspect.signature(Adamax).parameters
    assert " ".join(parameters) == (
        "learning_rate beta_1 beta_2 epsilon weight_decay clipnorm clipvalue global_clipnorm "
        "use_ema ema_momentum ema_overwrite_frequency loss_scale_factor "
        "gradient_accumulation_steps name"
    )
    defaults = [parameter.default for parameter in parameters.values()]
    assert defaults[:4] == [0.001, 0.9, 0.999, 1e-7]
    assert defaults[4:] == [None] * 4 + [False, 0.99] + [None] * 3 + ["adamax"]


# ---- The learning rate ---------------------------------------------------------------------------

SCHEDULE = schedules.ExponentialDecay(0.5, 10, 0.25)


class Schedule(schedules.LearningRateSchedule):
    def __init__(self, fn):
        self.fn = fn

    def __call__(self, step):
        return self.fn(step)


def kind(rate):
    return type(rate).__name__


def bits(*arrays):
    return [array.tobytes() for array in arrays]


@pytest.mark.parametrize("new", [0, 0.25, np.float32(0.5), SCHEDULE, lambda: 0.125], ids=kind)
@pytest.mark.parametrize("old", [0.5, SCHEDULE, lambda: 0.75], ids=kind)
def test_the_rate_can_be_set_but_no_number_replaces_another_kind(old, new):
    optimizer = Adamax(old)
    before = optimizer.learning_rate
    if isinstance(old, float) or callable(new):
        optimizer.learning_rate = new
        assert optimizer.learning_rate == (new(*[0] * (new is SCHEDULE)) if callable(new) else new)
    else:
        message = f"learning_rate is {old!r}, which a number ({new!r}) cannot replace: it would be"
        with pytest.raises(TypeError, match=re.escape(message)):
            optimizer.learning_rate = new
        assert optimizer.learning_rate == before


@pytest.mark.parametrize("value", [-1, math.nan, "0.1", None, True], ids=repr)
def test_a_refused_rate_leaves_the_old_one(value):
    optimizer = Adamax(0.5)
    with pytest.raises((TypeError, ValueError), match=r"^learning_rate must be a number >= 0, a"):
        optimizer.learning_rate = value
    assert optimizer.learning_rate == 0.5


@pytest.mark.parametrize("steps", [None, 3])
def test_when_rates_are_evaluated(steps):
    seen, parameters = [], [np.ones(3), np.ones(2)]
    callable_rate = Adamax(lambda: seen.append("call") or 0.1, gradient_accumulation_steps=steps)
    schedule = Schedule(lambda step: seen.append(step) or 0.1)
    scheduled = Adamax(schedule, gradient_accumulation_steps=steps)
    for optimizer in (callable_rate, scheduled):
        for _ in range(6):
            optimizer.apply([np.ones(3), np.ones(2)], parameters)
    # Once an update, for all variables; a schedule sees the completed calls, micro-batches too.
    assert seen == ["call"] * (6 // (steps or 1)) + ([2, 5] if steps else [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("rate", [np.float32(0.25), np.array(0.25), Fraction(1, 4)], ids=kind)
def test_what_a_callable_may_return(rate):
    parameters = [np.ones(3), np.ones(3)]
    Adamax(lambda: rate).apply([np.ones(3)], parameters[:1])
    Adamax(0.25).apply([np.ones(3)], parameters[1:])
    assert bits(parameters[0]) == bits(parameters[1])


BAD_RATES = (math.nan, -0.5, math.inf, "fast", "0.1", None, 1j, [0.1], np.ones(2), 10**400)


@pytest.mark.parametrize("rate", BAD_RATES, ids=lambda rate: f"{rate!r:.20}")
@pytest.mark.parametrize("make", [lambda get: lambda: get(0), Schedule], ids=["", "schedule"])
def test_a_bad_rate_changes_nothing(make, rate):
    rates = [0.1, rate, 0.1]
    parameter, gradient = np.ones(3), np.full(3, 0.5)
    optimizer = Adamax(make(lambda _: rates.pop(0)), use_ema=True)
    optimizer.apply([gradient], [parameter])
    watched = [parameter, gradient, *optimizer.variables]
    before = bits(*watched)
    with pytest.raises((TypeError, ValueError, OverflowError)) as caught:
        optimizer.apply([gradient])
    assert bits(*watched) == before
    assert (optimizer.calls, optimizer.iterations) == (1, 1)
    assert optimizer.apply([gradient]) == 2
    assert re.match("learning_rate must be .*; received", str(caught.value))


def test_an_error_of_a_callable_comes_through():
    optimizer, parameter = Adamax(lambda: 1 / 0), np.ones(3)
    with pytest.raises(ZeroDivisionError):
        optimizer.apply([np.ones(3)], [parameter])
    assert (optimizer.calls, parameter.tolist()) == (0, [1, 1, 1])


# ---- Configs -------------------------------------------------------------------------------------

CONFIGS = [
    {},
    {"learning_rate": 0.5, "beta_1": 0.25, "beta_2": 0.75, "epsilon": 0.125, "name": "mine"},
    {"weight_decay": 0.5, "clipnorm": 2.0, "use_ema": True, "ema_momentum": 0.5},
    {"clipvalue": 2.0, "ema_overwrite_frequency": 3, "loss_scale_factor": 4.0},
    {"global_clipnorm": 2.0, "gradient_accumulation_steps": 5, "learning_rate": SCHEDULE},
]


@pytest.mark.parametrize("settings", CONFIGS, ids=range(len(CONFIGS)))
def test_config_round_trip(settings):
    class Mine(Adamax):
        pass

    config = Adamax(**settings).get_config()
    assert set(config) == set(inspect.signature(Adamax).parameters)
    assert {**config, **settings, "learning_rate": 0} == {**config, "learning_rate": 0}
    text = json.dumps(config)
    optimizer = Mine.from_config(config)
    assert type(optimizer) is Mine
    assert json.dumps(config) == text  # as it was
    assert json.dumps(optimizer.get_config()) == text
    assert optimizer.learning_rate == Adamax(**settings).learning_rate


def test_what_has_no_config():
    with pytest.raises(TypeError, match=r"^a callable learning rate \(.*\) has no config; exp"):
        Adamax(lambda: 0.1).get_config()
    with pytest.raises(ValueError, match=r"^beta_1 must be"):
        Adamax.from_config({**Adamax().get_config(), "beta_1": 2.0})
    with pytest.raises(TypeError, match="amsgrad"):
        Adamax.from_config({**Adamax().get_config(), "amsgrad": True})


# ---- The functional layer and the process --------------------------------------------------------

BAD_ARGUMENTS = {
    "step": (0, -1, 1.0, "1", None, 2**63),
    "learning_rate": (-0.5, math.nan, math.inf, "0.1", None),
    "beta_1": (1, -0.5, math.nan, "0.1"),
    "beta_2": (1, -0.5, math.nan, "0.1"),
    "epsilon": (0, -1, math.nan, math.inf, "0.1"),
    "weight_decay": (-1, math.nan, math.inf, "0.1"),
    "decay": ("L2", "", None, True),
    "epsilon_mode": ("in", "", None, True),
    "grad_scale": (math.nan, math.inf, "0.1", None),
    "clipvalue": (0, -1, math.nan, math.inf, "0.1"),
    "ema_momentum": (-0.5, 1.5, math.nan, "0.1", None),
}


REFUSED = [(name, value) for name, values in BAD_ARGUMENTS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), named(REFUSED))
def test_update_refuses_settings(name, value):
    buffers = {role: np.ones(3) for role in ("param", "grad", "m", "u", "average")}
    with pytest.raises((TypeError, ValueError)) as caught:
        adamax_ext.update(**buffers, **{"step": 1, name: value})
    assert all((buffer == 1).all() for buffer in buffers.values())
    shown = repr(value) if isinstance(value, (str, type(None))) else str(value)
    assert re.match(f"{name} must be .*; received {re.escape(shown)}", str(caught.value))


def test_an_epsilon_of_0_is_legal_inside_of_the_maximum():
    param, grad, m, u = np.ones(3), np.full(3, 0.5), np.zeros(3), np.zeros(3)
    adamax_ext.update(
        param, grad, m, u, step=1, learning_rate=0.25, epsilon=0, epsilon_mode="inside"
    )
    assert (param.tolist(), u.tolist()) == ([0.75] * 3, [0.5] * 3)


def test_update_refuses_unknown_and_missing_arguments():
    buffers = [np.ones(3) for _ in range(4)]
    with pytest.raises(TypeError, match="'lr'"):
        adamax_ext.update(*buffers, step=1, lr=0.1)
    with pytest.raises(TypeError, match="'step'"):
        adamax_ext.update(*buffers)
    with pytest.raises(TypeError, match="positional"):
        adamax_ext.update(*buffers, 1)


@pytest.mark.parametrize("n", [0, -1, 1.5, 2.0, "2", None, True], ids=repr)
def test_set_num_threads_refuses(n):
    before = adamax_ext.get_num_threads()
    with pytest.raises((TypeError, ValueError), match=f"^n must be .*; received {n!r}$"):
        adamax_ext.set_num_threads(n)
    assert adamax_ext.get_num_threads() == before


def test_build_info():
    info = adamax_ext.build_info()
    keys = "version compiler flags isas_built isa_active openmp cuda_architectures"
    assert " ".join(info) == keys
    assert info["version"] == adamax_ext.__version__ == version("adamax_ext")
    assert info["isa_active"] == adamax_ext.active_isa()
    assert "scalar" in adamax_ext.available_isas()
    assert set(adamax_ext.available_isas()) <= set(info["isas_built"])
    assert "-ffp-contract=off" in info["flags"]
    assert type(info["openmp"]) is bool


CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
QUOTA = _core._cgroup_cpu_limit("/proc/self/cgroup", "/sys/fs/cgroup") or CPUS
LIMIT = min(CPUS, QUOTA)
EIGHT = "adamax_ext._core._override_cpu_limit(8);"
ONE_CPU = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
SET = "adamax_ext.set_num_threads"


@pytest.mark.skipif(not adamax_ext.build_info()["openmp"], reason="this build has one thread")
@pytest.mark.parametrize(
    ("ours", "openmp", "code", "expected"),
    [
        (None, None, "", LIMIT),
        ("1000", None, "", LIMIT),
        (None, "1000", f"{SET}(1000);", LIMIT),
        (None, None, EIGHT, 8),
        ("3", None, EIGHT, 3),
        (None, "5", EIGHT, 5),
        (None, "5,2", EIGHT, 5),
        ("3", "5", EIGHT, 3),
        ("0", "5", EIGHT, 5),
        ("3", "5", EIGHT + f"{SET}(4);", 4),
        ("3", "5", EIGHT + f"{SET}(9);", 8),
        pytest.param("3", None, ONE_CPU + f"{SET}(4);", 1, id="affinity"),
    ],
)
def test_number_of_threads(ours, openmp, code, expected):
    if "setaffinity" in code and not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity")
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    given = {"ADAMAX_EXT_NUM_THREADS": ours, "OMP_NUM_THREADS": openmp}
    environment |= {name: value for name, value in given.items() if value is not None}
    script = f"import adamax_ext; {code} print(adamax_ext.get_num_threads())"
    assert (
        subprocess.check_output([sys.executable, "-c", script], env=environment)
        == b"%d\n" % expected
    )


V2, V1 = "0::/a/b\n", "12:pids:/z\n4:cpu,cpuacct:/a/b\n3:cpuset:/c\n"


def v1(folder, quota, period=100000):
    values = {"quota": quota, "period": period}
    return {f"{folder}/cpu.cfs_{name}_us": f"{value}\n" for name, value in values.items()}


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (None, {"cpu.max": "100000 100000"}, 0),
        ("", {"cpu.max": "100000 100000"}, 0),
        ("nonsense\n\n:\n", {"cpu.max": "100000 100000"}, 0),
        (V2, {}, 0),
        (V2, {"a/b/cpu.max": "max 100000\n"}, 0),
        (V2, {"a/b/cpu.max": "200000 100000\n"}, 2),
        (V2, {"a/b/cpu.max": "150000 100000\n"}, 2),
        (V2, {"a/b/cpu.max": "1000 100000\n"}, 1),
        (V2, {"a/b/cpu.max": "300000 50000\n"}, 6),
        (V2, {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        (V2, {"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000"}, 3),
        (V2, {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2),
        (V2, {"cpu.max": "500000 100000"}, 5),  # of a container, which sees no other folder
        (V2, {"a/b/c/cpu.max": "100000 100000", "other/cpu.max": "100000 100000"}, 0),
        ("0::/\n", {"cpu.max": "500000 100000"}, 5),
        (V1, {}, 0),
        (V1, v1("cpu/a/b", -1), 0),
        (V1, v1("cpu/a/b", 250000), 3),
        (V1, v1("cpu/a/b", -1) | v1("cpu/a", 200000), 2),
        (V1, v1("cpu/a/b", 400000) | v1("cpu/a", 200000), 2),
        (V1, v1("cpu", 200000, 50000), 4),
        (V1, v1("cpuset/c", 100000) | v1("cpu/c", 100000) | v1("cpu/z", 100000), 0),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "100000"}, 0),
        (V1 + V2, v1("cpu/a/b", 400000) | {"a/b/cpu.max": "300000 100000"}, 3),
        (V1 + V2, v1("cpu/a/b", 200000) | {"a/b/cpu.max": "300000 100000"}, 2),
    ],
)
def test_cgroup_limit(membership, files, expected, tmp_path):
    (tmp_path / "mount").mkdir()
    if membership is not None:
        (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    limit = _core._cgroup_cpu_limit(str(tmp_path / "cgroup"), str(tmp_path / "mount"))
    assert limit == expected
