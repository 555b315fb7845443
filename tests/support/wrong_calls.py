"""Calls of an optimizer that must be refused with nothing changed, by what is wrong with them.

Each is a function of a `Trained` and of the name of a variable that is not empty. It returns the
call, or None where there is nothing wrong with it.
"""

from functools import partial

import numpy as np
from adamax_ext import checkpoint

# What a call may raise; the division by zero is that of a generator of gradients.
REFUSALS = (TypeError, ValueError, BufferError, OSError, ZeroDivisionError)

NAN, INF = float("nan"), float("inf")


class Trained:
    """An optimizer, its weights by name, gradients that fit, and a path that nobody uses."""

    def __init__(self, optimizer, inner, weights, gradients, path):
        self.optimizer, self.inner = optimizer, inner  # without a loss scale they are one
        self.weights, self.gradients, self.path = weights, gradients, path

    def apply(self, gradients=None, weights=None):
        gradients = self.gradients | (gradients or {})
        variables = None if weights is None else list((self.weights | weights).values())
        return partial(self.optimizer.apply, list(gradients.values()), variables)

    @property
    def updates(self):
        steps = self.inner.gradient_accumulation_steps or 1
        return (self.inner.calls + 1) % steps == 0


def with_gradient(change):
    return lambda t, name: t.apply({name: change(t.gradients[name])})


def with_variable(change):
    return lambda t, name: t.apply(weights={name: change(t.weights[name])})


def with_memory_of(kind):
    def call(t, name):
        array = t.inner.state[name].get(kind)
        fits = array is not None and array.dtype == t.gradients[name].dtype
        return t.apply({name: array}) if fits else None

    return call


def with_rate(rate):
    """Apply while the optimizer has this rate."""

    def call(t, name):
        before = t.inner.progress.learning_rate

        def apply():
            t.inner.learning_rate = rate
            try:
                t.apply()()
            finally:
                t.inner.progress.learning_rate = before

        is_number = isinstance(rate, float)
        if not t.updates or t.weights[name].dtype == np.float64 or t.gradients[name] is None:
            return None
        return None if is_number and not isinstance(before, float) else apply

    return call


def read_only(array):
    view = array.view()
    view.flags.writeable = False
    return view


