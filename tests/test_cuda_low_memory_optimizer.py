"""`Adamax` with state in fewer bits and rounded weights on an emulated GPU: state, steps, files."""

import pickle
from unittest import mock

import numpy as np
import pytest
from adamax_ext import Adamax
from support import emulated
from support.bits import assert_same_bits, dtype_of, is_testable, spread
from support.emulated import CudaArray, TableArray, on_cuda
from support.low_memory import assert_same, every_option

PLACES = {"host": lambda a: a, "cupy": on_cuda, "torch": TableArray}
DTYPES = ["float32", *(["bfloat16"] if is_testable("bfloat16") else [])]


def make_weights():
    rng = np.random.default_rng(1)
    return [
        np.asfortranarray(spread(rng, shape, dtype_of(dtype)))
        for dtype in DTYPES
        for shape in ((70, 60), (9,))
    ]


def train(optimizer, place, weights, calls):
    for call in calls:
        rng = np.random.default_rng(call)
        grads = [np.asfortranarray(spread(rng, w.shape, w.dtype, -9, 4)) for w in weights]
        optimizer.apply([place(g) for g in grads])


def settings_for(bits, rounding):
    return {
        "state_bits": bits,
        "weight_rounding": rounding,
        "seed": 5,
        "use_ema": True,
        "gradient_accumulation_steps": 3,
        "clipnorm": 0.4,
    }


def assert_same_states(one, other, label):
    for name, kinds in one.state_dict()["state"].items():
        for kind, array in other.state_dict()["state"][name].items():
            assert_same(array, kinds[kind], f"{kind} of {name}, {label}")


def check_moves(folder, source, target, bits, rounding):
    """Half of the steps at one place, half at the other: as all of them at one."""
    settings = settings_for(bits, rounding)
    whole = make_weights()
    by_steps = Adamax(**settings)
    by_steps.build(whole)
    train(by_steps, PLACES["host"], whole, range(8))
    for way in ("file", "dict", "pickle"):
        weights = make_weights()
        first, second = Adamax(**settings), Adamax(**settings | {"seed": 6})
        first.build([PLACES[source](w) for w in weights])
        train(first, PLACES[source], weights, range(4))
        second.build([PLACES[target](w) for w in weights])
        if way == "file":
            first.save(folder / "state")
            second.load(folder / "state")
        else:
            saved = first.state_dict()
            second.load_state_dict(pickle.loads(pickle.dumps(saved)) if way == "pickle" else saved)
        train(second, PLACES[target], weights, range(4, 8))
        for w, expected in zip(weights, whole, strict=True):
            assert_same_bits(w, expected, f"weights, {way}")
        assert_same_states(by_steps, second, way)


@every_option
@pytest.mark.parametrize(
    ("source", "target"), [("cupy", "host"), ("host", "torch"), ("torch", "cupy")]
)
def test_state_moves(tmp_path, source, target, bits, rounding):
    emulated.run(check_moves, tmp_path, source, target, bits, rounding)


def check_numbers(bits, rounding):
    """Keras' layout, decoded state, averages: as on the host."""
    optimizers = []
    for place in ("host", "torch"):
        weights = make_weights()
        optimizer = Adamax(**settings_for(bits, rounding))
        optimizer.build([PLACES[place](w) for w in weights])
        train(optimizer, PLACES[place], weights, range(4))
        optimizers.append(optimizer)
    host, device = optimizers
    for one, other in zip(host.variables, device.variables, strict=True):
        assert_same(getattr(other, "host", other), one, "variables")
    for name in host.state:
        np.testing.assert_equal(device.decoded_state(name), host.decoded_state(name))
    store = {}
    host.save_own_variables(store)
    for optimizer in optimizers:
        optimizer.load_own_variables(store)
        optimizer.iterations = 0
        optimizer.iterations = 2
    assert_same_states(host, device, "loaded")
    for optimizer in optimizers:
        optimizer.finalize_variable_values()
    assert_same_states(host, device, "finalized")


@every_option
def test_numbers(bits, rounding):
    emulated.run(check_numbers, bits, rounding)


