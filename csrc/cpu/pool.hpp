// Threads of our own, for a process in which no OpenMP runtime is loaded.
#pragma once

namespace adamax::cpu {

// Calls function(data) on up to `threads` threads at once, the caller's among them, and returns
// when all calls have. It has the signature of GOMP_parallel, an entry of OpenMP runtimes.
void run_on_pool(void (*function)(void*), void* data, unsigned threads, unsigned flags);

}  // namespace adamax::cpu
