"""All that training changes, as one object: what is saved, and what loading exchanges."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adamax_ext import _settings, arrays, checkpoint, rates
from adamax_ext.state import State


@dataclass
class Progress:
    """All that training changes: loading assigns another one, and so is all or nothing.

    The last two are those of a `LossScaleOptimizer` around the optimizer.
    """

    learning_rate: rates.Rate
    state: State | None = None
    calls_unbuilt: int = 0
    seed: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0

    @property
    def calls(self) -> int:
        """Number of completed calls, which the plan of a state counts."""
        return self.calls_unbuilt if self.state is None else self.state.plan.calls

    @calls.setter
    def calls(self, calls: int) -> None:
        if self.state is None:
            self.calls_unbuilt = calls
        else:
            self.state.plan.calls = calls

    def variables(self, epsilon: float) -> list[arrays.Array]:
        """Return the number of calls, the rate if it is a number, and the arrays: Keras' order."""
        scalars: list[arrays.Array] = [np.array(self.calls, np.int64)]
        if isinstance(self.learning_rate, float):
            with np.errstate(over="ignore"):
                scalars.append(np.array(self.learning_rate, np.float32))
        return scalars + (self.state.in_keras_order(epsilon) if self.state else [])

    def state_dict(self, steps: int | None) -> dict[str, Any]:
        """Return a copy of what an optimizer that accumulates so many `steps` saves."""
        assert self.state is not None
        state, rate = self.state, self.learning_rate
        low_memory = checkpoint.format_entries(
            state.state_bits, state.weight_rounding, self.seed, state.orders_of_blocks()
        )
        return {
            **low_memory,
            "calls": self.calls,
            "learning_rate": rate if isinstance(rate, float) else None,
            "gradient_accumulation_steps": steps,
            "accumulated": state.accumulated(),
            "state": {
                name: {kind: arrays.to_host(array) for kind, array in kinds.items()}
                for name, kinds in state.by_name().items()
            },
        }

    def from_state_dict(self, state_dict: dict[str, Any], steps: int | None) -> "Progress":
        """Return what `state_dict` holds for the variables here; ValueError if it does not fit."""
        state, rate = self.state, self.learning_rate
        assert state is not None
        checkpoint.require_format(state_dict)
        calls = _settings.integer("calls", state_dict["calls"], least=0)
        saved_rate = state_dict["learning_rate"]
        if (saved_rate is None) == isinstance(rate, float):
            raise ValueError(
                f"learning_rate of the state_dict is {saved_rate!r}, of the optimizer {rate!r}; "
                "expected both to be numbers, or neither"
            )
        if saved_rate is not None:
            rate = _settings.not_negative("learning_rate", saved_rate)
        seed = _settings.seed("seed", state_dict.get("seed", self.seed))
        absent = checkpoint.absent_kinds(state_dict, state.state_bits, state.weight_rounding)
        pending = checkpoint.pending_names(state_dict, calls, steps, state.names)
        loaded = checkpoint.fitting(state_dict["state"], state.by_name(), absent)
        values = {(kind, i): loaded[state.names[i]][kind] for kind, i in state.places()}
        orders = checkpoint.memory_orders(
            state_dict, dict(zip(state.names, state.orders, strict=True))
        )
        state = state.loaded(values, calls, pending, calls % (steps or 1) != 0, orders)
        return replace(self, learning_rate=rate, state=state, seed=seed)

    def from_variables(
        self, weights: Iterable[Any], steps: int | None, epsilon: float
    ) -> "Progress":
        """Return what arrays in the order of `variables` hold; ValueError if they do not fit."""
        state, rate = self.state, self.learning_rate
        assert state is not None
        expected = self.variables(epsilon)
        given = state.with_masters(list(weights), len(expected))
        iteration, *values = checkpoint.converted(given, expected)
        calls = _settings.integer("weights[0] (the iteration)", iteration.item(), least=0)
        if isinstance(rate, float):
            received = values.pop(0).item()
            with np.errstate(over="ignore"):
                is_ours = np.float32(rate) == received  # rounded to float32
            if not is_ours:
                rate = _settings.not_negative("weights[1] (the rate)", received)
        stored = state.from_keras_order(values, epsilon)
        state = state.loaded(stored, calls, in_window=calls % (steps or 1) != 0)
        return replace(self, learning_rate=rate, state=state)
