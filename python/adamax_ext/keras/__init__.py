"""Adamax for Keras: the fused step behind the interface of ``keras.optimizers``."""

try:
    import keras  # noqa: F401
except ImportError as error:
    raise ImportError(
        "adamax_ext.keras needs keras 3, which cannot be imported: pip install keras"
    ) from error

from adamax_ext.keras.optimizer import Adamax

__all__ = ["Adamax"]
