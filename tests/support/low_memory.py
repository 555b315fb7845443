"""State in fewer bits and weights with their rounding, beside the program."""

import itertools
from unittest import mock

import adamax_ext
import numpy as np
import pytest

from support import reference_lowmem as program
from support.bits import (
    PAIRS,
    assert_same_bits,
    dtype_of,
    is_testable,
    memory_order,
    rounded,
    spread,
    widened,
)
from support.memory import unaligned
from support.runs import MixedReference
from support.steps import EMA_MOMENTUM

ROUNDINGS = ("nearest", "stochastic", "remainder")
# Of an optimizer: bits of the state, rounding of the weights; all but the plain ones.
OPTIONS = [
    (bits, rounding)
    for bits in (32, 16, 8)
    for rounding in ROUNDINGS
    if (bits, rounding) != (32, "nearest")
]
every_option = pytest.mark.parametrize(("bits", "rounding"), OPTIONS)
needs_bfloat16 = pytest.mark.skipif(not is_testable("bfloat16"), reason="bfloat16 needs ml_dtypes")
# Parameter, gradient, bits of the state, rounding of the weights: all but the plain ones.
STORAGES = [
    (param, grad, bits, rounding)
    for param, grad in PAIRS
    if is_testable(param, grad)
    for bits in (32, 16, 8)
    for rounding in ROUNDINGS
    if rounding == "nearest" or param == "bfloat16"
    if bits < 32 or rounding != "nearest"
    if bits == 32 or param != "float64"
]


def low_state(size, bits, epsilon):
    """Return the program's state, which it keeps in these bits however few the elements are."""
    with mock.patch.object(program, "SMALLEST", 0):
        return program.LowState(size, bits, epsilon)


def low_weight(values, dtype, rounding):
    """Return the program's weights, of float32 values rounded to `dtype`."""
    storage = "bfloat16" if dtype == "bfloat16" else "float32"
    return program.LowWeight(widened(rounded(values, dtype_of(dtype))), storage, rounding)


