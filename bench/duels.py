"""Duels: two processes take turns on the same work, and the bound with them."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from contestants import CONTESTANTS
from contestants.base import EPSILON, RATE, Contestant, Work
from process import Failure, Process
from rows import OURS, OURS_TORCH, quartiles, seconds_text

ON_DEVICE = "on the device"  # where the bound is, if not in a library
# Why a contestant may be left out. Everything else is a fault, and of ours these are, too.
NO_FAULTS = ("NotImplementedError", "no answer")
LEAST_ROUNDS, LEAST_ROUNDS_OF_BOUND = 3, 10
assert Contestant.tolerance * RATE > EPSILON  # in either of its places


class Entry(NamedTuple):
    """A contestant in a work."""

    work: Work
    contestant: str
    threads: int


@dataclass
class Run:
    """All processes, results and settings of a run."""

    device: str
    threads: int
    quick: bool
    bound: str | None  # the library that does it, or ON_DEVICE
    new_process: Callable[[str, str, int], Process] = Process
    gpu: dict[str, Any] | None = None  # what it is
    processes: dict[tuple[str, int], Process] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    checks: dict[str, dict[str, str]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    zero_gradients: list[dict[str, Any]] = field(default_factory=list)
    expected: dict[bool, np.ndarray] = field(default_factory=dict)  # weights of plain, full check
    best_bound: str | None = None  # of the work at hand

    @property
    def ours(self) -> str:
        """Who is in every duel."""
        return OURS if self.device == "cpu" else OURS_TORCH

    def results(self) -> dict[str, Any]:
        """Everything so far, as JSON."""
        names = ("missing", "checks", "failures", "rows", "zero_gradients", "training", "gpu")
        return {"ours": self.ours, **{name: getattr(self, name) for name in names}}

    def fail(self, work: str, contestant: str, reason: object) -> str:
        """Record a failed row and return it as text."""
        self.failures.append({"work": work, "contestant": contestant, "reason": str(reason)})
        return f"not timed: {reason}"

    @property
    def has_faults(self) -> bool:
        return self.ours in self.missing or any(
            f["contestant"].startswith(OURS)
            or not f["reason"].removeprefix("FAILED: ").startswith(NO_FAULTS)
            for f in self.failures
        )

    def is_here(self, name: str) -> bool:
        """Start the contestant's process if it is new: whether it can, and does the same work."""
        if name in self.checks or name in self.missing:
            return name in self.checks
        begin = time.perf_counter()
        try:
            process = self.processes[name, self.threads] = self.new_process(
                name, self.device, self.threads
            )
            self.gpu = self.gpu or process.gpu
            checks = {"plain": self.check(process, False), "full": self.check(process, True)}
            self.checks[name] = checks
            for kind, verdict in checks.items():
                if not verdict.startswith("same"):
                    self.fail(f"check of a {kind} step", name, verdict)
                    process.end()  # another one for what comes
            verdict = ", ".join(f"{kind}: {v}" for kind, v in checks.items())
        except Failure as failure:
            self.missing[name] = str(failure)
            verdict = f"MISSING: {failure}"
        print(f"  {name:28s} {time.perf_counter() - begin:5.1f} s  {verdict}", flush=True)
        return name in self.checks

    def check(self, process: Process, full: bool) -> str:
        """Whether three steps do what the first Adamax' three steps do: nobody does other work."""
        rule = CONTESTANTS[process.name].rule
        if rule != "Adamax":
            return f"same traffic, {rule}"
        try:
            weights = np.array(process.ask("check", full=full)["weights"])
        except Failure as failure:
            return f"FAILED: {failure}"
        difference = np.abs(weights - self.expected.setdefault(full, weights)).max()
        # Negated, so that NaN differs, too.
        is_same = difference <= CONTESTANTS[process.name].tolerance * RATE
        return "same weights" if is_same else f"DIFFERENT by {difference:.1e}"

    def process(self, entry: Entry) -> Process:
        """Return the running process for `entry`, a new one if an earlier work has ended it."""
        name, threads = entry.contestant, entry.threads
        verdict = self.checks[name]["full" if entry.work.full else "plain"]
        if not verdict.startswith("same"):
            raise Failure(verdict)
        known = self.processes.get((name, threads))
        if known is None or known.process.poll() is not None:
            known = self.new_process(name, self.device, threads)
            self.processes[name, threads] = known
        return known

    def prepare(self, entry: Entry) -> tuple[Process, dict[str, Any]]:
        process = self.process(entry)
        is_bound = entry.contestant == self.ours and not entry.work.host
        bound = self.bound if is_bound else None
        ready = process.ask("setup", work=entry.work.to_json(), bound=bound)
        return process, ready

    # ---- Duels -----------------------------------------------------------------------------------

    def duels(self, entries: Sequence[Entry]) -> Iterator[str]:
        """Do the duels of all with the first, the anchor, yielding a line on each."""
        anchor: Process | None = None
        work = entries[0].work
        for entry in entries:
            if not self.is_here(entry.contestant):
                yield "missing"  # said once, and in the report
                continue
            try:
                if entry.contestant == self.ours and entry.threads == self.threads:
                    anchor, ready = self.prepare(entry)
                    variants = {turn: (anchor, turn) for turn in ready["turns"]}
                    least = LEAST_ROUNDS if self.quick else LEAST_ROUNDS_OF_BOUND
                    times = self.rounds(variants, least)
                    self.best_bound = self.bound_of(times, ready["turns"])
                    peak = {}  # measured at the end
                    if self.best_bound and self.bound == ON_DEVICE:
                        self.add_bound(work, ready, times)
                else:
                    peer, ready = self.prepare(entry)
                    try:
                        times = self.duel(anchor, peer)
                    finally:
                        if peer.process.poll() is None:
                            peak = peer.ask("teardown")
                yield self.add_row(entry, ready, times, peak.get("peak_bytes"))
            except Failure as failure:
                reason = str(failure)
                if failure.process:  # after some faults a GPU does nothing for it any more
                    failure.process.end()
                    if failure.process is anchor:
                        anchor, reason = None, f"{failure.process.name}: {failure}"
                yield self.fail(entry.work.name, entry.contestant, reason)
        if anchor is None:
            return
        try:
            peak = anchor.ask("teardown")
        except Failure as failure:
            self.fail(work.name, anchor.name, failure)
            anchor.end()
            return
        for row in self.rows:
            own = row["contestant"] == self.ours and row["threads"] == self.threads
            if row["work"] == work.name and own:
                row |= peak

    def rounds(
        self, sides: dict[str, tuple[Process, str]], least: int = LEAST_ROUNDS
    ) -> dict[str, list[float]]:
        """Let each side take a turn in each round, in alternating order."""
        most = 5 if self.quick else 40
        budget = 0.3 if self.quick else 3.0 if self.device == "cpu" else 1.0  # seconds
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        order = list(sides.items())
        for _, (process, turn) in order:
            process.ask("turn", name=turn)
        start = time.perf_counter()
        for done in range(most):
            if done >= least and time.perf_counter() - start > budget:
                break
            for name, (process, turn) in order:
                seconds[name].append(process.ask("turn", name=turn)["seconds"])
            order.reverse()
        return seconds

    def bound_of(self, times: dict[str, list[float]], turns: Sequence[str]) -> str | None:
        """Take the best variants in `times` as the bounds, and return the name of the first's."""
        names = []
        for bound in ("bound", "aligned bound"):
            variants = [turn for turn in turns if turn.startswith(bound)]
            if variants:
                names.append(min(variants, key=lambda turn: statistics.median(times[turn])))
                times[bound] = times[names[-1]]
        return names[0] if names else None

    def duel(self, anchor: Process | None, peer: Process) -> dict[str, list[float]]:
        sides = {"step": (peer, "step")}
        if anchor is not None:
            sides["ours"] = (anchor, "step")
        if anchor is not None and self.best_bound is not None and anchor.threads == peer.threads:
            sides["bound"] = (anchor, self.best_bound)
        return self.rounds(sides)

    def add_row(
        self,
        entry: Entry,
        ready: dict[str, Any],
        times: dict[str, list[float]],
        peak_bytes: int | None,
    ) -> str:
        """Record a row and return it as text."""
        work, kind, seconds = entry.work, CONTESTANTS.get(entry.contestant), times["step"]
        ours = times.get("ours")
        ratio = ours and quartiles([a / b for a, b in zip(seconds, ours, strict=True)])
        fraction, aligned = (
            times.get(bound)
            and quartiles([b / a for a, b in zip(seconds, times[bound], strict=True)])
            for bound in ("bound", "aligned bound")
        )
        row: dict[str, Any] = {
            "work": work.name,
            "arrays": len(work.shapes),
            "elements": work.elements,
            "dtype": work.dtype,
            "full": work.full,
            "threads": entry.threads,
            "contestant": entry.contestant,
            "rule": kind.rule if kind else None,
            "timer": ready["timer"],
            "in_l2": self.gpu is not None and ready["memory_bytes"] <= self.gpu["l2_bytes"],
            "state_bytes": ready["state_bytes"],
            "bytes_per_element": ready["bytes_per_element"],
            "seconds": quartiles(seconds),
            "ratio_to_ours": ratio,
            "fraction_of_bound": fraction,
            "fraction_of_aligned_bound": aligned,
            "peak_bytes": peak_bytes,
            "raw": {"seconds": seconds, **{k: times[k] for k in ("ours", "bound") if k in times}},
        }
        self.rows.append(row)
        text = seconds_text(row["seconds"])
        if ratio:
            text += f", {ratio['median']:.2f} x adamax_ext"
        if fraction:
            text += f", {fraction['median']:.2f} of the bound"
        return f"{text} ({len(seconds)} rounds)"

    def add_bound(self, work: Work, ready: dict[str, Any], times: dict[str, list[float]]) -> None:
        """Record the bound of a device in a row of its own, as one more contestant."""
        assert self.best_bound is not None
        name = self.best_bound.removeprefix("bound: ")
        self.checks.setdefault(name, dict.fromkeys(("plain", "full"), "same traffic, no rule"))
        bound = {"step": times["bound"], "ours": times["step"]}
        self.add_row(Entry(work, name, self.threads), ready, bound, None)

    # ---- The other measurements ------------------------------------------------------------------

    def zeros(self, name: str) -> str:
        """Gradients that stay zero: the state decays towards subnormal numbers."""
        elements, steps, ends = 2**16, 1200, 100
        if not self.is_here(name):
            return "missing"
        try:
            process = self.process(Entry(Work("zero gradients", ()), name, self.threads))
            seconds = process.ask("zero_gradients", elements=elements, steps=steps)["seconds"]
        except Failure as failure:
            return self.fail("zero gradients", name, failure)
        first, last = quartiles(seconds[:ends]), quartiles(seconds[-ends:])
        ratio = last["median"] / first["median"]
        row = {"contestant": name, "elements": elements, "steps": steps, "last_to_first": ratio}
        self.zero_gradients.append({**row, "first": first, "last": last})
        return f"last {ends} of {steps} steps against first {ends}: {ratio:.3f}"

    def train(self, name: str) -> str:
        """Time to a trained model."""
        if not self.is_here(name):
            return "missing"
        try:
            process = self.process(Entry(Work("training", ()), name, self.threads))
            result = process.ask("train")
        except Failure as failure:
            return self.fail("training", name, failure)
        self.training.append({"contestant": name, **result})
        return (
            f"{result['accuracy']:.2%} after {result['epochs']} epochs, "
            f"{result['total_seconds']:.2f} s, {result['step_seconds']['sum']:.3f} s in steps"
        )
