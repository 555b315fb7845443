// Collects what a step needs from the parameters of torch, many times faster than Python does.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace adamax::bindings {

namespace py = pybind11;

struct Collected {
  py::list arrays;                        // the entries of Stepper::step
  std::vector<std::size_t> sizes;         // variables of each group
  std::vector<std::size_t> to_inspect;    // variables without a state, for which None stands, or
                                          // of a type that may hide its memory
  std::vector<std::size_t> with_options;  // groups
};

// `groups` are those of an optimizer: "params" is a list of parameters, of which those are taken
// whose attribute `grad` is not None; and they may have `options`. `states` has for each that was
// stepped before a dict, of which `keys` are the arrays of state; for `optional_keys` that are not
// there None stands. The number of a variable of a group with options is its position among all
// parameters, also those not taken. Parameters of `plain_types` show their memory.
Collected collect(const py::tuple& groups, const py::dict& states, const py::tuple& keys,
                  const py::tuple& optional_keys, const py::tuple& options,
                  const py::tuple& plain_types);

}  // namespace adamax::bindings
