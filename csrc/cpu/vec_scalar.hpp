// Vectors of one element, in plain C++: the words of the formula for any processor.
#pragma once

#include <cstdint>

#include "adamax/dtypes.hpp"

namespace adamax::cpu::scalar {
namespace {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline float to_float(BFloat16 x) { return bit_cast<float>(std::uint32_t{x.bits} << 16); }

inline BFloat16 to_bfloat16(float x) {
  const auto bits = bit_cast<std::uint32_t>(x);
  if (x != x) return {static_cast<std::uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float to_float(Float16 x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | (magnitude << 13));
  if (magnitude >= 0x0400) return bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24f;
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(subnormal));
}

inline Float16 to_float16(float x) {
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
}

template <class T>
struct Vec {
  using Scalar = T;
  static constexpr int kLanes = 1;
  T v;

  Vec() = default;
  explicit Vec(T value) : v(value) {}

  // memcpy: the address may have any alignment.
  static Vec load(const T* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof(T));
    return Vec(value);
  }
  void store(T* p) const { __builtin_memcpy(p, &v, sizeof(T)); }

  template <class Half>
  static Vec load(const Half* p) {
    Half half;
    __builtin_memcpy(&half, p, sizeof(Half));
    return Vec(to_float(half));
  }
  void store(Float16* p) const {
    const Float16 half = to_float16(v);
    __builtin_memcpy(p, &half, sizeof(half));
  }
  void store(BFloat16* p) const {
    const BFloat16 half = to_bfloat16(v);
    __builtin_memcpy(p, &half, sizeof(half));
  }

  // The value as a store to that type and a load would give it back.
  Vec rounded_to(const T*) const { return *this; }
  Vec rounded_to(const Float16*) const { return Vec(to_float(to_float16(v))); }
  Vec rounded_to(const BFloat16*) const { return Vec(to_float(to_bfloat16(v))); }

  friend Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
  friend Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
  friend Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
  friend Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
  friend Vec abs(Vec a) {
    return Vec(sizeof(T) == 4 ? T(__builtin_fabsf(float(a.v))) : T(__builtin_fabs(a.v)));
  }
  friend Vec maximum(Vec a, Vec b) { return Vec(a.v > b.v || a.v != a.v ? a.v : b.v); }
  friend Vec clamp(Vec a, Vec limit) {
    return Vec(a.v < -limit.v ? -limit.v : a.v > limit.v ? limit.v : a.v);
  }
  friend Vec zero_below(Vec a, Vec tiny) { return abs(a).v < tiny.v ? Vec(T(0)) : a; }
};

using F32 = Vec<float>;
using F64 = Vec<double>;

inline void widen(F32 a, F64* wide) { wide[0] = F64(static_cast<double>(a.v)); }
inline void widen(F64 a, F64* wide) { wide[0] = a; }

}  // namespace
}  // namespace adamax::cpu::scalar
