"""State in 16 and 8 bits, and every rounding of weights: the bits of the program, on every ISA."""

import adamax_ext
import numpy as np
import pytest
from support import reference_lowmem as program
from support.bits import spread
from support.isas import each_thread_count, every_isa, run_on
from support.low_memory import STORAGES, Twins, assert_same, needs_bfloat16
from support.memory import unaligned
from support.steps import RULES, SETTINGS, special_values

every_storage = pytest.mark.parametrize(
    "storage", STORAGES, ids=["-".join(map(str, storage)) for storage in STORAGES]
)


def gradient(rng, size):
    """Return values of many magnitudes, and zeros."""
    return spread(rng, size, np.float32, -12, 4) * (rng.random(size) > 0.2).astype(np.float32)


def check_sizes(storage):
    """Each number of elements that a tile can have, and more than one tile of each."""
    rng = np.random.default_rng(1)
    for size in (*range(1, 1101), 4095, 4096, 4097, 69_999, 70_000, 70_001):
        twins = Twins(rng, size, storage, odd=size % 2, average=size % 3 == 0)
        twins.step(gradient(rng, size), f"a step of {size} elements", step=3, **SETTINGS)


def check_rules(storage):
    """Every rule, with and without clipping and unscaling, for several steps."""
    rng = np.random.default_rng(2)
    for rule in RULES:
        for clipvalue, grad_scale in ((None, 0.37), (0.61, 1.0)):
            twins = Twins(rng, 515, storage, is_fresh=True, average=clipvalue is None)
            changes = {**SETTINGS, **rule, "clipvalue": clipvalue, "grad_scale": grad_scale}
            for step in (1, 2, 3, 7, 2**40):
                twins.step(gradient(rng, 515), f"step {step} of {changes}", step=step, **changes)


def check_twenty_steps(storage):
    """From a variable's first step on, with a random number of its own for every element."""
    rng = np.random.default_rng(3)
    for place in ({}, {"seed": 0, "variable": 0}, {"seed": 2**64 - 1, "variable": 2**32 - 1}):
        twins = Twins(rng, 1100, storage, is_fresh=True, **place)
        for step in range(1, 21):
            twins.step(gradient(rng, 1100), f"step {step} with {place}", step=step, **SETTINGS)


def check_special_values(storage):
    """NaN, infinities, the largest, the smallest: as gradients, in some steps, of any element."""
    rng = np.random.default_rng(4)
    table = np.append(special_values(np.dtype(np.float32)), np.float32([1e30, 1e-30, 3e38, -3e38]))
    for rule in RULES:
        for clipvalue in (None, 0.05):
            twins = Twins(rng, 700, storage, is_fresh=True)
            for step in range(1, 9):
                g = gradient(rng, 700)
                if step % 4 == 2:
                    chosen = rng.integers(0, 700, 60 if step == 2 else 700)
                    with np.errstate(all="ignore"):
                        g[chosen] = rng.choice(table, chosen.size)
                if step == 7:
                    g[:] = 0
                label = f"step {step} of {rule}, clipvalue {clipvalue}"
                changes = {**SETTINGS, **rule, "clipvalue": clipvalue}
                twins.step(g, label, step=step, **changes)


def check_first_element(storage):
    """Parts of a variable, also where the words of their random numbers begin a new slab."""
    rng = np.random.default_rng(5)
    for first in (256, 65536 * 256, 2**33 - 512, 2**34 - 256, 2**52):
        twins = Twins(rng, 1100, storage, first_element=first)
        for step in (5, 6):
            twins.step(gradient(rng, 1100), f"from element {first}", step=step, **SETTINGS)


def check_threads(storage):
    """Of so many elements that seven threads have a MiB each to read, in the fewest bytes too."""
    rng = np.random.default_rng(6)
    twins = Twins(rng, 12 * 65_536 + 1, storage)
    for step, threads in enumerate(each_thread_count(), 2):
        g = gradient(rng, 12 * 65_536 + 1)
        twins.step(g, f"{threads} threads", step=step, **SETTINGS)


