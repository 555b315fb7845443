"""How steps are timed: by the host's clock or by a GPU's events, until they end or are called."""

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from contestants.base import Work

Call = Callable[[], object]


class Timer(Protocol):
    """`seconds` of some steps in a row, at most `most_steps` of them; `finish` waits for them."""

    name: str
    most_steps: int

    def seconds(self, step: Call, steps: int, finish: Call) -> float: ...


class HostTimer:
    name, most_steps = "host clock", sys.maxsize

    def seconds(self, step: Call, steps: int, finish: Call) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        finish()
        return time.perf_counter() - start


class CallTimer:
    """What a step takes of the host's time: until its call returns, with nothing queued before."""

    name, most_steps = "host clock, the call alone", 50

    def seconds(self, step: Call, steps: int, finish: Call) -> float:
        seconds = 0.0
        for _ in range(steps):
            finish()
            start = time.perf_counter()
            step()
            seconds += time.perf_counter() - start
        finish()
        return seconds


class DeviceTimer:
    """Events around steps that the host queues behind a sleep, as long as that takes it.

    A step that waits for the device, or fills its queue, is timed with its waiting.
    """

    name = "device events"
    most_steps = 20  # that fit the queue, of some 40 launches each
    most_cycles = 2**26  # of a sleep: some 30 ms

    def __init__(self, cuda: Any) -> None:
        self.cuda, self.cycles = cuda, 2**20

    def seconds(self, step: Call, steps: int, finish: Call) -> float:
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        while True:
            self.cuda._sleep(self.cycles)
            start.record()
            for _ in range(steps):
                step()
            end.record()
            is_asleep = not start.query()
            finish()
            if is_asleep or self.cycles >= self.most_cycles:
                return float(start.elapsed_time(end)) / 1e3
            self.cycles *= 2


def timer_for(work: Work, cuda: Any) -> Timer:
    """Choose for `work`; `cuda` is torch.cuda, or None where its events do not see the steps."""
    if work.host:
        return CallTimer()
    return HostTimer() if cuda is None else DeviceTimer(cuda)