class Twins:
    """One variable twice: in buffers for `update`, and as the program has it.

    It begins with any codes, unless `is_fresh`. All buffers begin `odd` bytes after where they
    should.
    """

    def __init__(self, rng, size, storage, *, is_fresh=False, odd=0, average=True, **place):
        self.param, self.grad, bits, rounding = storage
        self.place = {"seed": 2**63 + 7, "variable": 5, "first_element": 0} | place
        self.rounding, self.odd = rounding, odd
        self.weight = low_weight(spread(rng, size, np.float32, -10, 3), self.param, rounding)
        self.state = low_state(size, bits, 0.0)
        if not is_fresh:
            self._fill(rng, size, bits)
        self.average = widened(self.weight.read()) if average else None
        stored = {"m": self.state.momentum.ravel()[:size], "u": self.state.norm.ravel()[:size]}
        if bits < 32:
            stored["norm_scale"] = np.atleast_1d(self.state.scale)
        if rounding == "remainder" and self.param == "bfloat16":
            stored["remainder"] = self.weight.low
        if average:
            stored["average"] = self.average
        stored["param"] = self._as_stored()
        self.buffers = {name: unaligned(array, odd)[0] for name, array in stored.items()}

    def _fill(self, rng, size, bits):
        state = self.state
        if bits == 8:
            state.momentum = rng.integers(-127, 128, state.momentum.shape).astype(np.int8)
            state.norm = rng.integers(0, 256, state.norm.shape).astype(np.uint8)
            state.scale = np.exp2(rng.uniform(-20, 5, state.scale.size)).astype(np.float32)
            state.scale[rng.random(state.scale.size) < 0.2] = 0
            state.momentum[state.scale == 0] = state.norm[state.scale == 0] = 0
            return
        u = np.abs(spread(rng, size, np.float32, -10, 3))
        m = u * rng.uniform(-1, 1, size).astype(np.float32)
        if bits == 32:
            state.momentum, state.norm = m, u
        else:
            state.momentum, state.norm = program.bf16_nearest(m), program.bf16_nearest(u)
            state.scale = np.float32(rng.uniform(0.51, 1))

    def _as_stored(self):
        if self.param == "bfloat16":
            return self.weight.half.view(dtype_of("bfloat16"))
        return rounded(self.weight.value, dtype_of(self.param))

    def step(self, gradient, label, *, step, grad_scale=1.0, clipvalue=None, **settings):
        """Do one step on both, and require the same bits."""
        grad = unaligned(rounded(gradient, dtype_of(self.grad)), self.odd)[0]
        settings = {"step": step, "clipvalue": clipvalue, **settings}
        with np.errstate(all="ignore"):
            h = widened(grad) * np.float32(grad_scale)
        self.update(h, **settings)
        adamax_ext.update(
            grad=grad,
            **self.buffers,
            **self.place,
            grad_scale=grad_scale,
            ema_momentum=EMA_MOMENTUM,
            weight_rounding=self.rounding,
            **settings,
        )
        self.require_same(label)

    def update(self, h, *, step, overwrite=False, **settings):
        """Let the program do a step on its variable; `h` is unscaled, and clipped by norm."""
        inside = settings.get("epsilon_mode") == "inside"
        self.state.epsilon = 0.0 if inside else settings["epsilon"]
        draw = (self.place["seed"], step, self.place["variable"], self.place["first_element"])
        w = self.weight.read()
        with np.errstate(all="ignore"):
            drawn = program.random_bits(program.MOMENTUM, *draw, h.size)
            self.state.step(w, h, drawn, step=step, **settings)
            if self.param == "float16":
                w = widened(rounded(w, np.dtype(np.float16)))
            self.weight.write(w, program.random_bits(program.WEIGHT, *draw, h.size))
        if self.average is not None:
            self.update_average(step, overwrite=overwrite)

    def update_average(self, step, *, overwrite=False):
        """Of the weights as they are stored; at step 0 it is as it was."""
        w, k = self.weight.read(), np.float32(EMA_MOMENTUM)
        with np.errstate(all="ignore"):
            running = self.average * k + w * (np.float32(1) - k)
            self.average = (self.average, w)[step] if step < 2 else running
            if not overwrite:
                return
            if self.param != "bfloat16":
                self.weight.value = widened(rounded(self.average, dtype_of(self.param)))
            elif self.rounding == "remainder":
                self.weight.half, self.weight.low = program.bf16_split(self.average)
            else:
                self.weight.half = program.bf16_nearest(self.average)

    def require_same(self, label):
        size = self.buffers["param"].size
        expected = {
            "m": self.state.momentum.ravel()[:size],
            "u": self.state.norm.ravel()[:size],
            "param": self._as_stored(),
            "average": self.average,
        }
        if "norm_scale" in self.buffers:
            expected["norm_scale"] = np.atleast_1d(self.state.scale)
        if "remainder" in self.buffers:
            expected["remainder"] = self.weight.low
        for name, array in self.buffers.items():
            assert_same(array, expected[name], f"{name} after {label}")
        if self.param == "bfloat16" and self.rounding != "nearest":  # every NaN is the same one
            halves = self.buffers["param"].view(np.uint16)
            np.testing.assert_array_equal(halves, self.weight.half, f"bits after {label}")


def assert_same(actual, expected, label):
    """As `assert_same_bits`, also of integers."""
    if actual.dtype.kind in "iu":
        np.testing.assert_array_equal(actual, expected, label, strict=True)
    else:
        assert_same_bits(actual, expected, label)


def check_nans(rounding):
    """The largest, which CUDA makes, becomes -0 where only something is added to its bits."""
    words = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF8000, 0x7F800001, 0xFF800001], np.uint32)
    gradients = np.resize(words, 300).view(np.float32)
    weights = np.ones(300, dtype_of("bfloat16"))
    m, u = np.zeros(300, np.float32), np.zeros(300, np.float32)
    kept = {"remainder": np.zeros(300, np.int16)} if rounding == "remainder" else {}
    adamax_ext.update(weights, gradients, m, u, step=1, weight_rounding=rounding, **kept)
    assert (weights.view(np.uint16) == program.QUIET).all()
    assert not any(remainder.any() for remainder in kept.values())


