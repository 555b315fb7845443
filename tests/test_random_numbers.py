"""The random numbers of rounding: the program's in every kernel, fair, and independent.

Statistics are of fixed seeds, so that a test passes always or never, and asked to lie within 5
standard errors: once in 1.7 million by chance.
"""

import itertools
import subprocess
from typing import NamedTuple

import adamax_ext
import numpy as np
import pytest
from support.building import REPOSITORY, cpp_compiler, run
from support.isas import every_isa, run_on
from support.reference_lowmem import (
    FORMAT,
    MOMENTUM,
    OFFSET,
    WEIGHT,
    decode_ratio,
    encode_ratio,
    philox4x32,
    random_bits,
)

ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")

F = np.float32
NO_PLACE = {"seed": 0, "step": 1, "variable": 0}
BYTES = np.arange(256, dtype=np.uint8)
STREAMS = {"weights": WEIGHT, "momentum": MOMENTUM}
every_stream = pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)

# ---- What a store drew ---------------------------------------------------------------------------

# With these, m becomes the gradient, and u what it was times 1/2, if that is more; a weight w
# becomes w - m / u.
ISOLATED = {"learning_rate": 1.0, "beta_1": 0.0, "beta_2": 0.5, "epsilon": 1e-20}


def alternating(size):
    return np.where(np.arange(size) % 2, F(-1), F(1))


def weights_rounded_up(part, **place):
    """Store weights whose magnitudes lie `part` of 2^16 above a bfloat16, of both signs.

    Return which became the next one.
    """
    signs = alternating(part.size)
    h = signs * part * F(-(2.0**-23))
    w, m, u = signs.astype(ml_dtypes.bfloat16), np.zeros_like(h), np.full_like(h, 2)
    adamax_ext.update(w, h, m, u, weight_rounding="stochastic", **ISOLATED, **place)
    return (w.view(np.uint16) & 0x7FFF) - 0x3F80


def momentum_in_16_bits_rounded_up(part, **place):
    """The same for a first moment in bfloat16."""
    h = alternating(part.size) * (F(1) + part * F(2.0**-23))
    w, m, u = np.zeros_like(h), np.zeros(h.size, np.uint16), np.zeros(h.size, np.uint16)
    adamax_ext.update(w, h, m, u, norm_scale=np.ones(1, F), **ISOLATED, **place)
    return (m & 0x7FFF) - 0x3F80


