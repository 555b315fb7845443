"""torch's own tables for Adamax, run on our classes: hooks.

Of torch's test_optim.py: state_dict (pre, post, both), load_state_dict (pre, post, both,
prepended), step (pre, post, all).
"""

import copy

import pytest
from support.torch_runs import (
    assert_same,
    every_class,
    feed,
    gradients,
    loss_of,
    parameter,
    random,
    torch,
    train,
)
from support.torch_tables import every_config, fresh, pair
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

# ---- Hooks of state dicts --------------------------------------------------------------------


def note(optimizer):
    optimizer.state["noted"] = 1


def tell(optimizer, state_dict):
    state_dict["was noted"] = state_dict["state"].pop("noted", 0) == 1
    return state_dict


def set_rate(optimizer, state_dict):
    state_dict["param_groups"][0]["lr"] = 0.002


def replace_rate(optimizer, state_dict):
    changed = copy.deepcopy(state_dict)
    changed["param_groups"][0]["lr"] = 0.003
    return changed


@every_config
def test_hooks_of_state_dict(kind, config):
    optimizer = kind([parameter(2, 3)], **fresh(config))
    first = optimizer.register_state_dict_pre_hook(note)
    assert optimizer.state_dict()["state"]["noted"] == 1
    optimizer.register_state_dict_post_hook(tell)
    told = optimizer.state_dict()
    assert told["was noted"]
    assert "noted" not in told["state"]
    first.remove()
    optimizer.state.clear()
    assert not optimizer.state_dict()["was noted"]


@every_config
@pytest.mark.parametrize(("prepend", "expected"), [(False, 0.003), (True, 0.002)])
def test_hooks_before_loading(kind, config, prepend, expected):
    optimizer = kind([parameter(2, 3)], **fresh(config))
    state_dict = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(set_rate)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(replace_rate, prepend=prepend)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == expected


@every_class
@pytest.mark.parametrize("prepend", [False, True])
def test_hooks_around_loading_see_the_state_as_it_will_be(kind, prepend):
    """Also the one of 16-bit weights, which is put right within the call."""
    params = [parameter(3, dtype=torch.bfloat16)]
    optimizer = kind(params)
    train(optimizer, params, range(3))
    moments = copy.deepcopy(optimizer.state[params[0]])
    seen = []

    def halve(optimizer, state_dict):
        changed = copy.deepcopy(state_dict)
        changed["state"][0]["exp_avg"] /= 2
        return changed

    def look(optimizer):
        seen.append(dict(optimizer.state[params[0]]))

    optimizer.register_load_state_dict_pre_hook(halve, prepend=prepend)
    optimizer.register_load_state_dict_post_hook(look, prepend=prepend)
    optimizer.load_state_dict(optimizer.state_dict())
    for state in (*seen, optimizer.state[params[0]]):
        assert_same(state["exp_avg"], moments["exp_avg"] / 2)
        assert_same(state["exp_inf"], moments["exp_inf"])
    assert len(seen) == 1
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1


@every_class
def test_a_state_dict_that_is_refused_leaves_no_hook(kind):
    params = pair()
    optimizer = kind(params)
    train(optimizer, params, range(2))
    given = kind([parameter(2)]).state_dict()
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(given)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


# ---- Hooks of steps --------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("hook", ["register_step_pre_hook", "register_step_post_hook"])
def test_a_hook_of_steps_runs_until_it_is_removed(kind, config, hook):
    optimizer = kind([parameter(2)], **fresh(config))
    seen = []
    handle = getattr(optimizer, hook)(lambda *given: seen.append(given))
    optimizer.step()
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert seen == [(optimizer, (optimizer,), {})] * 2


@every_class
def test_a_hook_may_change_the_arguments(kind):
    weight, bias, inputs = parameter(3, 2), parameter(3), random(2)
    optimizer = kind([weight, bias])
    closure = loss_of(optimizer, weight, bias, inputs)
    optimizer.register_step_pre_hook(lambda one, given, _: ((one, closure), {}))
    assert optimizer.step().item() > optimizer.step().item() > 0


@every_class
def test_all_hooks_run_in_order(kind):
    params, ran = pair(), []
    ours, theirs = kind(params), torch.optim.SGD(params)
    feed(params, gradients(0, params))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: ran.append("before all")),
        register_optimizer_step_post_hook(lambda *_: ran.append("after all")),
    ]
    for one in (ours, theirs):
        handles.append(one.register_step_pre_hook(lambda *_: ran.append("before")))
        handles.append(one.register_step_post_hook(lambda *_: ran.append("after")))
    try:
        for one in (ours, theirs, ours):
            one.step()
    finally:
        for handle in handles:
            handle.remove()
    ours.step()
    assert ran == ["before all", "before", "after", "after all"] * 3
