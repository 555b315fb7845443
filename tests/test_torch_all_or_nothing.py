"""A step that fails changes nothing; one that is done is seen by autograd; nothing else is left."""

import copy
import pickle
import re

import pytest
from support.torch_runs import (
    Adamax,
    Snapshot,
    assert_same_training,
    every_class,
    feed,
    gradients,
    leaf,
    parameter,
    random,
    torch,
    train,
)


def parameters():
    """The first two without gaps, one with; the last one is what a fault is put into."""
    gaps = leaf(torch.stack([random(3, 4)] * 2, dim=-1)[..., 0])
    return [parameter(4, 3), parameter(2, dtype=torch.bfloat16), gaps, parameter(3, 2, seed=1)]


def set_grad(make):
    def fault(optimizer, param):
        param.grad = make()

    return fault


def set_state(key, make):
    def fault(optimizer, param):
        optimizer.state[param][key] = make()

    return fault


def drop_state(key):
    def fault(optimizer, param):
        del optimizer.state[param][key]

    return fault


def set_option(name, value):
    def fault(optimizer, param):
        optimizer.param_groups[-1][name] = value

    return fault


def drop_option(name):
    def fault(optimizer, param):
        del optimizer.param_groups[-1][name]

    return fault


def made_in_inference_mode():
    with torch.inference_mode():
        return torch.stack([torch.zeros(3, 2)] * 2, dim=-1)[..., 0]


SPARSE = r"Adamax\w* does not support sparse gradients"
# What is done to the last parameter and its group, the exception and its words.
OF_GRADIENTS = {
    "sparse": (set_grad(lambda: torch.ones(3, 2).to_sparse()), RuntimeError, SPARSE),
}
OF_SETTINGS = {
    "no rate": (drop_option("lr"), KeyError, "lr"),
    "no epsilon": (drop_option("eps"), KeyError, "eps"),
    "no betas": (drop_option("betas"), KeyError, "betas"),
    "epsilon None": (set_option("eps", None), TypeError, "NoneType"),
    "epsilon nan": (set_option("eps", float("nan")), ValueError, "epsilon must be"),
    "rate nan": (set_option("lr", float("nan")), ValueError, "learning_rate must be"),
    "rate of two": (set_option("lr", torch.ones(2)), (RuntimeError, ValueError), "element"),
    "three betas": (set_option("betas", (0.9, 0.9, 0.9)), ValueError, "too many values"),
    "beta of one": (set_option("betas", (1.0, 0.9)), ValueError, "beta_1 must be in"),
    "decay nan": (set_option("weight_decay", float("nan")), ValueError, "weight_decay must be"),
    "capturable": (set_option("capturable", True), AssertionError, "capturable=True"),
}
OF_STATE = {
    "shape": (set_state("exp_avg", lambda: torch.zeros(2, 3)), RuntimeError, "shape"),
    "size": (set_state("exp_inf", lambda: torch.zeros(5)), RuntimeError, "shape"),
    "expanded": (
        set_state("exp_inf", lambda: torch.zeros(1, 2).expand(3, 2)),
        RuntimeError,
        "single memory location",
    ),
    "inference": (set_state("exp_avg", made_in_inference_mode), RuntimeError, "inference mode"),
    **{
        f"{key} {dtype}": (
            set_state(key, lambda dtype=dtype: torch.zeros(3, 2, dtype=dtype)),
            TypeError,
            f"{key}.* has dtype {str(dtype).removeprefix('torch.')}",
        )
        for key in ("exp_avg", "exp_inf")
        for dtype in (torch.int32, torch.bool, torch.complex64)
    },
    "no tensor": (set_state("exp_avg", lambda: None), RuntimeError, "must be a tensor"),
    "lost": (drop_state("exp_inf"), KeyError, "exp_inf"),
    "count lost": (drop_state("step"), KeyError, "step"),
    "count of two": (set_state("step", lambda: torch.ones(2)), ValueError, "has 2 elements"),
    "count as a number": (set_state("step", lambda: 3), RuntimeError, "must be a tensor"),
    "count negative": (set_state("step", lambda: torch.tensor(-1.0)), ValueError, "whole number"),
    "count nan": (set_state("step", lambda: torch.tensor(float("nan"))), ValueError, "whole"),
    "count of a half": (set_state("step", lambda: torch.tensor(1.5)), ValueError, "whole number"),
}
FAULTS = OF_GRADIENTS | OF_SETTINGS


@every_class
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.parametrize("is_last_alone", [False, True])
def test_a_fault_of_the_last_parameter_changes_nothing(kind, fault, calls, is_last_alone):
    """In the first call, when no parameter has a state yet, and later."""
    require_nothing_changed(kind, *FAULTS[fault], calls, is_last_alone)


@every_class
@pytest.mark.parametrize("fault", OF_STATE)
def test_a_fault_of_the_last_state_changes_nothing(kind, fault):
    require_nothing_changed(kind, *OF_STATE[fault], calls=3, is_last_alone=False)


