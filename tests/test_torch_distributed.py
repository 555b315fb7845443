"""Ranks that hold whole parameters: torch's DistributedDataParallel and ZeroRedundancyOptimizer."""

import copy
import os

import pytest
from support.sharded import SETTINGS, OneProcess, Weights, assert_same_bits, bits_of, gradients

torch = pytest.importorskip("torch", reason="needs torch, which cannot be imported")
dist = torch.distributed

from adamax_ext.torch import Adamax, AdamaxW  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

STEPS = 5
DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = [
    {},
    {"gradient_as_bucket_view": True},
    {"find_unused_parameters": True},
    {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    {"static_graph": True},
]
# (step, rank) -> parameters without a gradient; one of both ranks, then.
UNUSED = {(1, 0): {1, 2}, (1, 1): {2}, (3, 0): {0}, (4, 0): {0, 4}, (4, 1): {0}}


def used_gradients(step, rank, dtype, options):
    unused = UNUSED.get((step, rank), ()) if "find_unused_parameters" in options else ()
    return [None if i in unused else g for i, g in enumerate(gradients(step, rank, dtype))]


def data_parallel(options, dtype):
    alone = OneProcess(AdamaxW, dtype, **SETTINGS)
    model = DistributedDataParallel(Weights(dtype), bucket_cap_mb=1e-4, **options)
    optimizer = AdamaxW(model.parameters(), **SETTINGS)
    for step in range(STEPS):
        both = [used_gradients(step, rank, dtype, options) for rank in range(2)]
        optimizer.zero_grad()
        model(both[dist.get_rank()]).backward()
        optimizer.step()
        alone.step(*both)
        alone.require_same(model.module.weights, optimizer)
    if "find_unused_parameters" in options:
        counts = [optimizer.state[weight]["step"].item() for weight in model.module.weights]
        assert counts == [STEPS - 1, STEPS, STEPS - 1, STEPS, STEPS]
    return bits_of(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_data_parallel_ranks_equal_one_process(options, dtype, two_ranks):
    require_equal_ranks(two_ranks(data_parallel, options, dtype))


def require_equal_ranks(bits):
    first, second = bits
    for one, other in zip(first, second, strict=True):
        assert_same_bits(one, other, "ranks")


def train_a_network():
    torch.manual_seed(dist.get_rank())  # data of its own; the weights are those of rank 0
    layers = [torch.nn.Linear(5, 16), torch.nn.GELU(), torch.nn.Linear(16, 1)]
    model = DistributedDataParallel(torch.nn.Sequential(*layers), gradient_as_bucket_view=True)
    optimizer = Adamax(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=60)
    losses = []
    for _ in range(60):
        x = torch.randn(32, 5)
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, bits_of(model)


def test_a_network_trained_on_two_ranks(two_ranks):
    (first, first_bits), (second, second_bits) = two_ranks(train_a_network)
    assert first != second
    for losses in (first, second):
        assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
    require_equal_ranks([first_bits, second_bits])


# ---- ZeroRedundancyOptimizer --------------------------------------------------------------------


def zero_redundancy(as_bucket_view, dtype):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns, as it uses torch.jit

    rank, alone = dist.get_rank(), OneProcess(AdamaxW, dtype, **SETTINGS)
    model = DistributedDataParallel(Weights(dtype), gradient_as_bucket_view=True)

    def make():
        return ZeroRedundancyOptimizer(
            model.parameters(),
            optimizer_class=AdamaxW,
            parameters_as_bucket_view=as_bucket_view,
            **SETTINGS,
        )

    def train(optimizer, steps):
        for step in steps:
            for group in (*optimizer.param_groups, *alone.optimizer.param_groups):
                group["lr"] = 0.05 / (1 + step)
            optimizer.zero_grad()
            model(gradients(step, rank, dtype)).backward()
            optimizer.step()
            alone.step(*(gradients(step, rank, dtype) for rank in range(2)))
            alone.require_same(model.module.weights)

    optimizer = make()
    train(optimizer, range(STEPS))
    assert 0 < len(optimizer.optim.state) < len(alone.optimizer.state)
    optimizer.consolidate_state_dict(to=0)
    saved = [optimizer.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(saved, 0)

    plain = AdamaxW(alone.model.parameters())  # goes on from the state of all ranks
    plain.load_state_dict(copy.deepcopy(saved[0]))
    alone.optimizer = plain
    optimizer = make()  # as does another one on the ranks
    optimizer.load_state_dict(saved[0])
    train(optimizer, range(STEPS, 2 * STEPS))
    for weight, state in optimizer.optim.state.items():
        number = next(i for i, other in enumerate(model.module.weights) if other is weight)
        for key, value in plain.state[alone.model.weights[number]].items():
            assert_same_bits(state[key], value, f"{key} of weight {number}")
    return bits_of(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("as_bucket_view", [False, True])
def test_zero_redundancy_equals_one_process_and_its_state_is_that_of_one(
    as_bucket_view, dtype, two_ranks
):
    require_equal_ranks(two_ranks(zero_redundancy, as_bucket_view, dtype))


# ---- The runner ---------------------------------------------------------------------------------


def raise_on_rank_0():
    if dist.get_rank() == 0:
        raise ValueError("as a test wants it")
    dist.barrier()


def crash_on_rank_1():
    if dist.get_rank() == 1:
        os._exit(3)
    return "rank 0 is fine"


def test_ranks_that_fail_are_told_and_the_others_do_not_wait_for_them(two_ranks):
    with pytest.raises(AssertionError, match=r"^rank 0: Traceback (?s:.*)as a test wants it\n"):
        two_ranks(raise_on_rank_0)
    with pytest.raises(AssertionError, match=r"^rank 1: ended with 3$"):
        two_ranks(crash_on_rank_1)
