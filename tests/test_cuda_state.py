"""State on an emulated GPU: made by the library of a variable, moved, loaded, saved."""

import pickle

import numpy as np
import pytest
from adamax_ext import Adamax
from support import emulated
from support.bits import assert_same_bits, spread
from support.emulated import CudaArray, TableArray


def trained(place, optimizer, weights, calls):
    rng = np.random.default_rng(11)
    for call in range(8):
        grads = [spread(rng, w.shape, w.dtype) for w in weights]
        if call in calls:
            optimizer.apply([place(np.asarray(g, order="F")) for g in grads])


def check_moves(folder, source, target):
    """Half of the steps at one place, half at the other: as all of them at one."""
    places = {"host": lambda a: a, "cupy": CudaArray, "torch": TableArray}
    settings = {"use_ema": True, "gradient_accumulation_steps": 3, "clipnorm": 0.4}
    start = [np.asfortranarray(spread(np.random.default_rng(1), (5, 7), np.float32))]
    whole = [a.copy("K") for a in start]
    optimizer = Adamax(**settings)
    optimizer.build(whole)
    trained(places["host"], optimizer, whole, range(8))
    by_steps = optimizer.state_dict()

    for way in ("file", "dict", "keras"):
        weights = [a.copy("K") for a in start]
        first, second = Adamax(**settings), Adamax(**settings)
        first.build([places[source](w) for w in weights])
        trained(places[source], first, weights, range(4))
        second.build([places[target](w) for w in weights])
        if way == "file":
            first.save(folder / "state")
            second.load(folder / "state")
        elif way == "dict":
            second.load_state_dict(first.state_dict())
        else:
            store = {}
            first.save_own_variables(store)
            second.load_own_variables(store)
        trained(places[target], second, weights, range(4, 8))
        assert_same_bits(weights[0], whole[0], f"weights, {way}")
        for kind, array in second.state_dict()["state"]["variable_0"].items():
            assert type(array) is np.ndarray
            assert_same_bits(array, by_steps["state"]["variable_0"][kind], f"{kind}, {way}")


@pytest.mark.parametrize(
    ("source", "target"), [("cupy", "host"), ("host", "torch"), ("torch", "cupy")]
)
def test_state_moves(tmp_path, source, target):
    emulated.run(check_moves, tmp_path, source, target)


def check_moved_state():
    """As a torch tensor of state whose `data` was assigned."""
    weights = [TableArray(np.ones(5, np.float32))]
    optimizer, other = Adamax(), Adamax()
    optimizer.build(weights)
    twin = np.ones(5, np.float32)
    other.build([twin])
    for step in range(4):
        grad = spread(np.random.default_rng(step), (5,), np.float32)
        optimizer.apply([TableArray(grad)])
        other.apply([grad])
        for array in optimizer.state["variable_0"].values():
            old = array.host
            array.become(old.copy())
            old[:] = np.nan
    assert_same_bits(weights[0].host, twin, "weights")
    for kind, array in optimizer.state["variable_0"].items():
        assert_same_bits(array.host, other.state["variable_0"][kind], kind)

    norm = optimizer.state["variable_0"]["norm"]
    fitting, before = norm.host, twin.copy()
    refused = {
        "has 4 elements": np.ones(4, np.float32),
        "has dtype float64": np.ones(5, np.float64),
        "overlaps": optimizer.state["variable_0"]["momentum"].host,
    }
    for why, array in refused.items():
        norm.become(array)
        with pytest.raises((ValueError, TypeError), match=rf"^norm\[0\] .*'variable_0'.* {why}"):
            optimizer.apply([TableArray(twin)])
    norm.become(fitting)
    assert_same_bits(weights[0].host, before, "weights")
    assert optimizer.apply([TableArray(twin)]) == 5


def test_state_whose_memory_moved():
    emulated.run(check_moved_state)


def check_state():
    weights = [CudaArray(np.asfortranarray(np.ones((2, 3), np.float16)))]
    optimizer = Adamax(use_ema=True)
    optimizer.build(weights)
    optimizer.apply([CudaArray(np.asfortranarray(np.ones((2, 3), np.float16)))])
    state = optimizer.state["variable_0"]
    assert {type(array) for array in state.values()} == {CudaArray}
    assert {array.host.dtype for array in state.values()} == {np.dtype(np.float32)}
    assert state["momentum"].host.flags.f_contiguous
    values = [np.full((2, 3), float(i)) for i in range(3)]
    optimizer.set_weights([np.int64(4), np.float32(0.5), *map(CudaArray, values)])
    state = optimizer.state["variable_0"]
    assert state["norm"].host.tolist() == values[2].tolist()
    with pytest.raises(ValueError, match=r"weights\[3\] must have shape \(2, 3\)"):
        optimizer.set_weights([np.int64(4), np.float32(0.5), values[0], values[0][:1], values[0]])
    before = state["average"].host.copy()
    optimizer.finalize_variable_values()
    assert_same_bits(weights[0].host, before.astype(np.float16), "weights from averages")
    copy = pickle.loads(pickle.dumps(optimizer))
    assert copy.state["variable_0"]["norm"].host.tolist() == values[2].tolist()


def test_state():
    emulated.run(check_state)
