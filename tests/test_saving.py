"""Saving, loading and copying: training continues with the same bits."""

import copy
import inspect
import itertools
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from adamax_ext import Adamax, checkpoint
from data.saving_cases import (
    CASES,
    DATA,
    FULL,
    GOLDEN,
    SCALED,
    SCHEDULED,
    Case,
    bits,
    make,
    refused,
    snapshot,
    train,
    trained,
    trained_for_golden,
)
from safetensors.numpy import load_file


@cache
def uninterrupted(name, steps):
    weights, optimizer = make(CASES[name])
    optimizer.build(weights)
    train(CASES[name], weights, optimizer, range(steps))
    return snapshot(optimizer, weights)


def continue_all(folder):
    """In a new process: load every case, do five more steps, and leave the snapshots."""
    results = []
    for i, case in enumerate(CASES.values()):
        weights = pickle.loads((Path(folder) / f"{i}.weights").read_bytes())
        _, optimizer = make(case, weights)
        optimizer.build(weights)
        optimizer.load(Path(folder) / f"{i}.safetensors")
        pickled = pickle.loads((Path(folder) / f"{i}.pickle").read_bytes())
        for w, o in ((weights, optimizer), pickled):
            train(case, w, o, range(5, 10))
        results.append((snapshot(optimizer, weights), snapshot(pickled[1], pickled[0])))
    (Path(folder) / "results").write_bytes(pickle.dumps(results))


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continued")
    for i, case in enumerate(CASES.values()):
        weights, optimizer = make(case)
        optimizer.build(weights)
        train(case, weights, optimizer, range(5))
        optimizer.save(folder / f"{i}.safetensors")
        (folder / f"{i}.weights").write_bytes(pickle.dumps(weights))
        (folder / f"{i}.pickle").write_bytes(pickle.dumps((weights, optimizer)))
    code = f"import test_saving; test_saving.continue_all({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    return dict(zip(CASES, pickle.loads((folder / "results").read_bytes()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_new_process_continues_with_the_same_bits(name, continued):
    loaded, unpickled = continued[name]
    assert loaded == uninterrupted(name, 10)
    assert unpickled == uninterrupted(name, 10)
    for key, spec in CASES[name].weights.items():
        moved = loaded[f"weight {key}"] != uninterrupted(name, 5)[f"weight {key}"]
        assert moved == (0 not in spec[0]), key


def test_every_setting_is_in_the_table():
    covered = set().union(*(case.settings for case in CASES.values()))
    assert covered == set(inspect.signature(Adamax).parameters)


