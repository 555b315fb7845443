"""A process in which JAX has two CPU devices: their number must be told before JAX starts."""

import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

HANG_SECONDS = 120  # only to end what would wait for ever


def _prepare():
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"


@functools.cache
def _process():
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare)


def run(check, *arguments):
    """Return `check(*arguments)` from that process; what it raises is raised."""
    return _process().submit(check, *arguments).result(HANG_SECONDS)
