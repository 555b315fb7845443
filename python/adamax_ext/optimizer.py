"""`Adamax`: configuration and bookkeeping of steps; one native call does the arithmetic."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from adamax_ext import _core, _settings, arrays, checkpoint, rates
from adamax_ext.arrays import Array
from adamax_ext.locking import exclusive
from adamax_ext.saving import Saveable
from adamax_ext.state import State
from adamax_ext.weight_decay import Exclusion


class Adamax(Saveable):
    """The Adamax optimizer with the semantics of ``keras.optimizers.Adamax``, on any memory.

    Parameters
    ----------
    learning_rate : float, schedules.LearningRateSchedule or callable
        Finite and >= 0. A schedule sees the number of completed calls; a callable takes no
        arguments.
    beta_1, beta_2 : float in [0, 1)
        Decay of the first moment and of the infinity norm.
    epsilon : float > 0
        Added to the infinity norm in the denominator.
    weight_decay : float >= 0, optional
        Decoupled: ``w -= w * learning_rate * weight_decay``. See `exclude_from_weight_decay`.
    clipnorm, clipvalue, global_clipnorm : float > 0, optional
        At most one: limits the norm of each gradient, each element, or the norm over all gradients.
    use_ema : bool
        Keep an exponential moving average of the weights; see `finalize_variable_values`.
    ema_momentum : float in [0, 1]
        Share of the old average in the new one.
    ema_overwrite_frequency : int >= 1, optional
        Replace the weights by their averages after every so many updates.
    loss_scale_factor : float > 0, optional
        Divides the gradients; `scale_loss` multiplies the loss.
    gradient_accumulation_steps : int >= 2, optional
        Update once in so many calls, with the mean gradient. The average of the weights and its
        overwriting count updates, where Keras counts every call.
    name : str
        Name of the optimizer.

    Raises
    ------
    TypeError, ValueError
        An argument out of range, named with the value received.

    Notes
    -----
    Kingma & Ba 2014, "Adam: a method for stochastic optimization", section 7.1. The first moment,
    infinity norm, averages and accumulators are float64 for float64 weights and float32 for all
    others; NumPy arrays, or on a GPU arrays of the variable's own library there.

    Examples
    --------
    >>> import numpy as np
    >>> weights = np.ones(3, np.float32)
    >>> optimizer = Adamax(learning_rate=0.25)
    >>> optimizer.build([weights])
    >>> optimizer.apply([np.full(3, 0.5, np.float32)])
    1
    >>> weights.round(3)
    array([0.75, 0.75, 0.75], dtype=float32)
    """

    def __init__(
        self,
        learning_rate: rates.Rate = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str = "adamax",
    ) -> None:
        super().__init__()
        positive_or_none = _settings.positive_or_none
        self._learning_rate = rates.checked(learning_rate)
        self.beta_1 = _settings.real("beta_1", beta_1, "in [0, 1)", lambda x: 0 <= x < 1)
        self.beta_2 = _settings.real("beta_2", beta_2, "in [0, 1)", lambda x: 0 <= x < 1)
        self.epsilon = _settings.positive("epsilon", epsilon)
        self.weight_decay = (
            None if weight_decay is None else _settings.not_negative("weight_decay", weight_decay)
        )
        self.clipnorm = positive_or_none("clipnorm", clipnorm)
        self.clipvalue = positive_or_none("clipvalue", clipvalue)
        self.global_clipnorm = positive_or_none("global_clipnorm", global_clipnorm)
        if sum(clip is not None for clip in (clipnorm, clipvalue, global_clipnorm)) > 1:
            raise ValueError(
                "at most one of clipnorm, clipvalue and global_clipnorm can be set; received "
                f"clipnorm={clipnorm}, clipvalue={clipvalue}, global_clipnorm={global_clipnorm}"
            )
        if not isinstance(use_ema, (bool, np.bool_)):
            raise TypeError(f"use_ema must be True or False; received {use_ema!r}")
        self.use_ema = bool(use_ema)
        self.ema_momentum = _settings.real(
            "ema_momentum", ema_momentum, "in [0, 1]", lambda x: 0 <= x <= 1
        )
        self.ema_overwrite_frequency = _settings.integer_or_none(
            "ema_overwrite_frequency", ema_overwrite_frequency, least=1
        )
        self.loss_scale_factor = positive_or_none("loss_scale_factor", loss_scale_factor)
        self.gradient_accumulation_steps = _settings.integer_or_none(
            "gradient_accumulation_steps", gradient_accumulation_steps, least=2
        )
        if not isinstance(name, str):
            raise TypeError(f"name must be a string; received {name!r}")
        self.name = name

        self._exclusion = Exclusion()
        self._state: State | None = None  # once built, with its plan
        self._plan: _core.Plan | None = None

    # ---- Variables -------------------------------------------------------------------------------

    @property
    def built(self) -> bool:
        """Whether the optimizer knows its variables."""
        return self._state is not None

    @exclusive
    def build(
        self, variables: Iterable[Any] | Mapping[str, Any], names: Iterable[str] | None = None
    ) -> None:
        """Take over `variables` and allocate their state.

        Parameters
        ----------
        variables : sequence of buffers, or mapping of name to buffer
            Weights, updated in place by `apply`.
        names : sequence of str, optional
            Unique names; by default ``variable_0``, ``variable_1``, ...

        Raises
        ------
        TypeError, ValueError, BufferError
            A buffer that cannot be a parameter; names that do not fit; other variables than those
            that the optimizer was built with before.
        """
        if isinstance(variables, Mapping):
            if names is not None:
                raise ValueError(f"names must be None for a mapping; received {names!r}")
            names, variables = list(variables), list(variables.values())
        variables = list(_settings.sequence("variables", variables))
        if self._state is not None:
            known = self._state.variables
            if [id(variable) for variable in variables] != [id(variable) for variable in known]:
                raise ValueError(
                    "variables must be those that the optimizer was built with; make a new "
                    "optimizer for new variables"
                )
            return
        state = self._new_state(variables, names)
        self._plan = state.plan()
        self._state = state

    def _new_state(self, variables: Sequence[Any], names: Iterable[str] | None) -> State:
        variables = list(variables)
        if names is None:
            names = [f"variable_{i}" for i in range(len(variables))]
        names = list(_settings.sequence("names", names, "strings"))
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"names must be strings; received {names}")
        if len(names) != len(variables) or len(set(names)) != len(names):
            raise ValueError(
                f"names must be one unique string for each of the {len(variables)} variables; "
                f"received {names}"
            )
        decays = self._exclusion.decays(variables, names)
        return State.allocate(
            variables, names, decays, self.use_ema, self.gradient_accumulation_steps is not None
        )

    def exclude_from_weight_decay(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Exclude variables from weight decay; replaces what an earlier call excluded.

        Parameters
        ----------
        var_list : sequence of buffers, optional
            Variables, or other objects for the same memory.
        var_names : sequence of str, optional
            Regular expressions; a variable is excluded if one is found anywhere in its name.

        Raises
        ------
        ValueError
            The optimizer is built already, or an expression is not valid.
        """
        if self.built:
            raise ValueError("exclude_from_weight_decay() must be called before build()")
        self._exclusion = Exclusion(var_list, var_names)

    @property
    def variables(self) -> list[Array]:
        """State in Keras' order.

        Iteration (int64), learning rate (float32, if it is a number), averages, accumulators, then
        momentum and norm of each variable. The first two are copies, the others live arrays.
        """
        scalars: list[Array] = [np.array(self.calls, np.int64)]
        if isinstance(self._learning_rate, float):
            scalars.append(np.array(self._learning_rate, np.float32))
        return scalars + (self._state.in_keras_order() if self._state else [])

    @property
    def state(self) -> dict[str, dict[str, Array]]:
        """Live arrays by name and kind: momentum, norm, average, gradient_accumulator if kept."""
        return self._state.by_name() if self._state else {}

    @property
    def calls(self) -> int:
        """Number of completed calls of `apply`, micro-batches included."""
        return self._plan.calls if self._plan else 0

    # ---- Steps -----------------------------------------------------------------------------------

    def apply(self, grads: Iterable[Any], variables: Iterable[Any] | None = None) -> int:
        """Do one training step in place.

        Parameters
        ----------
        grads : sequence of buffers or None
            Gradients, each with shape and memory order of its variable. A variable whose gradient
            is None is skipped with a warning. An empty sequence does nothing.
        variables : sequence of buffers, optional
            The variables that `grads` belong to, in that order: those of `build`, some of them, or
            other objects for the same memory. By default all of them. Builds the optimizer on the
            first call.

        Returns
        -------
        int
            Number of completed calls.

        Raises
        ------
        TypeError, ValueError, BufferError
            Buffers that do not fit, or every gradient None. Nothing has changed then.
        RuntimeError
            Another call is running on this optimizer; a CUDA device that cannot be used, or whose
            stream is being captured.

        Notes
        -----
        On a GPU the step is queued on the current stream of the library of the first variable.
        """
        self.apply_scaled(grads, variables, self.loss_scale_factor or 1.0)
        return self.calls

    @exclusive
    def apply_scaled(
        self,
        grads: Iterable[Any],
        variables: Iterable[Any] | None,
        loss_scale: float,
        require_finite: bool = False,
    ) -> bool:
        """Do one training step with the gradients divided by `loss_scale`.

        Returns False, with nothing changed and no call counted, if `require_finite` is set and a
        gradient is infinite or NaN.
        """
        grads = _settings.sequence("grads", grads)
        if not grads:
            return True
        variables = None if variables is None else _settings.sequence("variables", variables)
        state, plan = self._state, self._plan
        if plan is None:
            if variables is None:
                raise ValueError("variables must be given to apply() before build() was called")
            state = self._new_state(variables, None)
            plan = state.plan()
        calls = plan.calls
        micro_batches = self.gradient_accumulation_steps or 1
        updates_done, position = divmod(calls, micro_batches)
        step = updates_done + 1
        is_update = position == micro_batches - 1
        frequency = self.ema_overwrite_frequency
        applied = plan.step(
            grads,
            variables,
            step,
            loss_scale,
            not is_update,
            is_update and self.use_ema and frequency is not None and step % frequency == 0,
            require_finite,
            rates.at(self._learning_rate, calls) if is_update else 0.0,
            self.beta_1,
            self.beta_2,
            self.epsilon,
            self.weight_decay,
            self.clipnorm,
            self.clipvalue,
            self.global_clipnorm,
            self.ema_momentum,
            self.gradient_accumulation_steps,
        )
        self._state, self._plan = state, plan
        return applied

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> int:
        """Do one training step on pairs of gradient and variable; see `apply`."""
        pairs = list(grads_and_vars)
        return self.apply([grad for grad, _ in pairs], [variable for _, variable in pairs])

    def scale_loss(self, loss: Any) -> Any:
        """Return `loss` times `loss_scale_factor`, if that is set."""
        return loss if self.loss_scale_factor is None else loss * self.loss_scale_factor

    @exclusive
    def finalize_variable_values(self, variables: Iterable[Any] | None = None) -> None:
        """Overwrite `variables` (by default all) with their averages, at the end of training.

        Does nothing without `use_ema`, or before the first update, when there is no average yet.
        """
        if not self.use_ema:
            return
        if self._plan is None:
            raise ValueError("finalize_variable_values() must be called after build()")
        if self.iterations == 0:
            return
        self._plan.overwrite(
            None if variables is None else _settings.sequence("variables", variables)
        )

    @property
    def iterations(self) -> int:
        """Number of completed updates."""
        return self.calls // (self.gradient_accumulation_steps or 1)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step. Settable; a number cannot replace a schedule or a callable."""
        return rates.at(self._learning_rate, self.calls)

    @learning_rate.setter
    def learning_rate(self, value: rates.Rate) -> None:
        self._learning_rate = rates.replacement(self._learning_rate, value)

    # ---- Configuration ---------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON values, in Keras' format."""
        return {
            "name": self.name,
            "learning_rate": rates.to_config(self._learning_rate),
            **{key: getattr(self, key) for key in _PLAIN_SETTINGS},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Adamax":
        """Make an optimizer from `get_config` of this class or of ``keras.optimizers.Adamax``."""
        arguments = dict(config)
        if "learning_rate" in arguments:
            arguments["learning_rate"] = rates.from_config(arguments["learning_rate"])
        return cls(**arguments)

    # ---- Saving and loading (the public methods are those of Saveable) ---------------------------

    def _state_dict(self) -> dict[str, Any]:
        assert self._state is not None
        pairs = zip(self._state.names, self._state.decays, strict=True)
        return {
            "format_version": checkpoint.FORMAT_VERSION,
            "calls": self.calls,
            "learning_rate": self._learning_rate
            if isinstance(self._learning_rate, float)
            else None,
            "excluded_from_weight_decay": [name for name, decays in pairs if not decays],
            "state": {
                name: {kind: arrays.to_host(array) for kind, array in kinds.items()}
                for name, kinds in self.state.items()
            },
        }

    def prepare_state_dict(self, state_dict: dict[str, Any]) -> Callable[[], None]:
        checkpoint.require_format(state_dict, _STATE_KEYS)
        calls = _settings.integer("calls", state_dict["calls"], least=0)
        rate, saved_rate = self._learning_rate, state_dict["learning_rate"]
        if (saved_rate is None) == isinstance(rate, float):
            raise ValueError(
                f"learning_rate of the state_dict is {saved_rate!r}, of the optimizer {rate!r}; "
                "expected both to be numbers, or neither"
            )
        if saved_rate is not None:
            rate = _settings.not_negative("learning_rate", saved_rate)
        assert self._state is not None
        names, excluded = self._state.names, state_dict["excluded_from_weight_decay"]
        if not isinstance(excluded, list) or not set(excluded) <= set(names):
            raise ValueError(
                f"excluded_from_weight_decay must name built variables, {names}; "
                f"received {excluded}"
            )
        own, loaded = self.state, state_dict["state"]
        checkpoint.require_like(loaded, own)
        state = dataclasses.replace(self._state, decays=[name not in excluded for name in names])
        plan = state.plan()
        plan.calls = calls
        pairs = [
            # A copy: it may share memory with other state.
            (array, arrays.to_host(loaded[name][kind]))
            for name, kinds in own.items()
            for kind, array in kinds.items()
        ]

        def commit() -> None:
            self._learning_rate, self._state, self._plan = rate, state, plan
            for array, received in pairs:
                arrays.assign(array, received)

        return commit

    def prepare_variables(self, weights: list[Array]) -> Callable[[], None]:
        own = self.variables
        weights = checkpoint.converted(weights, own)
        calls = _settings.integer("weights[0] (the iteration)", weights[0].item(), least=0)
        rate = self._learning_rate
        if isinstance(rate, float):
            received = _settings.not_negative("weights[1] (the rate)", weights[1].item())
            # A rate that is ours rounded to float32 is ours.
            rate = rate if np.float32(rate) == received else received

        def commit() -> None:
            assert self._plan is not None
            self._plan.calls, self._learning_rate = calls, rate
            for array, weight in zip(own, weights, strict=True):
                arrays.assign(array, weight)

        return commit

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_plan": self.calls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        calls, self._plan = state["_plan"], None
        if self._state is not None:
            self._state = self._state.laid_out_anew()
            self._plan = self._state.plan()
            self._plan.calls = calls


# Settings that get_config() copies as they are.
_PLAIN_SETTINGS = (
    "weight_decay",
    "clipnorm",
    "global_clipnorm",
    "clipvalue",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
    "beta_1",
    "beta_2",
    "epsilon",
)
_STATE_KEYS = {"format_version", "calls", "learning_rate", "excluded_from_weight_decay", "state"}
