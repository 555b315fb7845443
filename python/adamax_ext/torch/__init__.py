"""Adamax for torch: the fused step behind the interface of ``torch.optim``."""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "adamax_ext.torch needs torch 2.5 or newer, which cannot be imported: pip install torch"
    ) from error

from adamax_ext.torch.optimizer import Adamax, AdamaxW

__all__ = ["Adamax", "AdamaxW"]
