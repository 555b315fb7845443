// Memory on a GPU: the module _cuda, loaded on first use, and the streams of a call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bindings/buffer.hpp"
#include "cuda/api.hpp"

namespace adamax::bindings {

// Loads _cuda. Throws RuntimeError if this build has none.
const cuda::Api& cuda_api();

// Says where a buffer lies. Throws RuntimeError, with the versions that are there, if no kernel
// runs on the device.
void place_on_device(Buffer& buffer, const Label& label, int device, std::uintptr_t stream);

// Imports memory by a __cuda_array_interface__.
void import_cuda_array(const py::dict& interface, const Label& label, Access access,
                       Buffer& buffer);

// Streams on which the buffers of a call are in use. Work is queued on the one of the first buffer.
class Streams {
 public:
  void add(const Buffer& buffer) {
    if (buffer.device != kHost &&
        std::find(all_.begin(), all_.end(), buffer.stream) == all_.end()) {
      all_.push_back(buffer.stream);
    }
  }
  cuda::Queue queue(int device) const { return {device, all_.at(0), std::span(all_).subspan(1)}; }

 private:
  std::vector<std::uintptr_t> all_;
};

}  // namespace adamax::bindings
