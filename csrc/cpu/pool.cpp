// Threads of our own, for a process in which no OpenMP runtime is loaded.
#include "cpu/pool.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "cpu/wait.hpp"

namespace adamax::cpu {
namespace {

class Pool {
 public:
  // One job at a time; a second one waits, because it would have no more processors.
  void run(void (*function)(void*), void* data, unsigned threads) {
    const std::lock_guard lock(mutex_);
    const std::size_t helpers = started(threads - 1);
    function_ = function;
    data_ = data;
    running_.store(static_cast<std::uint32_t>(helpers), std::memory_order_relaxed);
    for (std::size_t i = 0; i < helpers; ++i) {
      jobs_[i].fetch_add(1, std::memory_order_release);
      jobs_[i].notify_one();
    }
    function(data);
    while (const std::uint32_t running = running_.load(std::memory_order_acquire)) {
      wait_while(running_, running);
    }
  }

 private:
  // How many threads there are of those that are wanted, after those that are missing were started
  // as far as the system lets them.
  std::size_t started(std::size_t wanted) {
    while (jobs_.size() < wanted) {
      std::atomic<std::uint32_t>& jobs = jobs_.emplace_back(0);
      try {
        std::thread([this, &jobs] { work(jobs); }).detach();
      } catch (const std::exception&) {
        jobs_.pop_back();
        break;
      }
    }
    return std::min(wanted, jobs_.size());
  }

  [[noreturn]] void work(const std::atomic<std::uint32_t>& jobs) {
    for (std::uint32_t done = 0;; ++done) {
      wait_while(jobs, done);
      function_(data_);
      if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
    }
  }

  std::mutex mutex_;
  void (*function_)(void*) = nullptr;
  void* data_ = nullptr;
  std::deque<std::atomic<std::uint32_t>> jobs_;  // how many each thread was given since its start
  std::atomic<std::uint32_t> running_{0};
};

}  // namespace

void run_on_pool(void (*function)(void*), void* data, unsigned threads, unsigned) {
  // Never destroyed: its threads live until the process ends.
  static Pool* const pool = new Pool();
  pool->run(function, data, threads);
}

}  // namespace adamax::cpu
