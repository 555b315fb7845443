"""Checkpoints between our classes and torch.optim.Adamax, and training that goes on from them."""

import copy

import pytest
from support.torch_runs import (
    Adamax,
    AdamaxW,
    assert_same,
    assert_same_training,
    clones,
    every_class,
    feed,
    gradients,
    parameter,
    states_of,
    through_a_file,
    torch,
    train,
)

SHAPES = [(5, 7), (), (3, 2, 4), (0,)]
DTYPES = {torch.float32: 2e-7, torch.float64: 1e-15, torch.complex64: 2e-7, torch.complex128: 1e-15}
SETTINGS = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3, "maximize": True}
both_ways = pytest.mark.parametrize(
    ("kind", "other"), [(Adamax, torch.optim.Adamax), (torch.optim.Adamax, Adamax)]
)


def parameters(dtype):
    return [parameter(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]


@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rate", [0.03, torch.tensor(0.03, dtype=torch.float64)])
def test_training_goes_on_in_the_other_class(kind, other, dtype, rate):
    params = parameters(dtype)
    first = kind(params, **{**SETTINGS, "lr": rate})
    train(first, params, range(10))
    others = clones(params)
    second = other(others)  # all settings are those of the checkpoint
    second.load_state_dict(through_a_file(first.state_dict()))
    for call in range(10, 40):
        train(first, params, [call])
        train(second, others, [call])
        assert_same_training(second, first, f"after call {call}", DTYPES[dtype])
    assert second.param_groups[0]["lr"] == rate


@both_ways
def test_every_group_finds_its_own(kind, other):
    params = parameters(torch.float32)
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "betas": (0.5, 0.6)}]
    first = kind(groups, weight_decay=0.01)
    params[1].requires_grad_(False)  # has no state
    train_but(first, params, [1], range(5))
    others = clones(params)
    second = other([{"params": others[:1]}, {"params": others[1:]}])
    second.load_state_dict(through_a_file(first.state_dict()))
    assert len(second.state) == len(params) - 1
    for optimizer, tensors in ((first, params), (second, others)):
        train_but(optimizer, tensors, [], range(5, 10))
    assert_same_training(second, first, tolerance=2e-7)


def train_but(optimizer, params, without, calls):
    for call in calls:
        grads = gradients(call, params)
        feed(params, [None if i in without else grad for i, grad in enumerate(grads)])
        optimizer.step()


@every_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_state_of_16_bit_weights_survives(kind, dtype):
    params = parameters(dtype)
    first = kind(params, **SETTINGS)
    train(first, params, range(5))
    others = clones(params)
    second = kind(others)
    second.load_state_dict(through_a_file(first.state_dict()))
    for state, expected in zip(states_of(second), states_of(first), strict=True):
        for key, value in expected.items():
            assert value.dtype == torch.float32
            assert_same(state[key], value, key)
    train(first, params, range(5, 10))
    train(second, others, range(5, 10))
    assert_same_training(second, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_state_of_torch_is_widened_and_back(dtype):
    params = parameters(dtype)
    theirs = torch.optim.Adamax(params, **SETTINGS)
    train(theirs, params, range(5))
    others = clones(params)
    ours = Adamax(others)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    for state, expected in zip(states_of(ours), states_of(theirs), strict=True):
        for key in ("exp_avg", "exp_inf"):
            assert_same(state[key], expected[key].float(), key)
    train(ours, others, range(5, 10))
    wide = copy.deepcopy(ours.state_dict())
    theirs.load_state_dict(through_a_file(wide))
    for state, expected in zip(states_of(theirs), states_of(ours), strict=True):
        for key in ("exp_avg", "exp_inf"):
            assert_same(state[key], expected[key].to(dtype), key)
        assert state["step"] == 10
    train(theirs, params, [10])


@every_class
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
    ],
)
def test_state_gets_the_dtype_that_goes_with_the_parameter(kind, before, after):
    params = parameters(before)
    first = kind(params, **SETTINGS)
    train(first, params, range(5))
    others = clones(params, after)
    second = kind(others)
    second.load_state_dict(through_a_file(first.state_dict()))
    kept = torch.float64 if after == torch.float64 else torch.float32
    for state, expected in zip(states_of(second), states_of(first), strict=True):
        assert_same(state["step"], expected["step"])
        for key in ("exp_avg", "exp_inf"):
            assert_same(state[key], expected[key].to(kept), key)
    train(second, others, range(5, 8))


