"""The process of one contestant: reads commands as JSON lines and answers each with one.

bench/peers.py starts ``python bench/worker.py NAME DEVICE THREADS`` for each contestant, because
Keras wants its backend before the import, OpenMP runtimes disturb each other, and peak memory is
per process.
"""

import contextlib
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contestants import CONTESTANTS
from contestants.base import RATE, Contestant, Work
from machine import gpu
from timers import timer_for

ADAM_RATE = 0.002  # for training: Adam wants smaller steps
PAUSE = 0.01  # seconds before a turn: threads of the process before have stopped spinning
LEAST_TIMED = 0.02  # seconds of timed work in a turn
MOST_BACKWARD = 10  # passes in a turn: they take longer than the steps that are timed


def arrays_like(work: Work, seed: int) -> list[Any]:
    """Return arrays of the work's shapes; magnitudes of 0.1 and more keep epsilon small beside."""
    rng = np.random.default_rng(seed)
    if work.dtype == "bfloat16":
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)
    else:
        dtype = np.dtype(work.dtype)
    block = rng.standard_normal(min(work.elements, 2**20), np.float32)
    block = (block + np.copysign(np.float32(0.1), block)).astype(dtype)
    # Copies: of a small shape, resize() gives a view into a copy of the whole block.
    return [np.resize(block, shape).copy() for shape in work.shapes]


