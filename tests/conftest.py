"""Fixtures: builds of the C++ library, threads."""

import adamax_ext
import pytest
from adamax_ext import _core
from support.building import build_and_install
from support.processes import use_threads
from support.ranks import Ranks


@pytest.fixture(scope="session")
def cpp_library(tmp_path_factory):
    """As a user builds it."""
    return build_and_install(tmp_path_factory.mktemp("cpp_library"))


@pytest.fixture(scope="session")
def plain_cpp_library(tmp_path_factory):
    """For a processor without instruction sets of its own."""
    return build_and_install(
        tmp_path_factory.mktemp("plain_cpp_library"),
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=generic",
    )


@pytest.fixture
def threads():
    before = adamax_ext.get_num_threads()
    use_threads()
    yield
    _core._override_cpu_limit(0)
    adamax_ext.set_num_threads(before)


@pytest.fixture(scope="session")
def two_ranks():
    """Calls a function in each of two processes of one process group of torch."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()
