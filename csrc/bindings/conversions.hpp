// State in fewer bits, and weights with remainders, to and from float32, on arrays in host memory.
#pragma once

#include <pybind11/pybind11.h>

namespace adamax::bindings {

void register_conversions(pybind11::module_& m);

}  // namespace adamax::bindings
