// Vectors of 256 bits: the words of the formula in AVX2 and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "adamax/dtypes.hpp"

namespace adamax::cpu::avx2 {
namespace {

struct F32 {
  using Scalar = float;
  static constexpr int kLanes = 8;
  __m256 v;

  F32() = default;
  explicit F32(float value) : v(_mm256_set1_ps(value)) {}
  explicit F32(__m256 value) : v(value) {}

  static F32 load(const float* p) { return F32(_mm256_loadu_ps(p)); }
  static F32 load(const Float16* p) { return from(load_half(p), Float16{}); }
  static F32 load(const BFloat16* p) { return from(load_half(p), BFloat16{}); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  template <class Half>
  void store(Half* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to(Half{}));
  }

  // The value as a store to that type and a load would give it back.
  F32 rounded_to(const float*) const { return *this; }
  template <class Half>
  F32 rounded_to(const Half*) const {
    return from(to(Half{}), Half{});
  }

  friend F32 operator+(F32 a, F32 b) { return F32(_mm256_add_ps(a.v, b.v)); }
  friend F32 operator-(F32 a, F32 b) { return F32(_mm256_sub_ps(a.v, b.v)); }
  friend F32 operator*(F32 a, F32 b) { return F32(_mm256_mul_ps(a.v, b.v)); }
  friend F32 operator/(F32 a, F32 b) { return F32(_mm256_div_ps(a.v, b.v)); }
  friend F32 abs(F32 a) { return F32(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)); }
  // maxps and minps return their second operand when either is NaN.
  friend F32 maximum(F32 a, F32 b) {
    const __m256 a_is_nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
    return F32(_mm256_blendv_ps(_mm256_max_ps(a.v, b.v), a.v, a_is_nan));
  }
  friend F32 clamp(F32 a, F32 limit) {
    const __m256 negated = _mm256_xor_ps(_mm256_set1_ps(-0.0f), limit.v);
    return F32(_mm256_min_ps(limit.v, _mm256_max_ps(negated, a.v)));
  }
  friend F32 zero_below(F32 a, F32 tiny) {
    return F32(_mm256_andnot_ps(_mm256_cmp_ps(abs(a).v, tiny.v, _CMP_LT_OQ), a.v));
  }

 private:
  static __m128i load_half(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  static F32 from(__m128i half, Float16) { return F32(_mm256_cvtph_ps(half)); }
  static F32 from(__m128i half, BFloat16) {
    return F32(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)));
  }
  __m128i to(Float16) const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  __m128i to(BFloat16) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i half_ulp = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half_ulp), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, quiet, is_nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
};

struct F64 {
  using Scalar = double;
  static constexpr int kLanes = 4;
  __m256d v;

  F64() = default;
  explicit F64(double value) : v(_mm256_set1_pd(value)) {}
  explicit F64(__m256d value) : v(value) {}

  static F64 load(const double* p) { return F64(_mm256_loadu_pd(p)); }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  F64 rounded_to(const double*) const { return *this; }

  friend F64 operator+(F64 a, F64 b) { return F64(_mm256_add_pd(a.v, b.v)); }
  friend F64 operator-(F64 a, F64 b) { return F64(_mm256_sub_pd(a.v, b.v)); }
  friend F64 operator*(F64 a, F64 b) { return F64(_mm256_mul_pd(a.v, b.v)); }
  friend F64 operator/(F64 a, F64 b) { return F64(_mm256_div_pd(a.v, b.v)); }
  friend F64 abs(F64 a) { return F64(_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)); }
  friend F64 maximum(F64 a, F64 b) {
    const __m256d a_is_nan = _mm256_cmp_pd(a.v, a.v, _CMP_UNORD_Q);
    return F64(_mm256_blendv_pd(_mm256_max_pd(a.v, b.v), a.v, a_is_nan));
  }
  friend F64 clamp(F64 a, F64 limit) {
    const __m256d negated = _mm256_xor_pd(_mm256_set1_pd(-0.0), limit.v);
    return F64(_mm256_min_pd(limit.v, _mm256_max_pd(negated, a.v)));
  }
  friend F64 zero_below(F64 a, F64 tiny) {
    return F64(_mm256_andnot_pd(_mm256_cmp_pd(abs(a).v, tiny.v, _CMP_LT_OQ), a.v));
  }
};

inline void widen(F32 a, F64* wide) {
  wide[0] = F64(_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)));
  wide[1] = F64(_mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)));
}
inline void widen(F64 a, F64* wide) { wide[0] = a; }

}  // namespace
}  // namespace adamax::cpu::avx2
