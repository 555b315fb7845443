"""16-bit storage: every value is widened exactly and rounded once, to the nearest, at the store."""

import adamax_ext
import numpy as np
from support import reference
from support.bits import assert_same_bits, dtype_of, every_16_bit_dtype, rounded, widened
from support.isas import every_isa, run_on


def every_value(dtype):
    return np.arange(2**16, dtype=np.uint16).view(dtype_of(dtype))


def check_widening(dtype):
    values = every_value(dtype)
    wide = widened(values)
    if dtype == "bfloat16":  # by definition the upper half of a float32
        wide = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    zeros = np.zeros_like(wide)
    # As parameters: with a rate of 0 each keeps its value, and the average starts as it.
    for grad in (np.zeros_like(values), zeros):
        w, average = values.copy(), zeros.copy()
        still = {"step": 1, "learning_rate": 0.0, "average": average}
        adamax_ext.update(w, grad, zeros.copy(), zeros.copy(), **still)
        assert_same_bits(w, values, f"stored {dtype}")
        assert_same_bits(average, wide, f"widened {dtype} parameter")
    # As gradients: m becomes exactly the gradient with beta_1 = 0, u its magnitude; tiny ones 0.
    quiet = np.where(np.abs(wide) < reference.tiny(np.float32), np.float32(0), wide)
    for w in (zeros.copy(), np.zeros_like(values)):
        m, u = zeros.copy(), zeros.copy()
        adamax_ext.update(w, values, m, u, step=1, beta_1=0.0)
        assert_same_bits(m, quiet, f"widened {dtype} gradient")
        assert_same_bits(u, np.abs(quiet), f"magnitude of a {dtype} gradient")
    finite = values[np.isfinite(wide)]
    assert adamax_ext.global_norm([finite]) == reference.global_norm([widened(finite)])


@every_isa
@every_16_bit_dtype
def test_widening_of_all_65536_values(isa, dtype):
    run_on(isa, check_widening, dtype)


def rounding_targets(dtype):
    """Return each value of `dtype`, each midpoint of neighbours, and the float32s next to them."""
    positive = widened(every_value(dtype)[: 2**15])
    finite = positive[np.isfinite(positive)].astype(np.float64)
    beyond = 2 * finite[-1] - finite[-2]  # the next in line, if exponents went on
    grid = np.append(finite, beyond)
    with np.errstate(over="ignore"):
        middles = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
        targets = np.concatenate([finite.astype(np.float32), middles])
        near = [np.nextafter(targets, np.float32(to)) for to in (-np.inf, np.inf)]
    random = np.random.default_rng(3).integers(0, 2**31, 2**18, np.uint32).view(np.float32)
    targets = np.concatenate([targets, *near, random, [np.float32(np.inf), np.float32(np.nan)]])
    return np.concatenate([targets, -targets])


def check_rounding_at_the_store(dtype):
    targets = rounding_targets(dtype)
    expected = rounded(targets, dtype_of(dtype))
    w = np.zeros(targets.size, dtype_of(dtype))
    optimizer = adamax_ext.Adamax(use_ema=True)
    optimizer.apply([w], [w])  # before the first update there is no average
    optimizer.state["variable_0"]["average"][...] = targets
    optimizer.finalize_variable_values()
    assert_same_bits(w, expected, f"targets stored as {dtype}")

    # Through the formula: w = 0 - 2^k * m / 2^j, where m is -mantissa and j = k - exponent.
    targets = targets[np.isfinite(targets) & (targets != 0)]
    mantissa, exponent = np.frexp(targets)
    mantissa, exponent = mantissa * np.float32(2), exponent - 1
    reached = np.zeros(targets.shape, bool)
    for k, lowest, highest in [(-23, -149, -26), (97, -26, 95), (127, 1, 126)]:
        chosen = (exponent >= lowest) & (exponent <= highest)
        reached |= chosen
        u = np.ldexp(np.float32(1), k + 1 - exponent[chosen])  # beta_2 halves it
        w, average = np.zeros(u.size, dtype_of(dtype)), np.zeros_like(u)
        formula = {"learning_rate": 2.0**k, "beta_1": 0.0, "beta_2": 0.5, "epsilon": 1e-40}
        adamax_ext.update(w, -mantissa[chosen], 0 * u, u, step=1, average=average, **formula)
        expected = rounded(targets[chosen], dtype_of(dtype))
        assert_same_bits(w, expected, f"steps stored as {dtype}")
        assert_same_bits(average, widened(expected), f"steps rounded to {dtype} for the average")
    assert reached[np.abs(targets) < 2.0**127].all()


@every_isa
@every_16_bit_dtype
def test_rounding_at_every_midpoint(isa, dtype):
    run_on(isa, check_rounding_at_the_store, dtype)
