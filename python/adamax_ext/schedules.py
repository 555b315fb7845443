"""Learning-rate schedules: Keras' names, formulas and configs, in double precision."""

import math
import numbers
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, SupportsFloat, TypeVar

_KERAS_MODULE = "keras.optimizers.schedules"
_Schedule = TypeVar("_Schedule", bound="LearningRateSchedule")


class LearningRateSchedule(ABC):
    """A learning rate as a function of the step; to be saved, a subclass needs ``get_config``."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the learning rate after `step` completed calls of the optimizer (from 0)."""

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this schedule, as JSON values."""
        raise NotImplementedError(f"{type(self).__name__} must define get_config() to be saved")

    @classmethod
    def from_config(cls: type[_Schedule], config: Mapping[str, Any]) -> _Schedule:
        """Build a schedule from what `get_config` returned; `config` stays as it is."""
        return cls(**config)

    @staticmethod
    def from_callable(fn: Callable[[int], SupportsFloat]) -> "LearningRateSchedule":
        """Wrap `fn(step)`; the result pickles if `fn` does, but has no config."""
        if not callable(fn):
            raise TypeError(f"fn must be a function of the step, received {fn!r}")
        return _FromCallable(fn)


@dataclass(frozen=True)
class _FromCallable(LearningRateSchedule):
    fn: Callable[[int], SupportsFloat]

    def __call__(self, step: int) -> float:
        return float(self.fn(step))

    def get_config(self) -> dict[str, Any]:
        raise TypeError(f"cannot serialize a function, {self.fn!r}: use a class with get_config")


def _number(name: str, value: object) -> float:
    """Return a finite number in its range, or say what is wrong with it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, received {value!r}")
    # Counts of steps stay whole; rates become floats: from an integer rate Keras gets integers.
    counts = "_steps" in name or "boundaries" in name
    positive, least = name in ("decay_steps", "first_decay_steps"), int(name == "t_mul")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number >= least) or (positive and number == 0):
        bound = "> 0" if positive else f">= {least}"
        raise ValueError(f"{name} must be finite and {bound}, received {value!r}")
    return int(value) if counts and isinstance(value, numbers.Integral) else number


def _checked(name: str, value: object) -> object:
    """Return an argument as it is stored, or raise with its name, its value and what is right."""
    if name in ("boundaries", "values"):
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise TypeError(f"{name} must be a list of numbers, received {value!r}")
        return tuple(_number(f"{name}[{i}]", item) for i, item in enumerate(value))
    if name in ("cycle", "staircase"):
        if value not in (False, True):
            raise TypeError(f"{name} must be True or False, received {value!r}")
        return bool(value)
    if name == "name" and not isinstance(value, str | None):
        raise TypeError(f"name must be a string or None, received {value!r}")
    if name == "name" or (name == "warmup_target" and value is None):
        return value
    return _number(name, value)


@dataclass(frozen=True)
class _BuiltIn(LearningRateSchedule):  # its fields are its arguments and its config
    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name)))

    def get_config(self) -> dict[str, Any]:
        config = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}


@dataclass(frozen=True)
class ExponentialDecay(_BuiltIn):
    """``initial_learning_rate * decay_rate ** (step / decay_steps)``, as in Keras 3.

    Parameters
    ----------
    initial_learning_rate, decay_rate : float
        At least 0.
    decay_steps : int or float
        Steps until the rate has been multiplied by `decay_rate` once; above 0.
    staircase : bool
        Round ``step / decay_steps`` down, so that the rate falls in stairs.
    name : str or None
        Kept for Keras, here and in the other schedules; no effect.

    Raises
    ------
    TypeError, ValueError
        An argument of another type, or a number not finite or out of range.
    """

    initial_learning_rate: float
    decay_steps: float
    decay_rate: float
    staircase: bool = False
    name: str | None = "ExponentialDecay"

    def __call__(self, step: int) -> float:
        p = step / self.decay_steps
        p = math.floor(p) if self.staircase else p
        return self.initial_learning_rate * math.pow(self.decay_rate, p)


@dataclass(frozen=True)
class PiecewiseConstantDecay(_BuiltIn):
    """``values[i]`` for the first `i` with ``step <= boundaries[i]``, else the last; as in Keras 3.

    Errors are those of `ExponentialDecay`, and a ValueError for a wrong length or order.

    Parameters
    ----------
    boundaries : sequence of int or float
        Last step of each value but the last one; strictly increasing, at least 0.
    values : sequence of float
        One more than `boundaries`; at least 0.
    """

    boundaries: Sequence[float]
    values: Sequence[float]
    name: str | None = "PiecewiseConstant"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(f"values must be one longer than boundaries, received {self}")
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError(f"boundaries must be strictly increasing, received {self}")

    def __call__(self, step: int) -> float:
        return self.values[bisect_left(self.boundaries, step)]


@dataclass(frozen=True)
class PolynomialDecay(_BuiltIn):
    """``(initial - end) * (1 - step / decay_steps) ** power + end``, as in Keras 3.

    Errors are those of `ExponentialDecay`.

    Parameters
    ----------
    initial_learning_rate, end_learning_rate, power : float
        At least 0.
    decay_steps : int or float
        Steps until `end_learning_rate`, which then stays; above 0.
    cycle : bool
        Do not stay, but divide by the first multiple of `decay_steps` that is not below `step`.
    """

    initial_learning_rate: float
    decay_steps: float
    end_learning_rate: float = 0.0001
    power: float = 1.0
    cycle: bool = False
    name: str | None = "PolynomialDecay"

    def __call__(self, step: int) -> float:
        cycles = max(1, math.ceil(step / self.decay_steps)) if self.cycle else 1
        rest = max(0.0, 1 - step / (self.decay_steps * cycles))
        span = self.initial_learning_rate - self.end_learning_rate
        return span * math.pow(rest, self.power) + self.end_learning_rate


