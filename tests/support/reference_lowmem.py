"""Low-memory training as a NumPy program: the contract of LOWMEM.md, slow and plain.

The step is that of SPEC.md section 1 in float32; this file says how state and bfloat16 weights are
stored between steps: decode -> step -> encode. Every operation is one IEEE float32 operation or one
32-bit integer operation, so bits are equal on every ISA, thread count and GPU.
"""

from dataclasses import dataclass

import numpy as np

from support import reference

F, S, U = np.float32, np.int32, np.uint32
BLOCK = 256  # elements that share a scale in 8-bit state, from element 0; the last may be short
SMALLEST = 4096  # variables with fewer elements keep float32 state when state_bits is 8

# ---- random words --------------------------------------------------------------------------------


def philox4x32(counter, key, rounds=10):
    """Philox4x32-10 (Salmon et al. 2011) on Python integers, once per variable and step."""
    c, k, mask = list(counter), list(key), 0xFFFFFFFF
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


WEIGHT, MOMENTUM = 0, 1  # two streams, so that the roundings of w and of m are independent


def random_bits(stream, seed, step, variable, first, count):
    """Return uint16 for a weight, uint8 for a momentum, for elements first .. first+count-1.

    Element e takes part e % k of word e // k (lowest bits first), k = 2 or 4 numbers to a word; a
    word is a keyed three-round hash (triple32) of a Weyl sequence. The keys come from Philox, once
    per variable and step.
    """
    dtype, k = (np.uint16, 2) if stream == WEIGHT else (np.uint8, 4)
    parts, index, end = [np.empty(0, U)], first // k, -(-(first + count) // k)
    while index < end:
        n = min(end - index, (1 << 32) - (index & 0xFFFFFFFF))
        # counter: step (64 bits), variable, slab of 2^32 words; key: seed (64 bits)
        key = philox4x32(
            (step & 0xFFFFFFFF, step >> 32, variable, index >> 32), (seed & 0xFFFFFFFF, seed >> 32)
        )
        x = (np.arange(n, dtype=U) + U(index & 0xFFFFFFFF)) * U(0x9E3779B9) + U(key[2 * stream])
        x ^= x >> U(17)
        x *= U(0xED5AD4BB)
        x ^= x >> U(11)
        x ^= U(key[2 * stream + 1])
        x *= U(0xAC4C1B51)
        x ^= x >> U(15)
        x *= U(0x31848BAB)
        x ^= x >> U(14)
        parts.append(x)
        index += n
    return np.concatenate(parts).view(dtype)[first % k : first % k + count]  # a little-endian view


# ---- bfloat16 weights ----------------------------------------------------------------------------


def bits(x):
    return np.ascontiguousarray(x, F).view(U)


def floats(b):
    return np.ascontiguousarray(b, U).view(F)


QUIET = 0x7FC0


def bf16_widen(half):
    return floats(half.astype(U) << U(16))


