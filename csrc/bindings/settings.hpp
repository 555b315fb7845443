// Group and Call as Python classes.
#pragma once

#include <pybind11/pybind11.h>

#include "adamax/adamax.hpp"
#include "bindings/label.hpp"

namespace adamax::bindings {

void register_settings(pybind11::module_& m);

// What the word means for a parameter of that dtype: one that is not rounded is left as it is.
// Throws ValueError for another word, TypeError if the dtype does not know it.
WeightRounding weight_rounding(const pybind11::object& word, DType param, const Label& label);

}  // namespace adamax::bindings