def codes_of_ratios(ratio, **place):
    """Return the codes in 8 bits of m / u."""
    w, m, u = np.zeros_like(ratio), np.zeros(ratio.size, np.int8), np.full(ratio.size, 255, "u1")
    scale = np.full(-(-ratio.size // 256), 2, F)  # code 255 stands for it: u becomes 1
    adamax_ext.update(w, ratio, m, u, norm_scale=scale, **ISOLATED, **place)
    return m


def momentum_in_8_bits_rounded_up(part, **place):
    """The same for codes of m / u, which are 2^19 apart."""
    ratio = F(0.5) + part * F(2.0**-24) - OFFSET
    return np.abs(codes_of_ratios(alternating(part.size) * ratio, **place)) - 111


class Store(NamedTuple):
    round_up: object
    stream: int
    number_bits: int  # of a random number
    dropped_bits: int  # of what is stored

    def drawn(self, count, **place):
        """Find the numbers that a kernel draws, by what they do to chosen parts, bit by bit."""
        shift = self.dropped_bits - self.number_bits
        middle = (1 << shift) >> 1  # a number stands for the middle of what is below it
        numbers = np.zeros(count, np.uint32)
        for bit in reversed(range(self.number_bits)):
            higher = numbers | np.uint32(1 << bit)
            enough = (1 << self.dropped_bits) - (higher.astype(np.int64) << shift) - middle
            is_up = self.round_up(enough.astype(F), **place)
            assert set(is_up.tolist()) <= {0, 1}
            numbers = np.where(is_up, higher, numbers)
        return numbers


STORES = {
    "weights": Store(weights_rounded_up, WEIGHT, 16, 16),
    "momentum in 16 bits": Store(momentum_in_16_bits_rounded_up, MOMENTUM, 8, 16),
    "momentum in 8 bits": Store(momentum_in_8_bits_rounded_up, MOMENTUM, 8, 19),
}
every_store = pytest.mark.parametrize("name", STORES)


# ---- Bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # of Random123, tests/kat_vectors, "philox4x32 10"
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert " ".join(f"{word:08x}" for word in philox4x32(counter, key)) == expected


@every_stream
def test_numbers_of_a_part_are_those_of_the_whole(stream):
    for begin in (0, 2**33 - 50, 2**34 - 50, 2**35 - 50):  # the last word of a slab among them
        whole = random_bits(stream, 5, 6, 7, begin, 100)
        for first, end in itertools.combinations(range(0, 101, 5), 2):
            part = random_bits(stream, 5, 6, 7, begin + first, end - first)
            assert np.array_equal(part, whole[first:end])


def check_numbers(name):
    store = STORES[name]
    places = [
        *itertools.product(
            (0, 1, 2**32, 2**64 - 1, 0x299F31D0A4093822),
            (1, 2**32, 2**53, 0x0005A308D3243F6A),
            (0, 1, 2**32 - 1, 0x13198A2E),
            [(0, 300)],
        ),
        # Words on both sides of a multiple of 2^32, lengths that are no multiple of a word.
        *itertools.product(
            (3, 2**64 - 1),
            (4,),
            (5, 2**32 - 1),
            [
                (256, 1),
                (512, 257),
                (2**33 - 512, 1027),
                (2**34 - 512, 1026),
                (3 * 2**34 - 256, 1025),
                (2**62 - 256, 1024),
                (2**63 - 2048, 1024),
                (2**34 - 65536, 150_001),  # which several threads share
            ],
        ),
    ]
    for seed, step, variable, (first, count) in places:
        place = {"seed": seed, "step": step, "variable": variable}
        numbers = store.drawn(count, first_element=first, **place)
        expected = random_bits(store.stream, first=first, count=count, **place)
        assert np.array_equal(numbers, expected), f"elements from {first} on, {place}"


@every_isa
@every_store
def test_every_kernel_draws_the_numbers_of_the_program(isa, name):
    run_on(isa, check_numbers, name)


def test_stream_for_batteries(tmp_path):
    """tests/cpp/random_stream.cpp writes what it says that it does."""
    source, program = REPOSITORY / "tests" / "cpp" / "random_stream.cpp", tmp_path / "random_stream"
    warnings = ("-Wall", "-Wextra", "-Werror")
    run(cpp_compiler(), "-std=c++20", *warnings, f"-I{REPOSITORY / 'csrc'}", source, "-o", program)

    def words(first=0, count=1, *, stream=WEIGHT, step=1, variable=0):
        k = 2 if stream == WEIGHT else 4
        return random_bits(stream, 0, step, variable, k * first, k * count).view(np.uint32)

    weights, momentum = words(0, 8192), words(0, 8192, stream=MOMENTUM)
    steps = [words(0, 4, step=1 + t) for t in range(4096)]
    for order, expected in {
        "elements": weights,
        "tensors": np.concatenate([words(0, 2**24), words(0, 4, variable=1)]),
        "steps": np.stack(steps, axis=1),
        "element": np.stack([word[0] for word in steps]),
        "streams": np.stack([weights, momentum], axis=1),
        "variables": np.stack([words(0, 16, variable=v) for v in range(1024)]),
    }.items():
        with subprocess.Popen([program, order], stdout=subprocess.PIPE) as process:
            written = np.frombuffer(process.stdout.read(expected.nbytes), np.uint32)
            process.stdout.close()
        assert np.array_equal(written, expected.ravel()), order


# ---- Fairness ------------------------------------------------------------------------------------


@every_store
def test_stores_round_up_with_the_probability_of_their_part(name):
    """10.5 million times for each of 8 parts, in 10 steps."""
    store = STORES[name]
    size, steps = 2**20, range(1, 11)
    whole, number = 1 << store.dropped_bits, 1 << store.number_bits
    for part in (0, 1, 0.004, 0.07, 0.5, 0.7654, 0.997, whole - 1):
        part = part if isinstance(part, int) else int(part * whole)
        # To the nearest that numbers of so few bits can give.
        p = (part * number + whole // 2) // whole / number
        assert abs(p - part / whole) <= 0.5 / number
        parts = np.full(size, part, F)
        n = size * len(steps)
        up = sum(int(store.round_up(parts, seed=1, step=t).sum()) for t in steps)
        assert abs(up - n * p) <= 5 * np.sqrt(n * p * (1 - p)), f"{up} of {n} for {part}"


def position_of_each_byte(store):
    """Return, for each random byte, an element of 8192 that draws it."""
    drawn, positions = np.unique(store.drawn(8192, **NO_PLACE), return_index=True)
    assert np.array_equal(drawn, BYTES)
    return positions


def test_bias_of_a_first_moment_in_16_bits():
    """Each byte once: the mean is off by at most 1/512 of what neighbours differ by."""
    store = STORES["momentum in 16 bits"]
    positions = position_of_each_byte(store)
    for part in (*range(0, 2**16, 97), 127, 128, 129, 2**16 - 128, 2**16 - 1):
        up = store.round_up(np.full(8192, part, F), **NO_PLACE)[positions]
        assert abs(up.mean() - part / 2**16) <= 1 / 512, part


def test_bias_of_a_first_moment_in_8_bits():
    """Also of the ratio that the code stands for, which is linear between neighbours."""
    positions = position_of_each_byte(STORES["momentum in 8 bits"])
    ratios = np.concatenate([np.linspace(-0.99, 0.99, 401), np.geomspace(1e-7, 0.99, 300)])
    for ratio in ratios.astype(F):
        codes = codes_of_ratios(np.full(8192, ratio), **NO_PLACE)[positions]
        assert np.array_equal(codes, encode_ratio(FORMAT, np.full(256, ratio), BYTES)), ratio
        between = 2.0 ** (np.floor(np.log2(float(abs(ratio) + OFFSET))) - FORMAT.momentum_bits)
        mean = decode_ratio(FORMAT, codes).astype(np.float64).mean()
        assert abs(mean - ratio) <= between * (1 / 512 + 2**-19), ratio  # and a rounded sum


def test_what_a_code_stands_for_stays():
    codes = np.arange(-127, 128, dtype=np.int8)
    for code, ratio in zip(codes, decode_ratio(FORMAT, codes), strict=True):
        assert set(codes_of_ratios(np.full(8192, ratio), **NO_PLACE).tolist()) == {code}


# ---- Independence: of the program's numbers, which are the kernels' ------------------------------

SIZE = 2**18


def numbers_of(stream, seed=0, step=1, variable=0, first=0, count=SIZE):
    return random_bits(stream, seed, step, variable, first, count)


def standardized(numbers):
    levels = 2.0 ** (8 * numbers.itemsize)
    return (numbers - (levels - 1) / 2) / np.sqrt((levels**2 - 1) / 12)


def correlations(x, y):
    """Return the correlation of two arrays of numbers and of each of their common bits.

    In standard errors.
    """
    a, b = map(standardized, (x, y))
    common = np.uint8 if x.itemsize != y.itemsize else x.dtype
    differing = x.astype(common) ^ y.astype(common)
    bits = np.unpackbits(differing.view(np.uint8)).reshape(x.size, -1).sum(axis=0, dtype=np.int64)
    return np.append((x.size - 2 * bits) / np.sqrt(x.size), a @ b / np.sqrt(x.size))


def require_unrelated(pairs, comparisons):
    scores = np.array([correlations(x, y) for x, y in pairs])
    assert scores.size == comparisons
    assert np.abs(scores).max() < 5, np.unravel_index(np.abs(scores).argmax(), scores.shape)


@every_stream
def test_neighbours_are_unrelated(stream):
    """102 or 54 comparisons."""
    x = numbers_of(stream, count=8 * SIZE)
    lags = (1, 2, 3, 4, 255, 256)
    require_unrelated([(x[:-lag], x[lag:]) for lag in lags], 6 * (8 * x.itemsize + 1))


@every_stream
def test_steps_and_variables_are_unrelated(stream):
    """153 or 81 comparisons."""
    steps = [(1, 2), (2, 3), (2**32 - 1, 2**32), (1, 2**32 + 1), (1, 2**52 + 1)]
    variables = [(0, 1), (1, 2), (0, 2**16), (5, 2**31 + 5)]
    pairs = [[numbers_of(stream, step=t) for t in pair] for pair in steps]
    pairs += [[numbers_of(stream, variable=v) for v in pair] for pair in variables]
    require_unrelated(pairs, 9 * (8 * pairs[0][0].itemsize + 1))


def test_step_variable_and_slab_do_not_replace_each_other():
    """108 comparisons."""
    slab = 2**34  # elements
    pairs = [
        (numbers_of(MOMENTUM, **a), numbers_of(MOMENTUM, **b))
        for a, b in itertools.combinations(
            (
                {"seed": 1, "step": 2**32 + 1},
                {"seed": 1, "step": 2, "variable": 1},
                {"seed": 1, "step": 1, "variable": 1, "first": slab},
                {"seed": 1, "step": 1, "first": slab},
                {"seed": 2**32, "step": 1, "first": 0},
            ),
            2,
        )
    ]
    pairs += [(numbers_of(MOMENTUM, first=k * slab), numbers_of(MOMENTUM)) for k in (1, 2)]
    require_unrelated(pairs, 12 * 9)


def test_streams_are_unrelated():
    """36 comparisons: of an element's two numbers, and of words at the same index."""
    weights, momentum = numbers_of(WEIGHT), numbers_of(MOMENTUM)
    words = [numbers.view(np.uint8)[:SIZE] for numbers in (weights, momentum)]
    halves = weights >> np.uint16(8)
    pairs = [(weights, momentum), words, (halves.astype(np.uint8), momentum)]
    pairs += [(weights[:-1], momentum[1:])]
    require_unrelated(pairs, 4 * 9)


@every_stream
def test_seeds_that_differ_in_a_bit_are_unrelated(stream):
    """1088 or 576 comparisons."""
    seed = 0x299F31D0A4093822
    x = numbers_of(stream, seed=seed)
    pairs = ((x, numbers_of(stream, seed=seed ^ 1 << bit)) for bit in range(64))
    require_unrelated(pairs, 64 * (8 * x.itemsize + 1))


@every_stream
def test_one_element_over_many_steps(stream):
    """68 or 36 comparisons, and the frequencies of bytes."""
    words = np.stack([numbers_of(stream, step=t, count=32) for t in range(1, 2**13 + 5)])
    now = words[: 2**13].ravel()
    pairs = [(now, words[lag:][: 2**13].ravel()) for lag in (1, 2, 3, 4)]
    require_unrelated(pairs, 4 * (8 * now.itemsize + 1))
    assert abs(excess_of_bytes(now)) < 5


def excess_of_bytes(numbers):
    """Return chi-square of the frequencies of bytes, in standard errors from its mean."""
    counts = np.bincount(numbers.view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return (((counts - expected) ** 2).sum() / expected - 255) / np.sqrt(2 * 255)


def excess_of_repetitions(numbers):
    """Count pairs of equal 16 bits in windows of 2^16 words; in standard errors from the mean."""
    scores = []
    for half in numbers.view(np.uint16).reshape(-1, 2).T:
        pairs = 0
        for window in half.reshape(-1, 2**16):
            counts = np.bincount(window)
            pairs += (counts * (counts - 1) // 2).sum()
        expected = half.size * (2**16 - 1) / 2 / 2**16
        scores.append((pairs - expected) / np.sqrt(expected))
    return np.array(scores)


@every_stream
def test_bytes_and_repetitions_are_as_frequent_as_by_chance(stream):
    """18 comparisons."""
    for seed, first in itertools.product((0, 1, 2**63), (0, 2**34 - 2**20)):
        x = numbers_of(stream, seed=seed, first=first, count=2**21)
        assert abs(excess_of_bytes(x)) < 5
        assert np.abs(excess_of_repetitions(x)).max() < 5


# ---- What these tests can see: hashes that are cheaper, and not good enough ----------------------


def hashed(x, *rounds):
    for shift, factor in rounds:
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    return x ^ x >> np.uint32(15)


KEY, ROUNDS = np.uint32(0x6627E8D5), ((16, 0x7FEB352D), (15, 0x846CA68B))


def test_one_round_has_related_neighbours():
    x = hashed(np.arange(2**20, dtype=np.uint32) * np.uint32(0x9E3779B9) + KEY, ROUNDS[0])
    assert np.abs(correlations(x[:-1], x[1:])).max() > 5


def test_two_rounds_repeat_too_little():
    x = hashed(np.arange(2**20, dtype=np.uint32) ^ KEY, *ROUNDS)
    assert np.abs(excess_of_repetitions(x)).max() > 5
