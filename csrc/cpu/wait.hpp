// Waiting for another thread, awake for a while.
#pragma once

#include <atomic>
#include <cstdint>

namespace adamax::cpu {

// Waits while `value` is `old`: watches it as long as putting the thread to sleep and waking it
// would take, and then sleeps.
inline void wait_while(const std::atomic<std::uint32_t>& value, std::uint32_t old) {
  constexpr int kLooks = 2'000;
  for (int look = 0; look < kLooks; ++look) {
    if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace adamax::cpu
