"""Settings: refused values and their messages, good ones, learning rates, configs."""

import inspect
import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
from adamax_ext import Adamax, schedules

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
        "gradient_accumulation_steps name state_bits weight_rounding seed"
    )
    defaults = [parameter.default for parameter in parameters.values()]
    assert defaults[:4] == [0.001, 0.9, 0.999, 1e-7]
    assert defaults[4:] == [None] * 4 + [False, 0.99] + [None] * 3 + ["adamax", 32, "nearest", 0]


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
    {"state_bits": 8, "weight_rounding": "remainder", "seed": 2**64 - 1},
]
NOT_OF_KERAS = {"state_bits", "weight_rounding", "seed"}  # and in no config if they are defaults


@pytest.mark.parametrize("settings", CONFIGS, ids=range(len(CONFIGS)))
def test_config_round_trip(settings):
    class Mine(Adamax):
        pass

    config = Adamax(**settings).get_config()
    unset = NOT_OF_KERAS - settings.keys()
    assert set(config) == set(inspect.signature(Adamax).parameters) - unset
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
