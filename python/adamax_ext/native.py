"""The settings of an optimizer as native objects, made anew after one is assigned."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from adamax_ext import _core

if TYPE_CHECKING:
    from adamax_ext.configuration import Configured

# Rate, loss scale, whether the call updates, overwrites, and requires finite gradients, and seed.
OfCall: TypeAlias = tuple[float, float, bool, bool, bool, int]


@dataclass
class Settings:
    """What of an optimizer's configuration a native step depends on."""

    beta_1: float
    beta_2: float
    epsilon: float
    weight_decay: float | None
    clipnorm: float | None  # at most one of the three
    clipvalue: float | None
    global_clipnorm: float | None
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None
    gradient_accumulation_steps: int | None


class Native:
    """One group of the variables with weight decay, perhaps one of the others, and the call."""

    def __init__(self, settings: "Settings | Configured", number_of_groups: int) -> None:
        self.groups = tuple(_core.Group() for _ in range(number_of_groups))
        for group in self.groups:
            group.beta_1, group.beta_2 = settings.beta_1, settings.beta_2
            group.epsilon, group.clipvalue = settings.epsilon, settings.clipvalue
            group.ema_momentum = settings.ema_momentum
        self.groups[0].weight_decay = settings.weight_decay or 0.0
        self.call = _core.Call()
        self.call.clipnorm = settings.clipnorm
        self.call.global_clipnorm = settings.global_clipnorm
        self.micro_batches = settings.gradient_accumulation_steps or 1
        self.call.micro_batches = self.micro_batches
        self.overwrite_every = settings.ema_overwrite_frequency if settings.use_ema else None
        self.now: OfCall | None = None

    def prepare(
        self,
        calls: int,
        rate: Callable[[], float],
        loss_scale: float,
        require_finite: bool = False,
        seed: int = 0,
    ) -> None:
        """Set all for the call that follows `calls` others; `rate` is asked if it is an update."""
        updates_done, position = divmod(calls, self.micro_batches)
        step = updates_done + 1
        is_update = position == self.micro_batches - 1
        every = self.overwrite_every
        overwrites = is_update and every is not None and step % every == 0
        now = rate() if is_update else 0.0, loss_scale, is_update, overwrites, require_finite, seed
        if self.now != now:
            self._set(now)
        for group in self.groups:
            group.step = step

    def _set(self, now: OfCall) -> None:
        """Set what belongs to a call, but seldom changes from one to the next."""
        self.now = None  # until all of it is set
        rate, loss_scale, is_update, overwrites, require_finite, seed = now
        for group in self.groups:
            group.learning_rate, group.seed = rate, seed
        with _core.IeeeMode():  # whatever the caller's floating-point mode is
            self.call.grad_scale = 1.0 / loss_scale
        self.call.accumulate_only = not is_update
        self.call.overwrite = overwrites
        self.call.require_finite = require_finite
        self.now = now
