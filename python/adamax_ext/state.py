"""The arrays that an optimizer keeps for its variables."""

from dataclasses import dataclass
from typing import Any

from adamax_ext import _core, arrays
from adamax_ext.arrays import Array


@dataclass(frozen=True)
class State:
    """One array a variable of each kind that is kept; which variables have weight decay."""

    variables: list[Any]
    names: list[str]
    decays: list[bool]
    momentum: list[Array]
    norm: list[Array]
    averages: list[Array] | None
    accumulators: list[Array] | None

    @classmethod
    def allocate(
        cls,
        variables: list[Any],
        names: list[str],
        decays: list[bool],
        use_averages: bool,
        use_accumulators: bool,
    ) -> "State":
        """Return zeros for each variable; see `arrays.zeros_for`."""

        def zeros() -> list[Array]:
            return [arrays.zeros_for(v, "variables", i) for i, v in enumerate(variables)]

        return cls(
            variables,
            names,
            decays,
            zeros(),
            zeros(),
            zeros() if use_averages else None,
            zeros() if use_accumulators else None,
        )

    def laid_out_anew(self) -> "State":
        """Return a copy in the memory order of the variables, which unpickled arrays can lose."""
        use_averages, use_accumulators = self.averages is not None, self.accumulators is not None
        copy = State.allocate(
            self.variables, self.names, self.decays, use_averages, use_accumulators
        )
        for array, old in zip(copy.in_keras_order(), self.in_keras_order(), strict=True):
            arrays.assign(array, arrays.to_host(old))
        return copy

    def plan(self) -> _core.Plan:
        """Check the memory of all variables and return what the kernels need to know of it."""
        return _core.Plan(
            self.variables,
            self.names,
            self.momentum,
            self.norm,
            self.averages,
            self.accumulators,
            self.decays,
        )

    def in_keras_order(self) -> list[Array]:
        """Return averages, accumulators, then momentum and norm of each variable."""
        pairs = [array for pair in zip(self.momentum, self.norm, strict=True) for array in pair]
        return [*(self.averages or []), *(self.accumulators or []), *pairs]

    def by_name(self) -> dict[str, dict[str, Array]]:
        """Return the arrays of each variable by kind."""
        kinds = {
            "momentum": self.momentum,
            "norm": self.norm,
            "average": self.averages,
            "gradient_accumulator": self.accumulators,
        }
        return {
            name: {kind: kept[i] for kind, kept in kinds.items() if kept is not None}
            for i, name in enumerate(self.names)
        }
