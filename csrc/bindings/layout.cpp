// Labels, layouts and the checks that compare two buffers.
#include <algorithm>

#include "bindings/buffer.hpp"

namespace adamax::bindings {

std::string Label::text() const {
  std::string text(role);
  if (index >= 0) text += "[" + std::to_string(index) + "]";
  if (variable != nullptr) text += " (variable '" + *variable + "')";
  return text;
}

Layout& Layout::operator=(const Layout& other) {
  axes = other.axes;
  std::copy_n(other.shape, axes, shape);
  std::copy_n(other.strides, axes, strides);
  return *this;
}

bool Layout::operator==(const Layout& other) const {
  const auto next = [](const Layout& layout, int axis) {
    while (axis < layout.axes && layout.shape[axis] == 1) ++axis;
    return axis;
  };
  for (int i = next(*this, 0), j = next(other, 0);;
       i = next(*this, i + 1), j = next(other, j + 1)) {
    if (i >= axes || j >= other.axes) return i >= axes && j >= other.axes;
    if (shape[i] != other.shape[j] || strides[i] != other.strides[j]) return false;
  }
}

bool Layout::is_dense() const {
  if (std::find(shape, shape + axes, 0) != shape + axes) return true;
  int order[kMaxAxes];  // of the axes that matter, fastest first
  int* end = order;
  for (int i = 0; i < axes; ++i) {
    if (shape[i] != 1) *end++ = i;
  }
  std::sort(order, end, [this](int a, int b) { return strides[a] < strides[b]; });
  std::int64_t expected = 1;
  for (const int* axis = order; axis != end; ++axis) {
    if (strides[*axis] != expected) return false;
    expected *= shape[*axis];
  }
  return true;
}

std::string Layout::text() const {
  const auto list = [this](const std::int64_t* values) {
    std::string text = "(";
    for (int i = 0; i < axes; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
    return text + (axes == 1 ? ",)" : ")");
  };
  return "shape " + list(shape) + " with strides " + list(strides);
}

void require_same_device(const Buffer& buffer, const Label& label, const Buffer& expected,
                         const Label& expected_label) {
  if (buffer.device == expected.device) return;
  const auto place = [](int device) {
    return device == kHost ? std::string("in host memory")
                           : "on CUDA device " + std::to_string(device);
  };
  throw py::value_error(label.text() + " is " + place(buffer.device) + "; expected memory " +
                        place(expected.device) + ", where " + expected_label.text() + " is");
}

void require_same_layout(const Buffer& buffer, const Label& label, const Buffer& expected,
                         const Label& expected_label) {
  require_same_device(buffer, label, expected, expected_label);
  if (buffer.size != expected.size) {
    throw py::value_error(label.text() + " has " + std::to_string(buffer.size) +
                          " elements; expected the " + std::to_string(expected.size) + " of " +
                          expected_label.text());
  }
  if (!(buffer.layout == expected.layout)) {
    throw py::value_error(label.text() + " has " + buffer.layout.text() +
                          " (in elements); expected the layout of " + expected_label.text() + ", " +
                          expected.layout.text());
  }
}

void require_dense(const Buffer& buffer, const Label& label) {
  if (!buffer.layout.is_dense()) {
    throw py::value_error(label.text() + " has " + buffer.layout.text() +
                          " (in elements); expected dense memory without gaps, such as a "
                          "contiguous copy");
  }
}

void require_pair(DType param, DType grad, const Label& param_label, const Label& grad_label) {
  if (is_supported({param, grad})) return;
  std::string accepted;
  for (const DTypePair& pair : kPairs) {
    if (pair.param != param) continue;
    accepted += (accepted.empty() ? "" : " or ") + std::string(dtype_name(pair.grad));
  }
  throw py::type_error(grad_label.text() + " has dtype " + std::string(dtype_name(grad)) + " but " +
                       param_label.text() + " has dtype " + std::string(dtype_name(param)) +
                       ", which takes gradients of dtype " + accepted);
}

void require_state_dtype(const Buffer& buffer, const Label& label, DType param) {
  const DType expected = compute_dtype(param);
  if (buffer.dtype == expected) return;
  throw py::type_error(label.text() + " has dtype " + std::string(dtype_name(buffer.dtype)) +
                       "; expected " + std::string(dtype_name(expected)) + " for a " +
                       std::string(dtype_name(param)) + " parameter");
}

}  // namespace adamax::bindings
