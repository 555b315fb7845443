"""The step on Keras' JAX backend: one native call for all variables, under Keras' own jit."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import keras
from keras.src.optimizers.base_optimizer import global_norm

from adamax_ext import _core
from adamax_ext.jax.step import Leaves, step
from adamax_ext.keras.settings import settings_of


class JaxAdamax(keras.optimizers.Adamax):  # type: ignore[misc]
    """Adamax that is native but for norms of gradients: XLA knows how they add up over shards.

    What multiplies all gradients goes into the native step: XLA would write them once more.
    """

    _loss_scale: float | None = None  # of the present call

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Do one training step; see ``keras.optimizers.Adamax``."""
        scale: float | None = self.loss_scale_factor  # type: ignore[has-type]
        if scale is None or self.gradient_accumulation_steps:
            super().apply(grads, trainable_variables)
            return
        self._loss_scale, self.loss_scale_factor = scale, None
        try:
            super().apply(grads, trainable_variables)
        finally:
            self._loss_scale, self.loss_scale_factor = None, scale

    def _backend_apply_gradients(self, grads: Sequence[Any], trainable_variables: Any) -> None:
        if self.gradient_accumulation_steps:
            # Keras' conditions have one dtype, that of the accumulators, which is ours.
            places = map(self._get_variable_index, trainable_variables)
            dtypes = [self._accumulated_gradients[i].dtype for i in places]
            grads = [grad.astype(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
            super()._backend_apply_gradients(grads, trainable_variables)
            return
        settings = settings_of(self)
        loss_scale: Any = float(self._loss_scale or 1.0)
        if settings.clipnorm is not None:
            grads = self._clip_gradients([grad / loss_scale for grad in grads])
            loss_scale = 1.0
        if settings.global_clipnorm is not None:
            loss_scale = jnp.maximum(global_norm(grads) / settings.global_clipnorm, loss_scale)
        # Those whose weights decay come first.
        pairs = sorted(
            zip(trainable_variables, grads, strict=True),
            key=lambda pair: not self._use_weight_decay(pair[0]),
        )
        options: dict[str, Any] = {
            "weight_decay": settings.weight_decay or 0.0,
            "decayed": sum(map(self._use_weight_decay, trainable_variables)),
            "loss_scale": loss_scale,
        }
        if settings.clipvalue is not None:
            options["clipvalue"] = settings.clipvalue
        variables = [variable for variable, _ in pairs]
        averages = self._averages() if self.use_ema else {}
        if averages:
            options["ema_momentum"] = settings.ema_momentum
            stepped = set(map(id, variables))
            variables += [
                v for v in self._trainable_variables if id(v) in averages.keys() - stepped
            ]
        self._step(
            variables,
            [averages[id(variable)] for variable in variables] if averages else [],
            [grad for _, grad in pairs],
            self.learning_rate,
            **options,
        )
        if averages and self.ema_overwrite_frequency:
            overwrites = (self.iterations + 1) % self.ema_overwrite_frequency == 0
            for variable in variables:
                average = averages[id(variable)].value.astype(variable.dtype)
                variable.assign(jnp.where(overwrites, average, variable.value))

    def _averages(self) -> dict[int, Any]:
        """Return the average of each variable that has one, by the variable's id."""
        pairs = zip(self._trainable_variables, self._model_variables_moving_average, strict=True)
        return {id(variable): average for variable, average in pairs if average is not None}

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        """Step with mean gradients: Keras has clipped them, and has decayed the weights."""
        self._step(trainable_variables, [], grads, learning_rate, weight_decay=0.0)

    def _step(
        self,
        variables: Sequence[Any],
        averages: Sequence[Any],
        grads: Sequence[Any],
        learning_rate: Any,
        **options: Any,
    ) -> None:
        """Step the first variables, for which there are gradients, and average all of them."""
        places = [self._get_variable_index(variable) for variable in variables]
        moments = ([kept[i] for i in places] for kept in (self._m, self._u))
        kinds = (variables, *moments, averages)
        leaves = Leaves(*([variable.value for variable in kind] for kind in kinds))
        settings = {
            "learning_rate": keras.ops.convert_to_tensor(learning_rate),
            "b1": float(self.beta_1),
            "b2": float(self.beta_2),
            "eps": float(self.epsilon),
            "epsilon_mode": "outside",
            "decay": "decoupled",
            "loss_scale": 1.0,
            **options,
        }
        gradients = list(map(_fitting, grads, leaves.params, leaves.mu))
        count = jnp.asarray(keras.ops.convert_to_tensor(self.iterations), jnp.int32)
        for kind, values in zip(kinds, step(leaves, gradients, count, settings), strict=True):
            for variable, value in zip(kind, values, strict=True):
                variable.assign(value)


def _fitting(grad: Any, param: Any, moment: Any) -> Any:
    """Return a gradient in a dtype that the native step takes, else in that of its parameter."""
    names = tuple(array.dtype.name for array in (param, grad, moment))
    return grad if names in _core.storages else grad.astype(param.dtype)
