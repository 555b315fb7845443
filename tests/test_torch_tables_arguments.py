"""torch's own tables for Adamax, run on our classes: wrong arguments, no-ops, what is shown."""

import pytest
from support.torch_runs import Adamax, AdamaxW, assert_same, every_class, parameter, random, torch
from support.torch_tables import every_config, fresh, wrong_arguments


def test_the_arguments_are_those_of_torch():
    ours, theirs = (Adamax([parameter(1)]), torch.optim.Adamax([parameter(1)]))
    added = {"decoupled_weight_decay": False}
    assert ours.defaults == {**theirs.defaults, **added}
    assert AdamaxW([parameter(1)]).defaults == {**theirs.defaults, "decoupled_weight_decay": True}


@every_class
@pytest.mark.parametrize("error", wrong_arguments())
def test_wrong_arguments_have_the_errors_of_torch(kind, error):
    given = error.optimizer_error_input
    params = [parameter(1, 1)] if given.params is None else given.params
    expect = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    assert error.error_on.name == "CONSTRUCTION_ERROR"  # the only kind in the table
    with expect(error.error_type, match=error.error_regex):
        kind(params, **given.kwargs)


MORE_WRONG_ARGUMENTS = [
    {"lr": -1.0},
    {"lr": float("nan")},
    {"lr": torch.tensor(-1.0)},
    {"eps": -1e-8},
    {"betas": (1.0, 0.9)},
    {"betas": (-0.1, 0.9)},
    {"betas": (0.9, -0.1)},
    {"weight_decay": -0.1},
]


@every_class
@pytest.mark.parametrize("config", MORE_WRONG_ARGUMENTS)
def test_wrong_arguments_have_the_words_of_torch(kind, config):
    with pytest.raises(ValueError, match="Invalid") as theirs:
        torch.optim.Adamax([parameter(2)], **config)
    with pytest.raises(ValueError, match="Invalid") as ours:
        kind([parameter(2)], **config)
    assert str(ours.value) == str(theirs.value)


@every_class
@pytest.mark.parametrize("params", [[], [1], {"a": 1}, [{"params": {parameter(1)}}], [[]]])
def test_wrong_parameters_have_the_errors_of_torch(kind, params):
    with pytest.raises((TypeError, ValueError)) as theirs:
        torch.optim.Adamax(params)
    with pytest.raises(type(theirs.value)) as ours:
        kind(params)
    assert str(ours.value) == str(theirs.value)


@every_class
def test_what_cannot_be_done_says_so(kind):
    with pytest.raises(RuntimeError, match=f"{kind.__name__} does not support differentiable=True"):
        kind([parameter(2)], differentiable=True)
    weight = parameter(2)
    weight.grad = random(2)
    optimizer = kind([weight], capturable=True)
    with pytest.raises(AssertionError, match="If capturable=True, params and state_steps must be"):
        optimizer.step()


@every_config
def test_without_gradients_nothing_happens(kind, config):
    params = [random(2, 3) for _ in range(2)]
    before = [p.clone() for p in params]
    optimizer = kind(params, **fresh(config))
    assert optimizer.step(lambda: torch.tensor([1.0])).item() == 1
    for param, expected in zip(params, before, strict=True):
        assert_same(param, expected)
    assert not optimizer.state


@every_config
def test_gradients_of_zero_leave_parameters_alone(kind, config):
    config = {**fresh(config), "weight_decay": 0}
    weight = parameter(5, 1)
    before = weight.detach().clone()
    optimizer = kind([weight], **config)
    weight.grad = torch.zeros(5, 1)
    optimizer.step(lambda: torch.tensor([1.0]))
    assert_same(weight, before)
    assert optimizer.state[weight]["step"] == 1


@every_config
def test_an_optimizer_can_be_printed(kind, config):
    text = repr(kind([parameter(2, 3), parameter(2)], **fresh(config)))
    assert text.startswith(kind.__name__)
    words = repr(torch.optim.Adamax([parameter(2)], **fresh(config))).split("\n")[2:-1]
    assert all(word in text for word in words)


@every_config
def test_no_state_is_empty(kind, config):
    model = torch.nn.Linear(5, 5)
    optimizer = kind(model.parameters(), **fresh(config))
    model(random(2, 5)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2
    assert all(list(state) == ["step", "exp_avg", "exp_inf"] for state in optimizer.state.values())
