"""What an optimizer is told: settings, checked whenever they are assigned, rate, counts, config."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from adamax_ext import _settings, low_state, rates
from adamax_ext.locking import exclusive
from adamax_ext.native import Native
from adamax_ext.progress import Progress
from adamax_ext.saving import Saveable

if TYPE_CHECKING:
    from typing_extensions import Self

_beta = partial(_settings.real, wanted="in [0, 1)", valid=lambda x: 0 <= x < 1)
_positive_or_none = _settings.optional(_settings.positive)
_CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
# Once there are arrays for them, and steps done with them.
_FIXED = ("use_ema", "gradient_accumulation_steps", "state_bits", "weight_rounding", "seed")
# What Keras 2 wrote into a config beside the settings, and the values that change nothing.
_LEFTOVERS = {
    "decay": (None, 0.0),
    "is_legacy_optimizer": (False, True),
    "jit_compile": (None, False, True),
}


class Configured(Saveable):
    """The settings and the progress of an `Adamax`, whose docstring says what they mean."""

    _native: Native | None = None  # of these settings, made by the next step

    checks: ClassVar[Mapping[str, _settings.Check]] = {  # in the order of Keras' config
        "weight_decay": _settings.optional(_settings.not_negative),
        "clipnorm": _positive_or_none,
        "global_clipnorm": _positive_or_none,
        "clipvalue": _positive_or_none,
        "use_ema": _settings.boolean,
        "ema_momentum": partial(_settings.real, wanted="in [0, 1]", valid=lambda x: 0 <= x <= 1),
        "ema_overwrite_frequency": _settings.optional(partial(_settings.integer, least=1)),
        "loss_scale_factor": _positive_or_none,
        "gradient_accumulation_steps": _settings.optional(partial(_settings.integer, least=2)),
        "beta_1": _beta,
        "beta_2": _beta,
        "epsilon": _settings.positive,
        "name": _settings.string,
        "state_bits": partial(_settings.one_of, choices=low_state.BITS),
        "weight_rounding": partial(_settings.one_of, choices=low_state.ROUNDINGS),
        "seed": _settings.seed,
    }

    def __init__(
        self,
        learning_rate: rates.Rate = 0.001,
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
        name: str = "adamax",
        state_bits: int = 32,
        weight_rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        self.progress = Progress(rates.checked(learning_rate))
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.weight_decay = weight_decay
        self.clipnorm = clipnorm
        self.clipvalue = clipvalue
        self.global_clipnorm = global_clipnorm
        self.use_ema = use_ema
        self.ema_momentum = ema_momentum
        self.ema_overwrite_frequency = ema_overwrite_frequency
        self.loss_scale_factor = loss_scale_factor
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.name = name
        self.state_bits = state_bits
        self.weight_rounding = weight_rounding
        self.seed = seed

    def _before_setting(self, name: str, value: Any) -> None:
        if name in _FIXED and self.built:
            raise ValueError(
                f"{name} cannot be assigned after build(), which made the arrays for it; "
                f"received {value!r}: make another optimizer"
            )
        known = vars(self) | {name: value}
        if name in _CLIPS and known.keys() >= set(_CLIPS):  # after the last one in the constructor
            received = ", ".join(f"{clip}={known[clip]}" for clip in _CLIPS)
            if sum(known[clip] is not None for clip in _CLIPS) > 1:
                raise ValueError(
                    "at most one of clipnorm, clipvalue and global_clipnorm can be set; "
                    f"received {received}"
                )
        if known.get("state_bits") == 8:  # the last of them in the constructor
            low_state.require_8_bits(known["beta_1"], known["beta_2"], known["epsilon"])
            if name == "epsilon" and self.built:
                raise ValueError(
                    "epsilon cannot be assigned after build() with state_bits 8, where first "
                    f"moments are kept relative to norm + epsilon; received {value!r}: make "
                    "another optimizer"
                )
        if name == "gradient_accumulation_steps" and name in vars(self):
            self.progress.calls = self.iterations * (value or 1)
        self._native = None

    # ---- Progress --------------------------------------------------------------------------------

    @property
    def built(self) -> bool:
        """Whether the optimizer knows its variables."""
        return self.progress.state is not None

    @property
    def calls(self) -> int:
        """Number of completed calls of `apply`, micro-batches included."""
        return self.progress.calls

    @property
    def iterations(self) -> int:
        """Number of completed updates; settable, to start `t` and a schedule elsewhere.

        Where a window of accumulation has begun, it goes on. An average of the weights begins with
        the weights as they are now, if there was no update yet, or as they are at `build`.
        """
        return self.calls // (self.gradient_accumulation_steps or 1)

    @iterations.setter
    @exclusive
    def iterations(self, value: int) -> None:
        steps = self.gradient_accumulation_steps or 1
        value = _settings.integer("iterations", value, least=0, most=2**53 // steps - 1)
        if self.progress.state is not None and self.iterations == 0:
            self.progress.state.start_averages()
        self.progress.calls = value * steps + self.calls % steps

    @property
    def learning_rate(self) -> float:
        """The rate of the next step. Settable; a number cannot replace a schedule or a callable."""
        return rates.at(self.progress.learning_rate, self.calls)

    @learning_rate.setter
    def learning_rate(self, value: rates.Rate) -> None:
        self.progress.learning_rate = rates.replacement(self.progress.learning_rate, value)

    @property
    def seed(self) -> int:
        """Of the random numbers of rounding; that of a checkpoint, once one is loaded."""
        return self.progress.seed

    @seed.setter
    def seed(self, value: int) -> None:
        self.progress.seed = value

    # ---- Configuration ---------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON values, in Keras' format.

        `state_bits`, `weight_rounding` and `seed`, which Keras does not know, are there only if
        they are not the defaults.
        """
        settings = {key: getattr(self, key) for key in self.checks}
        for key, default in low_state.DEFAULTS.items():
            if settings[key] == default:
                del settings[key]
        rate = rates.to_config(self.progress.learning_rate)
        return {"name": self.name, "learning_rate": rate, **settings}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> "Self":
        """Make an optimizer from `get_config` of this class or of ``keras.optimizers.Adamax``.

        Parameters
        ----------
        config : mapping
            Stays as it is. What Keras 2 wrote beside the settings must be without effect.
        custom_objects : mapping of str to class, optional
            Schedules of one's own by name.
        """
        arguments = _settings.without_leftovers(config, _LEFTOVERS)
        if "learning_rate" in arguments:
            rate = rates.from_config(arguments["learning_rate"], custom_objects)
            arguments["learning_rate"] = rate
        return cls(**arguments)
