// What runs a program: the host, or a GPU. Plain functions, handed from one module to another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/program.hpp"

namespace adamax {

constexpr int kHost = -1;  // in place of the number of a CUDA device

// Where work is queued; the host does it at once. Streams are numbers, as CUDA's driver and
// __cuda_array_interface__ have them. `others` are streams on which some of the memory is in use:
// the work waits for what is queued there now, and what is queued there later waits for the work.
struct Queue {
  int device = kHost;
  std::uintptr_t stream = 0;
  std::span<const std::uintptr_t> others = {};
  bool after_all = false;  // first the host waits for all streams: nobody knows the right ones
};

// Memory for what programs keep while they run, one after another. On a device they may be queued
// on different streams: `last_use`, which is the backend's, lets each wait for the one before. It
// is null where the caller sees to that.
struct Workspace {
  void* memory = nullptr;
  std::size_t bytes = 0;
  void* last_use = nullptr;
};

// Everything that fails on a device throws std::runtime_error.
struct Backend {
  // Throws, with the versions and numbers that are there, unless kernels run on `device`.
  void (*require_usable)(int device);
  // The device on which memory lies.
  int (*device_of)(const void* memory);
  // A workspace belongs to the caller; scratch_bytes() says what a program needs, which is no more
  // than another one needs that has its rows and groups, and more. To deallocate waits for the work
  // that uses it.
  Workspace (*allocate)(int device, std::size_t bytes);
  void (*deallocate)(int device, const Workspace&);
  std::size_t (*scratch_bytes)(const Program&);
  // On a device it is queued, and waits only for an outcome that was asked for.
  Outcome (*run)(const Queue&, const Workspace&, const Program&);
  // Copies between host and device memory, in stream order; waits for the end.
  void (*copy)(const Queue&, void* to, const void* from, std::size_t bytes);
  // Waits for what is queued.
  void (*synchronize)(const Queue&);
};

}  // namespace adamax
