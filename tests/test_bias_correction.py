"""1 - beta**step: the bits of the program, and as near to the exact number as a double can be."""

import math
from decimal import MIN_EMIN, Context, Decimal

import numpy as np
from adamax_ext import _core
from support import reference

HIGHEST_STEP = 2**62


def random_beta(rng):
    kind = rng.integers(6)
    return float(
        [
            rng.uniform(),
            1 - 10 ** rng.uniform(-12, 0),
            1 - rng.integers(1, 9) * 2.0**-53,
            10 ** rng.uniform(-307, -1),
            rng.integers(1, 2**52) * 2.0**-1074,
            0.0,
        ][kind]
    )


def random_step(rng):
    kind = rng.integers(3)
    step = [int(2 ** rng.uniform(0, 62)), int(rng.integers(1, 100)), 2 ** int(rng.integers(63))]
    return max(1, min(step[kind] + int(rng.integers(-1, 2)), HIGHEST_STEP))


def random_pairs(count):
    rng = np.random.default_rng(1)
    edges = [(beta, t) for beta in (0.0, 5e-324, 1 - 2.0**-53) for t in (1, 2, HIGHEST_STEP)]
    return edges + [(random_beta(rng), random_step(rng)) for _ in range(count)]


def test_bits_of_the_program():
    for beta, step in random_pairs(100_000):
        expected = reference.bias_correction(beta, step)
        received = _core._bias_correction(beta, step)
        assert received == expected, f"{received!r}, not {expected!r}, for {beta!r}, {step}"


def test_against_exact_numbers():
    # 1 - beta is at least 2**-53, so that 60 of 80 digits are left.
    context = Context(prec=80, Emin=MIN_EMIN, traps=[])
    wrong = set()
    for beta, step in random_pairs(20_000):
        received = _core._bias_correction(beta, step)
        exact = context.subtract(1, context.power(Decimal(beta), step))
        ulps = context.divide(context.subtract(Decimal(received), exact), Decimal(math.ulp(exact)))
        assert abs(ulps) <= Decimal("0.5000001"), f"{ulps} ulp for {beta!r}, {step}"
        if received != float(exact):
            wrong.add((beta, step))
    assert len(wrong) <= 5, f"not correctly rounded: {wrong}"  # almost ties, next to a beta of 1
