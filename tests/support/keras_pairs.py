"""Variables, gradients and comparisons for our Adamax on Keras' backend: torch or JAX.

Who imports from here is skipped where Keras is not, or is on another backend.
"""

import contextlib

import numpy as np
import pytest

from support.frameworks import load_keras

keras = load_keras()
BACKEND = keras.backend.backend()
if BACKEND not in ("torch", "jax"):
    pytest.skip("needs keras on torch or JAX: KERAS_BACKEND", allow_module_level=True)

from adamax_ext.keras import Adamax as Adamax  # noqa: E402

Theirs = keras.optimizers.Adamax
# Settings that are not the defaults.
RULE = {"learning_rate": 0.02, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 0.02, "weight_decay": 0.1}
EMA = {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 3}
SHAPES = {"kernel": (7, 13), "bias": (13,), "gain": (), "deep_kernel": (3, 4, 5)}

only_torch = pytest.mark.skipif(BACKEND != "torch", reason="of Keras on torch: KERAS_BACKEND=torch")
only_jax = pytest.mark.skipif(BACKEND != "jax", reason="of Keras on JAX: KERAS_BACKEND=jax")


def with_64_bits(*dtypes):
    """Return a context in which the backend has arrays of these dtypes: JAX has to be asked."""
    if BACKEND == "torch" or not any("64" in dtype for dtype in dtypes):
        return contextlib.nullcontext()
    from support.jax_runs import x64

    return x64()


def no_grad():
    """Return a context in which torch records nothing."""
    if BACKEND == "jax":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def make_tensor(values, dtype="float32"):
    return keras.ops.convert_to_tensor(np.asarray(values), dtype)


def make_variables(dtype="float32", seed=7):
    rng = np.random.default_rng(seed)
    return [
        keras.Variable(rng.normal(size=shape), name=name, dtype=dtype)
        for name, shape in SHAPES.items()
    ]


def make_grads(call, dtype="float32"):
    rng = np.random.default_rng(1000 + call)
    return [make_tensor(rng.normal(size=shape), dtype) for shape in SHAPES.values()]


def train(optimizer, variables, calls, dtype="float32"):
    if BACKEND == "jax" and optimizer.gradient_accumulation_steps and len(calls) > 1:
        # Outside of jit Keras compiles its conditions anew in every call: half a second.
        from support.keras_jax import Compiled

        compiled = Compiled(optimizer, variables)
        for call in calls:
            compiled.apply(make_grads(call, dtype))
        return
    for call in calls:
        optimizer.apply(make_grads(call, dtype), variables)


def as_numpy(value):
    """A copy of a variable, tensor or array, with its dtype."""
    value = getattr(value, "_value", value)
    if BACKEND == "torch" and not isinstance(value, np.ndarray):
        value = value.detach()
        if keras.backend.standardize_dtype(value.dtype) == "bfloat16":
            import ml_dtypes
            import torch

            return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return np.array(value)


def everything(optimizer, variables):
    """A copy of weights and state."""
    return [as_numpy(v) for v in [*variables, *optimizer.variables]]


def assert_same(values, expected):
    """Bit for bit, in one dtype."""
    for i, (value, other) in enumerate(zip(values, expected, strict=True)):
        a, b = as_numpy(value), as_numpy(other)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), i
        assert a.tobytes() == b.tobytes(), i


def assert_near(optimizer, variables, others, their_variables, tolerance=2e-6):
    """Weights and state of two optimizers, relative to the largest element of each."""
    pairs = zip(
        [*variables, *optimizer.variables], [*their_variables, *others.variables], strict=True
    )
    for ours, theirs in pairs:
        a, b = as_numpy(ours).astype("float64"), as_numpy(theirs).astype("float64")
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
