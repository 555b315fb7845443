"""What a contestant is: a work to do, and a library that does its steps."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

RATE, BETA_1, BETA_2, EPSILON = 0.01, 0.9, 0.999, 1e-7
BETAS = (BETA_1, BETA_2)
WEIGHT_DECAY, CLIP, EMA = 0.01, 1.0, 0.99
# Unscaling doubles the gradients and clipping, which always applies, sets their norm to 1: a
# library that does both in place finds the same gradients at every step, as in training.
LOSS_SCALE = 0.5

# The full step in the words of Keras, which are ours.
FULL_OPTIONS: dict[str, Any] = {
    "weight_decay": WEIGHT_DECAY,
    "global_clipnorm": CLIP,
    "loss_scale_factor": LOSS_SCALE,
    "use_ema": True,
    "ema_momentum": EMA,
}

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}

Turns = dict[str, Callable[[], object]]  # what can be timed, by name


@dataclass(frozen=True)
class Work:
    """What is to be done in a step: arrays of these shapes; plain, or full (see peers.py)."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str = "float32"
    full: bool = False
    after_backward: bool = False  # each step; else steps follow each other
    norm: bool = False  # no step, but the norm of all gradients
    groups: int = 1  # of parameters, each with settings of its own
    host: bool = False  # timed until the call returns; else until the step has ended

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def bytes_per_element(self, state: int) -> int:
        """Traffic of a step in one pass, and of one more over the gradients for their norm."""
        weight = ITEMSIZES[self.dtype]
        if self.norm:
            return weight
        return 3 * weight + 4 * state + (weight + 2 * state if self.full else 0)

    def memory_bytes(self, state: int) -> int:
        """Return the size of the memory that a step touches, however often."""
        weight = ITEMSIZES[self.dtype]
        return self.elements * (weight if self.norm else 2 * weight + (2 + self.full) * state)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Work":
        return cls(**{**fields, "shapes": tuple(tuple(shape) for shape in fields["shapes"])})


class Contestant:
    """A library with arrays of a work: `load` gradients, then `step` as often as wanted."""

    rule: ClassVar[str] = "Adamax"
    # In rates: by how much a step of three may differ from another library's, by the place of
    # epsilon and rounding.
    tolerance: ClassVar[float] = 2e-4
    environment: ClassVar[dict[str, str]] = {}  # what must be set before the process starts
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    packages: ClassVar[tuple[str, ...]] = ()  # whose versions matter

    def __init__(self, work: Work, device: str, params: list[Any], rate: float) -> None:
        """Take over `params`, arrays in host memory, and allocate the state."""
        raise NotImplementedError

    def load(self, grads: list[Any]) -> None:
        """Put gradients, arrays in host memory, where the library wants them."""
        raise NotImplementedError

    def backward(self) -> None:
        """Make new gradients from the weights, those of the sum of their squares."""
        self.load([w + w for w in self.weights()])

    def step(self) -> None:
        """Do a step, or enqueue it."""
        raise NotImplementedError

    def finish(self) -> None:
        """Wait for the steps to end."""

    def weights(self) -> list[Any]:
        """Return the weights in host memory."""
        raise NotImplementedError

    def places(self) -> list[int]:
        """Where what a step should write in place lies, of a library that may copy it instead."""
        return []

    def turns(self, bound: str | None, threads: int) -> Turns:
        """What can be timed on these arrays; `bound` is asked of ours (see duels.py)."""
        return {"step": self.step}

    def state_bytes(self, work: Work) -> int:
        """Bytes an element of the first moment; most keep it in the dtype of the weights."""
        return ITEMSIZES[work.dtype]
