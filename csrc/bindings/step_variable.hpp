// A variable whose arrays somebody else keeps, imported at each step.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <span>

#include "adamax/adamax.hpp"
#include "bindings/backend.hpp"
#include "bindings/buffer.hpp"
#include "bindings/overlap.hpp"

namespace adamax::bindings {

// What there is of a variable, in this order: parameter, gradient, first moment, infinity norm, one
// float32 or float64, the number of completed steps; and last a tuple of what few have, or None:
// the scales of a norm in fewer bits, or None; what a weight does not hold, or None; for random
// numbers its own among all variables, and the first element of a part.
enum Role {
  kParam,
  kGrad,
  kMomentum,
  kNorm,
  kSteps,
  kExtras,
  kNormScale = kExtras,
  kRemainder,
  kNumber,
  kFirstElement,
  kNumRoles,
};
constexpr int kWidth = kExtras + 1;  // entries of a variable among the arrays of all

// As messages name them, in the words of torch.
Label label(Role role, std::size_t i);
py::handle item(const py::tuple& arrays, std::size_t i, Role role);

struct StepVariable {
  Variable variable;  // its group is that of the settings of the call
  int device = kHost;
  int count_device = kHost;
  DType count_dtype = DType::kFloat32;
  void* count = nullptr;       // of completed steps
  double step = 1.0;           // number of this one, in the type of the count, if on the host
  std::size_t grad_place = 0;  // among what is written, as last seen

  // From the arrays of all variables. Returns whether what a step writes lies where it lay before.
  bool import(const py::tuple& arrays, std::size_t i, WeightRounding rounding, Leases& leases,
              std::map<int, Streams>& streams);

  void add_to(WrittenMemory& written, std::size_t i) const;
  void require_readable(const WrittenMemory& written, std::size_t i);

  // Of a count on the host.
  double completed_steps() const;
  double incremented(double completed) const;
  void write_count() const;

  std::span<const char> param() const;
  std::span<const char> grad() const;
};

// The type of one number in memory; throws ValueError for another array.
ScalarType scalar_type(const Buffer& number, const Label& label);

}  // namespace adamax::bindings
