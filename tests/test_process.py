"""What a process does besides steps: forks, ends, interrupts, other interpreters and runtimes."""

import ctypes
import importlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import adamax_ext
import numpy as np
import pytest
from adamax_ext import Adamax
from support.processes import (
    HANG_SECONDS,
    forked,
    in_own_process,
    require_serial,
    trained,
    use_threads,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, finds runtimes in /proc")
SETTINGS = {"global_clipnorm": 1.0}
GNU, LLVM = "libgomp.so.1", "libomp.so.5"


# ---- Forks ---------------------------------------------------------------------------------------

FORKS = 20  # in each state


def fork_often(*runtimes, busy):
    """Fork after use of our own threads or of a runtime's; `busy`: and while a thread steps."""
    for name in runtimes:
        ctypes.CDLL(name)
    use_threads()
    expected, stop, stepping = trained(**SETTINGS), threading.Event(), threading.Event()

    def work():
        while not stop.is_set():
            stepping.set()
            trained(steps=1)

    thread = threading.Thread(target=work)
    if busy:
        thread.start()
        stepping.wait()
    try:
        for _ in range(FORKS):
            assert forked(partial(require_serial, expected))
    finally:
        stop.set()
        if busy:
            thread.join()
    assert trained(**SETTINGS) == expected


def fork_after_own_threads():
    fork_often(busy=False)


def fork_while_own_threads_work():
    fork_often(busy=True)


def fork_after_gnu():
    fork_often(GNU, busy=False)


def fork_while_gnu_works():
    fork_often(GNU, busy=True)


def fork_after_llvm():
    fork_often(LLVM, busy=False)


def fork_while_llvm_works():
    fork_often(LLVM, busy=True)


@pytest.mark.parametrize(
    ("function", "runtimes"),
    [
        (fork_after_own_threads, ()),
        (fork_while_own_threads_work, ()),
        (fork_after_gnu, (GNU,)),
        (fork_while_gnu_works, (GNU,)),
        (fork_after_llvm, (LLVM,)),
        (fork_while_llvm_works, (LLVM,)),
    ],
)
def test_forks(function, runtimes, record_property):
    require_in_a_process(runtimes)
    in_own_process(function)
    record_property("forks", FORKS)


def require_in_a_process(runtimes):
    """Skip where a runtime is not installed; not in this process, in which it would stay."""
    code = f"import ctypes; [ctypes.CDLL(name) for name in {runtimes!r}]"
    if subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode:
        pytest.skip(f"needs {runtimes}")


# ---- Several runtimes ----------------------------------------------------------------------------


def with_runtimes(*names):
    """Train beside OpenMP runtimes, each of which works before and after."""
    adamax_ext.set_num_threads(1)
    expected = trained(**SETTINGS)
    use_threads()
    nothing = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
    runtimes = [ctypes.CDLL(name) for name in names]
    for _ in range(3):
        for runtime in runtimes:
            runtime.GOMP_parallel(nothing, None, 4, 0)
            assert trained(**SETTINGS) == expected
    assert adamax_ext.build_info()["openmp"] is True


def gnu_and_llvm():
    with_runtimes(GNU, LLVM)


def llvm_and_gnu():
    with_runtimes(LLVM, GNU)


def two_of_llvm():
    """They end a process in which both work: so neither does, and threads are our own."""
    adamax_ext.set_num_threads(1)
    expected = trained(**SETTINGS)
    use_threads()
    ctypes.CDLL(LLVM)
    maps = Path("/proc/self/maps").read_text()
    path = next(line.split()[-1] for line in maps.splitlines() if "libomp" in line)
    with TemporaryDirectory() as folder:
        ctypes.CDLL(shutil.copy(path, Path(folder) / "libiomp5.so"))
    for _ in range(3):
        assert trained(**SETTINGS) == expected
    assert adamax_ext.build_info()["openmp"] is False


@pytest.mark.parametrize("function", [gnu_and_llvm, llvm_and_gnu, two_of_llvm])
def test_several_runtimes(function):
    require_in_a_process((GNU, LLVM))
    in_own_process(function)


def limits_of_threadpoolctl():
    from threadpoolctl import threadpool_limits

    ctypes.CDLL(GNU)
    use_threads()
    expected, threads = trained(**SETTINGS), adamax_ext.get_num_threads()
    with threadpool_limits(1):
        # Of one processor, 1 is what a runtime starts with, and no limit.
        assert adamax_ext.get_num_threads() == 1 or len(os.sched_getaffinity(0)) == 1
        assert trained(**SETTINGS) == expected
    assert adamax_ext.get_num_threads() == threads


def test_threadpoolctl_limits_threads():
    pytest.importorskip("threadpoolctl")
    require_in_a_process((GNU,))
    in_own_process(limits_of_threadpoolctl)


# ---- Other interpreters --------------------------------------------------------------------------

IN_INTERPRETER = """
try:
    import adamax_ext._core
except ImportError as error:
    text = str(error)
else:
    text = "imported"
with open({path!r}, "w") as file:
    file.write(text)
"""


IN_ONE_INTERPRETER = [
    r"adamax_ext must be imported in the main interpreter; received",
    r"does not support loading in subint",  # CPython's, from 3.12 on
    r"can only be loaded into one interpreter per process",  # NumPy's, before 1.25
]


def import_in_subinterpreters():
    """Import in interpreters with a GIL of their own, and in those that share that of the first."""
    try:
        interpreters = importlib.import_module("_interpreters")  # from CPython 3.13
        kinds = [lambda: interpreters.create(), lambda: interpreters.create("legacy")]
    except ImportError:
        interpreters = importlib.import_module("_xxsubinterpreters")
        kinds = [lambda: interpreters.create(), lambda: interpreters.create(isolated=False)]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        for create in kinds:
            for _ in range(2):
                interpreter = create()
                interpreters.run_string(interpreter, IN_INTERPRETER.format(path=str(path)))
                interpreters.destroy(interpreter)
                text = path.read_text()
                assert re.search("|".join(IN_ONE_INTERPRETER), text), text
    assert trained(steps=1) == trained(steps=1)


def test_a_subinterpreter_is_refused():
    in_own_process(import_in_subinterpreters)


# ---- Interrupts ----------------------------------------------------------------------------------


def interrupt_long_steps():
    """Ctrl-C in a step is raised behind it: it is done everywhere, and counted."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    use_threads()
    w, g, delay = np.ones(4_000_000, np.float32), np.ones(4_000_000, np.float32), random.Random(0)
    other, optimizer, twin = np.ones(1, np.float32), Adamax(), Adamax()
    optimizer.build([w])
    twin.build([other])
    for _ in range(60):
        try:
            signal.setitimer(signal.ITIMER_REAL, delay.uniform(1e-5, 4e-3))
            while True:
                optimizer.apply([g])
        except KeyboardInterrupt:
            pass
        while twin.iterations < optimizer.iterations:
            twin.apply([g[:1]])
        for array, expected in zip([w, *arrays(optimizer)], [other, *arrays(twin)], strict=True):
            assert (array == expected).all()
    assert optimizer.iterations > 0


def arrays(optimizer):
    return [array for kinds in optimizer.state.values() for array in kinds.values()]


def test_an_interrupted_step_is_whole_and_counted():
    in_own_process(interrupt_long_steps)


# ---- The end of the process ----------------------------------------------------------------------

ENDS = {  # how the main thread ends -> the exit status
    "pass": 0,
    "sys.exit(3)": 3,
    "os._exit(3)": 3,
    "raise RuntimeError": 1,
    "signal.raise_signal(signal.SIGTERM)": -signal.SIGTERM,
    "_thread.interrupt_main(); time.sleep(60)": -signal.SIGINT,
    "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)": -signal.SIGINT,
}
STEPPING = """
import _thread, ctypes, os, signal, sys, threading, time
from support.processes import use_threads
import adamax_ext, numpy as np
if {runtime!r}:
    ctypes.CDLL({runtime!r})
use_threads()
inside = threading.Event()
def work():
    w, g = np.ones(3_000_000, np.float32), np.ones(3_000_000, np.float32)
    optimizer = adamax_ext.Adamax(global_clipnorm=1.0)
    optimizer.build([w])
    optimizer.apply([g])
    inside.set()
    while True:
        optimizer.apply([g])
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
inside.wait()
{end}
"""


@pytest.mark.parametrize("runtime", ["", GNU, LLVM])
@pytest.mark.parametrize("end", ENDS)
def test_the_process_ends_while_threads_step(end, runtime):
    if runtime:
        require_in_a_process((runtime,))
    command = [sys.executable, "-c", STEPPING.format(runtime=runtime, end=end)]
    for _ in range(3):
        result = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=HANG_SECONDS,
        )
        assert result.returncode == ENDS[end], result.stdout
        assert "Fatal" not in result.stdout
