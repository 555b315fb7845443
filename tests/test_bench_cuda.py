"""bench/peers.py on a GPU, where the CPU pretends to be one: all but the events and the sleep."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("matplotlib", reason="needs matplotlib")

TESTS = Path(__file__).parent
BENCH = TESTS.parent / "bench"
OURS, CLASS = "adamax_ext, torch tensors", "adamax_ext.torch.Adamax"
FUSED, FOREACH = "torch AdamW, fused", "torch Adamax, foreach"
KNOWN = f"({OURS}|{CLASS}|{FUSED}|{FOREACH})"  # without what compiles for long


def peers(out, only, faults=None):
    """Return the exit status, what was printed, and the results; faults: see pretended_gpu.py."""
    options = ["--device", "cuda", "--quick", "--threads", "1", "--only", only, "--out", out]
    command = [
        sys.executable,
        TESTS / "support" / "pretended_gpu.py",
        json.dumps(faults or {}),
        *options,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout, json.loads(out.read_text())


def names(results, work):
    return [row["contestant"] for row in results["rows"] if row["work"] == work]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without faults, of all works but those of one array per size."""
    out = tmp_path_factory.mktemp("whole") / "gpu.json"
    status, text, results = peers(out, rf"^(?!bfloat|plain 2\^14).* / {KNOWN}$")
    assert status == 0, text
    assert results["complete"] and not results["failures"] and not results["missing"]
    return out, results


def test_works_and_timers(whole):
    _, results = whole
    known = [OURS, CLASS, FUSED, FOREACH]
    for work in ("plain 2^20", "full 2^20", "20 x 256"):
        assert names(results, work) == ["device copy", *known]
    for work in ("host time, plain 2^12", "host time, 20 x 256"):
        assert names(results, work) == known
    assert names(results, "norm 2^20")[1:] == [OURS]
    assert names(results, "norm 2^20")[0] in ("device copy", "device read")
    assert names(results, "float64 2^19") == ["device copy", OURS, CLASS, FUSED]
    assert names(results, "20 groups of 256") == ["device copy", OURS, CLASS, FUSED]
    for row in results["rows"]:
        on_host = row["work"].startswith("host time")
        assert row["timer"] == ("host clock, the call alone" if on_host else "device events")
        assert ("bound" in row["raw"]) == (row["contestant"] in known and not on_host)
        assert (row["fraction_of_bound"] is None) == ("bound" not in row["raw"])
    ours = [row for row in results["rows"] if row["contestant"] == OURS]
    traffic = {row["work"]: row["bytes_per_element"] for row in ours}
    one_pass = {"plain 2^20": 28, "float16 2^19": 22, "float64 2^19": 56}
    assert {**one_pass, "full 2^20": 40, "norm 2^20": 4}.items() <= traffic.items()


def test_what_stays_in_l2_is_marked(whole):
    out, results = whole
    marked = {row["work"]: row["in_l2"] for row in results["rows"]}
    assert marked["plain 2^16"] and marked["plain 2^12"] and marked["20 x 256"]
    assert not marked["plain 2^20"] and not marked["full 2^20"] and not marked["norm 2^20"]
    report = out.with_suffix(".md").read_text()
    assert "| 65,536 (in L2) |" in report and "| 1,048,576 |" in report
    assert "## plain 2^16 (in L2) (65,536 elements)" in report
    assert {path.name for path in out.parent.iterdir()} == {
        *("gpu.json", "gpu.md", "gpu-sizes.png", "gpu-full.png")
    }


@pytest.mark.parametrize("kept", [True, False])
def test_goals(whole, tmp_path, kept):
    """The run's figures in the place of those that have goals."""
    text = whole[0].read_text().replace("2^20", "2^28").replace('"20 x', '"400 x')
    results = json.loads(text)
    for row in results["rows"]:
        row["seconds"]["median"] = 19e-6 if kept else 21e-6
        for kind, good, bad in (("fraction_of_bound", 0.93, 0.87), ("ratio_to_ours", 3.1, 0.99)):
            if row[kind]:
                row[kind]["median"] = good if kept else bad
    (tmp_path / "gpu.json").write_text(json.dumps(results))
    subprocess.run([sys.executable, BENCH / "report.py", tmp_path / "gpu.json"], check=True)
    goals = (tmp_path / "gpu.md").read_text().split("## Cost")[0].split("| --- |")[-1].splitlines()
    verdicts = [line.split(" | ")[-1].rstrip(" |") for line in goals if line.startswith("| ")]
    # Five of their own, and AdamW at three sizes, in the full step, in float64 and on many arrays.
    assert verdicts == ["yes" if kept else "**no**"] * (5 + 3 + 1 + 1 + 2)


