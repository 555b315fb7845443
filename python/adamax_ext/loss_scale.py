"""`LossScaleOptimizer`: a loss scale that follows what the gradients can bear."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from adamax_ext import _settings, checkpoint
from adamax_ext.arrays import Array
from adamax_ext.locking import exclusive
from adamax_ext.optimizer import Adamax
from adamax_ext.rates import Rate
from adamax_ext.saving import Saveable

# The scale does not leave this range by itself: it and its reciprocal stay normal float32 numbers,
# as which Keras stores it.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**126


class LossScaleOptimizer(Saveable):
    """Scale the loss so that small gradients survive 16-bit arithmetic, as Keras' class does.

    A call with an infinite or NaN gradient halves the scale and changes nothing else. Otherwise the
    inner optimizer steps with the gradients divided by the scale; after `dynamic_growth_steps` such
    steps in a row the scale doubles. On a GPU a call waits until the gradients are known as finite.

    Parameters
    ----------
    inner_optimizer : Adamax
        Does the steps. Its own `loss_scale_factor` is cleared.
    initial_scale : float > 0
        Scale to begin with.
    dynamic_growth_steps : int >= 1
        Good steps in a row after which the scale doubles.
    name : str, optional
        Name of the optimizer.

    Raises
    ------
    TypeError, ValueError
        An argument out of range, named with the value received.
    """

    def __init__(
        self,
        inner_optimizer: Adamax,
        initial_scale: float = 2.0**15,
        dynamic_growth_steps: int = 2000,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(inner_optimizer, Adamax):
            raise TypeError(f"inner_optimizer must be an Adamax; received {inner_optimizer!r}")
        self.initial_scale = _settings.positive("initial_scale", initial_scale)
        self.dynamic_growth_steps = _settings.integer(
            "dynamic_growth_steps", dynamic_growth_steps, least=1
        )
        self.name = "loss_scale_optimizer" if name is None else name
        self.inner_optimizer = inner_optimizer
        self.inner_optimizer.loss_scale_factor = None  # the gradients would be scaled twice
        self.dynamic_scale = self.initial_scale
        self.step_counter = 0  # good steps since the scale changed

    @property
    def built(self) -> bool:
        """Whether the inner optimizer knows its variables."""
        return self.inner_optimizer.built

    def build(
        self, variables: Iterable[Any] | Mapping[str, Any], names: Iterable[str] | None = None
    ) -> None:
        """Build the inner optimizer; see `Adamax.build`."""
        self.inner_optimizer.build(variables, names)

    def exclude_from_weight_decay(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """See `Adamax.exclude_from_weight_decay`."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    @exclusive
    def apply(self, grads: Iterable[Any], variables: Iterable[Any] | None = None) -> int:
        """Step with gradients of the scaled loss, or halve the scale; see `Adamax.apply`."""
        inner = self.inner_optimizer
        grads = _settings.sequence("grads", grads)
        if not grads:
            return inner.calls
        if inner.apply_scaled(grads, variables, self.dynamic_scale, require_finite=True):
            self.step_counter += 1
            if self.step_counter >= self.dynamic_growth_steps:
                self._change_scale(2.0)
                self.step_counter = 0
        else:
            self._change_scale(0.5)
            self.step_counter = 0
        return inner.calls

    def _change_scale(self, factor: float) -> None:
        if _SMALLEST <= self.dynamic_scale * factor <= _LARGEST:
            self.dynamic_scale *= factor

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> int:
        """Do one training step on pairs of gradient and variable; see `apply`."""
        pairs = list(grads_and_vars)
        return self.apply([grad for grad, _ in pairs], [variable for _, variable in pairs])

    def scale_loss(self, loss: Any) -> Any:
        """Return `loss` times the present scale."""
        return loss * self.dynamic_scale

    def finalize_variable_values(self, variables: Iterable[Any] | None = None) -> None:
        """See `Adamax.finalize_variable_values`."""
        self.inner_optimizer.finalize_variable_values(variables)

    @property
    def iterations(self) -> int:
        """Number of completed updates of the inner optimizer."""
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> float:
        """The inner optimizer's rate; settable as there."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Rate) -> None:
        self.inner_optimizer.learning_rate = value

    @property
    def variables(self) -> list[Array]:
        """State in Keras' order.

        An iteration and a learning rate that nothing uses (both 0), counter, scale, then the
        variables of the inner optimizer.
        """
        own: list[Array] = [
            np.array(0, np.int64),
            np.array(0.0, np.float32),
            np.array(self.step_counter, np.int64),
            np.array(self.dynamic_scale, np.float32),
        ]
        return own + self.inner_optimizer.variables

    @property
    def state(self) -> dict[str, dict[str, Array]]:
        """See `Adamax.state`."""
        return self.inner_optimizer.state

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON values, in Keras' format."""
        return {
            "name": self.name,
            "inner_optimizer": {
                "module": "keras.optimizers",
                "class_name": "Adamax",
                "config": self.inner_optimizer.get_config(),
                "registered_name": "Adamax",
            },
            "initial_scale": self.initial_scale,
            "dynamic_growth_steps": self.dynamic_growth_steps,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "LossScaleOptimizer":
        """Make an optimizer from `get_config` of this class or of its Keras counterpart."""
        arguments = dict(config)
        inner = arguments.pop("inner_optimizer")
        if inner.get("class_name") != "Adamax":
            raise ValueError(
                f"inner_optimizer must be an Adamax; received {inner.get('class_name')!r}"
            )
        return cls(Adamax.from_config(inner["config"]), **arguments)

    def _state_dict(self) -> dict[str, Any]:
        own = {"dynamic_scale": self.dynamic_scale, "step_counter": self.step_counter}
        return {**self.inner_optimizer.state_dict(), "loss_scale": own}

    def prepare_state_dict(self, state_dict: dict[str, Any]) -> Callable[[], None]:
        own = state_dict.get("loss_scale") if isinstance(state_dict, dict) else None
        if not isinstance(own, dict) or set(own) != {"dynamic_scale", "step_counter"}:
            raise ValueError(
                "state_dict must have a 'loss_scale' with dynamic_scale and step_counter; "
                f"received {own!r}"
            )
        inner = {key: value for key, value in state_dict.items() if key != "loss_scale"}
        scale, counter = own["dynamic_scale"], own["step_counter"]
        return self._prepare(scale, counter, self.inner_optimizer.prepare_state_dict(inner))

    def prepare_variables(self, weights: list[Array]) -> Callable[[], None]:
        weights = checkpoint.converted(weights, self.variables)
        counter, scale = weights[2].item(), weights[3].item()
        return self._prepare(scale, counter, self.inner_optimizer.prepare_variables(weights[4:]))

    def _prepare(
        self, scale: Any, counter: Any, load_inner: Callable[[], None]
    ) -> Callable[[], None]:
        scale = _settings.positive("dynamic_scale", scale)
        counter = _settings.integer("step_counter", counter, least=0)

        def commit() -> None:
            with self.inner_optimizer.locked():
                load_inner()
            self.dynamic_scale, self.step_counter = scale, counter

        return commit
