"""The step on Keras' JAX backend: one native call for all variables, under Keras' own jit."""

import threading
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import keras
from keras.src.backend.common.variables import AutocastScope
from keras.src.optimizers.base_optimizer import global_norm

from adamax_ext import _core
from adamax_ext.configuration import Configured
from adamax_ext.jax.step import Leaves, step
from adamax_ext.keras.settings import settings_of

_applying = threading.local()  # its `optimizer` divides gradients natively in the present call


class JaxAdamax(keras.optimizers.Adamax):  # type: ignore[misc]
    """Adamax that is native but for norms of gradients: XLA knows how they add up over shards.

    What multiplies all gradients goes into the native step: XLA would write them once more.
    """

    @property
    def loss_scale_factor(self) -> float | None:
        """What the loss is multiplied by; None to Keras' own code where the step divides by it."""
        is_native = getattr(_applying, "optimizer", None) is self
        return None if is_native else self._loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: float | None) -> None:
        self._loss_scale_factor = factor

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Do one training step; see ``keras.optimizers.Adamax``.

        Raises
        ------
        ValueError, TypeError
            Gradients that do not fit to the variables, all of them None, unknown variables, a
            setting out of range. Nothing has changed then.
        """
        # An error in a compiled step would come when the variables are gone.
        settings = {**vars(settings_of(self)), "loss_scale_factor": self._loss_scale_factor}
        for name, setting in settings.items():
            Configured.checks[name](name, setting)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if self.built:
                self._check_variables_are_known(trainable_variables)
            grads = _fitting_tensors(grads, trainable_variables)
        elif len(grads) == len(self._trainable_variables):  # else Keras has the words
            grads = _fitting_tensors(grads, self._trainable_variables)
        before = getattr(_applying, "optimizer", None)
        _applying.optimizer = None if self.gradient_accumulation_steps else self
        try:
            super().apply(grads, trainable_variables)
        finally:
            _applying.optimizer = before

    def _backend_apply_gradients(self, grads: Sequence[Any], trainable_variables: Any) -> None:
        if self.gradient_accumulation_steps:
            # Keras' conditions have one dtype, that of the accumulators, which is ours.
            places = map(self._get_variable_index, trainable_variables)
            dtypes = [self._accumulated_gradients[i].dtype for i in places]
            grads = [grad.astype(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
            super()._backend_apply_gradients(grads, trainable_variables)
            return
        settings = settings_of(self)
        grads, loss_scale = self._clipped(grads, settings.global_clipnorm)
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
        averages = self._averages() if settings.use_ema else {}
        if averages:
            options["ema_momentum"] = settings.ema_momentum
            stepped = set(map(id, variables))
            variables += [
                v for v in self._trainable_variables if id(v) in averages.keys() - stepped
            ]
        of_variables = [averages[id(variable)] for variable in variables] if averages else []
        gradients = [grad for _, grad in pairs]
        self._step(variables, of_variables, gradients, self.learning_rate, **options)
        if averages and settings.ema_overwrite_frequency:
            overwrites = (self.iterations + 1) % settings.ema_overwrite_frequency == 0
            for variable, average in zip(variables, of_variables, strict=True):
                value = average.value.astype(variable.dtype)
                variable.assign(jnp.where(overwrites, value, variable.value))

    def _clipped(self, grads: Sequence[Any], global_clipnorm: float | None) -> tuple[Any, Any]:
        """Clip by norms; return gradients, and what the step has to divide them by."""
        factor = self._loss_scale_factor
        loss_scale = 1.0 if factor is None else float(factor)
        if self.clipnorm and self.clipnorm > 0:
            return self._clip_gradients([grad / loss_scale for grad in grads]), 1.0
        if global_clipnorm is None:
            return grads, loss_scale
        # In float32, as squares of scaled 16-bit gradients overflow.
        wide = [grad.astype(jnp.promote_types(grad.dtype, jnp.float32)) for grad in grads]
        return grads, jnp.maximum(global_norm(wide) / global_clipnorm, loss_scale)

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
        with AutocastScope(None):  # the variables themselves
            leaves = Leaves(*([variable.value for variable in kind] for kind in kinds))
            rate = keras.ops.convert_to_tensor(learning_rate)
        settings = {
            "learning_rate": rate,
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
