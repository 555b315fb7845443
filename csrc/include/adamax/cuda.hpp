// The public C++ API for memory of a CUDA device: the step of adamax.hpp, queued on a stream.
//
// Every pointer of a variable is to memory that the device can read and write; the bits are those
// of the host.
//
// Numbers that change from step to step may lie in the memory of the device too, where the kernels
// read them (device_scalars.hpp): `Group::device` has the number of completed steps and the
// learning rate, `Call::device` the loss scale and a flag that vetoes the step. An update adds 1 to
// the steps. Each is at a multiple of its size, and the bits are those of the host for the same
// numbers; but nothing checks them. A step number below 1 makes the weights NaN, as an unfit rate
// or scale may.
//
// A stream that is being captured into a CUDA graph is refused, because a captured step would
// repeat its step number, unless all groups take that from device memory. What the host says
// otherwise is repeated by each replay: a learning rate, grad_scale, overwrite. Random numbers
// follow from the step number, so that each replay draws others. Do a step before the capture: it
// loads the kernels.
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
// settings of a group do not change them, but which of its numbers lie in device memory does. Asks
// no device. Throws as step() does.
std::size_t scratch_bytes(std::span<const Variable> variables, std::span<const Group> groups,
                          const Call& call = {});

// Queues one training step in place, and returns at once: only with `require_finite` it waits, for
// the gradients to be looked at, and returns false, with nothing changed, if one is not finite.
// With numbers in device memory that is refused; of a veto there the host learns nothing, and true
// is returned.
//
// The variables' memory and `scratch` stay the caller's, and stay alive until the stream has
// finished. Scratch memory is on the device, starts at a multiple of 16 bytes, may hold anything,
// and must not serve two streams at once; it may be null where scratch_bytes() is 0. A graph keeps
// using what it was captured with. Nothing is allocated on the device.
//
// Throws std::invalid_argument as adamax::step, before anything is written, and std::runtime_error
// if kernels of this build do not run on the device or CUDA fails; the calling thread's current
// device is the same afterwards.
bool step(const Stream& stream, void* scratch, std::span<const Variable> variables,
          std::span<const Group> groups, const Call& call = {});

}  // namespace adamax::cuda