def memory_of_process(key: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


class Worker:
    """The commands that bench/peers.py sends, a method each; arguments and results are JSON."""

    def __init__(self, name: str, device: str, threads: int) -> None:
        self.cuda: Any = None  # torch.cuda, if it queues the steps
        self.kind, self.device, self.threads = CONTESTANTS[name], device, threads
        self.contestant: Contestant | None = None
        self.activations = np.ones(2**22, np.float32)  # more than a core's own caches hold

    def answer(self, do: str, **arguments: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = getattr(self, do)(**arguments)
        except Exception as error:
            text = " ".join(str(error).split())
            return {"error": f"{type(error).__name__}: {text[:300]}"}
        return answer

    def start(self) -> dict[str, Any]:
        """Set thread counts, and do a step so that everything is imported and built."""
        if "torch" in self.kind.packages:
            import torch

            torch.set_num_threads(self.threads)
            if self.device == "cuda":
                self.cuda = torch.cuda
        if "tensorflow" in self.kind.packages:
            import tensorflow as tf

            tf.config.threading.set_intra_op_parallelism_threads(self.threads)
            tf.config.threading.set_inter_op_parallelism_threads(1)
        if "adamax_ext" in self.kind.packages:
            import adamax_ext

            adamax_ext.set_num_threads(self.threads)
        work = Work("start", ((64,),))
        contestant = self.kind(work, self.device, arrays_like(work, 0), RATE)
        contestant.load(arrays_like(work, 1))
        contestant.step()
        contestant.finish()
        return {"gpu": self.cuda and gpu(self.cuda)}

    def check(self, full: bool) -> dict[str, Any]:
        """Return the weights after three steps with different gradients."""
        work = Work("check", ((1000,), (7, 11), (1, 3)), full=full, groups=2)
        contestant = self.kind(work, self.device, arrays_like(work, 0), RATE)
        for seed in (1, 2, 3):
            contestant.load(arrays_like(work, seed))
            places = contestant.places()
            contestant.step()
        contestant.finish()
        if contestant.places() != places:
            raise RuntimeError("a step copies what it should write in place")
        return {"weights": np.concatenate([w.ravel() for w in contestant.weights()]).tolist()}

    def setup(self, work: dict[str, Any], bound: str | None) -> dict[str, Any]:
        """Allocate for a work."""
        self.work = Work.from_json(work)
        self.timer = timer_for(self.work, self.cuda)
        self.resident_before = memory_of_process("VmRSS")
        contestant = self.kind(self.work, self.device, arrays_like(self.work, 0), RATE)
        contestant.load(arrays_like(self.work, 1))
        before_bound = memory_of_process("VmRSS")
        self.turns = contestant.turns(bound, self.threads)
        # Buffers of the bound alone are not the contestant's.
        self.resident_before += memory_of_process("VmRSS") - before_bound
        self.contestant, self.steps = contestant, dict[str, int]()
        state = contestant.state_bytes(self.work)
        return {
            "turns": list(self.turns),
            "timer": self.timer.name,
            "memory_bytes": self.work.memory_bytes(state),
            "state_bytes": state,
            "bytes_per_element": self.work.bytes_per_element(state),
        }

    def turn(self, name: str) -> dict[str, Any]:
        """Do one step untimed, then as many timed as fill `LEAST_TIMED`; the first call counts."""
        assert self.contestant is not None
        if name not in self.steps:
            self.timed(name, 1)  # may compile
            seconds = self.timed(name, 1)
            if seconds < LEAST_TIMED:
                seconds = min(seconds, self.timed(name, 1))
            self.steps[name] = min(math.ceil(LEAST_TIMED / seconds), self.timer.most_steps)
            if self.work.after_backward:
                self.steps[name] = min(self.steps[name], MOST_BACKWARD)
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew, without compilers
        time.sleep(PAUSE)
        self.timed(name, 1)
        return {"seconds": self.timed(name, self.steps[name])}

    def timed(self, name: str, steps: int) -> float:
        """Return the seconds of a step: of many in a row, or of each after a backward pass."""
        assert self.contestant is not None
        work, finish, seconds = self.turns[name], self.contestant.finish, 0.0
        passes = steps if self.work.after_backward else 1
        for _ in range(passes):
            if self.work.after_backward:
                self.activations += 1
                self.contestant.backward()
                finish()
            seconds += self.timer.seconds(work, steps // passes, finish)
        return seconds / steps

    def teardown(self) -> dict[str, Any]:
        """Free everything; return the peak of memory since `setup`, without what was there before.

        That is host memory: on a GPU, where the arrays are elsewhere, torch alone could tell.
        """
        peak = memory_of_process("VmHWM") - self.resident_before
        self.contestant, self.turns = None, {}
        gc.collect()
        if self.cuda is not None:
            self.cuda.empty_cache()  # for the others' arrays
        return {"peak_bytes": peak if self.device == "cpu" else None}

    def zero_gradients(self, elements: int, steps: int) -> dict[str, Any]:
        """Return the seconds of steps whose gradients are zero, after a first that was not."""
        work = Work("zero gradients", ((elements,),))
        contestant = self.kind(work, self.device, arrays_like(work, 0), RATE)
        contestant.load([np.full(elements, 1e-3, np.float32)])
        contestant.step()
        contestant.load([np.zeros(elements, np.float32)])
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            contestant.step()
            contestant.finish()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def train(self) -> dict[str, Any]:
        """Train the network of `adamax_ext demo` until its accuracy on the test set is reached.

        Plain steps at a constant rate, raw weights, images without noise: less than the
        demonstration has, but what every contestant can do. Batches and first weights are equal.
        """
        from adamax_ext import demo

        rng = np.random.default_rng(0)
        digits, weights = demo.load_data(), demo.initial_weights(rng)
        x, y = digits["training set"]
        work = Work("training", tuple(w.shape for w in weights.values()))
        rate = RATE if self.kind.rule == "Adamax" else ADAM_RATE
        contestant = self.kind(work, self.device, [w.copy() for w in weights.values()], rate)
        contestant.load([np.zeros_like(w) for w in weights.values()])
        step_seconds: list[float] = []
        reached, epoch, start = 0.0, 0, time.perf_counter()
        while reached < demo.TARGET_ACCURACY and epoch < demo.EPOCHS:
            epoch += 1
            for batch in np.array_split(rng.permutation(len(x)), math.ceil(len(x) / 32)):
                weights = dict(zip(weights, contestant.weights(), strict=True))
                _, grads = demo.loss_and_gradients(weights, x[batch], y[batch])
                contestant.load(grads)
                step_start = time.perf_counter()
                contestant.step()
                contestant.finish()
                step_seconds.append(time.perf_counter() - step_start)
            weights = dict(zip(weights, contestant.weights(), strict=True))
            reached = demo.accuracy(weights, *digits["test set"])
        return {
            "epochs": epoch,
            "steps": len(step_seconds),
            "accuracy": reached,
            "target": demo.TARGET_ACCURACY,
            "total_seconds": time.perf_counter() - start,
            "step_seconds": {
                "median": statistics.median(step_seconds),
                "sum": sum(step_seconds),  # with a compiler, if there is one
            },
        }


def main(arguments: Sequence[str]) -> int:
    name, device, threads = arguments
    # Libraries print what they like: answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(name, device, int(threads))
    for line in sys.stdin:
        answer = worker.answer(**json.loads(line))
        with contextlib.suppress(BrokenPipeError):  # bench/peers.py was interrupted
            print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
