// One call at a time on one object.
#pragma once

#include <atomic>
#include <stdexcept>

namespace adamax::bindings {

// Throws std::runtime_error if another one holds the flag.
class Busy {
 public:
  explicit Busy(std::atomic_flag& flag) : flag_(flag) {
    if (flag_.test_and_set()) {
      throw std::runtime_error(
          "an optimizer was called while another call of it is running; expected one call at a "
          "time");
    }
  }
  Busy(const Busy&) = delete;
  Busy& operator=(const Busy&) = delete;
  ~Busy() { flag_.clear(); }

 private:
  std::atomic_flag& flag_;
};

}  // namespace adamax::bindings
