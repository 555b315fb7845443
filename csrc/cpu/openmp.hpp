// The OpenMP runtime that another library brought into the process, used without being linked.
#pragma once

namespace adamax::cpu {

// Calls function(data) on up to `threads` threads: how compiled code enters a parallel region, in
// GNU's runtime and in LLVM's.
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

struct OpenMP {
  Parallel parallel;
  int (*max_threads)();
};

// Both null where none is loaded, or none that can be used.
OpenMP loaded_openmp();

}  // namespace adamax::cpu
