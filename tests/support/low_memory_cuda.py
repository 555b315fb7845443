"""Variables in few bits on an emulated GPU, for the C++ step, and as the program has them."""

import numpy as np

from support import reference
from support.bits import dtype_of, rounded, spread, widened
from support.cuda_api import variable_of
from support.low_memory import Twins, assert_same
from support.memory import unaligned

SPECIAL = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e30, 1e-30, 1e-45, -0.0]
FILL = 0xA5  # of the memory around an array


def random_gradient(rng, size, *, special=False):
    """Of all magnitudes and with zeros; perhaps with infinities, NaN and what overflows."""
    values = spread(rng, size, np.float32, -14, 8)
    values[rng.random(size) < 0.2] = 0
    if special:
        some = rng.random(size) < 0.05
        values[some] = rng.choice(SPECIAL, some.sum())
    return values


class DeviceTwins(Twins):
    """One variable twice. All its arrays begin `odd` bytes after an address for any type."""

    def __init__(self, rng, size, storage, *, accumulates=False, odd=0, **kept):
        super().__init__(rng, size, storage, **kept)
        self.rng, self.size = rng, size
        self.buffers["grad"] = np.zeros(size, dtype_of(self.grad))
        self.accumulator = np.zeros(size, np.float32) if accumulates else None
        if accumulates:
            self.buffers["accumulator"] = self.accumulator
        moved = {name: unaligned(array, odd) for name, array in self.buffers.items()}
        self.buffers = {name: array for name, (array, _) in moved.items()}
        self.memories = {name: memory for name, (_, memory) in moved.items()}
        self.gradient = self.buffers["grad"].copy()  # that the memory should have

    def variable(self, group=0, *, has_grad=True):
        arrays = {name: a for name, a in self.buffers.items() if has_grad or name != "grad"}
        number, first = self.place["variable"], self.place["first_element"]
        return variable_of(arrays, group, self.rounding, number, first)

    def draw_gradient(self, **options):
        with np.errstate(all="ignore"):
            values = random_gradient(self.rng, self.size, **options)
            self.gradient = rounded(values, dtype_of(self.grad))
        self.buffers["grad"][...] = self.gradient

    def unscaled(self, scale=1.0):
        with np.errstate(all="ignore"):
            return widened(self.gradient) * np.float32(scale)

    def require_same(self, label):
        others = {"grad": self.gradient, "accumulator": self.accumulator}
        for name, array in others.items():
            if array is not None:
                assert_same(self.buffers[name], array, f"{name} after {label}")
        kept = self.buffers
        self.buffers = {name: a for name, a in kept.items() if name not in others}
        super().require_same(label)
        self.buffers = kept

    def require_clean_surroundings(self, label):
        """Last, because what is stored is lost."""
        for name, array in self.buffers.items():
            array.view(np.uint8)[...] = FILL
            assert np.all(self.memories[name] == FILL), f"around {name} after {label}"

    def copies(self):
        return {name: array.copy() for name, array in self.buffers.items()}

    def require_unchanged(self, before, label):
        for name, array in self.buffers.items():
            assert_same(array, before[name], f"{name} after {label}")


def clipped(gradients, *, clipnorm=None, global_clipnorm=None):
    """Return them as a clip by norm leaves them."""
    limit = clipnorm or global_clipnorm
    if limit is None:
        return gradients
    whole = reference.global_norm(gradients)
    result = []
    for h in gradients:
        norm = reference.global_norm([h]) if clipnorm else whole
        with np.errstate(all="ignore"):
            if clipnorm:
                scale = np.float64(limit) / np.maximum(norm, limit)
            else:
                scale = min(limit / norm, 1.0) if np.isfinite(norm) and norm > 0 else 1.0
                scale = scale if np.isfinite(norm) else np.nan
            result.append(h * np.float32(scale))
    return result