def test_a_fault_does_not_stop_the_others(tmp_path):
    works, faults = r"^(plain 2\^1[26]|full 2\^20)", {}
    faults[f"{FOREACH} / plain 2^16"] = faults[f"{OURS} / full 2^20"] = "raise"
    status, text, results = peers(tmp_path / "gpu.json", f"{works} / {KNOWN}$", faults)
    assert status == 1
    assert names(results, "plain 2^16") == ["device copy", OURS, CLASS, FUSED]
    assert names(results, "plain 2^12") == ["device copy", OURS, CLASS, FUSED, FOREACH]
    assert names(results, "full 2^20") == [CLASS, FUSED, FOREACH]  # timed without ours
    assert [(f["work"], f["contestant"], f["reason"]) for f in results["failures"]] == [
        ("plain 2^16", FOREACH, "RuntimeError: out of memory"),
        ("full 2^20", OURS, "RuntimeError: out of memory"),
    ]
    assert "- plain 2^16, torch Adamax, foreach: RuntimeError: out of memory" in text
    assert results["complete"]


def test_a_fault_of_ours_at_the_end_of_a_work(tmp_path):
    faults, only = {f"{OURS} / teardown": "raise"}, rf"^plain 2\^1[26] / {OURS}$"
    status, _, results = peers(tmp_path / "gpu.json", only, faults)
    assert status == 1
    assert [failure["work"] for failure in results["failures"]] == ["plain 2^16", "plain 2^12"]
    assert names(results, "plain 2^16") == names(results, "plain 2^12") == ["device copy", OURS]


def test_other_weights_are_a_fault(tmp_path):
    faults = {f"{FOREACH} / check": "differ"}
    status, text, results = peers(tmp_path / "gpu.json", rf"^plain 2\^12 / {KNOWN}$", faults)
    assert status == 1 and "DIFFERENT by 1.0e+00" in text
    assert names(results, "plain 2^12") == ["device copy", OURS, CLASS, FUSED]
    works = [failure["work"] for failure in results["failures"]]
    assert works == ["check of a plain step", "check of a full step", "plain 2^12"]


def test_what_no_contestant_does_is_no_fault(tmp_path):
    faults = {f"{FOREACH} / plain 2^12": "not implemented"}
    status, _, results = peers(tmp_path / "gpu.json", rf"^plain 2\^12 / {KNOWN}$", faults)
    assert status == 0 and len(results["failures"]) == 1


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGTERM"])
def test_a_cut_run_leaves_its_rows(tmp_path, signal_name):
    faults = {f"{FUSED} / plain 2^12": signal_name}
    out = tmp_path / "gpu.json"
    status, text, results = peers(out, rf"^plain 2\^1[26] / ({OURS}|{FUSED})$", faults)
    assert names(results, "plain 2^16") == ["device copy", OURS, FUSED]
    assert names(results, "plain 2^12") == ["device copy", OURS]
    assert not results["complete"]
    if signal_name == "SIGKILL":
        assert status == -signal.SIGKILL
        subprocess.run([sys.executable, BENCH / "report.py", out], check=True)
    else:
        assert status == 1 and "cut short" in text
    assert "**The run was cut short.**" in out.with_suffix(".md").read_text()


# ---- Timers --------------------------------------------------------------------------------------


class Device:
    """A GPU that wakes up after `cycles`, and tells in `log` what it was asked."""

    def __init__(self, cycles):
        self.cycles, self.log = cycles, []

    def _sleep(self, cycles):
        self.log.append(f"sleep {cycles}")
        self.is_asleep = cycles >= self.cycles

    def Event(self, enable_timing):
        return self

    def record(self):
        self.log.append("event")

    def query(self):
        return not self.is_asleep

    def elapsed_time(self, end):
        return 250.0


@pytest.fixture
def timers(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import timers

    return timers


def test_steps_are_queued_behind_a_sleep_that_is_long_enough(timers):
    device = Device(2**22)
    timer = timers.DeviceTimer(device)

    def seconds():
        device.log.clear()
        step, finish = (lambda word=word: device.log.append(word) for word in ("step", "finish"))
        return timer.seconds(step, 2, finish)

    def attempt(cycles):
        return [f"sleep {cycles}", "event", "step", "step", "event", "finish"]

    assert seconds() == 0.25
    assert device.log == [*attempt(2**20), *attempt(2**21), *attempt(2**22)]
    assert seconds() == 0.25
    assert device.log == attempt(2**22)  # it has learnt
    device.cycles = 2**62  # a step that waits
    assert seconds() == 0.25
    assert device.log[-6:] == attempt(timer.most_cycles)


def test_a_call_is_timed_with_nothing_before_it(timers, monkeypatch):
    now, log = [0.0], []
    monkeypatch.setattr(timers.time, "perf_counter", lambda: now[0])

    def passing(word, seconds):
        now[0] += seconds
        log.append(word)

    step, finish = (lambda: passing("step", 2.0)), (lambda: passing("finish", 50.0))
    assert timers.CallTimer().seconds(step, 3, finish) == 6.0
    assert log == [*("finish", "step") * 3, "finish"]
    assert timers.HostTimer().seconds(step, 3, finish) == 56.0
