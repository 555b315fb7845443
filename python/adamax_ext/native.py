"""The settings of an optimizer as native objects, made anew after one is assigned."""

from typing import TYPE_CHECKING, TypeAlias

from adamax_ext import _core

if TYPE_CHECKING:
    from adamax_ext.configuration import Configured

# Rate, loss scale, whether the call updates, overwrites, and requires finite gradients.
OfCall: TypeAlias = tuple[float, float, bool, bool, bool]


class Native:
    """One group of the variables with weight decay, perhaps one of the others, and the call."""

    def __init__(self, settings: "Configured", number_of_groups: int) -> None:
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

    def set(self, now: OfCall) -> None:
        """Set what belongs to a call, but seldom changes from one to the next."""
        self.now = None  # until all of it is set
        rate, loss_scale, is_update, overwrites, require_finite = now
        for group in self.groups:
            group.learning_rate = rate
        with _core.IeeeMode():  # whatever the caller's floating-point mode is
            self.call.grad_scale = 1.0 / loss_scale
        self.call.accumulate_only = not is_update
        self.call.overwrite = overwrites
        self.call.require_finite = require_finite
        self.now = now
