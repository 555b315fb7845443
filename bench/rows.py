"""The rows of bench/peers.py's JSON, and their numbers as text."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

OURS, OURS_TORCH = "adamax_ext", "adamax_ext, torch tensors"
OURS_CLASS = "adamax_ext.torch.Adamax"
OURS_JAX = "adamax_ext.jax.adamax, jit"
OURS_KERAS_JAX, OURS_KERAS_TORCH = "adamax_ext.keras.Adamax, JAX", "adamax_ext.keras.Adamax, torch"
OPTAX = "optax adamax, jit"
KERAS_JAX, KERAS_TORCH = "Keras Adamax, JAX", "Keras Adamax, torch"
# Whose places our classes for other frameworks than torch take.
PEER_OF = {OURS_JAX: OPTAX, OURS_KERAS_TORCH: KERAS_TORCH, OURS_KERAS_JAX: KERAS_JAX}
OURS_16, OURS_8 = f"{OURS}, state in 16 bits", f"{OURS}, state in 8 bits"
OURS_CLASS_8 = f"{OURS_CLASS}, 8 bits"
PEERS_8 = ("bitsandbytes Adam, 8 bits", "torchao Adam, 8 bits")
LOOP, FOREACH = "torch Adamax, for-loop", "torch Adamax, foreach"
FUSED = "torch AdamW, fused"
Row = dict[str, Any]


class Rows:
    """The rows of a run, to look up."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.all: list[Row] = results["rows"]
        self.threads = results["threads"]
        self.ours = results["ours"]  # who was in all duels

    def find(self, work: str, contestant: str, threads: int | None = None) -> Row | None:
        wanted = (work, contestant, threads or self.threads)
        for row in self.all:
            if (row["work"], row["contestant"], row["threads"]) == wanted:
                return row
        return None

    def works(self) -> list[str]:
        return list(dict.fromkeys(row["work"] for row in self.all))

    def of(self, work: str) -> list[Row]:
        return [row for row in self.all if row["work"] == work]

    def own(self, work: str) -> Row | None:
        return self.find(work, self.ours)

    def curve(self, contestant: str) -> list[Row]:
        """Plain float32 steps on one array, by size."""
        rows = [
            row
            for row in self.all
            if row["work"].startswith("plain")
            and row["contestant"] == contestant
            and row["threads"] == self.threads
        ]
        return sorted(rows, key=lambda row: row["elements"])


def comparable_seconds(row: Row, own: Row | None) -> float:
    """Return the row's time, as it would have been while ours was measured: drift cancels."""
    if own is None or row["ratio_to_ours"] is None:
        return float(row["seconds"]["median"])
    return float(own["seconds"]["median"] * row["ratio_to_ours"]["median"])


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, median, high = map(float, np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": median, "low": low, "high": high, "rounds": len(values)}


def times_of(row: Row | None, other: Row | None) -> dict[str, float] | None:
    """Return the time of `row` in times of `other`, neither ours: drift cancels, as both met ours.

    The quartiles are the widest that those of the two ratios to ours leave possible.
    """
    if not row or not other:
        return None
    over, under = row["ratio_to_ours"], other["ratio_to_ours"]
    if not over or not under:
        return None
    pairs = (("median", "median"), ("low", "high"), ("high", "low"))
    return {key: over[key] / under[opposite] for key, opposite in pairs}


def bound_seconds(own: Row) -> float:
    return float(own["seconds"]["median"] * own["fraction_of_bound"]["median"])


def l2_mark(row: Row) -> str:
    """Return a note on rows whose memory a GPU's L2 holds; older files do not know."""
    return " (in L2)" if row.get("in_l2") else ""


# ---- Numbers as text -----------------------------------------------------------------------------


def unit_of(seconds: float) -> tuple[float, str]:
    return (1.0, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "µs")


def time_text(seconds: float) -> str:
    unit, name = unit_of(seconds)
    return f"{seconds / unit:.3g} {name}"


def seconds_text(quartiles: dict[str, float]) -> str:
    """Return a median with its quartiles, in a unit that fits."""
    unit, name = unit_of(quartiles["median"])
    median, low, high = (f"{quartiles[key] / unit:.3g}" for key in ("median", "low", "high"))
    return f"{median} {name} ({low} to {high})"


def ratio_text(quartiles: dict[str, float] | None) -> str:
    if quartiles is None:
        return ""
    digits = 1 if quartiles["median"] >= 20 else 2
    median, low, high = (f"{quartiles[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
