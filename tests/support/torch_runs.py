"""Parameters, gradients and training for tests of `adamax_ext.torch`, and how they are compared."""

import copy
import io

import pytest

from support.frameworks import load_torch

torch = load_torch()

from adamax_ext.torch import Adamax, AdamaxW  # noqa: E402 - needs torch

every_class = pytest.mark.parametrize("kind", [Adamax, AdamaxW])

STATE_KEYS = ("step", "exp_avg", "exp_inf")


def random(*shape, dtype=None, seed=0):
    """A tensor that depends on its arguments alone."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parameter(*shape, dtype=None, seed=0):
    return torch.nn.Parameter(random(*shape, dtype=dtype, seed=seed))


def gradients(call, params):
    """Gradients of each call, of one size, in the dtypes of the parameters."""
    return [
        random(*p.shape, dtype=p.dtype, seed=1000 * (call + 1) + i) for i, p in enumerate(params)
    ]


def leaf(tensor):
    """A parameter with the values and strides of `tensor`, gaps included, in memory of its own."""
    spread = tensor.detach()
    whole = spread.as_strided(
        (sum((n - 1) * s for n, s in zip(spread.shape, spread.stride(), strict=True)) + 1,), (1,)
    )
    return torch.nn.Parameter(whole.clone().as_strided(spread.shape, spread.stride()))


def clones(params, dtype=None):
    return [torch.nn.Parameter(param.detach().clone().to(dtype or param.dtype)) for param in params]


def through_a_file(saved, weights_only=True, **options):
    """What comes back from a file, which by default may hold no code."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only, **options)


def feed(params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def train(optimizer, params, calls, after=lambda call: None):
    """Step on the gradients of each call in `calls`."""
    for call in calls:
        feed(params, gradients(call, params))
        optimizer.step()
        after(call)


def loss_of(optimizer, weight, bias, inputs):
    """A closure: a linear model, which is linear in complex numbers too."""

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(inputs) + bias).abs().pow(2).sum()
        loss.backward()
        return loss

    return closure


def plain(tensor):
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def assert_same(actual, expected, label=""):
    """Require the same dtype, shape and values, NaN included."""
    actual, expected = plain(actual), plain(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), label
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{label}: {text}"
    )


def assert_near(actual, expected, tolerance, label="", largest=0.0):
    """Require values that differ at most by `tolerance` times the largest, or `largest`."""
    actual, expected = plain(actual).double(), plain(expected).double()
    assert actual.shape == expected.shape, label
    if expected.numel() == 0:
        return
    error = (actual - expected).abs().max().item()
    largest = max(largest, expected.abs().max().item())
    assert error <= tolerance * largest, f"{label}: {error / largest:.2g} of the largest element"


def states_of(optimizer):
    """The states in the order of the parameters; None for a parameter without one."""
    return [optimizer.state.get(param) for param in params_of(optimizer)]


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_same_training(ours, theirs, label="", tolerance=0.0):
    """Require the same parameters and states of two optimizers.

    The tolerance is relative to the largest element of all parameters, or of all moments of a kind.
    In one parameter alone all terms of a moment may cancel.
    """
    pairs = {"parameter": list(zip(params_of(ours), params_of(theirs), strict=True))}
    for one, other in zip(states_of(ours), states_of(theirs), strict=True):
        assert (one is None) == (other is None), label
        for key in STATE_KEYS if one else ():
            pairs.setdefault(key, []).append((one[key], other[key]))
    for key, tensors in pairs.items():
        largest = max(plain(t).abs().max().item() for _, t in tensors if t.numel() > 0)
        for actual, expected in tensors:
            if tolerance == 0:
                assert_same(actual, expected, f"{key} {label}")
            else:
                assert_near(actual, expected, tolerance, f"{key} {label}", largest)


def require_same_as_torch(run, tolerance=2e-7):
    """`run` makes an optimizer of a class, trains, and returns it; ours is returned."""
    ours, theirs = run(Adamax), run(torch.optim.Adamax)
    assert_same_training(ours, theirs, tolerance=tolerance)
    return ours


class Snapshot:
    """All that a step changes, as it was."""

    def __init__(self, optimizer, others=()):
        self._optimizer = optimizer
        self._tensors = [*params_of(optimizer), *others]
        self._states = {param: dict(state) for param, state in optimizer.state.items()}
        for state in self._states.values():
            self._tensors += [value for value in state.values() if torch.is_tensor(value)]
        self._copies = [copy.deepcopy(tensor.detach()) for tensor in self._tensors]

    def require_unchanged(self):
        now = self._optimizer.state
        assert {param: dict(state) for param, state in now.items()}.keys() == self._states.keys()
        for param, state in self._states.items():
            assert now[param].keys() == state.keys()
            assert all(now[param][key] is value for key, value in state.items())
        for tensor, before in zip(self._tensors, self._copies, strict=True):
            assert_same(tensor, before, "after a step that failed")


def array_of(tensor):
    """A NumPy array with a copy of the numbers; complex ones are pairs."""
    copied = plain(tensor).clone()
    if copied.dtype != torch.bfloat16:
        return copied.numpy()
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    return copied.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
