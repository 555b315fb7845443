"""Threads, forks, failures, long use and huge arrays change neither results nor memory."""

import contextlib
import ctypes
import functools
import gc
import mmap
import multiprocessing
import os
import sys
import threading
import time
import weakref
from pathlib import Path

import adamax_ext
import numpy as np
import pytest
from adamax_ext import Adamax, LossScaleOptimizer
from support.memory import DLPackOnly, OldDLPack, torch_alias
from support.processes import (
    LARGE,
    SMALL,
    data,
    forked,
    in_own_process,
    number_of_threads,
    require_serial,
    trained,
    use_threads,
)

pytestmark = pytest.mark.usefixtures("threads")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, forks")


# ---- Threads -------------------------------------------------------------------------------------


def progress_of_other_thread(call):
    """How often another thread ran during `call`, if it runs only when the GIL is given up."""
    count, started, stop = 0, threading.Event(), threading.Event()

    def other():
        nonlocal count
        while not stop.is_set():
            count += 1
            started.set()
            time.sleep(1e-4)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is asked to give up the GIL
    thread = threading.Thread(target=other)
    try:
        thread.start()
        started.wait()
        before = count
        call()
        return count - before
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("entry", ["update", "apply", "finalize", "global_norm"])
def test_other_threads_run_during_a_step(entry):
    w, g, m, u = (np.zeros(8_000_000, np.float32) for _ in range(4))
    optimizer = Adamax(use_ema=True)
    optimizer.build([w])
    optimizer.apply([g])
    call = {
        "update": lambda: adamax_ext.update(w, g, m, u, step=1),
        "apply": lambda: optimizer.apply([g]),
        "finalize": optimizer.finalize_variable_values,
        "global_norm": lambda: adamax_ext.global_norm([w, g, m, u]),
    }[entry]
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        assert progress_of_other_thread(lambda: sum(range(1_000_000))) == 0
    assert any(progress_of_other_thread(call) > 0 for _ in range(100))


@pytest.mark.parametrize(("threads_", "size", "steps"), [(2, LARGE, 5), (16, 100, 100)])
def test_optimizers_in_threads_do_as_in_turn(threads_, size, steps):
    settings = {"global_clipnorm": 1.0, "use_ema": True, "weight_decay": 0.1}
    run = functools.partial(trained, size, steps, **settings)
    expected = [run(seed=100 * i) for i in range(threads_)]
    results, barrier = [None] * threads_, threading.Barrier(threads_)

    def work(i):
        barrier.wait()
        results[i] = run(seed=100 * i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads_)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == expected