APPLY = {
    "one gradient": lambda t, name: partial(t.optimizer.apply, t.gradients[name]),
    "one too many": lambda t, name: t.apply({"more": t.gradients[name]}),
    "all None": lambda t, name: t.apply(dict.fromkeys(t.gradients)),
    "all None but a wrong one": lambda t, name: t.apply({**dict.fromkeys(t.gradients), name: "x"}),
    "unknown variables": with_variable(np.copy),
    "a part of a variable": with_variable(lambda w: w.ravel(order="K")[:-1]),
    "a variable of other dtype": with_variable(lambda w: w.view(f"u{w.itemsize}")),
    "a read-only variable": with_variable(read_only),
    "a variable twice": lambda t, name: partial(
        t.optimizer.apply, [t.gradients[name]] * 2, [t.weights[name]] * 2
    ),
    "more variables": lambda t, name: t.apply(weights={"more": t.weights[name]}),
    "an error of the caller": lambda t, name: partial(t.optimizer.apply, (1 // 0 for _ in [1])),
    "another shape": with_gradient(lambda g: np.stack([g, g])),
    "another size": with_gradient(lambda g: np.resize(g, g.size + 1)),
    "long double": with_gradient(lambda g: g.astype(np.longdouble)),
    "integers": with_gradient(lambda g: g.view(f"i{g.itemsize}")),
    "complex numbers": with_gradient(lambda g: g.astype(np.complex64)),
    "gaps": lambda t, name: (
        t.apply({name: np.stack([t.gradients[name]] * 2, -1)[..., 0]})
        if t.gradients[name].size > 1
        else None
    ),
    "a list": with_gradient(lambda g: g.astype(float).tolist()),
    "no memory": with_gradient(lambda g: object()),
    "memory of the norm": with_memory_of("norm"),
    "memory of the average": with_memory_of("average"),
    "memory of the accumulator": with_memory_of("gradient_accumulator"),
    "a rate that is NaN": with_rate(lambda: NAN),
    "a rate that fails": with_rate(lambda: 1 // 0),
    "a rate beyond float32": with_rate(1e39),
}

_SETTINGS = [
    *(("beta_1", x) for x in (1.0, -0.1, NAN, "0.9", None)),
    *(("beta_2", x) for x in (1.0, -1e-9, INF)),
    *(("epsilon", x) for x in (0.0, -1.0, NAN, INF, None)),
    *(("weight_decay", x) for x in (-0.1, NAN, "x")),
    *((clip, x) for clip in ("clipnorm", "clipvalue", "global_clipnorm") for x in (0, NAN, -1.0)),
    *(("ema_momentum", x) for x in (1.5, NAN, None)),
    *(("ema_overwrite_frequency", x) for x in (0, 1.5, True)),
    *(("loss_scale_factor", x) for x in (0.0, NAN, INF, -2.0)),
    *(("gradient_accumulation_steps", x) for x in (1, 0, 2.5, 5)),
    *(("learning_rate", x) for x in (-1.0, NAN, "x", None, lambda step: 0.1)),
    *(("use_ema", x) for x in (1, None, True)),
    *(("state_bits", x) for x in (4, "16", True, 16)),
    *(("weight_rounding", x) for x in ("up", None, "nearest")),
    *(("seed", x) for x in (-1, 2**64, 1.0, 7)),
    *(("iterations", x) for x in (-1, 2.5, 2**60)),
    *(("dynamic_scale", x) for x in (0.0, NAN, 2.0**127)),
    *(("step_counter", x) for x in (-1, 0.5)),
]


def assign(setting, value):
    is_of_scale = setting in ("dynamic_scale", "step_counter")

    def call(t, name):
        if is_of_scale and t.optimizer is t.inner:
            return None
        return partial(setattr, t.optimizer if is_of_scale else t.inner, setting, value)

    return call


ASSIGN = {f"{setting} = {value}": assign(setting, value) for setting, value in _SETTINGS}
ASSIGN["two clippings"] = lambda t, name: (
    partial(setattr, t.inner, "clipvalue" if t.inner.clipnorm else "clipnorm", 2.0)
    if t.inner.clipnorm or t.inner.clipvalue or t.inner.global_clipnorm
    else None
)


def put(value, *path):
    """Change `value` at `path` of what was saved; "*" is the variable, a function changes it."""

    def change(saved, name):
        for key in path[:-1]:
            saved = saved.get(name if key == "*" else key, {})
        key = name if path[-1] == "*" else path[-1]
        if key not in saved and not callable(value):
            saved[key] = value
        elif key in saved:
            saved[key] = value(saved[key]) if callable(value) else value

    return change


def drop(*path):
    def change(saved, name):
        for key in path[:-1]:
            saved = saved[name if key == "*" else key]
        del saved[name if path[-1] == "*" else path[-1]]

    return change


def below_zero(saved, name):
    kept = saved["state"][name]
    kind = "norm" if kept["norm"].dtype.kind == "f" else "norm_scale"
    kept[kind] = np.full_like(kept[kind], -1)


STATE = ("state", "*")
_LOADED = {
    "no calls": drop("calls"),
    "calls below zero": put(-1, "calls"),
    "half a call": put(2.5, "calls"),
    "calls beyond 64 bits": put(2**64, "calls"),
    "another version": put(9, "format_version"),
    "a rate of another kind": put(lambda rate: 0.1 if rate is None else None, "learning_rate"),
    "a rate below zero": put(lambda rate: -1.0, "learning_rate"),
    "unknown accumulated": put(["no variable"], "accumulated"),
    "another window": put(lambda steps: (steps or 1) + 1, "gradient_accumulation_steps"),
    "a variable less": drop(*STATE),
    "a variable more": put({"norm": np.ones(2)}, "state", "no variable"),
    "no momentum": drop(*STATE, "momentum"),
    "more kinds": put(np.ones(2), *STATE, "more"),
    "another shape": put(lambda a: np.resize(a, (2, a.size + 1)), *STATE, "momentum"),
    "another dtype": put(lambda a: np.zeros(a.shape, np.int32), *STATE, "norm"),
    "a norm below zero": below_zero,
    "a seed below zero": put(-1, "seed"),
    "other bits": put(4, "state_bits"),
    "another rounding": put("up", "weight_rounding"),
    "an entry more": put(1, "more"),
}


def load(change, through):
    def call(t, name):
        saved = t.optimizer.state_dict()
        saved["calls"] += 6  # of another training, so that nothing of it goes unnoticed
        if saved["learning_rate"] is not None:
            saved["learning_rate"] += 0.25
        for kinds in saved["state"].values():
            kinds["momentum"][...] = 1
        change(saved, name)
        if through == "dict":
            return partial(t.optimizer.load_state_dict, saved)
        try:
            checkpoint.write(t.path, saved)
        except (TypeError, ValueError, KeyError):  # no file can hold that
            return None
        return partial(t.optimizer.load, t.path)

    return call


def torn(part):
    def call(t, name):
        t.optimizer.save(t.path)
        content = t.path.read_bytes()
        t.path.write_bytes(content[: int(part * len(content))])
        return partial(t.optimizer.load, t.path)

    return call


def set_weights(change):
    return lambda t, name: partial(
        t.optimizer.set_weights, change([np.array(a) for a in t.optimizer.variables])
    )


LOAD = {
    **{f"{key} in a dict": load(change, "dict") for key, change in _LOADED.items()},
    **{f"{key} in a file": load(change, "file") for key, change in _LOADED.items()},
    **{f"{part} of a file": torn(part) for part in (0, 0.01, 0.3, 0.999)},
    "no file": lambda t, name: partial(t.optimizer.load, t.path / "no"),
    "a folder": lambda t, name: partial(t.optimizer.load, t.path.parent),
    "saved on a folder": lambda t, name: partial(t.optimizer.save, t.path.parent),
    "saved in no folder": lambda t, name: partial(t.optimizer.save, t.path / "no" / "file"),
    "no arrays": set_weights(lambda arrays: []),
    "an array more": set_weights(lambda arrays: [*arrays, np.ones(2)]),
    "an array of another shape": set_weights(lambda arrays: [*arrays[:-1], np.ones((7, 7, 7))]),
    "an iteration below zero": set_weights(
        lambda arrays: [a * 0 - 1 if a.dtype == np.int64 else a for a in arrays]
    ),
    "no dict": lambda t, name: partial(t.optimizer.load_state_dict, None),
    "other variables": lambda t, name: partial(t.optimizer.build, list(t.gradients.values())),
    "excluded too late": lambda t, name: t.optimizer.exclude_from_weight_decay,
    "no variable": lambda t, name: partial(t.inner.decoded_state, "no variable"),
    "averages of others": lambda t, name: (
        partial(t.optimizer.finalize_variable_values, [t.gradients[name]])
        if t.inner.use_ema and t.inner.iterations
        else None
    ),
}

WRONG_CALLS = APPLY | ASSIGN | LOAD
