"""`Adamax` for Keras: its arguments and state; a module for each backend does the step."""

from types import SimpleNamespace
from typing import Any

import keras

_WIDER = {"float16": "float32", "bfloat16": "float32"}  # what state is kept in


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

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **kwargs,
        )

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> Any:
        """Add state for a variable as Keras does, but in float32 for one of 16 bits."""
        dtype = _WIDER.get(reference_variable.dtype)
        like = reference_variable
        if dtype is not None:
            known = ("path", "name", "shape", "_layout", "_value")
            kept = {key: getattr(like, key) for key in known if hasattr(like, key)}
            like = SimpleNamespace(**kept, dtype=dtype)
        return super().add_variable_from_reference(like, name=name, initializer=initializer)
