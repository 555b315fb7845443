"""What state in fewer bits and rounded weights promise, in numbers: through `update`."""

import numpy as np
import pytest
from adamax_ext import Adamax, update
from support.bits import dtype_of, spread
from support.isas import every_isa, run_on
from support.low_memory import check_nans, check_zeroed_weights, needs_bfloat16

F = np.float32
BETAS_2 = (0.5, 0.9, 0.99, 0.999, 0.9999, 0.999999)


def fresh(size, bits):
    """Return state before the first step."""
    m, u = {16: (np.uint16, np.uint16), 8: (np.int8, np.uint8)}[bits]
    scale = np.ones(1, F) if bits == 16 else np.zeros(-(-size // 256), F)
    return {"m": np.zeros(size, m), "u": np.zeros(size, u), "norm_scale": scale}


def norms(state):
    """Return the infinity norms of a state, by the formulas of their formats."""
    if state["u"].dtype == np.uint16:
        return (state["u"].astype(np.uint32) << 16).view(F) * state["norm_scale"]
    digits = ((state["u"].astype(np.uint32) + 1777) << 19).view(F)
    return digits * np.repeat(state["norm_scale"], 256)[: digits.size]


# ---- Norms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta_2", BETAS_2)
def test_decay_moves_no_code_of_8_bits(beta_2):
    """All codes in blocks of many scales, until a scale is below the smallest."""
    rng = np.random.default_rng(1)
    scales = np.exp2(np.arange(-80.0, 121.0)) * rng.uniform(1, 2, 201)
    state = fresh(256 * scales.size, 8)
    state["norm_scale"][:] = expected = scales.astype(F)
    state["u"].reshape(-1, 256)[:] = codes = np.arange(256, dtype=np.uint8)
    weights, nothing = np.ones(state["u"].size, F), np.zeros(state["u"].size, F)
    for step in range(1, 151):
        update(weights, nothing, **state, step=step, beta_1=0.4, beta_2=beta_2)
        expected = expected * F(beta_2)
        expected[expected < F(2.0**-86)] = 0
        np.testing.assert_array_equal(state["norm_scale"], expected)
        lives = expected > 0
        assert (state["u"].reshape(-1, 256)[lives] == codes).all(), step
        assert not state["u"].reshape(-1, 256)[~lives].any()
    assert lives.any()
    assert (weights == 1).all()


@pytest.mark.parametrize("beta_2", BETAS_2)
def test_decay_moves_no_digits_of_16_bits(beta_2):
    """All numbers; whole octaves move to their exponents, until they are too small."""
    state = fresh(0x7F80 - 0x0E00, 16)
    state["u"][:] = np.arange(0x0E00, 0x7F80)  # from 2^-99 on: smaller ones may become 0
    begin = state["u"].copy()
    weights, nothing = np.ones(begin.size, F), np.zeros(begin.size, F)
    octaves, scale = 0, F(1)
    for step in range(1, 151):
        before = norms(state)
        update(weights, nothing, **state, step=step, beta_1=0.4, beta_2=beta_2)
        scale = scale * F(beta_2)
        while scale <= 0.5:
            scale, octaves = scale * F(2), octaves + 1
        assert state["norm_scale"][0] == scale
        lives = before * F(beta_2) >= F(2.0**-102)
        assert (state["u"][lives] == begin[lives] - 128 * octaves).all(), step
        assert not state["u"][~lives].any()
    assert lives.any()


@pytest.mark.parametrize(("bits", "least", "most"), [(8, 0.9696, 1.0304), (16, 0.9961, 1.0039)])
@pytest.mark.parametrize("beta_2", [0.999, 0.9999])
def test_norms_stay_within_one_rounding(bits, least, most, beta_2):
    """For 60 000 steps of noise, some of them without."""
    rng = np.random.default_rng(2)
    size = 512
    noise = rng.standard_normal((499, size)) * np.exp2(rng.uniform(-5, 0, size))
    noise *= np.exp(1.5 * rng.standard_normal((499, 1)))
    noise = noise.astype(F)
    state, weights, exact = fresh(size, bits), np.zeros(size, F), np.zeros(size, F)
    for step in range(1, 60_001):
        g = noise[step % 499]
        update(weights, g, **state, step=step, beta_2=beta_2)
        np.maximum(exact * F(beta_2), np.abs(g), out=exact)
        if step % 1000 == 0 or step < 20:
            ratio = norms(state) / exact
            assert least <= ratio.min() <= ratio.max() <= most, step


# ---- Steps ---------------------------------------------------------------------------------------


def longest_step(beta_1, beta_2):
    """In rates: docs/low-memory.md's bound."""
    return beta_1 / beta_2 + 1.032 * (1 - beta_1)


def hostile(rng, kind, step, m):
    """Return gradients that want large steps."""
    size = m.size
    if kind == "jumps":
        return spread(rng, size, F, -60, 60)
    if kind == "signs of the moment, decaying as the norm":
        return (np.where(m < 0, -1, 1) * 0.999**step * np.exp2(rng.uniform(-9, 9))).astype(F)
    if kind == "constant, then small":
        return np.full(size, 1.0 if step % 40 < 30 else 1e-6, F)
    g = spread(rng, size, F, -3, 3) * (rng.random(size) < 0.02)
    return g.astype(F)


HOSTILE = ("jumps", "signs of the moment, decaying as the norm", "constant, then small", "sparse")


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_gradients_make_a_large_step_with_8_bits(kind):
    rng = np.random.default_rng(3)
    size = 2048
    state, largest = fresh(size, 8), 0.0
    for step in range(1, 1001):
        weights = np.zeros(size, F)
        g = hostile(rng, kind, step, state["m"].astype(F))
        update(weights, g, **state, step=step, learning_rate=1.0, epsilon=1e-20)
        largest = max(largest, np.abs(weights).max() * (1 - 0.9**step))
    assert 0.1 < largest <= longest_step(0.9, 0.999)


@pytest.mark.parametrize(
    ("beta_1", "beta_2"),
    [(0.9, 0.999), (0.9, 0.95), (0.9, 0.91), (0.5, 0.51), (0.99, 0.999), (0.0, 0.9)],
)
def test_the_longest_step_with_8_bits(beta_1, beta_2):
    """Of any codes: a norm is rounded down most where it grows by nearly half a code."""
    rng = np.random.default_rng(8)
    state, largest = fresh(2048, 8), 0.0
    for step in range(600):
        if step % 50 == 0:
            state["norm_scale"][:] = np.exp2(rng.uniform(-20, 20, 8))
            state["u"][:] = rng.integers(0, 256, 2048)
            state["m"][:] = rng.choice([-127, 127], 2048)
        grows = np.where(rng.random(2048) < 0.9, 1.0312, np.exp2(rng.uniform(-30, 3, 2048)))
        g = norms(state) * F(beta_2) * np.copysign(grows, state["m"]).astype(F)
        weights, settings = np.zeros(2048, F), {"learning_rate": 1.0, "epsilon": 1e-20}
        update(weights, g, **state, **settings, beta_1=beta_1, beta_2=beta_2, step=10_000 + step)
        largest = max(largest, np.abs(weights).max())
    assert longest_step(beta_1, beta_2) - 0.006 < largest <= longest_step(beta_1, beta_2)


@pytest.mark.parametrize(
    ("bits", "beta_1", "share"),
    [(16, 0.9, 0.005), (8, 0.9, 0.042), (16, 0.99, 0.017), (8, 0.99, 0.15)],
)
def test_steps_are_off_by_a_share(bits, beta_1, share):
    """Of float32's, as docs/low-memory.md says: rms, of noise whose scales differ by element."""
    rng = np.random.default_rng(9)
    scales = np.exp(1.5 * rng.standard_normal(4096))
    states = fresh(4096, bits), {"m": np.zeros(4096, F), "u": np.zeros(4096, F)}
    errors = steps = 0
    for step in range(1, 1001):
        g = (scales * rng.standard_normal(4096)).astype(F)
        stepped = np.zeros((2, 4096), F)
        for weights, state in zip(stepped, states, strict=True):
            update(weights, g, **state, step=step, learning_rate=1.0, beta_1=beta_1)
        if step > 500:
            errors += np.square(stepped[0] - stepped[1]).sum(dtype=float)
            steps += np.square(stepped[1]).sum(dtype=float)
    assert np.sqrt(errors / steps) == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("octaves", [-90, -87, -86, -85, -80])
def test_norms_below_what_is_stored_make_no_large_step(octaves):
    """Epsilon alone divides then, and is no smaller."""
    rng = np.random.default_rng(3)
    state, weights = fresh(512, 8), np.zeros(512, F)
    for step in range(1, 50):
        before = weights.copy()
        g = (rng.standard_normal(512) * 2.0**octaves).astype(F)
        update(weights, g, **state, step=step, learning_rate=1.0, epsilon=2.0**-86)
        assert np.abs(weights - before).max() * (1 - 0.9**step) <= 1.029
    smaller = np.nextafter(2.0**-86, 0)
    with pytest.raises(ValueError, match=r"^epsilon must be >= 2\^-86 with state in 8 bits"):
        update(weights, g, **state, step=step, epsilon=smaller)


@pytest.mark.parametrize("bits", [8, 16])
def test_weights_stop_where_gradients_do(bits):
    """First moments die out, which those that are rounded to nearest do not."""
    rng = np.random.default_rng(4)
    size = 5000
    state, weights = fresh(size, bits), np.zeros(size, F)
    for step in range(1, 2001):
        before = weights.copy()
        g = spread(rng, size, F) if step <= 100 else np.zeros(size, F)
        update(weights, g, **state, step=step)
        assert step > 100 or not np.array_equal(weights, before)
        assert step <= 1500 or np.array_equal(weights, before), step
    assert not (state["m"].astype(int) & 0x7FFF).any()


# ---- Weights -------------------------------------------------------------------------------------


def check_words(every):
    """Split and join of the words with every so manieth upper half, and all lower halves."""
    low = np.arange(65536, dtype=np.uint32)
    remainders, carries = low.astype(np.uint16).view(np.int16), (low >> 15).astype(np.uint16)
    nothing, m, u, average = (np.zeros(65536, F) for _ in range(4))
    for upper in range(0, 65536, every):
        halves, remainder = carries + np.uint16(upper), remainders.copy()
        before = halves.copy()
        update(
            halves.view(dtype_of("bfloat16")),
            nothing,
            m,
            u,
            step=1,
            learning_rate=0.0,
            average=average,  # the float32 weights
            remainder=remainder,
            weight_rounding="remainder",
        )
        magnitude = upper & 0x7FFF
        end = 65536 if magnitude < 0x7F80 else 1 if magnitude == 0x7F80 else 0  # of what is no NaN
        words = low[:end] + np.uint32(upper << 16)
        assert np.array_equal(average.view(np.uint32)[:end], words), hex(upper)
        assert np.array_equal(halves[:end], before[:end]), hex(upper)
        assert np.array_equal(remainder[:end], remainders[:end]), hex(upper)
        last = 65536 if magnitude < 0x7FFF else 32768  # a carry leaves no NaN
        is_kept = (halves[end:last] == 0x7FC0).all() and not remainder[end:last].any()
        assert is_kept, hex(upper)


@needs_bfloat16
def test_no_word_is_lost_with_its_remainder():
    check_words(every=1)


@needs_bfloat16
@every_isa
def test_no_word_is_lost_on_any_isa(isa):
    run_on(isa, check_words, 17)


@needs_bfloat16
def test_weights_with_remainders_are_trained_as_float32():
    """From the same gradients the same bits, step for step."""
    rng = np.random.default_rng(5)
    bfloat16 = dtype_of("bfloat16")
    start = spread(rng, 3000, F).astype(bfloat16)
    whole, half = start.astype(F), start.copy()
    optimizers = Adamax(1e-5), Adamax(1e-5, weight_rounding="remainder")
    optimizers[0].build([whole])
    optimizers[1].build([half])
    for _ in range(200):
        g = spread(rng, 3000, F).astype(bfloat16)
        for optimizer in optimizers:
            optimizer.apply([g])
        np.testing.assert_array_equal(optimizers[1].variables[-1], whole)
    nearest = start.copy()
    third = Adamax(1e-5)
    third.apply([g], [nearest])
    assert (nearest == start).mean() > 0.9  # it stalls


@needs_bfloat16
def test_stochastic_weights_are_right_on_average():
    """What is stored of a step that is a share of the distance of two bfloat16 numbers."""
    size, above = 1 << 18, 2.0**-7
    for share in (0.001, 0.3, 0.75):
        weights = np.ones(size, dtype_of("bfloat16"))
        m, u, g = np.zeros(size, F), np.zeros(size, F), np.full(size, -1, weights.dtype)
        settings = {"learning_rate": share * above, "epsilon": 1e-20, "seed": 7}
        update(weights, g, m, u, step=1, weight_rounding="stochastic", **settings)
        stored = weights.astype(np.float64) - 1
        assert set(np.unique(stored)) == {0.0, above}
        error = 5 * np.sqrt(share * (1 - share) / size)  # five times the standard deviation
        assert abs(stored.mean() / above - share) < error


@needs_bfloat16
def test_a_weight_that_does_not_step_does_not_move():
    rng = np.random.default_rng(6)
    weights = np.arange(65536, dtype=np.uint16)
    weights = weights[(weights & 0x7FFF) <= 0x7F80]  # no NaN
    before, nothing = weights.copy(), np.zeros(weights.size, F)
    m, u = np.zeros(weights.size, F), np.abs(spread(rng, weights.size, F))
    for step in range(1, 20):
        halves = weights.view(dtype_of("bfloat16"))
        update(halves, nothing, m, u, step=step, weight_rounding="stochastic")
    np.testing.assert_array_equal(weights, before)


@needs_bfloat16
@every_isa
def test_weights_that_somebody_sets_to_zero_are_zero(isa):
    run_on(isa, check_zeroed_weights)


@needs_bfloat16
@every_isa
@pytest.mark.parametrize("rounding", ["stochastic", "remainder"])
def test_every_nan_stays_one(isa, rounding):
    run_on(isa, check_nans, rounding)