COPIES = {"pickle": lambda pair: pickle.loads(pickle.dumps(pair)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("steps_before", [None, 0, 5])  # None: not even built
@pytest.mark.parametrize("name", CASES)
def test_copies_stay_tied_to_their_weights_and_continue(name, steps_before, how):
    weights, optimizer = make(CASES[name])
    if steps_before is not None:
        optimizer.build(weights)
        train(CASES[name], weights, optimizer, range(steps_before))
    weights_2, optimizer_2 = COPIES[how]((weights, optimizer))
    assert optimizer_2.built is optimizer.built is (steps_before is not None)
    for w, o in ((weights_2, optimizer_2), (weights, optimizer)):  # the copy first
        o.build(w)  # its own names, and no others, are accepted again
        train(CASES[name], w, o, range(steps_before or 0, 10))
        assert snapshot(o, w) == uninterrupted(name, 10)


# ---- What a state_dict is ------------------------------------------------------------------------


def test_state_dict_and_store_are_copies_both_ways():
    weights, optimizer = trained(FULL)
    state_dict, store = optimizer.state_dict(), {}
    optimizer.save_own_variables(store)
    before = copy.deepcopy((state_dict, store)), snapshot(optimizer)
    train(FULL, weights, optimizer, range(3, 6))
    assert snapshot(optimizer) != before[1]
    np.testing.assert_equal((state_dict, store), before[0])
    for load, source in (
        (optimizer.load_state_dict, state_dict),
        (optimizer.load_own_variables, store),
    ):
        load(source)
        assert snapshot(optimizer) == before[1]
        train(FULL, weights, optimizer, range(2))
        np.testing.assert_equal((state_dict, store), before[0])
    optimizer.load_state_dict(state_dict)
    state_dict["accumulated"].clear()
    for x in [x for of in state_dict["state"].values() for x in of.values()]:
        x[...] = 99
    assert snapshot(optimizer) == before[1]


def test_variables_are_live_and_in_the_order_of_keras():
    _, optimizer = trained(FULL)
    iteration, rate, *arrays = optimizer.variables
    assert (iteration.dtype, iteration.shape, iteration.item()) == (np.int64, (), 3)
    assert (rate.dtype, rate.shape, rate.item()) == (np.float32, (), np.float32(0.001))
    kinds = ("average", "gradient_accumulator")
    wanted = [*itertools.product(kinds, FULL.weights)]
    wanted += [(kind, name) for name in FULL.weights for kind in ("momentum", "norm")]
    assert len(arrays) == len(wanted)
    for live, (kind, name) in zip(arrays, wanted, strict=True):
        assert live is optimizer.state[name][kind], (kind, name)
    without_rate = trained(SCHEDULED)[1].variables
    assert [x.dtype for x in without_rate] == [np.int64, *["float32"] * 2, *["float64"] * 2]
    _, scaled = trained(SCALED)
    own, inner = scaled.variables[:4], scaled.variables[4:]
    assert [(x.dtype, x.item()) for x in own] == [
        *((np.int64, 0), (np.float32, 0)),  # Keras has an iteration and a rate that nothing uses
        *((np.int64, 1), (np.float32, 4)),
    ]
    assert list(map(bits, inner)) == list(map(bits, scaled.inner_optimizer.variables))


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.is_low_memory])
def test_own_variables_round_trip(name):
    """The layout of Keras holds all but the last digits of the rate, and which zeros are sums."""
    case = CASES[name]
    _, optimizer = trained(case, 5)
    store = {}
    optimizer.save_own_variables(store)
    assert list(store) == [str(i) for i in range(len(optimizer.variables))]
    other_weights, other = make(case)
    other.build(other_weights)
    if case.new_rate:
        other.learning_rate = case.new_rate
    other.load_own_variables(store)
    loaded, saved = snapshot(other), snapshot(optimizer)
    assert set(saved.pop("accumulated")) - set(loaded.pop("accumulated")) <= {"empty"}
    assert loaded == saved


def test_a_rate_that_is_ours_rounded_to_float32_stays_ours():
    _, optimizer = trained(Case({"learning_rate": 0.1}))
    optimizer.set_weights(optimizer.variables)
    assert optimizer.learning_rate == 0.1
    optimizer.set_weights([optimizer.variables[0], np.float32(0.2), *optimizer.variables[2:]])
    assert optimizer.learning_rate == float(np.float32(0.2)) != 0.2


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_of_each_format_version_is_read_for_ever(version):
    stored = load_file(DATA / f"checkpoint_v{version}_weights.safetensors")
    specs = GOLDEN.weights.items()
    weights = {name: np.array(stored[f"before {name}"], order=spec[2]) for name, spec in specs}
    _, optimizer = make(GOLDEN, weights)
    optimizer.build(weights)
    optimizer.load(DATA / f"checkpoint_v{version}.safetensors")
    for key, array in load_file(DATA / f"checkpoint_v{version}.safetensors").items():
        name, _, kind = key.rpartition("/")
        assert bits(optimizer.state[name][kind]) == bits(array), key
    saved = optimizer.state_dict()
    assert (saved["calls"], saved["learning_rate"], optimizer.iterations) == (5, 0.1, 2)
    assert saved["accumulated"] == list(GOLDEN.weights)[: 3 if version == 1 else 2]
    if version == checkpoint.FORMAT_VERSION:
        made = trained_for_golden(version)  # the recipe
        assert snapshot(optimizer, weights) == snapshot(made[1], made[0])
    train(GOLDEN, weights, optimizer, range(5, 11))
    for name, weight in weights.items():
        # With version 1, beta_1 ** t was that of the C library.
        tolerance = 1e-14 if version == 1 else 0
        np.testing.assert_allclose(weight, stored[f"after {name}"], tolerance, 0, err_msg=name)


