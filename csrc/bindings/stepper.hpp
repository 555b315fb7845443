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

// Between calls it remembers only what makes the next one cheap. One call at a time.
class Stepper {
 public:
  // One step of all variables together; of one after the other, in order, if they share memory.
  // `arrays` has five entries for each variable: parameter, gradient, first moment, infinity norm,
  // and an array of one float32 or float64, the number of completed steps, which is raised. `sizes`
  // has the number of variables of each group; the `step` of a group is not used.
  //
  // Returns the variables whose memory no kernel takes as it is, with nothing changed; throws what
  // is wrong with the first one instead if `is_strict`.
  std::vector<std::size_t> step(const py::tuple& arrays, const std::vector<std::size_t>& sizes,
                                const std::vector<Group>& groups, bool is_strict);

 private:
  struct Entry {
    Variable variable;
    int device = kHost;
    void* count = nullptr;  // of completed steps
    DType count_dtype = DType::kFloat32;
    std::size_t grad_place = 0;  // among written_, as last seen

    double step = 1.0;  // number of this one, in the type of the count

    double completed() const;
    double raised(double completed) const;
    void write_count() const;
    std::span<const char> param() const;
    std::span<const char> grad() const;
    void add_to(WrittenMemory& written, std::size_t i) const;
  };
  // Some variables of one device, in order.
  struct Work {
    int device;
    Program program;
  };

  void import(std::size_t i, const py::tuple& arrays, Leases& leases);
  bool share_memory();
  std::vector<Work> plan_work(const std::vector<std::size_t>& sizes,
                              const std::vector<Group>& groups, bool one_by_one);

  std::vector<Entry> entries_;
  WrittenMemory written_;
  bool written_is_current_ = false;
  std::map<int, Streams> streams_;  // of this call, by device
  std::map<int, Runner> runners_;
  std::atomic_flag is_busy_;
};

}  // namespace adamax::bindings
