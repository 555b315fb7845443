// Shape and strides of an array, in elements.
#pragma once

#include <cstdint>
#include <string>

namespace adamax::bindings {

// Two layouts are equal if they are apart from axes of length 1.
struct Layout {
  static constexpr int kMaxAxes = 64;
  int axes = 0;
  std::int64_t shape[kMaxAxes];
  std::int64_t strides[kMaxAxes];

  Layout() {}  // leaves the arrays as they are: a layout is made for every gradient of every step
  Layout(const Layout& other) { *this = other; }
  Layout& operator=(const Layout& other);
  bool operator==(const Layout& other) const;
  bool is_dense() const;
  std::string text() const;
};

}  // namespace adamax::bindings
