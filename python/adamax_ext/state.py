"""The arrays that an optimizer keeps for its variables, and the plan of the steps on them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from adamax_ext import _core, arrays, low_state

# Kind of an array, and index of its variable.
Place: TypeAlias = tuple[str, int]
_KERAS_LISTS = ("average", "gradient_accumulator")


class State:
    """The arrays of each variable by kind, and the plan of the steps on all of them.

    `groups` tells the group of settings of each variable; `kinds` are "average" and
    "gradient_accumulator", as far as they are kept.
    """

    def __init__(
        self,
        variables: Sequence[Any],
        names: Sequence[str],
        groups: Sequence[int],
        kinds: Iterable[str],
        state_bits: int,
        weight_rounding: str,
    ) -> None:
        self.variables, self.names, self.groups = tuple(variables), list(names), list(groups)
        self.kinds, self.state_bits, self.weight_rounding = list(kinds), state_bits, weight_rounding
        self.orders = [arrays.memory_order(v, "variables", i) for i, v in enumerate(self.variables)]
        makers = [
            low_state.makers(v, name, i, state_bits, weight_rounding)
            | {kind: partial(arrays.zeros_for, v, "variables", i) for kind in self.kinds}
            for i, (v, name) in enumerate(zip(self.variables, self.names, strict=True))
        ]
        self.kept: list[low_state.Kinds] = [{} for _ in makers]  # of each variable
        # One kind after the other: what is fetched ahead of a small array is then the next one.
        for kind in dict.fromkeys(kind for of_variable in makers for kind in of_variable):
            for kept, of_variable in zip(self.kept, makers, strict=True):
                if kind in of_variable:
                    kept[kind] = of_variable[kind]()
        self.plan = _core.Plan(
            self.variables,
            self.names,
            self.groups,
            momentum=self._all_of("momentum"),
            norm=self._all_of("norm"),
            averages=self._all_of("average"),
            accumulators=self._all_of("gradient_accumulator"),
            norm_scales=self._all_of("norm_scale"),
            remainders=self._all_of("remainder"),
            weight_rounding=weight_rounding,
        )

    def _all_of(self, kind: str) -> list[arrays.Array | None]:
        return [kept.get(kind) for kept in self.kept]

    def by_name(self) -> dict[str, low_state.Kinds]:
        """Return the arrays of each variable by kind, as they are stored."""
        return {name: dict(kept) for name, kept in zip(self.names, self.kept, strict=True)}

    def orders_of_blocks(self) -> dict[str, list[int]]:
        """Return the memory orders, by name, that state in blocks depends on; not C order."""
        return {
            name: list(order)
            for name, order, kept in zip(self.names, self.orders, self.kept, strict=True)
            if list(order) != sorted(order) and "norm_scale" in kept and self.state_bits == 8
        }

    def accumulated(self) -> list[str]:
        """Return the names of the variables that have gradients of the present window."""
        return [n for n, has in zip(self.names, self.plan.accumulated, strict=True) if has]

    # ---- As numbers ------------------------------------------------------------------------------

    def decoded(self, i: int, epsilon: float) -> low_state.Kinds:
        """Return momentum and norm of a variable: live, or copies if they are in fewer bits."""
        kept = self.kept[i]
        if "norm_scale" not in kept:
            return {kind: kept[kind] for kind in low_state.STATE}
        return low_state.decoded(
            {kind: arrays.as_stored(kept[kind]) for kind in (*low_state.STATE, "norm_scale")},
            epsilon,
        )

    def weights(self, i: int) -> arrays.HostArray:
        """Return the weights of a variable, with their remainders as float32."""
        if "remainder" not in self.kept[i]:
            return arrays.as_host(self.variables[i], "variables")
        remainders = arrays.as_stored(self.kept[i]["remainder"])
        joined = np.empty_like(remainders, np.float32)
        _core.join_weights(arrays.as_stored(self.variables[i]), remainders, joined)
        return joined

    def _remainders(self, i: int, weights: arrays.HostArray) -> arrays.HostArray:
        """Return what is left of float32 weights; 0 where a variable has others now."""
        now = arrays.as_stored(self.variables[i])
        halves, remainders = np.empty_like(now), np.empty_like(now, np.int16)
        _core.split_weights(arrays.in_memory_order(weights, self.orders[i]), halves, remainders)
        return np.where(halves == now, remainders, np.int16(0))

    def start_averages(self) -> None:
        """Let the averages begin with the weights, where no first update will do it."""
        for i, kept in enumerate(self.kept):
            if "average" in kept:
                arrays.assign(kept["average"], self.weights(i))

    # ---- Keras' order ----------------------------------------------------------------------------

    def with_masters(self, values: list[arrays.HostArray], expected: int) -> list[arrays.HostArray]:
        """Return `values`, with the weights as they are in place of float32 weights that lack."""
        places = self._with_remainders()
        if len(values) != expected - len(places):
            return values
        return values + [arrays.as_host(self.variables[i], "variables") for i in places]

    def in_keras_order(self, epsilon: float) -> list[arrays.Array]:
        """Return averages, accumulators, then momentum and norm of each variable as numbers.

        At last the float32 weights of variables with remainders.
        """
        result = [kept[kind] for kind in _KERAS_LISTS if kind in self.kinds for kept in self.kept]
        for i in range(len(self.kept)):
            result += self.decoded(i, epsilon).values()
        return result + [self.weights(i) for i in self._with_remainders()]

    def from_keras_order(
        self, values: Iterable[arrays.HostArray], epsilon: float
    ) -> dict[Place, arrays.HostArray]:
        """Return what is stored of such values; ValueError for a norm below zero."""
        given: Iterator[arrays.HostArray] = iter(values)
        indices = range(len(self.kept))
        result = {
            (kind, i): next(given) for kind in _KERAS_LISTS if kind in self.kinds for i in indices
        }
        for i in indices:
            state: low_state.HostKinds = {"momentum": next(given), "norm": next(given)}
            low_state.require_norms(self.names[i], state)
            if "norm_scale" in self.kept[i]:
                ordered = low_state.in_memory_order(state, self.orders[i])
                state = low_state.encoded(ordered, self.state_bits, epsilon)
            result |= {(kind, i): value for kind, value in state.items()}
        for i in self._with_remainders():
            result["remainder", i] = self._remainders(i, next(given))
        return result

    def _with_remainders(self) -> list[int]:
        return [i for i, kept in enumerate(self.kept) if "remainder" in kept]

    # ---- Other values ----------------------------------------------------------------------------

    def places(self) -> list[Place]:
        return [(kind, i) for i, kept in enumerate(self.kept) for kind in kept]

    def loaded(
        self,
        values: Mapping[Place, arrays.HostArray],
        calls: int,
        accumulated: Iterable[str] | None = None,
        in_window: bool = True,
        orders: Sequence[tuple[int, ...]] | None = None,
    ) -> "State":
        """Return a state like this one with other values, in arrays of its own.

        Without `accumulated`, an accumulator has gradients if any of its elements is not 0, which
        is a ValueError unless `in_window`: a window of micro-batches has begun. `orders` are the
        memory orders of the variables whose state in blocks these values were, if not those here.
        """
        state = State(
            self.variables,
            self.names,
            self.groups,
            self.kinds,
            self.state_bits,
            self.weight_rounding,
        )
        listed = frozenset(accumulated or ())
        pending = [name in listed for name in self.names]
        for i, kept in enumerate(state.kept):
            new = {kind: values[kind, i] for kind in kept}
            low_state.require_norms(self.names[i], new)
            is_in_blocks = new["norm"].dtype == np.uint8
            if orders is not None and is_in_blocks and orders[i] != state.orders[i]:
                new |= low_state.reordered(new, orders[i], state.orders[i])
            if "gradient_accumulator" in new and new["gradient_accumulator"].any():
                if not in_window or (accumulated is not None and not pending[i]):
                    raise ValueError(
                        f"gradient_accumulator of '{self.names[i]}' must be zero: after {calls} "
                        "calls of this optimizer no gradient waits in it; received other values, "
                        "perhaps of another gradient_accumulation_steps"
                    )
                pending[i] = True
            for kind, value in new.items():
                arrays.assign(kept[kind], value)
        state.plan.calls, state.plan.accumulated = calls, pending
        return state

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plan": (self.plan.calls, self.accumulated())}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        # Into new arrays in the memory order of the variables, which unpickled ones can lose.
        self.__dict__.update(saved)
        calls, accumulated = saved["plan"]
        values = {(kind, i): arrays.as_stored(self.kept[i][kind]) for kind, i in self.places()}
        self.__dict__ = self.loaded(values, calls, accumulated, orders=self.orders).__dict__