@dataclass(frozen=True)
class InverseTimeDecay(_BuiltIn):
    """``initial_learning_rate / (1 + decay_rate * step / decay_steps)``, as in Keras 3.

    Parameters and errors are those of `ExponentialDecay`.
    """

    initial_learning_rate: float
    decay_steps: float
    decay_rate: float
    staircase: bool = False
    name: str | None = "InverseTimeDecay"

    def __call__(self, step: int) -> float:
        p = step / self.decay_steps
        p = math.floor(p) if self.staircase else p
        return self.initial_learning_rate / (1 + self.decay_rate * p)


@dataclass(frozen=True)
class CosineDecay(_BuiltIn):
    """``start * ((1 - alpha) * 0.5 * (1 + cos(pi * step / decay_steps)) + alpha)``, as in Keras 3.

    Errors are those of `ExponentialDecay`.

    Parameters
    ----------
    initial_learning_rate, alpha : float
        First rate, and the last one as a part of `start`; at least 0.
    decay_steps : int or float
        Length of the decay, warm-up not included; above 0.
    warmup_target : float or None
        `start`, reached on a line from `initial_learning_rate`; None: `start` is that rate.
    warmup_steps : int or float
        Length of that line, after which the decay counts from 0; at least 0.
    """

    initial_learning_rate: float
    decay_steps: float
    alpha: float = 0.0
    name: str | None = "CosineDecay"
    warmup_target: float | None = None
    warmup_steps: float = 0

    def __call__(self, step: int) -> float:
        start, done = self.initial_learning_rate, float(step)
        if self.warmup_target is not None:
            if step < self.warmup_steps:
                return (self.warmup_target - start) * (step / self.warmup_steps) + start
            start, done = self.warmup_target, step - self.warmup_steps
        fraction = min(done / self.decay_steps, 1.0)
        return start * ((1 - self.alpha) * 0.5 * (1 + math.cos(math.pi * fraction)) + self.alpha)


@dataclass(frozen=True)
class CosineDecayRestarts(_BuiltIn):
    """Cosine decay that restarts (SGDR): period `i` has ``first_decay_steps * t_mul ** i`` steps.

    At its part `f` the rate is, as in Keras 3, ``initial * ((1 - alpha) * c + alpha)`` with
    ``c = m_mul ** i * 0.5 * (1 + cos(pi * f))``. Errors are those of `ExponentialDecay`.

    Parameters
    ----------
    initial_learning_rate, m_mul, alpha : float
        At least 0.
    first_decay_steps : int or float
        Length of the first period; above 0.
    t_mul : float
        At least 1: shrinking periods are over after finitely many steps (Keras then returns NaN).
    """

    initial_learning_rate: float
    first_decay_steps: float
    t_mul: float = 2.0
    m_mul: float = 1.0
    alpha: float = 0.0
    name: str | None = "SGDRDecay"

    def __call__(self, step: int) -> float:
        done, growth = step / self.first_decay_steps, self.t_mul - 1
        # 1e-12: the first step of a period, unlike in Keras, must not round into the one before.
        index = math.log1p(done * growth) / math.log(self.t_mul) + 1e-12 if growth else done
        period = math.floor(index)
        length = self.t_mul**period
        fraction = (done - ((length - 1) / growth if growth else period)) / length
        cosine = 0.5 * self.m_mul**period * (1 + math.cos(math.pi * fraction))
        return self.initial_learning_rate * ((1 - self.alpha) * cosine + self.alpha)


CLASSES: dict[str, type[LearningRateSchedule]] = {c.__name__: c for c in _BuiltIn.__subclasses__()}


def serialize(schedule: LearningRateSchedule) -> dict[str, Any]:
    """Return `schedule` in Keras' format; `deserialize` reads it back if the class is built in."""
    if not isinstance(schedule, LearningRateSchedule):
        raise TypeError(f"schedule must be a LearningRateSchedule, received {schedule!r}")
    cls = type(schedule)
    return {
        "module": _KERAS_MODULE if cls in CLASSES.values() else cls.__module__,
        "class_name": cls.__name__,
        "config": schedule.get_config(),
        "registered_name": None,
    }


def deserialize(
    config: Mapping[str, Any],
    custom_objects: Mapping[str, type[LearningRateSchedule]] | None = None,
) -> LearningRateSchedule:
    """Build the schedule that Keras or `serialize` described.

    Parameters
    ----------
    config : mapping
        With ``class_name`` and ``config``; stays as it is.
    custom_objects : mapping of str to class, optional
        Classes of one's own, by the name that was registered with Keras or by their own.

    Returns
    -------
    LearningRateSchedule
        Of the class that is named.

    Raises
    ------
    TypeError, ValueError
        Another kind of config, or a schedule that is not known.
    """
    if not (isinstance(config, Mapping) and {"class_name", "config"} <= config.keys()):
        raise TypeError(f"config must be a mapping with class_name and config, received {config!r}")
    module, class_name = config.get("module", _KERAS_MODULE), config["class_name"]
    for name in (config.get("registered_name") or class_name, class_name):
        if custom_objects is not None and name in custom_objects:
            return custom_objects[name].from_config(config["config"])
    if module != _KERAS_MODULE or class_name not in CLASSES:
        what = f"unknown schedule {class_name!r} of module {module!r}: pass it in custom_objects"
        raise ValueError(f"{what}, or one of {_KERAS_MODULE}: {', '.join(CLASSES)}")
    return CLASSES[class_name].from_config(config["config"])
