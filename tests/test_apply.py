"""Pairing of gradients and variables, one call at a time; refusals that change nothing."""

import re
import threading

import numpy as np
import pytest
from adamax_ext import Adamax
from support.memory import contents
from support.three import ALIASES, built, three

# ---- Pairing gradients and variables -------------------------------------------------------------


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
