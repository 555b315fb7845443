"""The settings of Keras' optimizers, as the native step takes them."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Settings:
    """A copy of what can be assigned to an optimizer at any time, which tells when it was."""

    beta_1: float
    beta_2: float
    epsilon: float
    weight_decay: float | None
    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None
    gradient_accumulation_steps: int | None

    @classmethod
    def of(cls, optimizer: Any) -> "Settings":
        """Return those of an optimizer: what is 0 or below is off, as for Keras."""
        clipnorm, global_clipnorm, clipvalue = (
            float(clip) if clip and clip > 0 else None
            for clip in (optimizer.clipnorm, optimizer.global_clipnorm, optimizer.clipvalue)
        )
        if clipnorm is not None:  # the first of them counts, where more were assigned
            global_clipnorm = None
        if clipnorm is not None or global_clipnorm is not None:
            clipvalue = None
        decay = optimizer.weight_decay
        return cls(
            float(optimizer.beta_1),
            float(optimizer.beta_2),
            float(optimizer.epsilon),
            None if decay is None else float(decay),
            clipnorm,
            clipvalue,
            global_clipnorm,
            bool(optimizer.use_ema),
            float(optimizer.ema_momentum),
            optimizer.ema_overwrite_frequency or None,
            optimizer.gradient_accumulation_steps or None,
        )
