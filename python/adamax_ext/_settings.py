"""Checks of arguments: each error names the argument, the value, and what would be right."""

import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, TypeAlias

import numpy as np

from adamax_ext.locking import Exclusive, exclusive

Check: TypeAlias = Callable[[str, Any], Any]


class Checked(Exclusive):
    """An object whose settings are checked whenever they are assigned, first by its constructor."""

    checks: ClassVar[Mapping[str, Check]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.checks:
            self._set(name, self.checks[name](name, value))
        else:
            super().__setattr__(name, value)

    @exclusive  # a step that runs meanwhile would keep the old value for the next ones
    def _set(self, name: str, value: Any) -> None:
        self._before_setting(name, value)
        super().__setattr__(name, value)

    def _before_setting(self, name: str, value: Any) -> None:
        """Refuse a checked value that does not fit to the rest."""


def number(name: str, value: Any, wanted: str = "a number") -> float:
    """Return `value` as a float; TypeError if it is no number, ValueError if it is too large."""
    is_complex = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    # Before NumPy 2.4 an array of one element is converted, from 1.25 on with a warning.
    is_array = isinstance(value, np.ndarray) and value.ndim > 0
    not_one = isinstance(value, (bool, np.bool_)) or is_complex or is_array
    if not_one or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be {wanted}; received {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must be {wanted}; received {value!r}") from error


def real(name: str, value: Any, wanted: str, valid: Callable[[float], bool]) -> float:
    """Return `value` as a float; TypeError if it is no number, ValueError if it is not valid."""
    result = number(name, value, f"a number {wanted}")
    if not (math.isfinite(result) and valid(result)):
        raise ValueError(f"{name} must be a number {wanted}; received {value!r}")
    return result


positive = partial(real, wanted="> 0", valid=lambda x: x > 0)
not_negative = partial(real, wanted=">= 0", valid=lambda x: x >= 0)


def integer(name: str, value: Any, least: int, most: int = 2**53, multiple_of: int = 1) -> int:
    """Return `value` as an int; ValueError unless it is such an integer from `least` to `most`."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (is_integer and least <= value <= most):
        bound = f">= {least}" if not is_integer or value < least else f"<= {most}"
        raise ValueError(f"{name} must be an integer {bound}; received {value!r}")
    if value % multiple_of:
        raise ValueError(f"{name} must be a multiple of {multiple_of}; received {value!r}")
    return int(value)


def seed(name: str, value: Any) -> int:
    return integer(name, value, least=0, most=2**64 - 1)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False; received {value!r}")
    return bool(value)


def string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string; received {value!r}")
    return value


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """Return the one of some integers or words that `value` is; ValueError if it is none."""
    if isinstance(value, (str, numbers.Integral)) and not isinstance(value, bool):
        for choice in choices:
            if value == choice:
                return choice
    *most, last = map(repr, choices)
    raise ValueError(f"{name} must be {', '.join(most)} or {last}; received {value!r}")


def optional(check: Check) -> Check:
    """Return a check that lets None through."""
    return lambda name, value: None if value is None else check(name, value)


def sequence(name: str, values: Any, what: str = "buffers") -> tuple[Any, ...]:
    """Return what `values` gives as a tuple; TypeError for one buffer, which would fall to rows."""
    if not isinstance(values, (list, tuple)):
        is_single = isinstance(values, (str, bytes, Mapping)) or hasattr(values, "__array__")
        if is_single or not isinstance(values, Iterable) or isinstance(values, memoryview):
            received = repr(values) if what == "strings" else type(values).__name__
            raise TypeError(f"{name} must be a sequence of {what}; received {received}")
    return tuple(values)


def without_leftovers(
    config: Mapping[str, Any], leftovers: Mapping[str, Collection[Any]]
) -> dict[str, Any]:
    """Return a copy of a config without keys of older Keras; ValueError if one has an effect."""
    for name, harmless in leftovers.items():
        if name in config and config[name] not in harmless:
            allowed = " or ".join(map(repr, harmless))
            raise ValueError(
                f"{name} of the config must be {allowed}: nothing here does more with it; "
                f"received {config[name]!r}"
            )
    return {key: value for key, value in config.items() if key not in leftovers}
