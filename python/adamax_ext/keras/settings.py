"""The settings of Keras' optimizers, as the native step takes them."""

from typing import Any

from adamax_ext.native import Settings


def settings_of(optimizer: Any) -> Settings:
    """Return a copy of what can be assigned at any time; a clip of 0 is none, as for Keras."""
    clipnorm, global_clipnorm, clipvalue = (
        float(clip) if clip and clip > 0 else None
        for clip in (optimizer.clipnorm, optimizer.global_clipnorm, optimizer.clipvalue)
    )
    if clipnorm is not None:  # the first of them counts, where more were assigned
        global_clipnorm = None
    if clipnorm is not None or global_clipnorm is not None:
        clipvalue = None
    decay = optimizer.weight_decay
    return Settings(
        beta_1=float(optimizer.beta_1),
        beta_2=float(optimizer.beta_2),
        epsilon=float(optimizer.epsilon),
        weight_decay=None if decay is None else float(decay),
        clipnorm=clipnorm,
        clipvalue=clipvalue,
        global_clipnorm=global_clipnorm,
        use_ema=bool(optimizer.use_ema),
        ema_momentum=float(optimizer.ema_momentum),
        ema_overwrite_frequency=optimizer.ema_overwrite_frequency or None,
        gradient_accumulation_steps=optimizer.gradient_accumulation_steps or None,
    )
