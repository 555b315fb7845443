// Group and Call as Python classes.
#pragma once

#include <pybind11/pybind11.h>

#include "adamax/adamax.hpp"
#include "bindings/label.hpp"

namespace adamax::bindings {

// The settings of a group whose variables are not known before the step.
struct StepGroup : Group {
  WeightRounding weight_rounding = WeightRounding::kNearest;
};

void register_settings(pybind11::module_& m);

// What the word stands for. Throws ValueError for another one.
WeightRounding read_rounding(const pybind11::object& word);
// What that means for a parameter of that dtype: one that is not rounded is left as it is. Throws
// TypeError if the dtype does not know it.
WeightRounding rounding_of(DType param, WeightRounding rounding, const Label& label);

}  // namespace adamax::bindings
