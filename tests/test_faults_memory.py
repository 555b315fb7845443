"""Memory in bad company: sequences that lie or are emptied, views, cycles, limits of threads."""

import gc
import itertools
import sys
import threading
import time
import warnings
import weakref

import adamax_ext
import numpy as np
import pytest
from adamax_ext import Adamax, LossScaleOptimizer, _core
from support import emulated
from support.emulated import CudaArray
from support.frameworks import load_torch
from support.memory import SHAPE, DLPackOnly, contents, torch_alias, values
from support.processes import in_own_process

# ---- Sequences -----------------------------------------------------------------------------------

# What is called with an optimizer, gradients, new objects for its variables, and what makes the
# sequence that is passed.
TAKERS = {
    "grads": lambda o, g, v, to: o.apply(to(g)),
    "grads of some": lambda o, g, v, to: o.apply(to(g), v),
    "variables": lambda o, g, v, to: o.apply(g, to(v)),
    "pairs": lambda o, g, v, to: o.apply_gradients(to([(g.pop(0), v.pop(0)) for _ in v[:]])),
    "global_norm": lambda o, g, v, to: adamax_ext.global_norm(to(g)),
    "finalize": lambda o, g, v, to: o.finalize_variable_values(to(v)),
    "build": lambda o, g, v, to: Adamax().build(to(v)),
    "names": lambda o, g, v, to: Adamax().build(v, to(list("abc"[: len(v)]))),
    "excluded": lambda o, g, v, to: Adamax(weight_decay=1).exclude_from_weight_decay(to(v)),
}


def outcome(take, lend, to, count=3, shape=SHAPE):
    """What a taker returns and leaves, or None if it refuses and changes nothing."""
    arrays, optimizer = [values(i, shape) for i in range(3)], Adamax(use_ema=True)
    optimizer.build([lend(a) for a in arrays])
    optimizer.apply([lend(values(i, shape)) for i in range(3, 6)])
    before, gradients = contents(arrays), [lend(values(9 + i, shape)) for i in range(count)]
    try:
        result = take(optimizer, gradients, [lend(a) for a in arrays[:count]], to)
    except ValueError:
        assert contents(arrays) == before
        return None
    state = [getattr(array, "host", array) for array in optimizer.variables]
    return result, contents([*arrays, *state])


class LyingList(list):
    length = 0

    def __len__(self):
        return self.length


class LyingTuple(tuple):
    length = 0

    def __len__(self):
        return self.length


def numpy_view(array):
    return array[:]


LENDERS = [numpy_view, memoryview, torch_alias, DLPackOnly]


def check_lies(lend):
    for (name, take), count in itertools.product(TAKERS.items(), (0, 1, 3)):
        expected = outcome(take, lend, list, count)
        assert expected is not None or (name, count) == ("grads", 1)
        for kind, length in itertools.product((LyingList, LyingTuple), (0, 1, 5)):
            kind.length = length
            received = outcome(take, lend, kind, count)
            label = f"{name}: {count} items in a {kind.__name__} of {length}"
            assert received is None or received == expected, label


@pytest.mark.parametrize("lend", LENDERS)
def test_a_sequence_that_lies_about_its_length(lend):
    check_lies(lend)


def test_a_sequence_of_cuda_arrays_that_lies_about_its_length():
    emulated.run(check_lies, CudaArray)


PASSED = []


def as_passed(items):
    """Move `items` to PASSED, which alone holds them then."""
    PASSED[:] = items
    items.clear()
    return PASSED


class Emptying(DLPackOnly):
    """A look at its memory empties the list in which it was passed."""

    def __dlpack__(self, **arguments):
        PASSED.clear()
        return super().__dlpack__(**arguments)


class EmptyingOnCuda(CudaArray):
    @property
    def __cuda_array_interface__(self):
        PASSED.clear()
        return super().__cuda_array_interface__


def check_emptied_by_a_look(lend):
    for name, take in TAKERS.items():
        assert outcome(take, lend, as_passed) == outcome(take, lend, list), name


def test_a_list_that_is_emptied_while_it_is_read():
    check_emptied_by_a_look(Emptying)


