"""What is promised of a step on each device, and whether a run of bench/peers.py kept it."""

from itertools import zip_longest
from typing import Any

from rows import (
    FOREACH,
    FUSED,
    OURS,
    OURS_8,
    OURS_CLASS,
    OURS_CLASS_8,
    OURS_JAX,
    OURS_KERAS_JAX,
    OURS_KERAS_TORCH,
    PEER_OF,
    PEERS_8,
    Rows,
    l2_mark,
    ratio_text,
    seconds_text,
    table,
    times_of,
)

PAST_CACHES = 2**23  # elements: four float32 arrays of these are more than caches hold
Real = float | None


class Goals:
    """A table of them."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.rows = Rows(results)
        self.lines: list[list[str]] = []

    def line(self, what: str, goal: Real, measured: Real, text: str, at_most: bool = False) -> None:
        """Add a line; a goal is met from it upwards, or from it downwards."""
        met = ""
        if measured is None:
            text, met = "not measured", "unknown" if goal is not None else ""
        elif goal is not None:
            is_met = measured <= goal if at_most else measured >= goal
            met = "yes" if is_met else "**no**"
        sign = "at most" if at_most else "at least"
        self.lines.append([what, "" if goal is None else f"{sign} {goal:g}", text, met])

    def ratio(
        self, what: str, goal: Real, ratio: dict[str, float] | None, at_most: bool = False
    ) -> None:
        self.line(what, goal, ratio["median"] if ratio else None, ratio_text(ratio), at_most)

    def micros(self, what: str, goal: float, work: str, contestant: str, parts: int = 1) -> None:
        """At most so many µs, of a step or of one of its equal parts."""
        text, measured = "", None
        if row := self.rows.find(work, contestant):
            each = {key: row["seconds"][key] / parts for key in ("median", "low", "high")}
            text, measured = seconds_text(each), each["median"] * 1e6
        self.line(what, goal, measured, text, at_most=True)

    def bound(self, what: str, work: str, goal: float, bound: str = "bound") -> None:
        row = self.rows.own(work)
        fraction = row.get(f"fraction_of_{bound.replace(' ', '_')}") if row else None
        self.ratio(f"{what}: of the {bound}", goal, fraction)

    def faster(self, what: str, work: str, goal: Real, *peers: str) -> None:
        """Against the fastest of `peers`."""
        rows = [row for peer in peers if (row := self.rows.find(work, peer))]
        found = [row for row in rows if row["ratio_to_ours"]]
        best = min(found, key=lambda row: row["ratio_to_ours"]["median"], default=None)
        who = best["contestant"] if best else " or ".join(peers)
        ratio = best["ratio_to_ours"] if best else None
        self.ratio(f"{what}: times as fast as {who}", goal, ratio)

    def table(self) -> str:
        return table(["promise", "goal", "measured (quartiles)", "met"], self.lines)


def cuda_goals(results: dict[str, Any]) -> str:
    goals = Goals(results)
    rows = goals.rows
    goals.bound("plain step, 2^28", "plain 2^28", 0.92)
    goals.bound("full step, 2^28", "full 2^28", 0.88)
    goals.bound("norm alone, 2^28", "norm 2^28", 0.9)
    goals.micros("400 arrays of 256: µs", 20, "400 x 256", rows.ours)
    goals.faster("plain step, 2^28", "plain 2^28", 3, FOREACH)
    for work in rows.works():
        own, fused = rows.own(work), rows.find(work, FUSED)
        if not own or not fused or work.startswith("host time"):
            continue
        if own["state_bytes"] == fused["state_bytes"]:  # else the other does less
            goals.faster(f"{work}{l2_mark(own)}", work, 1, FUSED)
    return goals.table()


def class_goals(goals: Goals) -> None:
    """Of `adamax_ext.torch.Adamax` beside torch's classes."""
    find, small, after = goals.rows.find, "400 x 256", "400 x 256 after backward"
    for what, work, peer, goal in (
        ("2^24", "plain 2^24", FUSED, 1),
        ("2^24", "plain 2^24", FOREACH, 3.8),
        ("400 arrays of 256", small, FUSED, 5),
        ("400 arrays of 256 after backward", after, FUSED, 2),
    ):
        ratio = times_of(find(work, peer), find(work, OURS_CLASS))
        goals.ratio(f"{OURS_CLASS}, {what}: times as fast as {peer}", goal, ratio)
    what = f"{OURS_CLASS}, 400 arrays of 256"
    goals.micros(f"{what}: µs an array", 1.2, small, OURS_CLASS, 400)
    for work, when in ((small, ""), (after, " after backward")):
        ratio = times_of(find(f"{work}, 400 groups", OURS_CLASS), find(work, OURS_CLASS))
        goals.ratio(f"{what}{when}: 400 groups, in times of one", 2.5, ratio, at_most=True)


