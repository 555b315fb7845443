"""What does not fit is refused when it is loaded, with nothing changed."""

import numpy as np
import pytest
from adamax_ext import checkpoint
from data.saving_cases import (
    FULL,
    SCALED,
    SCHEDULED,
    make,
    refused,
    trained,
)


def put(value, *path):
    """Return a function that puts `value` at `path` of a state_dict; without a value, deletes."""

    def change(state_dict):
        *folders, last = path
        for key in folders:
            state_dict = state_dict[key]
        if value is None:
            del state_dict[last]
        else:
            state_dict[last] = value[0]

    return change


ARRAY = ("state", "w", "norm")
SCALE, OUTSIDE = ("loss_scale", "dynamic_scale"), "dynamic_scale must be a number in"
BAD_CALLS = "calls must be an integer >= 0"
KEYS = "state_dict must have the keys"
KINDS = r"state of 'w' must have \['average', 'gradient_accumulator', 'momentum', 'norm'\]"
LIKE = r"norm of 'w' must have shape \(2, 3\) and dtype float32; received "
PENDING = "accumulated must be a list of variables, and empty where no window of calls has begun"
COUNTS = "gradient_accumulation_steps of the state_dict is .*, of the optimizer .*; expected the sa"
BELOW_ZERO = "norm of 'w' must not be below zero; received -"
BAD_NORMS = [
    np.where(np.eye(2, 3, k), x, 0).astype("f") for k, x in ((0, 1), (2, 1e-45), (-1, np.inf))
]
RATES = "expected both to be numbers, or neither"
REFUSED = [  # the optimizer, a change of what it saved, error, message
    (FULL, put([4], "format_version"), ValueError, "format_version must be 1, 2 or 3; received 4"),
    (
        FULL,
        put([None], "format_version"),
        ValueError,
        "format_version must be 1, 2 or 3; received None",
    ),
    (
        FULL,
        put(None, "format_version"),
        ValueError,
        "format_version must be 1, 2 or 3; received None",
    ),
    (FULL, put(None, "calls"), ValueError, KEYS),
    (FULL, put([1], "more"), ValueError, KEYS),
    (FULL, put([{}], "loss_scale"), ValueError, KEYS),
    *((FULL, put([x], "calls"), ValueError, BAD_CALLS) for x in (-1, 2.5, True, "3", None)),
    (FULL, put([2**63], "calls"), ValueError, "calls"),  # an int64 among `variables`
    (FULL, put([None], "learning_rate"), ValueError, RATES),
    (SCHEDULED, put([0.1], "learning_rate"), ValueError, RATES),
    (FULL, put([-0.1], "learning_rate"), ValueError, "learning_rate must be a number >= 0"),
    (FULL, put([np.nan], "learning_rate"), ValueError, "learning_rate must be a number >= 0"),
    (FULL, put(["0.1"], "learning_rate"), TypeError, "learning_rate must be a number >= 0"),
    (
        FULL,
        put([True], "format_version"),
        ValueError,
        "format_version must be 1, 2 or 3; received Tru",
    ),
    (FULL, put([[]], "excluded_from_weight_decay"), ValueError, KEYS),  # of version 1
    (FULL, put(None, "accumulated"), ValueError, KEYS),
    *(
        (FULL, put([x], "accumulated"), ValueError, PENDING)
        for x in (["v"], None, "w", [1], [["w"]])
    ),
    (FULL, put([4], "calls"), ValueError, PENDING),  # a window that has not begun
    (SCHEDULED, put([["w"]], "accumulated"), ValueError, PENDING),
    *((FULL, put([x], "gradient_accumulation_steps"), ValueError, COUNTS) for x in (4, None, "2")),
    (SCHEDULED, put([2], "gradient_accumulation_steps"), ValueError, COUNTS),
    *((FULL, put([-x], *ARRAY), ValueError, BELOW_ZERO) for x in BAD_NORMS),
    (FULL, put(None, "state", "w"), ValueError, r"missing \['w'\], unknown \[\]"),
    (FULL, put([{"norm": np.ones(2)}], "state", "v"), ValueError, r"\[\], unknown \['v'\]"),
    (FULL, put(None, *ARRAY), ValueError, KINDS),
    (FULL, put([np.ones((2, 3), "f")], "state", "w", "x"), ValueError, KINDS),
    (FULL, put([np.ones((3, 2), "f")], *ARRAY), ValueError, LIKE + r"shape \(3, 2\)"),
    (FULL, put([np.ones(6, "f")], *ARRAY), ValueError, LIKE + r"shape \(6,\)"),
    (FULL, put([np.ones((2, 3))], *ARRAY), ValueError, LIKE + ".* dtype float64"),
    (FULL, put([np.ones((2, 3), "i4")], *ARRAY), ValueError, LIKE + ".* dtype int32"),
    (SCALED, put(None, "loss_scale"), ValueError, "must have a 'loss_scale'"),
    (SCALED, put(None, "loss_scale", "step_counter"), ValueError, "step_counter"),
    (SCALED, put([1], "loss_scale", "more"), ValueError, "more"),
    (SCALED, put([-1], "loss_scale", "step_counter"), ValueError, "step_counter must be an integ"),
    (SCALED, put([0.0], "loss_scale", "dynamic_scale"), ValueError, "dynamic_scale must be a num"),
    *((SCALED, put([x], *SCALE), ValueError, OUTSIDE) for x in (2.0**127, 1e-60, np.nan, np.inf)),
    (SCALED, put([-1], "calls"), ValueError, BAD_CALLS),
]


