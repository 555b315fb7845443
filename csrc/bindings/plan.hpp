// The variables of one optimizer, checked once; a step reads only their pointers again.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "adamax/adamax.hpp"
#include "bindings/buffer.hpp"
#include "bindings/gpu.hpp"
#include "bindings/overlap.hpp"

namespace adamax::bindings {

class Plan {
 public:
  // `averages` and `accumulators` may be None. Everything else has one entry a variable.
  Plan(const py::sequence& params, std::vector<std::string> names, const py::sequence& momentum,
       const py::sequence& norm, const py::object& averages, const py::object& accumulators,
       const std::vector<bool>& decays);

  // One call of the kernels. `grads` pairs with `variables`, or with all variables in order if that
  // is None; a gradient that is None skips its variable, with a warning. Returns false, with
  // nothing changed, if `require_finite` was asked for and a gradient is not finite.
  bool step(const py::sequence& grads, const py::object& variables,
            const Hyperparameters& hyperparameters, const Call& call);

  std::int64_t calls = 0;  // completed calls of step()

  // Writes the averages over these variables, or over all if None.
  void overwrite(const py::object& variables);

 private:
  struct Entry {
    py::object param;
    std::string name;
    Buffer buffer;  // of the parameter, as last seen
    Variable variable;
    std::size_t gradient_place = 0;  // among written_, as last seen
  };

  Label label(std::string_view role, std::size_t i) const {
    return {role, static_cast<py::ssize_t>(i), &entries_[i].name};
  }
  void refresh_parameters(Leases& leases, Streams& streams);
  void find_written_memory();
  std::size_t index_of(py::handle variable, std::size_t position, Leases& leases);
  std::vector<py::object> gradients_by_variable(const py::sequence& grads,
                                                const py::object& variables, Leases& leases);
  void import_gradient(std::size_t i, py::handle grad, Leases& leases, Streams& streams);

  std::vector<Entry> entries_;
  std::unordered_map<PyObject*, std::size_t> index_by_identity_;
  WrittenMemory written_;
  bool written_is_current_ = false;
  std::vector<Variable> variables_;             // of the present call
  int device_ = kHost;                          // of all variables
  std::unique_ptr<cuda::Workspace> workspace_;  // on that device
};

}  // namespace adamax::bindings
