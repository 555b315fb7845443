// The variables of one optimizer, checked once; a step reads only their pointers again.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <atomic>
#include <map>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "adamax/adamax.hpp"
#include "bindings/backend.hpp"
#include "bindings/buffer.hpp"
#include "bindings/kept.hpp"
#include "bindings/overlap.hpp"

namespace adamax::bindings {

// For each kind a list with an entry a variable, or None.
using KeptLists = std::array<py::object, kNumKept>;

// One call at a time: a second one, also from within the first, raises RuntimeError.
class Plan {
 public:
  // `groups` has the index of each variable's group. The number of a variable is its position.
  Plan(const py::tuple& params, std::vector<std::string> names,
       const std::vector<std::uint32_t>& groups, const KeptLists& lists, WeightRounding rounding);

  ~Plan();

  // One call of the kernels. `grads` pairs with `variables`, or with all variables in order if that
  // is None; a gradient that is None skips its variable, with a warning. Returns false, with
  // nothing changed, if `require_finite` was asked for and a gradient is not finite.
  bool step(const py::tuple& grads, const std::optional<py::tuple>& variables,
            const std::vector<Group>& groups, Call call);
  // Writes the averages over these variables, or over all if None.
  void finalize(const std::optional<py::tuple>& variables);

  std::atomic<std::int64_t> calls = 0;  // completed calls of step()
  std::vector<bool> accumulated();
  void set_accumulated(const std::vector<bool>& accumulated);

  // For the garbage collector: what Python objects this holds, and to let go of them.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct KeptArray {
    py::object object = py::none();
    std::span<const char> memory;  // as last seen
  };
  struct Entry {
    py::object param;
    std::array<KeptArray, kNumKept> kept;  // in `variable`
    std::string name;
    Buffer buffer;                   // of the parameter, as last seen
    Variable variable;               // without a gradient
    std::size_t gradient_place = 0;  // among written_, as last seen
  };

  Label label(std::string_view role, std::size_t i) const {
    return {role, static_cast<py::ssize_t>(i), &entries_[i].name};
  }
  // Reads again where parameters lie, and state on a device: the tensors of its library.
  void refresh(Leases& leases, Streams& streams);
  void refresh_kept(std::size_t i, Leases& leases);
  void find_written_memory();
  Program largest_program() const;
  // The variable that is this object; `position` is where it mostly is.
  std::optional<std::size_t> find_object(py::handle variable, std::size_t position) const;
  // The variable whose memory another object stands for, such as a view. `taken` has an entry a
  // variable that is not null for those that were found before, or none.
  std::size_t find_memory(py::handle variable, std::size_t position,
                          std::span<const py::handle> taken, Leases& leases) const;
  std::vector<py::handle> gradients_by_variable(const py::tuple& grads,
                                                const std::optional<py::tuple>& variables,
                                                Leases& leases);
  void import_gradient(std::size_t i, py::handle grad, Leases& leases, Streams& streams);
  // Notes which parameters a program wrote, and which accumulators hold gradients now.
  void note_done(const Program& program);

  std::vector<Entry> entries_;
  std::unordered_map<PyObject*, std::size_t> index_by_identity_;
  std::multimap<std::pair<const char*, std::size_t>, std::size_t>
      index_by_memory_;  // address, bytes
  WrittenMemory written_;
  bool written_is_current_ = false;
  bool has_versions_ = false;        // of any parameter; see has_version()
  std::vector<Variable> variables_;  // of the present call
  std::optional<Runner> runner_;     // on the device of all variables
  std::atomic_flag is_busy_;
};

}  // namespace adamax::bindings
