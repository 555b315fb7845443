"""How weights are cut into variables, and in which order those come, changes no bit."""

import adamax_ext
import numpy as np
import pytest
from adamax_ext import Adamax
from hypothesis import given
from hypothesis import strategies as st
from support.bits import PAIRS, assert_same_bits, dtype_of, is_testable, rounded, spread
from support.low_memory import STORAGES, Twins, assert_same, needs_bfloat16
from support.sequences import seeds, sequences
from support.steps import SETTINGS

TESTABLE = [pair for pair in PAIRS if is_testable(*pair)]
PLAIN = [(*pair, 32, "nearest") for pair in TESTABLE if pair[0] != "float64"]

of_elements = {  # what a step does to each element by itself
    "weight_decay": st.sampled_from([None, 0.213]),
    "clipvalue": st.sampled_from([None, 0.61]),
    "use_ema": st.booleans(),
    "ema_overwrite_frequency": st.sampled_from([None, 2]),
    "loss_scale_factor": st.sampled_from([None, 4.0]),
    "gradient_accumulation_steps": st.sampled_from([None, 2, 4]),
}
settings = st.fixed_dictionaries(of_elements)
rows = st.lists(st.tuples(st.sampled_from(TESTABLE), st.integers(0, 70)), min_size=1, max_size=4)


def with_global_clipnorm(settings):
    """Squares of whole numbers are added exactly, so that no order of them matters."""
    return settings | {"clipvalue": None, "global_clipnorm": 4.3}


def make(rng, rows):
    return [spread(rng, size, dtype_of(pair[0])) for pair, size in rows]


def gradients(rng, rows, whole):
    for pair, size in rows:
        values = rng.integers(-9, 10, size) if whole else spread(rng, size, np.float64)
        yield values.astype(dtype_of(pair[1]))


def train(weights, calls, **settings):
    """Return the state after the optimizer has seen the gradients of these calls, by variable."""
    optimizer = Adamax(**SETTINGS, **settings)
    optimizer.build(weights)
    for grads in calls:
        optimizer.apply(grads)
    return list(optimizer.state.values())


def cut(arrays, cuts):
    """Return each array in pieces; `cuts` are where, as parts of its length."""
    return [
        piece
        for array in arrays
        for piece in np.split(array, sorted(int(at * array.size) for at in cuts))
    ]


def require_same_pieces(whole, pieces, count):
    for i, array in enumerate(whole):
        joined = np.concatenate(pieces[i * count : (i + 1) * count])
        assert_same_bits(joined, array, f"array {i}")


@sequences(in_suite=60, to_ship=900)
@given(rows, settings, st.booleans(), st.lists(st.floats(0, 1), min_size=1, max_size=4), seeds)
def test_splitting_variables_changes_no_bit(rows, settings, is_clipped, cuts, seed):
    if is_clipped:
        settings = with_global_clipnorm(settings)
    rng = np.random.default_rng(seed)
    whole = make(rng, rows)
    calls = [list(gradients(rng, rows, is_clipped)) for _ in range(5)]
    pieces = cut([w.copy() for w in whole], cuts)
    count = len(cuts) + 1
    of_whole = train(whole, calls, **settings)
    of_pieces = train(pieces, [cut(grads, cuts) for grads in calls], **settings)
    require_same_pieces(whole, pieces, count)
    for kind in of_whole[0]:
        kept = [[state[kind] for state in states] for states in (of_whole, of_pieces)]
        require_same_pieces(*kept, count)