def test_a_list_of_cuda_arrays_that_is_emptied_while_it_is_read():
    emulated.run(check_emptied_by_a_look, EmptyingOnCuda)


def outcome_while_emptied(take, lend):
    """What a taker does while another thread empties its list, and whether that came in time."""
    started, in_time = threading.Event(), []
    thread = threading.Thread(target=lambda: (started.wait(), PASSED.clear()))

    def pass_on(items):
        as_passed(items)
        started.set()
        return PASSED

    def watched(*arguments):
        result = take(*arguments)
        in_time.append(not PASSED)
        return result

    thread.start()
    result = outcome(watched, lend, pass_on, shape=LARGE)
    thread.join()
    return result, in_time[0]


def empty_lists_during_calls():
    sys.setswitchinterval(1000)  # the other thread runs when the GIL is given up: during kernels
    for name in ("grads", "variables", "pairs", "global_norm", "finalize"):
        expected = outcome(TAKERS[name], numpy_view, list, shape=LARGE)
        lenders = (numpy_view, torch_alias, DLPackOnly) * 3
        received = [outcome_while_emptied(TAKERS[name], lend) for lend in lenders]
        assert all(result == expected for result, _ in received), name
        assert any(in_time for _, in_time in received), name


LARGE = (1 << 20,)  # elements: memory that goes back to the system as soon as it is free


def test_a_list_that_is_emptied_while_the_kernel_runs():
    load_torch()
    in_own_process(empty_lists_during_calls)


# ---- Views of variables --------------------------------------------------------------------------

VIEWS = {"NumPy": numpy_view, "memoryview": memoryview, "torch": torch_alias, "DLPack": DLPackOnly}


@pytest.mark.parametrize("lend", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0), (1, 2)], ids=str)
def test_an_empty_variable_is_found_by_its_view(order, lend):
    shapes = [(0, 3), SHAPE, (0,), (2,)]
    arrays, twins = ([values(i, shape) for i, shape in enumerate(shapes)] for _ in range(2))
    optimizer, other = Adamax(), Adamax()
    optimizer.build([lend(a) for a in arrays])
    other.build(twins)
    grads = [values(9 + i, arrays[i].shape) for i in order]
    assert optimizer.apply(grads, [lend(arrays[i]) for i in order]) == 1
    assert other.apply(grads, [twins[i] for i in order]) == 1
    assert contents(arrays) == contents(twins)
    assert contents(optimizer.variables) == contents(other.variables)


def test_a_view_of_an_empty_variable_leaves_the_other_one():
    torch = load_torch()
    variables = [torch.empty(0), torch.empty(0)]  # at one address, null
    optimizer = Adamax()
    optimizer.build(variables)
    assert optimizer.apply([torch.empty(0), torch.empty(0)], [variables[1][:], variables[0]]) == 1


def build_and_exclude(optimizer, arrays):
    other = Adamax(weight_decay=0.1)
    other.exclude_from_weight_decay([a[:] for a in arrays])
    other.build(arrays)


def seconds(call, count):
    """The least time of a call with an optimizer of so many variables, and them."""
    arrays, times = [np.zeros(1, np.float32) for _ in range(count)], []
    optimizer = Adamax()
    optimizer.build(arrays)
    for _ in range(5):
        begin = time.perf_counter()
        call(optimizer, arrays)
        times.append(time.perf_counter() - begin)
    return min(times)


@pytest.mark.parametrize(
    "call", [lambda o, arrays: o.apply(arrays, [a[:] for a in arrays]), build_and_exclude]
)
def test_the_time_for_views_grows_as_their_number(call):
    few, many = seconds(call, 2_000), seconds(call, 16_000)
    assert many / few < 20, f"{few} s for 2,000, {many} s for 16,000"  # 8; quadratic: 64


# ---- Cycles --------------------------------------------------------------------------------------


class Holder(np.ndarray):
    """An array that can hold its optimizer."""


def stepped(optimizer, variable):
    optimizer.apply([np.ones(3, np.float32)], [variable])
    return optimizer


def through_plan(variable):
    states = [[np.zeros(3, np.float32)] for _ in range(2)]
    return _core.Plan(
        *((variable,), ["w"], [0]),
        **{"momentum": states[0], "norm": states[1], "averages": None, "accumulators": None},
    )


