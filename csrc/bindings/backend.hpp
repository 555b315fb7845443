// Where a call runs: the backend of a device, its workspace, and the streams of a call.
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

// Says where a buffer lies, and on which stream it is in use. Throws RuntimeError, with the
// versions that are there, if no kernel runs on the device.
void place_on_device(Buffer& buffer, const Label& label, int device, std::uintptr_t stream);
// The device on which an address lies; throws RuntimeError if it is on none.
int cuda_device_of(const void* memory, const Label& label);

// Streams on which the buffers of a call are in use. Work is queued on the one of the first buffer.
class Streams {
 public:
  void add(const Buffer& buffer) {
    if (buffer.device == kHost) return;
    if (std::find(all_.begin(), all_.end(), buffer.stream) == all_.end()) {
      all_.push_back(buffer.stream);
    }
    after_all_ = after_all_ || buffer.has_unknown_streams;
  }
  Queue queue(int device) const {
    if (device == kHost) return {};
    return {device, all_.at(0), std::span(all_).subspan(1), after_all_};
  }

 private:
  std::vector<std::uintptr_t> all_;
  bool after_all_ = false;
};

// Runs programs on one device, with a workspace that is kept from run to run. All without the GIL.
//
// With `for_graphs` a run may be captured into a CUDA graph: the caller sees to it that runs and
// replays come one after another, and all memory that a graph can have is kept until the end.
class Runner {
 public:
  explicit Runner(int device, bool for_graphs = false) : device_(device), for_graphs_(for_graphs) {}
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;
  ~Runner();

  // Waits for all work on the device, and allocates what programs need that are like this one, or
  // part of it.
  void prepare(const Program& largest, const Streams& streams);
  // Allocates what the program needs, which can fail.
  void reserve(const Program& program, const Streams& streams);
  // What `leases` hold must be all that the program uses.
  Outcome run(const Program& program, const Streams& streams, const Leases& leases);

 private:
  void allocate(const Backend& backend, std::size_t bytes);

  int device_;
  bool for_graphs_;
  Workspace workspace_;
  std::vector<Workspace> outgrown_;  // by later programs
};

// Runs a program of no optimizer, with the workspace of earlier such calls of the thread.
Outcome run_once(int device, const Program& program, const Streams& streams, const Leases& leases);

}  // namespace adamax::bindings
