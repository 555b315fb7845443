"""Checks of `adamax_ext.torch` on a GPU, real or emulated, beside steps on the host."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import pytest

from support.torch_runs import Adamax, AdamaxW, assert_same, params_of, random, torch

SHAPES = [(7, 13), (5,), (), (0, 3), (300, 11)]
OPTIONS = [
    {},
    {"lr": 0.02, "betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
]


class Gpu(NamedTuple):
    place: Callable  # returns a copy of a tensor on the GPU
    fetch: Callable  # returns its numbers on the host
    capture: Callable[[], AbstractContextManager]  # of a graph; gives what replays it
    warm_up: Callable[[], AbstractContextManager]  # in which steps before a capture are done


def parameters(place=torch.clone, dtype=torch.float32):
    made = [place(random(*shape, seed=i).to(dtype)) for i, shape in enumerate(SHAPES)]
    return [param.requires_grad_() for param in made]


def set_gradients(params, call, place=torch.clone, scale=1.0):
    """Write over the gradients that are there, as a graph needs it."""
    for i, param in enumerate(params):
        grad = place((random(*param.shape, seed=100 + 10 * call + i) * scale).to(param.dtype))
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)


def require_same(gpu, optimizer, reference):
    for param, expected in zip(params_of(optimizer), params_of(reference), strict=True):
        assert_same(gpu.fetch(param), expected, "parameter")
        for key, value in reference.state[expected].items():
            assert_same(gpu.fetch(optimizer.state[param][key]), value, key)


def check_steps(gpu, options, dtype, capturable):
    optimizer = Adamax(parameters(gpu.place, dtype), capturable=capturable, **options)
    reference = Adamax(parameters(dtype=dtype), **options)
    for call in range(20):
        set_gradients(params_of(optimizer), call, gpu.place)
        set_gradients(params_of(reference), call)
        optimizer.step()
        reference.step()
    require_same(gpu, optimizer, reference)
    for state in optimizer.state.values():
        assert state["step"].is_cuda == capturable


def check_graph(gpu, run=lambda step: step()):
    """A captured step, which `run` does, is another one at each replay: with what is there then."""
    rate = gpu.place(torch.tensor(0.01))
    device, host = parameters(gpu.place), parameters()
    groups = [{"params": device[:2]}, {"params": device[2:], "betas": (0.5, 0.9)}]
    optimizer = AdamaxW(groups, lr=rate, weight_decay=0.1, capturable=True)
    twins = [{"params": host[:2]}, {"params": host[2:], "betas": (0.5, 0.9)}]
    reference = AdamaxW(twins, weight_decay=0.1)

    def step_on_host(call):
        set_gradients(host, call)
        for group in reference.param_groups:
            group["lr"] = rate.item()
        reference.step()

    with gpu.warm_up():
        for call in range(3):
            set_gradients(device, call, gpu.place)
            optimizer.step()
            step_on_host(call)
    with gpu.capture() as replay:
        run(optimizer.step)
    require_same(gpu, optimizer, reference)  # nothing ran
    for call in range(3, 12):
        rate.fill_(0.01 * (call % 4 + 1))
        set_gradients(device, call, gpu.place)
        replay()
        step_on_host(call)
    require_same(gpu, optimizer, reference)


def check_capture_refused(gpu):
    """Where the host counts."""
    optimizer, reference = Adamax(parameters(gpu.place)), Adamax(parameters())
    set_gradients(params_of(optimizer), 0, gpu.place)
    set_gradients(params_of(reference), 0)
    optimizer.step()
    reference.step()
    message = r"captured into a CUDA graph.*capturable=True"
    with gpu.capture(), pytest.raises(RuntimeError, match=message):
        optimizer.step()
    require_same(gpu, optimizer, reference)
