// bfloat16 beside plain rounding to nearest: stored at random, or with the bits that do not fit.
//
// `V` is a vector of floats with bits() and from_bits(), `Bits` its bits. Halves are returned in
// the lower 16 bits.
#pragma once

#include <cstdint>

#include "core/host_device.hpp"

namespace adamax {

template <class V>
using BitsOf = typename V::Bits;

// Every NaN becomes one: adding to the largest, which CUDA makes, would give -0.
template <class V>
ADAMAX_HOST_DEVICE BitsOf<V> half_unless_nan(V x, BitsOf<V> sum) {
  return (x.v != x.v ? BitsOf<V>{} + 0x7fc00000u : sum) >> 16;
}

// Away from zero with the probability that the lower half of the bits is of 2^16, where `drawn` is
// below 2^16: the mean is exact, and what bfloat16 holds never moves.
template <class V>
ADAMAX_HOST_DEVICE BitsOf<V> half_at_random(V x, BitsOf<V> drawn) {
  return half_unless_nan(x, x.bits() + drawn);
}

// To the nearest, ties away from zero.
template <class V>
ADAMAX_HOST_DEVICE BitsOf<V> half_nearest_away(V x) {
  return half_unless_nan(x, x.bits() + 0x8000u);
}

// The bits that half_nearest_away() drops; as a signed number they are the difference to it.
template <class V>
ADAMAX_HOST_DEVICE BitsOf<V> remainder_of(V x) {
  return x.v != x.v ? BitsOf<V>{} : x.bits() & 0xffffu;
}

// What was taken apart; the remainder with its sign extended. A weight that somebody else set to
// zero has none: with a negative one it would become a NaN.
template <class V>
ADAMAX_HOST_DEVICE V joined(BitsOf<V> half, BitsOf<V> remainder) {
  const auto is_stale = V::ints(half & 0x7fffu) < V::ints(remainder >> 31);
  return V::from_bits((half << 16) + (is_stale ? BitsOf<V>{} : remainder));
}

}  // namespace adamax
