"""Variables of Keras on torch whose optimizer has state in fewer bits, beside NumPy arrays.

Who imports from here is skipped where Keras is on another backend.
"""

import warnings

import adamax_ext
import numpy as np
import pytest

from support.bits import dtype_of, is_testable, spread
from support.keras_pairs import Adamax, keras
from support.keras_torch import torch
from support.low_memory import assert_same

if not is_testable("bfloat16"):
    pytest.skip("bfloat16 needs ml_dtypes", allow_module_level=True)

# Name, dtype, dtype of the gradient, shape, memory order; more and fewer than 4096 elements.
VARIABLES = [
    ("kernel", "float32", "float32", (70, 60), "C"),
    ("bias", "float32", "bfloat16", (83,), "C"),
    ("brain_kernel", "bfloat16", "bfloat16", (64, 3, 29), "F"),
    ("brain_bias", "bfloat16", "float32", (17, 15), "C"),
    ("half", "float16", "float16", (4097,), "C"),
    ("empty", "float32", "float32", (0, 3), "C"),
    ("scalar", "bfloat16", "bfloat16", (), "C"),
]
# Nothing here is a default; the rate is one that Keras keeps exactly, in float32.
SETTINGS = {"learning_rate": 2.0**-6, "beta_1": 0.83, "beta_2": 0.957, "epsilon": 3.1e-5, "seed": 9}
KINDS = {
    "momentum": "_m",
    "norm": "_u",
    "average": "_model_variables_moving_average",
    "gradient_accumulator": "_accumulated_gradients",
}


def as_tensor(array):
    """A copy of an array in its memory order."""
    array = np.asarray(array)  # of no axes NumPy makes a number
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy("K")).view(torch.bfloat16)
    return torch.from_numpy(array.copy("K"))


def as_stored(variable):
    """A copy of a variable in its memory order; bfloat16 as uint16."""
    tensor = getattr(variable, "_value", variable).detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16).copy("K")
    return tensor.numpy().copy("K")


def make_arrays(rounding, seed=1):
    """Float16 has no other rounding than to nearest."""
    rng = np.random.default_rng(seed)
    return {
        name: np.array(spread(rng, shape, dtype_of(dtype)), order=order)
        for name, dtype, _, shape, order in VARIABLES
        if rounding == "nearest" or dtype != "float16"
    }


def make_gradients(arrays, call, without=()):
    rng = np.random.default_rng(100 + call)
    return [
        None
        if name in without
        else np.array(spread(rng, shape, dtype_of(grad), -9, 4), order=order)
        for name, _, grad, shape, order in VARIABLES
        if name in arrays
    ]


def variables_of(arrays):
    return [
        keras.Variable(as_tensor(array), dtype=array.dtype.name, name=name)
        for name, array in arrays.items()
    ]


def apply(optimizer, gradients, variables=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no gradient
        optimizer.apply([None if g is None else as_tensor(g) for g in gradients], variables)


class Twins:
    """Variables of Keras with our optimizer, and arrays with `adamax_ext.Adamax`."""

    def __init__(self, bits, rounding, excluded=(), **settings):
        settings = {**SETTINGS, "state_bits": bits, "weight_rounding": rounding, **settings}
        self.arrays = make_arrays(rounding)
        self.variables = variables_of(self.arrays)
        self.ours, self.numpys = Adamax(**settings), adamax_ext.Adamax(**settings)
        self.ours.exclude_from_weight_decay([v for v in self.variables if v.name in excluded])
        self.numpys.exclude_from_weight_decay([self.arrays[name] for name in excluded])
        self.ours.build(self.variables)
        self.numpys.build(self.arrays)

    def train(self, calls, skipped=()):
        """`skipped` has pairs of call and name of the variable without a gradient."""
        for call in calls:
            without = [name for number, name in skipped if number == call]
            gradients = make_gradients(self.arrays, call, without)
            apply(self.ours, gradients)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.numpys.apply(gradients)

    def require_same(self):
        require_same(self.ours, self.variables, self.numpys, self.arrays)


def kept_by(optimizer, i):
    """The variables of state of a variable, by their kinds in `adamax_ext.Adamax`."""
    lists = {kind: getattr(optimizer, name, None) for kind, name in KINDS.items()}
    if optimizer._stored is not None:
        lists["norm_scale"] = optimizer._stored.norm_scales
        lists["remainder"] = optimizer._stored.remainders
    return {kind: kept[i] for kind, kept in lists.items() if kept and kept[i] is not None}


def require_same(optimizer, variables, numpys, arrays):
    """The bits of the weights and of all that is kept."""
    for i, (name, array) in enumerate(arrays.items()):
        halves = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
        assert_same(as_stored(variables[i]), halves, name)
        kept = kept_by(optimizer, i)
        assert set(kept) == set(numpys.state[name])
        for kind, expected in numpys.state[name].items():
            assert_same(as_stored(kept[kind]), expected, f"{kind} of {name}")


def everything(optimizer, variables):
    """A copy of weights and state, as they are stored."""
    return [as_stored(v) for v in [*variables, *optimizer.variables]]


def require_equal(values, expected):
    for a, b in zip(values, expected, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
