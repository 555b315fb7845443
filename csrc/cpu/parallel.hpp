// One function on several threads, and how many threads that are.
#pragma once

#include <cstdint>
#include <functional>

namespace adamax::cpu {

// Calls body() on up to `threads` threads at once, in IEEE mode on each, and returns when all calls
// have. What is to be done is for the calls to share out, however many they are. `body` must not
// throw.
void run_parallel(int threads, const std::function<void()>& body);

// Threads worth waking for that many bytes of traffic.
int threads_for(std::int64_t bytes);

// For tests: so many processors, whatever affinity and quota say; 0 asks these again.
void override_cpu_limit(int cpus);

}  // namespace adamax::cpu
