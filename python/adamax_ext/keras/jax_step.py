"""The step on Keras' JAX backend: one native call for all variables, the rest as Keras has it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import keras

from adamax_ext import _core
from adamax_ext.jax.step import Leaves, step


class JaxAdamax(keras.optimizers.Adamax):  # type: ignore[misc]
    """Adamax whose update of the variables is native, in place under Keras' donating jit."""

    def _backend_apply_gradients(self, grads: Sequence[Any], trainable_variables: Any) -> None:
        if self.gradient_accumulation_steps:
            # Keras gives both branches of a condition what it accumulates in, which is ours.
            grads = [
                grad.astype(self._accumulated_gradients[self._get_variable_index(v)].dtype)
                for grad, v in zip(grads, trainable_variables, strict=True)
            ]
        super()._backend_apply_gradients(grads, trainable_variables)

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        places = [self._get_variable_index(variable) for variable in trainable_variables]
        kinds = (trainable_variables, *([kept[i] for i in places] for kept in (self._m, self._u)))
        params, mu, nu = ([variable.value for variable in kind] for kind in kinds)
        gradients = [
            _fitting(grad, param, moment)
            for grad, param, moment in zip(grads, params, mu, strict=True)
        ]
        rate = keras.ops.convert_to_tensor(learning_rate)
        settings = {
            "learning_rate": rate.reshape(()).astype(jnp.promote_types(rate.dtype, jnp.float32)),
            "b1": float(self.beta_1),
            "b2": float(self.beta_2),
            "eps": float(self.epsilon),
            "weight_decay": 0.0,  # Keras has done that
        }
        count = jnp.asarray(keras.ops.convert_to_tensor(self.iterations), jnp.int32)
        done = step(
            Leaves(params, mu, nu, count),
            gradients,
            settings,
            epsilon_mode="outside",
            decay="decoupled",
        )
        for variables, values in zip(kinds, done[:3], strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)


def _fitting(grad: Any, param: Any, moment: Any) -> Any:
    """Return a gradient in a dtype that the native step takes, else in that of its parameter."""
    names = tuple(array.dtype.name for array in (param, grad, moment))
    return grad if names in _core.storages else grad.astype(param.dtype)
