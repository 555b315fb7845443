"""A learning rate: a number, a schedule of the completed calls, or a callable without arguments."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from adamax_ext import _core, _settings, schedules

Rate: TypeAlias = float | schedules.LearningRateSchedule | Callable[[], Any]

_KERAS = ("keras.", "tf_keras.", "tensorflow.")  # modules of its schedules


def checked(value: Any) -> Rate:
    """Return `value` as a rate, a schedule of Keras as ours; TypeError or ValueError if it is none.

    A function of the step is refused here, and not by its first step.
    """
    wanted = ">= 0, a schedule, or a callable without arguments"
    if isinstance(value, schedules.LearningRateSchedule):
        return value
    if not callable(value):
        return _settings.real("learning_rate", value, wanted, lambda x: x >= 0)
    cls = type(value)
    is_schedule = any(base.__name__ == "LearningRateSchedule" for base in cls.__mro__)
    if is_schedule and cls.__module__.startswith(_KERAS) and cls.__name__ in schedules.CLASSES:
        return schedules.deserialize({"class_name": cls.__name__, "config": value.get_config()})
    if is_schedule or not _can_be_called(value):
        raise TypeError(
            f"learning_rate must be a number {wanted}; received {value!r}. Of a function of the "
            "step, schedules.LearningRateSchedule.from_callable makes a schedule: of one of Keras "
            "or optax, from_callable(lambda step: float(schedule(step)))"
        )
    return value  # type: ignore[no-any-return]


def _can_be_called(function: Callable[..., Any]) -> bool:
    """Return whether it takes no arguments, or does not tell."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind()
    except TypeError:
        return False
    return True


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
    try:
        with _core.IeeeMode():  # whatever the caller's floating-point mode is
            value = rate(calls) if isinstance(rate, schedules.LearningRateSchedule) else rate()
    except OverflowError as error:
        raise ValueError(f"learning_rate must be a number >= 0; received inf ({error})") from error
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


def from_config(value: Any, custom_objects: Mapping[str, Any] | None) -> Any:
    """Return what `to_config` or Keras made the value from."""
    return schedules.deserialize(value, custom_objects) if isinstance(value, Mapping) else value
