"""A model whose gradients are given, so that every bit is known after an engine has spread them."""

from support.frameworks import load_torch

torch = load_torch()

from torch.distributed.fsdp import fully_shard  # noqa: E402

SHAPES = [(4, 5), (3,), (1, 7), (5, 2, 3), (8,)]  # on two ranks: even, uneven, none on the second
SETTINGS = {"lr": 0.05, "weight_decay": 0.1, "eps": 1e-3}


class Weights(torch.nn.Module):
    """Parameters that have the gradients which `forward` was called with."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape in SHAPES
        )

    def forward(self, grads):
        pairs = zip(self.weights, grads, strict=True)
        return sum((weight * grad).sum() for weight, grad in pairs if grad is not None)


def gradients(step, rank, dtype=torch.float32):
    """Gradients of one rank; their mean over two ranks is rounded once, in any order."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def mean(grads):
    """The mean over ranks, None being zero; None if all are."""
    present = [grad for grad in grads if grad is not None]
    return sum(present) / len(grads) if present else None


class OneProcess:
    """A single process, which averages the gradients of two ranks."""

    def __init__(self, make, dtype=torch.float32, **settings):
        self.model = Weights(dtype)
        self.optimizer = make(self.model.parameters(), **settings)

    def step(self, *grads):
        for weight, *parts in zip(self.model.weights, *grads, strict=True):
            average = mean(parts)
            weight.grad = None if average is None else average.to(weight.dtype)
        self.optimizer.step()

    def require_same(self, weights, optimizer=None):
        """Require the same bits of weights, and of the state that `optimizer` has for them."""
        for i, (weight, ours) in enumerate(zip(weights, self.model.weights, strict=True)):
            assert_same_bits(weight, ours, f"weight {i}")
            if optimizer is not None:
                assert_same_state(optimizer.state[weight], self.optimizer.state[ours], i)


def averages():
    """Return whether `fully_shard` averages gradients over the ranks."""
    model, both = Weights(), [gradients(0, rank) for rank in range(2)]
    fully_shard(model)
    model(both[torch.distributed.get_rank()]).backward()
    return torch.allclose(whole(model.weights[0].grad), mean([grads[0] for grads in both]))


def assert_same_state(state, expected, i):
    assert list(state) == list(expected) or not expected
    for key, value in expected.items():
        assert_same_bits(state[key], value, f"{key} of weight {i}")


def whole(tensor):
    """All of a DTensor; of others, a copy."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def assert_same_bits(actual, expected, label):
    actual, expected = whole(actual), whole(expected)
    assert actual.dtype == expected.dtype, label
    assert actual.shape == expected.shape, label
    patterns = [t.reshape(-1).view(torch.uint8) for t in (actual, expected)]
    assert torch.equal(*patterns), f"{label}: {actual}, not {expected}"


def bits_of(model):
    return [whole(weight) for weight in model.parameters()]
