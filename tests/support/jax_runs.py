"""Trainings by adamax_ext.jax beside `adamax_ext.update` on NumPy arrays."""

import contextlib

import adamax_ext
import numpy as np

from support.bits import assert_same_bits, compute_dtype, dtype_of, spread
from support.frameworks import load_jax

jax = load_jax()
jnp = jax.numpy

from adamax_ext.jax import AdamaxState, adamax  # noqa: E402, F401 - needs jax

# Nothing here is a default, a power of two, or equal to another value.
SETTINGS = {"learning_rate": 0.0371, "b1": 0.83, "b2": 0.957, "eps": 3.1e-5}
RULES = [
    {"weight_decay": weight_decay, "decay": decay, "epsilon_mode": mode}
    for weight_decay, decay in [(0.0, "decoupled"), (0.213, "decoupled"), (0.213, "l2")]
    for mode in ("inside", "outside")
]
NAMES = {"b1": "beta_1", "b2": "beta_2", "eps": "epsilon"}  # in adamax_ext.update
FAILED = (RuntimeError, ValueError)  # what XLA makes of an error at run time, by the call's path


def x64(is_on=True):
    """Let JAX have arrays of 64 bits for a while."""
    if not is_on:
        return contextlib.nullcontext()
    if hasattr(jax, "enable_x64"):  # from jax 0.8 on
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


def weights(seed=0, dtype="float32", large=False):
    """Return a tree of NumPy arrays: nested, empty, without axes, of odd and even sizes."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        return np.asarray(spread(rng, shape, dtype_of(dtype)))

    return {
        "layers": [{"kernel": array(5, 7), "bias": array(7)}, {"kernel": array(16, 2)}],
        "nothing": None,
        "rest": (array(), array(0, 3), array(1, 1, 3)),
        **({"table": array(257, 301)} if large else {}),
    }


def grads_like(tree, step, dtype=None):
    """Return gradients of a step, one for each array."""
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(
        lambda w: np.asarray(spread(rng, w.shape, dtype_of(dtype or w.dtype.name))), tree
    )


def on_device(tree):
    """Return a tree of JAX's arrays, with memory of their own."""
    return jax.tree.map(lambda array: jnp.array(array, copy=True), tree)


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


class Twin:
    """The same training by `adamax_ext.update`, on copies of NumPy arrays."""

    def __init__(self, params, *, learning_rate, b1=0.9, b2=0.999, eps=1e-8, **rules):
        self.tree = jax.tree.structure(params)
        self.params = [np.array(w) for w in jax.tree.leaves(params)]
        self.mu, self.nu = (
            [np.zeros(w.shape, compute_dtype(w.dtype)) for w in self.params] for _ in range(2)
        )
        self.count = 0
        self.settings = {
            "learning_rate": learning_rate,
            **{"beta_1": b1, "beta_2": b2, "epsilon": eps, "epsilon_mode": "inside"},
            **rules,
        }

    def step(self, grads, **changed):
        self.count += 1
        arrays = zip(self.params, jax.tree.leaves(grads), self.mu, self.nu, strict=True)
        for param, grad, m, u in arrays:
            adamax_ext.update(param, grad, m, u, step=self.count, **self.settings | changed)

    def assert_same(self, params, state, label, atol=None):
        """Require equal bits of parameters and state; those of the parameters only without atol."""
        assert jax.tree.structure(params) == self.tree
        assert state.count.dtype == np.int32
        assert state.count.shape == ()
        assert int(state.count) == self.count
        for name, actual, expected in (
            ("params", params, self.params),
            ("mu", state.mu, self.mu),
            ("nu", state.nu, self.nu),
        ):
            leaves = jax.tree.leaves(actual)
            assert len(leaves) == len(expected)
            for i, (array, wanted) in enumerate(zip(leaves, expected, strict=True)):
                array = np.asarray(array)
                if name == "params" and atol is not None:
                    assert array.dtype == wanted.dtype
                    np.testing.assert_allclose(array, wanted, rtol=0, atol=atol)
                else:
                    assert_same_bits(array, wanted, f"{name} {i} after {label}")


def assert_same_trees(actual, expected):
    """Require the same structure, dtypes, shapes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for i, (a, b) in enumerate(pairs):
        assert_same_bits(np.asarray(a), np.asarray(b), f"leaf {i}")


def trained(tx, params, steps, *, step=None, grads=grads_like):
    """Return parameters and state, as NumPy arrays, after some steps."""
    step = step or jax.jit(tx.apply)
    params, host = on_device(params), params
    state = tx.init(params)
    for t in range(steps):
        params, state = step(params, on_device(grads(host, t)), state)
    return on_host((params, state))


def trained_twin(params, steps, **settings):
    twin = Twin(params, **settings)
    for t in range(steps):
        twin.step(grads_like(params, t))
    return twin