def test_a_folder_or_a_missing_file_is_refused(tmp_path):
    weights, optimizer = trained(FULL)
    refused(optimizer, weights, OSError, None, optimizer.load, tmp_path)
    refused(optimizer, weights, FileNotFoundError, "no", optimizer.load, tmp_path / "no")


@pytest.mark.parametrize("through", ["dict", "file"])
@pytest.mark.parametrize(("case", "change", "error", "match"), REFUSED)
def test_a_state_that_does_not_fit_is_refused(case, change, error, match, through, tmp_path):
    state_dict = trained(case, 5)[1].state_dict()
    weights, optimizer = trained(case, 3)
    change(state_dict)
    if through == "dict":
        refused(optimizer, weights, error, match, optimizer.load_state_dict, state_dict)
    else:
        checkpoint.write(tmp_path / "file", state_dict)
        refused(optimizer, weights, ValueError, match, optimizer.load, tmp_path / "file")


@pytest.mark.parametrize("received", [None, [], "state"])
def test_a_state_dict_is_a_dict(received):
    weights, optimizer = trained(FULL)
    match = f"state_dict must be a dict; received {type(received).__name__}"
    refused(optimizer, weights, TypeError, match, optimizer.load_state_dict, received)


def at(i, value):
    return lambda weights: [*weights[:i], value, *weights[i + 1 :]]


REFUSED_WEIGHTS = [  # the optimizer, a change of its `variables`, message
    (FULL, lambda weights: weights[:-1], "weights must have 10 arrays; received 9"),
    (FULL, lambda weights: [*weights, 1.0], "weights must have 10 arrays; received 11"),
    (FULL, lambda weights: [], "weights must have 10 arrays; received 0"),
    (FULL, at(2, np.ones((3, 2), "f")), r"weights\[2\] must have shape \(2, 3\)"),
    (FULL, at(9, np.ones(4, "c16")), r"weights\[9\] .* dtype like float64; .* complex128"),
    (FULL, at(0, np.float32(1)), r"weights\[0\] .* dtype like int64; .* float32"),
    (FULL, at(0, -1), r"weights\[0\] \(the iteration\) must be an integer >= 0"),
    (FULL, at(1, -0.5), r"weights\[1\] \(the rate\) must be a number >= 0"),
    (FULL, at(1, np.nan), r"weights\[1\] \(the rate\) must be a number >= 0"),
    (SCALED, at(2, -1), "step_counter must be an integer >= 0"),
    (SCALED, at(3, 0.0), OUTSIDE),
    (SCALED, at(4, -1), r"weights\[0\] \(the iteration\) must be an integer >= 0"),
    *((FULL, at(7, -x), BELOW_ZERO) for x in BAD_NORMS),
    (FULL, at(6, np.full((2, 3), 1e300)), "overflow|weights"),  # beyond float32: warned or refused
]


@pytest.mark.parametrize("through", ["set_weights", "load_own_variables"])
@pytest.mark.parametrize(("case", "change", "match"), REFUSED_WEIGHTS)
def test_arrays_that_do_not_fit_are_refused(case, change, match, through):
    weights, optimizer = trained(case)
    received = change([np.array(x) for x in trained(case, 5)[1].variables])
    if through == "load_own_variables":
        received = {str(i): x for i, x in enumerate(received)}
    load = getattr(optimizer, through)
    refused(optimizer, weights, (ValueError, RuntimeWarning), match, load, received)


@pytest.mark.parametrize("key", ["10", "01", "x", 9])
def test_a_store_with_other_keys_is_refused(key):
    weights, optimizer = trained(FULL)
    store = {str(i): x for i, x in enumerate(optimizer.variables)}
    store[key] = store.pop("9")
    match = "store must have the keys '0', '1', ...; received"
    refused(optimizer, weights, ValueError, match, optimizer.load_own_variables, store)


@pytest.mark.parametrize("case", [FULL, SCALED])
def test_without_variables_there_is_nothing_to_save_or_load(case, tmp_path):
    full, (_, empty) = trained(case)[1], make(case)
    full.save(tmp_path / "file")
    for call in (
        empty.state_dict,
        lambda: empty.save(tmp_path / "another"),
        lambda: empty.load(tmp_path / "file"),
        lambda: empty.load_state_dict(full.state_dict()),
        lambda: empty.set_weights(full.variables),
        lambda: empty.load_own_variables({str(i): x for i, x in enumerate(full.variables)}),
    ):
        with pytest.raises(ValueError, match=r"no state yet: call build\(\) first"):
            call()
    assert not empty.built
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
