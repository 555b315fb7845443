"""What a change did: each measurement of two result files, with the bounds of noise.

Run as ``python bench/compare.py OLD.json NEW.json``. Reads what bench/peers.py and the harness of
bench/cpp (Google Benchmark, with ``--benchmark_repetitions=5`` or more) write. The interval is the
middle 95 % of the ratios of medians when rounds (of the harness: repetitions) are drawn again from
both files; a change is marked if 1 is outside. Rounds of one run share that run's luck: repeat both
before believing a small change.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rows import table

DRAWS = 2000
Samples = dict[str, list[float]]


def samples(path: Path) -> Samples:
    """Return the repeated measurements of a file by name: times, and times as shares of a bound."""
    results = json.loads(path.read_text())
    found: Samples = defaultdict(list)
    if "benchmarks" in results:
        for row in results["benchmarks"]:
            if row["run_type"] == "iteration":
                found[f"{row['run_name']}: time"].append(row["real_time"])
                if "fraction_of_bound" in row:
                    found[f"{row['run_name']}: time to the bound's"].append(
                        1 / row["fraction_of_bound"]
                    )
        return found
    for row in results["rows"]:
        name = f"{row['work']}, {row['contestant']}, {row['threads']} threads"
        found[f"{name}: time"] = row["raw"]["seconds"]
        # Both sides of these ratios met the same machine, round by round: much less noise.
        for other, title in (("bound", "time to the bound's"), ("ours", "time to adamax_ext's")):
            if other in row["raw"]:
                pairs = zip(row["raw"]["seconds"], row["raw"][other], strict=True)
                found[f"{name}: {title}"] = [a / b for a, b in pairs]
    return found


def change(old: Sequence[float], new: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of medians, new to old, and its bootstrap interval."""
    rng = np.random.default_rng(0)

    def medians(values: Sequence[float]) -> Any:
        return np.median(rng.choice(np.asarray(values), (DRAWS, len(values))), axis=1)

    low, high = np.quantile(medians(new) / medians(old), (0.025, 0.975))
    return float(np.median(new) / np.median(old)), float(low), float(high)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        print(__doc__)
        return 2
    old, new = (samples(Path(argument)) for argument in arguments)
    lines = []
    for name in old.keys() & new.keys():
        ratio, low, high = change(old[name], new[name])
        if min(len(old[name]), len(new[name])) < 3:
            lines.append([name, f"{ratio:.3f}", "", "too few rounds to tell"])
            continue
        verdict = "**slower**" if low > 1 else "**faster**" if high < 1 else "within noise"
        lines.append([name, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", verdict])
    print(table(["measurement", "new / old", "95 % interval", "change"], sorted(lines)))
    for title, names in (("old", old.keys() - new.keys()), ("new", new.keys() - old.keys())):
        for name in sorted(names):
            print(f"only in the {title} file: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
