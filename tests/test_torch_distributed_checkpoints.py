"""torch.distributed.checkpoint: two ranks or one save, one or two load, and training goes on."""

import pytest
from support.sharded import (
    SETTINGS,
    Weights,
    assert_same_bits,
    assert_same_state,
    bits_of,
    gradients,
    mean,
)
from support.sharded_checkpoints import load, save, send_from_rank_0

torch = pytest.importorskip("torch", reason="needs torch, which cannot be imported")
dist = torch.distributed

import torch.distributed.checkpoint as dcp  # noqa: E402
from adamax_ext.torch import Adamax, AdamaxW  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or un"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),  # torch's own calls, to 2.10
]
BEFORE, AFTER = range(3), range(3, 6)  # steps, of the checkpoint
F32, BF16 = torch.float32, torch.bfloat16


def new(make, dtype=F32, seed=0, **settings):
    """A model, sharded over the ranks if there are some, and its optimizer."""
    model = Weights(dtype, seed)
    if dist.is_initialized():
        fully_shard(model)
    return model, make(model.parameters(), **SETTINGS | settings)


def train(model, optimizer, steps, dtype=F32):
    for step in steps:
        both = [gradients(step, rank, dtype) for rank in range(2)]
        optimizer.zero_grad()
        if dist.is_initialized():
            model(both[dist.get_rank()]).backward()
        else:
            model([mean(grads) for grads in zip(*both, strict=True)]).backward()
        optimizer.step()


def train_save_and_go_on(path, make, dtype, settings):
    model, optimizer = new(make, dtype, **settings)
    train(model, optimizer, BEFORE, dtype)
    save(path, model, optimizer)
    train(model, optimizer, AFTER, dtype)
    return bits_of(model)


def load_and_go_on(path, make, dtype, settings):
    model, optimizer = new(make, dtype, seed=1, **settings | {"lr": 0.5 * settings["lr"]})
    load(path, model, optimizer)
    assert {optimizer.state[w]["exp_avg"].dtype for w in model.weights} == {F32}
    train(model, optimizer, AFTER, dtype)
    return bits_of(model)


RUNS = [
    (Adamax, F32, {"lr": 0.05}),
    (AdamaxW, F32, {"lr": torch.tensor(0.05)}),
    (AdamaxW, BF16, {"lr": 0.05}),
]


def require_same(all_bits):
    for bits in all_bits[1:]:
        for i, (one, other) in enumerate(zip(bits, all_bits[0], strict=True)):
            assert_same_bits(one, other, f"weight {i}")


@pytest.mark.parametrize(("make", "dtype", "settings"), RUNS)
def test_a_checkpoint_of_two_ranks_loads_in_two_and_in_one(
    make, dtype, settings, fully_sharding_ranks, tmp_path
):
    run = tmp_path, make, dtype, settings
    bits = fully_sharding_ranks(train_save_and_go_on, *run)
    require_same([*bits, *fully_sharding_ranks(load_and_go_on, *run), load_and_go_on(*run)])


@pytest.mark.parametrize(("make", "dtype", "settings"), RUNS)
def test_a_checkpoint_of_one_process_loads_in_two(
    make, dtype, settings, fully_sharding_ranks, tmp_path
):
    run = tmp_path, make, dtype, settings
    require_same([train_save_and_go_on(*run), *fully_sharding_ranks(load_and_go_on, *run)])


# ---- torch's class ------------------------------------------------------------------------------


def cross(path, makes, options, planner):
    """Save from one class, load in another; both go on."""
    pairs = [new(make, seed=seed) for seed, make in enumerate(makes)]
    train(*pairs[0], BEFORE)
    save(path, *pairs[0], options)
    load(path, *pairs[1], options, planner)
    (model, optimizer), (other_model, other_optimizer) = pairs
    for i, (weight, other) in enumerate(zip(model.weights, other_model.weights, strict=True)):
        assert_same_bits(weight, other, f"weight {i}")
        assert_same_state(other_optimizer.state[other], optimizer.state[weight], i)
    for pair in pairs:
        train(*pair, AFTER)
    for bits, other in zip(bits_of(model), bits_of(other_model), strict=True):
        assert torch.allclose(bits, other, rtol=0, atol=2e-7 * other.abs().max().item())
    return [group.get("decoupled_weight_decay") for group in pairs[1][1].param_groups]


def from_torch(path, flatten):
    # torch's own way to load a checkpoint that lacks a setting: Adamax has one more than torch's.
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    return cross(path, (torch.optim.Adamax, Adamax), options, planner)


def to_torch(path, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    cross(path, (Adamax, torch.optim.Adamax), options, None)


@pytest.mark.parametrize("flatten", [False, True])
def test_checkpoints_cross_to_torch_and_back(flatten, two_ranks, tmp_path):
    assert two_ranks(from_torch, tmp_path / "theirs", flatten) == [[False]] * 2
    two_ranks(to_torch, tmp_path / "ours", flatten)


# ---- Without files ------------------------------------------------------------------------------


def whole_state_on_rank_0(dtype):
    model, optimizer = new(AdamaxW, dtype)
    train(model, optimizer, BEFORE, dtype)
    other_model, other_optimizer = new(AdamaxW, dtype, seed=1, lr=1.0)
    send_from_rank_0(model, optimizer, other_model, other_optimizer)
    for pair in ((model, optimizer), (other_model, other_optimizer)):
        train(*pair, AFTER, dtype)
    require_same([bits_of(model), bits_of(other_model)])
    for i, (weight, other) in enumerate(zip(model.weights, other_model.weights, strict=True)):
        assert_same_state(other_optimizer.state[other], optimizer.state[weight], i)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_whole_state_of_rank_0_is_sent_to_all(dtype, two_ranks):
    two_ranks(whole_state_on_rank_0, dtype)


def asked_for_the_state_before_the_first_step(make, settings):
    """torch then makes a step with zero gradients at rate 0: only a count is seen of it."""
    model, optimizer = new(make, **settings)
    before, rate = bits_of(model), optimizer.param_groups[0]["lr"]
    get_optimizer_state_dict(model, optimizer)
    require_same([before, bits_of(model)])
    assert optimizer.param_groups[0]["lr"] is rate
    for weight in model.weights:
        assert weight.grad is None
        assert optimizer.state[weight]["step"] == 1


@pytest.mark.parametrize("make", [Adamax, AdamaxW])
@pytest.mark.parametrize("settings", [{}, {"lr": torch.tensor(0.05)}, {"maximize": True}], ids=str)
def test_that_torch_makes_state_disturbs_nothing(make, settings, two_ranks):
    two_ranks(asked_for_the_state_before_the_first_step, make, settings)
    asked_for_the_state_before_the_first_step(make, settings)
