// Calls without an optimizer: a step on the caller's buffers, norms, copies, descriptions.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "adamax/adamax.hpp"

namespace adamax::bindings {

namespace py = pybind11;

// Those of one variable; from the average on, None for what there is not.
struct UpdateBuffers {
  py::object param, grad, m, u, average, norm_scale, remainder;
};
// What its random numbers follow from, beside the seed and the step of its group.
struct VariablePlace {
  std::uint32_t number;
  std::int64_t first_element;
};

// One step on buffers that the caller owns.
void update(const UpdateBuffers& buffers, const Group& group, double grad_scale,
            WeightRounding rounding, const VariablePlace& place);

double norm_of_buffers(const py::tuple& buffers);

// Copies all elements between host and device memory, or within one of them. bfloat16 may be called
// uint16 on either side.
void copy(const py::object& to, const py::object& from);

// Shape and strides (in elements) as they are, dtype, dtype of the state, address, bytes, and the
// device (-1 for the host).
py::tuple describe(const py::object& object, const std::string& role, py::ssize_t index);

}  // namespace adamax::bindings
