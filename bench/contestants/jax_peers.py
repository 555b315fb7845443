"""optax, and Keras on its backends."""

from collections.abc import Callable
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
from contestants.torch_peers import backward, wait


class Jax(Contestant):
    """A jit of a step that donates its `state`, the list of weights first.

    JAX pairs donated buffers with results in order, and what does not fit is copied unseen: so the
    state goes in and comes out in one order, and bench/worker.py checks `places`.
    """

    def compile(self, step: Callable[[Any, Any], Any], state: tuple[Any, ...]) -> None:
        import jax

        self.jax, self.state = jax, state
        self.compiled = jax.jit(step, donate_argnums=0)
        self.gradients = jax.jit(jax.grad(lambda weights: sum((w * w).sum() for w in weights)))

    def backward(self) -> None:
        self.grads = self.jax.block_until_ready(self.gradients(self.state[0]))

    def step(self) -> None:
        self.state = self.compiled(self.state, self.grads)

    def finish(self) -> None:
        self.jax.block_until_ready(self.state[0])

    def weights(self) -> list[Any]:
        # Copies: a buffer that somebody looks at cannot be donated.
        return [np.array(w) for w in self.state[0]]

    def places(self) -> list[int]:
        return [leaf.unsafe_buffer_pointer() for leaf in self.jax.tree.leaves(self.state)]


class Optax(Jax):
    """`optax.adamax` (`adamaxw` for the full step), all of a step in one jit."""

    packages: ClassVar[tuple[str, ...]] = ("optax", "jax", "jaxlib")

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import jax
        import optax

        self.full, self.rate, self.optax = work.full, rate, optax
        optimizer = self.make_optimizer()

        def step(state: Any, grads: Any) -> Any:
            params, state, averages = state
            params, state = self.apply(optimizer, params, grads, state)
            if work.full:
                averages = optax.incremental_update(params, averages, 1 - EMA)
            return params, state, averages

        averages = [jax.numpy.array(p) for p in params] if work.full else []
        params = [jax.numpy.array(p) for p in params]
        self.compile(step, (params, optimizer.init(params), averages))

    def make_optimizer(self) -> Any:
        optax, betas = self.optax, {"b1": BETA_1, "b2": BETA_2, "eps": EPSILON}
        if not self.full:
            return optax.adamax(self.rate, **betas)
        return optax.chain(
            optax.scale(1 / LOSS_SCALE),
            optax.clip_by_global_norm(CLIP),
            optax.adamaxw(self.rate, **betas, weight_decay=WEIGHT_DECAY),
        )

    def apply(self, optimizer: Any, params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return self.optax.apply_updates(params, updates), state

    def load(self, grads: list[Any]) -> None:
        self.grads = [self.jax.numpy.array(g) for g in grads]


class Keras(Contestant):
    """`keras.optimizers.Adamax` with its own arguments for the full step."""

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        import keras

        self.keras, self.work, self.device = keras, work, device
        self.variables = [keras.Variable(p, dtype=work.dtype) for p in params]
        self.optimizer = self.optimizer_class()(
            rate, BETA_1, BETA_2, EPSILON, **(FULL_OPTIONS if work.full else {})
        )
        self.optimizer.build(self.variables)

    def optimizer_class(self) -> Any:
        return self.keras.optimizers.Adamax

    def load(self, grads: list[Any]) -> None:
        convert = self.keras.ops.convert_to_tensor
        self.grads = [convert(g, dtype=self.work.dtype) for g in grads]

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

    def backward(self) -> None:
        backward([v.value for v in self.variables])

    def step(self) -> None:
        if self.work.after_backward:
            self.grads = [v.value.grad for v in self.variables]
        with self.torch.no_grad():  # as in Keras' own training loop
            self.optimizer.apply(self.grads)

    def finish(self) -> None:
        wait(self.device)


class KerasJax(Jax, Keras):
    """What Keras' own training loop does with JAX: a jit of `stateless_apply`."""

    environment: ClassVar[dict[str, str]] = {"KERAS_BACKEND": "jax"}
    packages: ClassVar[tuple[str, ...]] = ("keras", "jax", "jaxlib")

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        super().__init__(work, device, params, rate)

        def step(state: Any, grads: Any) -> Any:
            return self.optimizer.stateless_apply(state[1], grads, state[0])

        both = (self.variables, self.optimizer.variables)
        self.compile(step, tuple([v.value for v in variables] for variables in both))


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
