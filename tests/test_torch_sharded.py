"""Ranks that hold parts of parameters: torch's FSDP, old and new, and tensor parallel."""

import pytest
from support.sharded import (
    SETTINGS,
    OneProcess,
    Weights,
    assert_same_bits,
    assert_same_state,
    gradients,
    whole,
)

torch = pytest.importorskip("torch", reason="needs torch, which cannot be imported")
dist = torch.distributed

from adamax_ext.torch import Adamax, AdamaxW  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import (  # noqa: E402
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import (  # noqa: E402
    DTensor,
    Shard,
)
from torch.distributed.tensor.parallel import (  # noqa: E402
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

STEPS = 5
BF16, F32 = torch.bfloat16, torch.float32
# Dtypes of the parameters, of their copies in `forward`, and of the sums over ranks.
PRECISIONS = [(F32, None, None), (BF16, None, None), (F32, BF16, F32), (F32, BF16, None)]


def mesh_of(shape=(2,), names=("data", "parts")):
    return init_device_mesh("cpu", shape, mesh_dim_names=names[-len(shape) :])


# ---- FSDP ---------------------------------------------------------------------------------------


def fully_sharded(precision, mesh_shape):
    dtype, param_dtype, reduce_dtype = precision
    alone, model = OneProcess(AdamaxW, dtype, **SETTINGS), Weights(dtype)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    fully_shard(model, mesh=mesh_of(mesh_shape), mp_policy=policy)
    optimizer = AdamaxW(model.parameters(), **SETTINGS)
    for step in range(STEPS):
        both = [gradients(step, rank, param_dtype or dtype) for rank in range(2)]
        optimizer.zero_grad()
        model(both[dist.get_rank()]).backward()
        optimizer.step()
        alone.step(*([grad.to(reduce_dtype) for grad in grads] for grads in both))
        alone.require_same(model.weights, optimizer)
    for weight in model.weights:
        for key in ("exp_avg", "exp_inf"):
            moment = optimizer.state[weight][key]
            assert moment.dtype == F32
            assert moment.placements == weight.placements
            assert moment.to_local().shape == weight.to_local().shape
    return model.weights[2].to_local().numel()


@pytest.mark.parametrize("mesh_shape", [(2,), (2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_fully_sharded_ranks_equal_one_process(precision, mesh_shape, fully_sharding_ranks):
    elements = fully_sharding_ranks(fully_sharded, precision, mesh_shape)
    assert elements == ([7, 7] if mesh_shape == (2, 1) else [7, 0])  # a rank may have nothing


def sharded_in_part():
    """One parameter is left whole on all ranks, and one has no gradient now and then."""
    alone, model = OneProcess(Adamax, **SETTINGS), Weights()
    fully_shard(model, mesh=mesh_of(), ignored_params={model.weights[1]})
    optimizer = Adamax(model.parameters(), **SETTINGS)
    for step in range(STEPS):
        both = [gradients(step, rank) for rank in range(2)]
        for grads in both:
            grads[1] = both[0][1]  # nobody averages it
            if step % 2:
                grads[3] = None
        optimizer.zero_grad()
        model(both[dist.get_rank()]).backward()
        optimizer.step()
        alone.step(*both)
        alone.require_same(model.weights, optimizer)
    assert not isinstance(model.weights[1], DTensor)
    assert optimizer.state[model.weights[3]]["step"] == 3


def test_whole_and_sharded_parameters_in_one_optimizer(fully_sharding_ranks):
    fully_sharding_ranks(sharded_in_part)


def flat_parameters(use_orig_params):
    alone = OneProcess(AdamaxW, **SETTINGS)
    model = FullyShardedDataParallel(
        Weights(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    optimizer = AdamaxW(model.parameters(), **SETTINGS)
    for step in range(STEPS):
        both = [gradients(step, rank) for rank in range(2)]
        optimizer.zero_grad()
        model(both[dist.get_rank()]).backward()
        optimizer.step()
        alone.step(*both)
        with FullyShardedDataParallel.summon_full_params(model):
            alone.require_same(model.weights)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_the_flat_parameters_of_the_first_fsdp(use_orig_params, two_ranks):
    two_ranks(flat_parameters, use_orig_params)


# ---- Tensor parallel ----------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.norm = torch.nn.LayerNorm(8)
        self.up, self.down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def tensor_parallel(mesh_shape):
    mesh = mesh_of(mesh_shape)
    model, alone = Block(), Block()
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(model, mesh["parts"], plan)
    if len(mesh_shape) == 2:
        fully_shard(model, mesh=mesh["data"])
    axis = 0 if mesh_shape == (2, 1) else 1  # of the data, or of a sequence
    optimizer, alone_optimizer = (AdamaxW(m.parameters(), **SETTINGS) for m in (model, alone))
    losses = []
    for step in range(20):
        torch.manual_seed(step)
        x = torch.randn(4, 6, 8).tensor_split(2, axis)[dist.get_rank()]
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, 2)).square().mean()
        loss.backward()
        losses.append(loss.item())
        for ours, other in zip(model.parameters(), alone.parameters(), strict=True):
            other.grad = whole(ours.grad)  # torch leaves some as sums that are still to be taken
        optimizer.step()
        alone_optimizer.step()
        for ours, other in zip(model.parameters(), alone.parameters(), strict=True):
            assert_same_bits(ours, other, f"after step {step}")
            assert_same_state(optimizer.state[ours], alone_optimizer.state[other], step)
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


@pytest.mark.parametrize("mesh_shape", [(2,), (1, 2), (2, 1)], ids=str)
def test_tensor_parallel_ranks_equal_one_process(mesh_shape, two_ranks):
    two_ranks(tensor_parallel, mesh_shape)
