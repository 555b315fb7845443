"""`Adamax` for Keras: its arguments and state; a module for each backend does the step."""

from typing import Any

import keras

from adamax_ext import _core

_STATE = {param: state for param, _, state in _core.storages}


def _on_backend() -> type:
    """Return the class that does the steps of `Adamax` on Keras' backend."""
    backend = keras.backend.backend()
    if backend == "torch":
        from adamax_ext.keras.torch_step import TorchAdamax

        return TorchAdamax
    if backend == "jax":
        from adamax_ext.keras.jax_step import JaxAdamax

        return JaxAdamax
    return _Unsupported


class _Unsupported(keras.optimizers.Adamax):  # type: ignore[misc]
    """For the backends whose variables cannot be stepped in place from outside."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "adamax_ext.keras.Adamax works on Keras' torch and JAX backends; received the backend "
            f"{keras.backend.backend()!r}. Set KERAS_BACKEND to torch or jax before keras is "
            "imported, or use keras.optimizers.Adamax"
        )


@keras.saving.register_keras_serializable("adamax_ext")
class Adamax(_on_backend()):  # type: ignore[misc]
    """``keras.optimizers.Adamax`` with a fused step: the same arguments, state and mathematics.

    Parameters
    ----------
    learning_rate : float, keras.optimizers.schedules.LearningRateSchedule or callable
        A schedule sees the number of completed calls; a callable takes no arguments.
    beta_1, beta_2 : float in [0, 1)
        Decay of the first moment and of the infinity norm.
    epsilon : float > 0
        Added to the infinity norm in the denominator.
    **settings
        Those of every optimizer of Keras: ``weight_decay``, ``clipnorm``, ``clipvalue``,
        ``global_clipnorm``, ``use_ema``, ``ema_momentum``, ``ema_overwrite_frequency``,
        ``loss_scale_factor``, ``gradient_accumulation_steps``, ``name``.

    Raises
    ------
    ValueError
        As ``keras.optimizers.Adamax``, with its words.
    NotImplementedError
        The backend of Keras is neither torch nor JAX.

    Notes
    -----
    Kingma & Ba 2014, "Adam: a method for stochastic optimization", section 7.1. State is float64
    for float64 variables and float32 for all others. On torch the whole step is native: under
    gradient accumulation averages of the weights count updates, where Keras counts every call; and
    a step is done for all variables or, if an exception says why, for none. On JAX all is native
    but norms and accumulation.

    A saved model names this class ``adamax_ext>Adamax``. Where adamax_ext is not installed, load it
    with ``custom_objects={"adamax_ext>Adamax": keras.optimizers.Adamax}``.
    """

    def add_variable(
        self, shape: Any, initializer: Any = "zeros", dtype: Any = None, **options: Any
    ) -> Any:
        """Add state as Keras does, but in float32 for a variable of 16 bits."""
        return super().add_variable(shape, initializer, _STATE.get(dtype, dtype), **options)
