"""Fuzzes what buffers say of themselves: a call is refused, or computes with just those elements.

Memory is as large as a right description says and no larger, and is poisoned while it is not lent.
"""

import math
import sys
from dataclasses import replace

import adamax_ext
import numpy as np
from exporters import DTYPES, OTHER_DTYPES, Description, Memory, export, numpy_dtype
from harness import run
from meaning import FLOATS, WRONG_ENTRIES, is_right, meaning
from support import reference
from support.bits import PAIRS, bits, compute_dtype, widened
from support.steps import EMA_MOMENTUM, RULES, SETTINGS, expected_update

REFUSALS = (TypeError, ValueError, BufferError)
HOST, CUDA = (1, 0), (2, 0)
ON_HOST = ["NumPy", "view", "DLPack", "old DLPack", "table"]
ON_CUDA = ["DLPack", "old DLPack", "table", "CUDA"]
NUMBERS = [-1, 0, 1, 2, 3, 7, 2**31, 2**32 + 1, 2**61, 2**62, 2**63 - 1, -(2**63)]
RIGHT_ENTRIES = [{"stream": None}, {"stream": 1}, {"stream": 7}, {"version": 2}, {"version": "x"}]


# ---- Descriptions --------------------------------------------------------------------------------


def any_layout(b):
    shape = [b.pick([2, 3, 1, 4, 0]) for _ in range(b.below(4))]
    if b.one_in(6):
        shape = [b.pick([256, 257, 515])]
    strides, stride, left = [0] * len(shape), 1, list(range(len(shape)))
    while left:
        axis = left.pop(b.below(len(left)))
        strides[axis], stride = stride, stride * shape[axis]
    return shape, strides


def any_number(b):
    return b.ConsumeIntInRange(-(2**63), 2**63 - 1) if b.one_in(8) else b.pick(NUMBERS)


def described(b, dtype, shape, strides, device):
    protocol = b.pick(ON_HOST if device == HOST else ON_CUDA)
    says = Description(protocol, dtype, list(shape), list(strides), device=device)
    says.offset = b.pick([0, 0, 1, 4, 13])
    says.has_deleter = not b.one_in(16)
    if protocol == "CUDA" and b.one_in(3):
        says.entries = b.pick(RIGHT_ENTRIES)
    if protocol in ("DLPack", "old DLPack", "table") and b.one_in(3):
        says.byte_offset = b.pick([1, 24, 4096])
    if b.one_in(4) and 1 in (math.prod(shape), *shape):  # more axes of length 1
        says.shape.insert(0, 1)
        says.strides.insert(0, b.pick([1, 5, -3]))
    return says


def change(b, says):
    """Make a description another one, which need not be right."""
    axis = b.below(len(says.shape)) if says.shape else None
    what = b.below(14)
    if what < 4 and axis is None:
        says.shape, says.strides = [any_number(b)], [1]
    elif what < 2:
        says.shape[axis] = any_number(b)
    elif what == 2 and says.strides is not None:
        most = 2**63 - 1 if "DLPack" in says.protocol or says.protocol == "table" else 2**40
        says.strides[axis] = max(min(any_number(b), most), -most)
    elif what == 3 and says.strides is not None:
        says.shape.reverse()
        says.strides.reverse()
    elif what == 4:
        says.strides = None
    elif what == 5:
        says.dtype = b.pick([*DTYPES, *OTHER_DTYPES])
    elif what == 6:
        says.lanes = b.pick([0, 2, 65535])
    elif what == 7:
        says.axes = b.pick([-1, 0, 1, 2, 63, 64, 65, 70, 2**31 - 1, -(2**31)])
    elif what == 8:
        kind, number = b.pick([1, 2, 3, 4, 8, 11, 13, 0, -1, 99]), b.pick([0, 0, 1, -1])
        if b.one_in(2):
            says.device = kind, number
        else:
            says.device_of_tensor = kind, number
    elif what == 9:
        says.version = b.pick([0, 1, 2, 2**32 - 1]), b.pick([0, 9])
    elif what == 10:
        says.flags = b.pick([1, 2, 4, 3, 0x80])
    elif what == 11:
        says.is_null = says.protocol not in ("NumPy", "view")
    elif what == 12:
        says.has_shape = says.protocol not in ("DLPack", "old DLPack", "table")
    else:
        says.capsule_name = b.pick([b"used_dltensor", b"other", b""])
        if says.protocol == "CUDA":
            says.entries = b.pick(WRONG_ENTRIES)
        elif says.protocol == "NumPy" and says.device == HOST:
            says.protocol = "array interface"


