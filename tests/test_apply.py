"""Building, pairing of gradients and variables, counting, state; refusals that change nothing."""

import re
import threading

import numpy as np
import pytest
from adamax_ext import Adamax
from support.memory import DLPackOnly, contents, torch_alias, values

KINDS = ("momentum", "norm", "average", "gradient_accumulator")


def three(first_seed=0):
    return [values(first_seed + i) for i in range(3)]


def built(**settings):
    """An optimizer after one call with variables a, b and c; their arrays; gradients for more."""
    optimizer, parameters = Adamax(**settings), three()
    optimizer.build(dict(zip("abc", parameters, strict=True)))
    optimizer.apply(three(3))
    return optimizer, parameters, three(6)


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


# ---- Pairing gradients and variables -------------------------------------------------------------

ALIASES = {
    "itself": lambda a: a,
    "view": lambda a: a[:],
    "flat": np.ravel,
    "torch": torch_alias,
    "DLPack": DLPackOnly,
    "memoryview": memoryview,
}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1,), (2, 1)], ids=str)
@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_gradients_follow_their_variables(alias, order):
    expected, parameters, grads = built()
    unchanged = contents(parameters + expected.variables[2:])
    expected.apply(grads)
    changed = contents(parameters + expected.variables[2:])
    places = [[i, 3 + 2 * i, 4 + 2 * i] for i in order]  # of a weight and its two arrays
    chosen = {place for some in places for place in some}
    wanted = [(changed if i in chosen else unchanged)[i] for i in range(9)]
    for use_pairs in (False, True):
        optimizer, parameters, grads = built()
        pairs = ((grads[i], alias(parameters[i])) for i in order)
        if use_pairs:
            assert optimizer.apply_gradients(pairs) == 2
        else:
            assert optimizer.apply(*map(iter, zip(*pairs, strict=True))) == 2
        assert contents(parameters + optimizer.variables[2:]) == wanted


def test_scale_loss():
    assert Adamax().scale_loss(3) == 3
    assert Adamax(loss_scale_factor=4).scale_loss(np.float32(0.5)) == 2


def test_no_gradients_at_all_are_no_call():
    optimizer, parameters, _ = built()
    before = contents(parameters + optimizer.variables)
    assert optimizer.apply([]) == optimizer.apply(iter(()), parameters) == 1
    assert optimizer.apply_gradients([]) == 1
    assert contents(parameters + optimizer.variables) == before


@pytest.mark.parametrize("missing", ["a", "bc"])
def test_a_variable_without_gradient_is_skipped_with_a_warning(missing):
    optimizer, parameters, grads = built()
    grads = [None if name in missing else g for name, g in zip("abc", grads, strict=True)]
    watched = [[w, *a.values()] for w, a in zip(parameters, optimizer.state.values(), strict=True)]
    before = list(map(contents, watched))
    names = ", ".join(f"'{name}'" for name in missing)
    message = f"^no gradient for {names}: skipped in this call$"
    with pytest.warns(UserWarning, match=message) as caught:
        assert optimizer.apply(grads) == 2
    assert [warning.filename for warning in caught] == [__file__]
    for name, old, arrays in zip("abc", before, watched, strict=True):
        assert (contents(arrays) == old) == (name in missing)


