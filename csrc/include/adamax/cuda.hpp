// The public C++ API for memory of a CUDA device: the step of adamax.hpp, queued on a stream.
//
// Every pointer of a variable is to memory that the device can read and write; the bits are those
// of the host. Streams of CUDA graphs that are being captured are refused: a captured step would
// repeat its step number and learning rate.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "adamax/adamax.hpp"

namespace adamax::cuda {

constexpr std::uintptr_t kLegacyDefaultStream = 1;

// A stream as a number: reinterpret_cast<std::uintptr_t> of a cudaStream_t or CUstream. It belongs
// to the device.
struct Stream {
  int device = 0;
  std::uintptr_t handle = kLegacyDefaultStream;
};

// Bytes of scratch memory that step() needs for the same arguments; the learning rate and the other
// settings of a group do not change them. Asks no device. Throws as step() does.
std::size_t scratch_bytes(std::span<const Variable> variables, std::span<const Group> groups,
                          const Call& call = {});

// Queues one training step in place, and returns at once: only with `require_finite` it waits, for
// the gradients to be looked at, and returns false, with nothing changed, if one is not finite.
//
// The variables' memory and `scratch` stay the caller's, and stay alive until the stream has
// finished. Scratch memory is on the device, starts at a multiple of 16 bytes, may hold anything,
// and must not serve two streams at once; it may be null where scratch_bytes() is 0. Nothing is
// allocated on the device.
//
// Throws std::invalid_argument as adamax::step, before anything is written, and std::runtime_error
// if kernels of this build do not run on the device or CUDA fails; the calling thread's current
// device is the same afterwards.
bool step(const Stream& stream, void* scratch, std::span<const Variable> variables,
          std::span<const Group> groups, const Call& call = {});

}  // namespace adamax::cuda
