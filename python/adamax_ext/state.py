"""The arrays that an optimizer keeps for its variables, and the plan of the steps on them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from adamax_ext import _core, arrays


class State:
    """One array a variable of each kind that is kept, and the plan of the steps on all of them.

    `groups` tells the group of settings of each variable; `kinds` are "momentum" and "norm", and
    perhaps "average" and "gradient_accumulator".
    """

    def __init__(
        self,
        variables: Sequence[Any],
        names: Sequence[str],
        groups: Sequence[int],
        kinds: Iterable[str],
    ) -> None:
        self.variables, self.names, self.groups = tuple(variables), list(names), list(groups)
        self.kept: dict[str, list[arrays.Array]] = {
            kind: [arrays.zeros_for(v, "variables", i) for i, v in enumerate(self.variables)]
            for kind in kinds
        }
        self.plan = _core.Plan(
            self.variables,
            self.names,
            self.groups,
            momentum=self.kept["momentum"],
            norm=self.kept["norm"],
            averages=self.kept.get("average"),
            accumulators=self.kept.get("gradient_accumulator"),
        )

    def places(self) -> list[tuple[str, int]]:
        """Return kind and index of every array in Keras' order.

        Averages, accumulators, then momentum and norm of each variable.
        """
        kinds, indices = ("average", "gradient_accumulator"), range(len(self.names))
        of_all = [(kind, i) for kind in kinds if kind in self.kept for i in indices]
        return of_all + [(kind, i) for i in indices for kind in ("momentum", "norm")]

    def in_keras_order(self) -> list[arrays.Array]:
        return [self.kept[kind][i] for kind, i in self.places()]

    def by_name(self) -> dict[str, dict[str, arrays.Array]]:
        """Return the arrays of each variable by kind."""
        return {
            name: {kind: kept[i] for kind, kept in self.kept.items()}
            for i, name in enumerate(self.names)
        }

    def start_averages(self) -> None:
        """Let the averages begin with the weights, where no first update will do it."""
        for average, variable in zip(self.kept.get("average", ()), self.variables, strict=False):
            arrays.assign(average, arrays.as_host(variable, "variables"))

    def accumulated(self) -> list[str]:
        """Return the names of the variables that have gradients of the present window."""
        return [n for n, has in zip(self.names, self.plan.accumulated, strict=True) if has]

    def loaded(
        self,
        values: Iterable[arrays.HostArray],
        calls: int,
        accumulated: Iterable[str] | None = None,
        in_window: bool = True,
    ) -> "State":
        """Return a state like this one with other values, in Keras' order, in arrays of its own.

        Without `accumulated`, an accumulator has gradients if any of its elements is not 0, which
        is a ValueError unless `in_window`: a window of micro-batches has begun.
        """
        state = State(self.variables, self.names, self.groups, self.kept)
        listed = frozenset(accumulated or ())
        pending = [name in listed for name in self.names]
        for (kind, i), value in zip(self.places(), values, strict=True):
            if kind == "norm" and (value < 0).any():
                raise ValueError(
                    f"norm of '{self.names[i]}' must not be below zero; received {np.nanmin(value)}"
                )
            if kind == "gradient_accumulator" and value.any():
                if not in_window or (accumulated is not None and not pending[i]):
                    raise ValueError(
                        f"gradient_accumulator of '{self.names[i]}' must be zero: after {calls} "
                        "calls of this optimizer no gradient waits in it; received other values, "
                        "perhaps of another gradient_accumulation_steps"
                    )
                pending[i] = True
            arrays.assign(state.kept[kind][i], value)
        state.plan.calls, state.plan.accumulated = calls, pending
        return state

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plan": (self.plan.calls, self.accumulated())}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        # Into new arrays in the memory order of the variables, which unpickled ones can lose.
        self.__dict__.update(saved)
        calls, accumulated = saved["plan"]
        values = [arrays.as_host(array, "state") for array in self.in_keras_order()]
        self.__dict__ = self.loaded(values, calls, accumulated).__dict__
