// One function on several threads, and how many threads that are.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <new>

namespace adamax::cpu {

// Calls body() on up to `threads` threads at once, in IEEE mode on each, and returns when all calls
// have. What is to be done is for the calls to share out, however many they are. `body` must not
// throw.
void run_parallel(int threads, const std::function<void()>& body);

// Work items [0, count) for threads to share out: each thread takes a contiguous part in order, and
// then helps with the parts of others.
//
// Note [Parts]: neighbours from a single counter would do, too, but two threads that read memory
// side by side hinder each other: on Zen 5 that takes 15 % longer than two that are far apart.
class Shares {
 public:
  Shares(std::int64_t count, int threads)
      : count_(count),
        parts_(std::min(threads, kMaxParts)),
        per_part_(parts_ == 1 ? count : (count + parts_ - 1) / parts_) {
    for (int i = 0; i < parts_; ++i) new (&taken_[i]) std::atomic<std::int64_t>(0);
  }

  // Calls work(i) for every item that no other thread has taken, from part `first` on.
  template <class Work>
  void take(int first, const Work& work) {
    for (int k = 0; k < parts_; ++k) {
      const int part = (first + k) % parts_;
      const std::int64_t begin = part * per_part_, end = std::min(begin + per_part_, count_);
      for (std::int64_t i;
           (i = begin + taken_[part].fetch_add(1, std::memory_order_relaxed)) < end;) {
        work(i);
      }
    }
  }

 private:
  static constexpr int kMaxParts = 64;
  std::int64_t count_;
  int parts_;
  std::int64_t per_part_;
  union {  // to make no more of them than there are parts
    std::atomic<std::int64_t> taken_[kMaxParts];
  };
};

// Threads worth waking for that many bytes of traffic.
int threads_for(std::int64_t bytes);

// For tests: what an exhaustive machine would offer instead of affinity and quota; 0 asks the
// machine.
void override_cpu_limit(int cpus);

}  // namespace adamax::cpu