CHECKS = (check_sizes, check_rules, check_twenty_steps, check_special_values, check_first_element)
CHECKS += (check_threads,)


@every_isa
@every_storage
@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__[6:] for check in CHECKS])
def test_bits_of_the_program(isa, storage, check):
    run_on(isa, check, storage)


@every_isa
@pytest.mark.parametrize("odd", [1, 3])
@every_storage
def test_odd_addresses(isa, storage, odd):
    run_on(isa, check_odd_addresses, storage, odd)


def check_odd_addresses(storage, odd):
    rng = np.random.default_rng(7)
    for size in (1, 255, 256, 1100):
        twins = Twins(rng, size, storage, odd=odd)
        assert all(array.ctypes.data % 2 for array in twins.buffers.values())
        for step in (2, 3):
            twins.step(
                gradient(rng, size), f"{size} elements at odd addresses", step=step, **SETTINGS
            )


# ---- Parts, seeds -------------------------------------------------------------------------------


def stepped(storage, parts, *, size=2048, seed=1, variable=2, shift=0):
    """Return all buffers after two steps on a variable in so many parts."""
    twins = Twins(np.random.default_rng(8), size, storage, average=False)
    rng, buffers = np.random.default_rng(9), twins.buffers
    for step in (2, 3):
        g = gradient(rng, size).astype(buffers["param"].dtype)
        for begin in range(0, size, size // parts):
            part = {
                name: array[begin : begin + size // parts]
                if name != "norm_scale"
                else array[begin // 256 : (begin + size // parts) // 256]
                for name, array in buffers.items()
            }
            adamax_ext.update(
                grad=g[begin : begin + size // parts],
                **part,
                step=step,
                **SETTINGS,
                weight_rounding=storage[3],
                seed=seed,
                variable=variable,
                first_element=begin + shift,
            )
    return {name: array.view(f"u{array.itemsize}").copy() for name, array in buffers.items()}


@pytest.mark.parametrize("storage", [s for s in STORAGES if s[0] == s[1]], ids=str)
def test_a_gradient_in_the_memory_of_its_parameter(storage):
    """As after a backward pass that wrote it there; the last block is a short one."""
    results = []
    for is_apart in (True, False):
        twins = Twins(np.random.default_rng(14), 700, storage)
        buffers = twins.buffers
        for step in (2, 3):
            grad = buffers["param"].copy() if is_apart else buffers["param"]
            settings = {**SETTINGS, **twins.place, "weight_rounding": twins.rounding, "step": step}
            adamax_ext.update(grad=grad, **buffers, **settings)
        results.append(buffers)
    for name, array in results[0].items():
        assert_same(results[1][name], array, name)


@needs_bfloat16
@pytest.mark.parametrize("rounding", ["stochastic", "remainder"])
def test_parts_of_a_variable_are_the_variable(rounding):
    storage = ("bfloat16", "bfloat16", 8, rounding)
    whole = stepped(storage, 1)
    for parts in (2, 8):
        np.testing.assert_equal(stepped(storage, parts), whole)


@needs_bfloat16
@pytest.mark.parametrize("other", [{"seed": 2}, {"variable": 3}, {"shift": 256}], ids=str)
def test_another_seed_variable_or_part_draws_other_numbers(other):
    storage = ("bfloat16", "bfloat16", 8, "stochastic")
    one, another = stepped(storage, 1), stepped(storage, 1, **other)
    for name in ("param", "m"):
        differ = one[name] != another[name]
        assert 0.1 < differ.mean() < 0.9, name
    np.testing.assert_array_equal(one["norm_scale"], another["norm_scale"])


# ---- Conversions: the words of the step, on whole arrays ----------------------------------------


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 1100])
@pytest.mark.parametrize("odd", [0, 1])
def test_conversions_are_those_of_the_program(bits, size, odd):
    rng = np.random.default_rng(size)
    twins = Twins(rng, size, ("float32", "float32", bits, "nearest"), average=False)
    state, buffers = twins.state, {k: unaligned(a, odd)[0] for k, a in twins.buffers.items()}
    kept = buffers["m"], buffers["u"], buffers["norm_scale"]
    for epsilon in (1e-7, 0.25, 0.0):
        state.epsilon = epsilon
        m, u = (unaligned(np.ones(size, np.float32), odd)[0] for _ in range(2))
        adamax_ext._core.decode_state(*kept, epsilon, m, u)
        for actual, expected in zip((m, u), state.read(), strict=True):
            np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))

        u = np.abs(gradient(rng, size))
        u[rng.random(size) < 0.02] = np.inf
        m = u * rng.uniform(-1.2, 1.2, size).astype(np.float32)
        m[rng.random(size) < 0.02] = np.nan
        u[256:512] = 0  # a block of its own
        with np.errstate(all="ignore"):
            state.convert(m, u)
        adamax_ext._core.encode_state(unaligned(m, odd)[0], unaligned(u, odd)[0], epsilon, *kept)
        expected = state.momentum.ravel()[:size], state.norm.ravel()[:size]
        for actual, wanted in zip(kept, (*expected, np.atleast_1d(state.scale)), strict=True):
            np.testing.assert_array_equal(actual, wanted, strict=True)


