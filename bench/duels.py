"""Duels: two processes take turns on the same work, and the bound with them."""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from contestants import CONTESTANTS
from contestants.base import EPSILON, RATE, Work
from process import Failure, Process
from rows import OURS, seconds_text

GPU_BOUND = "device copy"
LEAST_ROUNDS, LEAST_ROUNDS_OF_BOUND = 3, 10
# A step of three, of size RATE, may differ by this: rounding, and the two places of epsilon.
TOLERANCE = 2e-4 * RATE
assert EPSILON < TOLERANCE


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
    bound_library: str | None
    anchor_name: str = OURS  # who is in every duel
    processes: dict[tuple[str, int], Process] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    checks: dict[str, dict[str, str]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    zero_gradients: list[dict[str, Any]] = field(default_factory=list)
    expected: dict[bool, np.ndarray] = field(default_factory=dict)  # weights of plain, full check
    best_bound: str | None = None  # of the work at hand

    def start(self, names: Iterable[str]) -> None:
        """Start the contestants' processes; name those that cannot, or do another work."""
        for name in names:
            begin = time.perf_counter()
            try:
                if self.device not in CONTESTANTS[name].devices:
                    raise Failure(f"does not run on {self.device}")
                process = self.processes[name, self.threads] = Process(
                    name, self.device, self.threads
                )
                self.checks[name] = {
                    "full" if full else "plain": self.check(process, full) for full in (False, True)
                }
                verdict = ", ".join(f"{kind}: {v}" for kind, v in self.checks[name].items())
            except Failure as failure:
                self.missing[name] = str(failure)
                verdict = f"MISSING: {failure}"
            seconds = time.perf_counter() - begin
            print(f"  {name:28s} {seconds:5.1f} s  {verdict}", flush=True)

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
        return "same weights" if difference <= TOLERANCE else f"DIFFERENT by {difference:.1e}"

    def process(self, entry: Entry) -> Process:
        """Return the running process for `entry`, a new one if an earlier work has ended it."""
        name, threads = entry.contestant, entry.threads
        if name in self.missing:
            raise Failure(self.missing[name])
        verdict = self.checks[name]["full" if entry.work.full else "plain"]
        if not verdict.startswith("same"):
            raise Failure(verdict)
        known = self.processes.get((name, threads))
        if known is None or known.process.poll() is not None:
            known = self.processes[name, threads] = Process(name, self.device, threads)
        return known

    def prepare(self, entry: Entry) -> tuple[Process, dict[str, Any]]:
        process = self.process(entry)
        library = self.bound_library if entry.contestant == OURS else None
        ready = process.ask("setup", work=entry.work.to_json(), bound_library=library)
        return process, ready

    # ---- Duels -----------------------------------------------------------------------------------

    def work(self, work: Work, entries: Sequence[Entry]) -> Iterator[str]:
        """Do the duels of a work, yielding a line on each; the anchor comes first."""
        anchor: Process | None = None
        for entry in entries:
            try:
                if entry.contestant == self.anchor_name and entry.threads == self.threads:
                    anchor, ready = self.prepare(entry)
                    times = self.alone(anchor, ready["turns"])
                    self.best_bound = self.bound_of(times, ready["turns"])
                    peak = {}  # measured at the end
                else:
                    peer, ready = self.prepare(entry)
                    try:
                        times = self.duel(anchor, peer)
                    finally:
                        if peer.process.poll() is None:
                            peak = peer.ask("teardown")
                yield self.add_row(entry, ready, times, peak.get("peak_bytes"))
            except Failure as failure:
                self.failures.append(
                    {"work": work.name, "contestant": entry.contestant, "reason": str(failure)}
                )
                yield f"not timed: {failure}"
        if anchor is not None and anchor.process.poll() is None:
            peak = anchor.ask("teardown")
            for row in self.rows:
                own = row["contestant"] == self.anchor_name and row["threads"] == self.threads
                if row["work"] == work.name and own:
                    row |= peak

    @property
    def budget(self) -> float:
        """Seconds of rounds in a duel."""
        return 0.3 if self.quick else 3.0

    def rounds(
        self, sides: dict[str, tuple[Process, str]], least: int = LEAST_ROUNDS
    ) -> dict[str, list[float]]:
        """Let each side take a turn in each round, in alternating order."""
        most = 5 if self.quick else 40
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        order = list(sides.items())
        for _, (process, turn) in order:
            process.ask("turn", name=turn)
        start = time.perf_counter()
        for done in range(most):
            if done >= least and time.perf_counter() - start > self.budget:
                break
            for name, (process, turn) in order:
                seconds[name].append(process.ask("turn", name=turn)["seconds"])
            order.reverse()
        return seconds

    def alone(self, anchor: Process, turns: Sequence[str]) -> dict[str, list[float]]:
        """The anchor beside all variants of the bound."""
        least = LEAST_ROUNDS if self.quick else LEAST_ROUNDS_OF_BOUND
        return self.rounds({turn: (anchor, turn) for turn in turns}, least)

    def bound_of(self, times: dict[str, list[float]], turns: Sequence[str]) -> str | None:
        """Take the best variant in `times` as the bound, and return its name."""
        if self.anchor_name == GPU_BOUND:
            times["bound"] = times["step"]
            return "step"
        variants = [turn for turn in turns if turn.startswith("bound")]
        if not variants:
            return None
        best = min(variants, key=lambda turn: statistics.median(times[turn]))
        times["bound"] = times[best]
        return best

    def duel(self, anchor: Process | None, peer: Process) -> dict[str, list[float]]:
        sides = {"step": (peer, "step")}
        if anchor is not None and self.anchor_name != GPU_BOUND:
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
        work, seconds = entry.work, times["step"]
        ours, bound = times.get("ours"), times.get("bound")
        ratio = [a / b for a, b in zip(seconds, ours, strict=True)] if ours else None
        fraction = [b / a for a, b in zip(seconds, bound, strict=True)] if bound else None
        self.rows.append(
            {
                "work": work.name,
                "arrays": len(work.shapes),
                "elements": work.elements,
                "dtype": work.dtype,
                "full": work.full,
                "threads": entry.threads,
                "contestant": entry.contestant,
                "rule": CONTESTANTS[entry.contestant].rule,
                "state_bytes": ready["state_bytes"],
                "bytes_per_element": ready["bytes_per_element"],
                "seconds": quartiles(seconds),
                "ratio_to_ours": quartiles(ratio),
                "fraction_of_bound": quartiles(fraction),
                "peak_bytes": peak_bytes,
                "raw": {
                    "seconds": seconds,
                    **({"ours": ours} if ours else {}),
                    **({"bound": bound} if bound else {}),
                },
            }
        )
        text = seconds_text(self.rows[-1]["seconds"])
        if ratio:
            text += f", {statistics.median(ratio):.2f} x adamax_ext"
        if fraction:
            text += f", {statistics.median(fraction):.2f} of the bound"
        return f"{text} ({len(seconds)} rounds)"

    # ---- The other measurements ------------------------------------------------------------------

    def zeros(self, name: str) -> str:
        """Gradients that stay zero: the state decays towards subnormal numbers."""
        elements, steps, ends = 2**16, 1200, 100
        try:
            process = self.process(Entry(Work("zero gradients", ()), name, self.threads))
            seconds = process.ask("zero_gradients", elements=elements, steps=steps)["seconds"]
        except Failure as failure:
            self.failures.append(
                {"work": "zero gradients", "contestant": name, "reason": str(failure)}
            )
            return f"not timed: {failure}"
        first, last = seconds[:ends], seconds[-ends:]
        ratio = statistics.median(last) / statistics.median(first)
        self.zero_gradients.append(
            {
                "contestant": name,
                "elements": elements,
                "steps": steps,
                "first": quartiles(first),
                "last": quartiles(last),
                "last_to_first": ratio,
            }
        )
        return f"last {ends} of {steps} steps against first {ends}: {ratio:.3f}"

    def train(self, name: str) -> str:
        """Time to a trained model."""
        try:
            process = self.process(Entry(Work("training", ()), name, self.threads))
            result = process.ask("train")
        except Failure as failure:
            self.failures.append({"work": "training", "contestant": name, "reason": str(failure)})
            return f"not timed: {failure}"
        self.training.append({"contestant": name, **result})
        return (
            f"{result['accuracy']:.2%} after {result['epochs']} epochs, "
            f"{result['total_seconds']:.2f} s, {result['step_seconds']['sum']:.3f} s in steps"
        )


def quartiles(values: Sequence[float] | None) -> dict[str, float] | None:
    if not values:
        return None
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {
        "median": float(median),
        "low": float(low),
        "high": float(high),
        "rounds": len(values),
    }
