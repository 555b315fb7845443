"""The plots of a run of bench/peers.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure  # no pyplot: it would choose a display backend
from rows import OURS, Rows, bound_seconds, comparable_seconds, l2_mark, time_text


def draw_sizes(results: dict[str, Any], axes: Axes) -> None:
    """Time against size, with the bound."""
    rows = Rows(results)
    # Without the red of ours; twice as many colours as the default has.
    axes.set_prop_cycle(color=[c for c in colormaps["tab20"].colors if c != to_rgb("C3")])
    for name in dict.fromkeys(row["contestant"] for row in rows.all):
        curve = rows.curve(name)
        if len(curve) < 2:
            continue
        ours = name == rows.ours
        style = {"color": "C3", "linewidth": 2.2} if ours else {"linewidth": 1}
        axes.plot(
            [row["elements"] for row in curve],
            [comparable_seconds(row, rows.own(row["work"])) for row in curve],
            marker="o",
            markersize=3,
            label=name,
            **style,
        )
    own = [row for row in rows.curve(rows.ours) if row["fraction_of_bound"]]
    axes.plot(
        [row["elements"] for row in own],
        [bound_seconds(row) for row in own],
        color="k",
        linestyle=":",
        label="bound: memory traffic alone",
    )
    if in_l2 := [row["elements"] for row in own if row.get("in_l2")]:
        axes.axvspan(min(in_l2) / 2, max(in_l2) * 2**0.5, alpha=0.1, label="in the GPU's L2")
    where = results["gpu"]["name"] if results.get("gpu") else f"{results['threads']} threads"
    axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="seconds a step")
    axes.set_title(f"Plain step, float32, {where}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def draw_bars(results: dict[str, Any], axes: Axes, work: str, title: str) -> None:
    rows = Rows(results)
    own = rows.own(work)
    seconds = {
        row["contestant"]: comparable_seconds(row, own)
        for row in rows.of(work)
        if row["threads"] == rows.threads
    }
    names = sorted(seconds, key=lambda name: -seconds[name])
    values = [seconds[name] for name in names]
    bars = axes.barh(names, values, color=["C3" if n.startswith(OURS) else "C0" for n in names])
    axes.bar_label(bars, [time_text(value) for value in values], padding=3, fontsize=8)
    axes.set(xscale="log", xlabel="seconds a step", title=f"{title}{l2_mark(own or {})}")
    axes.set_xlim(min(values) / 2, max(values) * 4)
    if own is not None and own["fraction_of_bound"]:
        bound = bound_seconds(own)
        axes.axvline(bound, color="k", linestyle=":", label="bound: memory traffic alone")
        axes.set_xlim(min(*values, bound) / 2)
        axes.legend(frameon=False, fontsize=8, loc="upper right")


def draw(results: dict[str, Any], stem: Path) -> list[Path]:
    """Write a plot of each kind that there are results for."""
    rows = Rows(results)
    works = rows.works()
    plots: dict[str, Callable[[Axes], None]] = {}
    if len(rows.curve(rows.ours)) > 1:
        plots["sizes"] = lambda axes: draw_sizes(results, axes)
    if "400 x 256" in works:
        title = "400 arrays of 256: what a call costs"
        plots["small"] = lambda axes: draw_bars(results, axes, "400 x 256", title)
    if full := next((work for work in works if work.startswith("full")), None):
        parts = f"{full.split()[1]} elements: unscale, clip, decay, step, average"
        plots["full"] = lambda axes: draw_bars(results, axes, full, f"Full step, {parts}")
    written = []
    for name, plot in plots.items():
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        plot(axes)
        axes.spines[["top", "right"]].set_visible(False)
        written.append(stem.with_name(f"{stem.name}-{name}.png"))
        figure.savefig(written[-1], dpi=120)
    return written
