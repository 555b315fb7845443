"""A model and its optimizer through torch.distributed.checkpoint: saved, loaded, sent."""

import copy

from support.frameworks import load_torch

torch = load_torch()

import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

dist = torch.distributed


def save(path, model, optimizer, options=None):
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path, no_dist=is_alone())


def load(path, model, optimizer, options=None, planner=None):
    weights, state = get_state_dict(model, optimizer, options=options)
    state_dict = {"model": weights, "optimizer": state}
    dcp.load(state_dict, checkpoint_id=path, planner=planner, no_dist=is_alone())
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state_dict["model"],
        optim_state_dict=state_dict["optimizer"],
        options=options,
    )


def is_alone():
    return not dist.is_initialized()


def send_from_rank_0(model, optimizer, other_model, other_optimizer):
    """Give others the whole state that only rank 0 has gathered."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = copy.deepcopy(get_state_dict(model, optimizer, options=whole))
    if dist.get_rank() == 1:
        assert not state
    from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other_model, weights, options=from_rank_0)
    set_optimizer_state_dict(other_model, other_optimizer, state, options=from_rank_0)