def conv(memory_format):
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(), torch.nn.Conv2d(4, 2, 3)
    return torch.nn.Sequential(*layers).to(memory_format=memory_format)


ORDERS = [torch.contiguous_format, torch.channels_last]


@every_class
@pytest.mark.parametrize("before", ORDERS)
@pytest.mark.parametrize("after", ORDERS)
def test_a_model_in_another_memory_order(kind, before, after):
    """State follows the parameter, so that no step has to gather it."""
    first, second = conv(before), conv(after)
    params, others = list(first.parameters()), list(second.parameters())
    ours, theirs = kind(params, **SETTINGS), kind(others)
    train(ours, params, range(5))
    second.load_state_dict(through_a_file(first.state_dict()))
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    for param, state in theirs.state.items():
        assert state["exp_avg"].stride() == state["exp_inf"].stride() == param.stride()
    train(ours, params, range(5, 10))
    train(theirs, others, range(5, 10))
    assert_same_training(theirs, ours)


@every_class
def test_what_a_checkpoint_has_besides_is_kept(kind):
    params = parameters(torch.float32)
    optimizer = kind(params)
    train(optimizer, params, range(2))
    given = copy.deepcopy(optimizer.state_dict())
    given["state"]["of the user"] = {"epoch": 3}
    given["state"][0]["note"] = torch.ones(2)
    given["param_groups"][0]["tag"] = "body"
    others = clones(params)
    second = kind(others)
    second.load_state_dict(given)
    train(optimizer, params, [2])
    train(second, others, [2])
    assert second.state["of the user"] == {"epoch": 3}
    assert second.param_groups[0]["tag"] == "body"
    assert_same(second.state[others[0]]["note"], torch.ones(2))
    assert_same_training(second, optimizer)


def test_the_decay_of_a_checkpoint_of_torch_is_that_of_the_class():
    params = parameters(torch.float32)
    theirs = torch.optim.Adamax(params, weight_decay=0.1)
    train(theirs, params, range(2))
    for kind in (Adamax, AdamaxW):
        ours = kind(clones(params))
        ours.load_state_dict(theirs.state_dict())
        (group,) = ours.param_groups
        assert group["weight_decay"] == 0.1
        assert group["decoupled_weight_decay"] == (kind is AdamaxW)


@every_class
def test_an_empty_checkpoint_starts_anew(kind):
    params, others = parameters(torch.float32), parameters(torch.float32)
    first, second = kind(params), kind(others)
    train(first, clones(params), range(3))
    first.load_state_dict(through_a_file(kind(others).state_dict()))
    assert not first.state
    train(first, params, range(3))
    train(second, others, range(3))
    assert_same_training(first, second)


@every_class
def test_loading_again_repeats_the_training(kind):
    """So no step writes into what was loaded from a copy."""
    params = parameters(torch.bfloat16)
    optimizer = kind(params)
    train(optimizer, params, range(3))
    given, weights = copy.deepcopy(optimizer.state_dict()), clones(params)
    results = []
    for _ in range(2):
        for param, weight in zip(params, weights, strict=True):
            param.data.copy_(weight)
        optimizer.load_state_dict(copy.deepcopy(given))
        train(optimizer, params, range(3, 6))
        results.append(clones(params))
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


def test_what_is_no_tensor_is_left_to_the_step():
    params = parameters(torch.float32)
    optimizer = Adamax(params)
    train(optimizer, params, range(2))
    given = copy.deepcopy(optimizer.state_dict())
    given["state"][0]["exp_avg"] = None
    optimizer.load_state_dict(given)
    feed(params, gradients(2, params))
    with pytest.raises(RuntimeError, match="exp_avg of a state must be a tensor; received None"):
        optimizer.step()
