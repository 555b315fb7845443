"""Training runs, processes of their own, and a register of the processor."""

import contextlib
import ctypes
import itertools
import mmap
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import adamax_ext
import numpy as np
import pytest
from adamax_ext import Adamax, _core

SMALL, LARGE = 1_001, 300_007  # elements: on the caller's thread, and on several
HANG_SECONDS = 60  # only to detect what would wait for ever


def use_threads():
    """Use 4 threads, on however few processors."""
    _core._override_cpu_limit(4)
    adamax_ext.set_num_threads(4)


def data(seed, size, dtype):
    """Both signs, many magnitudes, subnormals among them."""
    rng, lowest = np.random.default_rng(seed), np.log2(float(np.finfo(dtype).smallest_subnormal))
    return (rng.choice([-1, 1], size) * np.exp2(rng.uniform(lowest, 4, size))).astype(dtype)


def trained(size=LARGE, steps=3, dtype=np.float32, seed=0, make=Adamax, guard=None, **settings):
    """The bits of weights and state after some steps, each done inside of `guard()`."""
    weights = [data(seed, size, dtype), data(seed + 1, 77, dtype)]
    optimizer = make(**settings)
    optimizer.build(weights)
    for step in range(steps):
        gradients = [data(seed + 10 + 2 * step + i, w.size, dtype) for i, w in enumerate(weights)]
        with guard() if guard else contextlib.nullcontext():
            optimizer.apply(gradients)
    with guard() if guard else contextlib.nullcontext():
        norm = adamax_ext.global_norm(gradients)
    states = itertools.chain(*(state.values() for state in optimizer.state.values()))
    return [norm.hex(), *(array.tobytes() for array in (*weights, *states))]


def in_own_process(function):
    """Call a function of a test module in a fresh process; fail if it raises or hangs."""
    module = function.__module__
    code = f"import {module}; {module}.{function.__name__}()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=HANG_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its forked children too: they hold the pipe
        pytest.fail(f"hangs; its output: {process.communicate()[0]}")
    assert process.returncode == 0, output


def number_of_threads():
    return len(os.listdir("/proc/self/task"))


def forked(function):
    """Whether `function` succeeds in a forked child."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def require_serial(expected):
    """Assert that a forked child steps on its only thread, with the `expected` bits."""
    for _ in range(2):
        assert adamax_ext.get_num_threads() == 1
        assert trained(global_clipnorm=1.0) == expected
        adamax_ext.set_num_threads(4)
    assert number_of_threads() == 1


class Mxcsr:
    """The control register of SSE on the calling thread, by two functions of machine code."""

    DEFAULT, FLAGS = 0x1F80, 0x3F

    def __init__(self):
        access = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=access)
        self._page.write(bytes.fromhex("0fae1fc3 0fae17c3"))  # stmxcsr, ret; ldmxcsr, ret
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        function = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint32))
        self._store, self._load = function(address), function(address + 4)

    def get(self):
        value = ctypes.c_uint32()
        self._store(value)
        return value.value & ~self.FLAGS

    def set(self, mode):
        self._load(ctypes.c_uint32(mode))

    def set_on_workers(self, mode):
        """Set it on the threads that the calling thread will use; they keep it.

        They are those of an OpenMP runtime, which is loaded for this and then does the work.
        """
        with contextlib.suppress(OSError):  # not there: threads are started in the caller's mode
            openmp = ctypes.CDLL("libgomp.so.1")
            openmp.GOMP_parallel(self._load, ctypes.byref(ctypes.c_uint32(mode)), 4, 0)
            self.set(self.DEFAULT)


@contextlib.contextmanager
def mode_is_kept(mode):
    mxcsr = Mxcsr()
    try:
        mxcsr.set(mode)
        yield
        after = mxcsr.get()
    finally:
        mxcsr.set(Mxcsr.DEFAULT)
    assert after == mode, f"{after:#x} instead of {mode:#x}"