@sequences(in_suite=60, to_ship=900)
@given(
    st.sampled_from([*STORAGES, *PLAIN]),
    st.integers(1, 5000),
    st.lists(st.integers(0, 19), max_size=4),
    st.sampled_from([0, 256, 2**33]),
    seeds,
)
def test_parts_of_a_variable_are_stepped_as_the_whole(storage, size, cuts, first_element, seed):
    """Parts begin at whole blocks of 256 elements, and know where in their variable that is."""
    rng = np.random.default_rng(seed)
    whole = Twins(rng, size, storage, first_element=first_element)
    begins = sorted({0, *(256 * k for k in cuts if 256 * k < size)})
    parts = []
    for begin, end in zip(begins, [*begins[1:], size], strict=True):
        part = {name: array[begin:end].copy() for name, array in whole.buffers.items()}
        if "norm_scale" in part:  # of each block, or one of the variable
            blocks = slice(begin // 256, -(-end // 256)) if storage[2] == 8 else slice(None)
            part["norm_scale"] = whole.buffers["norm_scale"][blocks].copy()
        parts.append((begin, end, part))
    for step in (3, 4):
        gradient = spread(rng, size, np.float32)
        settings = {**SETTINGS, "step": step}
        whole.step(gradient, f"step {step}", **settings)
        for begin, end, part in parts:
            place = {**whole.place, "first_element": first_element + begin}
            grad = rounded(gradient[begin:end], dtype_of(whole.grad))
            adamax_ext.update(
                grad=grad,
                **part,
                **place,
                **settings,
                weight_rounding=whole.rounding,
                ema_momentum=0.871,
            )
            for name, array in part.items():
                expected = whole.buffers[name]
                if name != "norm_scale":
                    expected = expected[begin:end]
                elif storage[2] == 8:
                    expected = expected[begin // 256 : -(-end // 256)]
                assert_same(array, expected, f"{name} from {begin} to {end}")


@sequences(in_suite=60, to_ship=900)
@given(
    rows,
    settings,
    st.sampled_from([{}, {"clipvalue": None, "clipnorm": 1.7}, with_global_clipnorm({})]),
    st.sampled_from([32, 8]),
    st.randoms(use_true_random=False),
    seeds,
)
def test_permuted_variables_give_permuted_results(rows, settings, clipping, bits, random, seed):
    """Where no random numbers are drawn: in 8 bits by none so small."""
    if bits == 8:
        rows = [row for row in rows if row[0][0] != "float64"] or [(("float32",) * 2, 3)]
    settings |= {**clipping, "state_bits": bits}
    rng = np.random.default_rng(seed)
    order = list(range(len(rows)))
    random.shuffle(order)
    weights = make(rng, rows)
    is_whole = "global_clipnorm" in clipping
    calls = [list(gradients(rng, rows, is_whole)) for _ in range(5)]
    permuted = [weights[i].copy() for i in order]
    states = train(weights, calls, **settings)
    others = train(permuted, [[grads[i] for i in order] for grads in calls], **settings)
    for i, w, state in zip(order, permuted, others, strict=True):
        assert_same_bits(w, weights[i], f"weights {i}")
        for kind, array in state.items():
            assert_same_bits(array, states[i][kind], f"{kind} of {i}")


@sequences(in_suite=30, to_ship=300)
@given(
    st.sampled_from([storage for storage in STORAGES if storage[0] == storage[1]]),
    st.permutations(range(3)),
    st.integers(0, 2**64 - 1),
    seeds,
)
def test_random_numbers_follow_from_the_position(storage, order, random_seed, seed):
    """What is permuted draws other numbers: those of `update` with the new position."""
    dtype, _, bits, rounding = storage
    rng = np.random.default_rng(seed)
    sizes = [4099, 300, 4096]
    start = [spread(rng, n, dtype_of(dtype)) for n in sizes]
    grads = [spread(rng, n, dtype_of(dtype)) for n in sizes]
    options = {"weight_rounding": rounding, "seed": random_seed}
    weights = [start[i].copy() for i in order]
    fresh = Adamax(**SETTINGS, **options, state_bits=bits)
    fresh.build([w.copy() for w in weights])
    states = [{kind: array.copy() for kind, array in kept.items()} for kept in fresh.state.values()]
    kept = train(weights, [[grads[i] for i in order]], **options, state_bits=bits)
    for position, i in enumerate(order):
        w, state = start[i].copy(), states[position]
        momentum, norm = state.pop("momentum"), state.pop("norm")
        where = {"variable": position, "step": 1}
        adamax_ext.update(w, grads[i], momentum, norm, **SETTINGS, **options, **where, **state)
        assert_same(w, weights[position], "weights")
        for kind, array in {**state, "momentum": momentum, "norm": norm}.items():
            assert_same(array, kept[position][kind], kind)


@needs_bfloat16
@pytest.mark.parametrize("options", [{"weight_rounding": "stochastic"}, {"state_bits": 16}])
def test_two_positions_draw_two_sets_of_numbers(options):
    """Unlike permuted variables without random numbers, these are not the same."""
    rng = np.random.default_rng(0)
    start, grad = (spread(rng, 300, dtype_of("bfloat16")) for _ in range(2))
    twins = [start.copy(), start.copy()]
    states = train(twins, [[grad, grad]], **options)
    pairs = [twins, [state["momentum"] for state in states]]
    assert any((a.view(np.uint8) != b.view(np.uint8)).any() for a, b in pairs)
