"""50 steps on equal gradients: beside torch.optim.Adamax, and bit for bit beside `update`."""

import itertools

import adamax_ext
import numpy as np
import pytest
from support.bits import assert_same_bits
from support.torch_runs import (
    Adamax,
    AdamaxW,
    array_of,
    assert_near,
    assert_same_training,
    every_class,
    feed,
    gradients,
    parameter,
    plain,
    random,
    states_of,
    torch,
)

STEPS = 50
SHAPES = [(7, 13), (13,), (), (0, 3), (3, 4, 5), (1, 1)]
# Relative to the largest element. Errors of a step have either sign: half a unit in the last place
# is 6e-8 and 1.1e-16, and 50 steps add up to few of them.
TOLERANCES = {
    torch.float32: 2e-7,
    torch.complex64: 2e-7,
    torch.float64: 1e-15,
    torch.complex128: 1e-15,
}
OPTIONS = [
    {},
    {"lr": 0.02},
    {"lr": "tensor"},
    {"lr": 0},
    {"betas": (0.6, 0.9)},
    {"betas": [0.0, 0.5]},
    {"eps": 1e-3},
    {"eps": 0.3, "betas": (0.5, 0.7)},
    {"eps": 0},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"foreach": True},
    {"foreach": False},
    {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3, "maximize": True},
    {"lr": "tensor", "betas": (0.7, 0.99), "eps": 0, "weight_decay": 1.5, "foreach": True},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def options_of(options, dtype):
    """With a rate in a tensor as exact as the parameters."""
    if options.get("lr") != "tensor":
        return dict(options)
    is_double = dtype in (torch.float64, torch.complex128)
    return {**options, "lr": torch.tensor(0.02, dtype=torch.float64 if is_double else None)}


