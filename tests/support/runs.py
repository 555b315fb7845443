"""Training runs of `Adamax` beside the program, compared after every call."""

import re
import warnings

import numpy as np
from adamax_ext import Adamax, schedules

from support.bits import (
    assert_same_bits,
    dtype_of,
    is_testable,
    memory_order,
    rounded,
    spread,
    widened,
)
from support.reference import ReferenceAdamax
from support.steps import SETTINGS

# Name, dtype, dtype of the gradient, shape, memory order: every pair, every kind of shape.
VARIABLES = [
    ("kernel", "float32", "float32", (5, 7), "C"),
    ("fortran/kernel", "float32", "float16", (6, 11), "F"),
    ("gain", "float32", "float32", (), "C"),
    ("empty", "float32", "float32", (0, 3), "C"),
    ("bias", "float32", "bfloat16", (83,), "C"),
    ("double/kernel", "float64", "float64", (3, 4, 9), "F"),
    ("half/kernel", "float16", "float16", (37,), "C"),
    ("half/bias", "float16", "float32", (2, 17), "C"),
    ("brain/kernel", "bfloat16", "bfloat16", (45,), "C"),
    ("brain/bias", "bfloat16", "float32", (9, 2), "F"),
]
VARIABLES = [row for row in VARIABLES if is_testable(row[1], row[2])]
KINDS = {"momentum": "m", "norm": "u", "average": "average", "gradient_accumulator": "accumulator"}


class MixedReference(ReferenceAdamax):
    """The program on variables of several dtypes: each is rounded to its own at every store."""

    def build(self, variables):
        # In the order of memory, by which sums, blocks of state and random numbers go.
        super().build([widened(memory_order(v)) for v in variables])
        self.storages = {id(w): v.dtype for w, v in zip(self.variables, variables, strict=True)}

    def apply(self, grads):
        super().apply([None if g is None else memory_order(g) for g in grads])

    def _store(self, w):
        self.storage = self.storages[id(w)]
        super()._store(w)


def assert_same_state(ours, theirs, variables, label):
    """Require equal bits of every weight and every state array, and equal counts."""
    names = list(ours.state)
    for i, (name, v) in enumerate(zip(names, variables, strict=True)):
        weights = rounded(theirs.variables[i], v.dtype)
        assert_same_bits(memory_order(v), weights, f"weights of {name} after {label}")
        for kind, array in ours.state[name].items():
            expected = getattr(theirs, KINDS[kind])[i]
            assert_same_bits(memory_order(array), expected, f"{kind} of {name} after {label}")
    assert ours.calls == theirs.calls, label


class Rates:
    """A rate of its own for every step that asks; the next one shows if it was asked twice."""

    def __init__(self):
        self.asked = 0

    def __call__(self):
        self.asked += 1
        return 0.05 / self.asked


def rates_of_both(kind):
    if kind == "callable":
        return Rates(), Rates()
    schedule = schedules.ExponentialDecay(0.05, decay_steps=3, decay_rate=0.7)

    def program(calls):
        return schedule(calls)

    program.is_schedule = True
    return schedule, program


def check_run(
    settings, *, variables=VARIABLES, calls=7, skipped=(), rate=None, excluded=(), place=lambda a: a
):
    """Drive both optimizers with the same gradients; compare everything after every call.

    `skipped` holds (call, index of a variable) without a gradient; `excluded` names of variables
    without weight decay. `place` makes what our optimizer gets of a NumPy array with that memory.
    """
    rng = np.random.default_rng(7)
    settings = {**SETTINGS, **settings}
    names = [row[0] for row in variables]
    weights = [
        np.array(spread(rng, shape, dtype_of(dtype)), order=order)
        for _, dtype, _, shape, order in variables
    ]
    our_rate, their_rate = rates_of_both(rate) if rate else [settings["learning_rate"]] * 2
    ours = Adamax(**settings | {"learning_rate": our_rate})
    indices = [names.index(name) for name in excluded]
    theirs = MixedReference(**settings | {"learning_rate": their_rate}, excluded=indices)
    if excluded:  # the first by its memory, the others by name
        patterns = [f"^{re.escape(name)}$" for name in excluded[1:]]
        ours.exclude_from_weight_decay([place(weights[indices[0]])], patterns)
    placed = [place(w) for w in weights]
    ours.build(placed, names)
    theirs.build(weights)
    for call in range(calls):
        grads = [
            None
            if (call, i) in skipped
            else np.array(spread(rng, shape, dtype_of(grad)), order=order)
            for i, (_, _, grad, shape, order) in enumerate(variables)
        ]
        lent = [None if g is None else place(g) for g in grads]
        pairs = [(g, w) for g, w in zip(lent, placed, strict=True) if g is not None]
        in_order = call % 2 == 0  # else by their variables, of which some are then left out
        missing = [name for name, g in zip(names, grads, strict=True) if in_order and g is None]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            count = ours.apply(lent) if in_order else ours.apply_gradients(pairs[::-1])
        assert count == call + 1
        assert len(caught) == bool(missing)
        assert all(name in str(w.message) for w in caught for name in missing)
        theirs.apply(grads)
        assert_same_state(ours, theirs, weights, f"call {call} with {settings}")
        assert ours.iterations == (call + 1) // (ours.gradient_accumulation_steps or 1)


CLIPPINGS = [{}, {"clipnorm": 1.7}, {"clipvalue": 0.61}, {"global_clipnorm": 4.3}]
MICRO_BATCHES = [{}, {"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 3}]
AVERAGES = [
    {},
    {"use_ema": True, "ema_momentum": 0.871},
    {"use_ema": True, "ema_momentum": 0.871, "ema_overwrite_frequency": 2},
]
DECAYS = [({}, ()), ({"weight_decay": 0.213}, ("half/kernel", "kernel", "fortran/kernel"))]
SCALES = [{}, {"loss_scale_factor": 3.7}]
# In windows of two and three calls: the first is skipped, the last, some, and all.
SKIPPED = {(0, 0), (2, 1), (2, 4), (3, 4), (3, 5), (4, 6), (5, 0), (5, 2), (5, 7)}
SKIPPED |= {(1, 9), (2, 9), (3, 8), (4, 8), (5, 8)}
