"""Variables, gradients and comparisons for our Adamax on Keras' torch backend.

Who imports from here is skipped where Keras is not, or is on another backend.
"""

import numpy as np
import pytest

from support.frameworks import load_keras, load_torch

torch = load_torch()
keras = load_keras()
if keras.backend.backend() != "torch":
    pytest.skip("needs keras on torch: KERAS_BACKEND=torch", allow_module_level=True)

from adamax_ext.keras import Adamax as Adamax  # noqa: E402

Theirs = keras.optimizers.Adamax
SHAPES = {"kernel": (7, 13), "bias": (13,), "gain": (), "deep_kernel": (3, 4, 5)}


def make_variables(dtype="float32", seed=7):
    rng = np.random.default_rng(seed)
    return [
        keras.Variable(rng.normal(size=shape), name=name, dtype=dtype)
        for name, shape in SHAPES.items()
    ]


def make_grads(call, dtype="float32"):
    rng = np.random.default_rng(1000 + call)
    grads = [torch.tensor(rng.normal(size=shape)) for shape in SHAPES.values()]
    return [grad.to(getattr(torch, dtype)) for grad in grads]


def train(optimizer, variables, calls, dtype="float32"):
    for call in calls:
        optimizer.apply(make_grads(call, dtype), variables)


def everything(optimizer, variables):
    """A copy of weights and state."""
    return [v._value.detach().clone() for v in [*variables, *optimizer.variables]]


def assert_same(tensors, expected):
    """Bit for bit, in one dtype."""
    for i, (tensor, other) in enumerate(zip(tensors, expected, strict=True)):
        assert tensor.dtype == other.dtype, i
        assert torch.equal(tensor, other), i


def assert_near(optimizer, variables, others, their_variables, tolerance=2e-6):
    """Weights and state of two optimizers, relative to the largest element of each."""
    pairs = zip(
        [*variables, *optimizer.variables], [*their_variables, *others.variables], strict=True
    )
    for ours, theirs in pairs:
        a, b = ours.numpy().astype("float64"), theirs.numpy().astype("float64")
        assert np.isfinite(b).all()
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), theirs.path


class Pair:
    """Our optimizer and Keras', each on variables of its own."""

    def __init__(self, dtype="float32", **settings):
        self.dtype = dtype
        self.ours, self.theirs = Adamax(**settings), Theirs(**settings)
        self.variables, self.their_variables = make_variables(dtype), make_variables(dtype)
        self.ours.build(self.variables)
        self.theirs.build(self.their_variables)

    def each(self):
        return (self.ours, self.variables), (self.theirs, self.their_variables)

    def train(self, calls):
        for optimizer, variables in self.each():
            train(optimizer, variables, calls, self.dtype)

    def assert_near(self, tolerance=2e-6):
        assert_near(self.ours, self.variables, self.theirs, self.their_variables, tolerance)
