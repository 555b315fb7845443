// The physical limit of a pass over memory: the same loads and stores, and nothing else.
//
// C linkage, because bench/peers.py loads this through ctypes.
#pragma once

#include <cstdint>

extern "C" {

struct bound_stream {
  void* data;
  std::int32_t bytes_per_element;
  std::int32_t written;  // 0: read only; 1: read and written back
};

// Ways to run a pass, of which the fastest is the bound: without prefetch, close, further and far;
// memory cut in chunks for the next thread that is free, or in one part a thread.
int bound_variants();

// Reads every stream once and writes the `written` ones back with what they held. `elements` is a
// multiple of 64. Returns 0 if streams of these sizes are not compiled in, else 1.
int bound_pass(const bound_stream* streams, int count, std::int64_t elements, int threads,
               int variant);
}
