"""DTensors of any placement: gradients and state placed otherwise, refusals, and who is told."""

import pytest
from support.sharded import SETTINGS, SHAPES, OneProcess, Weights, assert_same_bits, gradients

torch = pytest.importorskip("torch", reason="needs torch, which cannot be imported")
dist = torch.distributed

from adamax_ext.torch import Adamax, AdamaxW  # noqa: E402
from torch.distributed._functional_collectives import all_reduce  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402
from torch.distributed.tensor import (  # noqa: E402
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)

STEPS = 4
WHOLE, ROWS, COLUMNS, SUMS = [Replicate()], [Shard(0)], [Shard(-1)], [Partial()]


def line():
    return init_device_mesh("cpu", (2,))


def place(tensor, mesh, placements):
    return distribute_tensor(tensor.detach().clone(), mesh, placements)


def parameters(placements, mesh=None, dtype=torch.float32):
    weights = Weights(dtype).weights
    return [torch.nn.Parameter(place(w, mesh or line(), placements)) for w in weights]


def give_gradients(params, step, placements, dtype=torch.float32):
    """Set those of two ranks, of which Partial makes the sum; return them for one process."""
    both = [gradients(step, rank, dtype) for rank in range(2)]
    for param, *grads in zip(params, *both, strict=True):
        mesh = param.device_mesh
        if placements == SUMS:
            param.grad = DTensor.from_local(grads[dist.get_rank()], mesh, placements)
        else:
            param.grad = place(sum(grads), mesh, placements)
    return [[2 * grad for grad in grads] for grads in both]  # whose mean is the sum


def gradients_placed_otherwise(placements, grad_placements, dtype):
    alone, params = OneProcess(AdamaxW, dtype, **SETTINGS), parameters(placements, dtype=dtype)
    optimizer = AdamaxW(params, **SETTINGS)
    for step in range(STEPS):
        alone.step(*give_gradients(params, step, grad_placements, dtype))
        before = [param.grad for param in params]
        optimizer.step()
        alone.require_same(params, optimizer)
        for param, grad in zip(params, before, strict=True):
            assert param.grad is grad  # as it was
            assert optimizer.state[param]["exp_avg"].placements == param.placements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_placements", [WHOLE, ROWS, COLUMNS, SUMS], ids=str)
@pytest.mark.parametrize("placements", [WHOLE, ROWS, COLUMNS], ids=str)
def test_gradients_that_are_placed_otherwise(placements, grad_placements, dtype, two_ranks):
    two_ranks(gradients_placed_otherwise, placements, grad_placements, dtype)


