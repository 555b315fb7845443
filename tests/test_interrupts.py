"""Ctrl-C at any moment: a load is done or not, and an optimizer goes on; forks in mid-step."""

import contextlib
import math
import os
import random
import signal
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from adamax_ext import Adamax, LossScaleOptimizer
from support.processes import in_own_process

# ---- Ctrl-C --------------------------------------------------------------------------------------


def interrupt(*_):
    raise KeyboardInterrupt


def interrupted(call, seconds):
    """Whether `call` was interrupted after so many seconds of its own."""
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
        return False
    except KeyboardInterrupt:
        return True


def filled(optimizer, value):
    """A state_dict in which everything is made of `value`."""
    state_dict = optimizer.state_dict()
    state_dict |= {"calls": 3 * value + 1, "learning_rate": value / 4, "accumulated": ["a", "b"]}
    state_dict["loss_scale"] = {"dynamic_scale": 2.0**value, "step_counter": value}
    for array in [a for kinds in state_dict["state"].values() for a in kinds.values()]:
        array[...] = value
    return state_dict


def value_of(optimizer):
    values = [optimizer.iterations, optimizer.learning_rate * 4, math.log2(optimizer.dynamic_scale)]
    values += [optimizer.step_counter]
    values += [a.item(i) for k in optimizer.state.values() for a in k.values() for i in (0, -1)]
    assert len(set(values)) == 1, f"neither old nor new: {values}"
    return values[0]


def interrupt_loads():
    signal.signal(signal.SIGALRM, interrupt)
    delay, size = random.Random(0), 300_000
    optimizer = LossScaleOptimizer(Adamax(use_ema=True, gradient_accumulation_steps=3), 8.0)
    optimizer.build({"a": np.ones(size, np.float32), "b": np.ones(7)})
    old, new = filled(optimizer, 1), filled(optimizer, 2)
    optimizer.load_state_dict(new)
    store = {str(i): np.array(x) for i, x in enumerate(optimizer.variables)}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        optimizer.save(path)
        for load in (
            lambda: optimizer.load_state_dict(new),
            lambda: optimizer.load(path),
            lambda: optimizer.set_weights(store.values()),
            lambda: optimizer.load_own_variables(store),
        ):
            begin = time.perf_counter()
            load()
            longest, outcomes = time.perf_counter() - begin, set()
            for _ in range(200):
                optimizer.load_state_dict(old)
                was_interrupted = interrupted(load, delay.uniform(1e-5, longest))
                outcomes.add((was_interrupted, value_of(optimizer)))
            assert (True, 1) in outcomes
            assert (False, 1) not in outcomes


def interrupt_small_calls():
    """Thousands of calls that are mostly bookkeeping: none may leave the optimizer entered."""
    signal.signal(signal.SIGALRM, interrupt)
    delay, grads, variables = random.Random(0), [np.ones(3), np.ones(2)], [np.ones(3), np.ones(2)]
    for optimizer in (Adamax(), LossScaleOptimizer(Adamax())):

        def run(optimizer=optimizer):
            while True:
                optimizer.apply(grads, variables)
                optimizer.state_dict()

        for _ in range(1000):
            assert interrupted(run, delay.uniform(2e-5, 3e-4))
            calls = optimizer.apply(grads, variables)
        assert calls == optimizer.iterations > 1000


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that interrupts")
@pytest.mark.parametrize("function", [interrupt_loads, interrupt_small_calls])
def test_interrupts(function):
    in_own_process(function)


# ---- A fork in the middle of a step --------------------------------------------------------------


def outcome_in_child(call):
    """What `call` raises in a forked child, or "done"."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            call()
            text = "done"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with open(read) as file:
        return file.read()


def grandchild(call):
    return lambda: print(outcome_in_child(call)) or call()


def fork_in_mid_step():
    inside, go_on, gradient = threading.Event(), threading.Event(), np.ones(3)

    def rate():
        if threading.current_thread() is thread:
            inside.set()
            go_on.wait()
        return 0.1

    for wrap in (lambda adamax: adamax, LossScaleOptimizer):
        optimizer = wrap(Adamax(rate, use_ema=True))
        optimizer.build([np.ones(3)])
        calls = {
            "apply": lambda o=optimizer: o.apply([gradient]),
            "state_dict": optimizer.state_dict,
            "load_state_dict": lambda o=optimizer: o.load_state_dict({}),
            "set_weights": lambda o=optimizer: o.set_weights([]),
            "pickle": optimizer.__getstate__,
        }
        thread = threading.Thread(target=calls["apply"])
        inside.clear(), go_on.clear()
        thread.start()
        inside.wait()
        try:
            for name, call in calls.items():
                for in_child in (call, grandchild(call)):
                    outcome = outcome_in_child(in_child)
                    assert outcome.startswith("RuntimeError: this process was forked in mid-step")
                with contextlib.suppress(RuntimeError):
                    call()
                    raise AssertionError(f"{name} was let in")
            other = Adamax()
            assert outcome_in_child(lambda o=other: o.apply([gradient], [np.ones(3)])) == "done"
        finally:
            go_on.set()
            thread.join()
        assert outcome_in_child(calls["apply"]) == outcome_in_child(calls["pickle"]) == "done"
        assert outcome_in_child(grandchild(calls["apply"])) == "done"
        assert optimizer.apply([gradient]) == 2


def fork_by_a_rate():
    """The thread that forks goes on in the child too, and ends its step there."""
    children = []

    def rate():
        children.append(os.fork())
        return 0.1

    optimizer = Adamax(rate)
    for count in (1, 2):
        assert optimizer.apply([np.ones(3)], [np.ones(3)] if count == 1 else None) == count
    if 0 in children:
        os._exit(0)
    for pid in children:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("function", [fork_in_mid_step, fork_by_a_rate])
def test_forks(function):
    in_own_process(function)
