// Steps on variables whose state somebody else keeps, with a step count each: those of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "adamax/adamax.hpp"
#include "bindings/backend.hpp"
#include "bindings/overlap.hpp"
#include "bindings/settings.hpp"
#include "bindings/step_variable.hpp"

namespace adamax::bindings {

// The settings of the groups of a call. Its numbers in device memory are those of torch: arrays of
// one element, or None.
struct StepSettings {
  std::vector<std::size_t> sizes;          // variables of each group
  std::vector<StepGroup> groups;           // their `step` is not used
  std::vector<py::object> learning_rates;  // in device memory; empty, or an entry for each group
  // grad_scale and found_inf, on each device.
  std::vector<std::pair<py::object, py::object>> loss_scales;
};

// Between calls it remembers only what makes the next one cheap. One call at a time.
class Stepper {
 public:
  ~Stepper();

  // One step of all variables together; of one after the other, in order, if they share memory.
  // `arrays` has kWidth entries for each variable, as Role says. The number of completed steps is
  // raised; it lies on the host, or where the variable does, and is then read when the device runs.
  //
  // Returns the variables whose memory no kernel takes as it is, with nothing changed; throws what
  // is wrong with the first one instead if `is_strict`.
  std::vector<std::size_t> step(const py::tuple& arrays, StepSettings settings, bool is_strict);

  std::int64_t calls = 0;  // of step(), that were done: an interrupt in Python can come behind one

 private:
  struct Part;

  std::map<int, DeviceLossScale> import_device_scalars(StepSettings& settings, Leases& leases,
                                                       std::map<int, Streams>& streams) const;
  bool share_memory(bool writes_gradients);
  void find_steps(bool one_by_one);
  std::vector<Part> parts(const StepSettings& settings, bool one_by_one);

  std::vector<StepVariable> variables_;
  WrittenMemory written_;
  bool written_is_current_ = false;
  std::map<int, Runner> runners_;
  std::atomic_flag is_busy_;
};

}  // namespace adamax::bindings