def check_kinds():
    """Arrays of the weights' library, in their memory order; uint16 where it has no bfloat16."""
    weights = [CudaArray(np.asfortranarray(np.ones((70, 60), np.float32)))]
    for bits, of_momentum, of_norm, scales in (
        (16, "uint16", "uint16", 1),
        (8, "int8", "uint8", 17),
    ):
        optimizer = Adamax(state_bits=bits)
        optimizer.build(weights)
        state = optimizer.state["variable_0"]
        assert {type(array) for array in state.values()} == {CudaArray}
        assert state["momentum"].host.dtype == of_momentum
        assert state["norm"].host.dtype == of_norm
        assert state["momentum"].host.flags.f_contiguous
        assert state["norm_scale"].host.shape == (scales,)
        assert (state["norm_scale"].host == (bits == 16)).all()


def test_kinds():
    emulated.run(check_kinds)


def check_moved_state():
    """State whose memory moves is read where it is; what does not fit is refused."""
    weights, twin = np.ones(5000, np.float32), np.ones(5000, np.float32)
    optimizer, other = Adamax(state_bits=8), Adamax(state_bits=8)
    optimizer.build([TableArray(weights)])
    other.build([twin])
    state = optimizer.state["variable_0"]
    for step in range(3):
        grad = spread(np.random.default_rng(step), 5000, np.float32)
        optimizer.apply([TableArray(grad)])
        other.apply([grad])
        for kind in ("momentum", "norm"):
            old = state[kind].host
            state[kind].become(old.copy())
            old[:] = 99
    assert_same_bits(weights, twin, "weights")
    fitting = {kind: state[kind].host for kind in ("momentum", "norm")}
    refused = [
        ("norm", np.ones(4999, np.uint8), "has 4999 elements"),
        ("norm", np.ones(5000, np.float32), "has dtype float32; expected uint8"),
        ("norm", fitting["momentum"].view(np.uint8), "overlaps"),
        ("momentum", np.ones(5000, np.float32), "has dtype uint8; expected float32"),
    ]
    for kind, array, why in refused:
        state[kind].become(array)
        with pytest.raises((ValueError, TypeError), match=rf"\[0\] .*'variable_0'.* {why}"):
            optimizer.apply([TableArray(twin)])
        state[kind].become(fitting[kind])
    assert_same_bits(weights, twin, "weights")
    optimizer.apply([TableArray(grad)])


def test_state_whose_memory_moved():
    emulated.run(check_moved_state)


def check_state_of_torch():
    """Tensors: bfloat16, and what belongs to it, on the device of the weights."""
    torch = pytest.importorskip("torch")
    from support.emulated_torch import GPU, GpuTensor, on_gpu, on_host

    plain = torch.full

    def full(shape, fill_value, dtype):
        with torch.device("cpu"):
            return on_gpu(plain(shape, fill_value, dtype=dtype))

    weights = torch.ones(70, 60, dtype=torch.bfloat16).T
    twin = weights.clone()
    settings = {"state_bits": 16, "weight_rounding": "remainder"}
    device, host = Adamax(**settings), Adamax(**settings)
    with mock.patch.object(torch, "full", full):
        placed = on_gpu(weights)
        device.build([placed])
    host.build([twin])
    for step in range(3):
        grad = torch.randn(60, 70, generator=torch.Generator().manual_seed(step))
        grad = torch.empty_like(twin).copy_(grad)
        device.apply([on_gpu(grad)])
        host.apply([grad])
    assert torch.equal(on_host(placed), twin)
    state = device.state["variable_0"]
    assert {type(array) for array in state.values()} == {GpuTensor}
    dtypes = {kind: array.dtype for kind, array in state.items()}
    assert dtypes == {
        "momentum": torch.bfloat16,
        "norm": torch.bfloat16,
        "norm_scale": torch.float32,
        "remainder": torch.int16,
    }
    assert state["momentum"].stride() == weights.stride()
    assert state["norm_scale"].device == GPU
    assert_same_states(host, device, "as tensors")
    with mock.patch.object(torch, "full", full):
        device.load_state_dict(host.state_dict())
    assert_same_states(host, device, "loaded")


def test_state_of_torch():
    pytest.importorskip("torch")
    emulated.run(check_state_of_torch)
