// The bound of a plain float32 step: the same loads and stores (four streams read, three written),
// and nothing but additions in between.
#include <cstdint>

#ifdef __x86_64__
#define BEST_ISA [[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")]]
#else
#define BEST_ISA
#endif

namespace {

constexpr std::int64_t kChunk = 65536;

template <bool prefetch>
[[gnu::always_inline]] inline void chunk(float* w, const float* g, float* m, float* u,
                                         std::int64_t n) {
  for (std::int64_t line = 0; line < n; line += 16) {
    if constexpr (prefetch) {
      __builtin_prefetch(w + line + 256);
      __builtin_prefetch(g + line + 256);
      __builtin_prefetch(m + line + 256);
      __builtin_prefetch(u + line + 256);
    }
#pragma GCC ivdep
    for (std::int64_t i = line; i < line + 16; ++i) {
      w[i] = w[i] + g[i];
      m[i] = m[i] + g[i];
      u[i] = u[i] + g[i];
    }
  }
}

BEST_ISA void plain(float* w, const float* g, float* m, float* u, std::int64_t n) {
  chunk<false>(w, g, m, u, n);
}

BEST_ISA void prefetched(float* w, const float* g, float* m, float* u, std::int64_t n) {
  chunk<true>(w, g, m, u, n);
}

}  // namespace

// One pass over n elements, a multiple of 16, on `threads` threads, which take chunks as the step
// does, or one contiguous part each.
extern "C" void traffic(float* w, const float* g, float* m, float* u, std::int64_t n, int threads,
                        int prefetch, int chunked) {
  const auto run = prefetch ? prefetched : plain;
  if (chunked) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (std::int64_t begin = 0; begin < n; begin += kChunk) {
      const std::int64_t size = n - begin < kChunk ? n - begin : kChunk;
      run(w + begin, g + begin, m + begin, u + begin, size);
    }
  } else {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
      const std::int64_t begin = n / 16 * part / threads * 16;
      const std::int64_t end = n / 16 * (part + 1) / threads * 16;
      run(w + begin, g + begin, m + begin, u + begin, end - begin);
    }
  }
}