# ---- Memory and calls ----------------------------------------------------------------------------

MOST = 1 << 16  # bytes of a buffer; one that says more has no memory


class Scene:
    """Exporters by role, on memory that some of them may share."""

    def __init__(self, b, says):
        self.says, self.means = says, {}
        homes = {role: role for role in says}
        for role in says:
            is_read = role == "grad" or role.startswith("buffer")
            self.means[role] = meaning(says[role], writes=not is_read)
        if len(says) > 1 and b.one_in(4):
            role, other = b.pick(list(says)), b.pick(list(says))
            if homes[other] == other:
                homes[role] = other
                size = min(self.means[other].bytes, 4096) if self.means[other] else 8
                last = max(size - 1, 0)
                says[role].offset = says[other].offset + b.pick([0, 0, 1, 4, size, last])
        sizes = dict.fromkeys(says, 0)
        for role, home in homes.items():
            seen = self.means[role]
            extent = seen.bytes if seen and seen.bytes <= MOST else 16
            sizes[home] = max(sizes[home], says[role].offset + extent)
        self.is_real = all(m is None or m.bytes <= MOST for m in self.means.values())
        self.is_real &= all(abs(math.prod(one.shape)) <= MOST for one in says.values())
        self.memories = {role: Memory(size) for role, size in sizes.items()}
        rng = np.random.default_rng(b.below(256))
        for role, home in homes.items():
            self.fill(rng, role, self.memories[home])
        self.before = self.images()
        try:
            self.roles = {role: export(s, self.memories[homes[role]]) for role, s in says.items()}
        except ValueError:  # NumPy has no such array
            self.roles = None
        self.homes = homes

    def fill(self, rng, role, memory):
        seen, bytes_ = self.means[role], memory.array()
        if seen is None or seen.dtype not in FLOATS or seen.bytes > MOST:
            bytes_[:] = rng.integers(1, 100, memory.size)
            return
        values = rng.uniform(0.25, 2, seen.size) * (1 if role == "u" else -1)
        begin = self.says[role].offset
        bytes_[begin : begin + seen.bytes] = np.frombuffer(
            values.astype(numpy_dtype(seen.dtype)).tobytes(), np.uint8
        )

    def images(self):
        return {home: memory.array().tobytes() for home, memory in self.memories.items()}

    def objects(self):
        return {role: getattr(e, "object", e) for role, e in self.roles.items()}

    def elements(self, images):
        """Return copies of what the descriptions mean, in the order of memory."""
        elements = {}
        for role, seen in self.means.items():
            begin = self.says[role].offset
            image = images[self.homes[role]][begin : begin + seen.bytes]
            elements[role] = np.array(bytearray(image), np.uint8).view(numpy_dtype(seen.dtype))
        return elements

    def gradient_is_parameter(self):
        return self.homes["grad"] == self.homes["param"] and (
            self.says["grad"].offset == self.says["param"].offset
        )

    def references(self):
        return {role: sys.getrefcount(e) for role, e in self.roles.items()}

    def call(self, function, is_right, expected):
        """Call and compare; `expected` returns the elements after it from those before it."""
        references, objects = self.references(), self.objects()
        try:
            function(objects)
        except REFUSALS as refusal:
            assert not is_right, f"a right call was refused: {refusal!r}"
            assert str(refusal), "an error without words"
        except RuntimeError as error:  # of a device
            assert not is_right and "device" in str(error), f"{error!r}"
        else:
            assert is_right, f"a wrong call was done: {self.says}"
        del objects
        for role in self.roles:
            self.roles[role].end()
        assert self.references() == references, "references were kept"
        for memory in self.memories.values():
            memory.lend()
        after = self.images()
        if not is_right:
            assert after == self.before, f"a refused call wrote: {self.says}"
            return
        wanted = {home: bytearray(image) for home, image in self.before.items()}
        found, values = self.elements(after), expected(self.elements(self.before))
        for role, value in values.items():
            if value.dtype.kind in "iu" or role not in found:
                same = np.array_equal(found[role], value)
            else:
                same = np.array_equal(bits(found[role]), bits(value))
            assert same, f"{role} is {found[role]}, not {value}: {self.says}"
            begin, memory = self.says[role].offset, wanted[self.homes[role]]
            memory[begin : begin + value.nbytes] = found[role].tobytes()
        assert after == {home: bytes(image) for home, image in wanted.items()}, "more was written"

    def free(self):
        for memory in self.memories.values():
            memory.free()


