"""What users of torch do with an optimizer, each beside torch.optim.Adamax."""

import copy

import pytest
from support.torch_runs import (
    Adamax,
    assert_near,
    assert_same,
    every_class,
    feed,
    gradients,
    loss_of,
    parameter,
    params_of,
    random,
    require_same_as_torch,
    torch,
    train,
)

TOLERANCE = 2e-7
SHAPES = [(4, 3), (4,), (2, 2)]


def parameters(dtype=None):
    return [parameter(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]


def test_groups_with_settings_of_their_own():
    def run(kind):
        params = parameters()
        groups = [
            {"params": params[0], "lr": 0.1, "betas": (0.5, 0.7), "weight_decay": 0.2},
            {"params": params[1:2], "eps": 1e-2, "maximize": True},
            {"params": iter(params[2:])},
        ]
        optimizer = kind(groups, lr=0.02, weight_decay=0.05)
        train(optimizer, params, range(20))
        return optimizer

    require_same_as_torch(run)


SETTINGS = [
    ("lr", 0.3),
    ("lr", torch.tensor(0.3)),
    ("lr", torch.tensor([0.3])),
    ("lr", torch.tensor(0.3, requires_grad=True)),
    ("lr", -0.01),
    ("betas", (0.1, 0.2)),
    ("betas", [0.1, 0.2]),
    ("eps", 0.1),
    ("weight_decay", 0.4),
    ("maximize", True),
]


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_a_setting_that_changes_in_mid_training(name, value):
    def run(kind):
        params = parameters()
        optimizer = kind([{"params": params[:1]}, {"params": params[1:]}])
        train(optimizer, params, range(3))
        before = optimizer.param_groups[1][name]
        optimizer.param_groups[1][name] = value
        train(optimizer, params, range(3, 6))
        optimizer.param_groups[1][name] = before
        train(optimizer, params, range(6, 9))
        return optimizer

    require_same_as_torch(run)


def test_a_rate_in_a_tensor_that_is_written():
    def run(kind):
        params, rate = parameters(), torch.tensor(0.1)
        optimizer = kind(params, lr=rate)
        train(optimizer, params, range(9), after=lambda _: rate.mul_(0.7))
        return optimizer

    require_same_as_torch(run)


@every_class
def test_kinds_of_decay_in_groups(kind):
    """What no class of torch has: each group as the class of that kind."""
    params, others = parameters(), parameters()
    groups = [
        {"params": [params[0]], "decoupled_weight_decay": True},
        {"params": [params[1]], "decoupled_weight_decay": False},
    ]
    mixed = kind(groups, weight_decay=0.3)
    train(mixed, params[:2], range(5))
    for i, is_decoupled in enumerate((True, False)):
        options = {"weight_decay": 0.3, "decoupled_weight_decay": is_decoupled}
        alone = kind([others[i]], **options)
        for call in range(5):
            others[i].grad = gradients(call, others[:2])[i]
            alone.step()
        assert_same(params[i], others[i])


def test_a_group_that_is_added_in_mid_training():
    def run(kind):
        params = parameters()
        optimizer = kind(params[:1])
        train(optimizer, params[:1], range(3))
        optimizer.add_param_group({"params": params[1:], "lr": 0.1})
        train(optimizer, params, range(3, 8))
        del optimizer.param_groups[0]
        train(optimizer, params[1:], range(8, 11))
        return optimizer

    assert len(require_same_as_torch(run).param_groups) == 1


def test_named_parameters():
    def run(kind):
        model = torch.nn.Linear(3, 2)
        feed(model.parameters(), [random(2, 3), random(2)])
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(1.0)
        optimizer = kind(model.named_parameters())
        optimizer.step()
        optimizer.add_param_group({"params": [("extra", parameter(2))]})
        names = [group["param_names"] for group in optimizer.param_groups]
        assert names == [["weight", "bias"], ["extra"]]
        return optimizer

    require_same_as_torch(run)


def test_closures():
    def run(kind):
        weight, bias, inputs = parameter(4, 3), parameter(4, seed=1), random(3)
        optimizer = kind([weight, bias], lr=0.05)
        loss, group = loss_of(optimizer, weight, bias, inputs), optimizer.param_groups[0]
        closure = lambda: group.update(lr=group["lr"] * 0.9) or loss()  # noqa: E731 - for this step

        losses = [optimizer.step(closure).item() for _ in range(20)]
        with torch.no_grad():  # the gradients of a closure are made in any mode
            losses.append(optimizer.step(closure=closure).item())
        assert losses == sorted(losses, reverse=True)
        assert optimizer.step() is None
        return optimizer

    require_same_as_torch(run, 2e-5)


@every_class
def test_a_closure_that_fails_changes_nothing(kind):
    params = parameters()
    optimizer = kind(params)
    train(optimizer, params, range(2))
    before = copy.deepcopy(optimizer.state_dict()["state"])

    def closure():
        raise ArithmeticError("of the closure")

    with pytest.raises(ArithmeticError, match="of the closure"):
        optimizer.step(closure)
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("foreach", [None, True])
def test_zero_grad(set_to_none, foreach):
    def run(kind):
        params = parameters()
        optimizer = kind(params, foreach=foreach)
        train(optimizer, params, range(3))
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step()
        return optimizer

    optimizer = require_same_as_torch(run)
    steps = {state["step"].item() for state in optimizer.state.values()}
    assert steps == {3.0 if set_to_none else 4.0}


@pytest.mark.parametrize("absent", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 1, 2}])
def test_parameters_without_gradients_in_some_calls(absent):
    """Each counts its own steps; those that come late have their state behind the others."""

    def run(kind):
        params = parameters()
        optimizer = kind(params)
        for call in range(12):
            grads = gradients(call, params)
            without = absent if call % 3 != 1 else {call % 2}
            feed(params, [None if i in without else g for i, g in enumerate(grads)])
            optimizer.step()
        return optimizer

    require_same_as_torch(run)


