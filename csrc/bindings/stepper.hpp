// Steps on variables whose state somebody else keeps, with a step count each: those of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "adamax/adamax.hpp"
#include "bindings/backend.hpp"
#include "bindings/buffer.hpp"
#include "bindings/overlap.hpp"

namespace adamax::bindings {

// The settings of the groups of a call. Its numbers in device memory are those of torch: arrays of
// one element, or None.
struct StepSettings {
  std::vector<std::size_t> sizes;  // variables of each group
  std::vector<Group> groups;       // their `step` is not used
  py::tuple learning_rates;        // in device memory, an entry for each group
  py::tuple loss_scales;           // pairs of grad_scale and found_inf, of each device
};

// Between calls it remembers only what makes the next one cheap. One call at a time.
class Stepper {
 public:
  ~Stepper();

  // One step of all variables together; of one after the other, in order, if they share memory.
  // `arrays` has five entries for each variable: parameter, gradient, first moment, infinity norm,
  // and an array of one float32 or float64, the number of completed steps, which is raised. That
  // lies on the host, or where the variable does, and is then read when the device runs.
  //
  // Returns the variables whose memory no kernel takes as it is, with nothing changed; throws what
  // is wrong with the first one instead if `is_strict`.
  std::vector<std::size_t> step(const py::tuple& arrays, StepSettings settings, bool is_strict);

 private:
  struct Entry {
    Variable variable;
    int device = kHost;
    int count_device = kHost;
    DType count_dtype = DType::kFloat32;
    void* count = nullptr;       // of completed steps
    double step = 1.0;           // number of this one, in the type of the count, if on the host
    std::size_t grad_place = 0;  // among written_, as last seen

    double completed() const;
    double raised(double completed) const;
    void write_count() const;
    std::span<const char> param() const;
    std::span<const char> grad() const;
    void add_to(WrittenMemory& written, std::size_t i) const;
  };
  struct Part;

  void import(std::size_t i, const py::tuple& arrays, Leases& leases);
  void import_numbers(StepSettings& settings, Leases& leases);
  bool share_memory();
  void number(bool one_by_one);
  std::vector<Part> parts(const StepSettings& settings, bool one_by_one);

  std::vector<Entry> entries_;
  WrittenMemory written_;
  bool written_is_current_ = false;
  std::map<int, Streams> streams_;              // of this call, by device
  std::map<int, DeviceLossScale> loss_scales_;  // likewise
  std::map<int, Runner> runners_;
  std::atomic_flag is_busy_;
};

}  // namespace adamax::bindings