# What is called with an optimizer, its variables and gradients; the error and its message.
REFUSED_CALLS = [
    (lambda o, w, g: o.apply(g[:2]), ValueError, "grads has 2 entries; expected 3, one for each"),
    (lambda o, w, g: o.apply(g[:2], w), ValueError, "grads has 2 entries; expected 3, one for"),
    (lambda o, w, g: o.apply(g, w[:2]), ValueError, "grads has 3 entries; expected 2, one for"),
    (lambda o, w, g: o.apply(g, [*w[:2], g[0]]), ValueError, "variables[2] is not one of the var"),
    (lambda o, w, g: o.apply(g[:1], [w[0][:2]]), ValueError, "variables[0] is not one of the var"),
    (lambda o, w, g: o.apply(g[:1], [None]), TypeError, "variables[0] is a NoneType; expected an"),
    (lambda o, w, g: o.apply(g, [*w[:2], w[0][:]]), ValueError, "variables[2] is variable 'a', wh"),
    (lambda o, w, g: o.apply_gradients([(g[0], w[0])] * 2), ValueError, "variables[1] is variable"),
    (lambda o, w, g: o.apply([None] * 3), ValueError, "grads has no gradient for any variable"),
    (lambda o, w, g: o.apply([None], w[:1]), ValueError, "grads has no gradient for any variable"),
    (lambda o, w, g: o.apply([g[0], None, g[2]]), UserWarning, "no gradient for 'b': skipped in"),
    (lambda o, w, g: o.apply(np.stack(g)), TypeError, "grads must be a sequence of buffers; recei"),
    (lambda o, w, g: o.apply({"a": g[0]}), TypeError, "grads must be a sequence of buffers; recei"),
    (lambda o, w, g: o.apply("abc"), TypeError, "grads must be a sequence of buffers; received"),
    (lambda o, w, g: o.apply(None), TypeError, "grads must be a sequence of buffers; received"),
    (lambda o, w, g: o.apply(g, np.stack(w)), TypeError, "variables must be a sequence of buf"),
    (lambda o, w, g: o.finalize_variable_values([g[0]]), ValueError, "variables[0] is not one of"),
    (lambda o, w, g: o.finalize_variable_values(w[0]), TypeError, "variables must be a sequence"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED_CALLS, ids=range(18))
def test_a_refused_call_changes_nothing(call, error, message):
    optimizer, parameters, grads = built(use_ema=True)
    before = contents(parameters + grads + optimizer.variables)
    with pytest.raises(error, match="^" + re.escape(message)):
        call(optimizer, parameters, grads)
    assert contents(parameters + grads + optimizer.variables) == before
    assert optimizer.apply(grads) == 2


def test_finalize_variable_values():
    for chosen in (None, [0], [2, 1]):
        optimizer, parameters, _ = built(use_ema=True, ema_momentum=0.5, learning_rate=0.5)
        optimizer.apply(three(6))
        averages = [arrays["average"].copy() for arrays in optimizer.state.values()]
        wanted = contents(parameters[:])
        for i in range(3) if chosen is None else chosen:
            assert wanted[i] != averages[i].tobytes()
            wanted[i] = averages[i].tobytes()
        optimizer.finalize_variable_values(chosen and (parameters[i][:] for i in chosen))
        assert contents(parameters) == wanted
        assert contents(a["average"] for a in optimizer.state.values()) == contents(averages)


def test_finalize_variable_values_without_averages():
    optimizer, parameters, _ = built()
    before = contents(parameters)
    for each in (optimizer, Adamax()):
        each.finalize_variable_values()
    assert contents(parameters) == before
    with pytest.raises(ValueError, match=r"^finalize_variable_values\(\) must be called after bui"):
        Adamax(use_ema=True).finalize_variable_values()


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


# ---- One call at a time --------------------------------------------------------------------------

ENTRIES = {
    "apply": lambda optimizer: optimizer.apply(three(9)),
    "build": lambda optimizer: optimizer.build(three()),
    "finalize_variable_values": lambda optimizer: optimizer.finalize_variable_values(),
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict({}),
    "set_weights": lambda optimizer: optimizer.set_weights([]),
}
AT_ONCE = "called while another call is running"


@pytest.mark.parametrize("enter", ENTRIES.values(), ids=ENTRIES)
def test_a_learning_rate_cannot_enter_its_optimizer(enter):
    rates = [lambda: 0.1, lambda: enter(optimizer), lambda: 0.1]
    optimizer, parameters, grads = built(learning_rate=lambda: rates.pop(0)(), use_ema=True)
    before = contents(parameters + optimizer.variables)
    with pytest.raises(RuntimeError, match=AT_ONCE):
        optimizer.apply(grads)
    assert contents(parameters + optimizer.variables) == before
    assert optimizer.apply(grads) == 2


class Pause:
    """A learning rate that waits inside its optimizer until `go_on` is set."""

    def __init__(self):
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __call__(self):
        self.inside.set()
        assert self.go_on.wait(60)
        return 0.1


@pytest.mark.parametrize("enter", ENTRIES.values(), ids=ENTRIES)
def test_a_second_thread_is_turned_away(enter):
    optimizer, parameters, pause = Adamax(0.1, use_ema=True), three(), Pause()
    optimizer.build(parameters)
    optimizer.learning_rate = pause
    before, counts = contents(parameters + optimizer.variables), []
    thread = threading.Thread(target=lambda: counts.append(optimizer.apply(three(3))))
    thread.start()
    try:
        assert pause.inside.wait(60)
        with pytest.raises(RuntimeError, match=AT_ONCE):
            enter(optimizer)
        assert contents(parameters + optimizer.variables) == before
    finally:
        pause.go_on.set()
        thread.join(60)
    assert counts == [1]
    assert optimizer.apply(three(6)) == 2


def test_two_optimizers_run_at_once():
    meeting, counts = threading.Barrier(2, timeout=60), []
    optimizers = [Adamax(lambda: 0.1 + 0 * meeting.wait()) for _ in range(2)]
    other = threading.Thread(target=lambda: counts.append(optimizers[1].apply(three(3), three())))
    other.start()
    counts.append(optimizers[0].apply(three(3), three()))
    other.join(60)
    assert counts == [1, 1]
