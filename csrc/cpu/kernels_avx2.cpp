// The kernels with 8 floats or 4 doubles at a time.
#include <immintrin.h>

#include <type_traits>
#include <utility>

#include "core/low_state.hpp"
#include "core/random.hpp"
#include "core/update_rule.hpp"
#include "cpu/kernel_table.hpp"

namespace adamax::cpu::avx2 {
namespace {

constexpr int kVectorBytes = 32;
#include "cpu/vec.inl"

inline Floats magnitude(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline Doubles magnitude(Doubles x) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x); }

// maxps returns its second operand when either is NaN.
inline Floats larger(Floats a, Floats b) {
  return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
inline Doubles larger(Doubles a, Doubles b) {
  return _mm256_blendv_pd(_mm256_max_pd(a, b), a, _mm256_cmp_pd(a, a, _CMP_UNORD_Q));
}

inline Floats larger_number(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats smaller_number(Floats a, Floats b) { return _mm256_min_ps(a, b); }

inline Floats from_float16(Words x) { return _mm256_cvtph_ps(reinterpret_cast<__m128i>(x)); }
inline Words to_float16(Floats x) {
  return reinterpret_cast<Words>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline FloatBits extended(Words x) {
  return reinterpret_cast<FloatBits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
}
inline FloatBits extended(Bytes x) {
  return reinterpret_cast<FloatBits>(
      _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(reinterpret_cast<std::int64_t>(x))));
}
inline FloatInts extended(SignedWords x) {
  return reinterpret_cast<FloatInts>(_mm256_cvtepi16_epi32(reinterpret_cast<__m128i>(x)));
}
inline FloatInts extended(SignedBytes x) {
  return reinterpret_cast<FloatInts>(
      _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(reinterpret_cast<std::int64_t>(x))));
}
inline Words truncated(FloatBits x) {
  const auto words = reinterpret_cast<__m256i>(x);
  return reinterpret_cast<Words>(
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline TwoWords truncated(FloatBits a, FloatBits b) {
  const __m256i runs =
      _mm256_packus_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  return reinterpret_cast<TwoWords>(_mm256_permute4x64_epi64(runs, _MM_SHUFFLE(3, 1, 2, 0)));
}

// Packing works in halves of a register: four runs of 4 from each vector, of which the first halves
// come first.
inline __m256i words(FloatInts a, FloatInts b) {
  return _mm256_packs_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
}
inline __m256i in_order(__m256i runs) {
  return _mm256_permutevar8x32_epi32(runs, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
inline FourBytes limited_to_bytes(const FloatInts (&x)[4]) {
  return reinterpret_cast<FourBytes>(
      in_order(_mm256_packus_epi16(words(x[0], x[1]), words(x[2], x[3]))));
}
inline FourSignedBytes limited_to_signed_bytes(const FloatInts (&x)[4]) {
  return reinterpret_cast<FourSignedBytes>(
      in_order(_mm256_packs_epi16(words(x[0], x[1]), words(x[2], x[3]))));
}

inline FloatInts negated_with(Floats sign, FloatInts x) {
  return reinterpret_cast<FloatInts>(
      _mm256_sign_epi32(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(sign)));
}

inline Doubles lower_half(Floats x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline Doubles upper_half(Floats x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }

#include "cpu/kernels.inl"

}  // namespace
extern constexpr KernelTable kTable = make_table("avx2", "avx2 f16c");
}  // namespace adamax::cpu::avx2
