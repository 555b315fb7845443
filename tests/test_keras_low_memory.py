"""Steps of our Adamax for Keras with state in fewer bits and rounded weights, on torch.

Their bits are those of `adamax_ext.Adamax`, and so of the program, whatever Keras does around it.
"""

import adamax_ext
import numpy as np
import pytest
from support.bits import memory_order
from support.keras_low_memory import (
    SETTINGS,
    Twins,
    apply,
    as_stored,
    as_tensor,
    everything,
    kept_by,
    make_arrays,
    make_gradients,
    require_equal,
    variables_of,
)
from support.keras_pairs import Adamax, keras
from support.keras_torch import torch
from support.low_memory import LowMemoryReference, assert_same, every_option

# Of Keras, whose variables do not yet say `copy` to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

EMA = {"use_ema": True, "ema_momentum": 0.871, "ema_overwrite_frequency": 2}
DECAY = {"weight_decay": 0.213, "excluded": ("kernel", "brain_bias"), "loss_scale_factor": 3.7}
CASES = [
    {},
    {**EMA, **DECAY, "global_clipnorm": 2.0},
    {**EMA, "gradient_accumulation_steps": 2, "clipvalue": 0.61},
    {**DECAY, "gradient_accumulation_steps": 3, "clipnorm": 1.5, "use_ema": True},
]
SKIPPED = {(0, "kernel"), (1, "brain_kernel"), (2, "brain_kernel"), (3, "brain_bias"), (4, "bias")}


# ---- Bits ----------------------------------------------------------------------------------------


@every_option
@pytest.mark.parametrize("settings", CASES, ids=["plain", "all", "micro-batches", "decay"])
def test_bits_are_those_of_adamax(bits, rounding, settings):
    twins = Twins(bits, rounding, **settings)
    for call in range(6):
        twins.train([call], SKIPPED)
        if call >= settings.get("gradient_accumulation_steps", 1) - 1:  # before, an average is 0
            twins.require_same()
    assert int(twins.ours._iterations) == twins.numpys.calls == 6


@every_option
def test_bits_are_those_of_the_program(bits, rounding):
    settings = {**SETTINGS, "state_bits": bits, "weight_rounding": rounding, "use_ema": True}
    arrays = make_arrays(rounding)
    variables, optimizer = variables_of(arrays), Adamax(**settings)
    theirs = LowMemoryReference(**settings)
    theirs.build(list(arrays.values()))
    for call in range(4):
        gradients = make_gradients(arrays, call)
        apply(optimizer, gradients, variables)
        theirs.apply(gradients)
        for i, name in enumerate(arrays):
            expected = theirs.kept(i)
            for kind, kept in {**kept_by(optimizer, i), "weights": variables[i]}.items():
                bits_of = expected[kind]
                if bits_of.dtype.name == "bfloat16":
                    bits_of = bits_of.view(np.uint16)
                assert_same(memory_order(as_stored(kept)), bits_of, f"{kind} of {name}, {call}")


def test_the_seed_counts():
    results = []
    for seed in (9, 9, 10):
        twins = Twins(8, "stochastic", seed=seed)
        twins.train(range(2))
        twins.require_same()
        results.append([w.tobytes() for w in everything(twins.ours, twins.variables)])
    assert results[0] == results[1] != results[2]


def test_variables_without_a_gradient_or_not_passed_are_left_alone():
    twins = Twins(8, "remainder")
    twins.train(range(2))
    names = list(twins.arrays)
    chosen = [names.index("brain_bias"), names.index("kernel")]
    gradients = make_gradients(twins.arrays, 2)
    apply(twins.ours, [gradients[i] for i in chosen], [twins.variables[i] for i in chosen])
    twins.numpys.apply([gradients[i] for i in chosen], [twins.arrays[names[i]] for i in chosen])
    twins.require_same()
    twins.variables[0].trainable = False  # which Keras' optimizers do not look at
    twins.train([3], {(3, names[0])})
    twins.variables[0].trainable = True
    twins.train([4])
    twins.require_same()


# ---- What Keras does around a step ---------------------------------------------------------------


