// Shape and strides of an array, in elements.
#include "bindings/layout.hpp"

#include <algorithm>

namespace adamax::bindings {

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

}  // namespace adamax::bindings
