"""Objects that one call at a time may use."""

import functools
import os
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

_BUSY = (
    "an optimizer was called while another call is running on the same optimizer (in another "
    "thread, or in its own learning rate); expected one call at a time"
)
_FORKED = (
    "this process was forked in mid-step: while another thread was in a call of this optimizer, "
    "whose copy here may be half changed; load a checkpoint into a new optimizer"
)

_process = 0  # how many forks lie between the first process and this one


def _note_fork() -> None:
    global _process
    _process += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)

_P = ParamSpec("_P")
_R = TypeVar("_R")
_S = TypeVar("_S", bound="Exclusive")


def exclusive(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """Raise RuntimeError when an object is entered twice at once, instead of mixing two steps."""

    @functools.wraps(method)
    def wrapper(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        # A lock would stay locked if an interrupt came between taking it and noting that. Here one
        # operation of a dict enters, and what leaves, uninterrupted, knows whose call it is.
        call = [_process]
        attributes = self.__dict__
        try:
            running = attributes.setdefault("_running", call)
            if running is not call:
                raise RuntimeError(_BUSY if running[0] == _process else _FORKED)
            return method(self, *args, **kwargs)
        finally:
            if "_running" in attributes and attributes["_running"] is call:
                del attributes["_running"]

    return wrapper


class Exclusive:
    """An object whose methods marked `exclusive` refuse to run while another of them does."""

    _running: list[int] | None = None  # in the object itself only during a call

    @exclusive
    def __getstate__(self) -> dict[str, Any]:
        # Not in the middle of a step, where a copy would be torn.
        return {key: value for key, value in self.__dict__.items() if key != "_running"}
