"""Device time of steps on a GPU against a copy of the same traffic; bench/gpu.sh calls it.

Everything is timed by CUDA events around steps that are queued behind a sleep, so that the host's
time to queue them is left out; median of many turns, ours and the others in turns. The bound is a
device-to-device copy that moves as many bytes as the step, reads and writes counted.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from contestants.base import BETA_1, BETA_2, EPSILON, FULL_OPTIONS, RATE
from peers import GPT2_SMALL

Step = Callable[[], object]
SLEEP_CYCLES = 60_000_000  # some 30 ms, in which the host queues the steps
GOALS = (  # work, how the number is found, what was asked
    ("plain 2^28", "of a copy", 0.92),
    ("plain 2^28", "torch AdamW, fused", 1.0),
    ("plain 2^28", "torch Adamax, foreach", 3.0),
    ("full 2^28", "of a copy", 0.88),
    ("400 x 256", "microseconds", 20.0),
)


class Bench:
    def __init__(self, turns: int) -> None:
        import torch

        self.torch, self.turns = torch, turns
        self.rows: list[dict[str, Any]] = []

    def device_seconds(self, step: Step, repeats: int) -> float:
        """Return the device time of a step."""
        cuda = self.torch.cuda
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        cuda._sleep(SLEEP_CYCLES)
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats

    def host_seconds(self, step: Step) -> float:
        """Return the time until the host has queued a step."""
        times = []
        for _ in range(50):
            self.torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        self.torch.cuda.synchronize()
        return statistics.median(times)

    def compare(self, work: str, traffic: int, steps: dict[str, Step]) -> None:
        """Time the steps and a copy of `traffic` bytes in turns, and add rows."""
        half = self.torch.empty(traffic // 2, dtype=self.torch.uint8, device="cuda")
        target = self.torch.empty_like(half)
        steps = {**steps, "copy": lambda: target.copy_(half)}
        repeats = {}
        for name, step in steps.items():
            for _ in range(3):
                step()
            seconds = self.device_seconds(step, 1)
            # No more than the sleep hides and the queue of launches holds.
            repeats[name] = max(1, min(8, int(0.02 / seconds)))
        samples: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(self.turns):
            for name, step in steps.items():
                samples[name].append(self.device_seconds(step, repeats[name]))
        copy = statistics.median(samples["copy"])
        for name, times in samples.items():
            median, spread = statistics.median(times), statistics.quantiles(times, n=4)
            row = {"work": work, "name": name, "seconds": median, "of_copy": copy / median}
            row |= {"quartiles": [spread[0], spread[2]], "traffic_bytes": traffic}
            row["host_seconds"] = self.host_seconds(steps[name])
            self.rows.append(row)
            print(
                f"{work:22} {name:24} {median * 1e6:10.1f} us  {copy / median:5.2f} of a copy"
                f"  {traffic / median / 1e9:7.0f} GB/s  host {row['host_seconds'] * 1e6:7.1f} us",
                flush=True,
            )

    # ---- Works -----------------------------------------------------------------------------------

    def arrays(self, shapes: Sequence[tuple[int, ...]], dtype: Any) -> tuple[list[Any], list[Any]]:
        def make() -> list[Any]:
            return [self.torch.randn(s, device="cuda").to(dtype) for s in shapes]

        return make(), make()

    def ours(self, shapes: Sequence[tuple[int, ...]], dtype: Any, **options: Any) -> Step:
        import adamax_ext

        params, grads = self.arrays(shapes, dtype)
        optimizer = adamax_ext.Adamax(RATE, BETA_1, BETA_2, EPSILON, **options)
        optimizer.build(params)
        return lambda: optimizer.apply(grads)

    def torch_step(
        self, kind: Any, shapes: Sequence[tuple[int, ...]], dtype: Any, **own: Any
    ) -> Step:
        params, grads = self.arrays(shapes, dtype)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        step: Step = kind(params, RATE, betas=(BETA_1, BETA_2), eps=EPSILON, **own).step
        return step

    def run(self, quick: bool) -> None:
        torch = self.torch
        adamw, adamax = torch.optim.AdamW, torch.optim.Adamax
        large = 22 if quick else 28

        def torch_steps(shapes: Sequence[tuple[int, ...]], dtype: Any) -> dict[str, Step]:
            fused = self.torch_step(adamw, shapes, dtype, fused=True)
            foreach = self.torch_step(adamax, shapes, dtype, foreach=True)
            return {"torch AdamW, fused": fused, "torch Adamax, foreach": foreach}

        f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
        for exponent in (12, 16, 20, large) if quick else (12, 16, 20, 22, 24, 26, 28):
            shapes = [(2**exponent,)]
            peers = torch_steps(shapes, f32) if exponent in (20, 24, 26, large) else {}
            name = f"plain 2^{exponent}"
            self.compare(name, 28 * 2**exponent, {"adamax_ext": self.ours(shapes, f32), **peers})
            del peers
            torch.cuda.empty_cache()
        shape = [(2**large,)]
        # Unscaled, clipped by the global norm (the gradient is read twice), decayed, averaged.
        full = self.ours(shape, f32, **FULL_OPTIONS)
        self.compare(f"full 2^{large}", 40 * 2**large, {"adamax_ext": full})
        del full
        torch.cuda.empty_cache()
        for dtype, size in ((bf16, 22), (f64, 56)):
            name = f"{str(dtype)[6:]} 2^{large - 1}"
            shape = [(2 ** (large - 1),)]
            self.compare(name, size * 2 ** (large - 1), {"adamax_ext": self.ours(shape, dtype)})
            torch.cuda.empty_cache()
        for name, shapes in (("400 x 256", [(256,)] * 400), ("GPT-2 small", list(GPT2_SMALL))):
            count = sum(torch.Size(shape).numel() for shape in shapes)
            steps = {"adamax_ext": self.ours(shapes, f32), **torch_steps(shapes, f32)}
            self.compare(name, 28 * count, steps)
            torch.cuda.empty_cache()

    def check(self) -> None:
        """Require that ours and torch's Adamax do the same, as far as their rules agree."""
        import adamax_ext

        torch = self.torch
        params, grads = self.arrays([(1000,), (7, 11)], torch.float32)
        twins = [p.clone() for p in params]
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad
        ours = adamax_ext.Adamax(RATE, BETA_1, BETA_2, EPSILON)
        ours.build(params)
        theirs = torch.optim.Adamax(twins, RATE, (BETA_1, BETA_2), EPSILON)
        for _ in range(3):
            ours.apply(grads)
            theirs.step()
        for a, b in zip(params, twins, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def goals(rows: list[dict[str, Any]]) -> list[str]:
    """Say which of the goals are met."""
    seconds = {(row["work"], row["name"]): row["seconds"] for row in rows}
    lines = []
    for work, how, asked in GOALS:
        ours, other = seconds.get((work, "adamax_ext")), "copy" if how == "of a copy" else how
        if ours is None:
            lines.append(f"{work}: not measured")
            continue
        if how == "microseconds":
            value, met = ours * 1e6, ours * 1e6 <= asked
        else:
            value = seconds[work, other] / ours
            met = value >= asked
        lines.append(f"{work}, {how}: {value:.2f} (asked {asked:g}): {'met' if met else 'MISSED'}")
    return lines


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["name"] for row in rows if row["name"] != "copy"):
        own = [row for row in rows if row["name"] == name and row["work"].startswith("plain")]
        sizes = [row["traffic_bytes"] / 28 for row in own]
        axes.plot(sizes, [row["of_copy"] for row in own], marker="o", label=name)
    axes.axhline(1, color="k", linestyle=":", label="copy of the same traffic")
    axes.set(xscale="log", xlabel="elements", ylabel="bandwidth, of a copy's", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


def machine() -> dict[str, Any]:
    import adamax_ext
    import torch

    query = "name,driver_version,clocks.max.sm,clocks.max.mem"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        query: found,
        "cuda of torch": torch.version.cuda,
        "torch": torch.__version__,
        "adamax_ext": adamax_ext.build_info(),
        "date": datetime.date.today().isoformat(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="small sizes, few turns")
    options = parser.parse_args(arguments)
    try:
        import torch
    except ModuleNotFoundError:
        print("bench/gpu.py needs torch", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print("bench/gpu.py needs a GPU that torch can use", file=sys.stderr)
        return 1
    bench = Bench(turns=5 if options.quick else 25)
    bench.check()
    bench.run(options.quick)
    lines = goals(bench.rows)
    print("\n".join(lines))
    about = machine()
    stem = f"{about['gpu'].lower().replace(' ', '-')}-cuda-{about['date']}"
    results = {"machine": about, "rows": bench.rows, "goals": lines}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(bench.rows, options.out / f"{stem}.png")
    table = [
        f"| {r['work']} | {r['name']} | {r['seconds'] * 1e6:.1f} | {r['of_copy']:.2f} | "
        f"{r['host_seconds'] * 1e6:.0f} |"
        for r in bench.rows
    ]
    head = [f"# Steps on {about['gpu']}, {about['date']}", "", f"`{json.dumps(about)}`", "", *lines]
    columns = ["| work | library | device us | of a copy | host us |", "|---|---|---|---|---|"]
    (options.out / f"{stem}.md").write_text("\n".join([*head, "", *columns, *table]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
