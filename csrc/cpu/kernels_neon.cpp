// The kernels with 4 floats or 2 doubles at a time, for AArch64, of which Advanced SIMD is a part.
#include <arm_neon.h>

#include <type_traits>
#include <utility>

#include "core/low_state.hpp"
#include "core/random.hpp"
#include "core/update_rule.hpp"
#include "cpu/kernel_table.hpp"

namespace adamax::cpu::neon {
namespace {

constexpr int kVectorBytes = 16;
#include "cpu/vec.inl"

inline Floats magnitude(Floats x) { return vabsq_f32(x); }
inline Doubles magnitude(Doubles x) { return vabsq_f64(x); }

// fmax returns NaN when either is.
inline Floats larger(Floats a, Floats b) { return vmaxq_f32(a, b); }
inline Doubles larger(Doubles a, Doubles b) { return vmaxq_f64(a, b); }

inline Floats larger_number(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller_number(Floats a, Floats b) { return a < b ? a : b; }

inline Floats from_float16(Words x) { return vcvt_f32_f16(reinterpret_cast<float16x4_t>(x)); }
inline Words to_float16(Floats x) { return reinterpret_cast<Words>(vcvt_f16_f32(x)); }

inline FloatBits extended(Words x) { return vmovl_u16(x); }
inline FloatInts extended(SignedWords x) { return vmovl_s16(x); }
inline FloatBits extended(Bytes x) {
  return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(reinterpret_cast<std::uint32_t>(x)))));
}
inline FloatInts extended(SignedBytes x) {
  return vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(reinterpret_cast<std::uint32_t>(x)))));
}
inline Words truncated(FloatBits x) { return vmovn_u32(x); }
inline TwoWords truncated(FloatBits a, FloatBits b) {
  return vcombine_u16(vmovn_u32(a), vmovn_u32(b));
}

inline int16x8_t words(FloatInts a, FloatInts b) {
  return vcombine_s16(vqmovn_s32(a), vqmovn_s32(b));
}
inline FourBytes limited_to_bytes(const FloatInts (&x)[4]) {
  return vcombine_u8(vqmovun_s16(words(x[0], x[1])), vqmovun_s16(words(x[2], x[3])));
}
inline FourSignedBytes limited_to_signed_bytes(const FloatInts (&x)[4]) {
  return vcombine_s8(vqmovn_s16(words(x[0], x[1])), vqmovn_s16(words(x[2], x[3])));
}

inline FloatInts negated_with(Floats sign, FloatInts x) {
  const int32x4_t ones = vreinterpretq_s32_f32(sign) >> 31;
  return (x ^ ones) - ones;
}

inline Doubles lower_half(Floats x) { return vcvt_f64_f32(vget_low_f32(x)); }
inline Doubles upper_half(Floats x) { return vcvt_high_f64_f32(x); }

#include "cpu/kernels.inl"

}  // namespace
extern constexpr KernelTable kTable = make_table("neon", "");
}  // namespace adamax::cpu::neon
