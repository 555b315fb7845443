"""Fixtures: builds of the C++ library, threads."""

import adamax_ext
import pytest
from adamax_ext import _core
from support.building import build_and_install
from support.frameworks import load_torch
from support.processes import use_threads
from support.processors import cross_options
from support.ranks import Ranks
from support.sequences import sequences  # noqa: F401 - registers the profile of hypothesis


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


@pytest.fixture(scope="session")
def aarch64_library(tmp_path_factory):
    """Cross-built by CMake."""
    return build_and_install(tmp_path_factory.mktemp("aarch64_library"), *cross_options())


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


@pytest.fixture(scope="session")
def fully_sharding_ranks(two_ranks):
    """The same, where torch's `fully_shard` averages the gradients of CPU ranks."""
    from support.sharded import averages

    if not all(two_ranks(averages)):
        pytest.skip("fully_shard of this torch adds the gradients of CPU ranks, not averages them")
    return two_ranks


@pytest.fixture
def one_torch_thread():
    """For networks so small that on a busy machine their threads mostly wait for each other."""
    torch = load_torch()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
