"""torch: state in fewer bits and rounded weights in parts, one on each rank, and their files."""

import copy

import pytest
from support import sharded
from support.sharded import assert_same_bits, bits_of
from support.sharded_checkpoints import load, save, send_from_rank_0
from support.torch_low_memory import BF16, F32, SETTINGS, STORAGES, Variable, require_same
from support.torch_runs import random, torch

dist = torch.distributed

import torch.distributed.checkpoint as dcp  # noqa: E402
from adamax_ext.torch import Adamax  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import (  # noqa: E402
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or un"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),  # torch's own calls, to 2.10
]
every_storage = pytest.mark.parametrize(
    ("dtype", "bits", "rounding"), [row for row in STORAGES[1:] if row[0] in (F32, BF16)]
)
SOME_STORAGES = [
    (F32, 16, "nearest"),
    (F32, 8, "nearest"),
    (BF16, 8, "stochastic"),
    (BF16, 32, "remainder"),
    (BF16, 8, "remainder"),
]
some_storages = pytest.mark.parametrize(("dtype", "bits", "rounding"), SOME_STORAGES)
WHOLE, ROWS, COLUMNS = [Replicate()], [Shard(0)], [Shard(-1)]
# On two ranks: whole blocks, which one process has too; blocks that do not meet; nothing on the
# second; one of few elements.
EVEN, UNEVEN, ONE_ROW, SMALL = (32, 256), (33, 301), (1, 5000), (6, 7)


def line():
    return init_device_mesh("cpu", (2,))


def place(tensor, placements, mesh=None):
    return distribute_tensor(tensor.detach().clone(), mesh or line(), placements)


def options_of(bits, rounding):
    return SETTINGS | {"state_bits": bits, "weight_rounding": rounding, "seed": 9}


def train(optimizer, params, calls):
    """With the same gradients however the parameters are placed."""
    for call in calls:
        for i, param in enumerate(params):
            grad = random(*param.shape, dtype=param.dtype, seed=100 * call + i)
            if isinstance(param, DTensor):
                grad = place(grad, param.placements, param.device_mesh)
            param.grad = grad
        optimizer.step()


def new(shapes, placements, dtype, bits, rounding, mesh=None):
    tensors = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    if placements is not None:
        tensors = [place(tensor, placements, mesh) for tensor in tensors]
    params = [torch.nn.Parameter(tensor) for tensor in tensors]
    return params, Adamax(params, **options_of(bits, rounding))


