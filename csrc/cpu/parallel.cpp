// One function on several threads, and how many threads that are.
#include "cpu/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <string>

#include "adamax/adamax.hpp"
#include "core/fp_mode.hpp"
#include "cpu/cpu_limit.hpp"
#include "cpu/openmp.hpp"
#include "cpu/pool.hpp"

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

// Note [Fork]: the threads of a pool do not survive fork(), and who waits for them waits for ever.
// A child therefore never uses a pool that it inherited: none at all if this library was there
// before the fork, else its own.
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

int threads_from_environment() {
  static const int threads = [] {
    const int ours = positive_from_environment("ADAMAX_EXT_NUM_THREADS");
    return ours > 0 ? ours : positive_from_environment("OMP_NUM_THREADS");
  }();
  return threads;
}

// What the loaded OpenMP runtime was limited to, by torch.set_num_threads or threadpoolctl for
// example; what it starts with is no limit.
int openmp_limit() {
  constexpr int kNoLimit = std::numeric_limits<int>::max();
  const OpenMP openmp = loaded_openmp();
  if (openmp.max_threads == nullptr) return kNoLimit;
  static const int at_start = [] {
    const int from_environment = positive_from_environment("OMP_NUM_THREADS");
    return from_environment > 0 ? from_environment : cpu_limit();
  }();
  const int now = openmp.max_threads();
  return now < at_start ? now : kNoLimit;
}

int max_threads() {
  if (is_forked_child.load(std::memory_order_relaxed)) return 1;
  const int override = cpu_limit_override.load(std::memory_order_relaxed);
  const int limit = std::min(override > 0 ? override : cpu_limit(), openmp_limit());
  const int requested = requested_threads.load(std::memory_order_relaxed);
  const int wanted = requested > 0 ? requested : threads_from_environment();
  return wanted > 0 ? std::min(wanted, limit) : limit;
}

}  // namespace

void run_parallel(int threads, const std::function<void()>& body) {
  const auto in_ieee_mode = [](void* data) {
    const FloatingPointMode ieee;
    (*static_cast<const std::function<void()>*>(data))();
  };
  void* const data = const_cast<std::function<void()>*>(&body);
  if (threads == 1) return in_ieee_mode(data);
  const Parallel parallel = loaded_openmp().parallel;
  (parallel != nullptr ? parallel : run_on_pool)(in_ieee_mode, data, threads, 0);
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
