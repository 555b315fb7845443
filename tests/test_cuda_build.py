"""Builds with and without CUDA kernels: options, what is loaded when, and the real messages.

A driver is a library that says its version: the real CUDA runtime believes a made one.
"""

import ctypes.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import adamax_ext
import pytest
from support.building import REPOSITORY, configure

ARCHITECTURES = adamax_ext.build_info()["cuda_architectures"]
needs_kernels = pytest.mark.skipif(
    not ARCHITECTURES, reason="this build has no CUDA kernels (.ci/run makes one that has)"
)

FIRST_USE = """
import json, sys
import numpy as np
import adamax_ext

class OnCuda:
    __cuda_array_interface__ = {**np.ones(3, np.float32).__array_interface__, "stream": 1}

host = [np.ones(3, np.float32)]
result = {"before": "adamax_ext._cuda" in sys.modules}
try:
    adamax_ext.Adamax().build([OnCuda()])
except Exception as error:
    result["error"] = f"{type(error).__name__}: {error}"
result["after"] = "adamax_ext._cuda" in sys.modules
result["host"] = adamax_ext.Adamax().apply(host, host)
print(json.dumps(result))
"""


def first_use(**environment):
    """Return what a fresh process sees of a CUDA array."""
    command = [sys.executable, "-c", FIRST_USE]
    environment = {**os.environ, **environment}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    return json.loads(output)


def driver(folder, version, initialized):
    """Build a CUDA driver with no devices; return the environment in which it is found."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = folder / "driver.c"
    source.write_text(
        f"int cuInit(unsigned flags) {{ return {initialized}; }}\n"
        f"int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}\n"
        "int cuDeviceGetCount(int *count) { *count = 0; return 0; }\n"
    )
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    return {"LD_LIBRARY_PATH": str(folder)}


def is_here(library):
    return ctypes.util.find_library(library) is not None


@pytest.mark.skipif(bool(ARCHITECTURES), reason="this build has CUDA kernels")
def test_a_build_without_kernels_says_so():
    result = first_use()
    assert result["error"] == (
        "RuntimeError: variables[0] is on a CUDA device: this build of adamax_ext has no CUDA "
        "kernels; expected one that was built with nvcc: pip install with "
        "-Ccmake.define.ADAMAX_EXT_CUDA=ON"
    )
    assert (result["before"], result["after"], result["host"]) == (False, False, 1)


@needs_kernels
@pytest.mark.skipif(is_here("cuda"), reason="a CUDA driver is installed")
def test_no_driver():
    result = first_use()
    assert "is on a CUDA device: no CUDA driver was found (libcuda.so.1)" in result["error"]
    assert "this build has CUDA runtime 1" in result["error"]
    assert (result["before"], result["after"], result["host"]) == (False, True, 1)


@needs_kernels
@pytest.mark.parametrize(
    ("version", "initialized", "message"),
    [
        (11040, 0, "the driver supports CUDA 11.4; this build has CUDA runtime 1"),
        (11040, 100, "and needs a driver for CUDA 1"),
        (19000, 100, "no CUDA device was found (no CUDA-capable device is detected); the driver "),
    ],
)
def test_drivers_that_are_old_or_see_no_device(tmp_path, version, initialized, message):
    result = first_use(**driver(tmp_path, version, initialized))
    assert result["error"].startswith("RuntimeError: variables[0] is on a CUDA device: ")
    assert message in result["error"]
    assert result["host"] == 1


@needs_kernels
def test_the_module_keeps_its_symbols():
    module = next(Path(adamax_ext._core.__file__).parent.glob("_cuda*.so"))
    tools = [shutil.which(name) for name in ("nm", "readelf")]
    if None in tools:
        pytest.skip("needs binutils")
    exported = subprocess.run(
        [tools[0], "-D", "--defined-only", module], check=True, capture_output=True, text=True
    ).stdout
    names = [line.split()[-1] for line in exported.splitlines()]
    assert "PyInit__cuda" in names
    assert not [name for name in names if name.startswith(("cuda", "cu")) or "adamax" in name]
    needed = subprocess.run(
        [tools[1], "-d", module], check=True, capture_output=True, text=True
    ).stdout
    assert "libcud" not in needed  # neither the driver nor a shared runtime


# ---- Options -------------------------------------------------------------------------------------


def output_of_configuring(folder, *options):
    """Whether it goes on to find pybind11 or not: CUDA is decided before."""
    try:
        return configure(REPOSITORY, folder / "build", "-DADAMAX_EXT_PYTHON=ON", *options)
    except AssertionError as error:
        return str(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["-DADAMAX_EXT_CUDA=ON"],
            "ADAMAX_EXT_CUDA=ON needs nvcc, the CUDA compiler: found nvcc 0",
        ),
        (["-DADAMAX_EXT_CUDA=MAYBE"], "ADAMAX_EXT_CUDA is MAYBE; expected AUTO, ON or OFF"),
        (["-DADAMAX_EXT_CUDA_ARCHITECTURES=80;90a"], "ADAMAX_EXT_CUDA_ARCHITECTURES has 90a"),
    ],
)
def test_options_that_cannot_be_met(tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("CUDACXX", str(tmp_path / "no-nvcc"))
    output = output_of_configuring(tmp_path, *options)
    assert message in output
    assert "CMake Error" in output


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def pretend_gpus(folder, monkeypatch, *capabilities):
    """Make a driver's tool that finds GPUs of these compute capabilities."""
    script(folder / "nvidia-smi", "\n".join(f"echo {c}" for c in capabilities))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def pretended_gpus(tmp_path, monkeypatch):
    pretend_gpus(tmp_path, monkeypatch, "9.0", "9.0")


