"""Forced instruction sets and numbers of threads."""

import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import adamax_ext
import pytest
from adamax_ext import _core

every_isa = pytest.mark.parametrize("isa", adamax_ext.available_isas())


@functools.cache
def _process(isa):
    # Spawned, not forked: the instruction set is chosen once a process, at first use.
    return ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=_force, initargs=(isa,)
    )


def _force(isa):
    os.environ["ADAMAX_EXT_ISA"] = isa


def _checked(isa, check, arguments):
    result = check(*arguments)
    assert adamax_ext.active_isa() == isa, f"{adamax_ext.active_isa()} ran, not {isa}"
    return result


def run_on(isa, check, *arguments):
    """Return `check(*arguments)` from a process in which `isa` is forced and proved to have run.

    `check` is a function at the top of a module; what it raises is raised here. The process of an
    ISA is started once and serves all tests.
    """
    return _process(isa).submit(_checked, isa, check, arguments).result()


def each_thread_count():
    """Yield 1, 2, 3 and 7 while that many threads are used, on however few processors."""
    before = adamax_ext.get_num_threads()
    _core._override_cpu_limit(8)
    try:
        for threads in (1, 2, 3, 7):
            adamax_ext.set_num_threads(threads)
            yield threads
    finally:
        _core._override_cpu_limit(0)
        adamax_ext.set_num_threads(before)
