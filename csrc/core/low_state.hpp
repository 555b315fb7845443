// State in 16 and in 8 bits: how first moment and infinity norm are read and stored.
//
// A norm u is kept as digits times a scale, and the scale takes the decay: digits of an element
// whose norm only decays never change, however small the decay of a step. In 8 bits both codes are
// the top bits of a float32, less a constant: that of u / scale, to nearest, and that of m / (u +
// epsilon), which is bounded and is the step in units of the rate, at random.
#pragma once

#include <cstdint>

#include "core/bfloat16.hpp"
#include "core/host_device.hpp"
#include "core/update_rule.hpp"
#include "core/vec_scalar.hpp"

namespace adamax {

// ---- 16 bits ------------------------------------------------------------------------------------

// The scale after a step, in (1/2, 1]: the decay so far up to whole octaves.
ADAMAX_HOST_DEVICE float next_variable_scale(float scale, float beta_2) {
  scale = scale * beta_2;
  if (scale == 0.0f) return 1.0f;
  while (scale > 0.0f && scale <= 0.5f) scale = scale * 2.0f;
  return scale;
}

// `drawn` is a random byte, in the middle of what the lower half of the bits may be.
template <class V>
ADAMAX_HOST_DEVICE BitsOf<V> momentum_half(V m, BitsOf<V> drawn) {
  return half_at_random(m, (drawn << 8) + 128u);
}
template <class V>
ADAMAX_HOST_DEVICE BitsOf<V> norm_half(V u, V inverse) {
  return half_nearest_away(u * inverse);
}

// ---- 8 bits -------------------------------------------------------------------------------------

constexpr int kCodeShift = 19;  // 4 bits of the mantissa stay
// Of a norm: code 255 stands for the scale, 0 for a floor 16 octaves below it.
constexpr std::uint32_t kNormBase = 0x3f800000u / (1u << kCodeShift) - 255;
// Of a ratio: it is taken with an offset, linear below it, logarithmic above.
constexpr float kRatioOffset = 17.0f / 4096.0f, kRatioLimit = 1.0f - kRatioOffset;
constexpr std::uint32_t kRatioOffsetBits = 0x3b880000u;

// A block with a smaller scale is zero: nothing subnormal is ever decoded.
constexpr float kSmallestScale = 0x1p-86f;
// Norms from here on, infinite ones too, do not count for the scale of their block.
constexpr float kPoison = 0x1p127f;

template <class V>
ADAMAX_HOST_DEVICE V decoded_norm(BitsOf<V> code, V scale) {
  return V::from_bits((code + kNormBase) << kCodeShift) * scale;
}

// The code has its sign extended.
template <class V>
ADAMAX_HOST_DEVICE V decoded_ratio(BitsOf<V> code) {
  const auto number = V::ints(code);
  const BitsOf<V> magnitude = V::unsigned_bits(number < 0 ? -number : number);
  const V ratio = V::from_bits((magnitude << kCodeShift) + kRatioOffsetBits) - V(kRatioOffset);
  return V::from_bits(ratio.bits() | (code & 0x80000000u));
}

// The moments of an element from their codes, as a step moves them.
template <class V>
ADAMAX_HOST_DEVICE void move_moments(V& m, V& u, BitsOf<V> momentum_code, BitsOf<V> norm_code,
                                     V scale, V h, EpsilonRule epsilon, const VectorScalars<V>& s) {
  u = decoded_norm(norm_code, scale);
  m = decoded_ratio<V>(momentum_code) * divisor(u, epsilon, s);
  m = m + (h - m) * s.one_minus_beta_1;
  u = larger_number(magnitude(h, epsilon, s), u * s.beta_2);  // not a NaN of the gradient
}

// Of the largest norm of a block below kPoison: the scale decays as the norms do, and grows by
// whole octaves, so that codes of untouched elements shift by whole codes.
ADAMAX_HOST_DEVICE float next_block_scale(float scale, float largest, float beta_2) {
  const float decayed = scale * beta_2;
  if (largest < kSmallestScale) largest = 0.0f;
  if (!(decayed >= kSmallestScale)) return largest;
  if (largest <= decayed) return decayed;
  const std::uint32_t from = scalar::F32(decayed).bits(), to = scalar::F32(largest).bits();
  return scalar::F32::from_bits(from + ((to - from + 0x7fffffu) >> 23 << 23)).v;
}

// What divides norms by their scale; not 0 for none, because inf * 0 would be a NaN.
ADAMAX_HOST_DEVICE float inverse_scale(float scale) {
  return scale > 0.0f ? 1.0f / scale : 0x1p-126f;
}

// The bits of a norm in units of its scale, rounded where the code ends, which only a shift takes
// off.
template <class V>
ADAMAX_HOST_DEVICE BitsOf<V> rounded_norm(V norm, V inverse) {
  const auto rounded = V::ints((norm * inverse).bits() + (1u << (kCodeShift - 1)));
  const auto floor = V::ints(BitsOf<V>{} + (kNormBase << kCodeShift));
  return V::unsigned_bits(rounded > floor ? rounded : floor);
}
// From 0 on; 255 stands for more, too.
template <class V>
ADAMAX_HOST_DEVICE BitsOf<V> norm_code(BitsOf<V> rounded) {
  return (rounded >> kCodeShift) - kNormBase;
}
// The norm that is stored, and steps.
template <class V>
ADAMAX_HOST_DEVICE V stored_norm(BitsOf<V> rounded, V scale) {
  return V::from_bits(rounded & ~((1u << kCodeShift) - 1)) * scale;
}

// From -127 to 127. `drawn` is a random byte; 128 rounds to nearest. A NaN, which the weight keeps,
// becomes the largest.
template <class V>
ADAMAX_HOST_DEVICE BitsOf<V> ratio_code(V ratio, BitsOf<V> drawn) {
  ratio = larger_number(smaller_number(ratio, V(kRatioLimit)), V(-kRatioLimit));
  // The byte stands at the top of the bits that are dropped, and in the middle of what it may be.
  const BitsOf<V> dither =
      (drawn << (kCodeShift - 8)) + ((1u << (kCodeShift - 9)) - kRatioOffsetBits);
  return V::with_sign_of(ratio, ((abs(ratio) + V(kRatioOffset)).bits() + dither) >> kCodeShift);
}

}  // namespace adamax