@pytest.mark.parametrize("source", ["plain", "excluding", "version 1"])
@pytest.mark.parametrize("excluded", ["bias", "kernel", None])
def test_loading_keeps_what_this_run_excludes_from_weight_decay(excluded, source, tmp_path):
    other = make(Case({"weight_decay": 0.5}, exclude={"var_names": ["."]} if excluded else None))
    other[1].build(other[0])
    state_dict = other[1].state_dict()
    if source == "version 1":
        del state_dict["gradient_accumulation_steps"], state_dict["accumulated"]
        state_dict |= {"format_version": 1, "excluded_from_weight_decay": ["bias", "kernel"]}
    checkpoint.write(tmp_path / "file", state_dict)
    exclude = {"var_names": [excluded]} if excluded else None
    weights, optimizer = make(Case({"weight_decay": 0.5}, exclude=exclude))
    optimizer.build(weights)
    for load in (optimizer.load, lambda _: optimizer.load_state_dict(state_dict)):
        load(tmp_path / "file")
        before = copy.deepcopy(weights)
        optimizer.apply([np.zeros_like(w) for w in weights.values()])
        for name, weight in weights.items():
            assert (bits(weight) == bits(before[name])) == (name == excluded), name


def test_another_accumulation_count_is_refused(tmp_path):
    """It would take 10 calls for 5 updates and not for 2, and sums of another length for means."""
    saved = trained(Case({"gradient_accumulation_steps": 4}), 10)[1]
    saved.save(tmp_path / "file")
    for steps in (2, None):
        weights, optimizer = trained(Case({"gradient_accumulation_steps": steps}), 1)
        match = f"gradient_accumulation_steps of the state_dict is 4, of the optimizer {steps}; exp"
        refused(optimizer, weights, ValueError, match, optimizer.load, tmp_path / "file")
        refused(
            optimizer, weights, ValueError, match, optimizer.load_state_dict, saved.state_dict()
        )


@pytest.mark.parametrize("through", ["file", "state_dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("scaled", [False, True], ids=["Adamax", "LossScaleOptimizer"])
def test_a_gradient_of_zeros_is_remembered_until_the_window_ends(scaled, through, tmp_path):
    """Its variable decays at the update, which one without any gradient does not."""

    settings = {"learning_rate": 0.5, "weight_decay": 0.5, "gradient_accumulation_steps": 3}
    case = Case(settings, loss_scale={"initial_scale": 4.0} if scaled else None)
    weights, optimizer = make(case)
    optimizer.build(weights)
    optimizer.apply([np.zeros((3, 5), np.float32)], [weights["kernel"]])
    assert optimizer.state_dict()["accumulated"] == ["kernel"]
    if through in COPIES:
        weights, optimizer = COPIES[through]((weights, optimizer))
    else:
        saved, optimizer = optimizer, make(case, weights)[1]
        optimizer.build(weights)
        saved.save(tmp_path / "file")
        load = optimizer.load if through == "file" else optimizer.load_state_dict
        load(tmp_path / "file" if through == "file" else saved.state_dict())
    expected = {name: weight - weight * np.float32(0.25) for name, weight in weights.items()}
    for _ in range(2):
        optimizer.apply([np.zeros(5, np.float32)], [weights["bias"]])
    assert optimizer.iterations == 1
    assert optimizer.state_dict()["accumulated"] == []
    for name, weight in weights.items():
        assert bits(weight) == bits(expected[name]), name
