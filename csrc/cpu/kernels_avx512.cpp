// The kernels with 16 floats or 8 doubles at a time.
#include <immintrin.h>

#include <type_traits>
#include <utility>

#include "core/low_state.hpp"
#include "core/random.hpp"
#include "core/update_rule.hpp"
#include "cpu/kernel_table.hpp"

namespace adamax::cpu::avx512 {
namespace {

constexpr int kVectorBytes = 64;
#include "cpu/vec.inl"

inline Floats magnitude(Floats x) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), x); }
inline Doubles magnitude(Doubles x) { return _mm512_andnot_pd(_mm512_set1_pd(-0.0), x); }

// maxps returns its second operand when either is NaN.
inline Floats larger(Floats a, Floats b) {
  return _mm512_mask_max_ps(a, _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a, b);
}
inline Doubles larger(Doubles a, Doubles b) {
  return _mm512_mask_max_pd(a, _mm512_cmp_pd_mask(a, a, _CMP_ORD_Q), a, b);
}

inline Floats larger_number(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller_number(Floats a, Floats b) { return _mm512_min_ps(a, b); }

inline Floats from_float16(Words x) { return _mm512_cvtph_ps(reinterpret_cast<__m256i>(x)); }
inline Words to_float16(Floats x) {
  return reinterpret_cast<Words>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline FloatBits extended(Words x) {
  return reinterpret_cast<FloatBits>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)));
}
inline FloatBits extended(Bytes x) {
  return reinterpret_cast<FloatBits>(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(x)));
}
inline FloatInts extended(SignedWords x) {
  return reinterpret_cast<FloatInts>(_mm512_cvtepi16_epi32(reinterpret_cast<__m256i>(x)));
}
inline FloatInts extended(SignedBytes x) {
  return reinterpret_cast<FloatInts>(_mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(x)));
}
inline Words truncated(FloatBits x) {
  return reinterpret_cast<Words>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
}
inline TwoWords truncated(FloatBits a, FloatBits b) {
  const __m512i runs =
      _mm512_packus_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
  return reinterpret_cast<TwoWords>(
      _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), runs));
}

// Packing works in quarters of a register: runs of 4, of which those of one vector lie 4 apart.
inline __m512i words(FloatInts a, FloatInts b) {
  return _mm512_packs_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
}
inline __m512i in_order(__m512i runs) {
  return _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), runs);
}
inline FourBytes limited_to_bytes(const FloatInts (&x)[4]) {
  return reinterpret_cast<FourBytes>(
      in_order(_mm512_packus_epi16(words(x[0], x[1]), words(x[2], x[3]))));
}
inline FourSignedBytes limited_to_signed_bytes(const FloatInts (&x)[4]) {
  return reinterpret_cast<FourSignedBytes>(
      in_order(_mm512_packs_epi16(words(x[0], x[1]), words(x[2], x[3]))));
}

inline FloatInts negated_with(Floats sign, FloatInts x) {
  const __mmask16 is_negative = _mm512_movepi32_mask(reinterpret_cast<__m512i>(sign));
  const auto words = reinterpret_cast<__m512i>(x);
  return reinterpret_cast<FloatInts>(
      _mm512_mask_sub_epi32(words, is_negative, _mm512_setzero_si512(), words));
}

inline Doubles lower_half(Floats x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline Doubles upper_half(Floats x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }

#include "cpu/kernels.inl"

}  // namespace
extern constexpr KernelTable kTable =
    make_table("avx512", "avx512f avx512bw avx512dq avx512vl f16c");
}  // namespace adamax::cpu::avx512
