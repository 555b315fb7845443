"""Objects that one thread at a time may use."""

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar


class Exclusive:
    """An object whose methods marked `exclusive` refuse to run while another of them does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


_P = ParamSpec("_P")
_R = TypeVar("_R")
_S = TypeVar("_S", bound=Exclusive)


def exclusive(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """Raise RuntimeError when an object is entered twice at once, instead of mixing two steps."""

    @functools.wraps(method)
    def wrapper(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"{method.__name__}() was called while another call is running on the same "
                "optimizer (in another thread, or in its own learning rate); expected one at a time"
            )
        try:
            return method(self, *args, **kwargs)
        finally:
            self._lock.release()

    return wrapper