def test_weights_are_split_and_joined_as_by_the_program():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    words[:6] = 0, 0x80000000, 0x7FFFFFFF, 0xFF800000, 0x00008000, 0x3F7F8000
    halves, low = np.empty(words.size, np.uint16), np.empty(words.size, np.int16)
    adamax_ext._core.split_weights(words.view(np.float32), halves, low)
    for actual, wanted in zip(
        (halves, low), program.bf16_split(words.view(np.float32)), strict=True
    ):
        np.testing.assert_array_equal(actual, wanted)
    halves[::7] &= 0x8000  # set to zero by somebody else
    joined = np.empty(words.size, np.float32)
    adamax_ext._core.join_weights(halves, low, joined)
    wanted = program.bf16_join(halves, low)
    np.testing.assert_array_equal(joined.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"norm": np.zeros(4, np.int8)}, TypeError, "norm has dtype int8; expected uint8"),
        (
            {"norm_scale": np.zeros(2, np.float32)},
            ValueError,
            "norm_scale has 2 elements; expected",
        ),
        ({"to_norm": np.zeros(4)}, TypeError, "to_norm has dtype float64; expected float32"),
        (
            {"to_norm": np.zeros(5, np.float32)},
            ValueError,
            "to_norm has 5 elements; expected the 4",
        ),
    ],
)
def test_conversions_refuse(change, error, message):
    arguments = {
        "momentum": np.zeros(4, np.int8),
        "norm": np.zeros(4, np.uint8),
        "norm_scale": np.zeros(1, np.float32),
        "to_momentum": np.ones(4, np.float32),
        "to_norm": np.ones(4, np.float32),
    }
    with pytest.raises(error, match="^" + message):
        adamax_ext._core.decode_state(**{**arguments, **change}, epsilon=0.1)
    assert (arguments["to_momentum"] == 1).all()


# ---- What update() refuses ----------------------------------------------------------------------


def low(bits, **changes):
    """Arguments of `update` with state in 16 or 8 bits."""
    m, u = {16: (np.uint16, np.uint16), 8: (np.int8, np.uint8)}[bits]
    return {
        "param": np.ones(300, np.float32),
        "grad": np.ones(300, np.float32),
        "m": np.zeros(300, m),
        "u": np.zeros(300, u),
        "norm_scale": np.ones(1 if bits == 16 else 2, np.float32),
        "step": 1,
        **changes,
    }


