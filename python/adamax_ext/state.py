"""The arrays that an optimizer keeps for its variables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from adamax_ext import _core

Array: TypeAlias = np.ndarray[Any, Any]


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
        """Return zeros with the shape and memory order of each variable, in its compute type."""
        layouts = [_core.describe(v, "variables", i)[:3] for i, v in enumerate(variables)]

        def zeros() -> list[Array]:
            return [_zeros(*layout) for layout in layouts]

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
            array[...] = old
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
            name: {kind: arrays[i] for kind, arrays in kinds.items() if arrays is not None}
            for i, name in enumerate(self.names)
        }


def _zeros(shape: Sequence[int], strides: Sequence[int], dtype: str) -> Array:
    """Return zeros whose axes lie in memory in the order that `strides` tell."""
    slowest_first = sorted(range(len(shape)), key=lambda axis: -strides[axis])
    array = np.zeros([shape[axis] for axis in slowest_first], dtype)
    return array.transpose(np.argsort(slowest_first))