def require_nothing_changed(kind, fault, error, message, calls, is_last_alone):
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = kind(groups)
    if is_last_alone:  # the others have a state already, or none yet
        train(optimizer, params[:3], range(calls))
    else:
        train(optimizer, params, range(calls))
    grads = gradients(calls, params)
    feed(params, grads)
    healthy = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.param_groups[-1])
    fault(optimizer, params[-1])
    before = Snapshot(optimizer, grads)
    for _ in range(2):  # nothing is remembered wrongly either
        with pytest.raises(error, match=message):
            optimizer.step()
        before.require_unchanged()
    optimizer.load_state_dict(healthy[0])
    feed(params, grads)
    twins = parameters()
    twin = kind([{"params": twins[:2]}, {"params": twins[2:]}])
    train(twin, twins[:3] if is_last_alone else twins, range(calls))
    feed(twins, gradients(calls, twins))
    twin.step()
    optimizer.step()
    assert_same_training(optimizer, twin)


@every_class
@pytest.mark.parametrize("others", [0, 3])
def test_an_expanded_parameter_is_refused_as_by_torch(kind, others):
    expanded = random(1, 2).expand(3, 2).requires_grad_()
    params = [*parameters()[:others], expanded]
    words = "unsupported operation: more than one element of .* refers to a single memory location"
    for one in (torch.optim.Adamax, kind):
        optimizer = one(params)
        feed(params, gradients(0, params))
        before = Snapshot(optimizer)
        with pytest.raises(RuntimeError, match=words):
            optimizer.step()
        if one is kind:
            before.require_unchanged()


@every_class
def test_a_conjugated_parameter_is_refused_as_by_torch(kind):
    params = [parameter(2), random(3, dtype=torch.complex64).conj().requires_grad_()]
    for one in (torch.optim.Adamax, kind):
        optimizer = one(params)
        feed(params, gradients(0, params))
        before = Snapshot(optimizer)
        with pytest.raises(RuntimeError, match="view_as_real doesn't work on unresolved"):
            optimizer.step()
        if one is kind:
            before.require_unchanged()


@every_class
def test_a_fault_behind_parameters_that_share_memory(kind):
    """They are stepped in turn, and what was done is undone."""
    memory = random(6, 6)
    tied = [torch.nn.Parameter(memory[:, ::2]), torch.nn.Parameter(memory[:, 1:4])]
    params = [*tied, parameter(3, 2)]
    optimizer = kind(params)
    train(optimizer, params, range(2))
    feed(params, gradients(2, params))
    optimizer.state[params[-1]]["step"] = torch.tensor(-1.0)
    before = Snapshot(optimizer, [memory])
    with pytest.raises(ValueError, match="whole number"):
        optimizer.step()
    before.require_unchanged()


# ---- What autograd sees ----------------------------------------------------------------------


KINDS_OF_PARAMETERS = {
    "plain": lambda: parameter(3),
    "gaps": lambda: leaf(torch.stack([random(3, 4)] * 2, dim=-1)[..., 0]),
    "complex": lambda: parameter(3, dtype=torch.complex64),
    "bfloat16": lambda: parameter(3, dtype=torch.bfloat16),
    "0-d": parameter,
}


@pytest.mark.parametrize("name", KINDS_OF_PARAMETERS)
@pytest.mark.parametrize("calls", [0, 2])
def test_a_backward_through_weights_of_before_the_step_raises(name, calls):
    for kind in (torch.optim.Adamax, Adamax):
        weight = KINDS_OF_PARAMETERS[name]()
        optimizer = kind([weight])
        train(optimizer, [weight], range(calls))
        weight.grad = gradients(9, [weight])[0]
        loss = (weight**3).abs().sum()
        version = weight._version
        optimizer.step()
        assert weight._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_parameters_without_gradients_keep_their_versions():
    params = parameters()
    optimizer = Adamax(params)
    feed(params, [*gradients(0, params)[:3], None])
    before = [param._version for param in params]
    optimizer.step()
    after = [param._version for param in params]
    assert [a > b for a, b in zip(after, before, strict=True)] == [True, True, True, False]


def test_a_step_that_fails_keeps_versions():
    params = parameters()
    optimizer = Adamax(params)
    feed(params, [*gradients(0, params)[:3], torch.ones(3, 2).to_sparse()])
    before = [param._version for param in params]
    with pytest.raises(RuntimeError, match=re.compile(SPARSE)):
        optimizer.step()
    assert [param._version for param in params] == before


@every_class
def test_no_attribute_is_lost_in_a_copy(kind):
    params = parameters()
    optimizer = kind(params)
    train(optimizer, params, range(3))
    optimizer.step()
    kept = {name for name in vars(optimizer) if not name.startswith("_")}
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert {name for name in vars(twin) if not name.startswith("_")} == kept
        own = vars(torch.optim.Adamax(parameters())).keys()
        assert vars(optimizer).keys() - own <= {"_stepping"}  # which is made anew
        others = [param for group in twin.param_groups for param in group["params"]]
        feed(others, [param.grad for param in params])
        twin.step()
        assert len(twin.state) == len(params)