def low_memory_goals(goals: Goals) -> None:
    """Of state in 8 bits beside that of others; the harness has what is promised of it alone."""
    for work in ("plain 2^24", "bfloat16 2^24"):
        for peer in PEERS_8:
            ratio = times_of(goals.rows.find(work, peer), goals.rows.find(work, OURS_CLASS_8))
            goals.ratio(f"{OURS_CLASS_8}, {work}: times as fast as {peer}", None, ratio)


def framework_goals(goals: Goals) -> None:
    """Of our classes for JAX and Keras beside those whose places they take."""
    works = ("plain 2^24", "full 2^24", "400 x 256", "GPT-2 small")
    promised = {OURS_JAX: (1.3,), OURS_KERAS_TORCH: (9, 12, 18), OURS_KERAS_JAX: (1.3,)}
    for ours, peer in PEER_OF.items():
        for work, goal in zip_longest(works, promised[ours]):
            ratio = times_of(goals.rows.find(work, peer), goals.rows.find(work, ours))
            goals.ratio(f"{ours}, {work}: times as fast as {peer}", goal, ratio)


def cpu_goals(results: dict[str, Any]) -> str:
    goals = Goals(results)
    rows, bound, faster = goals.rows, goals.bound, goals.faster
    keras = [f"Keras Adamax, {backend}" for backend in ("JAX", "torch", "TensorFlow")]
    bound("plain step, 2^14", "plain 2^14", 0.7)
    for work in ("plain 2^24", "plain 2^26"):
        bound(work.replace("plain", "plain step,"), work, 0.97)
        bound(work.replace("plain", "plain step,"), work, 0.93, "aligned bound")
    bound("full step, 2^24", "full 2^24", 0.93)
    bound("bfloat16 weights and gradients, 2^24", "bfloat16 2^24", 0.9)
    plain = "plain 2^24"
    faster("plain step, 2^24", plain, 5.5, FOREACH)
    faster("plain step, 2^24", plain, 1.5, "torch Adamax, compiled")
    faster("plain step, 2^24", plain, 1.5, "optax adamax, jit")
    faster("plain step, 2^24", plain, 1.15, FUSED)
    faster("plain step, 2^24", plain, 1.15, "DeepSpeed CPU Adam")
    faster("plain step, 2^24", plain, 1.3, *keras)
    faster("full step, 2^24", "full 2^24", 1.3, *keras)
    faster("400 arrays of 256", "400 x 256", 60, FUSED)
    faster("400 arrays of 256", "400 x 256", 200, FOREACH)
    flat = rows.find("GPT-2 small", "adamax_ext, one flat array")
    what = "GPT-2 small's 148 arrays: speed of that of one array as large"
    goals.ratio(what, 0.97, flat["ratio_to_ours"] if flat else None)
    if goals.rows.find("plain 2^24", OURS_CLASS):  # earlier runs did not have it
        class_goals(goals)
    if goals.rows.find("plain 2^24", OURS_JAX):
        framework_goals(goals)
    if goals.rows.find("plain 2^24", OURS_8):
        low_memory_goals(goals)
    for result in results["zero_gradients"]:
        ours, last = result["contestant"].startswith(OURS), result["last_to_first"]
        what = f"zero gradients, {result['contestant']}: last 100 of 1,200 steps to first 100"
        goals.line(what, 1.05 if ours else None, last, f"{last:.3f}", at_most=True)
    for exponent in (14, 24):
        one = rows.find(f"plain 2^{exponent}", OURS, 1)
        what = f"plain step, 2^{exponent}: {rows.threads} threads, times as fast as one"
        goals.ratio(what, None, one["ratio_to_ours"] if one and rows.threads > 1 else None)
    costs = [
        row["seconds"]["median"] / row["elements"] * 1e9
        for row in rows.curve(rows.ours)
        if row["elements"] >= PAST_CACHES
    ]
    spread = max(costs) / min(costs) if costs else None
    text = f"{spread:.2f} ({min(costs):.3f} to {max(costs):.3f} ns an element)" if spread else ""
    what = "cost of an element past the caches, dearest size to cheapest"
    goals.line(what, None, spread, text, at_most=True)
    return goals.table()


def goals(results: dict[str, Any]) -> str:
    return cpu_goals(results) if results["device"] == "cpu" else cuda_goals(results)
