"""Our Adamax for Keras never trains on memory that is no longer a variable's, and copies back."""

import gc
import signal
import time
import weakref

import numpy as np
import pytest
from support.keras_pairs import (
    RULE,
    Adamax,
    Pair,
    assert_same,
    everything,
    keras,
    make_grads,
    make_variables,
    train,
)
from support.keras_torch import torch

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FULL = {**RULE, "use_ema": True, "gradient_accumulation_steps": 2, "global_clipnorm": 1.0}


def moved(variable):
    """As `Module.to` does it."""
    variable._value.data = variable._value.data.clone()


def moved_in_place(variable):
    """As sending a tensor to another process does it: the storage moves."""
    tensor = variable._value
    with torch.no_grad():
        tensor.set_(tensor.detach().clone())


def shared(variable):
    variable._value.share_memory_()


def replaced(variable):
    tensor = variable._value
    variable._value = torch.nn.Parameter(tensor.detach().clone(), tensor.requires_grad)


def in_another_order(variable):
    """As `Module.to(memory_format=...)` does it."""
    tensor = variable._value
    if tensor.ndim == 3:
        tensor.data = tensor.data.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def with_gaps(variable):
    tensor = variable._value
    gaps = torch.stack([tensor.detach(), tensor.detach()], -1)[..., 0]
    variable._value = torch.nn.Parameter(gaps, tensor.requires_grad)


def replaced_in_another_order(variable):
    tensor = variable._value
    if tensor.ndim == 2:
        transposed = tensor.detach().mT.contiguous().mT
        variable._value = torch.nn.Parameter(transposed, tensor.requires_grad)


MOVES = [
    moved, moved_in_place, shared, replaced, in_another_order, with_gaps, replaced_in_another_order
]  # fmt: skip


