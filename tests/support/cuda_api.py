"""The C++ step for memory of a GPU, on an emulated one: `adamax::cuda::step`, by ctypes."""

import ctypes

import numpy as np

from support import emulated
from support.bits import PAIRS
from support.low_memory import ROUNDINGS

F64, I32, I64, MEMORY = ctypes.c_double, ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
SCALAR_TYPES = {np.dtype(name): i for i, name in enumerate(("float32", "float64", "int32"))}
CLIPS = {"clipnorm": 1, "global_clipnorm": 2}
ROLES = ("param", "grad", "m", "u", "average", "accumulator", "norm_scale", "remainder")


class Variable(ctypes.Structure):
    _fields_ = [
        *((role, MEMORY) for role in ROLES),
        ("size", I64),
        *((name, I32) for name in ("pair", "state", "rounding")),
        *((name, ctypes.c_uint32) for name in ("group", "number")),
        ("first_element", I64),
    ]


class Group(ctypes.Structure):
    _fields_ = [
        *((name, F64) for name in ("learning_rate", "beta_1", "beta_2", "epsilon")),
        *((name, F64) for name in ("weight_decay", "clipvalue", "ema_momentum")),
        ("step", I64),
        ("seed", ctypes.c_uint64),
        ("device_step", MEMORY),
        ("device_learning_rate", MEMORY),
        *((name, I32) for name in ("step_type", "learning_rate_type", "raises_step")),
        *((name, I32) for name in ("decay", "epsilon_rule", "maximize")),
    ]


class Call(ctypes.Structure):
    _fields_ = [
        ("grad_scale", F64),
        ("clip_limit", F64),
        ("micro_batches", I64),
        ("loss_scale", MEMORY),
        ("found_inf", MEMORY),
        *((name, I32) for name in ("clip_rule", "phase", "overwrite", "require_finite")),
        ("writes_gradients", I32),
        ("has_event", I32),
        ("other", ctypes.c_size_t),
        ("scratch_bytes", ctypes.POINTER(I64)),
    ]


def address(array):
    return None if array is None else array.ctypes.data


def variable_of(arrays, group, rounding="nearest", number=0, first_element=0):
    """Of arrays by their roles; `grad` may be missing. State is of the format of its dtype."""
    param = arrays["param"].dtype.name
    pair = (param, arrays["grad"].dtype.name) if "grad" in arrays else (param, param)
    state = {1: 2, 2: 1}.get(arrays["m"].itemsize, 0)
    return Variable(
        *(address(arrays.get(role)) for role in ROLES),
        arrays["param"].size,
        *(PAIRS.index(pair), state, ROUNDINGS.index(rounding)),
        *(group, number, first_element),
    )


def group_of(
    *,
    decay="decoupled",
    epsilon_mode="outside",
    clipvalue=None,
    device_step=None,
    device_learning_rate=None,
    raises_step=True,
    **settings,
):
    """Settings as of `_core.Group`, and arrays with one element for numbers in device memory."""
    group = Group(
        **{"learning_rate": 0.001, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7, "step": 1},
        ema_momentum=0.99,
        decay=1 + (decay == "l2"),
        epsilon_rule=epsilon_mode == "inside",
        clipvalue=clipvalue or 0.0,
        raises_step=raises_step,
    )
    for name, value in settings.items():
        setattr(group, name, value)
    for name, array in (("step", device_step), ("learning_rate", device_learning_rate)):
        if array is not None:
            setattr(group, f"device_{name}", address(array))
            setattr(group, f"{name}_type", SCALAR_TYPES[array.dtype])
    return group


class CudaCall:
    """A call that can be made again; with its scratch memory."""

    def __init__(self, variables, groups, **settings):
        self.variables = (Variable * len(variables))(*variables)
        self.groups = (Group * len(groups))(*groups)
        call = self.call = Call(grad_scale=1.0, micro_batches=1, phase=1)
        for name, value in settings.items():
            if name in CLIPS:
                call.clip_rule, call.clip_limit = CLIPS[name], value
            elif name in ("loss_scale", "found_inf"):
                setattr(call, name, address(value))
            else:
                setattr(call, name, value)

    def _do(self, stream, scratch):
        step = emulated.library().emulated_step
        step.restype = ctypes.c_char_p
        error = step(
            *(ctypes.c_size_t(stream), ctypes.c_void_p(address(scratch))),
            *(self.variables, ctypes.c_size_t(len(self.variables))),
            *(self.groups, ctypes.c_size_t(len(self.groups))),
            ctypes.byref(self.call),
        )
        if error is not None:
            raise RuntimeError(error.decode())

    def make_scratch(self):
        count = I64()
        self.call.scratch_bytes = ctypes.pointer(count)
        self._do(0, None)
        self.call.scratch_bytes = None
        self.scratch = np.empty(-(-count.value // 8), np.float64)

    def step(self, stream=7):
        self.make_scratch()
        self._do(stream, self.scratch)

    def capture(self, stream=7):
        """Capture the call into a graph, and destroy all that it was made of but its memory."""
        with emulated.captured(stream):
            self.step(stream)
        for structure in (self.variables, self.groups, self.call):
            ctypes.memset(ctypes.byref(structure), 0xA5, ctypes.sizeof(structure))
