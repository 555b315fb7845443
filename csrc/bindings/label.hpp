// How an error message names an argument; the text is made only when there is an error.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <string_view>

namespace adamax::bindings {

namespace py = pybind11;

struct Label {
  std::string_view role;                  // "grads", "param", ...
  py::ssize_t index = -1;                 // position in a list, or -1
  const std::string* variable = nullptr;  // name of the variable that it belongs to

  std::string text() const {
    std::string text(role);
    if (index >= 0) text += "[" + std::to_string(index) + "]";
    if (variable != nullptr) text += " (variable '" + *variable + "')";
    return text;
  }
};

}  // namespace adamax::bindings
