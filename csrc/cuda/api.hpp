// What the bindings ask of a GPU: the edge between the modules _core and _cuda, plain C++.
//
// Both modules come from one build. _cuda is loaded when the first device buffer is seen, and hands
// out an Api. Everything that fails throws std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "adamax/adamax.hpp"

namespace adamax::cuda {

// Streams are numbers, as CUDA's driver and __cuda_array_interface__ have them.
constexpr std::uintptr_t kLegacyDefaultStream = 1;

// Where work is queued. `others` are streams on which some of the memory is in use: the work waits
// for what is queued there now, and what is queued there later waits for the work.
struct Queue {
  int device;
  std::uintptr_t stream;
  std::span<const std::uintptr_t> others;
};

// Device memory for the reductions of one optimizer, kept from step to step.
class Workspace {
 public:
  virtual ~Workspace() = default;
};

struct Api {
  // Throws, with the versions and numbers that are there, unless kernels run on `device`.
  void (*require_usable)(int device);
  // The device on which memory lies.
  int (*device_of)(const void* memory);
  Workspace* (*make_workspace)(int device);
  // As adamax::step, queued. Waits for the device only if `call.require_finite` asks for an answer.
  bool (*step)(const Queue&, Workspace&, std::span<const Variable>, const Hyperparameters&,
               const Call&);
  // As adamax::overwrite_with_averages, queued.
  void (*overwrite_with_averages)(const Queue&, std::span<const Variable>);
  // As adamax::global_norm; waits for the answer.
  double (*global_norm)(const Queue&, Workspace&, std::span<const ConstBuffer>);
  // Copies between host and device memory, in stream order; waits for the end.
  void (*copy)(const Queue&, void* to, const void* from, std::size_t bytes);
  // Waits for what is queued.
  void (*synchronize)(const Queue&);
};

}  // namespace adamax::cuda
