// Vectors of one element, in plain C++: the words of the formula for any processor and GPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "adamax/dtypes.hpp"
#include "core/host_device.hpp"

namespace adamax::scalar {
namespace {

template <class To, class From>
ADAMAX_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

ADAMAX_HOST_DEVICE float to_float(BFloat16 x) {
  return bit_cast<float>(std::uint32_t{x.bits} << 16);
}

ADAMAX_HOST_DEVICE BFloat16 to_bfloat16(float x) {
  const auto bits = bit_cast<std::uint32_t>(x);
  if (x != x) return {static_cast<std::uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// A GPU converts float16 by one instruction, which is exact one way, rounds to nearest even the
// other way, and keeps subnormals. It makes every NaN the same one: payloads are not promised.
ADAMAX_HOST_DEVICE float to_float(Float16 x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | (magnitude << 13));
  if (magnitude >= 0x0400) return bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24f;
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(subnormal));
#endif
}

ADAMAX_HOST_DEVICE Float16 to_float16(float x) {
#ifdef __CUDA_ARCH__
  Float16 rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
#else
  const auto bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x47800000u) {  // 2^16 and more, infinity too
    half = 0x7c00u;
  } else if (magnitude >=
             0x38800000u) {  // 2^-14: normal; the carry may reach infinity, as it should
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // adding 0.5 leaves the rounded subnormal in the low bits of the sum
    half = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  }
  return {static_cast<std::uint16_t>(sign | half)};
#endif
}

// From memory to the compute type, and back with one rounding.
ADAMAX_HOST_DEVICE float to_compute(float x) { return x; }
ADAMAX_HOST_DEVICE double to_compute(double x) { return x; }
ADAMAX_HOST_DEVICE float to_compute(Float16 x) { return to_float(x); }
ADAMAX_HOST_DEVICE float to_compute(BFloat16 x) { return to_float(x); }
ADAMAX_HOST_DEVICE void to_storage(float x, float& stored) { stored = x; }
ADAMAX_HOST_DEVICE void to_storage(double x, double& stored) { stored = x; }
ADAMAX_HOST_DEVICE void to_storage(float x, Float16& stored) { stored = to_float16(x); }
ADAMAX_HOST_DEVICE void to_storage(float x, BFloat16& stored) { stored = to_bfloat16(x); }

template <class T>
struct Vec {
  using Scalar = T;
  using Bits = std::uint32_t;  // of a float
  static constexpr int kLanes = 1;
  T v;

  Vec() = default;
  ADAMAX_HOST_DEVICE explicit Vec(T value) : v(value) {}

  ADAMAX_HOST_DEVICE Bits bits() const { return bit_cast<Bits>(v); }
  ADAMAX_HOST_DEVICE static Vec from_bits(Bits bits) { return Vec(bit_cast<T>(bits)); }
  ADAMAX_HOST_DEVICE static std::int32_t ints(Bits bits) { return static_cast<std::int32_t>(bits); }
  ADAMAX_HOST_DEVICE static Bits unsigned_bits(std::int32_t ints) {
    return static_cast<Bits>(ints);
  }
  ADAMAX_HOST_DEVICE static Bits with_sign_of(Vec sign, Bits bits) {
    return ints(sign.bits()) < 0 ? 0 - bits : bits;
  }
  // 0, 1, 2, ...
  ADAMAX_HOST_DEVICE static Bits counted() { return 0; }
  // Integers of 8, 16 or 32 bits; the sign of a signed one is extended.
  template <class S>
  ADAMAX_HOST_DEVICE static Bits load_bits(const S* p) {
    S stored;
    __builtin_memcpy(&stored, p, sizeof(S));
    return static_cast<Bits>(stored);
  }
  template <class S>
  ADAMAX_HOST_DEVICE static void store_bits(Bits bits, S* p) {
    const S stored = static_cast<S>(bits);
    __builtin_memcpy(p, &stored, sizeof(S));
  }
  // Four vectors, which some processors store more cheaply together.
  template <class S>
  ADAMAX_HOST_DEVICE static void store_halves(const Bits (&bits)[4], S* p) {
    for (int k = 0; k < 4; ++k) store_bits(bits[k], p + k);
  }
  // Signed integers as bytes; what those have no room for becomes the largest.
  template <class S>
  ADAMAX_HOST_DEVICE static void store_bytes(const Bits (&bits)[4], S* p) {
    constexpr std::int32_t kMost = static_cast<S>(-1) < 0 ? 127 : 255;
    for (int k = 0; k < 4; ++k)
      p[k] = static_cast<S>(ints(bits[k]) < kMost ? ints(bits[k]) : kMost);
  }

  // memcpy: the address may have any alignment.
  template <class S>
  ADAMAX_HOST_DEVICE static Vec load(const S* p) {
    S stored;
    __builtin_memcpy(&stored, p, sizeof(S));
    return Vec(to_compute(stored));
  }
  template <class S>
  ADAMAX_HOST_DEVICE void store(S* p) const {
    S stored;
    to_storage(v, stored);
    __builtin_memcpy(p, &stored, sizeof(S));
  }

  // The value as a store to that type and a load would give it back.
  template <class S>
  ADAMAX_HOST_DEVICE Vec rounded_to(const S*) const {
    S stored;
    to_storage(v, stored);
    return Vec(to_compute(stored));
  }

  friend ADAMAX_HOST_DEVICE Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
  friend ADAMAX_HOST_DEVICE Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
  friend ADAMAX_HOST_DEVICE Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
  friend ADAMAX_HOST_DEVICE Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
  friend ADAMAX_HOST_DEVICE Vec abs(Vec a) { return Vec(std::fabs(a.v)); }
  friend ADAMAX_HOST_DEVICE Vec maximum(Vec a, Vec b) {
    return Vec(a.v > b.v || a.v != a.v ? a.v : b.v);
  }
  // `b`, which is a number, if `a` is NaN. A GPU has one instruction for it.
  friend ADAMAX_HOST_DEVICE Vec larger_number(Vec a, Vec b) {
#ifdef __CUDA_ARCH__
    return Vec(fmax(a.v, b.v));
#else
    return a.v > b.v ? a : b;
#endif
  }
  friend ADAMAX_HOST_DEVICE Vec smaller_number(Vec a, Vec b) {
#ifdef __CUDA_ARCH__
    return Vec(fmin(a.v, b.v));
#else
    return a.v < b.v ? a : b;
#endif
  }
  friend ADAMAX_HOST_DEVICE Vec clamp(Vec a, Vec limit) {
    return Vec(a.v < -limit.v ? -limit.v : a.v > limit.v ? limit.v : a.v);
  }
  friend ADAMAX_HOST_DEVICE Vec zero_below(Vec a, Vec tiny) {
    return abs(a).v < tiny.v ? Vec(T(0)) : a;
  }
};

using F32 = Vec<float>;
using F64 = Vec<double>;

ADAMAX_HOST_DEVICE void widen(F32 a, F64* wide) { wide[0] = F64(static_cast<double>(a.v)); }
ADAMAX_HOST_DEVICE void widen(F64 a, F64* wide) { wide[0] = a; }

}  // namespace
}  // namespace adamax::scalar
