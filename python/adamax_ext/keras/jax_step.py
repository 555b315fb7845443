"""The step on Keras' JAX backend: one native call for all variables, under Keras' own jit."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import keras
from keras.src.optimizers.base_optimizer import global_norm

from adamax_ext import _core, _settings
from adamax_ext.jax.step import Leaves, step
from adamax_ext.keras.settings import Settings

_beta = partial(_settings.real, wanted="in [0, 1)", valid=lambda x: 0 <= x < 1)
# Here, because an error in a compiled step comes when the variables are gone.
_CHECKS: dict[str, _settings.Check] = {
    "beta_1": _beta,
    "beta_2": _beta,
    "epsilon": _settings.positive,
    "weight_decay": _settings.optional(_settings.not_negative),
    "ema_momentum": partial(_settings.real, wanted="in [0, 1]", valid=lambda x: 0 <= x <= 1),
}


class JaxAdamax(keras.optimizers.Adamax):  # type: ignore[misc]
    """Adamax that is native but for norms of gradients: XLA knows how they add up over shards.

    What multiplies all gradients goes into the native step: XLA would write them once more.
    """

    _loss_scale: float | None = None  # of the present call

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Do one training step; see ``keras.optimizers.Adamax``.

        Raises
        ------
        ValueError, TypeError
            Gradients that do not fit to the variables, all of them None, unknown variables, a
            setting out of range. Nothing has changed then.
        """
        settings = Settings.of(self)
        for name, check in _CHECKS.items():
            check(name, getattr(settings, name))
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if self.built:
                self._check_variables_are_known(trainable_variables)
            grads = _fitting_tensors(grads, trainable_variables)
        elif len(grads) == len(self._trainable_variables):  # else Keras has the words
            grads = _fitting_tensors(grads, self._trainable_variables)
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
        settings = Settings.of(self)
        loss_scale: Any = 1.0 if self._loss_scale is None else float(self._loss_scale)
        if settings.clipnorm is not None:
            grads = self._clip_gradients([grad / loss_scale for grad in grads])
            loss_scale = 1.0
        if settings.global_clipnorm is not None:
            norm = global_norm(grads)
            # As Keras, one that is not finite makes all weights NaN.
            norm = jnp.where(jnp.isfinite(norm), norm, jnp.nan)
            limit = settings.global_clipnorm * loss_scale
            loss_scale = loss_scale * jnp.maximum(norm / limit, 1.0).astype(jnp.float32)
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
        """Do what is left to do where Keras accumulates gradients."""
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
        rate = keras.ops.convert_to_tensor(learning_rate)
        settings = {
            "learning_rate": rate.reshape(()).astype(jnp.promote_types(rate.dtype, jnp.float32)),
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


def _fitting_tensors(grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """Return gradients as tensors, if there is one or None for each variable, and of its shape."""
    if len(grads) not in (0, len(variables)):  # Keras does nothing without any
        raise ValueError(
            f"grads must have one entry for each of the {len(variables)} variables; received "
            f"{len(grads)}"
        )
    if len(set(map(id, variables))) < len(variables):
        raise ValueError("variables must be different ones; received one of them twice")
    tensors = []
    for i, (grad, variable) in enumerate(zip(grads, variables, strict=len(grads) > 0)):
        tensor = None if grad is None else keras.ops.convert_to_tensor(grad, sparse=False)
        if tensor is not None and tensor.shape != tuple(variable.shape):
            raise ValueError(
                f"grads[{i}] must have the shape {tuple(variable.shape)} of its variable; "
                f"received {tensor.shape}"
            )
        tensors.append(tensor)
    return tensors


def _fitting(grad: Any, param: Any, moment: Any) -> Any:
    """Return a gradient in a dtype that the native step takes, else in that of its parameter."""
    names = tuple(array.dtype.name for array in (param, grad, moment))
    return grad if names in _core.storages else grad.astype(param.dtype)