def test_frozen_parameters():
    def run(kind):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        optimizer = kind(model.parameters())
        for call in range(12):
            model[0].requires_grad_(call >= 4)
            optimizer.zero_grad()
            model(random(5, 3, seed=call)).pow(2).sum().backward()
            optimizer.step()
        return optimizer

    optimizer = require_same_as_torch(run, 2e-5)
    counts = [optimizer.state[p]["step"].item() for p in params_of(optimizer)]
    assert counts == [8, 8, 12, 12]


def test_parameters_that_are_tied_by_name():
    def run(kind):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(6, 3), torch.nn.Linear(3, 6, bias=False))
        model[1].weight = model[0].weight
        optimizer = kind(model.parameters())
        for call in range(10):
            optimizer.zero_grad()
            words = torch.arange(6).roll(call)
            torch.nn.functional.cross_entropy(model(words), words).backward()
            optimizer.step()
        return optimizer

    assert len(params_of(require_same_as_torch(run, 2e-5))) == 1


def test_a_parameter_twice_in_a_group():
    """torch warns, and steps it twice."""

    def run(kind):
        param, other = parameter(4, 3), parameter(2)
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = kind([param, other, param])
        for call in range(6):
            feed([param, other], gradients(call, [param, other]))
            optimizer.step()
        assert optimizer.state[param]["step"] == 12
        return optimizer

    require_same_as_torch(run)


def test_parameters_that_get_new_memory():
    """`.data`, `module.to` and `half()` replace it; state follows no longer in dtype."""

    def run(kind):
        params = parameters()
        optimizer = kind(params)
        train(optimizer, params, range(3))
        for param in params:
            param.data = param.data.clone() + 1
        train(optimizer, params, range(3, 6))
        for param in params:
            param.data = param.data.reshape(-1)[:2].clone()
            for key in ("exp_avg", "exp_inf"):
                optimizer.state[param][key] = optimizer.state[param][key].reshape(-1)[:2].clone()
        train(optimizer, params, range(6, 9))
        return optimizer

    require_same_as_torch(run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_changes_its_dtype(dtype):
    """Its float32 state stays; torch's class, whose state does not fit then, raises."""
    params = parameters()
    optimizer = Adamax(params)
    train(optimizer, params, range(3))
    for param in params:
        param.data = param.data.to(dtype)
        param.grad = None
    train(optimizer, params, range(3, 6))
    wide = parameters(torch.float32 if dtype == torch.bfloat16 else torch.float64)
    reference = Adamax(wide)
    train(reference, wide, range(3))
    for param in wide:
        param.data = param.data.to(dtype).to(param.dtype)
    for call in range(3, 6):
        feed(
            wide, [grad.to(w.dtype) for grad, w in zip(gradients(call, params), wide, strict=True)]
        )
        reference.step()
    for param, other in zip(params, wide, strict=True):
        assert param.dtype == dtype
        assert_near(param, other, 1e-2 if dtype == torch.bfloat16 else 2e-7)
        assert optimizer.state[param]["exp_avg"].dtype == torch.float32
        assert optimizer.state[param]["step"] == 6
