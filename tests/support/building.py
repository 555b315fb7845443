"""Commands, and builds of the C++ library."""

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class CppLibrary:
    objects: dict[str, Path]  # by the name of their source, without its ending
    prefix: Path  # where it is installed


def run(*command):
    """Return the output of `command`; on failure show all of it."""
    result = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}"
    return result.stdout


def cmake(*arguments):
    path = shutil.which("cmake")
    if path is None and importlib.util.find_spec("cmake") is None:
        pytest.skip("needs cmake, which is not installed (pip install cmake)")
    return run(*([path] if path else [sys.executable, "-m", "cmake"]), *arguments)


def cpp_compiler():
    names = filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"])
    found = next(filter(shutil.which, names), None)
    if found is None:
        pytest.skip("needs a C++ compiler")
    return found


def configure(source, build, *options):
    cpp_compiler()
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    if not ninja and shutil.which("make") is None:
        pytest.skip("needs ninja or make")
    return cmake("-S", source, "-B", build, *ninja, *options)


def build_and_install(folder, *options):
    build, prefix = folder / "build", folder / "prefix"
    configure(REPOSITORY, build, "-DADAMAX_EXT_PYTHON=OFF", *options)
    cmake("--build", build, "--parallel", os.cpu_count())
    cmake("--install", build, "--prefix", prefix)
    objects = {path.name.split(".")[0]: path for path in build.rglob("*.o")}
    return CppLibrary(objects, prefix)


def run_cpp(library, program, folder):
    """Compile a program with the installed library, and run it."""
    source, executable = folder / "program.cpp", folder / "program"
    source.write_text(program)
    (archive,) = library.prefix.rglob("*.a")
    include = library.prefix / "include"
    run(cpp_compiler(), "-std=c++20", "-pthread", f"-I{include}", source, archive, "-o", executable)
    return run(executable)