@pytest.mark.parametrize("settings", [RULE, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("of", ["weights", "state", "all"])
@pytest.mark.parametrize("move", MOVES)
def test_a_variable_whose_memory_moved_is_stepped_where_it_is(move, of, settings):
    settings = {**settings, "global_clipnorm": None}  # a norm adds up in the order of memory
    kept, variables = make_variables(), make_variables()
    expected, optimizer = Adamax(**settings), Adamax(**settings)
    train(expected, kept, range(3))
    train(optimizer, variables, range(3))
    chosen = [*variables] if of == "weights" else optimizer.variables[2:]
    old = [v._value.detach() for v in chosen]
    for variable in [*variables, *chosen] if of == "all" else chosen:
        move(variable)
    before = [tensor.clone() for tensor in old]
    train(expected, kept, range(3, 7))
    train(optimizer, variables, range(3, 7))
    assert_same(everything(optimizer, variables), everything(expected, kept))
    if move in (replaced, with_gaps):
        assert_same(old, before)  # nobody wrote there


def test_weights_in_any_memory_order_have_state_like_them():
    value = torch.randn(6, 5).mT
    variables = [keras.Variable(value), keras.Variable(torch.zeros(2, 5, 6).permute(2, 0, 1))]
    optimizer = Adamax(**FULL)
    optimizer.build(variables)
    assert variables[0]._value.stride() == (1, 5)
    for kept in (optimizer._m, optimizer._u, optimizer._accumulated_gradients):
        for state, variable in zip(kept, variables, strict=True):
            assert state._value.stride() == variable._value.stride()
    optimizer.apply([torch.ones(5, 6), torch.ones(6, 2, 5)], variables)
    assert optimizer._step.tensors._copies == []


def test_a_variable_whose_elements_share_memory_is_refused():
    variable = keras.Variable(np.ones((3, 4), "float32"))
    optimizer = Adamax()
    optimizer.build([variable])
    variable._value = torch.nn.Parameter(torch.ones(1, 4).expand(3, 4))
    before = everything(optimizer, [variable])
    with pytest.raises(RuntimeError, match="single memory location"):
        optimizer.apply([torch.ones(3, 4)])
    assert_same(everything(optimizer, [variable]), before)


def test_weights_that_torch_casts_are_stepped_in_their_new_dtype():
    cast, halves = make_variables(), make_variables("float16")
    optimizer, expected = Adamax(**RULE), Adamax(**RULE)
    for variable, half in zip(cast, halves, strict=True):
        variable.assign(half)
    optimizer.build(cast)
    optimizer.apply([torch.zeros(v.shape) for v in cast])  # makes the plan
    expected.apply([torch.zeros(v.shape) for v in cast], halves)
    for variable, half in zip(cast, halves, strict=True):
        variable.assign(half)
        variable._value.data = variable._value.data.half()
    train(optimizer, cast, range(3))
    train(expected, halves, range(3))
    assert_same(everything(optimizer, cast), everything(expected, halves))


def test_a_dtype_without_a_kernel_is_refused_without_harm():
    variables = make_variables()
    optimizer = Adamax(**RULE)
    train(optimizer, variables, range(2))
    variables[0]._value.data = variables[0]._value.data.to(torch.complex64)
    before = everything(optimizer, variables)
    with pytest.raises(TypeError, match=r"variables\[0\]"):
        train(optimizer, variables, range(1))
    assert_same(everything(optimizer, variables), before)


def test_an_optimizer_is_collected_with_its_tensors():
    variables = make_variables()
    optimizer = Adamax(**FULL)
    train(optimizer, variables, range(3))
    dead = weakref.ref(optimizer), weakref.ref(optimizer._m[0]._value)
    del optimizer
    gc.collect()
    assert [reference() for reference in dead] == [None, None]


# ---- Ctrl-C --------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands for Ctrl-C, so that a real one still stops the tests."""


@pytest.mark.parametrize("gaps", [False, True])
def test_an_interrupt_leaves_a_step_done_and_counted_or_not_done(gaps):
    """At many moments: the state is that of a run which did as many steps as are counted."""
    settings = {**RULE, "use_ema": True}
    expected = {}
    optimizer, variables = Adamax(**settings), make_variables()
    optimizer.build(variables)
    expected[0] = everything(optimizer, variables)
    begin = time.perf_counter()
    train(optimizer, variables, range(1))
    seconds = time.perf_counter() - begin
    expected[1] = everything(optimizer, variables)

    def interrupt(*_):
        raise Interrupted

    old, seen = signal.signal(signal.SIGALRM, interrupt), set()
    gc.disable()  # other libraries run Python in it, where the exception would be lost
    try:
        for i in range(300):
            optimizer, variables = Adamax(**settings), make_variables()
            optimizer.build(variables)
            if gaps:
                with_gaps(variables[0])
            grads = make_grads(0)
            try:
                signal.setitimer(signal.ITIMER_REAL, 2 * seconds * (1 + i) / 300)
                optimizer.apply(grads, variables)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                pass
            done = int(optimizer._iterations)
            seen.add(done)
            assert_same(everything(optimizer, variables), expected[done])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        gc.enable()
        torch.set_grad_enabled(True)  # an interrupt within torch.no_grad() leaves it off
    assert seen == {0, 1}


def test_an_interrupt_right_after_the_native_step_is_counted(monkeypatch):
    pair = Pair(**RULE)
    pair.train(range(2))
    step = pair.ours._step

    class Plan:
        """Which is interrupted when it is done."""

        def __init__(self, plan):
            self.plan = plan

        def __getattr__(self, name):
            return getattr(self.plan, name)

        def step(self, *arguments):
            self.plan.step(*arguments)
            raise Interrupted

    monkeypatch.setattr(step, "_plan", Plan(step._plan))
    with pytest.raises(Interrupted):
        train(pair.ours, pair.variables, [2])
    monkeypatch.undo()
    assert int(pair.ours.iterations) == 3
    train(pair.theirs, pair.their_variables, [2])
    pair.train(range(3, 5))
    pair.assert_near()