def whole(tensor):
    """All of a DTensor, whose collectives do not know int16."""
    if tensor.dtype != torch.int16 or not isinstance(tensor, DTensor):
        return sharded.whole(tensor)
    same_bits = DTensor.from_local(
        tensor.to_local().view(BF16),
        tensor.device_mesh,
        tensor.placements,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return same_bits.full_tensor().view(torch.int16)


# ---- Bits ---------------------------------------------------------------------------------------


def require_same_as_alone(params, optimizer, alone, alone_optimizer):
    for param, other in zip(params, alone, strict=True):
        assert_same_bits(param, other, "parameter")
        state, expected = optimizer.state[param], alone_optimizer.state[other]
        assert list(state) == list(expected)
        for key, tensor in expected.items():
            assert_same_bits(whole(state[key]).reshape(tensor.shape), tensor, key)


def as_one_process(placements, mesh_shape, shapes, dtype, bits, rounding):
    mesh = init_device_mesh("cpu", mesh_shape)
    params, optimizer = new(shapes, placements, dtype, bits, rounding, mesh)
    alone, alone_optimizer = new(shapes, None, dtype, bits, rounding)
    for call in range(3):
        train(optimizer, params, [call])
        train(alone_optimizer, alone, [call])
        require_same_as_alone(params, optimizer, alone, alone_optimizer)


@some_storages
@pytest.mark.parametrize(
    ("placements", "mesh_shape", "shapes"),
    [
        (ROWS, (2,), [EVEN]),
        (WHOLE, (2,), [EVEN, UNEVEN, SMALL]),
        ([Replicate(), Shard(0)], (1, 2), [EVEN]),
        ([Shard(0), Replicate()], (2, 1), [EVEN]),
        ([Shard(0), Shard(0)], (2, 1), [EVEN]),
    ],
    ids=str,
)
def test_parts_of_whole_blocks_equal_one_process(
    placements, mesh_shape, shapes, dtype, bits, rounding, two_ranks
):
    two_ranks(as_one_process, placements, mesh_shape, shapes, dtype, bits, rounding)


def options_in_one_group(is_first):
    runs = []
    for placements in (ROWS, None):
        params, _ = new([EVEN, EVEN], placements, BF16, 32, "nearest")
        groups = [{"params": [param]} for param in params]
        groups[not is_first] |= {"state_bits": 8, "weight_rounding": "stochastic"}
        optimizer = Adamax(groups, **SETTINGS)
        train(optimizer, params, range(3))
        runs += params, optimizer
    require_same_as_alone(*runs)


@pytest.mark.parametrize("is_first", [True, False])
def test_options_of_one_group_are_not_those_of_another(is_first, two_ranks):
    two_ranks(options_in_one_group, is_first)


def each_part_by_itself(placements, dtype, bits, rounding):
    """Numbers of a part begin where those of the one before end, up to whole blocks."""
    shapes = [UNEVEN, (70, 222)]
    params, optimizer = new(shapes, placements, dtype, bits, rounding)
    rank, program = dist.get_rank(), []
    for i, param in enumerate(params):
        rows, columns = shapes[i]
        cut = (-(-rows // 2) * columns) if placements == ROWS else rows * -(-columns // 2)
        first = rank * -(-cut // 256) * 256
        program.append(Variable(param.to_local(), i, bits, rounding, 9, first))
    for call in range(3):
        train(optimizer, params, [call])
        for param, variable in zip(params, program, strict=True):
            variable.step(dense(param.grad.to_local()), **SETTINGS)
            state = {key: local(value) for key, value in optimizer.state[param].items()}
            expected = variable.expected()
            if bits == 8:  # padded to the part that is largest
                scales = state["exp_inf_scale"].flatten()
                state["exp_inf_scale"] = scales[: expected["exp_inf_scale"].size]
                assert not scales[expected["exp_inf_scale"].size :].any()
            require_same(param.to_local(), state, expected, f"{tuple(param.shape)} call {call}")


def dense(tensor):
    return tensor.contiguous()


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@every_storage
@pytest.mark.parametrize("placements", [ROWS, COLUMNS], ids=str)
def test_parts_draw_numbers_and_have_blocks_of_their_own(
    placements, dtype, bits, rounding, two_ranks
):
    two_ranks(each_part_by_itself, placements, dtype, bits, rounding)


def a_rank_without_elements(dtype, bits, rounding):
    params, optimizer = new([ONE_ROW, ONE_ROW[::-1]], ROWS, dtype, bits, rounding)
    alone, alone_optimizer = new([ONE_ROW, ONE_ROW[::-1]], None, dtype, bits, rounding)
    train(optimizer, params, range(4))
    train(alone_optimizer, alone, range(4))
    assert_same_bits(params[0], alone[0], "parameter")
    state, expected = optimizer.state[params[0]], alone_optimizer.state[alone[0]]
    assert state["exp_avg"].to_local().numel() == (5000, 0)[dist.get_rank()]
    if bits == 16:  # whichever rank is asked
        assert_same_bits(state["exp_inf_scale"], expected["exp_inf_scale"], "scale")
        assert state["exp_inf_scale"] != 1


@some_storages
def test_a_rank_without_elements(dtype, bits, rounding, two_ranks):
    two_ranks(a_rank_without_elements, dtype, bits, rounding)


def few_elements_of_many():
    """Whether state is in 8 bits follows from the parameter, not from a part."""
    params, optimizer = new([(40, 150), (4095,)], ROWS, F32, 8, "nearest")
    train(optimizer, params, range(1))
    return [optimizer.state[param]["exp_avg"].dtype for param in params]


def test_all_ranks_keep_a_parameter_in_the_same_bits(two_ranks):
    assert two_ranks(few_elements_of_many) == [[torch.int8, F32]] * 2


# ---- FSDP and files -----------------------------------------------------------------------------


class Weights(torch.nn.Module):
    def __init__(self, dtype, seed):
        super().__init__()
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(random(*shape, dtype=dtype, seed=seed + i))
            for i, shape in enumerate([EVEN, UNEVEN, SMALL, ONE_ROW])
        )


def new_model(dtype, bits, rounding, seed=0):
    model = Weights(dtype, seed)
    if dist.is_initialized():
        fully_shard(model)
    return model, Adamax(model.parameters(), **options_of(bits, rounding))


def train_save_and_go_on(path, *storage):
    model, optimizer = new_model(*storage)
    train(optimizer, list(model.weights), range(3))
    save(path, model, optimizer)
    train(optimizer, list(model.weights), range(3, 6))
    return bits_of(model)


def load_and_go_on(path, *storage):
    model, optimizer = new_model(*storage, seed=50)
    load(path, model, optimizer)
    train(optimizer, list(model.weights), range(3, 6))
    return bits_of(model)


def require_same_weights(results):
    for weights in results[1:]:
        for i, (one, other) in enumerate(zip(weights, results[0], strict=True)):
            assert_same_bits(one, other, f"weight {i}")


@some_storages
def test_a_distributed_checkpoint_goes_on_with_the_same_bits(
    dtype, bits, rounding, two_ranks, tmp_path
):
    run = tmp_path, dtype, bits, rounding
    require_same_weights([*two_ranks(train_save_and_go_on, *run), *two_ranks(load_and_go_on, *run)])


@some_storages
def test_one_process_goes_on_with_the_same_bits(dtype, bits, rounding, tmp_path):
    run = tmp_path, dtype, bits, rounding
    require_same_weights([train_save_and_go_on(*run), load_and_go_on(*run)])


def state_after_loading(path, *storage):
    model, optimizer = new_model(*storage, seed=50)
    load(path, model, optimizer)
    weights = list(model.weights)
    states = [{k: whole(v) for k, v in optimizer.state[w].items()} for w in weights]
    train(optimizer, weights, range(3, 4))
    return bits_of(model), states


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "remainder"])
@pytest.mark.parametrize("bits", [32, 16])
def test_up_to_16_bits_load_on_another_number_of_ranks(bits, rounding, two_ranks, tmp_path):
    run = tmp_path, BF16, bits, rounding
    two_ranks(train_save_and_go_on, *run)
    (weights, states), _ = two_ranks(state_after_loading, *run)
    alone_weights, alone_states = state_after_loading(*run)
    for state, alone in zip(states, alone_states, strict=True):
        assert list(state) == list(alone)
        for key, tensor in state.items():
            assert_same_bits(alone[key], tensor, key)
    assert_same_bits(alone_weights[0], weights[0], "the weight of whole blocks")


def require_refused(path, *storage):
    model, optimizer = new_model(*storage, seed=50)
    with pytest.raises((ValueError, dcp.api.CheckpointException), match=r"(?i)size mismatch"):
        load(path, model, optimizer)


def test_8_bits_are_refused_on_another_number_of_ranks(two_ranks, tmp_path):
    run = tmp_path, F32, 8, "nearest"
    two_ranks(train_save_and_go_on, *run)
    require_refused(*run)
    train_save_and_go_on(tmp_path / "alone", *run[1:])
    two_ranks(require_refused, tmp_path / "alone", *run[1:])


def whole_state_on_rank_0(dtype, bits, rounding):
    model, optimizer = new_model(dtype, bits, rounding)
    train(optimizer, list(model.weights), range(3))
    other_model, other = new_model(dtype, bits, rounding, seed=50)
    send_from_rank_0(model, optimizer, other_model, other)
    for i, (weight, loaded) in enumerate(zip(model.weights, other_model.weights, strict=True)):
        assert list(other.state[loaded]) == list(optimizer.state[weight])
        for key, tensor in optimizer.state[weight].items():
            assert_same_bits(other.state[loaded][key], tensor, f"{key} of weight {i}")
    for trained, stepper in ((model, optimizer), (other_model, other)):
        train(stepper, list(trained.weights), range(3, 6))
    for i, (one, two) in enumerate(zip(bits_of(model), bits_of(other_model), strict=True)):
        assert_same_bits(one, two, f"weight {i}")


@pytest.mark.parametrize(
    ("dtype", "bits", "rounding"), [row for row in SOME_STORAGES if row[2] != "remainder"]
)
def test_the_whole_state_of_rank_0_is_sent_to_all(dtype, bits, rounding, two_ranks):
    two_ranks(whole_state_on_rank_0, dtype, bits, rounding)


def asked_for_the_state_before_the_first_step(*storage):
    model, optimizer = new_model(*storage)
    before = bits_of(model)
    get_optimizer_state_dict(model, optimizer)
    for one, other in zip(bits_of(model), before, strict=True):
        assert_same_bits(one, other, "weight")


@some_storages
def test_that_torch_makes_state_disturbs_nothing(dtype, bits, rounding, two_ranks):
    two_ranks(asked_for_the_state_before_the_first_step, dtype, bits, rounding)


def zero_redundancy():
    """Each rank has an optimizer of its own, with one of the parameters; rank 0 collects all."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns

    params = [torch.nn.Parameter(random(*shape, dtype=BF16)) for shape in (UNEVEN, EVEN)]
    program = [Variable(param, 0, 8, "remainder", 9) for param in params]
    options = options_of(8, "remainder")
    optimizer = ZeroRedundancyOptimizer(params, optimizer_class=Adamax, **options)
    for call in range(3):
        train(optimizer, params, [call])
        for param, variable in zip(params, program, strict=True):
            variable.step(param.grad, **SETTINGS)
    optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        saved = optimizer.state_dict()["state"]
        for i, (param, variable) in enumerate(zip(params, program, strict=True)):
            require_same(param, saved[i], variable.expected(), f"parameter {i}")


def test_zero_redundancy(two_ranks):
    two_ranks(zero_redundancy)


# ---- Other placements ---------------------------------------------------------------------------


def placed_otherwise(bits, rounding):
    params, optimizer = new([EVEN, UNEVEN], ROWS, BF16, bits, rounding)
    train(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    moved = [torch.nn.Parameter(place(p.full_tensor(), COLUMNS)) for p in params]
    other = Adamax(moved, **options_of(bits, rounding))
    other.load_state_dict(saved)
    before = [p.full_tensor() for p in moved]
    if bits == 8 or rounding == "remainder":
        key = "remainder" if rounding == "remainder" else "exp_avg"
        with pytest.raises(
            RuntimeError, match=rf"^{key}\[0\] must be a DTensor placed as where it"
        ):
            train(other, moved, [2])
        for param, old in zip(moved, before, strict=True):
            assert_same_bits(param, old, "parameter")
            assert other.state[param]["step"] == 2
        return
    train(other, moved, [2])
    train(optimizer, params, [2])
    for param, expected in zip(moved, params, strict=True):
        states = other.state[param], optimizer.state[expected]
        assert states[0]["exp_inf"].placements == param.placements
        for key in ("exp_inf", "exp_inf_scale"):
            assert_same_bits(states[0][key], states[1][key], key)
        assert_same_bits(param, expected, "parameter")


@pytest.mark.parametrize(
    ("bits", "rounding"), [(16, "nearest"), (8, "nearest"), (32, "remainder"), (8, "remainder")]
)
def test_state_that_was_placed_otherwise(bits, rounding, two_ranks):
    two_ranks(placed_otherwise, bits, rounding)


def tensors_beside_dtensors(key):
    params, optimizer = new([EVEN], ROWS, BF16, 8, "remainder")
    train(optimizer, params, range(2))
    state = optimizer.state[params[0]]
    state[key] = whole(state[key])
    before = params[0].full_tensor()
    with pytest.raises(RuntimeError, match=rf"{key}\[0\].* no DTensor"):
        train(optimizer, params, [2])
    assert_same_bits(params[0], before, "parameter")


@pytest.mark.parametrize("key", ["exp_avg", "exp_inf", "exp_inf_scale", "remainder"])
def test_tensors_beside_dtensors_are_refused(key, two_ranks):
    two_ranks(tensors_beside_dtensors, key)
