"""Building: names, state, its place and order; exclusion of variables from weight decay."""

import re

import numpy as np
import pytest
from adamax_ext import Adamax
from support.memory import contents, values
from support.three import ALIASES, built, three

KINDS = ("momentum", "norm", "average", "gradient_accumulator")


# ---- Building ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((three(),), ["variable_0", "variable_1", "variable_2"]),
        ((iter(three()), (name for name in ["a", "b/c", ""])), ["a", "b/c", ""]),
        (({"z": values(0), "a": values(1)},), ["z", "a"]),
        (([],), []),
    ],
    ids=["default", "given", "mapping", "none"],
)
def test_names(arguments, names):
    optimizer = Adamax()
    optimizer.build(*arguments)
    assert (optimizer.built, list(optimizer.state), optimizer.calls) == (True, names, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((three(), ["a", "b", "a"]), ValueError, "names must be one unique string for each of"),
        ((three(), ["a", "b"]), ValueError, "names must be one unique string for each of the 3"),
        ((three(), [1, 2, 3]), TypeError, "names must be strings; received [1, 2, 3]"),
        (({1: values(0)},), TypeError, "names must be strings; received [1]"),
        ((three(), "abc"), TypeError, "names must be a sequence of strings; received"),
        (({"a": values(0)}, ["a"]), ValueError, "names must be None for a mapping; received ['a'"),
        ((values(0),), TypeError, "variables must be a sequence of buffers; received ndarray"),
        (("abc",), TypeError, "variables must be a sequence of buffers; received str"),
        ((None,), TypeError, "variables must be a sequence of buffers; received NoneType"),
    ],
    ids=range(9),
)
def test_build_refuses_arguments(arguments, error, message):
    optimizer = Adamax()
    with pytest.raises(error, match="^" + re.escape(message)):
        optimizer.build(*arguments)
    assert (optimizer.built, optimizer.state) == (False, {})


def test_building_again():
    optimizer, parameters = Adamax(), three()
    assert optimizer.apply([]) == 0
    with pytest.raises(ValueError, match=r"variables must be given to apply\(\) before build\(\)"):
        optimizer.apply(three(3))
    with pytest.raises(ValueError, match="grads has 2 entries; expected 3"):
        optimizer.apply(three(3)[:2], parameters)
    assert (optimizer.built, optimizer.state) == (False, {})
    assert optimizer.apply(three(3), parameters) == 1
    norm = optimizer.state["variable_1"]["norm"]
    optimizer.build(parameters)
    optimizer.build(iter(parameters), ["a", "b", "c"])
    assert optimizer.apply(three(6)) == 2
    assert optimizer.state["variable_1"]["norm"] is norm
    for others in (parameters[:2], parameters[::-1], three(), []):
        with pytest.raises(ValueError, match=r"^variables must be those that the optimizer was bu"):
            optimizer.build(others)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_state_begins_in_a_cache_line_where_its_variable_does(dtype):
    memory = np.zeros(4096, np.uint8)
    itemsize = np.dtype(dtype).itemsize
    for offset in range(-memory.ctypes.data % 64, 64, 3):
        variable = np.ndarray(100, dtype, memory, offset)
        optimizer = Adamax()
        optimizer.build([variable])
        for array in optimizer.state["variable_0"].values():
            # So many elements to the next line, or to its second half.
            elements = variable.ctypes.data // itemsize
            assert array.ctypes.data // array.itemsize % (64 // array.itemsize) == elements % (
                64 // array.itemsize
            )
            assert array.flags.aligned


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_state_has_the_layout_of_its_variable(axes, dtype):
    variables = [np.ones(s, dtype) for s in ((2, 3, 4), (), (0, 2))]
    variables[0] = variables[0].transpose(axes)
    optimizer = Adamax(use_ema=True, gradient_accumulation_steps=2)
    optimizer.build(variables)
    for variable, arrays in zip(variables, optimizer.state.values(), strict=True):
        assert tuple(arrays) == KINDS
        for array in arrays.values():
            assert array.dtype == ("float64" if dtype == "float64" else "float32")
            assert array.shape == variable.shape
            if array.size:
                assert np.argsort(array.strides).tolist() == np.argsort(variable.strides).tolist()
            assert not array.any()
    live = optimizer.state["variable_0"]["gradient_accumulator"]
    optimizer.apply([variable.copy("K") for variable in variables])
    assert (live == 1).all()


