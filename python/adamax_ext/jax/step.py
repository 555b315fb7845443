"""One native call for all leaves: in place where XLA allows, on shards, and under vmap."""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from adamax_ext.jax import target

Arrays: TypeAlias = Sequence[Any]

# That can be arrays: in the order in which the native step expects them.
SETTINGS = ("learning_rate", "b1", "b2", "eps", "weight_decay", "loss_scale")


class Leaves(NamedTuple):
    """What a step overwrites: an array of each kind for each leaf.

    As long as they go in and come out in this order, JAX pairs donated arrays with results.
    """

    params: Arrays
    mu: Arrays
    nu: Arrays
    averages: Arrays = ()  # of the weights, where they are kept


class Static(NamedTuple):
    """What a compiled step has built in."""

    kinds: int  # of arrays
    leaves: int
    gradients: int
    attributes: tuple[tuple[str, Any], ...]


def step(leaves: Leaves, grads: Arrays, count: Any, settings: dict[str, Any]) -> Leaves:
    """Return what `leaves` are after a step.

    Parameters
    ----------
    leaves : Leaves
    grads : sequence of arrays
        Those of the first parameters or of all, each with the shape of its parameter and a dtype
        for it among ``_core.storages``. The others are not stepped, but averaged.
    count : int32 array without axes
        Completed steps.
    settings : dict
        For each of `SETTINGS` a float, or a real array of one element. The words
        `epsilon_mode` and `decay` as in `adamax_ext.update`. Perhaps the floats `clipvalue` and,
        with averages, `ema_momentum`, and the int `decayed`: the number of parameters, the first
        ones, to which `weight_decay` applies.

    Raises
    ------
    RuntimeError
        The jaxlib that is installed does not take the native step.
    """
    target.register()
    kinds = [kind for kind in leaves if len(kind) > 0]
    if not kinds:
        return leaves
    arrays = [
        _number(name, settings[name]) for name in SETTINGS if isinstance(settings[name], jax.Array)
    ]
    numbers = {name: x for name, x in settings.items() if not isinstance(x, jax.Array)}
    n = len(leaves.params)
    static = Static(len(kinds), n, len(grads), tuple(numbers.items()))
    results = _step(static, *chain.from_iterable(kinds), count, *grads, *arrays)
    return Leaves(*(results[i : i + n] for i in range(0, len(results), n)))


def _number(name: str, array: jax.Array) -> jax.Array:
    """Return a setting as the native step reads it."""
    number = array.reshape(()).astype(jnp.promote_types(array.dtype, jnp.float32))
    if name == "loss_scale":  # an infinite one would hide gradients that are not finite
        number = jnp.where(jnp.isfinite(number), number, jnp.nan)
    return number


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def _step(static: Static, *operands: Any) -> Arrays:
    partitioned = custom_partitioning(partial(_call, static))
    partitioned.def_partition(
        partial(_partition, static),
        infer_sharding_from_operands=lambda *known: _partition(static, *known)[2],
        sharding_rule=_sharding_rule(static, operands),
    )
    # A batch at once would have one step number for all of its members.
    done: Arrays = sequential_vmap(partitioned)(*operands)
    return done


@_step.defjvp
def _refuse(static: Static, primals: Arrays, tangents: Arrays) -> Any:
    raise TypeError(
        "the step of adamax_ext.jax cannot be differentiated: JAX cannot see into it; use "
        "optax.adamax where gradients flow through a step, or jax.lax.stop_gradient"
    )


def _call(static: Static, *operands: Any) -> Arrays:
    results = [jax.typeof(operand) for operand in operands[: static.kinds * static.leaves]]
    in_place = {i: i for i in range(len(results))}
    as_attribute = {float: np.float64, int: np.int64, str: str}
    attributes = {name: as_attribute[type(x)](x) for name, x in static.attributes}
    # As a call with effects XLA does not try to fuse it with others: for hundreds of operands that
    # are overwritten, that takes minutes (the cube of their number). JAX still leaves out a step
    # whose results nobody needs.
    call = jax.ffi.ffi_call(
        target.NAME, results, input_output_aliases=in_place, has_side_effect=True
    )
    done: Arrays = call(*operands, **attributes)
    return done


# ---- How XLA may cut arrays into shards ----------------------------------------------------------


def _sharding_rule(static: Static, operands: Arrays) -> str:
    """Say that the arrays of a leaf are cut alike along each axis, and no number is."""
    leaves = [
        " ".join(f"l{i}_{axis}" for axis in range(param.ndim))
        for i, param in enumerate(operands[: static.leaves])
    ]
    results = leaves * static.kinds
    gradients = leaves[: static.gradients]
    settings = [""] * (len(operands) - len(results) - 1 - len(gradients))
    return ", ".join([*results, "", *gradients, *settings]) + " -> " + ", ".join(results)


def _partition(static: Static, mesh: Any, operands: Arrays, results: Arrays) -> Any:
    """Choose one sharding for the arrays of each leaf, that of one that is cut.

    Returns the mesh, the call of a shard, and the shardings of its results and of its operands.
    """
    n, places = static.leaves, static.kinds * static.leaves
    # The mesh of a plain jit can be empty: then the count's own sharding names the devices.
    whole = getattr(operands[places], "sharding", None) or NamedSharding(mesh, PartitionSpec())

    def sharding_of(arrays: Arrays) -> Any:
        known = (getattr(array, "sharding", None) for array in arrays)
        return next((s for s in known if s is not None and not s.is_fully_replicated), whole)

    gradients = operands[places + 1 : places + 1 + static.gradients]
    leaves = [
        sharding_of((*operands[i:places:n], *gradients[i : i + 1], *results[i:places:n]))
        for i in range(n)
    ]
    own = leaves * static.kinds
    settings = [whole] * (len(operands) - places - 1 - len(gradients))
    return mesh, partial(_call, static), own, (*own, whole, *leaves[: len(gradients)], *settings)
