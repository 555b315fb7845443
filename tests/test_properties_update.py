"""Any wrong call of `update` leaves every buffer as it was, and the next step right."""

import adamax_ext
import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from support.bits import spread
from support.low_memory import STORAGES, Twins
from support.memory import READ_ONLY
from support.sequences import seeds, sequences
from support.steps import SETTINGS

NAN, INF = float("nan"), float("inf")
ROLES = ("param", "grad", "m", "u", "average", "norm_scale", "remainder")
SETTINGS_OUT_OF_RANGE = [
    (name, value)
    for name, values in {
        "step": (0, -1, 2.5, NAN, True, 2**64),
        "learning_rate": (-0.1, NAN, INF, "x", None),
        "beta_1": (1.0, -0.1, NAN, None),
        "beta_2": (1.0, INF, "x"),
        "epsilon": (0.0, -1.0, NAN, INF),
        "weight_decay": (-0.1, NAN, INF, None),
        "decay": ("L2", None),
        "epsilon_mode": ("between", 0),
        "grad_scale": (NAN, INF, None),
        "clipvalue": (0.0, -1.0, NAN, "x"),
        "ema_momentum": (1.5, -0.1, NAN),
        "seed": (-1, 2**64, 0.5),
        "variable": (-1, 2**32, 0.5),
        "first_element": (128, -256, 2**63),
        "weight_rounding": ("up", None),
    }.items()
    for value in values
]
CHANGES = {
    "read-only": READ_ONLY["NumPy"],
    "shorter": lambda array: array[:-1],
    "longer": lambda array: np.resize(array, array.size + 1),
    "gaps": lambda array: np.repeat(array, 2)[::2] if array.size > 1 else None,
    "of integers": lambda array: np.zeros(array.shape, np.int64),
    "of objects": lambda array: array.astype(object),
    "a list": np.ndarray.tolist,
    "nothing": lambda array: None,
}


@sequences(in_suite=300, to_ship=1000)
@given(
    st.sampled_from(STORAGES),
    st.sampled_from([1, 7, 256, 700]),
    st.one_of(
        st.sampled_from(SETTINGS_OUT_OF_RANGE),
        st.tuples(st.sampled_from(ROLES), st.sampled_from(sorted(CHANGES))),
        st.tuples(st.sampled_from(ROLES), st.sampled_from(ROLES)),  # in the memory of the other
    ),
    seeds,
)
def test_any_wrong_call_changes_nothing(storage, size, wrong, seed):
    rng = np.random.default_rng(seed)
    twins = Twins(rng, size, storage)
    gradient = spread(rng, size, np.float32)
    settings = {**SETTINGS, "step": 3}
    arrays = {**twins.buffers, "grad": gradient.astype(twins.buffers["param"].dtype)}
    passed = {**arrays, **twins.place, **settings, "weight_rounding": twins.rounding}
    where, what = wrong
    if where not in ROLES:
        passed[where] = what
    elif where not in arrays:
        reject()
    elif what in ROLES:
        if what == where or what not in arrays or {what, where} == {"param", "grad"}:
            reject()
        passed[where] = passed[what]
    else:
        if (where, what) in (("average", "nothing"), ("grad", "read-only")):  # which is right
            reject()
        passed[where] = CHANGES[what](arrays[where])
        if passed[where] is None and what != "nothing":
            reject()
    before = {name: array.tobytes() for name, array in arrays.items()}
    with pytest.raises((TypeError, ValueError, BufferError)) as refusal:
        adamax_ext.update(**passed)
    assert str(refusal.value), "an error without words"
    assert {name: array.tobytes() for name, array in arrays.items()} == before
    twins.step(gradient, f"{wrong}", **settings)
