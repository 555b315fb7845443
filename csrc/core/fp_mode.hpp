// IEEE floating point for the duration of a scope, whatever the caller's thread had set.
#pragma once

#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <cstdint>
#else
#include <cfenv>
#endif

namespace adamax {

// Round to nearest, subnormals kept, no traps; the caller's mode comes back at the end.
class FloatingPointMode {
 public:
  FloatingPointMode(const FloatingPointMode&) = delete;
  FloatingPointMode& operator=(const FloatingPointMode&) = delete;
#if defined(__x86_64__) || defined(__i386__)
  FloatingPointMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~FloatingPointMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  // Not by fesetenv(): it leaves the bits for half precision and for NaN as they are.
  FloatingPointMode() {
    asm volatile("mrs %0, fpcr\n\tmrs %1, fpsr" : "=r"(mode_), "=r"(flags_) : : "memory");
    asm volatile("msr fpcr, xzr" : : : "memory");
  }
  ~FloatingPointMode() {
    asm volatile("msr fpcr, %0\n\tmsr fpsr, %1" : : "r"(mode_), "r"(flags_) : "memory");
  }

 private:
  std::uint64_t mode_, flags_;
#else
  FloatingPointMode() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~FloatingPointMode() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
#endif
};

}  // namespace adamax
