"""One native call for all leaves: in place where XLA allows, on shards, and under vmap."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.custom_batching import sequential_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from adamax_ext.jax import target

Arrays: TypeAlias = Sequence[Any]

# In the order in which the native step expects those that are arrays.
SETTINGS = ("learning_rate", "b1", "b2", "eps", "weight_decay")


class Leaves(NamedTuple):
    """What a step overwrites: an array of each kind for each leaf, and one number.

    As long as they go in and come out in this order, JAX pairs donated arrays with results.
    """

    params: Arrays
    mu: Arrays
    nu: Arrays
    count: Any  # of completed steps, int32


class Static(NamedTuple):
    """What a compiled step has built in."""

    leaves: int
    numbers: tuple[tuple[str, float], ...]  # the settings that are no arrays
    epsilon_mode: str
    decay: str


def step(
    leaves: Leaves, grads: Arrays, settings: dict[str, Any], *, epsilon_mode: str, decay: str
) -> Leaves:
    """Return what `leaves` are after a step.

    Parameters
    ----------
    leaves : Leaves
    grads : sequence of arrays
        Each with the shape of its parameter, and a dtype for it among ``_core.storages``.
    settings : dict
        For each of `SETTINGS` a float, or a float32 or float64 array without axes.
    epsilon_mode, decay : str
        As in `adamax_ext.update`.

    Raises
    ------
    RuntimeError
        The jaxlib that is installed does not take the native step.
    """
    target.register()
    n = len(leaves.params)
    numbers = tuple((name, x) for name, x in settings.items() if isinstance(x, float))
    arrays = [settings[name] for name in SETTINGS if name not in dict(numbers)]
    results = _step(
        Static(n, numbers, epsilon_mode, decay),
        *(*leaves.params, *leaves.mu, *leaves.nu, leaves.count),
        *grads,
        *arrays,
    )
    return Leaves(results[:n], results[n : 2 * n], results[2 * n : 3 * n], results[3 * n])


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
    results = [jax.typeof(operand) for operand in operands[: 3 * static.leaves + 1]]
    in_place = {i: i for i in range(len(results))}
    # As a call with effects XLA does not try to fuse it with others: for hundreds of operands that
    # are overwritten, that takes minutes (the cube of their number). JAX still leaves out a step
    # whose results nobody needs.
    step = jax.ffi.ffi_call(
        target.NAME, results, input_output_aliases=in_place, has_side_effect=True
    )
    done: Arrays = step(
        *operands,
        **{name: np.float64(number) for name, number in static.numbers},
        epsilon_mode=static.epsilon_mode,
        decay=static.decay,
    )
    return done


# ---- How XLA may cut arrays into shards ----------------------------------------------------------


def _sharding_rule(static: Static, operands: Arrays) -> str:
    """Say that the arrays of a leaf are cut alike along each axis, and no number is."""
    leaves = [
        " ".join(f"l{i}_{axis}" for axis in range(param.ndim))
        for i, param in enumerate(operands[: static.leaves])
    ]
    results = [*leaves * 3, ""]
    numbers = [""] * (len(operands) - len(results) - len(leaves))
    return ", ".join([*results, *leaves, *numbers]) + " -> " + ", ".join(results)


def _partition(static: Static, mesh: Any, operands: Arrays, results: Arrays) -> Any:
    """Choose one sharding for the arrays of each leaf, that of one that is cut.

    Returns the mesh, the call of a shard, and the shardings of its results and of its operands.
    """
    n = static.leaves
    # Where a jit has no mesh, a number's own sharding is all there is.
    whole = getattr(operands[3 * n], "sharding", None) or NamedSharding(mesh, PartitionSpec())

    def sharding_of(arrays: Arrays) -> Any:
        known = (getattr(array, "sharding", None) for array in arrays)
        return next((s for s in known if s is not None and not s.is_fully_replicated), whole)

    leaves = [
        sharding_of((*operands[i : 3 * n : n], operands[3 * n + 1 + i], *results[i : 3 * n : n]))
        for i in range(n)
    ]
    own = [*leaves * 3, whole]
    numbers = [whole] * (len(operands) - 4 * n - 1)
    return mesh, partial(_call, static), own, (*own, *leaves, *numbers)
