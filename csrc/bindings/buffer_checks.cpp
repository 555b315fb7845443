// The checks that compare two buffers.
#include "bindings/buffer.hpp"

namespace adamax::bindings {

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

void require_pair(const Buffer& param, const Label& param_label, const Buffer& grad,
                  const Label& grad_label) {
  std::string accepted;
  for (const DTypePair& pair : kPairs) {
    if (pair.param != param.dtype) continue;
    if (pair.grad == grad.dtype) return;
    accepted += (accepted.empty() ? "" : " or ") + std::string(dtype_name(pair.grad));
  }
  throw py::type_error(grad_label.text() + " has dtype " + std::string(dtype_name(grad.dtype)) +
                       " but " + param_label.text() + " has dtype " +
                       std::string(dtype_name(param.dtype)) + ", which takes gradients of dtype " +
                       accepted);
}

void require_state_dtype(const Buffer& buffer, const Label& label, const Buffer& param) {
  const DType expected = compute_dtype(param.dtype);
  if (buffer.dtype == expected) return;
  throw py::type_error(label.text() + " has dtype " + std::string(dtype_name(buffer.dtype)) +
                       "; expected " + std::string(dtype_name(expected)) + " for a " +
                       std::string(dtype_name(param.dtype)) + " parameter");
}

}  // namespace adamax::bindings
