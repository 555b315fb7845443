"""The benchmarks' tools: what is committed can be shown, and a change is told from noise."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.building import run

BENCH = Path(__file__).parent.parent / "bench"
RESULTS = {path.name: path for path in sorted((BENCH / "results").glob("*.json"))}


def repeated(results, factor):
    """The results of a library that takes `factor` times as long, the harness' five times over."""
    results = copy.deepcopy(results)
    for row in results.get("rows", []):
        row["raw"]["seconds"] = [factor * seconds for seconds in row["raw"]["seconds"]]
    for row in results.get("benchmarks", []):
        row["real_time"] *= factor
        if "fraction_of_bound" in row:
            row["fraction_of_bound"] /= factor
    if "benchmarks" in results:
        results["benchmarks"] *= 5
    return results


def ask_worker(name, *commands):
    """The answers of a contestant's process."""
    answers = subprocess.run(
        [sys.executable, BENCH / "worker.py", name, "cpu", "1"],
        input="".join(f"{json.dumps(command)}\n" for command in commands),
        env={**os.environ, "JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return [json.loads(line) for line in answers.splitlines()]


def test_there_are_results():
    kinds = {
        "harness" if "benchmarks" in json.loads(p.read_text()) else "peers"
        for p in RESULTS.values()
    }
    assert kinds == {"harness", "peers"}


@pytest.mark.parametrize("path", RESULTS.values(), ids=RESULTS)
def test_report_is_the_committed_one(path, tmp_path):
    copied = tmp_path / path.name
    copied.write_bytes(path.read_bytes())
    run(sys.executable, BENCH / "report.py", copied)
    assert copied.with_suffix(".md").read_text() == path.with_suffix(".md").read_text()
    drawn = {plot.name for plot in tmp_path.glob("*.png")}
    assert drawn == {plot.name for plot in path.parent.glob(f"{path.stem}*.png")}


@pytest.mark.parametrize("path", RESULTS.values(), ids=RESULTS)
@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "within noise"), (5.0, "**slower**"), (0.2, "**faster**")]
)
def test_compare(path, factor, verdict, tmp_path):
    results, old, new = json.loads(path.read_text()), tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(repeated(results, 1.0)))
    new.write_text(json.dumps(repeated(results, factor)))
    lines = run(sys.executable, BENCH / "compare.py", old, new).splitlines()
    told = [line for line in lines if line.startswith("|")][2:]
    assert told
    agreeing = sum(verdict in line for line in told)
    if factor == 1.0:
        assert agreeing == len(told)
    else:  # a few measurements were noisier than that
        assert agreeing > 0.9 * len(told)
        opposite = {"**slower**": "**faster**", "**faster**": "**slower**"}[verdict]
        assert not any(opposite in line for line in told)


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("adamax_ext", "adamax_ext"),
        ("adamax_ext, torch tensors", "torch"),
        ("adamax_ext.torch.Adamax", "torch"),
        ("torch AdamW, fused", "torch"),
        ("optax adamax, jit", "optax"),
        ("Keras Adamax, JAX", "keras jax"),
    ],
)
def test_contestant(name, packages):
    """Three steps, which JAX must do in the place of what it was given, and some after backward."""
    if not all(map(importlib.util.find_spec, packages.split())):
        pytest.skip(f"needs {packages}, of which one is not installed")
    work = {"name": "4 x 256", "shapes": [[256]] * 4, "after_backward": True}
    plain, full, _, turn = ask_worker(
        name,
        {"do": "check", "full": False},
        {"do": "check", "full": True},
        {"do": "setup", "work": work, "bound": None},
        {"do": "turn", "name": "step"},
    )
    assert plain.keys() == full.keys() == {"weights"}, (plain, full)
    assert turn.keys() == {"seconds"}, turn


@pytest.mark.parametrize("name", ["adamax_ext.torch.Adamax", "torch AdamW, fused"])
def test_groups_and_new_gradients(name, monkeypatch):
    """Parameters in as many groups as wanted, and gradients of a pass that are new tensors."""
    pytest.importorskip("torch", reason="needs torch")
    monkeypatch.syspath_prepend(BENCH)
    from contestants import CONTESTANTS
    from contestants.base import RATE, Work

    shapes = ((3,),) * 20
    work = Work("20 x 3", shapes, groups=10, after_backward=True)
    arrays = [np.ones(shape, np.float32) for shape in shapes]
    contestant = CONTESTANTS[name](work, "cpu", arrays, RATE)
    assert [len(g["params"]) for g in contestant.optimizer.param_groups] == [2] * 10
    contestant.backward()
    before = [p.grad for p in contestant.params]
    contestant.step()
    contestant.backward()
    for p, grad in zip(contestant.params, before, strict=True):
        assert p.grad is not grad and not np.array_equal(p.grad, grad)


@pytest.mark.parametrize("kept", [True, False])
def test_goals_of_the_class_for_torch(kept, monkeypatch):
    """Each is kept, or missed, by one percent."""
    monkeypatch.syspath_prepend(BENCH)
    from goals import goals

    ours, fused, foreach = "adamax_ext.torch.Adamax", "torch AdamW, fused", "torch Adamax, foreach"
    small, after = "400 x 256", "400 x 256 after backward"
    margin = 1.01 if kept else 0.99
    ratios = {
        ("plain 2^24", ours): 1.1,
        ("plain 2^24", fused): 1.1 * margin,
        ("plain 2^24", foreach): 1.1 * 3.8 * margin,
        (small, ours): 10,
        (small, fused): 50 * margin,
        (f"{small}, 400 groups", ours): 25 / margin,
        (after, ours): 7,
        (after, fused): 14 * margin,
        (f"{after}, 400 groups", ours): 17.5 / margin,
    }
    quartiles = ("median", "low", "high")
    rows = [
        {
            **{"work": work, "contestant": name, "threads": 2, "elements": 102400},
            "seconds": dict.fromkeys(quartiles, 400 * 1.2e-6 / margin),
            "ratio_to_ours": dict.fromkeys(quartiles, ratio),
        }
        for (work, name), ratio in ratios.items()
    ]
    about = {"ours": "adamax_ext", "device": "cpu", "threads": 2, "zero_gradients": []}
    lines = goals({**about, "rows": rows}).splitlines()
    verdicts = [line.split(" | ")[-1].rstrip(" |") for line in lines if f"| {ours}, " in line]
    assert verdicts == ["yes" if kept else "**no**"] * 7
