"""optax, and Keras on its backends."""

from typing import Any, ClassVar

import numpy as np

from contestants.base import (
    BETA_1,
    BETA_2,
    CLIP,
    EMA,
    EPSILON,
    FULL_OPTIONS,
    LOSS_SCALE,
    WEIGHT_DECAY,
    Contestant,
    Work,
)


class Optax(Contestant):
    """`optax.adamax` (`adamaxw` for the full step), all of a step in one jit, state donated."""

    packages: ClassVar[tuple[str, ...]] = ("optax", "jax", "jaxlib")

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import jax
        import optax

        self.jax = jax
        betas = {"b1": BETA_1, "b2": BETA_2, "eps": EPSILON}
        optimizer = optax.adamax(rate, **betas)
        if work.full:
            optimizer = optax.chain(
                optax.scale(1 / LOSS_SCALE),
                optax.clip_by_global_norm(CLIP),
                optax.adamaxw(rate, **betas, weight_decay=WEIGHT_DECAY),
            )

        def step(params: Any, state: Any, averages: Any, grads: Any) -> Any:
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            if work.full:
                averages = optax.incremental_update(params, averages, 1 - EMA)
            return params, state, averages

        self.compiled = jax.jit(step, donate_argnums=(0, 1, 2))
        self.params = [jax.numpy.array(p) for p in params]
        self.averages = [jax.numpy.array(p) for p in params] if work.full else []
        self.state = optimizer.init(self.params)

    def load(self, grads: list[Any]) -> None:
        self.grads = [self.jax.numpy.array(g) for g in grads]

    def step(self) -> None:
        self.params, self.state, self.averages = self.compiled(
            self.params, self.state, self.averages, self.grads
        )

    def finish(self) -> None:
        self.jax.block_until_ready(self.params)

    def weights(self) -> list[Any]:
        # Copies: a buffer that somebody looks at cannot be donated.
        return [np.array(p) for p in self.params]


class Keras(Contestant):
    """`keras.optimizers.Adamax` with its own arguments for the full step."""

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import keras

        self.keras, self.dtype, self.device = keras, work.dtype, device
        self.variables = [keras.Variable(p, dtype=work.dtype) for p in params]
        self.optimizer = keras.optimizers.Adamax(
            rate, BETA_1, BETA_2, EPSILON, **(FULL_OPTIONS if work.full else {})
        )
        self.optimizer.build(self.variables)

    def load(self, grads: list[Any]) -> None:
        convert = self.keras.ops.convert_to_tensor
        self.grads = [convert(g, dtype=self.dtype) for g in grads]

    def weights(self) -> list[Any]:
        return [self.keras.ops.convert_to_numpy(v) for v in self.variables]


class KerasTorch(Keras):
    environment: ClassVar[dict[str, str]] = {"KERAS_BACKEND": "torch"}
    packages: ClassVar[tuple[str, ...]] = ("keras", "torch")

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import torch

        self.torch = torch
        super().__init__(work, device, params, rate)
        if self.variables[0].value.device.type != device:  # Keras takes what there is
            raise RuntimeError(f"Keras' torch backend found no {device} device")

    def step(self) -> None:
        with self.torch.no_grad():  # as in Keras' own training loop
            self.optimizer.apply(self.grads)

    def finish(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()


class KerasJax(Keras):
    """What Keras' own training loop does with JAX: a jit of `stateless_apply`, state donated."""

    environment: ClassVar[dict[str, str]] = {"KERAS_BACKEND": "jax"}
    packages: ClassVar[tuple[str, ...]] = ("keras", "jax", "jaxlib")

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        super().__init__(work, device, params, rate)
        import jax

        self.jax = jax
        self.compiled = jax.jit(self.optimizer.stateless_apply, donate_argnums=(0, 2))
        self.state = [v.value for v in self.optimizer.variables]
        self.values = [v.value for v in self.variables]

    def step(self) -> None:
        self.values, self.state = self.compiled(self.state, self.grads, self.values)

    def finish(self) -> None:
        self.jax.block_until_ready(self.values)

    def weights(self) -> list[Any]:
        return [np.array(value) for value in self.values]


class KerasTensorflow(Keras):
    """What Keras' own training loop does with TensorFlow: a tf.function, compiled by XLA."""

    environment: ClassVar[dict[str, str]] = {
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    packages: ClassVar[tuple[str, ...]] = ("keras", "tensorflow")

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import tensorflow as tf

        if device == "cuda" and not tf.config.list_physical_devices("GPU"):
            raise RuntimeError("TensorFlow found no GPU")
        super().__init__(work, device, params, rate)
        self.compiled = tf.function(self.optimizer.apply, jit_compile=True, reduce_retracing=True)

    def step(self) -> None:
        self.compiled(self.grads)

    def finish(self) -> None:
        if self.device == "cuda":  # on a CPU the call itself waits
            self.keras.ops.convert_to_numpy(self.variables[-1].value[..., :1])
