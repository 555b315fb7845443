// Collects what a step needs from the parameters of torch, many times faster than Python does.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace adamax::bindings {

namespace py = pybind11;

struct Collected {
  py::list arrays;                  // as Stepper::step takes them
  std::vector<std::size_t> sizes;   // variables of each group
  std::vector<std::size_t> others;  // of these variables, the state is None: it is not known yet,
                                    // or the parameter is of a type that may hide its memory
};

// From the parameters of each group with a gradient, which is their attribute `grad`. `states` has
// a dict with the keys of `keys`, the first moment, the norm and the count of steps, for those that
// were stepped before. Of `plain_types` are parameters that show their memory.
Collected collect(const py::list& groups, const py::dict& states, const py::tuple& keys,
                  const py::tuple& plain_types);

}  // namespace adamax::bindings
