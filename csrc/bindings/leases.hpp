// Memory that the buffer protocol and DLPack lent.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

namespace adamax::bindings {

// Gives everything back when it is destroyed, with the GIL held.
class Leases {
 public:
  Leases() = default;
  Leases(const Leases&) = delete;
  Leases& operator=(const Leases&) = delete;
  ~Leases() {
    for (const auto& view : views_) PyBuffer_Release(view.get());
    for (const Managed& managed : managed_) managed.release(managed.tensor);
  }

  void keep(std::unique_ptr<Py_buffer> view) { views_.push_back(std::move(view)); }
  // A tensor of either version of DLPack.
  template <class Tensor>
  void keep(Tensor* tensor) {
    managed_.push_back({tensor, [](void* lent) {
                          auto* const tensor = static_cast<Tensor*>(lent);
                          if (tensor->deleter != nullptr) tensor->deleter(tensor);
                        }});
  }

  // Whether a device must have finished before the end of a lease: its owner may then reuse the
  // memory, and knows nothing of the stream.
  bool needs_synchronization = false;

 private:
  struct Managed {
    void* tensor;
    void (*release)(void*);
  };
  std::vector<std::unique_ptr<Py_buffer>> views_;
  std::vector<Managed> managed_;
};

}  // namespace adamax::bindings