def bf16_nearest(x):
    """Nearest, ties to even; NaN stays NaN (SPEC.md)."""
    b = bits(x)
    half = ((b + U(0x7FFF) + ((b >> U(16)) & U(1))) >> U(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(QUIET), half)


def bf16_stochastic(x, random):
    """Away from zero with probability (low half)/2^16: the mean is exact; what fits never moves."""
    drawn = random.astype(U) if random.dtype == np.uint16 else (random.astype(U) << U(8)) + U(128)
    half = ((bits(x) + drawn) >> U(16)).astype(np.uint16)
    return np.where(
        np.isnan(x), np.uint16(QUIET), half
    )  # without this 0x7fffffff (CUDA's NaN) turns into -0.0


def bf16_split(x):
    """bfloat16 (nearest, ties away from zero) and int16 remainder; exact but for NaN payloads."""
    b = bits(x)
    nan = np.isnan(x)
    half = np.where(nan, np.uint16(QUIET), ((b + U(0x8000)) >> U(16)).astype(np.uint16))
    return half, np.where(nan, np.int16(0), (b & U(0xFFFF)).astype(np.uint16).view(np.int16))


def bf16_join(half, remainder):
    """The float32 master. A weight that somebody else set to zero has no remainder (else: NaN)."""
    stale = ((half & np.uint16(0x7FFF)) == 0) & (remainder < 0)
    low = np.where(stale, 0, remainder.astype(S))
    return floats(((half.astype(S) << S(16)) + low).view(U))


# ---- state ---------------------------------------------------------------------------------------


# 16 bits: m is bfloat16, rounded stochastically; u is bfloat16 of u / s, rounded to nearest, where
# the scale s of the variable takes the decay: what does not change keeps its bits, however small
# the decay of a step is.


def next_variable_scale(scale, beta_2):
    """In (1/2, 1]: the decay so far, up to whole octaves."""
    scale = F(scale) * F(beta_2)
    if scale == 0:
        return F(1)
    while scale <= F(0.5):
        scale = scale * F(2)
    return scale


# 8 bits: in blocks of 256. Both codes are the top bits of a float32, less a constant.


@dataclass(frozen=True)
class StateFormat:
    norm_dtype: type = np.uint8
    momentum_dtype: type = np.int8
    norm_bits: int = 4  # mantissa bits kept of u / scale
    momentum_bits: int = 4  # mantissa bits kept of |m / (u + epsilon)| + OFFSET


FORMAT = StateFormat()
# Code of the ratio: linear below the offset, logarithmic above.
OFFSET, OFFSET_BITS = F(17 / 4096), 0x3B880000
SMALLEST_SCALE = F(2.0**-86)  # a block below it is zero: no subnormal number is ever decoded
POISON = F(2.0**127)  # larger u (inf included) does not count for the scale of its block
ONE = 0x3F800000


def decode_norm(fmt, norm, scale):
    """Codes of whole blocks, shape (blocks, 256), one scale a block -> float32 u."""
    shift, top = 23 - fmt.norm_bits, np.iinfo(fmt.norm_dtype).max
    base = S(
        (ONE >> shift) - top
    )  # code `top` stands for the scale, code 0 for the floor: 2^-16 * 17/16 of it
    return floats((norm.astype(S) + base).astype(U) << U(shift)) * scale[:, None]


def decode_ratio(fmt, momentum):
    """Codes -> m / (u + epsilon); the largest code stands for 1 - OFFSET."""
    c = momentum.astype(S)
    magnitude = floats((np.abs(c).astype(U) << U(23 - fmt.momentum_bits)) + U(OFFSET_BITS)) - OFFSET
    return np.copysign(magnitude, c.astype(F))


def next_scale(scale, u, beta_2):
    """The scale decays as u does; it grows by whole octaves: untouched codes never move."""
    largest = np.where(u < POISON, u, F(0)).max(axis=1).astype(F)
    largest = np.where(largest < SMALLEST_SCALE, F(0), largest)
    decayed = scale * F(beta_2)
    decayed = np.where(decayed < SMALLEST_SCALE, F(0), decayed)
    a, b = bits(largest).astype(np.int64), bits(decayed).astype(np.int64)
    octaves = np.maximum((a - b + 0x7FFFFF) >> 23, 0)  # the fewest that reach the largest u
    return np.where(decayed == 0, largest, floats((b + (octaves << 23)).astype(U)))


def encode_norm(fmt, u, scale):
    """u of whole blocks -> codes and the u they stand for, to nearest: decay moves no code."""
    shift, top = 23 - fmt.norm_bits, np.iinfo(fmt.norm_dtype).max
    base = (ONE >> shift) - top
    with np.errstate(all="ignore"):
        # Not 0 for none: inf * 0 would be a NaN.
        inverse = np.where(scale > 0, F(1) / scale, F(2.0**-126))[:, None]
        r = bits(u * inverse).astype(np.int64)
        c = np.maximum((r + (1 << (shift - 1))) >> shift, base)
        return np.minimum(c - base, top).astype(fmt.norm_dtype), floats(c << shift) * scale[:, None]


def encode_ratio(fmt, ratio, random):
    """m / (u + epsilon), u as stored -> codes, stochastically."""
    shift = 23 - fmt.momentum_bits
    limit = F(1) - OFFSET
    with np.errstate(all="ignore"):
        q = np.fmax(np.fmin(ratio, limit), -limit)  # NaN becomes +limit; the weight keeps the NaN
    b = bits(np.abs(q) + OFFSET).astype(np.int64) - OFFSET_BITS
    # The 8 random bits stand at the top of the bits that are dropped, centred.
    b = b + (random.astype(np.int64) << (shift - 8)) + (1 << (shift - 9))
    return np.where(q < 0, -(b >> shift), b >> shift).astype(fmt.momentum_dtype)


class LowState:
    """m and u of one variable, in 32, 16 or 8 bits each."""

    def __init__(self, size, state_bits, epsilon=1e-7, fmt=FORMAT):
        # An epsilon of 0 for the inside rule: m is relative to u + epsilon.
        self.size, self.epsilon, self.fmt = size, epsilon, fmt
        self.bits = 32 if state_bits == 8 and size < SMALLEST else state_bits
        blocks = -(-size // BLOCK)
        if self.bits == 32:
            self.momentum, self.norm, self.scale = np.zeros(size, F), np.zeros(size, F), None
        elif self.bits == 16:
            self.momentum, self.norm, self.scale = (
                np.zeros(size, np.uint16),
                np.zeros(size, np.uint16),
                F(1),
            )
        else:
            self.momentum = np.zeros((blocks, BLOCK), fmt.momentum_dtype)
            self.norm = np.zeros((blocks, BLOCK), fmt.norm_dtype)
            self.scale = np.zeros(blocks, F)

    def read(self):
        """float32 m and u: what a step works with, and what is written for Keras."""
        if self.bits == 32:
            return self.momentum.copy(), self.norm.copy()
        if self.bits == 16:
            return bf16_widen(self.momentum), bf16_widen(self.norm) * self.scale
        u = decode_norm(self.fmt, self.norm, self.scale)
        m = decode_ratio(self.fmt, self.momentum) * (u + F(self.epsilon))
        return m.ravel()[: self.size].copy(), u.ravel()[: self.size].copy()

    def blocks(self, x):
        """Return it in whole blocks: missing elements count as zeros."""
        return np.pad(x, (0, self.norm.size - self.size)).reshape(-1, BLOCK)

    def step(self, w, h, random, beta_2, **options):
        """One update of `w` in place, state included."""
        if self.bits == 8:
            return self.step8(w, h, random, beta_2, **options)
        m, u = self.read()
        reference.update(w, h, m, u, beta_2=beta_2, **options)
        if self.bits == 32:
            self.momentum, self.norm = m, u
        else:
            self.scale = next_variable_scale(self.scale, beta_2)
            with np.errstate(all="ignore"):
                self.momentum, self.norm = (
                    bf16_stochastic(m, random),
                    bf16_split(u * (F(1) / self.scale))[0],
                )

    def step8(
        self,
        w,
        h,
        random,
        beta_2,
        *,
        step,
        learning_rate,
        beta_1,
        epsilon,
        weight_decay=0.0,
        decay="decoupled",
        epsilon_mode="outside",
        clipvalue=None,
    ):
        """SPEC.md's step, with u rounded to its code before it divides: what is stored steps."""
        rate = F(learning_rate / reference.bias_correction(float(beta_1), step))
        outside = F(epsilon if epsilon_mode == "outside" else 0)
        m, u = self.read()
        with np.errstate(all="ignore"):
            if clipvalue is not None:
                h = np.minimum(np.maximum(h, F(-clipvalue)), F(clipvalue))
            if weight_decay and decay == "decoupled":
                w[...] = w - w * F(learning_rate * weight_decay)
            if weight_decay and decay == "l2":
                h = h + w * F(weight_decay)
            size = np.abs(h) if epsilon_mode == "outside" else np.abs(h) + F(epsilon)
            m = m + (h - m) * F(1 - beta_1)
            u = np.fmax(u * F(beta_2), size)  # a NaN reaches the weight through m
            self.scale = next_scale(self.scale, self.blocks(u), beta_2)
            self.norm, u = encode_norm(self.fmt, self.blocks(u), self.scale)
            ratio = m / (u.ravel()[: self.size] + outside)
            w[...] = w - rate * ratio
            self.momentum = encode_ratio(self.fmt, self.blocks(ratio), self.blocks(random))

    def convert(self, m, u):
        """From float32 state, everything to nearest; the scale of a block is its largest u."""
        m, u = m.astype(F), u.astype(F)
        if self.bits == 32:
            self.momentum, self.norm = m.copy(), u.copy()
        elif self.bits == 16:
            self.momentum, self.norm, self.scale = bf16_split(m)[0], bf16_split(u)[0], F(1)
        else:
            u = self.blocks(u)
            self.scale = next_scale(np.zeros_like(self.scale), u, 0)
            self.norm, u = encode_norm(self.fmt, u, self.scale)
            with np.errstate(all="ignore"):
                ratio = np.where(
                    u + F(self.epsilon) > 0, self.blocks(m) / (u + F(self.epsilon)), F(0)
                )
            self.momentum = encode_ratio(self.fmt, ratio, np.full(ratio.shape, 0x80, np.uint8))


class LowWeight:
    """One variable: float32, or bfloat16 with one of three ways to treat what does not fit."""

    def __init__(self, array, storage="float32", rounding="nearest"):
        self.storage, self.rounding = storage, rounding
        x = array.astype(F).ravel().copy()
        if storage == "float32":
            self.value = x
        else:
            self.half, self.low = bf16_nearest(x), None
            if rounding == "remainder":
                self.half, self.low = bf16_split(x)

    def read(self):
        if self.storage == "float32":
            return self.value.copy()
        return (
            bf16_join(self.half, self.low)
            if self.rounding == "remainder"
            else bf16_widen(self.half)
        )

    def write(self, w, random):
        if self.storage == "float32":
            self.value[...] = w
        elif self.rounding == "nearest":
            self.half[...] = bf16_nearest(w)
        elif self.rounding == "stochastic":
            self.half[...] = bf16_stochastic(w, random)
        else:
            self.half[...], self.low[...] = bf16_split(w)
