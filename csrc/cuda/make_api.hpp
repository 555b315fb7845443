// The Api of a kind of device: makes one on a queue, and gives it the work.
#pragma once

#include "cuda/api.hpp"
#include "cuda/step.hpp"

namespace adamax::cuda {

// `Device` is constructed from a queue and a workspace, or null where nothing is reduced.
template <class Device>
Api make_api() {
  return {
      .require_usable = Device::require_usable,
      .device_of = Device::device_of,
      .make_workspace = Device::make_workspace,
      .step =
          [](const Queue& queue, Workspace& workspace, std::span<const Variable> variables,
             const Hyperparameters& h, const Call& call) {
            Device device(queue, &workspace);
            const bool applied = step(device, variables, h, call);
            device.finish();
            return applied;
          },
      .overwrite_with_averages =
          [](const Queue& queue, std::span<const Variable> variables) {
            Device device(queue, nullptr);
            overwrite_with_averages(device, variables);
            device.finish();
          },
      .global_norm =
          [](const Queue& queue, Workspace& workspace, std::span<const ConstBuffer> buffers) {
            Device device(queue, &workspace);
            const double norm = global_norm(device, buffers);
            device.finish();
            return norm;
          },
      .copy =
          [](const Queue& queue, void* to, const void* from, std::size_t bytes) {
            Device device(queue, nullptr);
            device.copy(to, from, bytes);
            device.finish();
          },
      .synchronize = [](const Queue& queue) { Device(queue, nullptr).synchronize(); },
  };
}

}  // namespace adamax::cuda
