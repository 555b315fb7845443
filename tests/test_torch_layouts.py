"""Parameters, gradients and state of every shape, memory order and mark, beside torch's class."""

import pytest
from support.torch_runs import (
    Adamax,
    assert_same,
    assert_same_training,
    feed,
    gradients,
    leaf,
    parameter,
    random,
    require_same_as_torch,
    torch,
    train,
)

TOLERANCE = 2e-7


def with_gaps(tensor):
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def with_offset(tensor):
    whole = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)
    return whole[3:].view(tensor.shape).copy_(tensor)


LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.mT.contiguous().mT,
    "permuted": lambda t: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "with gaps": with_gaps,
    "transposed with gaps": lambda t: with_gaps(t.mT).mT,
    "with an offset": with_offset,
    "every other row": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
}
SHAPE = (2, 4, 3, 5)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_grad_layout = pytest.mark.parametrize("grad_layout", LAYOUTS)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16], ids=str
)


@every_layout
@every_grad_layout
@every_dtype
def test_every_memory_order_has_the_same_bits(layout, grad_layout, dtype):
    params = [parameter(*SHAPE, dtype=dtype), leaf(LAYOUTS[layout](random(*SHAPE, dtype=dtype)))]
    optimizers = [Adamax([param], weight_decay=0.1) for param in params]
    for call in range(4):
        grads = gradients(call, params[:1])
        params[0].grad = grads[0]
        params[1].grad = LAYOUTS[grad_layout](grads[0])
        for optimizer in optimizers:
            optimizer.step()
        assert_same(params[1], params[0], f"after call {call}")
        for key in ("exp_avg", "exp_inf", "step"):
            assert_same(*(o.state[p][key] for o, p in zip(optimizers, params, strict=True)), key)


@every_layout
def test_state_has_the_memory_order_that_torch_gives_it(layout):
    def run(kind):
        param = leaf(LAYOUTS[layout](random(*SHAPE)))
        optimizer = kind([param])
        train(optimizer, [param], range(3))
        return optimizer

    ours, theirs = run(Adamax), run(torch.optim.Adamax)
    assert_same_training(ours, theirs, tolerance=TOLERANCE)
    for one, other in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert [t.stride() for t in one.values()] == [t.stride() for t in other.values()]


@every_layout
def test_what_lies_between_the_elements_is_not_written(layout):
    param = leaf(LAYOUTS[layout](random(*SHAPE)))
    size = param.untyped_storage().nbytes() // 4
    whole = param.detach().as_strided((size,), (1,), 0)
    is_element = torch.zeros(size).as_strided(param.shape, param.stride(), param.storage_offset())
    is_element.fill_(1)
    gaps = is_element.as_strided((size,), (1,), 0) == 0
    whole[gaps] = 7.0
    optimizer = Adamax([param])
    train(optimizer, [param], range(3))
    assert (whole[gaps] == 7).all()
    assert (param != 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (0,), (3, 0, 2)])
def test_small_and_empty_parameters(shape, dtype):
    def run(kind):
        params = [parameter(*shape, dtype=dtype), parameter(2)]
        optimizer = kind(params)
        train(optimizer, params, range(5))
        return optimizer

    assert len(require_same_as_torch(run).state) == 2


def test_gradients_that_are_expanded():
    def run(kind):
        params = [parameter(4, 3), parameter(3, dtype=torch.complex64), leaf(random(4, 3).t())]
        optimizer = kind(params)
        for call in range(4):
            ones = [torch.full((), call + 1.0, dtype=param.dtype) for param in params]
            feed(params, [one.expand(p.shape) for one, p in zip(ones, params, strict=True)])
            params[0].grad = random(4, 1, seed=call).expand(4, 3)
            optimizer.step()
        return optimizer

    require_same_as_torch(run)


def marked(dtype):
    """Gradients whose numbers are not those in their memory."""
    if not dtype.is_complex:
        both = {
            "negative": torch._neg_view,
            "conjugate's": lambda t: torch.complex(t, t).conj().imag,
        }
        return both | {"transposed": lambda t: torch._neg_view(t.t().contiguous().t())}
    return {
        "conjugate": torch.conj,
        "negative": torch._neg_view,
        "both": lambda t: torch._neg_view(t.conj()),
        "transposed": lambda t: t.t().contiguous().t().conj(),
    }


