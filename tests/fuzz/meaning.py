"""What a description of memory means, and whether a call with such buffers is right.

Independently of the importers.
"""

import math
from dataclasses import dataclass

from exporters import DTYPES, numpy_dtype
from support.bits import PAIRS, compute_dtype

FLOATS = list(DTYPES)[:4]
# Entries of an array interface that nobody can take for right.
WRONG_ENTRIES = [
    *({"data": x} for x in (None, (), 5, ("x", False), (-1, False), (2**70, False))),
    *({"shape": x} for x in (None, 3, ("x",), (2**70,), (1.5,))),
    *({"strides": x} for x in (4, (4,) * 9, ("x",), (2**70,))),
    *({"typestr": x} for x in (None, "", "<", ">f4", "<f16", 4, "|O8")),
    {"mask": 1},
    {"stream": "x"},
    {"stream": -1},
]


@dataclass(frozen=True)
class Meaning:
    """A buffer as a step sees it; axes of length 1 mean nothing."""

    device: int | None  # None: the host
    dtype: str
    size: int
    layout: tuple
    is_dense: bool

    @property
    def bytes(self):
        return self.size * numpy_dtype(self.dtype).itemsize


def place(device):
    """Return the device in a tuple; () if no kernel runs there."""
    kind, number = device
    return {1: (None,), 3: (None,), 11: (None,)}.get(
        kind, (0,) if kind in (2, 13) and number == 0 else ()
    )


def meaning(says, writes):
    """Return what a description means; None if it must be refused."""
    is_dlpack = says.protocol in ("DLPack", "old DLPack", "table")
    lengths, strides = list(says.shape), says.strides
    if is_dlpack:
        axes = len(lengths) if says.axes is None else says.axes
        if not 0 <= axes <= 64 or says.lanes != 1 or (axes and not says.has_shape):
            return None
        more = axes - len(lengths)
        lengths = lengths[:axes] + [1] * more
        strides = None if strides is None else strides[:axes] + [1] * more
        where = place(says.device_of_tensor or says.device)
        if says.protocol != "table":
            is_named = says.capsule_name is None
            where = where if place(says.device) and is_named else ()
        if says.protocol == "DLPack" and (says.version[0] != 1 or (writes and says.flags & 3)):
            return None
    else:
        where = (0,) if says.protocol == "CUDA" else (None,)
        if says.protocol == "array interface" or (writes and says.flags & 1):
            return None
        if says.protocol == "CUDA" and (says.entries in WRONG_ENTRIES or says.dtype == "bfloat16"):
            return None
    size = math.prod(lengths)
    if not where or says.dtype not in DTYPES or any(n < 0 for n in lengths):
        return None
    if any(math.prod(lengths[:i]) >= 2**63 for i in range(len(lengths) + 1)):
        return None
    if size * numpy_dtype(says.dtype).itemsize >= 2**63 or (says.is_null and size):
        return None
    if strides is None:
        strides = [math.prod(lengths[i + 1 :]) for i in range(len(lengths))]
    pairs = [(n, s if size else 0) for n, s in zip(lengths, strides, strict=False) if n != 1]
    expected, is_dense = 1, True
    for n, s in sorted(pairs, key=lambda pair: pair[1]):
        is_dense = is_dense and s == expected
        expected *= n
    return Meaning(where[0], says.dtype, size, tuple(pairs), is_dense or size == 0)


def state_of(param, momentum):
    """Return the bits of the state with a first moment of that dtype; None if there is none."""
    if momentum == str(compute_dtype(numpy_dtype(param))):
        return 32
    of_dtype = {"bfloat16": 16, "uint16": 16, "int8": 8}
    return of_dtype.get(momentum) if param != "float64" else None


def is_right(buffers, roles, rounding):
    """Whether `update` must do a step with these meanings, by role; `roles` has their memory."""
    if None in buffers.values():
        return False
    param, state = buffers["param"], state_of(buffers["param"].dtype, buffers["m"].dtype)
    computed = str(compute_dtype(numpy_dtype(param.dtype)))
    dtypes = {
        "grad": [grad for of, grad in PAIRS if of == param.dtype],
        "u": {32: [computed], 16: ["bfloat16", "uint16"], 8: ["uint8"]}.get(state, []),
        "average": [computed],
        "norm_scale": ["float32"],
        "remainder": ["int16"],
    }
    if param.dtype not in FLOATS or not param.is_dense or state is None:
        return False
    for role, buffer in buffers.items():
        if buffer.dtype not in dtypes.get(role, [buffer.dtype]) or buffer.device != param.device:
            return False
        if role != "norm_scale" and buffer.layout != param.layout:
            return False
    if rounding != "nearest" and param.dtype == "float16":
        return False
    keeps_remainder = rounding == "remainder" and param.dtype == "bfloat16"
    if ("norm_scale" in buffers) != (state < 32) or ("remainder" in buffers) != keeps_remainder:
        return False
    if state < 32:
        scales = buffers["norm_scale"]
        if scales.size != (1 if state == 16 else -(-param.size // 256)) or not scales.is_dense:
            return False
    return not overlaps(buffers, roles)


def overlaps(buffers, roles):
    def stretch(role):
        begin = roles[role].address
        return begin, begin + buffers[role].bytes

    def meet(a, b):
        return a[0] < b[1] and b[0] < a[1] and a[0] < a[1] and b[0] < b[1]

    written = [role for role in buffers if role != "grad"]
    for i, role in enumerate(written):
        if any(meet(stretch(role), stretch(other)) for other in written[:i]):
            return True
        is_own = role == "param" and stretch("grad") == stretch("param")
        if meet(stretch(role), stretch("grad")) and not is_own:
            return True
    return False
