// One parallel region over a list of independent work items, and how many threads it gets.
#include "cpu/parallel.hpp"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>

#include "adamax/adamax.hpp"
#include "core/fp_mode.hpp"
#include "cpu/cpu_limit.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace adamax {
namespace cpu {
namespace {

// Reading less than this for each thread is not worth waking one: on a busy machine the thread that
// is through first waits for one that is not even running.
constexpr std::int64_t kBytesPerThread = 1024 * 1024;

std::atomic<int> requested_threads{0};  // by set_num_threads; 0: not called
std::atomic<int> cpu_limit_override{0};

// Note [Fork]: the threads of an OpenMP pool do not survive fork(), and the runtime would wait for
// them for ever. A child therefore never enters an OpenMP construct.
std::atomic<bool> is_forked_child{false};
#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { is_forked_child.store(true); });
#endif

// A positive whole number at the start of the variable ("4", or OpenMP's "4,2"), or 0.
int positive_from_environment(const char* name) {
  const char* const text = std::getenv(name);
  return text == nullptr ? 0 : std::max(0, std::atoi(text));
}

[[maybe_unused]] int threads_from_environment() {
  static const int threads = [] {
    const int ours = positive_from_environment("ADAMAX_EXT_NUM_THREADS");
    return ours > 0 ? ours : positive_from_environment("OMP_NUM_THREADS");
  }();
  return threads;
}

#ifdef _OPENMP
// OpenMP's own limit, when the library was loaded: what the environment says, or the processors.
const int openmp_limit_at_start = omp_get_max_threads();

// What OpenMP was limited to since then, by threadpoolctl for example; or "no limit".
int openmp_limit() {
  const int now = omp_get_max_threads();
  return now < openmp_limit_at_start ? now : std::numeric_limits<int>::max();
}
#endif

int max_threads() {
#ifdef _OPENMP
  if (is_forked_child.load(std::memory_order_relaxed)) return 1;
  const int override = cpu_limit_override.load(std::memory_order_relaxed);
  const int limit = std::min(override > 0 ? override : cpu_limit(), openmp_limit());
  const int requested = requested_threads.load(std::memory_order_relaxed);
  const int wanted = requested > 0 ? requested : threads_from_environment();
  return wanted > 0 ? std::min(wanted, limit) : limit;
#else
  return 1;
#endif
}

}  // namespace

void Team::barrier() const {
#ifdef _OPENMP
  if (size_ > 1) {
#pragma omp barrier
  }
#endif
}

bool Team::is_first() const {
#ifdef _OPENMP
  return size_ == 1 || omp_get_thread_num() == 0;
#else
  return true;
#endif
}

void run_parallel([[maybe_unused]] int threads, const std::function<void(const Team&)>& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const FloatingPointMode ieee;
      body(Team(omp_get_num_threads()));
    }
    return;
  }
#endif
  const FloatingPointMode ieee;
  body(Team(1));
}

int threads_for(std::int64_t bytes) {
  const std::int64_t worth = bytes / kBytesPerThread;
  return worth <= 1 ? 1 : static_cast<int>(std::min<std::int64_t>(worth, max_threads()));
}

void override_cpu_limit(int cpus) { cpu_limit_override.store(cpus); }

}  // namespace cpu

void set_num_threads(int n) {
  if (n < 1) throw std::invalid_argument("n must be >= 1; received " + std::to_string(n));
  cpu::requested_threads.store(n);
}

int get_num_threads() { return cpu::max_threads(); }

}  // namespace adamax
