// Which stretches of memory a step writes, and whether another one touches them.
#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <vector>

#include "bindings/buffer.hpp"

namespace adamax::bindings {

class WrittenMemory {
 public:
  struct Range {
    const char* begin;
    const char* end;
    Label label;
  };

  void add(const void* data, std::size_t bytes, const Label& label) {
    const char* const begin = static_cast<const char*>(data);
    if (bytes > 0) ranges_.push_back({begin, begin + bytes, label});
  }

  // Sorts the ranges; throws ValueError if two overlap.
  void seal() {
    std::sort(ranges_.begin(), ranges_.end(),
              [](const Range& a, const Range& b) { return a.begin < b.begin; });
    for (std::size_t i = 1; i < ranges_.size(); ++i) {
      if (ranges_[i].begin < ranges_[i - 1].end) {
        throw py::value_error(ranges_[i].label.text() + " overlaps " + ranges_[i - 1].label.text() +
                              " in memory; expected separate memory for everything written");
      }
    }
  }

  // A gradient may be the memory of its own parameter, which is read before it is written, and
  // nothing else that is written. Throws ValueError otherwise. `place` is where the gradient was
  // found between the ranges the last time, and is mostly where it is.
  void require_readable(std::span<const char> grad, const Label& label, std::span<const char> param,
                        std::size_t& place) const {
    if (grad.empty()) return;
    const char* const begin = grad.data();
    const char* const end = begin + grad.size();
    if (place > 0 && place < ranges_.size() && ranges_[place - 1].end <= begin &&
        end <= ranges_[place].begin) {
      return;
    }
    const auto range = std::partition_point(ranges_.begin(), ranges_.end(),
                                            [&](const Range& r) { return r.end <= begin; });
    place = range - ranges_.begin();
    if (range == ranges_.end() || range->begin >= end) return;
    if (range->begin == param.data() && begin == param.data() && grad.size() == param.size()) {
      return;
    }
    throw py::value_error(label.text() + " overlaps " + range->label.text() +
                          " in memory, which the step writes; expected separate memory");
  }

 private:
  std::vector<Range> ranges_;
};

}  // namespace adamax::bindings