REFUSED = [
    (low(8, norm_scale=None), ValueError, "norm_scale must be given where .* received None"),
    (
        low(8, norm_scale=np.ones(3, np.float32)),
        ValueError,
        "norm_scale has 3 elements; expected 2",
    ),
    (
        low(16, norm_scale=np.ones(2, np.float32)),
        ValueError,
        "norm_scale has 2 elements; expec.* 1 ",
    ),
    (low(8, norm_scale=np.ones(2)), TypeError, "norm_scale has dtype float64; expected float32"),
    (low(8, u=np.zeros(300, np.int8)), TypeError, "u has dtype int8; expected uint8"),
    (low(16, u=np.zeros(300, np.float32)), TypeError, "u has dtype float32; expected bfloat16"),
    (low(8, m=np.zeros(300, np.uint8)), TypeError, "m has dtype uint8; expected float32"),
    (low(8, m=np.zeros(299, np.int8)), ValueError, "m has 299 elements; expected the 300 of param"),
    (
        low(8, m=np.zeros(300, np.float32), u=np.zeros(300, np.float32)),
        ValueError,
        "norm_scale must be None where .* received a buffer",
    ),
    (
        low(16, param=np.ones(300), grad=np.ones(300)),
        TypeError,
        "m has dtype uint16; expected float64 for a float64 parameter",
    ),
    (low(8, remainder=np.zeros(300, np.int16)), ValueError, "remainder must be None where"),
    (
        low(8, weight_rounding="up"),
        ValueError,
        "weight_rounding must be 'nearest', .*received 'up'",
    ),
    (low(8, weight_rounding=None), ValueError, "weight_rounding must be .* received None"),
    (
        low(
            8,
            param=np.ones(300, np.float16),
            grad=np.ones(300, np.float16),
            weight_rounding="stochastic",
        ),
        TypeError,
        "param has dtype float16, which weight_rounding 'stochastic' does not know",
    ),
    (
        low(8, beta_1=0.9, beta_2=0.9),
        ValueError,
        "beta_1 must be below beta_2 with state in 8 bits",
    ),
    (
        low(8, epsilon_mode="inside", epsilon=1e-30),
        ValueError,
        r"epsilon must be >= 2\^-86 with state in 8 bits",
    ),
    (low(8, seed=2**64), ValueError, "seed must be an integer <= .*received 18446744073709551616"),
    (low(8, seed=-1), ValueError, "seed must be an integer >= 0; received -1"),
    (low(8, seed=1.0), ValueError, "seed must be an integer >= 0; received 1.0"),
    (low(8, variable=2**32), ValueError, "variable must be an integer <= 4294967295"),
    (
        low(8, first_element=255),
        ValueError,
        "first_element must be a multiple of 256; received 255",
    ),
    (
        low(8, first_element=-256),
        ValueError,
        "first_element must be an integer >= 0; received -256",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_update_refuses(arguments, error, message):
    arrays = {k: a for k, a in arguments.items() if isinstance(a, np.ndarray)}
    before = {name: array.copy() for name, array in arrays.items()}
    with pytest.raises(error, match="^" + message):
        adamax_ext.update(**arguments)
    np.testing.assert_equal(arrays, before)


@needs_bfloat16
@pytest.mark.parametrize(
    ("remainder", "error", "message"),
    [
        (
            None,
            ValueError,
            "remainder must be given where weight_rounding is 'remainder'; received",
        ),
        (np.zeros(300, np.uint16), TypeError, "remainder has dtype uint16; expected int16"),
        (np.zeros((2, 150), np.int16), ValueError, r"remainder has shape"),
    ],
    ids=["none", "dtype", "shape"],
)
def test_update_refuses_a_remainder(remainder, error, message):
    import ml_dtypes

    weights = np.ones(300, ml_dtypes.bfloat16)
    arguments = low(
        16, param=weights, grad=weights.copy(), remainder=remainder, weight_rounding="remainder"
    )
    with pytest.raises(error, match="^" + message):
        adamax_ext.update(**arguments)
    assert (weights == 1).all()


@pytest.mark.parametrize("name", ["u", "norm_scale"])
def test_update_refuses_overlap(name):
    arguments = low(8)
    memory = np.zeros(400, np.uint8)
    arguments["m"] = memory[:300].view(np.int8)
    if name == "u":
        arguments["u"] = memory[100:]
    else:
        arguments["norm_scale"] = memory[296:304].view(np.float32)
    with pytest.raises(ValueError, match=r"^(u|norm_scale|m) overlaps (u|norm_scale|m) in memory"):
        adamax_ext.update(**arguments)
    assert not memory.any()