def check_zeroed_weights():
    """By somebody else, whatever remainder was kept of what they were."""
    for zero, remainder in itertools.product((0, 0x8000), (-32768, -1, 0)):
        halves, kept = np.full(300, zero, np.uint16), np.full(300, remainder, np.int16)
        weights = halves.view(dtype_of("bfloat16"))
        m, u, nothing = (np.zeros(300, np.float32) for _ in range(3))
        settings = {"step": 3, "remainder": kept, "weight_rounding": "remainder"}
        adamax_ext.update(weights, nothing, m, u, **settings)
        assert (halves == zero).all()
        assert not kept.any()


class LowMemoryReference(MixedReference):
    """The program with all settings: what it keeps between steps is in few bits."""

    def __init__(self, state_bits=32, weight_rounding="nearest", seed=0, **settings):
        super().__init__(**settings)
        self.state_bits, self.weight_rounding, self.seed = state_bits, weight_rounding, seed

    def build(self, variables):
        super().build(variables)
        self.dtypes = [v.dtype for v in variables]
        self.weights = [
            low_weight(w, dtype.name, self.weight_rounding)
            for w, dtype in zip(self.variables, self.dtypes, strict=True)
        ]
        self.states = [
            program.LowState(w.size, self.state_bits, self.epsilon) for w in self.variables
        ]

    def _step(self, i, h, *, step, **settings):
        w = self.variables[i]
        if w.dtype == np.float64:
            return super()._step(i, h, step=step, **settings)
        if w.size == 0:  # whose scale is nobody's
            return None
        draw = self.seed, step, i, 0, w.size
        random = program.random_bits(program.MOMENTUM, *draw)
        self.states[i].step(w, h, random, step=step, **settings)
        if self.dtypes[i].name == "bfloat16":
            self.weights[i].write(w, program.random_bits(program.WEIGHT, *draw))
            w[...] = self.weights[i].read()
        return None

    def _store(self, w):
        i = next(i for i, other in enumerate(self.variables) if other is w)
        with np.errstate(all="ignore"):
            if self.dtypes[i].name != "bfloat16":
                w[...] = widened(rounded(w, self.dtypes[i]))
            elif self.weight_rounding == "remainder":
                self.weights[i].half, self.weights[i].low = program.bf16_split(w)
            else:
                self.weights[i].half = program.bf16_nearest(w)
                w[...] = program.bf16_widen(self.weights[i].half)

    def kept(self, i):
        """Return the arrays of a variable as they are stored, and its weights."""
        dtype, weight = self.dtypes[i], self.weights[i]
        kept = {"average": self.average[i], "gradient_accumulator": self.accumulator[i]}
        if dtype == np.float64:
            return {**kept, "momentum": self.m[i], "norm": self.u[i], "weights": self.variables[i]}
        state, size = self.states[i], self.variables[i].size
        kept |= {"momentum": state.momentum.ravel()[:size], "norm": state.norm.ravel()[:size]}
        if state.scale is not None:
            kept["norm_scale"] = np.atleast_1d(state.scale)
        if dtype.name == "bfloat16":
            return {**kept, "remainder": weight.low, "weights": weight.half.view(dtype)}
        return {**kept, "weights": rounded(self.variables[i], dtype)}


def assert_same_training(ours, theirs, weights, label):
    """Require the bits of the program in every weight and every array of the state."""
    for i, (name, arrays) in enumerate(ours.state.items()):
        expected = theirs.kept(i)
        assert_same(memory_order(weights[i]), expected["weights"], f"{name} after {label}")
        for kind, array in arrays.items():
            assert_same(memory_order(array), expected[kind], f"{kind} of {name} after {label}")


def set_to(value):
    """Return what returns an array with another last element."""

    def changed(array):
        array = np.array(array)
        array.flat[-1] = value
        return array

    return changed
