"""Results as Markdown tables and plots.

Run as ``python bench/report.py RESULTS.json ...``: prints the tables, and writes them and the plots
beside each file. Reads what bench/peers.py and the harness of bench/cpp (Google Benchmark) write.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from goals import goals
from machine import machine_text
from plots import draw
from rows import Row, Rows, comparable_seconds, l2_mark, ratio_text, seconds_text, table

# ---- Tables of bench/peers.py --------------------------------------------------------------------


def peak_text(row: Row) -> str:
    if row["peak_bytes"] is None or row["elements"] < 2**20:
        return ""  # too few to be seen beside everything else
    return f"{row['peak_bytes'] / row['elements']:.1f}"


def work_table(results: dict[str, Any], rows: list[Row]) -> str:
    lines = []
    own = Rows(results).own(rows[0]["work"])
    for row in sorted(rows, key=lambda row: comparable_seconds(row, own)):
        verdict = results["checks"][row["contestant"]]["full" if row["full"] else "plain"]
        if row.get("timer") != rows[0].get("timer"):
            verdict += f"; {row['timer']}"
        if row["state_bytes"] != rows[0]["state_bytes"]:
            verdict += f"; state of {row['state_bytes']} bytes"
        threads = f" ({row['threads']} thread)" if row["threads"] != results["threads"] else ""
        lines.append(
            [
                row["contestant"] + threads,
                seconds_text(row["seconds"]),
                ratio_text(row["ratio_to_ours"]),
                ratio_text(row["fraction_of_bound"]),
                str(row["bytes_per_element"]),
                peak_text(row),
                verdict,
            ]
        )
    header = ["contestant", "time of a step", "times ours", "of the bound", "bytes an element"]
    return table([*header, "peak memory, bytes an element", "check"], lines)


def curve_table(rows: Rows) -> str:
    lines = []
    for row in rows.curve(rows.ours):
        seconds = row["seconds"]["median"]
        lines.append(
            [
                f"{row['elements']:,}{l2_mark(row)}",
                seconds_text(row["seconds"]),
                f"{seconds / row['elements'] * 1e9:.3f}",
                f"{row['bytes_per_element'] * row['elements'] / seconds / 1e9:.1f}",
                ratio_text(row["fraction_of_bound"]),
            ]
        )
    return table(["elements", "time", "ns an element", "GB/s", "of the bound"], lines)


def device_text(gpu: dict[str, Any]) -> str:
    memory, l2 = gpu["memory_bytes"] / 2**30, gpu["l2_bytes"] / 2**20
    return (
        f"{gpu['name']}, {memory:.0f} GiB, L2 of {l2:.0f} MiB; driver and greatest clocks "
        f"{gpu['driver_and_clocks']}. Times are the device's: of steps queued behind a sleep, by "
        "events. Host time is until a step's call returns, with nothing queued before. The bound "
        "is a copy on the device of as many bytes as a step reads and writes; of the norm, which "
        "waits for its result, a copy or a read, whichever is faster. What is marked as in L2 "
        "touches no more memory than that holds, and says nothing of the memory behind.\n"
    )


def peers_report(results: dict[str, Any]) -> str:
    rows = Rows(results)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    build = ", ".join(f"{key} {value}" for key, value in results["build_info"].items())
    parts = [
        f"# adamax_ext and its peers, {results['date'][:10]}\n",
        f"{machine_text(results['machine'])}; device {results['device']}, "
        f"{results['threads']} threads.\n",
        *([device_text(results["gpu"])] if results.get("gpu") else []),
        f"Versions: {versions}.\n",
        f"Build: {build}.\n",
        f"`{results['command']}`, {results['wall_seconds']:.0f} s. Medians, in parentheses "
        "quartiles. A ratio is the median of the ratios within rounds: the machine's speed drifts, "
        "so times of different contestants tell less. The bound is the same memory traffic without "
        "arithmetic. Peak memory is what a work added to its process; what a library kept from an "
        "earlier work is not in it.\n",
    ]
    if not results.get("complete", True):
        parts += ["**The run was cut short.**\n"]
    parts += ["## What is promised\n", goals(results)]
    if results["missing"]:
        parts += ["## Missing\n"]
        parts += [f"- {name}: {reason}" for name, reason in results["missing"].items()] + [""]
    if rows.curve(rows.ours):
        parts += ["## Cost against size (plain step)\n", curve_table(rows)]
    for work in rows.works():
        members = rows.of(work)
        if len(members) > 1:
            arrays = f"{members[0]['arrays']:,} arrays, " if members[0]["arrays"] > 1 else ""
            size = f"{arrays}{members[0]['elements']:,} elements"
            title = f"## {work}{l2_mark(members[0])} ({size})\n"
            parts += [title, work_table(results, members)]
    if results["zero_gradients"]:
        lines = []
        for z in results["zero_gradients"]:
            ends = [seconds_text(z[end]) for end in ("first", "last")]
            lines.append([z["contestant"], *ends, f"{z['last_to_first']:.3f}"])
        header = ["contestant", "first 100 steps", "last 100 of 1,200", "ratio"]
        parts += ["## Zero gradients\n", table(header, lines)]
    if results["training"]:
        target = results["training"][0]["target"]
        lines = [
            [
                t["contestant"],
                f"{t['step_seconds']['sum']:.3f}",
                f"{t['step_seconds']['median'] * 1e6:.0f}",
                f"{t['total_seconds']:.2f}",
                str(t["epochs"]),
                f"{t['accuracy']:.2%}" + ("" if t["accuracy"] >= target else " (missed)"),
            ]
            for t in results["training"]
        ]
        header = ["optimizer", "its seconds (compilation, too)", "median step, µs"]
        header += ["total seconds", "epochs", "test accuracy"]
        parts += [
            "## Time to a trained model\n",
            f"The network of `python -m adamax_ext demo` in NumPy until {target:.0%} of the test "
            "images are right: plain steps, constant rate, the same batches.\n",
            table(header, lines),
        ]
    if results["failures"]:
        parts += ["## Not timed\n"]
        parts += [f"- {f['work']}, {f['contestant']}: {f['reason']}" for f in results["failures"]]
    return "\n".join(parts)


# ---- Google Benchmark ----------------------------------------------------------------------------


def harness_name(name: str) -> tuple[str, dict[str, str]]:
    """Split ``KIND/key:value/key:value``, without what Google Benchmark adds at the end."""
    kind, *parts = name.split("/")
    pairs = [part.split(":", 1) for part in parts if ":" in part]
    return kind, {key: value for key, value in pairs if key not in ("iterations", "repeats")}


# What is promised of the native step, without Python, on several threads: the benchmark's name, and
# the least of its bound.
_SIZE = r"/isa:\w+/threads:(?!1/)\d+/elements:"
_STEP = "step/pair:bfloat16-bfloat16/work:plain"
HARNESS_PROMISES = (
    ("plain step in L2, 2^14", f"size{_SIZE}{2**14}", 0.8),
    ("plain step, 2^24", f"size{_SIZE}{2**24}", 0.97),
    ("plain step, 2^26", f"size{_SIZE}{2**26}", 0.97),
    ("full step, 2^24", f"full/pair:float32-float32{_SIZE}{2**24}", 0.93),
    ("bfloat16 weights and gradients, 2^24", f"{_STEP}{_SIZE}{2**24}", 0.9),
)


def fraction_text(row: Row) -> str:
    median, low, high = (row[f"fraction_{key}"] for key in ("of_bound", "low", "high"))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def harness_promises(rows: Sequence[Row]) -> str:
    lines = []
    for what, name, goal in HARNESS_PROMISES:
        for row in rows:
            if re.match(f"{name}/", row["run_name"]):
                met = "yes" if row["fraction_of_bound"] >= goal else "**no**"
                lines.append([what, f"{goal:g}", fraction_text(row), met])
    return table(["promise, of the bound", "at least", "measured (quartiles)", "met"], lines)


# Bytes that a step moves an element, of weights without their state.
_OF_WEIGHTS = {
    ("float32-float32", "nearest"): 12,
    ("bfloat16-bfloat16", "nearest"): 6,
    ("bfloat16-bfloat16", "stochastic"): 6,
    ("bfloat16-bfloat16", "remainder"): 10,
}


def low_memory_promises(members: Sequence[tuple[dict[str, str], Row]]) -> str:
    """Return a table: the time of a step in memory, and the most that it may be.

    That is 1.15 times the larger of the float32 step's by the bytes that it moves, and of its own
    time an element in L2 on as many threads.
    """
    costs = {tuple(settings.values()): row["ns_per_element"] for settings, row in members}
    lines = []
    for key, cost in costs.items():
        pair, state, weights, isa, threads, elements = key
        in_l2 = costs.get((*key[:5], f"{2**16 * int(threads)}"))
        full = costs.get(("float32-float32", "32", "nearest", isa, threads, elements))
        if elements != f"{2**24}" or threads == "1" or in_l2 is None or full is None:
            continue
        by_bytes = full * (_OF_WEIGHTS[pair, weights] + int(state) // 2) / 28
        limit = max(by_bytes, in_l2)
        what = "bytes" if by_bytes >= in_l2 else "arithmetic"
        met = "yes" if cost <= 1.15 * limit else "**no**"
        times = [f"{full / cost:.2f}", what, f"{cost / limit:.2f}", met]
        lines.append([pair, state, weights, isa, f"{cost:.3f}", *times])
    header = ["pair", "state", "weights", "isa", "ns an element", "times as fast as float32"]
    return table([*header, "limit", "in times of it (at most 1.15)", "met"], lines)


def harness_report(results: dict[str, Any]) -> str:
    context = results["context"]
    known = ("num_cpus", "mhz_per_cpu", "library_version", "isas", "compiler")
    facts = ", ".join(f"{key} {context[key]}" for key in known if key in context)
    parts = [f"# The native harness, {context['date'][:10]}\n", f"{facts}.\n"]
    # Of a repeated benchmark the median alone.
    benchmarks = [
        benchmark
        for benchmark in results["benchmarks"]
        if benchmark.get("aggregate_name")
        == ("median" if benchmark.get("repetitions", 1) > 1 else None)
    ]
    groups: dict[str, list[tuple[dict[str, str], Row]]] = defaultdict(list)
    for benchmark in benchmarks:
        kind, settings = harness_name(benchmark["run_name"])
        groups[kind].append((settings, benchmark))
    parts += ["## What is promised\n", harness_promises(benchmarks)]
    for kind, members in groups.items():
        keys = list(dict.fromkeys(key for settings, _ in members for key in settings))
        lines = []
        for settings, row in members:
            fraction = fraction_text(row) if "fraction_of_bound" in row else ""
            time = f"{row['real_time']:.4g} {row['time_unit']}"
            cost = f"{row['ns_per_element']:.3f}"
            speed = f"{row['bytes_per_second'] / 1e9:.1f}" if "bytes_per_second" in row else ""
            lines.append([*(settings.get(key, "") for key in keys), time, cost, speed, fraction])
        header = [*keys, "time", "ns an element", "GB/s", "of the bound"]
        parts += [f"## {kind}\n", table(header, lines)]
        if kind == "low":
            parts += ["What is promised of them:\n", low_memory_promises(members)]
    return "\n".join(parts)


# ---- Files ---------------------------------------------------------------------------------------


def show(path: Path) -> int:
    """Print the report of the results in `path`; write it and the plots beside."""
    results, stem = json.loads(path.read_text()), path.with_suffix("")
    if "benchmarks" in results:
        text, plots = harness_report(results), []
    elif results.get("format") == 1:
        text, plots = peers_report(results), draw(results, stem)
    else:
        raise ValueError(f"{path} is neither of bench/peers.py (format 1) nor of Google Benchmark")
    for plot in plots:
        label = re.sub(r".*-", "", plot.stem)
        text += f"\n![{label}]({plot.name})"
    print(text)
    stem.with_suffix(".md").write_text(text.rstrip() + "\n")
    return 0


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    for path in arguments:
        show(Path(path))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
