"""Machines and buffers that are refused, on an emulated GPU."""

import adamax_ext
import numpy as np
import pytest
from adamax_ext import Adamax
from support import emulated
from support.emulated import CudaArray

MACHINES = {
    "no CUDA driver .*runtime 13.0 .*needs a driver for CUDA 13.0": {"driver": 0, "devices": 0},
    "driver supports CUDA 12.4; .*runtime 13.0 .*driver for CUDA 13.0": {"driver": 12040},
    "driver supports CUDA 12.0; .*runtime 12.8 .*CUDA 12.1": {"driver": 12000, "runtime": 12080},
    r"no CUDA device was found \(why\); .* CUDA 13.1; .* 13.0": {
        **{"driver": 13010, "devices": 0, "error": "why"}
    },
    "device 0 has compute capability 7.0; .*for 7.5, 8.6, 12.0 and newer than 12.0": {
        "capability": 70
    },
    "compute capability 8.0": {"capability": 80},
    "compute capability 9.0": {"capability": 90},
    "no CUDA device 1 among the 1": {"devices": 1},
}


def check_machine(message, machine):
    emulated.set_machine(**machine)
    try:
        weight = emulated.on_device_1(3, np.float32)
        for call in (Adamax().build, adamax_ext.global_norm):
            with pytest.raises(RuntimeError, match=rf"\[0\] is on a CUDA device: .*{message}"):
                call([weight])
        host = [np.ones(3, np.float32)]
        assert Adamax().apply(host, host) == 1  # the CPU does not care
    finally:
        emulated.set_machine()
    Adamax().build([weight])


@pytest.mark.parametrize(("message", "machine"), MACHINES.items(), ids=MACHINES)
def test_machines_that_cannot_run_kernels(message, machine):
    emulated.run(check_machine, message, machine)


def check_step():
    optimizer = Adamax()
    optimizer.build([CudaArray(ones())])
    assert optimizer.apply([CudaArray(ones())]) == 1


@pytest.mark.parametrize("capability", [75, 86, 89, 120, 121, 130])
def test_machines_that_can(capability):
    emulated.run(emulated.set_machine, 13000, 13000, 2, capability)
    emulated.run(check_step)
    emulated.run(emulated.set_machine)


def ones(n=6):
    return np.ones(n, np.float32)


def read_only():
    return CudaArray(ones(), data=(ones().ctypes.data, True))


REFUSALS = {
    "grads is in host memory; expected memory on CUDA device 0": (ValueError, ones),
    "grads is on CUDA device 1; expected memory on CUDA device 0": (
        *(ValueError, lambda: emulated.on_device_1(6, np.float32)),
    ),
    "has 5 elements": (ValueError, lambda: CudaArray(ones(5))),
    "expected the layout": (ValueError, lambda: CudaArray(ones(12)[::2])),
    "has dtype '<i4'": (TypeError, lambda: CudaArray(np.ones(6, np.int32))),
    "has dtype '>f4'": (TypeError, lambda: CudaArray(np.ones(6, ">f4"))),
    "has dtype float64 but": (TypeError, lambda: CudaArray(np.ones(6))),
    "has a mask": (ValueError, lambda: CudaArray(ones(), mask=1)),
    "has no memory": (BufferError, lambda: CudaArray(ones(), data=(0, False))),
}


def check_refusal(message):
    error, make = REFUSALS[message]
    weights = [CudaArray(ones())]
    optimizer = Adamax()
    optimizer.build(weights)
    message = message.replace("grads", r"grads\[0\] \(variable 'variable_0'\)")
    with pytest.raises(error, match=message):
        optimizer.apply([make()])
    assert weights[0].host.tolist() == ones().tolist()
    assert optimizer.apply([CudaArray(ones())]) == 1


@pytest.mark.parametrize("message", REFUSALS)
def test_refused_gradients(message):
    emulated.run(check_refusal, message)


def check_refused_variables():
    with pytest.raises(BufferError, match=r"^variables\[0\] .*is read-only"):
        Adamax().build([read_only()])
    with pytest.raises(ValueError, match=r"variables\[1\] .*in host memory; expected memory on"):
        Adamax().build([CudaArray(ones()), ones()])
    with pytest.raises(ValueError, match=r"variables\[1\] .*on CUDA device 1; expected .* host"):
        Adamax().build([ones(), emulated.on_device_1(6, np.float32)])
    with pytest.raises(TypeError, match=r"variables\[0\] is a StrangeArray on a GPU"):
        Adamax().build([StrangeArray(ones())])
    with pytest.raises(ValueError, match=r"buffers\[1\] is in host memory"):
        adamax_ext.global_norm([CudaArray(ones()), ones()])
    with pytest.raises(ValueError, match="u is in host memory"):
        adamax_ext.update(*map(CudaArray, (ones(), ones(), ones())), ones(), step=1)
    shared = ones()
    with pytest.raises(ValueError, match="overlaps"):
        Adamax().build([CudaArray(shared), CudaArray(shared)])


class StrangeArray:
    """Memory on a GPU, of a library without functions."""

    def __init__(self, host):
        self.array = CudaArray(host)

    @property
    def __cuda_array_interface__(self):
        return self.array.__cuda_array_interface__


StrangeArray.__module__ = "strange"


def test_refused_variables():
    emulated.run(check_refused_variables)
