"""A learning rate: a number, a schedule of the completed calls, or a callable without arguments."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from adamax_ext import _core, _settings, schedules

Rate: TypeAlias = float | schedules.LearningRateSchedule | Callable[[], Any]


def checked(value: Any) -> Rate:
    """Return `value` as a rate; TypeError or ValueError if it is none."""
    if isinstance(value, schedules.LearningRateSchedule) or callable(value):
        return value  # type: ignore[no-any-return]
    wanted = ">= 0, a schedule, or a callable without arguments"
    return _settings.real("learning_rate", value, wanted, lambda x: x >= 0)


def replacement(old: Rate, value: Any) -> Rate:
    """Return `value` as the rate that follows `old`; TypeError for a number after anything else."""
    new = checked(value)
    if isinstance(new, float) and not isinstance(old, float):
        raise TypeError(
            f"learning_rate is {old!r}, which a number ({value!r}) cannot replace: it would be "
            "lost without notice. Set another schedule or callable, or make the optimizer with a "
            "number"
        )
    return new


def at(rate: Rate, calls: int) -> float:
    """Return the rate of a step after so many completed calls."""
    if isinstance(rate, float):
        return rate
    with _core.IeeeMode():  # whatever the caller's floating-point mode is
        value = rate(calls) if isinstance(rate, schedules.LearningRateSchedule) else rate()
    return _settings.not_negative("learning_rate", value)


def to_config(rate: Rate) -> Any:
    """Return the rate as a JSON value in Keras' format; TypeError for a callable."""
    if isinstance(rate, schedules.LearningRateSchedule):
        return schedules.serialize(rate)
    if isinstance(rate, float):
        return rate
    raise TypeError(
        f"a callable learning rate ({rate!r}) has no config; expected a number or a schedule"
    )


def from_config(value: Any) -> Any:
    """Return what `to_config` or Keras made the value from."""
    return schedules.deserialize(value) if isinstance(value, Mapping) else value
