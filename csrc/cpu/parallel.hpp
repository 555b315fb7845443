// One parallel region over a list of independent work items, and how many threads it gets.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace adamax::cpu {

// The threads of a region as one of them sees it.
class Team {
 public:
  explicit Team(int size) : size_(size) {}

  // Calls work(i) for every i below count, each from one thread of the team. Every thread of the
  // team calls this with the same `next`, which starts at 0.
  template <class Work>
  void share(std::atomic<std::int64_t>& next, std::int64_t count, const Work& work) const {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  }

  void barrier() const;
  bool is_first() const;

 private:
  [[maybe_unused]] int size_;
};

// Runs body on `threads` threads, in IEEE mode on each; directly on the caller's if that is one.
// `body` must not throw.
void run_parallel(int threads, const std::function<void(const Team&)>& body);

// Threads worth waking for that many bytes of traffic.
int threads_for(std::int64_t bytes);

// For tests: what an exhaustive machine would offer instead of affinity and quota; 0 asks the
// machine.
void override_cpu_limit(int cpus);

}  // namespace adamax::cpu
