"""No loop touches a byte beside its arrays: on every instruction set, and as a GPU's run here."""

import adamax_ext
from support.building import REPOSITORY, cpp_compiler, run

SOURCES = ("tests/cpp/guarded.cpp", "tests/cpp/emulated_cuda.cpp")


def test_every_loop_between_pages_that_cannot_be_touched(cpp_library, tmp_path):
    (archive,) = cpp_library.prefix.rglob("*.a")
    guarded = tmp_path / "guarded"
    includes = [f"-I{REPOSITORY / folder}" for folder in ("csrc", "csrc/include")]
    sources = [REPOSITORY / source for source in SOURCES]
    flags = ("-std=c++20", "-O1", "-ffp-contract=off", "-pthread")
    run(cpp_compiler(), *flags, *includes, *sources, archive, "-ldl", "-o", guarded)
    *each, total = run(guarded, 3).splitlines()  # every third length
    calls = {name: int(count) for name, count in (line.split(": ") for line in each)}
    assert list(calls) == [*adamax_ext.available_isas(), "cuda"]
    assert min(calls.values()) > 100_000
    assert total == f"{sum(calls.values())} calls on guarded memory"
