// Group and Call as Python classes.
#pragma once

#include <pybind11/pybind11.h>

namespace adamax::bindings {

void register_settings(pybind11::module_& m);

}  // namespace adamax::bindings
