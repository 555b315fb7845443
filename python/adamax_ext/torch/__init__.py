"""Adamax for torch: the fused step behind the interface of ``torch.optim``."""

try:
    import torch
except ImportError as error:
    raise ImportError(
        "adamax_ext.torch needs torch 2.6 or newer, which cannot be imported: pip install torch"
    ) from error
# Compared as versions are. 2.6 is the first with named parameters and fully_shard.
if torch.__version__ < "2.6":
    raise ImportError(
        f"adamax_ext.torch needs torch 2.6 or newer; received torch {torch.__version__}"
    )

from adamax_ext.torch.optimizer import Adamax, AdamaxW

__all__ = ["Adamax", "AdamaxW"]
