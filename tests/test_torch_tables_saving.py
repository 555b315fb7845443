"""torch's own tables for Adamax, run on our classes: state dicts and copies.

Of torch's test_optim.py: state_dict_deterministic, can_load_older_state_dict,
can_load_from_to_named_state_dict, save_load_equality_with_weights_only, load_nontensor_step,
deepcopy_copies_all_public_attrs. See test_torch_tables.py for the others.
"""

import copy
import pickle

import pytest
from support.torch_runs import (
    assert_same_training,
    clones,
    random,
    states_of,
    through_a_file,
    torch,
    train,
)
from support.torch_tables import NEW_FLAGS, every_config, fresh, pair

every_naming = pytest.mark.parametrize(
    ("is_named", "is_other_named"), [(False, False), (False, True), (True, False), (True, True)]
)


def named(params, is_named):
    return [(f"name{i}", param) for i, param in enumerate(params)] if is_named else params


def without_names(state_dict):
    dropped = copy.deepcopy(state_dict)
    for group in dropped["param_groups"]:
        group.pop("param_names", None)
    return dropped


def assert_same_dict(actual, expected):
    torch.testing.assert_close(actual["state"], expected["state"], rtol=0, atol=0)
    assert actual.keys() == expected.keys()
    assert actual["param_groups"] == expected["param_groups"]


@every_config
@every_naming
def test_a_state_dict_continues_elsewhere(kind, config, is_named, is_other_named):
    params = pair()
    ours = kind(named(params, is_named), **fresh(config))
    train(ours, params, range(10))
    others = clones(params)
    theirs = kind(named(others, is_other_named), **fresh(config))
    given = copy.deepcopy(ours.state_dict())
    theirs.load_state_dict(given)
    assert_same_dict(given, ours.state_dict())  # loading changed nothing
    for call in range(10, 20):
        train(ours, params, [call])
        train(theirs, others, [call])
        assert_same_training(ours, theirs, f"after call {call}")
    assert_same_dict(without_names(ours.state_dict()), without_names(theirs.state_dict()))
    # The same parameter has the same number wherever it is.
    theirs.param_groups.extend(theirs.param_groups)
    last = [without_names(one.state_dict())["param_groups"][-1] for one in (ours, theirs)]
    assert last[0] == last[1]


def make_model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))


def train_model(model, optimizer, calls=3):
    for call in range(calls):
        optimizer.zero_grad()
        (model(random(5, 4, seed=call)) ** 3).sum().backward()
        optimizer.step()


@every_config
def test_a_state_dict_of_an_older_torch_loads(kind, config):
    model = make_model()
    optimizer = kind(model.parameters(), **fresh(config))
    train_model(model, optimizer)
    older = copy.deepcopy(optimizer.state_dict())
    for group in older["param_groups"]:
        for flag in (*NEW_FLAGS, "decoupled_weight_decay"):
            del group[flag]
    theirs = torch.optim.Adamax(clones(model.parameters()), **fresh(config))
    optimizer.load_state_dict(copy.deepcopy(older))
    theirs.load_state_dict(copy.deepcopy(older))
    ours, expected = optimizer.param_groups[0], theirs.param_groups[0]
    assert {flag: ours[flag] for flag in NEW_FLAGS} == {flag: expected[flag] for flag in NEW_FLAGS}
    assert ours["decoupled_weight_decay"] == optimizer.defaults["decoupled_weight_decay"]
    train_model(model, optimizer)


@every_config
@every_naming
def test_names_are_kept_where_one_side_has_them(kind, config, is_named, is_other_named):
    model = make_model()

    def optimizer_of(has_names):
        params = model.named_parameters() if has_names else model.parameters()
        return kind(params, **fresh(config))

    first, second = optimizer_of(is_named), optimizer_of(is_other_named)
    train_model(model, first)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train_model(model, second)
    names = [name for name, _ in model.named_parameters()] if is_named or is_other_named else None
    assert second.state_dict()["param_groups"][0].get("param_names") == names


@every_config
@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("weights_only", [False, True])
def test_what_is_saved_is_loaded(kind, config, is_named, weights_only):
    params = pair()
    optimizer = kind(named(params, is_named), **fresh(config))
    train(optimizer, params, range(3))
    loaded = through_a_file(optimizer.state_dict(), weights_only)
    assert_same_dict(loaded, optimizer.state_dict())


@every_config
def test_a_step_count_may_be_a_number(kind, config):
    """As old versions of torch saved it."""
    params, others = pair(), pair()
    ours, theirs = kind(params, **fresh(config)), kind(others, **fresh(config))
    train(ours, params, range(3))
    train(theirs, others, range(3))
    given = copy.deepcopy(ours.state_dict())
    for state in given["state"].values():
        state["step"] = state["step"].item()
    ours.load_state_dict(given)
    assert all(state["step"].dtype == torch.float32 for state in states_of(ours))
    train(ours, params, [3])
    train(theirs, others, [3])
    assert_same_training(ours, theirs)


@every_config
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_has_every_public_attribute_and_trains_on(kind, config, copied):
    params = pair()
    optimizer = kind(params, **fresh(config))
    train(optimizer, params, range(3))
    twin = copied(optimizer)
    assert public(twin) == public(optimizer) == public(torch.optim.Adamax(pair()))
    others = twin.param_groups[0]["params"]
    assert all(one is not other for one, other in zip(params, others, strict=True))
    train(optimizer, params, range(3, 6))
    train(twin, others, range(3, 6))
    assert_same_training(optimizer, twin)


def public(optimizer):
    return {name for name in vars(optimizer) if not name.startswith("_")}
