"""The Adamax optimizer as a fused, bit-reproducible native step on any memory."""

from adamax_ext import schedules
from adamax_ext._core import __version__
from adamax_ext.convert import convert_state
from adamax_ext.functional import (
    active_isa,
    available_isas,
    build_info,
    get_num_threads,
    global_norm,
    set_num_threads,
    update,
)
from adamax_ext.loss_scale import LossScaleOptimizer
from adamax_ext.optimizer import Adamax

__all__ = [
    "Adamax",
    "LossScaleOptimizer",
    "__version__",
    "active_isa",
    "available_isas",
    "build_info",
    "convert_state",
    "get_num_threads",
    "global_norm",
    "schedules",
    "set_num_threads",
    "update",
]
