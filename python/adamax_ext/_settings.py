"""Checks of arguments: each error names the argument, the value, and what would be right."""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def number(name: str, value: Any, wanted: str = "a number") -> float:
    """Return `value` as a float; TypeError if it is no number, ValueError if it is too large."""
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__float__"):
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


def positive(name: str, value: Any) -> float:
    return real(name, value, "> 0", lambda x: x > 0)


def not_negative(name: str, value: Any) -> float:
    return real(name, value, ">= 0", lambda x: x >= 0)


def integer(name: str, value: Any, least: int, most: int = 2**53) -> int:
    """Return `value` as an int; ValueError unless it is an integer from `least` to `most`."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (is_integer and least <= value <= most):
        bound = f">= {least}" if not is_integer or value < least else f"<= {most}"
        raise ValueError(f"{name} must be an integer {bound}; received {value!r}")
    return int(value)


def positive_or_none(name: str, value: Any) -> float | None:
    return None if value is None else positive(name, value)


def integer_or_none(name: str, value: Any, least: int) -> int | None:
    return None if value is None else integer(name, value, least)


def is_second(name: str, value: Any, first: str, second: str) -> bool:
    """Return whether `value` is the second of two words; ValueError if it is neither."""
    if not (isinstance(value, str) and value in (first, second)):
        raise ValueError(f"{name} must be '{first}' or '{second}'; received {value!r}")
    return value == second


def sequence(name: str, values: Any, what: str = "buffers") -> Sequence[Any]:
    """Return `values` as a list or tuple; TypeError for one buffer, which would fall into rows."""
    if isinstance(values, (list, tuple)):
        return values
    is_single = isinstance(values, (str, bytes, Mapping)) or hasattr(values, "__array__")
    if is_single or not isinstance(values, Iterable) or isinstance(values, memoryview):
        received = repr(values) if what == "strings" else type(values).__name__
        raise TypeError(f"{name} must be a sequence of {what}; received {received}")
    return list(values)
