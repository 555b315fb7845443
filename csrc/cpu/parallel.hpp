// One function on several threads, and how many threads that are.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace adamax::cpu {

// Calls body() on up to `threads` threads at once, in IEEE mode on each, and returns when all calls
// have. What is to be done is for the calls to share out, however many they are. `body` must not
// throw.
void run_parallel(int threads, const std::function<void()>& body);

// For body(): calls work(i) for every i below count that no other thread has taken. `next` starts
// at 0.
template <class Work>
void share(std::atomic<std::int64_t>& next, std::int64_t count, const Work& work) {
  for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
}

// Threads worth waking for that many bytes of traffic.
int threads_for(std::int64_t bytes);

// For tests: what an exhaustive machine would offer instead of affinity and quota; 0 asks the
// machine.
void override_cpu_limit(int cpus);

}  // namespace adamax::cpu
