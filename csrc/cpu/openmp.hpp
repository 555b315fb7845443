// The OpenMP runtime that another library brought into the process, used without being linked.
#pragma once

namespace adamax::cpu {

struct OpenMP {
  // Calls function(data) on up to `threads` threads: how compiled code enters a parallel region, in
  // GNU's runtime and in LLVM's.
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
  int (*max_threads)();
};

// Null as long as none is loaded. One that is found is used for ever.
const OpenMP* loaded_openmp();

}  // namespace adamax::cpu
