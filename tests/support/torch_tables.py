"""torch's own tables for Adamax: configurations, schedulers and wrong arguments."""

import copy

import pytest

from support.torch_runs import Adamax, AdamaxW, parameter, torch

# isort: split
from torch.testing._internal.common_optimizers import optim_db

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.Adamax)
CONFIGS = INFO.optim_inputs_func("cpu", torch.float32)
# Lists of functions that make a scheduler of an optimizer, which are used together.
SCHEDULERS = INFO.scheduler_inputs
NEW_FLAGS = INFO.not_og_supported_flags

every_config = pytest.mark.parametrize(
    ("kind", "config"),
    [
        pytest.param(kind, config.kwargs, id=f"{kind.__name__}, {config.desc}")
        for kind in (Adamax, AdamaxW)
        for config in CONFIGS
    ],
)


def pair():
    """Two parameters."""
    return [parameter(2, 3, seed=1), parameter(2, seed=2)]


def fresh(config):
    """A configuration that may be changed: a rate may be a tensor."""
    return copy.deepcopy(config)


def wrong_arguments():
    errors = INFO.optim_error_inputs_func("cpu", torch.float32)
    return [pytest.param(error, id=error.optimizer_error_input.desc) for error in errors]
