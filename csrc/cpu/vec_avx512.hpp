// Vectors of 512 bits: the words of the formula in AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "adamax/dtypes.hpp"

namespace adamax::cpu::avx512 {
namespace {

struct F32 {
  using Scalar = float;
  static constexpr int kLanes = 16;
  __m512 v;

  F32() = default;
  explicit F32(float value) : v(_mm512_set1_ps(value)) {}
  explicit F32(__m512 value) : v(value) {}

  static F32 load(const float* p) { return F32(_mm512_loadu_ps(p)); }
  static F32 load(const Float16* p) { return from(load_half(p), Float16{}); }
  static F32 load(const BFloat16* p) { return from(load_half(p), BFloat16{}); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  template <class Half>
  void store(Half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to(Half{}));
  }

  // The value as a store to that type and a load would give it back.
  F32 rounded_to(const float*) const { return *this; }
  template <class Half>
  F32 rounded_to(const Half*) const {
    return from(to(Half{}), Half{});
  }

  friend F32 operator+(F32 a, F32 b) { return F32(_mm512_add_ps(a.v, b.v)); }
  friend F32 operator-(F32 a, F32 b) { return F32(_mm512_sub_ps(a.v, b.v)); }
  friend F32 operator*(F32 a, F32 b) { return F32(_mm512_mul_ps(a.v, b.v)); }
  friend F32 operator/(F32 a, F32 b) { return F32(_mm512_div_ps(a.v, b.v)); }
  friend F32 abs(F32 a) { return F32(_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)); }
  // maxps and minps return their second operand when either is NaN.
  friend F32 maximum(F32 a, F32 b) {
    const __mmask16 a_is_number = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
    return F32(_mm512_mask_max_ps(a.v, a_is_number, a.v, b.v));
  }
  friend F32 clamp(F32 a, F32 limit) {
    const __m512 negated = _mm512_xor_ps(_mm512_set1_ps(-0.0f), limit.v);
    return F32(_mm512_min_ps(limit.v, _mm512_max_ps(negated, a.v)));
  }
  friend F32 zero_below(F32 a, F32 tiny) {
    return F32(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(abs(a).v, tiny.v, _CMP_NLT_UQ), a.v));
  }

 private:
  static __m256i load_half(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static F32 from(__m256i half, Float16) { return F32(_mm512_cvtph_ps(half)); }
  static F32 from(__m256i half, BFloat16) {
    return F32(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
  }
  __m256i to(Float16) const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  __m256i to(BFloat16) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i half_ulp = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half_ulp), 16);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, quiet));
  }
};

struct F64 {
  using Scalar = double;
  static constexpr int kLanes = 8;
  __m512d v;

  F64() = default;
  explicit F64(double value) : v(_mm512_set1_pd(value)) {}
  explicit F64(__m512d value) : v(value) {}

  static F64 load(const double* p) { return F64(_mm512_loadu_pd(p)); }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  F64 rounded_to(const double*) const { return *this; }

  friend F64 operator+(F64 a, F64 b) { return F64(_mm512_add_pd(a.v, b.v)); }
  friend F64 operator-(F64 a, F64 b) { return F64(_mm512_sub_pd(a.v, b.v)); }
  friend F64 operator*(F64 a, F64 b) { return F64(_mm512_mul_pd(a.v, b.v)); }
  friend F64 operator/(F64 a, F64 b) { return F64(_mm512_div_pd(a.v, b.v)); }
  friend F64 abs(F64 a) { return F64(_mm512_andnot_pd(_mm512_set1_pd(-0.0), a.v)); }
  friend F64 maximum(F64 a, F64 b) {
    const __mmask8 a_is_number = _mm512_cmp_pd_mask(a.v, a.v, _CMP_ORD_Q);
    return F64(_mm512_mask_max_pd(a.v, a_is_number, a.v, b.v));
  }
  friend F64 clamp(F64 a, F64 limit) {
    const __m512d negated = _mm512_xor_pd(_mm512_set1_pd(-0.0), limit.v);
    return F64(_mm512_min_pd(limit.v, _mm512_max_pd(negated, a.v)));
  }
  friend F64 zero_below(F64 a, F64 tiny) {
    return F64(_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(abs(a).v, tiny.v, _CMP_NLT_UQ), a.v));
  }
};

inline void widen(F32 a, F64* wide) {
  wide[0] = F64(_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
  wide[1] = F64(_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
}
inline void widen(F64 a, F64* wide) { wide[0] = a; }

}  // namespace
}  // namespace adamax::cpu::avx512
