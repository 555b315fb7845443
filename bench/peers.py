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
weights, step, and average the weights. Steps follow each other; those "after backward" come, as in
training, each after a pass (not timed) over other memory that makes new gradients.
"""

import argparse
import datetime
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import adamax_ext
import report
from contestants import CONTESTANTS
from contestants.base import Work
from duels import GPU_BOUND, Entry, Run
from machine import default_path, machine, versions
from rows import OURS

HERE = Path(__file__).parent
OURS_TORCH, OURS_FLAT = "adamax_ext, torch tensors", "adamax_ext, one flat array"
PEERS = [name for name in CONTESTANTS if not name.startswith("adamax_ext") and name != GPU_BOUND]

GPT2_BLOCK = (
    *((768,), (768,), (768, 2304), (2304,), (768, 768), (768,)),
    *((768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)),
)
GPT2_SMALL = ((50257, 768), (1024, 768), *(GPT2_BLOCK * 12), (768,), (768,))


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
    for backward in (False, True):
        name = f"{many} x 256{' after backward' * backward}"
        add(Work(name, ((256,),) * many, after_backward=backward), *everyone)
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
