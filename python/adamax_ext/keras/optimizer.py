"""`Adamax` for Keras: its arguments and state; a module for each backend does the step."""

from typing import Any

import keras

from adamax_ext import _core, low_state
from adamax_ext.configuration import Configured

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
    state_bits : {32, 16, 8}
        On torch: bits of an element of first moment and infinity norm, of float32, float16 and
        bfloat16 variables. With 8, variables with fewer than 4096 elements keep float32, `beta_1`
        must be below `beta_2` and `epsilon` at least 2**-86 and, after `build`, fixed; for `beta_1`
        above 0.95 rather take 16.
    weight_rounding : {"nearest", "stochastic", "remainder"}
        On torch: how bfloat16 variables are stored (not float32 ones, as of the policy
        "mixed_bfloat16"): to nearest, where steps that are small beside a weight are lost; at
        random, which is right on average; or exactly, with the other 16 bits of each weight in a
        variable of the optimizer. What others write into a weight, a constraint too, keeps them.
    seed : int from 0 to 2**64 - 1
        On torch: what random roundings follow from, beside the number of the update, the position
        of the variable (those that gradients overwrite are not counted) and the element.

    Raises
    ------
    ValueError
        As ``keras.optimizers.Adamax``, with its words; one of the last three is out of range.
    NotImplementedError
        The backend of Keras is neither torch nor JAX; or it is JAX, and one of the last three is
        not the default.

    Notes
    -----
    Kingma & Ba 2014, "Adam: a method for stochastic optimization", section 7.1. State is float64
    for float64 variables and float32 for all others. On torch the whole step is native: under
    gradient accumulation averages of the weights count updates, where Keras counts every call; and
    a step is done for all variables or, if an exception says why, for none. On JAX all is native
    but norms and accumulation.

    A saved model names this class ``adamax_ext>Adamax``. Where adamax_ext is not installed, load it
    with ``custom_objects={"adamax_ext>Adamax": keras.optimizers.Adamax}``, if the last three
    settings are the defaults: only then they are not in the config.

    On JAX those are refused: its state must have the shapes of the variables, by which Keras shards
    both alike, and a scale for 256 elements has not. On torch, `variables` shows state in fewer
    bits as it is stored, and so `set_weights` takes it; then come a norm_scale of each variable
    that has such state, and each remainder. Files, and copies that are made by them (also
    `copy.deepcopy` and pickle), have Keras' layout: momentum and norm as float32, and after
    everything else the float32 weights of variables with remainders. So files of Keras and of other
    settings can be loaded (those with such weights only where they are kept), and training goes on
    from the exact weights, and from the state within one rounding of it. What Keras wraps around
    optimizers writes `variables` beside this: a ``LossScaleOptimizer`` finds its own scale only in
    files of the same settings. Keras can do no step of its own then, as in `stateless_apply`.
    """

    def __init__(
        self,
        *args: Any,
        state_bits: int = 32,
        weight_rounding: str = "nearest",
        seed: int = 0,
        **settings: Any,
    ) -> None:
        received = {"state_bits": state_bits, "weight_rounding": weight_rounding, "seed": seed}
        checked = {name: Configured.checks[name](name, v) for name, v in received.items()}
        super().__init__(*args, **settings)
        if keras.backend.backend() != "torch":
            _require_defaults(checked)
        self._state_bits: int = checked["state_bits"]
        self._weight_rounding: str = checked["weight_rounding"]
        self._seed: int = checked["seed"]
        # Whether its variables are those that Keras has.
        self._is_plain = {**checked, "seed": 0} == low_state.DEFAULTS

    @property
    def state_bits(self) -> int:
        """Bits of an element of first moment and infinity norm."""
        return self._state_bits

    @property
    def weight_rounding(self) -> str:
        """How bfloat16 variables are stored."""
        return self._weight_rounding

    @property
    def seed(self) -> int:
        """Of the random numbers of rounding."""
        return self._seed

    def get_config(self) -> dict[str, Any]:
        """Return the arguments; `state_bits`, `weight_rounding`, `seed` if not the defaults."""
        config: dict[str, Any] = super().get_config()
        own = {name: getattr(self, name) for name in low_state.DEFAULTS}
        return config | {name: v for name, v in own.items() if v != low_state.DEFAULTS[name]}

    def add_variable(
        self, shape: Any, initializer: Any = "zeros", dtype: Any = None, **options: Any
    ) -> Any:
        """Add state as Keras does, but in float32 for a variable of 16 bits."""
        return super().add_variable(shape, initializer, _STATE.get(dtype, dtype), **options)


def _require_defaults(settings: dict[str, Any]) -> None:
    for name, default in low_state.DEFAULTS.items():
        if settings[name] != default:
            raise NotImplementedError(
                f"{name} must be {default!r} on Keras' JAX backend: adamax_ext.keras.Adamax on JAX "
                "keeps float32 state and weights that are rounded to nearest; received "
                f"{settings[name]!r}. Set KERAS_BACKEND to torch before keras is imported, or use "
                "adamax_ext.Adamax"
            )
