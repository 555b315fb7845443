"""Which threads do the work: our own, or those of the OpenMP runtime that is in the process."""

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import adamax_ext
import numpy as np
import pytest
from support.processes import (
    HANG_SECONDS,
    LARGE,
    Mxcsr,
    in_own_process,
    mode_is_kept,
    number_of_threads,
    trained,
    use_threads,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
SETTINGS = {"global_clipnorm": 1.0, "weight_decay": 0.1}


def load_openmp():
    try:
        return ctypes.CDLL("libgomp.so.1")
    except OSError:
        pytest.skip("needs libgomp.so.1")


def own_threads_and_then_a_runtime():
    adamax_ext.set_num_threads(1)
    expected = trained(**SETTINGS)
    use_threads()
    before = number_of_threads()
    assert trained(**SETTINGS) == expected
    assert number_of_threads() == before + 3
    assert trained(**SETTINGS) == expected
    assert number_of_threads() == before + 3, "threads were not used again"
    assert adamax_ext.build_info()["openmp"] is False
    load_openmp()
    assert trained(**SETTINGS) == expected
    assert number_of_threads() == before + 6
    assert adamax_ext.build_info()["openmp"] is True


def threads_of_the_runtime():
    openmp = load_openmp()
    nothing = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
    openmp.GOMP_parallel(nothing, None, 4, 0)
    before = number_of_threads()
    adamax_ext.set_num_threads(1)
    expected = trained(**SETTINGS)
    use_threads()
    assert trained(**SETTINGS) == expected
    assert number_of_threads() == before, "there are two pools"


RUNTIME_BEFORE_FORK = """
import ctypes, os
openmp = ctypes.CDLL("libgomp.so.1")
nothing = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
openmp.GOMP_parallel(nothing, None, 4, 0)
child = os.fork()
if child == 0:
    import test_threads
    test_threads.own_threads()
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1])
"""


def own_threads():
    before = number_of_threads()
    adamax_ext.set_num_threads(1)
    expected = trained(**SETTINGS)
    use_threads()
    assert trained(**SETTINGS) == expected
    assert number_of_threads() == before + 3
    assert adamax_ext.build_info()["openmp"] is False


def test_a_child_does_not_wait_for_the_threads_of_a_runtime_that_it_inherited():
    load_openmp()
    command = [sys.executable, "-c", RUNTIME_BEFORE_FORK]
    subprocess.run(command, check=True, cwd=Path(__file__).parent, timeout=HANG_SECONDS)


def limit_of_the_runtime():
    openmp = load_openmp()
    use_threads()
    assert adamax_ext.get_num_threads() == 4
    cpus = len(os.sched_getaffinity(0))
    openmp.omp_set_num_threads(1)
    assert adamax_ext.get_num_threads() == (1 if cpus > 1 else 4)
    openmp.omp_set_num_threads(cpus)
    assert adamax_ext.get_num_threads() == 4


def no_room_for_threads():
    """Without memory for their stacks fewer threads do all of the work."""
    array = np.ones(10 * LARGE, np.float32)
    adamax_ext.set_num_threads(1)
    expected = adamax_ext.global_norm([array])
    use_threads()
    before = number_of_threads()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * os.sysconf("SC_PAGESIZE") + 2**20
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    assert adamax_ext.global_norm([array]) == expected
    assert number_of_threads() == before


def threads_that_inherit_a_mode():
    adamax_ext.set_num_threads(1)
    expected = trained(**SETTINGS)
    use_threads()
    before = number_of_threads()
    for mode in (0x9FC0, 0x3F80):  # flush to zero; round down: of the thread that starts others
        assert trained(guard=lambda mode=mode: mode_is_kept(mode), **SETTINGS) == expected
        assert number_of_threads() == before + 3
    assert Mxcsr().get() == Mxcsr.DEFAULT


@pytest.mark.parametrize(
    "function",
    [
        own_threads_and_then_a_runtime,
        threads_of_the_runtime,
        limit_of_the_runtime,
        no_room_for_threads,
        threads_that_inherit_a_mode,
    ],
    ids=lambda function: function.__name__,
)
def test_threads(function):
    if function in (own_threads_and_then_a_runtime, threads_of_the_runtime, limit_of_the_runtime):
        load_openmp()
    in_own_process(function)