def test_threads_see_types_for_the_first_time_together():
    """What is remembered of a type and of a dtype is remembered for all threads."""
    wide = np.linspace(-3, 5, 1001)
    expected = [adamax_ext.global_norm([wide.astype(d)]) for d in (np.float32, np.float64)]
    threads_, norms, barrier = 8, [], threading.Barrier(8)

    def work():
        for i in range(50):
            lend = type("Lent", (DLPackOnly,), {}) if i % 2 else memoryview
            arrays = [wide.astype(dtype) for dtype in (np.float32, np.float64)]
            barrier.wait()
            norms.append([adamax_ext.global_norm([lend(a)]) for a in arrays])
            norms.append([adamax_ext.global_norm([a]) for a in arrays])

    workers = [threading.Thread(target=work) for _ in range(threads_)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert norms == [expected] * (threads_ * 100)


def test_optimizer_entered_twice_raises_and_goes_on():
    inside, leave, errors = threading.Event(), threading.Event(), []

    def rate():
        if threading.current_thread() is thread:
            inside.set()
            leave.wait()
        return 0.25

    optimizer, w, g = Adamax(rate), np.ones(3, np.float32), np.ones(3, np.float32)
    optimizer.build([w])
    thread = threading.Thread(target=optimizer.apply, args=([g],))
    thread.start()
    inside.wait()
    for call in (lambda: optimizer.apply([g]), optimizer.state_dict, lambda: optimizer.build([w])):
        try:
            call()
        except RuntimeError as error:
            errors.append(str(error))
    leave.set()
    thread.join()
    assert len(errors) == 3
    assert all("another call" in error for error in errors)
    assert optimizer.apply([g]) == 2


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_failure_leaves_everything_usable(size):
    def run(fails):
        weights = [data(1, size, np.float32), data(2, 50, np.float32)]
        optimizer = Adamax(global_clipnorm=1.0)
        optimizer.build(weights)
        for step in range(3):
            gradients = [data(10 * step + i, w.size, np.float32) for i, w in enumerate(weights)]
            optimizer.apply(gradients)
            bad = [np.zeros(51, np.float32), np.zeros(50), np.zeros(50, "i4"), object()]
            for second in bad if fails else ():
                with pytest.raises((TypeError, ValueError)):
                    optimizer.apply([gradients[0], second])
        return [w.tobytes() for w in weights]

    assert run(fails=True) == run(fails=False)


# ---- Forks ---------------------------------------------------------------------------------------


def fork_after_threads():
    use_threads()
    before = number_of_threads()
    expected = trained(global_clipnorm=1.0)
    assert number_of_threads() > before, "no threads were used"
    assert forked(lambda: require_serial(expected))

    def fork_again():
        require_serial(expected)
        assert forked(lambda: require_serial(expected))

    assert forked(fork_again)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(trained_for_pool, range(4)) == [expected] * 4
    assert adamax_ext.get_num_threads() == 4
    assert trained(global_clipnorm=1.0) == expected


def trained_for_pool(_):
    assert adamax_ext.get_num_threads() == 1
    return trained(global_clipnorm=1.0)


def fork_during_steps():
    use_threads()
    expected, stop = trained(global_clipnorm=1.0), threading.Event()

    def work():
        while not stop.is_set():
            trained()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(10):
            assert forked(lambda: require_serial(expected))
    finally:
        stop.set()
        thread.join()


@on_linux
@pytest.mark.parametrize("function", [fork_after_threads, fork_during_steps])
def test_forked_child_runs_serially(function):
    in_own_process(function)


# ---- Memory --------------------------------------------------------------------------------------


PROTOCOLS = {
    "numpy": lambda array: array[:],
    "memoryview": memoryview,
    "dlpack": DLPackOnly,
    "old_dlpack": OldDLPack,
    "torch": torch_alias,
}


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@on_linux
@pytest.mark.parametrize("lend", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize("fails", [False, True], ids=["steps", "refusals"])
def test_nothing_leaks(lend, fails):
    size, calls = 8_192, 2_000  # 64 MB of gradients
    array, other = np.ones(size, np.float32), np.ones(1, np.float64)
    optimizer, variable, bad = Adamax(), lend(array), lend(np.ones(2, np.float64))
    optimizer.build([variable, lend(other)])
    watched = [variable, array, other, bad, type(variable), np.dtype("f4"), np.dtype("f8")]
    gradients = []

    def call():
        gradient = np.ones(size, np.float32)
        gradients.append(weakref.ref(gradient))
        try:
            optimizer.apply([lend(gradient), bad if fails else lend(np.ones(1, np.float64))])
        except ValueError:
            assert fails

    for _ in range(20):
        call()
    gc.collect()  # what earlier tests left goes now, and not while references are counted
    references, memory = [sys.getrefcount(object_) for object_ in watched], resident_bytes()
    for _ in range(calls):
        call()
    assert optimizer.iterations == (0 if fails else calls + 20)
    gc.collect()
    assert [sys.getrefcount(object_) for object_ in watched] == references
    assert not any(gradient() is not None for gradient in gradients)
    assert resident_bytes() - memory < 16e6


def test_state_goes_with_its_optimizer():
    weights = np.ones(100, np.float32)
    before = sys.getrefcount(weights)
    gc.disable()  # there is no cycle that it would have to find
    try:
        optimizer = LossScaleOptimizer(Adamax(use_ema=True, gradient_accumulation_steps=2))
        optimizer.build([weights])
        optimizer.apply([weights.copy()])
        arrays = [weakref.ref(a) for state in optimizer.state.values() for a in state.values()]
        assert len(arrays) == 4
        assert sys.getrefcount(weights) > before
        del optimizer
        assert [array() for array in arrays] == [None] * 4
        assert sys.getrefcount(weights) == before
    finally:
        gc.enable()


# ---- More than 2^31 elements ---------------------------------------------------------------------

HUGE, TAIL = 2**31 + 4096, 2 * 4096 + 9  # elements before the tail, which lies beyond 2^31


@contextlib.contextmanager
def huge(dtype):
    """An array of HUGE zeros and TAIL more, in little memory: the zeros are the same pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    item, rw = np.dtype(dtype).itemsize, mmap.PROT_READ | mmap.PROT_WRITE
    zeros, total, part = HUGE * item, (HUGE + TAIL) * item, 2**22
    shared = os.memfd_create("zeros")
    os.ftruncate(shared, 2 * part)
    no_reserve, fixed = 0x4000, 0x10  # MAP_NORESERVE, MAP_FIXED of Linux
    begin = libc.mmap(None, total, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve, -1, 0)
    if begin == ctypes.c_void_p(-1).value:
        pytest.skip(f"needs {total / 2**30:.0f} GiB of addresses, not of memory")
    try:
        for offset in range(0, zeros, part):
            length = min(part, zeros - offset)
            libc.mmap(begin + offset, length, rw, mmap.MAP_SHARED | fixed, shared, 0)
        libc.mmap(begin + zeros, TAIL * item, rw, mmap.MAP_SHARED | fixed, shared, part)
        yield np.frombuffer((ctypes.c_char * total).from_address(begin), dtype)
    finally:
        libc.munmap(begin, total)
        os.close(shared)


def norm_of_huge():
    with huge(np.float16) as array:
        array[HUGE], array[-1] = 3, 4
        assert adamax_ext.global_norm([array]) == 5


def update_of_huge():
    dtypes = [np.float16, np.float16, np.float32, np.float32]
    tails = [data(i, TAIL, dtype) for i, dtype in enumerate(dtypes)]
    tails[3] = np.abs(tails[3])
    with contextlib.ExitStack() as stack:
        arrays = [stack.enter_context(huge(dtype)) for dtype in dtypes]
        for array, tail in zip(arrays, tails, strict=True):
            array[HUGE:] = tail
        adamax_ext.update(*arrays, step=3, weight_decay=0.1)
        adamax_ext.update(*tails, step=3, weight_decay=0.1)
        for array, tail in zip(arrays, tails, strict=True):
            assert array[HUGE:].tobytes() == tail.tobytes()
            assert not array[: 2**21].any()  # all pages of the zeros


@on_linux
@pytest.mark.parametrize("function", [norm_of_huge, update_of_huge])
def test_more_than_2_to_31_elements(function):
    with huge(np.float32):  # skips if there are not the addresses
        in_own_process(function)
