"""The functional layer: one step on buffers that the caller owns, norms, and run-time controls."""

from collections.abc import Iterable
from typing import Any, Literal

from adamax_ext import _core, _settings


def update(
    param: Any,
    grad: Any,
    m: Any,
    u: Any,
    *,
    step: int,
    learning_rate: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    weight_decay: float = 0.0,
    decay: Literal["decoupled", "l2"] = "decoupled",
    epsilon_mode: Literal["outside", "inside"] = "outside",
    grad_scale: float = 1.0,
    clipvalue: float | None = None,
    average: Any = None,
    ema_momentum: float = 0.99,
    norm_scale: Any = None,
    remainder: Any = None,
    weight_rounding: Literal["nearest", "stochastic", "remainder"] = "nearest",
    seed: int = 0,
    variable: int = 0,
    first_element: int = 0,
) -> None:
    """Do one fused Adamax step in place.

    Parameters
    ----------
    param : buffer of float32, float64, float16 or bfloat16, any shape
        Weights; overwritten.
    grad : buffer, same shape and memory order
        Gradient. The dtype of `param`, or float32 for 16-bit weights, or 16 bits for float32
        weights.
    m, u : buffer of float32 (float64 for float64 weights), same shape and memory order
        First moment and infinity norm; zeros before the first step; overwritten. Also bfloat16 (or
        uint16 that holds its bits) both, or int8 and uint8: state in 16 or 8 bits. With 8, `beta_1`
        must be below `beta_2` and `epsilon` at least 2**-86, the same in all steps.
    step : int
        Number of this update, from 1.
    learning_rate, beta_1, beta_2, epsilon : float
        As in `Adamax`.
    weight_decay : float
        0 switches it off.
    decay : {"decoupled", "l2"}
        ``w -= w * learning_rate * weight_decay`` before the step (Keras), or ``grad += w *
        weight_decay`` (torch).
    epsilon_mode : {"outside", "inside"}
        ``m / (u + epsilon)`` (Keras), or ``u = max(beta_2 * u, abs(grad) + epsilon)`` (torch,
        optax).
    grad_scale : float
        Multiplies the gradient first.
    clipvalue : float, optional
        Limits every element of the gradient to [-clipvalue, clipvalue].
    average : buffer like `m`, optional
        Exponential moving average of the weights; set to them at step 1; overwritten.
    ema_momentum : float
        Share of the old average in the new one.
    norm_scale : buffer of float32, optional
        With state in 16 bits one number, 1 before the first step; with state in 8 bits one for each
        256 elements of `param`, the last perhaps fewer, 0 before the first step; overwritten.
    remainder : buffer of int16 like `param`, optional
        What bfloat16 weights do not hold, with ``weight_rounding="remainder"``: zeros before the
        first step; overwritten.
    weight_rounding : {"nearest", "stochastic", "remainder"}
        How bfloat16 weights are stored; of no effect on float32 and float64.
    seed, variable : int
        What random numbers follow from, beside `step` and the element: the seed of a training, from
        0 to 2**64 - 1, and a number for each variable in it, up to 2**32 - 1.
    first_element : int
        Where `param` begins in the variable that it is a part of, a multiple of 256.

    Raises
    ------
    ValueError
        A setting out of range; with state in 8 bits, `beta_1` not below `beta_2`, or `epsilon`
        below 2**-86; buffers of different size or layout, with gaps, overlapping, or not all in
        host memory or on one CUDA device.
    TypeError
        An unsupported pair of dtypes, or an object without memory.
    BufferError
        Memory that is read-only, closed or freed. After any exception no buffer has changed.
    RuntimeError
        A CUDA device that cannot be used, or whose stream is being captured.

    Notes
    -----
    Kingma & Ba 2014, "Adam: a method for stochastic optimization", section 7.1.

    Examples
    --------
    >>> import numpy as np
    >>> w, g = np.ones(3, np.float32), np.full(3, 0.5, np.float32)
    >>> m, u = np.zeros_like(w), np.zeros_like(w)
    >>> update(w, g, m, u, step=1, learning_rate=0.25)
    >>> w.round(3)
    array([0.75, 0.75, 0.75], dtype=float32)
    """
    group = _core.Group()
    group.step = _settings.integer("step", step, least=1)
    group.learning_rate = _settings.not_negative("learning_rate", learning_rate)
    group.beta_1 = _settings.number("beta_1", beta_1)
    group.beta_2 = _settings.number("beta_2", beta_2)
    group.epsilon = _settings.number("epsilon", epsilon)
    group.weight_decay = _settings.number("weight_decay", weight_decay)
    group.decay = decay
    group.epsilon_mode = epsilon_mode
    group.clipvalue = None if clipvalue is None else _settings.number("clipvalue", clipvalue)
    group.ema_momentum = _settings.number("ema_momentum", ema_momentum)
    scale = _settings.real("grad_scale", grad_scale, "that is finite", lambda x: True)
    group.seed = _settings.seed("seed", seed)
    _core.update(
        param,
        grad,
        m,
        u,
        average=average,
        norm_scale=norm_scale,
        remainder=remainder,
        group=group,
        grad_scale=scale,
        weight_rounding=weight_rounding,
        variable=_settings.integer("variable", variable, least=0, most=2**32 - 1),
        first_element=_settings.integer(
            "first_element", first_element, 0, 2**63 - 1, multiple_of=256
        ),
    )


def global_norm(buffers: Iterable[Any]) -> float:
    """Return the Euclidean norm over all elements of all buffers, the same bits on every machine.

    Parameters
    ----------
    buffers : iterable of buffers of float32, float64, float16 or bfloat16
        Any shapes; dense.

    Returns
    -------
    float
        Squares are added in float64 in a fixed order. Infinite or NaN if an element is.

    Raises
    ------
    TypeError, ValueError, BufferError, RuntimeError
        As `update`.

    Notes
    -----
    On a GPU the call waits for the result.
    """
    return _core.global_norm(_settings.sequence("buffers", buffers))


def build_info() -> dict[str, Any]:
    """Return what was built, and what runs.

    Returns
    -------
    dict
        Version, compiler, kernel flags, instruction sets, CUDA architectures, and as "openmp"
        whether an OpenMP runtime is loaded, whose threads then do the work.
    """
    return _core.build_info()


def available_isas() -> list[str]:
    """Return the instruction sets that this processor runs, best last."""
    return _core.available_isas()


def active_isa() -> str:
    """Return the instruction set in use: the best, or what ADAMAX_EXT_ISA names.

    Raises
    ------
    ValueError
        ADAMAX_EXT_ISA names none that this processor runs.
    """
    return _core.active_isa()


def set_num_threads(n: int) -> None:
    """Use at most `n` threads for large steps; results do not depend on it.

    The CPU affinity, the cgroup quota and the limit of a loaded OpenMP runtime, such as that of
    torch.set_num_threads, are upper limits all the same. Without a call, the environment variables
    ADAMAX_EXT_NUM_THREADS and then OMP_NUM_THREADS stand for `n`.

    Raises
    ------
    ValueError
        `n` is less than 1.
    """
    _core.set_num_threads(_settings.integer("n", n, least=1, most=2**31 - 1))


def get_num_threads() -> int:
    """Return how many threads a large step uses."""
    return _core.get_num_threads()
