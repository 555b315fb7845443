"""The benchmarks' tools: what is committed can be shown, and a change is told from noise."""

import json
import sys
from pathlib import Path

import pytest
from conftest import run

BENCH = Path(__file__).parent.parent / "bench"
RESULTS = sorted((BENCH / "results").glob("*.json"))


def slowed(results, factor):
    """The same run on a machine or of a library that takes `factor` times as long."""
    for row in results.get("rows", []):
        row["raw"]["seconds"] = [factor * seconds for seconds in row["raw"]["seconds"]]
    for row in results.get("benchmarks", []):
        row["real_time"] *= factor
        for key in ("fraction_low", "fraction_of_bound", "fraction_high"):
            if key in row:
                row[key] /= factor
    return results


def test_there_are_results():
    kinds = {"harness" if "benchmarks" in json.loads(p.read_text()) else "peers" for p in RESULTS}
    assert kinds == {"harness", "peers"}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_report_is_the_committed_one(path, tmp_path):
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    run(sys.executable, BENCH / "report.py", copy)
    assert copy.with_suffix(".md").read_text() == path.with_suffix(".md").read_text()
    drawn = {plot.name for plot in tmp_path.glob("*.png")}
    assert drawn == {plot.name for plot in path.parent.glob(f"{path.stem}*.png")}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "within noise"), (5.0, "**slower**"), (0.2, "**faster**")]
)
def test_compare(path, factor, verdict, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(slowed(json.loads(path.read_text()), factor)))
    lines = run(sys.executable, BENCH / "compare.py", path, other).splitlines()
    told = [line for line in lines if line.startswith("|") and "too few" not in line][2:]
    assert told
    if factor == 1.0:
        assert all(verdict in line for line in told)
    else:  # a few measurements were noisier than that
        assert sum(verdict in line for line in told) > 0.9 * len(told)
        opposite = {"**slower**": "**faster**", "**faster**": "**slower**"}[verdict]
        assert not any(opposite in line for line in told)