def state_placed_otherwise(dtype):
    alone, params = OneProcess(AdamaxW, dtype, **SETTINGS), parameters(WHOLE, dtype=dtype)
    optimizer = AdamaxW(params, **SETTINGS)
    for step, placements in enumerate([WHOLE, ROWS, COLUMNS, WHOLE]):
        params = [torch.nn.Parameter(place(p.full_tensor(), line(), placements)) for p in params]
        saved, optimizer = optimizer.state_dict(), AdamaxW(params, **SETTINGS)
        optimizer.load_state_dict(saved)
        alone.step(*give_gradients(params, step, ROWS, dtype))
        optimizer.step()
        alone.require_same(params, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_that_was_placed_otherwise_is_loaded(dtype, two_ranks):
    two_ranks(state_placed_otherwise, dtype)


def other_memory_orders():
    """A local part, of parameters or of gradients, that is transposed or has gaps."""
    torch.manual_seed(0)
    weight, grad, mesh = torch.randn(4, 6), torch.randn(4, 6), line()
    gaps = torch.zeros(4, 12)[:, ::2].copy_(weight)
    for local in (weight.clone(), weight.t().contiguous().t(), gaps):
        for local_grad in (grad, grad.t().contiguous().t()):
            param = torch.nn.Parameter(DTensor.from_local(local.clone(), mesh, ROWS))
            param.grad = DTensor.from_local(local_grad, mesh, ROWS)
            alone = torch.nn.Parameter(torch.cat([weight, weight]))
            alone.grad = torch.cat([grad, grad])
            for one in (param, alone):
                Adamax([one], **SETTINGS).step()
            assert_same_bits(param, alone, "weights")


def test_local_parts_in_any_memory_order(two_ranks):
    two_ranks(other_memory_orders)


def gradient_by_a_collective():
    """That of a plain parameter, which may still be under way."""
    param, alone = (torch.nn.Parameter(torch.ones(9)) for _ in range(2))
    optimizers = [Adamax([one], **SETTINGS) for one in (param, alone)]
    for _ in range(STEPS):
        param.grad = all_reduce(torch.arange(9.0) * (1 + dist.get_rank()), "sum", line())
        alone.grad = torch.arange(9.0) * 3
        for optimizer in optimizers:
            optimizer.step()
        assert_same_bits(param, alone, "weights")


def test_the_gradient_of_a_plain_parameter_is_the_result_of_a_collective(two_ranks):
    two_ranks(gradient_by_a_collective)


# ---- Refusals -----------------------------------------------------------------------------------


def step_is_refused(optimizer, params, error, message):
    before = [param.full_tensor() for param in params]
    counts = [optimizer.state[param]["step"].item() for param in params]
    with pytest.raises(error, match=message):
        optimizer.step()
    if isinstance(optimizer, Adamax):  # all or nothing, where torch does a part
        for i, param in enumerate(params):
            assert_same_bits(param, before[i], f"weight {i}")
            assert optimizer.state[param]["step"] == counts[i]


def mixed_tensors(make):
    params = parameters(ROWS)
    optimizer = make(params, **SETTINGS)
    give_gradients(params, 0, ROWS)
    optimizer.step()
    params[1].grad = torch.ones(SHAPES[1])
    step_is_refused(optimizer, params, RuntimeError, "got mixed torch.Tensor and DTensor")
    give_gradients(params, 1, ROWS)
    optimizer.step()
    state = optimizer.state[params[3]]
    state["exp_inf"] = state["exp_inf"].full_tensor()
    step_is_refused(optimizer, params, RuntimeError, "got mixed torch.Tensor and DTensor")


@pytest.mark.parametrize("make", [Adamax, torch.optim.Adamax])
def test_tensors_beside_dtensors_are_refused_as_torch_does(make, two_ranks):
    two_ranks(mixed_tensors, make)


def meshes_that_differ(make):
    backwards = DeviceMesh("cpu", [1, 0])
    params = parameters(ROWS)
    optimizer = make(params, **SETTINGS)
    give_gradients(params, 0, ROWS)
    optimizer.step()
    params[0].grad = place(torch.ones(SHAPES[0]), backwards, ROWS)
    if make is Adamax:
        step_is_refused(optimizer, params, RuntimeError, "different meshes")
    else:  # whose words change
        step_is_refused(optimizer, params, (RuntimeError, ValueError), "mesh")


@pytest.mark.parametrize("make", [Adamax, torch.optim.Adamax])
def test_a_gradient_on_another_mesh_is_refused_as_torch_does(make, two_ranks):
    two_ranks(meshes_that_differ, make)


def refused_on_rank_1():
    """What is wrong on one rank is told there; that one goes on when it is mended."""
    alone, params = OneProcess(AdamaxW, **SETTINGS), parameters(ROWS)
    optimizer = AdamaxW(params, **SETTINGS)
    for step in range(STEPS):
        alone.step(*give_gradients(params, step, ROWS))
        if step == 2 and dist.get_rank() == 1:
            count = optimizer.state[params[3]]["step"]
            count += 0.5
            with pytest.raises(ValueError, match=r"^step\[3\] must be a whole number"):
                optimizer.step()
            count -= 0.5
            grad, params[1].grad = params[1].grad, torch.ones(SHAPES[1])
            with pytest.raises(RuntimeError, match=r"grads\[1\] of shape \(3,\) is no DTensor"):
                optimizer.step()
            params[1].grad = grad
        optimizer.step()
        alone.require_same(params, optimizer)


def test_an_error_on_one_rank_names_the_parameter_and_changes_nothing(two_ranks):
    two_ranks(refused_on_rank_1)


# ---- Autograd -----------------------------------------------------------------------------------


def backward_after_a_step(make):
    param = parameters(ROWS)[0]
    optimizer, version = make([param], **SETTINGS), param._version
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    assert param._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("make", [Adamax, torch.optim.Adamax])
def test_backward_through_a_dtensor_that_was_stepped_raises(make, two_ranks):
    two_ranks(backward_after_a_step, make)
