"""The step on Keras' torch backend: all of it in one native call, in place."""

from collections.abc import Sequence
from typing import Any

import keras
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.common.symbolic_scope import in_symbolic_scope
from torch import Tensor

from adamax_ext import _core
from adamax_ext.configuration import Configured
from adamax_ext.keras.settings import settings_of
from adamax_ext.keras.torch_stored import Stored, dtype_of, require_storable
from adamax_ext.keras.torch_tensors import Number, Tensors, are_same, copy_each
from adamax_ext.native import Native, Settings


class TorchAdamax(keras.optimizers.Adamax):  # type: ignore[misc]
    """Adamax whose step is native."""

    _step: "Step | None" = None  # made by the next one, after what it depends on has changed
    _stored: Stored | None = None  # of a built optimizer with other settings than Keras'

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Exclude variables from weight decay; see ``keras.optimizers.Adamax``."""
        self._step = None
        super().exclude_from_weight_decay(var_list, var_names)

    def build(self, variables: Any) -> None:
        """Add state for variables; see ``keras.optimizers.Adamax``.

        Raises
        ------
        TypeError
            A variable for which `state_bits` or `weight_rounding` is not. Nothing has changed then.
        """
        if self.built or self._is_plain:
            super().build(variables)
            return
        require_storable(variables, self.state_bits, self.weight_rounding)
        super().build(variables)
        self._stored = Stored(self)

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> Any:
        """Add state for a variable, in its memory order."""
        dtype = dtype_of(name, reference_variable.shape, self.state_bits)
        if dtype is not None:
            return self.add_stored(reference_variable, name, dtype)
        variable = super().add_variable_from_reference(reference_variable, name, initializer)
        _reorder(variable, reference_variable)
        return variable

    def add_stored(
        self,
        reference_variable: Any,
        name: str | None,
        dtype: str,
        shape: Any = None,
        initializer: Any = "zeros",
    ) -> Any:
        """Add what a variable keeps in this dtype, in its memory order, or in another shape."""
        name = f"{reference_variable.path.replace('/', '_')}_{name}"  # as Keras
        if shape is not None:
            return super().add_variable(shape, initializer, dtype, name=name)
        variable = super().add_variable(reference_variable.shape, initializer, dtype, name=name)
        _reorder(variable, reference_variable)
        return variable

    def save_own_variables(self, store: Any) -> None:
        """Write state into `store` in Keras' layout: as numbers, if it is in fewer bits."""
        if self._stored is None:
            super().save_own_variables(store)
            return
        for i, value in enumerate(self._stored.numbers(self)):
            store[str(i)] = value

    def load_own_variables(self, store: Any) -> None:
        """Read what this class, with any settings, or ``keras.optimizers.Adamax`` has written.

        Raises
        ------
        ValueError
            With other settings than Keras': shapes or dtypes differ; a norm or the number of calls
            is below zero. Nothing has changed then.
        """
        if self._stored is None:
            super().load_own_variables(store)
        else:
            self._stored.load(self, store)

    def set_weights(self, weights: Any) -> None:
        """Set `variables`, as they are stored."""
        if self._stored is not None:
            weights = list(weights)
            self._stored.require_fitting(self, weights)
        super().set_weights(weights)

    def _overwrite_model_variables_with_average_value(self, trainable_variables: Any) -> None:
        super()._overwrite_model_variables_with_average_value(trainable_variables)
        if self._stored is not None:
            self._stored.overwrite(trainable_variables, self._model_variables_moving_average)

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Do one training step in place.

        Parameters
        ----------
        grads : sequence of Tensor or None
            Gradients of the variables that the optimizer was built with, or of those passed.
        trainable_variables : sequence of keras.Variable, optional
            All of the variables or some of them; builds the optimizer on the first call.

        Raises
        ------
        ValueError, TypeError
            Gradients that do not fit to the variables, all of them None, unknown variables, a
            setting out of range. Nothing has changed then.
        NotImplementedError
            A stateless or symbolic step, if state is in fewer bits or weights are rounded otherwise
            than to nearest: Keras cannot do it.
        """
        is_of_keras = in_stateless_scope() or in_symbolic_scope() or len(grads) == 0
        if is_of_keras and len(grads) > 0 and not self._is_plain:
            raise NotImplementedError(
                "a stateless or symbolic step must have state_bits 32 and weight_rounding "
                "'nearest', as Keras does it; received an optimizer with "
                f"state_bits {self.state_bits} and weight_rounding {self.weight_rounding!r}"
            )
        if trainable_variables is None:  # Keras has the words for what can be wrong then
            is_of_keras |= not self.built or len(grads) != len(self._trainable_variables)
        if is_of_keras:
            super().apply(grads, trainable_variables)
            return
        variables = self._trainable_variables
        if trainable_variables is not None:
            passed = list(trainable_variables)
            if not self.built:
                with keras.name_scope(self.name, caller=self):
                    self.build(passed)
                variables = self._trainable_variables
            if not are_same(passed, variables):
                self._check_variables_are_known(passed)
                variables = passed
        if len(grads) != len(variables):
            raise ValueError(
                f"grads must have one entry for each of the {len(variables)} variables; received "
                f"{len(grads)}"
            )
        self._apply_natively(grads, variables)

    # Dynamo cannot look into a native call.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _apply_natively(self, grads: Sequence[Any], variables: list[Any]) -> None:
        if any([grad is None for grad in grads]):
            grads, variables = self._filter_empty_gradients(grads, variables)
        step = self._step
        if step is None or not step.tensors.are_those_of(self):
            step = self._step = Step(self)
        try:
            step.run(self, grads, variables)
        except (TypeError, ValueError):
            if step.tensors.have_their_layouts():
                raise
            self._step = Step(self)
            self._step.run(self, grads, variables)
        for variable in variables:
            if variable._constraint is not None and not variable._overwrite_with_gradient:
                variable.assign(variable.constraint(variable))


class Step:
    """The native step of an optimizer, for as long as its tensors are the same."""

    def __init__(self, optimizer: TorchAdamax) -> None:
        tensors = self.tensors = Tensors(optimizer)
        self._groups = [int(not optimizer._use_weight_decay(v)) for v in tensors.variables]
        self._plan = _core.Plan(
            tensors.weights,
            [variable.path for variable in tensors.variables],
            self._groups,
            momentum=tensors.momentum,
            norm=tensors.norm,
            averages=tensors.averages,
            accumulators=tensors.accumulators,
            norm_scales=tensors.norm_scales,
            remainders=tensors.remainders,
            weight_rounding=optimizer.weight_rounding,
        )
        self._number = Number()
        self._settings: Settings | None = None
        self._native: Native
        self._versions: list[int] | None = None  # of accumulators, which the plan does not change
        self._find_accumulated()

    def run(self, optimizer: TorchAdamax, grads: Sequence[Any], variables: list[Any]) -> None:
        """Do one step with all that Keras does in one, apart from constraints, and count it."""
        iterations = optimizer._iterations._value
        calls = self._number.of(iterations)
        undo: list[tuple[Tensor, Tensor]] = []
        plan = self._plan
        before = plan.calls
        stepped = variables
        is_done = False
        try:
            if self.tensors.has_overwritten:
                undo = [(t, t.detach().clone()) for t in _overwritten(optimizer, variables)]
                grads, stepped = optimizer._overwrite_variables_directly_with_gradients(
                    grads, variables
                )
            if stepped:
                self._call(optimizer, calls, grads, stepped)
            is_done = True
        finally:
            # Also if an interrupt comes after the native step: what it did is counted.
            if is_done or plan.calls > before:
                try:
                    self._finish(iterations, calls)
                except BaseException:  # an interrupt: once more, which does no harm
                    self._finish(iterations, calls)
                    raise
            else:
                copy_each((copy, tensor) for tensor, copy in undo)

    def _finish(self, iterations: Tensor, calls: int) -> None:
        self.tensors.scatter()
        self._number.write(iterations, calls + 1)

    def _call(
        self, optimizer: TorchAdamax, calls: int, grads: Sequence[Any], variables: list[Any]
    ) -> None:
        tensors, plan = self.tensors, self._plan
        weights = tensors.weights_of(variables)
        settings = settings_of(optimizer)
        if self._settings != settings:
            stored = optimizer._stored
            if (
                stored is not None
                and optimizer.state_bits == 8
                and stored.epsilon != settings.epsilon
            ):
                raise ValueError(
                    "epsilon cannot be assigned after build() with state_bits 8, where first "
                    f"moments are kept relative to norm + epsilon; received {settings.epsilon}, "
                    f"expected {stored.epsilon}"
                )
            self._native = Native(settings, 1 + max(self._groups, default=0))
            self._settings = settings
        native = self._native
        scale = Configured.checks["loss_scale_factor"](
            "loss_scale_factor", optimizer.loss_scale_factor
        )
        native.prepare(
            calls,
            lambda: self._rate(optimizer),
            1.0 if scale is None else scale,
            seed=optimizer.seed,
        )
        if len(variables) < len(tensors.variables):
            self._find_accumulated()
        tensors.gather()
        again = None
        try:
            plan.step(tuple(grads), weights, native.groups, native.call)
        except (TypeError, ValueError, BufferError):
            again = tuple(tensors.fitting(grads, tensors.weights if weights is None else weights))
        if again is not None:
            plan.step(again, weights, native.groups, native.call)
        if tensors.averages is not None and calls < native.micro_batches - 1:
            # No update has begun the averages, and somebody may read them.
            copy_each(zip(tensors.weights, tensors.averages, strict=True))

    def _rate(self, optimizer: TorchAdamax) -> float:
        rate = optimizer._get_current_learning_rate()
        if rate is optimizer._learning_rate:  # a variable, which is asked of a GPU once
            rate = self._number.of(rate._value)
        return float(rate)

    def _find_accumulated(self) -> None:
        """Tell the plan which accumulators have gradients, where somebody else wrote them.

        It matters for variables that get no gradient in an update. A frozen one is left alone.
        """
        accumulators = self.tensors.own_accumulators
        if not accumulators:
            return
        versions = [0 if a.is_inference() else a._version for a in accumulators]
        accumulated = self._plan.accumulated
        if versions != self._versions:
            self._versions = versions
            accumulated = [bool(accumulator.any()) for accumulator in accumulators]
        trainable = [variable.trainable for variable in self.tensors.variables]
        self._plan.accumulated = [a and b for a, b in zip(accumulated, trainable, strict=True)]


def _reorder(variable: Any, reference_variable: Any) -> None:
    """Give a variable the memory order of another one."""
    weight, state = getattr(reference_variable, "_value", None), variable._value
    if weight is not None and state is not None and weight.stride() != state.stride():
        with torch.no_grad():
            state.data = torch.empty_like(weight, dtype=state.dtype).copy_(state)


def _overwritten(optimizer: TorchAdamax, variables: list[Any]) -> list[Tensor]:
    """Return what is written where gradients overwrite variables."""
    chosen = [v for v in variables if v.overwrite_with_gradient]
    if optimizer.gradient_accumulation_steps:
        accumulators = optimizer._accumulated_gradients
        chosen += [accumulators[optimizer._get_variable_index(v)] for v in chosen]
    return [v._value for v in chosen]
