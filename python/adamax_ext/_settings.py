"""Checks of arguments: each error names the argument, the value, and what would be right."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def real(name: str, value: Any, wanted: str, valid: Callable[[float], bool]) -> float:
    """Return `value` as a float; TypeError if it is no number, ValueError if it is not valid."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number {wanted}; received {value!r}")
    number = float(value)
    if not (math.isfinite(number) and valid(number)):
        raise ValueError(f"{name} must be a number {wanted}; received {value!r}")
    return number


def positive(name: str, value: Any) -> float:
    return real(name, value, "> 0", lambda x: x > 0)


def not_negative(name: str, value: Any) -> float:
    return real(name, value, ">= 0", lambda x: x >= 0)


def integer(name: str, value: Any, least: int, most: int = 2**31 - 1) -> int:
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


def sequence(name: str, buffers: Any) -> Sequence[Any]:
    """Return `buffers` as a list or tuple; TypeError for one buffer, which would fall into rows."""
    if isinstance(buffers, (list, tuple)):
        return buffers
    if isinstance(buffers, (str, bytes, Mapping)) or hasattr(buffers, "__array__"):
        raise TypeError(f"{name} must be a sequence of buffers; received {type(buffers).__name__}")
    return list(buffers)