def output_with_nvcc(folder, version, *options):
    """Configure with a compiler that says its version, and can do no more."""
    text = f"echo 'Cuda compilation tools, release {version}, V{version}.99'"
    nvcc = script(folder / "nvcc", text)
    return output_of_configuring(folder, f"-DCMAKE_CUDA_COMPILER={nvcc}", *options)


ON, NAMED = "-DADAMAX_EXT_CUDA=ON", "-DADAMAX_EXT_CUDA_ARCHITECTURES"


@pytest.mark.parametrize(
    ("version", "options", "architectures"),
    [
        ("12.1", [ON], "75 80 86 89 90"),
        ("12.7", [ON], "75 80 86 89 90"),
        ("12.8", [ON], "75 80 86 89 90 100 120"),
        ("13.0", [ON], "75 80 86 89 90 100 120"),
        ("12.1", [ON, f"{NAMED}=80;90"], "80 90"),
        ("12.8", [ON, f"{NAMED}=80;100"], "80 100"),
    ],
)
def test_what_a_version_of_nvcc_builds(tmp_path, version, options, architectures):
    output = output_with_nvcc(tmp_path, version, *options)
    assert f"CUDA architectures: {architectures}\n" in output
    is_cut = "in place of 100;120: found nvcc 12." in output
    assert is_cut == (options == [ON] and version < "12.8")


@pytest.mark.parametrize(
    ("version", "architectures", "needed"),
    [("12.0", "90", "12.1"), ("12.7", "90;100", "12.8"), ("12.4", "120", "12.8")],
)
def test_architectures_that_a_version_of_nvcc_lacks(tmp_path, version, architectures, needed):
    output = " ".join(output_with_nvcc(tmp_path, version, ON, f"{NAMED}={architectures}").split())
    assert f"found nvcc {version} (0: none on PATH or in CUDACXX); expected CUDA {needed}" in output
    assert f"for CUDA architectures {architectures}, or ADAMAX_EXT_CUDA=OFF" in output
    assert "CUDA architectures:" not in output


def test_auto_builds_what_nvcc_can(tmp_path, monkeypatch):
    pretend_gpus(tmp_path, monkeypatch, "8.6", "12.0")
    assert "CUDA architectures: 86 90\n" in output_with_nvcc(tmp_path, "12.4")
    assert "CUDA architectures: 86 120\n" in output_with_nvcc(tmp_path, "12.9")
    output = output_with_nvcc(tmp_path, "12.0")
    assert "CUDA architectures: \n" in output
    assert "built without CUDA kernels: found nvcc 12.0" in " ".join(output.split())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.usefixtures("pretended_gpus")
def test_auto_builds_for_the_gpu_that_is_there(tmp_path):
    assert "CUDA architectures: 90\n" in output_of_configuring(tmp_path)
    output = output_of_configuring(tmp_path, "-DADAMAX_EXT_CUDA=OFF")
    assert "CUDA architectures: \n" in output


@pytest.mark.usefixtures("pretended_gpus")
def test_auto_without_nvcc_warns_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDACXX", str(tmp_path / "no-nvcc"))
    output = output_of_configuring(tmp_path)
    assert "This machine has a GPU, but adamax_ext is built without CUDA kernels" in output
    assert "CUDA architectures: \n" in output


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_auto_builds_nothing_without_a_gpu(tmp_path):
    output = output_of_configuring(tmp_path)
    assert "CUDA architectures: \n" in output
    assert "CUDA compiler" not in output  # not even looked for
