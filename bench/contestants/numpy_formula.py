"""The formula in NumPy."""

import math
from typing import Any, ClassVar

import numpy as np

from contestants.base import (
    BETA_1,
    BETA_2,
    CLIP,
    EMA,
    EPSILON,
    LOSS_SCALE,
    WEIGHT_DECAY,
    Contestant,
    Work,
)


class NumPy(Contestant):
    """The formula, a line an expression; NumPy runs it on one thread."""

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    packages: ClassVar[tuple[str, ...]] = ("numpy",)

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        if work.dtype != "float32":
            raise NotImplementedError(f"the formula is written for float32; received {work.dtype}")
        self.params, self.full, self.rate, self.t = params, work.full, rate, 0
        self.m, self.u = ([np.zeros_like(p) for p in params] for _ in range(2))
        self.averages = [p.copy() for p in params] if work.full else []

    def load(self, grads: list[Any]) -> None:
        self.grads = grads

    def step(self) -> None:
        f32 = np.float32
        self.t += 1
        grads = self.grads
        if self.full:
            grads = [g * f32(1 / LOSS_SCALE) for g in grads]
            norm = math.sqrt(sum(float(np.vdot(g, g)) for g in grads))
            grads = [g * f32(min(CLIP / norm, 1.0)) for g in grads]
            for w in self.params:
                w -= w * f32(self.rate * WEIGHT_DECAY)
        rate = f32(self.rate / (1 - BETA_1**self.t))
        for w, g, m, u in zip(self.params, grads, self.m, self.u, strict=True):
            m += (g - m) * f32(1 - BETA_1)
            np.maximum(u * f32(BETA_2), np.abs(g), out=u)
            w -= rate * m / (u + f32(EPSILON))
        for w, average in zip(self.params, self.averages, strict=self.full):
            average += (w - average) * f32(1 - EMA)

    def weights(self) -> list[Any]:
        return self.params
