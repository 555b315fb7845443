// Calls without an optimizer: a step on the caller's buffers, norms, copies, descriptions.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "adamax/adamax.hpp"

namespace adamax::bindings {

namespace py = pybind11;

// One step on buffers that the caller owns; `average` may be None.
void update(const py::object& param, const py::object& grad, const py::object& m,
            const py::object& u, const py::object& average, const Group& group, double grad_scale);

double norm_of_buffers(const py::tuple& buffers);

// Copies all elements between host and device memory, or within one of them.
void copy(const py::object& to, const py::object& from);

// Shape and strides (in elements) as they are, dtype, dtype of the state, address, bytes, and the
// device (-1 for the host).
py::tuple describe(const py::object& object, const std::string& role, py::ssize_t index);

}  // namespace adamax::bindings
