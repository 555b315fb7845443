"""Other processors under QEMU, and Windows under Wine: steps by tests/cpp/driver.cpp."""

import importlib.util
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from support.bits import PAIRS, compute_dtype
from support.building import REPOSITORY, run
from support.steps import EMA_MOMENTUM

ROLES = ("param", "grad", "m", "u", "average", "accumulator", "norm_scale", "remainder")
STATES = {"uint16": 1, "int8": 2}  # by the dtype of `m`; others are in full
ROUNDINGS = ("nearest", "stochastic", "remainder")
DECAYS, EPSILONS = ("none", "decoupled", "l2"), ("outside", "inside")
AARCH64_COMPILER = "aarch64-linux-gnu-g++"
CLIPS, PHASES = (None, "norm", "global_norm"), ("accumulate", "update", "finalize")


def tool(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name} (Debian: g++-aarch64-linux-gnu, qemu-user, wine)")
    return path


def windows_compiler(folder):
    """Return the compiler and the archiver for Windows, Clang's as zig packs it."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("needs ziglang (pip install ziglang)")
    paths = []
    for name, command in (("c++", "c++ -target x86_64-windows-gnu"), ("ar", "ar")):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -m ziglang {command} "$@"\n')
        path.chmod(0o755)
        paths.append(path)
    return paths


def cross_options():
    """Return what CMake is told to build for AArch64."""
    system = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    return *system, f"-DCMAKE_CXX_COMPILER={tool(AARCH64_COMPILER)}"


def on_aarch64():
    """Return what stands before a command of AArch64 to run it here."""
    return tool("qemu-aarch64"), "-L", "/usr/aarch64-linux-gnu"


def build_driver(compiler, library, folder):
    """Return the driver, linked to an installed library."""
    (archive,) = library.prefix.rglob("libadamax_ext.a")
    driver = folder / "driver"
    source = REPOSITORY / "tests" / "cpp" / "driver.cpp"
    warnings = ("-Wall", "-Wextra", "-Werror")
    include = f"-I{library.prefix / 'include'}"
    run(
        compiler, "-std=c++20", "-O2", *warnings, include, source, archive, "-pthread", "-o", driver
    )
    return driver


class Processor:
    """Steps in place on NumPy arrays, in the process of a driver."""

    def __init__(self, command, isa, mode=None):
        self._process = subprocess.Popen(
            [*map(str, command), *([f"{mode:x}"] if mode is not None else [])],
            env={**os.environ, "ADAMAX_EXT_ISA": isa},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.isa = self._process.stdout.readline().decode().strip()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.communicate()
        assert self._process.returncode == 0 or any(error)

    def update(self, arrays, offset=0, **settings):
        """As `adamax_ext.update`, with the arrays that many bytes past whole vectors."""
        self.call([arrays], offset, **settings)

    def functional_update(self, *arrays, offset=0, **arguments):
        """With the arguments of `adamax_ext.update`."""
        arguments |= zip(ROLES, arrays, strict=False)
        arrays = {role: arguments.pop(role) for role in ROLES if role in arguments}
        self.call([arrays], offset, **arguments)

    def call(
        self,
        variables,
        offset=0,
        *,
        accumulated=(),  # indices of the variables whose accumulator holds gradients
        learning_rate=0.001,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-7,
        weight_decay=0.0,
        decay="decoupled",
        epsilon_mode="outside",
        clipvalue=None,
        ema_momentum=EMA_MOMENTUM,
        step=1,
        grad_scale=1.0,
        clip=None,
        limit=0.0,
        micro_batches=1,
        phase="update",
        overwrite=False,
        require_finite=False,
        threads=2,
        weight_rounding="nearest",
        seed=0,
        variable=0,  # the number of the first one
        first_element=0,
    ):
        """Return the norm of the gradients, and whether they are finite if that was asked for."""
        send, receive = self._process.stdin, self._process.stdout

        def numbers(*values):
            send.write(np.array(values, np.float64).tobytes())

        numbers(len(variables))
        numbers(learning_rate, beta_1, beta_2, epsilon, weight_decay, DECAYS.index(decay))
        numbers(EPSILONS.index(epsilon_mode), clipvalue or 0, ema_momentum, step)
        numbers(seed % 2**32, seed >> 32)
        numbers(grad_scale, CLIPS.index(clip), limit, micro_batches, PHASES.index(phase))
        numbers(overwrite, require_finite, threads)
        for index, arrays in enumerate(variables):
            param, grad = arrays["param"], arrays.get("grad")
            grad_name = compute_dtype(param.dtype).name if grad is None else grad.dtype.name
            storage = PAIRS.index((param.dtype.name, grad_name))  # in the order of kPairs
            storage = 3 * storage + STATES.get(arrays["m"].dtype.name, 0)
            storage = 3 * storage + ROUNDINGS.index(weight_rounding)
            numbers(storage, param.size, index in accumulated, variable + index, first_element)
            numbers(offset)
            for role in ROLES:
                array = arrays.get(role)
                numbers(array is not None)
                if array is not None:
                    send.write(array.tobytes("K"))
        send.flush()
        norm, is_finite = np.frombuffer(receive.read(16))
        for arrays in variables:
            for array in (arrays[role] for role in ROLES if arrays.get(role) is not None):
                got = np.frombuffer(receive.read(array.nbytes), array.dtype)
                array.ravel("K")[...] = got  # a view: these arrays are contiguous
                assert array.size == 0 or np.shares_memory(array, array.ravel("K"))
        return float(norm), bool(is_finite)
