"""`adamax` for JAX: trees of arrays in optax's words."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from adamax_ext import _core, _settings
from adamax_ext.jax import target
from adamax_ext.jax.step import Leaves, step

_CHECKS: dict[str, _settings.Check] = {
    "learning_rate": partial(_settings.real, wanted="that is finite", valid=lambda x: True),
    "b1": partial(_settings.real, wanted="in [0, 1)", valid=lambda x: 0 <= x < 1),
    "b2": partial(_settings.real, wanted="in [0, 1)", valid=lambda x: 0 <= x < 1),
    "eps": _settings.not_negative,
    "weight_decay": _settings.not_negative,
    "loss_scale": _settings.positive,
}


class AdamaxState(NamedTuple):
    """State of `adamax`, with the names of optax's.

    Attributes
    ----------
    count : int32 array without axes
        Completed steps.
    mu, nu : trees of arrays as the parameters
        First moment and infinity norm; float32 for 16-bit parameters, else of their dtype.
    """

    count: Any
    mu: Any
    nu: Any


class Adamax(NamedTuple):
    """What `adamax` returns; optax takes it where it takes a ``GradientTransformation``.

    Attributes
    ----------
    init : callable
        ``state = init(params)``.
    update : callable
        ``updates, state = update(grads, state, params)``, where `params` may be None without weight
        decay.
    apply : callable
        ``params, state = apply(params, grads, state, loss_scale=1.0)``, the fused step: under
        ``jax.jit(apply, donate_argnums=(0, 2))`` in place. `loss_scale`, a number or an array of
        one, divides the gradients: that of the loss, or ``maximum(norm / limit, 1)`` to clip by a
        norm; as an array, if it changes from step to step. One that is not finite makes all
        weights NaN.
    """

    init: Callable[[Any], AdamaxState]
    update: Callable[..., tuple[Any, AdamaxState]]
    apply: Callable[..., tuple[Any, AdamaxState]]


def adamax(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    *,
    epsilon_mode: Literal["inside", "outside"] = "inside",
    decay: Literal["decoupled", "l2"] = "decoupled",
) -> Adamax:
    """Return ``optax.adamax``, or ``optax.adamaxw``, with a fused step.

    Parameters
    ----------
    learning_rate : float, array of one element, or callable
        A callable is a schedule of optax: it gets the number of completed steps.
    b1, b2 : float or array of one element, in [0, 1)
        Decay of the first moment and of the infinity norm.
    eps : float or array of one element, >= 0
        Added to the size of the gradient (inside), or to the infinity norm (outside; > 0).
    weight_decay : float or array of one element, >= 0
        0 switches it off.
    epsilon_mode : {"inside", "outside"}
        ``u = max(b2 * u, abs(g) + eps)``, as optax and torch; or ``m / (u + eps)``, as Keras.
    decay : {"decoupled", "l2"}
        ``w -= w * learning_rate * weight_decay``, as optax; or ``g += w * weight_decay``, as torch.

    Returns
    -------
    Adamax
        Three functions of trees of float32, float64, float16 or bfloat16 arrays. Gradients have the
        dtype of their parameter, or float32 for 16-bit parameters, or 16 bits for float32 ones.
        All may be traced, sharded, and mapped by vmap (one member after the other).

    Raises
    ------
    TypeError, ValueError
        A setting out of range; from the functions: trees, shapes or dtypes that do not fit.
    RuntimeError
        From the functions: the jaxlib that is installed does not take the native step.

    Notes
    -----
    Kingma & Ba 2014, "Adam: a method for stochastic optimization", section 7.1. The bits are those
    of `adamax_ext.update`. A setting that is an array is rounded to its dtype, and on a GPU only
    `learning_rate` and `loss_scale` can be one. A schedule that returns Python's numbers outside of
    jit is compiled anew for each. The step cannot be differentiated, nor exported by
    ``jax.export``. There is no state in fewer bits as of `adamax_ext.Adamax`: the state of optax
    has leaves that are shaped and sharded as the parameters, and a scale for 256 elements is
    neither.
    """
    for name, value, known in (
        ("epsilon_mode", epsilon_mode, ("inside", "outside")),
        ("decay", decay, ("decoupled", "l2")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}; received {value!r}")
    given = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    if not callable(learning_rate):
        given["learning_rate"] = learning_rate
    settings = {name: _setting(name, value) for name, value in given.items()}
    settings |= {"epsilon_mode": epsilon_mode, "decay": decay}
    if epsilon_mode == "outside" and _is_zero(settings["eps"]):
        raise ValueError(f"eps must be a number > 0 with epsilon_mode 'outside'; received {eps!r}")

    def init(params: Any) -> AdamaxState:
        target.register()  # also for who loads what was compiled elsewhere
        mu, nu = (jax.tree_util.tree_map_with_path(_zeros, params) for _ in range(2))
        return AdamaxState(jnp.zeros([], jnp.int32), mu, nu)

    def apply(
        params: Any, grads: Any, state: AdamaxState, loss_scale: Any = 1.0
    ) -> tuple[Any, AdamaxState]:
        count = jnp.asarray(state.count)
        if count.shape or count.dtype != jnp.int32:
            raise ValueError(f"count must be one int32; received {jax.typeof(count).str_short()}")
        now = {**settings, "loss_scale": _setting("loss_scale", loss_scale)}
        if callable(learning_rate):
            now["learning_rate"] = _setting("learning_rate", learning_rate(count))
        paths, tree = jax.tree_util.tree_flatten_with_path(params)
        arrays = partial(_arrays, tree, paths)
        leaves = Leaves(arrays("params", params), arrays("mu", state.mu), arrays("nu", state.nu))
        gradients = arrays("grads", grads)
        for moments in (leaves.mu, leaves.nu):
            for (path, _), *own in zip(paths, leaves.params, gradients, moments, strict=True):
                _require_storage(path, *own)
        done = step(leaves, gradients, count, now)
        params, mu, nu = (jax.tree.unflatten(tree, kind) for kind in done[:3])
        # As optax's, it stays at the largest number.
        return params, AdamaxState(count + (count < jnp.iinfo(jnp.int32).max), mu, nu)

    def update(grads: Any, state: AdamaxState, params: Any = None) -> tuple[Any, AdamaxState]:
        if _is_zero(settings["weight_decay"]):
            # The step of weights that are zero is what has to be added to any.
            zeros = jax.tree.map(jnp.zeros_like, grads if params is None else params)
            return apply(zeros, grads, state)
        if params is None:
            raise ValueError(
                "params must be given to update() with weight_decay; received None. An array that "
                "is 0 cannot be told from others: optax.inject_hyperparams makes none of what is "
                "named in its static_args"
            )
        stepped, state = apply(params, grads, state)
        return jax.tree.map(jnp.subtract, stepped, params), state

    return Adamax(init, update, apply)


def _setting(name: str, value: Any) -> Any:
    """Return a number as a float, which is compiled in, and an array of JAX as it is."""
    if isinstance(value, jax.Array):
        is_real = jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(
            value.dtype, jnp.floating
        )
        if value.size != 1 or not is_real:
            raise ValueError(f"{name} must be a real number or an array of one; received {value}")
        return value
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    return _CHECKS[name](name, value)


def _is_zero(setting: Any) -> bool:
    return isinstance(setting, float) and setting == 0


def _zeros(path: Any, param: Any) -> Any:
    """Return the state of a parameter before its first step."""
    dtype = jnp.result_type(param)
    states = {p: state for p, _, state in _core.storages}
    if dtype.name not in states:
        raise TypeError(f"params{keystr(path)} has dtype {dtype}; expected {_one_of(states)}")
    return jnp.zeros_like(param, dtype=states[dtype.name])


def _arrays(tree: Any, paths: Any, name: str, values: Any) -> list[Any]:
    """Return the leaves of a tree that fits to the parameters."""
    try:
        leaves = tree.flatten_up_to(values)
    except ValueError as error:
        raise ValueError(f"{name} must be a tree as params; {error}") from error
    arrays = [None if leaf is None else jnp.asarray(leaf) for leaf in leaves]
    for (path, param), array in zip(paths, arrays, strict=True):
        if array is None or array.shape != jnp.shape(param):
            raise ValueError(
                f"{name}{keystr(path)} must have the shape {jnp.shape(param)} of its parameter; "
                f"received {None if array is None else array.shape}"
            )
    return arrays


def _require_storage(path: Any, *arrays: Any) -> None:
    """Refuse dtypes of a parameter, its gradient and its state that the native step has not."""
    received = tuple(array.dtype.name for array in arrays)
    if received not in _core.storages:
        raise TypeError(
            f"params{keystr(path)} has dtype {received[0]}, its gradient {received[1]}, its state "
            f"{received[2]}; expected " + _one_of("/".join(storage) for storage in _core.storages)
        )


def _one_of(words: Iterable[str]) -> str:
    return " or ".join(words)