def test_a_loss_scale_around_it_skips_what_is_not_finite():
    twins = Twins(8, "stochastic")
    scaling = keras.optimizers.LossScaleOptimizer(twins.ours, 2.0**3, 100)
    scaling.build(twins.variables)
    for call in range(5):
        gradients = make_gradients(twins.arrays, call)
        scale = float(scaling.dynamic_scale.numpy())
        scaled = [g * np.asarray(scale, g.dtype) for g in gradients]
        if call in (1, 3):
            scaled[0][2, 2] = np.inf
        apply(scaling, scaled, twins.variables)
        if call not in (1, 3):
            twins.numpys.apply(gradients)
        twins.require_same()
    assert scale == 2.0
    assert int(twins.ours.iterations) == 3


@every_option
def test_a_constraint_is_applied_to_the_weights_as_they_are_stored(bits, rounding):
    """The remainder stays: it is what the next step adds to."""
    twins = Twins(bits, rounding)
    places = [i for i, v in enumerate(twins.variables) if v.name in ("kernel", "brain_bias")]
    for i in places:
        twins.variables[i].constraint = keras.constraints.MaxNorm(0.5)
    for call in range(3):
        twins.train([call])
        for i in places:
            array = list(twins.arrays.values())[i]
            constrained = twins.variables[i].constraint(as_tensor(array))
            array.view(f"u{array.itemsize}")[...] = as_stored(constrained).view(
                f"u{array.itemsize}"
            )
        twins.require_same()


@pytest.mark.parametrize("steps", [None, 2])
def test_gradients_overwrite_variables_that_ask_for_it(steps):
    """They have no state, and are not counted as variables."""
    settings = {"state_bits": 8, "weight_rounding": "remainder", **SETTINGS}
    settings["gradient_accumulation_steps"] = steps
    arrays = make_arrays("remainder")
    variables, optimizer = variables_of(arrays), Adamax(**settings)
    numpys = adamax_ext.Adamax(**settings)
    for name in ("kernel", "brain_bias"):
        variables[list(arrays).index(name)].overwrite_with_gradient = True
    others = {n: a for n, a in arrays.items() if n not in ("kernel", "brain_bias")}
    numpys.build(others)
    for call in range(4):
        gradients = dict(zip(arrays, make_gradients(arrays, call), strict=True))
        apply(optimizer, gradients.values(), variables)
        numpys.apply([gradients[name] for name in others])
    places = [i for i, name in enumerate(arrays) if name in others]
    for i, name in zip(places, others, strict=True):
        for kind, expected in numpys.state[name].items():
            assert_same(as_stored(kept_by(optimizer, i)[kind]), expected, f"{kind} of {name}")
    assert kept_by(optimizer, 0).keys() <= {"gradient_accumulator"}
    if steps is None:
        np.testing.assert_array_equal(as_stored(variables[0]), gradients["kernel"])


def test_a_mark_that_is_set_after_building():
    twins = Twins(8, "remainder")
    twins.train(range(2))
    before = [as_stored(v) for v in kept_by(twins.ours, 0).values()]
    twins.variables[0].overwrite_with_gradient = True
    gradients = make_gradients(twins.arrays, 2)
    apply(twins.ours, gradients)
    np.testing.assert_array_equal(as_stored(twins.variables[0]), gradients[0])
    require_equal([as_stored(v) for v in kept_by(twins.ours, 0).values()], before)
    store = {}
    twins.ours.save_own_variables(store)
    twins.ours.load_own_variables(store)


@pytest.mark.parametrize("storage", [(8, "nearest"), (32, "stochastic"), (16, "remainder")])
def test_stateless_and_symbolic_steps_are_refused(storage):
    twins = Twins(*storage)
    twins.train(range(2))
    before = everything(twins.ours, twins.variables)
    gradients = [as_tensor(g) for g in make_gradients(twins.arrays, 2)]
    message = rf"stateless or symbolic .* state_bits {storage[0]} and weight_rounding '{storage[1]}"
    state, weights = ([v._value for v in kept] for kept in (twins.ours.variables, twins.variables))
    with pytest.raises(NotImplementedError, match=message):
        twins.ours.stateless_apply(state, gradients, weights)
    with keras.SymbolicScope(), pytest.raises(NotImplementedError, match=message):
        twins.ours.apply(gradients)
    require_equal(everything(twins.ours, twins.variables), before)


