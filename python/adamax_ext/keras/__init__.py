"""Adamax for Keras: the fused step behind the interface of ``keras.optimizers``."""

try:
    import keras
except ImportError as error:
    raise ImportError(
        "adamax_ext.keras needs keras 3.15 or newer, which cannot be imported: pip install keras"
    ) from error
# It overrides what Keras keeps to itself: older versions were not tried, and some train wrongly.
if tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15):
    raise ImportError(
        f"adamax_ext.keras needs keras 3.15 or newer; received keras {keras.__version__}"
    )

from adamax_ext.keras.optimizer import Adamax

__all__ = ["Adamax"]