def parameters(dtype):
    return [parameter(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@every_option
def test_the_numbers_of_torch(options, dtype):
    options, params, others = options_of(options, dtype), parameters(dtype), parameters(dtype)
    ours, theirs = Adamax(params, **options), torch.optim.Adamax(others, **options)
    for call in range(STEPS):
        grads = gradients(call, params)
        feed(params, grads)
        feed(others, grads)
        ours.step()
        theirs.step()
        assert_same_training(ours, theirs, f"after call {call}", TOLERANCES[dtype])
    for state, expected in zip(states_of(ours), states_of(theirs), strict=True):
        assert {key: (value.dtype, value.stride()) for key, value in state.items()} == {
            key: (value.dtype, value.stride()) for key, value in expected.items()
        }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_option
def test_16_bit_weights_are_the_rounded_numbers_of_torch(options, dtype):
    """Beside torch on float32 copies: of the weights as they are stored before each step."""
    options, params = options_of(options, dtype), parameters(dtype)
    wide = [torch.nn.Parameter(param.detach().float()) for param in params]
    ours, theirs = Adamax(params, **options), torch.optim.Adamax(wide, **options)
    half_unit = torch.finfo(dtype).eps / 2
    for call in range(STEPS):
        # None is zero, which bfloat16 makes probable: without epsilon that is NaN.
        grads = [grad.where(grad != 0, 0.5) for grad in gradients(call, params)]
        feed(params, grads)
        for copy, grad in zip(wide, grads, strict=True):
            copy.grad = grad.float()
        ours.step()
        theirs.step()
        for param, copy in zip(params, wide, strict=True):
            exact, largest = copy.detach(), max(w.abs().max() for w in wide if w.numel() > 0)
            error = (param.detach().float() - exact).abs()
            assert (error <= half_unit * exact.abs() + 2e-7 * largest).all(), f"call {call}"
            copy.data.copy_(param.data)
        assert_same_training(ours, theirs, f"after call {call}", 2e-7)
    assert all(s[key].dtype == torch.float32 for s in states_of(ours) for key in s)


def test_without_gradient_and_epsilon_nothing_is_divided_by_nothing():
    """As torch does."""
    params = [parameter(3), parameter(3)]
    for param, kind in zip(params, (Adamax, torch.optim.Adamax), strict=True):
        optimizer = kind([param], eps=0)
        param.grad = torch.tensor([0.0, 1.0, -1.0])
        optimizer.step()
    assert params[0][0].isnan()
    assert_near(params[0][1:], params[1][1:], 2e-7)
    assert params[1][0].isnan()


DTYPES = [*TOLERANCES, torch.bfloat16, torch.float16]


@every_class
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_option
def test_the_bits_of_update(kind, options, dtype):
    options = options_of(options, dtype)
    params = parameters(dtype)
    optimizer = kind(params, **options)
    weights = [array_of(param) for param in params]
    wide = np.float64 if dtype in (torch.float64, torch.complex128) else np.float32
    moments = [[np.zeros_like(w, wide) for w in weights] for _ in range(2)]
    beta_1, beta_2 = options.get("betas", (0.9, 0.999))
    settings = {
        "learning_rate": float(options.get("lr", 2e-3)),
        "beta_1": beta_1,
        "beta_2": beta_2,
        "epsilon": options.get("eps", 1e-8),
        "weight_decay": options.get("weight_decay", 0.0),
        "grad_scale": -1.0 if options.get("maximize") else 1.0,
        "epsilon_mode": "inside",
        "decay": "decoupled" if kind is AdamaxW else "l2",
    }
    for call in range(STEPS):
        grads = gradients(call, params)
        feed(params, grads)
        optimizer.step()
        for arrays in zip(weights, map(array_of, grads), *moments, strict=True):
            adamax_ext.update(*arrays, step=call + 1, **settings)
    for param, weight, m, u in zip(params, weights, *moments, strict=True):
        assert_same_bits(array_of(param), weight, "weights")
        assert_same_bits(array_of(optimizer.state[param]["exp_avg"]), m, "exp_avg")
        assert_same_bits(array_of(optimizer.state[param]["exp_inf"]), u, "exp_inf")
        assert optimizer.state[param]["step"].item() == STEPS


@pytest.mark.parametrize("size", [1, 5, 1_000, 300_007])
def test_the_bits_of_update_in_any_size(size):
    param = parameter(size)
    optimizer = Adamax([param], weight_decay=0.1)
    weight, m, u = array_of(param), *(np.zeros(size, np.float32) for _ in range(2))
    for call in range(3):
        (param.grad,) = gradients(call, [param])
        optimizer.step()
        settings = {"learning_rate": 2e-3, "epsilon": 1e-8, "weight_decay": 0.1, "decay": "l2"}
        grad = array_of(param.grad)
        adamax_ext.update(weight, grad, m, u, step=call + 1, epsilon_mode="inside", **settings)
    assert_same_bits(array_of(param), weight, "weights")


# Nothing below 2^-102: moments of that size are zero by our contract.
SPECIAL = [float("nan"), float("inf"), -float("inf"), 3e38, 1e-25, -1e-20, 0.0, -0.0, 1.0]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "eps": 0}, {"maximize": True}])
def test_special_values_are_those_of_torch(options):
    pairs = torch.tensor(list(itertools.product(SPECIAL, SPECIAL))).T
    trained = []
    for kind in (Adamax, torch.optim.Adamax):
        param = torch.nn.Parameter(pairs[0].clone())
        optimizer = kind([param], **options)
        for _ in range(3):
            param.grad = pairs[1].clone()
            optimizer.step()
        trained.append((param.detach(), optimizer.state[param]))
    (ours, state), (theirs, expected) = trained
    for actual, wanted in [(ours, theirs)] + [(state[k], expected[k]) for k in state]:
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("count", [2**24 - 2, 2**24, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_that_float32_cannot_raise(count, dtype):
    """They stay what they are, as those of torch do."""
    trained = []
    for kind in (Adamax, torch.optim.Adamax):
        param = parameter(3)
        param.grad = random(3)
        optimizer = kind([param])
        optimizer.step()
        optimizer.state[param]["step"] = torch.tensor(count, dtype=dtype)
        for _ in range(4):
            optimizer.step()
        trained.append(optimizer)
    assert_same_training(*trained, tolerance=2e-7)
    assert plain(states_of(trained[0])[0]["step"]).dtype == dtype
