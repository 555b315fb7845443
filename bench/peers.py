"""adamax_ext beside its peers: the same works, in turns, each library in a process of its own.

Run as ``python bench/peers.py`` after ``pip install ".[bench]"``, with a C++ compiler. Prints a
line for each duel and the time left, writes JSON, and shows it by bench/report.py. ``--quick`` is a
check of a minute or two, for peers.py itself: its figures mean little.

A duel is one contestant against adamax_ext: both have their arrays in memory, and in each round
each takes a turn, and so does the bound, the same memory traffic without arithmetic. The machine's
speed drifts by more than the differences of interest; so a ratio is the median of the rounds'
ratios. Keep the machine idle: a library whose threads wait for each other stops where one core is
taken.

The full step is: divide the gradients by the loss scale, clip them by their global norm, decay the
weights, step, and average the weights.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import adamax_ext
import numpy as np
import report
from contestants import CONTESTANTS, EPSILON, RATE, Work

HERE = Path(__file__).parent
OURS, OURS_TORCH, OURS_FLAT = (
    "adamax_ext",
    "adamax_ext, torch tensors",
    "adamax_ext, one flat array",
)
GPU_BOUND = "device copy"
PEERS = [name for name in CONTESTANTS if not name.startswith("adamax_ext") and name != GPU_BOUND]
ANSWER_TIMEOUT = 90.0  # seconds; a peer that compiles longer is named with that
START_TIMEOUT = 300.0  # DeepSpeed builds itself in about two minutes
LEAST_ROUNDS, LEAST_ROUNDS_OF_BOUND = 3, 10
# A step of three, of size RATE, may differ by this: rounding, and the two places of epsilon.
TOLERANCE = 2e-4 * RATE
assert EPSILON < TOLERANCE

GPT2_BLOCK = (
    *((768,), (768,), (768, 2304), (2304,), (768, 768), (768,)),
    *((768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)),
)
GPT2_SMALL = ((50257, 768), (1024, 768), *(GPT2_BLOCK * 12), (768,), (768,))


class Failure(Exception):
    """A contestant that is missing, or failed in a work, with its message."""


class Process:
    """A contestant's process."""

    def __init__(self, name: str, device: str, threads: int) -> None:
        self.name, self.threads = name, threads
        count = str(threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": count,
            # NumPy's BLAS serves the training alone; its threads spin for 20 ms after a product, on
            # the cores of the next optimizer step.
            "OPENBLAS_NUM_THREADS": "1",
            "ADAMAX_EXT_NUM_THREADS": count,
            "JAX_PLATFORMS": device,
            # JAX takes most of a GPU at its start, and others run beside it.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            # Compilers and builders of this environment, as of an activated one.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **CONTESTANTS[name].environment,
        }
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        cores = sorted(os.sched_getaffinity(0))
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "contestants.py"), name, device, count],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            text=True,
        )
        if threads < len(cores):  # the way to limit XLA's threads
            os.sched_setaffinity(self.process.pid, cores[:threads])
        self.ask("start", timeout=START_TIMEOUT)

    def ask(self, do: str, timeout: float = ANSWER_TIMEOUT, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its answer; raise Failure if there is none."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        if self.process.poll() is not None:
            raise Failure(f"has ended before: {self.last_error()}")
        stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        stdin.flush()
        if not select.select([stdout], [], [], timeout)[0]:
            self.end()
            raise Failure(f"no answer to {do} in {timeout:.0f} s")
        line = stdout.readline()
        if not line:
            raise Failure(f"exit status {self.process.wait()}: {self.last_error()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failure(answer["error"])
        return answer

    def last_error(self) -> str:
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        return lines[-1] if lines else "no message"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


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
        return "same result" if difference <= TOLERANCE else f"DIFFERENT by {difference:.1e}"

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
        text = report.seconds_text(self.rows[-1]["seconds"])
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


def power(exponent: int, **options: Any) -> Work:
    """One array of 2^exponent elements."""
    kind = "full" if options.get("full") else options.get("dtype", "plain")
    return Work(f"{kind} 2^{exponent}", ((2**exponent,),), **options)


def plan(device: str, threads: int, quick: bool, anchor: str) -> list[list[Entry]]:
    """Return the works, each a list of entries whose first is the anchor."""
    exponents = (10, 14, 20) if quick else range(10, 29)
    with_peers = (14,) if quick else (14, 20, 24, 26)
    one_thread = (14, 20) if quick else (14, 24)
    large, many = (20, 20) if quick else (24, 400)
    spare = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.5
    works: list[list[Entry]] = []

    def add(work: Work, *names: str) -> None:
        works.append([Entry(work, name, threads) for name in (anchor, *names)])

    everyone = [name for name in (OURS_TORCH, *PEERS) if name != anchor]
    for exponent in exponents:
        if device == "cpu" and 16 * 2**exponent > spare:
            print(f"2^{exponent} elements are left out: they would take half of the memory")
            continue
        add(power(exponent), *(everyone if exponent in with_peers else ()))
        if device == "cpu" and exponent in one_thread and threads > 1:
            works[-1].append(Entry(works[-1][0].work, OURS, 1))
    add(power(large, full=True), *everyone)
    add(power(large, dtype="bfloat16"), *everyone)
    add(Work(f"{many} x 256", ((256,),) * many), *everyone)
    if not quick:
        flat = (OURS_FLAT,) if device == "cpu" else ()
        add(Work("GPT-2 small", GPT2_SMALL), *flat, "torch AdamW, fused")
    return works


def build_bound(folder: str) -> str:
    """Build the library of the bound in `folder` and return its path."""
    source = str(HERE / "cpp")
    configure = ["cmake", "-S", source, "-B", folder]
    for command in (configure, ["cmake", "--build", folder, "--target", "bound"]):
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}")
    return f"{folder}/libbound.so"


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "os": platform.freedesktop_os_release().get("PRETTY_NAME", platform.system()),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Return the version of each contestant's packages; what is absent is named as missing."""
    imports = {name for kind in CONTESTANTS.values() for name in kind.packages}
    found = importlib.metadata.packages_distributions()
    names = sorted({distribution for name in imports for distribution in found.get(name, ())})
    return {name: importlib.metadata.version(name) for name in names}


def default_path(device: str) -> Path:
    kind = re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")
    today = datetime.date.today().isoformat()
    name = f"{kind}-{len(os.sched_getaffinity(0))}-cores-{device}-{today}.json"
    return HERE / "results" / name


def run_all(run: Run, only: str) -> None:
    """Do everything whose "work / contestant" matches the expression `only`."""

    def wanted(work: str, name: str) -> bool:
        return re.search(only, f"{work} / {name}") is not None

    print("starting (Adamax contestants are checked against each other):")
    ours = OURS if run.device == "cpu" else OURS_TORCH
    run.start([ours])
    if ours in run.missing:
        run.start([GPU_BOUND])
    run.anchor_name = ours if ours not in run.missing else GPU_BOUND
    works = []
    for anchor, *others in plan(run.device, run.threads, run.quick, run.anchor_name):
        others = [entry for entry in others if wanted(entry.work.name, entry.contestant)]
        if others or wanted(anchor.work.name, anchor.contestant):
            works.append([anchor, *others])
    zeros = [ours, "torch Adamax, foreach", "torch AdamW, fused"]
    zeros = [name for name in zeros if wanted("zero gradients", name)]
    training = [name for name in (ours, *PEERS) if wanted("training", name)]

    entered = {entry.contestant for work in works for entry in work} | {*zeros, *training}
    run.start(name for name in CONTESTANTS if name in entered - run.checks.keys() - {*run.missing})
    # Named above and in the report: no need to fail in each work.
    works = [[e for e in work if e.contestant not in run.missing] for work in works]
    works = [work for work in works if work]
    zeros, training = ([n for n in names if n not in run.missing] for names in (zeros, training))

    count = sum(len(work) for work in works) + len(zeros) + len(training)
    done, start = 0, time.perf_counter()

    def tell(title: str, text: str) -> None:
        nonlocal done
        done += 1
        left = (time.perf_counter() - start) / done * (count - done)
        print(f"[{done:3d}/{count}] {title:44s} {text}; {left / 60:.1f} min left", flush=True)

    for entries in works:
        lines = run.work(entries[0].work, entries)
        for entry, text in zip(entries, lines, strict=True):
            tell(f"{entry.work.name}: {entry.contestant}, {entry.threads} threads", text)
    for name in zeros:
        tell(f"zero gradients: {name}", run.zeros(name))
    for name in training:
        tell(f"training: {name}", run.train(name))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=cores, help=f"of each library ({cores})")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--only", default="", help='expression to find in "work / contestant"')
    parser.add_argument("--out", type=Path, help="JSON file; default: in bench/results")
    options = parser.parse_args()
    out = options.out or default_path(options.device)
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        library = build_bound(folder) if options.device == "cpu" else None
        run = Run(options.device, options.threads, options.quick, library)
        try:
            run_all(run, options.only)
        finally:
            for process in run.processes.values():
                process.end()
    results = {
        "format": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "wall_seconds": time.perf_counter() - start,
        "device": options.device,
        "threads": options.threads,
        "ours": run.anchor_name,
        "machine": machine(),
        "versions": versions(),
        "build_info": adamax_ext.build_info(),
        "missing": run.missing,
        "checks": run.checks,
        "failures": run.failures,
        "rows": run.rows,
        "zero_gradients": run.zero_gradients,
        "training": run.training,
    }
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{out}: {math.ceil(results['wall_seconds'])} s\n")
    return report.show(out)


if __name__ == "__main__":
    sys.exit(main())
