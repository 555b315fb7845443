// Where a call runs: the backend of a device, its scratch memory, and the streams of a call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "bindings/buffer.hpp"
#include "core/backend.hpp"

namespace adamax::bindings {

// The host's, or that of CUDA, whose module is loaded at first use. Throws RuntimeError if this
// build has none.
const Backend& backend_of(int device);

// Says where a buffer lies. Throws RuntimeError, with the versions that are there, if no kernel
// runs on the device.
void place_on_device(Buffer& buffer, const Label& label, int device, std::uintptr_t stream);
// The device on which an address lies; throws RuntimeError if it is on none.
int cuda_device_of(const void* memory, const Label& label);

// Streams on which the buffers of a call are in use. Work is queued on the one of the first buffer.
class Streams {
 public:
  void add(const Buffer& buffer) {
    if (buffer.device != kHost &&
        std::find(all_.begin(), all_.end(), buffer.stream) == all_.end()) {
      all_.push_back(buffer.stream);
    }
  }
  Queue queue(int device) const {
    if (device == kHost) return {};
    return {device, all_.at(0), std::span(all_).subspan(1)};
  }

 private:
  std::vector<std::uintptr_t> all_;
};

// Runs programs on one device, with scratch memory that is kept from run to run.
class Runner {
 public:
  explicit Runner(int device) : device_(device) {}
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;
  ~Runner() { backend_of(device_).deallocate(device_, scratch_); }

  // Without the GIL. What `leases` hold must be all that the program uses.
  Outcome run(const Program& program, const Streams& streams, const Leases& leases);

  int device() const { return device_; }

 private:
  int device_;
  void* scratch_ = nullptr;
  std::size_t capacity_ = 0;   // bytes
  std::uintptr_t stream_ = 0;  // of the last run
};

}  // namespace adamax::bindings
