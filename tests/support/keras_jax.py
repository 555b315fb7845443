"""Keras on JAX, for tests of what only that backend has: steps that are compiled.

Who imports from here is skipped where Keras is on another backend.
"""

import pytest

from support.frameworks import load_jax
from support.keras_pairs import BACKEND

jax = load_jax()
jnp = jax.numpy
if BACKEND != "jax":
    pytest.skip("needs keras on JAX: KERAS_BACKEND=jax", allow_module_level=True)


class Compiled:
    """The step of an optimizer as `fit` has it: under jit, with all that it overwrites donated."""

    def __init__(self, optimizer, variables):
        if not optimizer.built:
            optimizer.build(variables)
        self.optimizer, self.variables = optimizer, variables
        self.step = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))

    def apply(self, grads):
        state = self.optimizer.variables
        done = self.step([v.value for v in state], grads, [v.value for v in self.variables])
        for variable, value in zip([*self.variables, *state], [*done[0], *done[1]], strict=True):
            variable.assign(value)