def update(b, device):
    shape, strides = any_layout(b)
    dtype, of_grad = b.pick(PAIRS)
    computed = str(compute_dtype(numpy_dtype(dtype)))
    state = b.pick([32, 32, 16, 8]) if dtype != "float64" else 32
    rounding = b.pick(["nearest", "stochastic", "remainder"]) if dtype == "bfloat16" else "nearest"
    of_m, of_u = {32: (computed, computed), 16: ("bfloat16", "uint16"), 8: ("int8", "uint8")}[state]
    dtypes = {"param": dtype, "grad": of_grad, "m": of_m, "u": of_u}
    if b.one_in(3):
        dtypes["average"] = computed
    if rounding == "remainder":
        dtypes["remainder"] = "int16"
    says = {role: described(b, of, shape, strides, device) for role, of in dtypes.items()}
    if state < 32:
        count = 1 if state == 16 else -(-math.prod(shape) // 256)
        says["norm_scale"] = described(b, "float32", [count], [1], device)
    for _ in range(b.pick([0, 0, 1, 1, 2])):
        change(b, says[b.pick(list(says))])
    scene = Scene(b, says)
    settings = {**SETTINGS, **b.pick(RULES), "step": b.pick([1, 2, 9])}
    others = {"ema_momentum": EMA_MOMENTUM, "weight_rounding": rounding}

    def expected(arrays):
        if state == 32 and rounding == "nearest":
            arrays = expected_update(arrays, **settings)
        else:  # this is about the buffers; a step on plain arrays has tests of its own
            adamax_ext.update(**arrays, **settings, **others)
        return arrays | ({"grad": arrays["param"]} if scene.gradient_is_parameter() else {})

    return scene, (
        lambda objects: adamax_ext.update(**objects, **settings, **others),
        scene.roles and is_right(scene.means, scene.roles, rounding),
        expected,
    )


def optimizer(b, device):
    shape, strides = any_layout(b)
    dtype, of_grad = b.pick(PAIRS)
    says = {
        "param": described(b, dtype, shape, strides, HOST),
        "grad": described(b, of_grad, shape, strides, HOST),
    }
    for _ in range(b.pick([0, 1, 1, 2])):
        change(b, says[b.pick(list(says))])
    scene = Scene(b, says)
    means = dict(scene.means)
    param = means["param"]
    right = False
    if None not in means.values() and scene.roles:
        state = replace(param, dtype=str(compute_dtype(numpy_dtype(param.dtype))))
        own = {role: Memory(max(state.bytes, 1) if state.bytes <= MOST else 1) for role in "mu"}
        right = is_right(means | dict.fromkeys("mu", state), scene.roles | own, "nearest")
        right = right and param.device is None
        for memory in own.values():
            memory.free()

    def call(objects):
        adamax = adamax_ext.Adamax(**SETTINGS)
        adamax.apply([objects["grad"]], [objects["param"]])
        adamax.apply([objects["grad"]])

    def expected(arrays):
        state = np.zeros(param.size, compute_dtype(numpy_dtype(param.dtype)))
        arrays = arrays | {"m": state, "u": state}
        for step in (1, 2):
            arrays = expected_update(arrays, step=step, **SETTINGS)
            if scene.gradient_is_parameter():
                arrays["grad"] = arrays["param"].copy()
        return {role: arrays[role] for role in ("param", "grad")}

    return scene, (call, right, expected)


def norm(b, device):
    says = {}
    for i in range(b.below(4)):
        says[f"buffer{i}"] = described(b, b.pick(FLOATS), *any_layout(b), device)
    for _ in range(b.below(3)):
        if says:
            change(b, says[b.pick(list(says))])
    scene = Scene(b, says)
    means = list(scene.means.values())
    right = scene.roles is not None and all(
        m is not None and m.is_dense and m.dtype in FLOATS and m.device == means[0].device
        for m in means
    )
    received = []

    def expected(arrays):
        norm = reference.global_norm([widened(a) for a in arrays.values()])
        assert np.array_equal(received, [norm], equal_nan=True)
        return arrays

    return scene, (
        lambda objects: received.append(adamax_ext.global_norm(iter(objects.values()))),
        right,
        expected,
    )


def target(b):
    entry = b.pick([update, update, update, optimizer, norm])
    scene, (function, right, expected) = entry(b, CUDA if b.one_in(3) else HOST)
    # An optimizer allocates state for what a parameter says, before it is compared with a gradient.
    may_lie = not right and entry is not optimizer
    if scene.roles is not None and (scene.is_real or may_lie):
        scene.call(function, bool(right), expected)
    scene.free()
    return None if scene.roles is not None else -1


run(target)