@pytest.mark.parametrize("rate", [0.5, lambda: 0.5], ids=["number", "callable"])
@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("use_ema", [False, True])
def test_variables_and_counts(use_ema, steps, rate):
    optimizer, _, grads = built(
        learning_rate=rate, use_ema=use_ema, gradient_accumulation_steps=steps
    )
    assert [optimizer.apply(grads) for _ in range(4)] == [2, 3, 4, 5]
    assert (optimizer.calls, optimizer.iterations) == (5, 2 if steps else 5)
    scalars = [np.array(5, np.int64), np.array(0.5, np.float32)][: 1 if callable(rate) else 2]
    kept, state = optimizer.variables, optimizer.state
    kinds = ["average"] * use_ema + ["gradient_accumulator"] * bool(steps)
    expected = [state[name][kind] for kind in kinds for name in "abc"]
    expected += [state[name][kind] for name in "abc" for kind in KINDS[:2]]
    assert contents(kept[: len(scalars)]) == contents(scalars)
    assert [a.dtype for a in kept[: len(scalars)]] == [a.dtype for a in scalars]
    assert list(map(id, kept[len(scalars) :])) == list(map(id, expected))


# ---- Exclusion from weight decay -----------------------------------------------------------------

NAMES = ("dense/kernel", "dense/bias", "norm/scale", "bias_like")


def decayed(optimizer, variables):
    """Which variables weight decay changes, when nothing else does."""
    optimizer.build(variables, NAMES)
    optimizer.apply([np.zeros_like(variable) for variable in variables])
    return [i for i, variable in enumerate(variables) if (variable != 1).any()]


@pytest.mark.parametrize(
    ("listed", "patterns", "expected"),
    [
        ((), (), [0, 1, 2, 3]),
        ((), ("bias",), [0, 2]),
        ((), ("bias$", re.compile("^norm")), [0, 3]),
        ((), ("ense.k", "^kernel", "BIAS"), [1, 2, 3]),
        ((0, 3), (), [1, 2]),
        ((1,), ("norm",), [0, 3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_exclude_from_weight_decay(listed, patterns, expected, alias):
    variables = [np.ones((2, 2)) for _ in NAMES]
    optimizer = Adamax(weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["."])  # which the next call replaces
    optimizer.exclude_from_weight_decay((alias(variables[i]) for i in listed), iter(patterns))
    assert decayed(optimizer, variables) == expected


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_an_empty_variable_is_excluded_by_its_view(alias):
    variables = [np.ones((2, 2)), np.ones((0, 3)), np.ones(3)]
    optimizer = Adamax(weight_decay=0.5)
    optimizer.exclude_from_weight_decay([alias(variables[1]), alias(variables[2])])
    optimizer.build(variables)
    optimizer.apply([np.zeros_like(variable) for variable in variables])
    assert [(variable != 1).any() for variable in variables] == [True, False, False]


@pytest.mark.parametrize("part", [slice(0, 8), slice(0, 3), slice(0, 0), slice(1, 5)], ids=str)
def test_an_address_in_a_variable_does_not_exclude_it(part):
    memory = np.ones(8)
    optimizer = Adamax(weight_decay=0.5)
    optimizer.exclude_from_weight_decay([memory[4:], memory[part]])
    with pytest.raises(
        ValueError, match=r"^var_list\[1\] .* must be one of the variables; received"
    ):
        optimizer.build([memory[:4], memory[4:]])
    assert not optimizer.built


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, "bias"), TypeError, "var_names must be a sequence of strings; received"),
        ((None, ["("]), ValueError, "var_names must be regular expressions; received '('"),
        ((None, [1]), (TypeError, ValueError), "var_names must be regular expressions; received 1"),
        ((None, 1), TypeError, "var_names must be a sequence of strings; received"),
        (("bias",), TypeError, "var_list must be a sequence of buffers; received str"),
        ((np.ones(3),), TypeError, "var_list must be a sequence of buffers; received ndarray"),
        ((np.zeros(1),), TypeError, "var_list must be a sequence of buffers; received ndarray"),
        ((1,), TypeError, "var_list must be a sequence of buffers; received int"),
    ],
    ids=range(8),
)
def test_refused_exclusions(arguments, error, message):
    optimizer = Adamax(weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    with pytest.raises(error, match="^" + re.escape(message)):
        optimizer.exclude_from_weight_decay(*arguments)
    assert decayed(optimizer, [np.ones(2) for _ in NAMES]) == [1, 2, 3]
    with pytest.raises(
        ValueError, match=r"^exclude_from_weight_decay\(\) must be called before bu"
    ):
        optimizer.exclude_from_weight_decay(var_names=["b"])
    optimizer, variable = Adamax(), np.ones(3)
    optimizer.exclude_from_weight_decay([variable, "bias"])
    with pytest.raises(TypeError, match=r"^var_list\[1\] .*is a str"):
        optimizer.build([variable])