HELD = {
    "Adamax": lambda variable: stepped(Adamax(), variable),
    "LossScaleOptimizer": lambda variable: stepped(LossScaleOptimizer(Adamax()), variable),
    "Plan": through_plan,
}
HOLDERS = {
    "array": lambda: np.zeros(3, np.float32).view(Holder),
    "tensor": lambda: torch_alias(np.zeros(3, np.float32)),
    "DLPack": lambda: DLPackOnly(np.zeros(3, np.float32)),
}


@pytest.mark.parametrize("hold", HELD.values(), ids=HELD)
@pytest.mark.parametrize("make", HOLDERS.values(), ids=HOLDERS)
def test_a_cycle_through_an_optimizer_is_collected(make, hold):
    def cycle():
        variable = make()
        variable.optimizer = hold(variable)
        return weakref.ref(variable)

    alive = [cycle() for _ in range(20)]
    gc.collect()
    assert [reference() for reference in alive] == [None] * 20


# ---- Python that runs in the middle of a call ----------------------------------------------------


def test_memory_that_a_warning_moves(monkeypatch):
    """The hook of a warning can do anything; what was read before it is read again."""
    torch = load_torch()
    weights, twin = torch.ones(1000), np.ones(1000, np.float32)
    optimizer, other = Adamax(), Adamax()
    optimizer.build([weights, torch.ones(3)])
    other.build([twin])
    moved = torch.full((1000,), 2.0)
    twin[:] = 2.0

    def hook(*_, **__):
        weights.data = moved

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr("warnings.showwarning", hook)
        optimizer.apply([torch.ones(1000), None])
    other.apply([np.ones(1000, np.float32)])
    assert (moved.numpy() == twin).all()


def test_a_type_dies_with_an_optimizer_that_it_holds():
    def cycle():
        held = type("Held", (np.ndarray,), {})
        held.optimizer = Adamax()
        held.optimizer.build([np.ones(2, np.float32).view(held)])
        return weakref.ref(held), weakref.ref(held.optimizer)

    references = [cycle() for _ in range(20)]
    gc.collect()
    gc.collect()  # without a GIL, what other threads still counted is seen at the second time
    assert not any(reference() for pair in references for reference in pair)


@pytest.mark.parametrize("shape", [(2**40, 2**40), (-3,)], ids=str)
def test_a_shape_that_no_memory_has(shape):
    emulated.run(check_shape, shape)


def check_shape(shape):
    array = emulated.CudaArray(np.ones(3, np.float32), shape=shape)
    with pytest.raises(ValueError, match=r"^buffers\[0\] has a shape"):
        adamax_ext.global_norm([array])


MALFORMED = [{"typestr": ""}, {"typestr": None}, {"shape": None}, {"data": None}, {"stream": "x"}]


@pytest.mark.parametrize("change", MALFORMED, ids=str)
def test_a_malformed_array_interface_is_named(change):
    emulated.run(check_malformed, change)


def check_malformed(change):
    array = emulated.CudaArray(np.ones(3, np.float32), **change)
    with pytest.raises(BufferError, match=r"^buffers\[0\] has a __cuda_array_interface__ that"):
        adamax_ext.global_norm([array])


def test_only_dense_memory_is_copied():
    x, y = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)
    with pytest.raises(ValueError, match=r"^to has .*expected dense"):
        _core.copy(y[::2], x[::2])
    assert not y.any()


def check_weights_of_16_bits():
    optimizer = Adamax()
    optimizer.build([np.ones(3, np.float32)])
    halves = [emulated.CudaArray(np.full(3, x, np.float16), data=None) for x in (0.5, 0.25)]
    for half in halves:  # read-only too
        half.changes["data"] = (half.host.ctypes.data, True)
    optimizer.set_weights([1, 0.001, *halves])
    (state,) = optimizer.state.values()
    assert (state["momentum"] == 0.5).all()
    assert (state["norm"] == 0.25).all()


def test_weights_of_16_bits_from_a_device():
    emulated.run(check_weights_of_16_bits)