@pytest.mark.parametrize(
    ("dtype", "mark"),
    [
        (dtype, mark)
        for dtype in (torch.float32, torch.complex64, torch.complex128)
        for mark in marked(dtype)
    ],
)
def test_gradients_that_are_marked(dtype, mark):
    def run(kind):
        params = [parameter(4, 3, dtype=dtype), parameter(2)]
        optimizer = kind(params)
        for call in range(4):
            grads = gradients(call, params)
            grads[0] = marked(dtype)[mark](grads[0])
            assert grads[0].is_neg() or grads[0].is_conj()
            if kind is not Adamax:  # torch's class refuses conjugates
                grads[0] = grads[0].resolve_conj()
            feed(params, grads)
            optimizer.step()
        return optimizer

    require_same_as_torch(run)


def test_parameters_that_are_marked():
    """Their numbers are written with the sign that the mark says."""

    def run(kind):
        memory = random(4, 3), torch.complex(random(3, seed=1), random(3, seed=2))
        params = [torch._neg_view(memory[0]), memory[1].conj().imag]
        params = [param.detach().requires_grad_() for param in params]
        optimizer = kind(params)
        train(optimizer, params, range(4))
        assert all(param.is_neg() for param in params)
        assert_same(memory[0], -params[0].detach())
        return optimizer

    require_same_as_torch(run)


def test_every_dtype_in_one_group():
    """16 bits beside torch would need torch's own rounding: see test_torch_beside_torch.py."""
    dtypes = [torch.float64, torch.complex64, torch.float32, torch.complex128]

    def run(kind):
        params = [parameter(3, 2, dtype=dtype) for dtype in dtypes]
        optimizer = kind(params)
        train(optimizer, params, range(5))
        return optimizer

    require_same_as_torch(run)


# ---- Memory that several tensors share -------------------------------------------------------


def shared(first, second):
    """Two parameters that `first` and `second` take out of the same memory."""
    memory = random(6, 6)
    return [torch.nn.Parameter(take(memory)) for take in (first, second)]


VIEWS = {
    "all": lambda t: t,
    "transposed": lambda t: t.t(),
    "rows": lambda t: t[:3],
    "other rows": lambda t: t[3:],
    "columns": lambda t: t[:, ::2],
    "other columns": lambda t: t[:, 1::2],
    "middle": lambda t: t[1:4, 1:4],
}


@pytest.mark.parametrize("first", VIEWS)
@pytest.mark.parametrize("second", VIEWS)
@pytest.mark.parametrize("has_groups", [False, True])
def test_parameters_that_share_memory_are_stepped_in_turn(first, second, has_groups):
    def run(kind):
        tied = shared(VIEWS[first], VIEWS[second])
        params = [*tied, parameter(2)]
        groups = [{"params": tied[:1]}, {"params": tied[1:], "lr": 0.1}, {"params": params[2:]}]
        optimizer = kind(groups if has_groups else params, weight_decay=0.3)
        train(optimizer, params, range(6))
        return optimizer

    require_same_as_torch(run)


@pytest.mark.parametrize("view", VIEWS)
def test_a_parameter_with_any_view_twice_in_a_group(view):
    def run(kind):
        (param, _) = shared(VIEWS[view], VIEWS[view])
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = kind([param, parameter(2), param])
        for call in range(4):
            param.grad = gradients(call, [param])[0]
            optimizer.step()
        assert optimizer.state[param]["step"] == 8
        return optimizer

    require_same_as_torch(run)


@pytest.mark.parametrize("view", ["all", "transposed"])
def test_a_gradient_in_the_memory_of_a_parameter(view):
    """Its own, or another one: it is read when it is that parameter's turn."""

    def run(kind):
        params = [parameter(4, 4, seed=i) for i in range(3)]
        optimizer = kind(params, foreach=False)
        sources = [params[0], params[2], params[1]]
        for _ in range(4):
            feed(params, [VIEWS[view](source.data) for source in sources])
            optimizer.step()
        return optimizer

    require_same_as_torch(run)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_gradient_in_the_memory_of_a_parameter_with_gaps(is_first):
    def run(kind):
        memory = random(4, 6)
        gaps, other = torch.nn.Parameter(memory[:, ::2]), parameter(2, 6)
        params = [gaps, other] if is_first else [other, gaps]
        optimizer = kind(params, lr=0.1)
        for call in range(4):
            gaps.grad, other.grad = random(4, 3, seed=call), memory[:2]
            optimizer.step()
        return optimizer

    require_same_as_torch(run)


def test_views_of_one_flat_tensor():
    """As wrappers that flatten a model make them."""

    def run(kind):
        flat, flat_grad = random(30), torch.zeros(30)
        params = [torch.nn.Parameter(part) for part in flat.split([6, 10, 14])]
        feed(params, flat_grad.split([6, 10, 14]))
        optimizer = kind(params)
        for call in range(4):
            flat_grad.copy_(random(30, seed=call))
            optimizer.step()
        return optimizer

    require_same_as_torch(run)
