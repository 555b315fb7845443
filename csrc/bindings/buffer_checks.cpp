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

namespace {

[[noreturn]] void throw_state_dtype(const Buffer& buffer, const Label& label,
                                    const std::string& expected, const Buffer& param,
                                    const char* more = "") {
  throw py::type_error(label.text() + " has dtype " + std::string(dtype_name(buffer.dtype)) +
                       "; expected " + expected + " for a " + std::string(dtype_name(param.dtype)) +
                       " parameter" + more);
}

}  // namespace

void require_computed(const Buffer& buffer, const Label& label, const Buffer& param) {
  const DType expected = compute_dtype(param.dtype);
  if (buffer.dtype == expected) return;
  throw_state_dtype(buffer, label, std::string(dtype_name(expected)), param);
}

StateFormat state_format(const Buffer& momentum, const Label& label, const Buffer& param) {
  const DType computed = compute_dtype(param.dtype);
  if (momentum.dtype == computed) return StateFormat::kFull;
  if (computed == DType::kFloat64) require_computed(momentum, label, param);
  if (holds_bfloat16(momentum)) return StateFormat::k16Bits;
  if (momentum.dtype == DType::kInt8) return StateFormat::k8Bits;
  throw_state_dtype(momentum, label, "float32", param,
                    ", or bfloat16, uint16 or int8 for state in fewer bits");
}

void require_norm(const Buffer& buffer, const Label& label, const Buffer& param,
                  StateFormat format) {
  if (format == StateFormat::kFull) return require_computed(buffer, label, param);
  const bool is_16 = format == StateFormat::k16Bits;
  if (is_16 ? holds_bfloat16(buffer) : buffer.dtype == DType::kUInt8) return;
  throw_state_dtype(buffer, label,
                    is_16 ? "bfloat16 or uint16, beside a first moment in 16 bits,"
                          : "uint8, beside a first moment in int8,",
                    param);
}

void require_norm_scale(const Buffer& buffer, const Label& label, const Buffer& param,
                        StateFormat format) {
  if (buffer.dtype != DType::kFloat32) throw_state_dtype(buffer, label, "float32", param);
  require_same_device(buffer, label, param, {"its parameter"});
  require_dense(buffer, label);
  const std::int64_t expected = number_of_scales(param.size, format);
  if (buffer.size == expected) return;
  throw py::value_error(label.text() + " has " + std::to_string(buffer.size) +
                        " elements; expected " + std::to_string(expected) +
                        (format == StateFormat::k16Bits ? " with state in 16 bits"
                                                        : ", one for each 256 of its parameter"));
}

void require_remainder(const Buffer& buffer, const Label& label, const Buffer& param) {
  if (buffer.dtype == DType::kInt16) return;
  throw_state_dtype(buffer, label, "int16", param);
}

}  // namespace adamax::bindings
