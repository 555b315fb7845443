"""`LossScaleOptimizer`: a loss scale that follows what the gradients can bear."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from adamax_ext import _settings, checkpoint
from adamax_ext.arrays import Array
from adamax_ext.locking import exclusive
from adamax_ext.optimizer import Adamax
from adamax_ext.progress import Progress
from adamax_ext.rates import Rate
from adamax_ext.saving import Saveable

# In this range a scale and its reciprocal are normal float32 numbers, as which Keras stores it.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**126
_scale = partial(
    _settings.real, wanted="in [2**-126, 2**126]", valid=lambda x: _SMALLEST <= x <= _LARGEST
)


def _adamax(name: str, value: Any) -> Adamax:
    if not isinstance(value, Adamax):
        raise TypeError(f"{name} must be an Adamax; received {value!r}")
    return value


_adopt = exclusive(Adamax.adopt)  # not while it steps by itself


class LossScaleOptimizer(Saveable):
    """Scale the loss so that small gradients survive 16-bit arithmetic, as Keras' class does.

    A call with an infinite or NaN gradient halves the scale and changes nothing else. Otherwise the
    inner optimizer steps with the gradients divided by the scale; after `dynamic_growth_steps` such
    steps in a row the scale doubles. On a GPU a call waits until the gradients are known as finite.

    Parameters
    ----------
    inner_optimizer : Adamax
        Does the steps. Its own `loss_scale_factor` is cleared.
    initial_scale : float
        Scale to begin with, from 2**-126 to 2**126, between which it stays.
    dynamic_growth_steps : int >= 1
        Good steps in a row after which the scale doubles.
    name : str, optional
        Name of the optimizer.

    Raises
    ------
    TypeError, ValueError
        An argument out of range, named with the value received.
    """

    checks: ClassVar[Mapping[str, _settings.Check]] = {
        "inner_optimizer": _adamax,
        "initial_scale": _scale,
        "dynamic_growth_steps": partial(_settings.integer, least=1),
        "name": _settings.string,
    }

    def __init__(
        self,
        inner_optimizer: Adamax,
        initial_scale: float = 2.0**15,
        dynamic_growth_steps: int = 2000,
        name: str | None = None,
    ) -> None:
        self.initial_scale = initial_scale
        self.dynamic_growth_steps = dynamic_growth_steps
        self.name = "loss_scale_optimizer" if name is None else name
        self.inner_optimizer = inner_optimizer
        self.inner_optimizer.loss_scale_factor = None  # the gradients would be scaled twice
        self.dynamic_scale = self.initial_scale
        self.step_counter = 0

    def _before_setting(self, name: str, value: Any) -> None:
        if name in ("inner_optimizer", "initial_scale") and "inner_optimizer" in vars(self):
            raise ValueError(
                f"{name} cannot be assigned after construction; received {value!r}: assign "
                "dynamic_scale, or make another optimizer"
            )

    @property
    def dynamic_scale(self) -> float:
        """The present scale."""
        return self.inner_optimizer.progress.loss_scale  # with all else that training changes

    @dynamic_scale.setter
    def dynamic_scale(self, value: float) -> None:
        self.inner_optimizer.progress.loss_scale = _scale("dynamic_scale", value)

    @property
    def step_counter(self) -> int:
        """Number of good steps since the scale changed."""
        return self.inner_optimizer.progress.good_steps

    @step_counter.setter
    def step_counter(self, value: int) -> None:
        value = _settings.integer("step_counter", value, least=0)
        self.inner_optimizer.progress.good_steps = value

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
        is_good = inner.apply_scaled(grads, variables, self.dynamic_scale, require_finite=True)
        progress = inner.progress
        scale, good_steps = progress.loss_scale, progress.good_steps + 1 if is_good else 0
        if not is_good or good_steps >= self.dynamic_growth_steps:
            changed = scale * (2.0 if is_good else 0.5)
            scale = changed if _SMALLEST <= changed <= _LARGEST else scale
            good_steps = 0
        progress.loss_scale, progress.good_steps = scale, good_steps
        return inner.calls

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
        """Number of completed updates of the inner optimizer; settable as there."""
        return self.inner_optimizer.iterations

    @iterations.setter
    def iterations(self, value: int) -> None:
        self.inner_optimizer.iterations = value

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
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> "LossScaleOptimizer":
        """Make an optimizer from `get_config` of this class or of its Keras counterpart.

        See `Adamax.from_config`.
        """
        arguments = _settings.without_leftovers(config, {"dynamic": (True,)})
        inner = arguments.pop("inner_optimizer", None)
        received = inner.get("class_name") if isinstance(inner, Mapping) else inner
        if received != "Adamax" or not isinstance(inner, Mapping):
            raise ValueError(f"inner_optimizer must be an Adamax; received {received!r}")
        return cls(Adamax.from_config(inner["config"], custom_objects), **arguments)

    def _state_dict(self) -> dict[str, Any]:
        own = {"dynamic_scale": self.dynamic_scale, "step_counter": self.step_counter}
        return {**self.inner_optimizer.state_dict(), "loss_scale": own}

    def prepare_state_dict(self, state_dict: dict[str, Any]) -> Progress:
        own = state_dict.get("loss_scale") if isinstance(state_dict, dict) else None
        if not isinstance(own, dict) or set(own) != {"dynamic_scale", "step_counter"}:
            raise ValueError(
                "state_dict must have a 'loss_scale' with dynamic_scale and step_counter; "
                f"received {own!r}"
            )
        inner = {key: value for key, value in state_dict.items() if key != "loss_scale"}
        progress = self.inner_optimizer.prepare_state_dict(inner)
        return _with_scale(progress, own["dynamic_scale"], own["step_counter"])

    def prepare_variables(self, weights: Iterable[Any]) -> Progress:
        _, _, counter, scale, *inner = checkpoint.converted(weights, self.variables)
        progress = self.inner_optimizer.prepare_variables(inner)
        return _with_scale(progress, scale.item(), counter.item())

    def adopt(self, progress: Progress) -> None:
        _adopt(self.inner_optimizer, progress)


def _with_scale(progress: Progress, scale: Any, counter: Any) -> Progress:
    return replace(
        progress,
        loss_scale=_scale("dynamic_scale", scale),
        good_steps=_settings.integer("step_counter", counter, least=0),
    )
