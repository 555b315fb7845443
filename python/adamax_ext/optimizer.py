"""`Adamax`: variables, and bookkeeping of steps; one native call does the arithmetic."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adamax_ext import _settings, arrays, rates
from adamax_ext.arrays import Array, HostArray
from adamax_ext.configuration import Configured
from adamax_ext.locking import exclusive
from adamax_ext.native import Native
from adamax_ext.progress import Progress
from adamax_ext.state import State
from adamax_ext.weight_decay import Exclusion


class Adamax(Configured):
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
    state_bits : {32, 16, 8}
        Bits of an element of first moment and infinity norm: float32, or smaller, for float32,
        float16 and bfloat16 weights. With 8, variables with fewer than 4096 elements keep float32,
        `beta_1` must be below `beta_2` and `epsilon` at least 2**-86 and fixed; for `beta_1` above
        0.95, and unless ``(1 - beta_1) / (1 - beta_1 / beta_2)`` is near 1, rather take 16.
    weight_rounding : {"nearest", "stochastic", "remainder"}
        How bfloat16 weights are stored: to nearest, where steps that are small beside a weight are
        lost; at random, which is right on average; or exactly, with the other 16 bits of each
        weight in an array beside it. Of no effect on float32 and float64 weights.
    seed : int from 0 to 2**64 - 1
        What random roundings follow from, beside the number of the update, the position of the
        variable and the element: the same on every machine. Loading takes that of the checkpoint.

    Raises
    ------
    TypeError, ValueError
        An argument out of range, named with the value received.

    Notes
    -----
    Kingma & Ba 2014, "Adam: a method for stochastic optimization", section 7.1. The first moment,
    infinity norm, averages and accumulators are float64 for float64 weights and float32 for all
    others; NumPy arrays, or on a GPU arrays of the variable's own library there. An average is that
    of the weights as they are stored, with their remainders. What fewer `state_bits` hold are codes
    with scales: see `decoded_state`.

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

    _exclusion = Exclusion()

    # ---- Variables -------------------------------------------------------------------------------

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
        variables = _settings.sequence("variables", variables)
        state = self.progress.state
        if state is None:
            self.progress.state = self._new_state(variables, names)
        elif [id(variable) for variable in variables] != [id(v) for v in state.variables]:
            raise ValueError(
                "variables must be those that the optimizer was built with; make a new optimizer "
                "for new variables"
            )

    def _new_state(self, variables: Sequence[Any], names: Iterable[str] | None) -> State:
        if names is None:
            names = [f"variable_{i}" for i in range(len(variables))]
        names = _settings.sequence("names", names, "strings")
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"names must be strings; received {list(names)}")
        if len(names) != len(variables) or len(set(names)) != len(names):
            raise ValueError(
                f"names must be one unique string for each of the {len(variables)} variables; "
                f"received {list(names)}"
            )
        kinds = ["average"] * self.use_ema
        kinds += ["gradient_accumulator"] * (self.gradient_accumulation_steps is not None)
        groups = self._exclusion.groups(variables, names)
        state = State(variables, names, groups, kinds, self.state_bits, self.weight_rounding)
        state.plan.calls = self.calls
        if self.calls > 0:
            state.start_averages()
        self._native = None  # of as many groups as this state
        return state

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
        momentum and norm of each variable. The first two are copies, the others live arrays, until
        something is loaded.

        State in fewer bits is given, and taken by `set_weights`, as float32: copies. After all
        others come the float32 weights of each variable that keeps a remainder, which Keras does
        not know; to set them sets the remainder of those weights that still are their bfloat16.
        """
        return self.progress.variables(self.epsilon)

    @property
    def state(self) -> dict[str, dict[str, Array]]:
        """Live arrays by name and kind (momentum, norm, average, gradient_accumulator if kept).

        State in fewer bits is shown as it is stored, with a norm_scale; remainder is what bfloat16
        weights do not hold. Loading makes new arrays; read this again after it.
        """
        return self.progress.state.by_name() if self.progress.state else {}

    @exclusive
    def decoded_state(self, name: str) -> dict[str, HostArray]:
        """Return copies of momentum and norm of a variable, in NumPy and as numbers.

        Parameters
        ----------
        name : str
            Of the variable.

        Returns
        -------
        dict
            "momentum" and "norm" in the shape of the variable: float64 for float64 weights, float32
            for all others, whatever `state_bits` is.

        Raises
        ------
        ValueError
            There is no such variable, or the optimizer is not built.
        """
        self._require_built()
        state = self.progress.state
        assert state is not None
        if name not in state.names:
            raise ValueError(f"name must be one of {state.names}; received {name!r}")
        decoded = state.decoded(state.names.index(name), self.epsilon)
        return {kind: arrays.to_host(array) for kind, array in decoded.items()}

    # ---- Steps -----------------------------------------------------------------------------------

    def apply(self, grads: Iterable[Any], variables: Iterable[Any] | None = None) -> int:
        """Do one training step in place.

        Parameters
        ----------
        grads : sequence of buffers or None
            Gradients, each with shape and memory order of its variable. A variable whose gradient
            is None is skipped with a warning; in a micro-batch that counts as zeros, if another one
            of the window has a gradient. An empty sequence does nothing.
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
        return self.progress.calls

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
        if variables is not None:
            variables = _settings.sequence("variables", variables)
        progress = self.progress
        state = progress.state
        is_first = state is None
        if state is None:
            if variables is None:
                raise ValueError("variables must be given to apply() before build() was called")
            state = progress.state = self._new_state(variables, None)
        try:
            calls = state.plan.calls
            native = self._native
            if native is None:
                native = self._native = Native(self, 1 + max(state.groups, default=0))
            native.prepare(
                calls,
                lambda: rates.at(progress.learning_rate, calls),
                loss_scale,
                require_finite,
                progress.seed,
            )
            return state.plan.step(grads, variables, native.groups, native.call)
        except BaseException:
            if is_first and state.plan.calls == progress.calls_unbuilt:  # the step was not done
                progress.state = None
            raise

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
        if self.progress.state is None:
            raise ValueError("finalize_variable_values() must be called after build()")
        if self.iterations > 0:
            self.progress.state.plan.finalize(
                None if variables is None else _settings.sequence("variables", variables)
            )

    # ---- Saving and loading (the public methods are those of Saveable) ---------------------------

    def _state_dict(self) -> dict[str, Any]:
        return self.progress.state_dict(self.gradient_accumulation_steps)

    def prepare_state_dict(self, state_dict: dict[str, Any]) -> Progress:
        return self.progress.from_state_dict(state_dict, self.gradient_accumulation_steps)

    def prepare_variables(self, weights: Iterable[Any]) -> Progress:
        steps = self.gradient_accumulation_steps
        return self.progress.from_variables(weights, steps, self.epsilon)

    def adopt(self, progress: Progress) -> None:
        self.progress = progress

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_native": None}