@every_option
def test_averages_overwrite_weights_and_remainders_at_the_end(bits, rounding):
    twins = Twins(bits, rounding, use_ema=True, ema_momentum=0.7)
    twins.train(range(3))
    for i, kinds in enumerate(twins.numpys.state.values()):
        average = kept_by(twins.ours, i)["average"]
        ties = as_stored(average) * 0 + np.float32(1 + 2.0**-8)  # between two of bfloat16
        average.assign(np.where(as_stored(average) > 0, ties, as_stored(average)))
        kinds["average"][...] = as_stored(average)
    twins.ours.finalize_variable_values(twins.variables)
    twins.numpys.finalize_variable_values()
    twins.require_same()


def test_weights_swapped_with_averages_and_back_keep_their_remainders():
    twins = Twins(16, "remainder", use_ema=True)
    twins.train(range(3))
    weights = [as_stored(v) for v in twins.variables]
    remainders = [as_stored(v) for v in twins.ours._stored.remainders if v is not None]
    swap = keras.callbacks.SwapEMAWeights()
    swap._backend_swap_variables(twins.ours)
    assert not np.array_equal(as_stored(twins.variables[0]), weights[0])
    swap._backend_swap_variables(twins.ours)
    require_equal([as_stored(v) for v in twins.variables], weights)
    kept = [as_stored(v) for v in twins.ours._stored.remainders if v is not None]
    require_equal(kept, remainders)


# ---- Memory --------------------------------------------------------------------------------------


def in_another_order(tensor):
    axes = list(range(tensor.ndim))[::-1]
    return tensor.permute(axes).contiguous().permute(axes)


def with_gaps(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


@every_option
@pytest.mark.parametrize("move", [torch.clone, in_another_order, with_gaps])
@pytest.mark.parametrize("of", ["weights", "state", "all"])
def test_variables_whose_memory_moved_are_stepped_in_the_order_of_their_blocks(
    bits, rounding, move, of
):
    twins = Twins(bits, rounding, use_ema=True, ema_momentum=0.7)
    twins.train(range(2))
    state = twins.ours.variables[2:]
    for variable in {"weights": twins.variables, "state": state, "all": twins.variables + state}[
        of
    ]:
        tensor = variable._value
        moved = move(tensor.detach())
        variable._value = torch.nn.Parameter(moved, tensor.requires_grad)
    twins.train(range(2, 4))
    twins.require_same()
    # So they are where they are saved.
    store, expected = {}, {}
    twins.ours.save_own_variables(store)
    twins.numpys.save_own_variables(expected)
    for key in list(expected)[2:]:
        np.testing.assert_array_equal(np.asarray(store[key]), expected[key], key, strict=True)
    twins.ours.load_own_variables(store)
    twins.numpys.load_own_variables(expected)
    twins.require_same()


def test_state_is_in_the_memory_order_of_its_variable():
    twins = Twins(8, "remainder")
    i = list(twins.arrays).index("brain_kernel")
    kept = kept_by(twins.ours, i)
    assert twins.variables[i]._value.stride() == (1, 64, 192)
    for kind in ("momentum", "norm", "remainder"):
        assert kept[kind]._value.stride() == (1, 64, 192)
    twins.train(range(1))
    assert twins.ours._step.tensors._copies == []


def test_bytes_of_state():
    """Half as many, and a quarter, with a float32 for each 256 elements."""
    bytes_of = {}
    for bits in (32, 16, 8):
        optimizer = Adamax(state_bits=bits)
        optimizer.build([keras.Variable(np.zeros(shape, "f")) for shape in ((1000, 100), (4096,))])
        tensors = [v._value for v in optimizer.variables[2:]]
        bytes_of[bits] = sum(t.nbytes for t in tensors) / 104_096
    assert bytes_of[32] == 8
    assert 4 < bytes_of[16] < 4.001
    assert 2 < bytes_of[8] <= 2.02
