"""adamax_ext beside its peers: the same works, in turns, each library in a process of its own.

Run as ``python bench/peers.py`` after ``pip install ".[bench]"``, with a C++ compiler. Prints a
line for each duel and the time left, writes JSON as rows come, and shows it by bench/report.py. A
contestant that fails is named, the run goes on, and its exit status is 1. ``--quick`` is a check of
a minute or two, for peers.py itself: its figures mean little.

A duel is one contestant against adamax_ext: both have their arrays in memory, and in each round
each takes a turn, and so does the bound, the same memory traffic without arithmetic. The machine's
speed drifts by more than the differences of interest; so a ratio is the median of the rounds'
ratios. Keep the machine idle: a library whose threads wait for each other stops where one core is
taken.

The full step is: divide the gradients by the loss scale, clip them by their global norm, decay the
weights, step, and average the weights. Steps follow each other; those "after backward" come, as in
training, each after a pass (not timed) over other memory that makes new gradients. On a CPU what is
done in groups of parameters takes turns with adamax_ext in one group.

With ``--device cuda`` the bound is a copy on the device. Times are the device's, by events around
steps that are queued behind a sleep; those of JAX and TensorFlow are the host's. The time until a
step's call returns is a work of its own. What stays in the GPU's L2 is marked.
"""

import argparse
import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import adamax_ext
import report
from duels import ON_DEVICE, Run
from machine import default_name, machine, versions
from process import Process
from rows import FOREACH, FUSED
from works import PEERS, plan

HERE = Path(__file__).parent


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


def measure(run: Run, only: str, save: Callable[[], None]) -> None:
    """Do everything whose "work / contestant" matches the expression `only`."""

    def wanted(work: str, name: str) -> bool:
        return re.search(only, f"{work} / {name}") is not None

    works = []
    for ours, *others in plan(run.device, run.threads, run.quick):
        others = [entry for entry in others if wanted(entry.work.name, entry.contestant)]
        if others or wanted(ours.work.name, ours.contestant):
            works.append([ours, *others])
    on_host = run.device == "cpu"
    zeros = [name for name in (run.ours, FOREACH, FUSED) if on_host]
    zeros = [name for name in zeros if wanted("zero gradients", name)]
    training = [name for name in (run.ours, *PEERS) if on_host and wanted("training", name)]
    count = sum(len(work) for work in works) + len(zeros) + len(training)
    done, began = 0, time.perf_counter()

    def tell(title: str, text: str) -> None:
        nonlocal done
        save()
        done += 1
        left = (time.perf_counter() - began) / done * (count - done)
        print(f"[{done:3d}/{count}] {title:44s} {text}; {left / 60:.1f} min left", flush=True)

    print("Adamax contestants are checked against the first one as they start:")
    run.is_here(run.ours)
    for entries in works:
        for entry, text in zip(entries, run.duels(entries), strict=True):
            tell(f"{entry.work.name}: {entry.contestant}, {entry.threads} threads", text)
    for name in zeros:
        tell(f"zero gradients: {name}", run.zeros(name))
    for name in training:
        tell(f"training: {name}", run.train(name))


def main(
    arguments: Sequence[str] | None = None,
    new_process: Callable[[str, str, int], Process] = Process,
) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=cores, help=f"of each library ({cores})")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--only", default="", help='expression to find in "work / contestant"')
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="JSON file, or a folder for one"
    )
    options = parser.parse_args(arguments)
    out: Path = options.out
    if out.suffix != ".json":
        out /= default_name(options.device)
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    about = {
        "format": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "device": options.device,
        "threads": options.threads,
        "machine": machine(),
        "versions": versions(),
        "build_info": adamax_ext.build_info(),
    }

    def save(complete: bool = False) -> None:
        """Write what there is so far: a run may be cut."""
        seconds = {"wall_seconds": time.perf_counter() - start, "complete": complete}
        out.with_suffix(".part").write_text(
            json.dumps({**about, **seconds, **run.results()}, indent=1) + "\n"
        )
        out.with_suffix(".part").replace(out)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    complete = False
    with tempfile.TemporaryDirectory() as folder:
        bound = build_bound(folder) if options.device == "cpu" else ON_DEVICE
        run = Run(options.device, options.threads, options.quick, bound, new_process)
        try:
            measure(run, options.only, save)
            complete = True
        except KeyboardInterrupt:
            print("cut short")
        finally:
            for process in run.processes.values():
                process.end()
    save(complete)
    print(f"\n{out}: {math.ceil(time.perf_counter() - start)} s\n")
    report.show(out)
    return 1 if run.has_faults or not complete else 0


if __name__ == "__main__":
    sys.exit(main())
