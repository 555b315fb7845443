// Reads a call of XLA, and checks what Python has promised of it.
#include "xla/call.hpp"

#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace adamax::xla {
namespace {

constexpr StepCall::Setting kSettings[] = {{"learning_rate", &Group::learning_rate, nullptr},
                                           {"b1", &Group::beta_1, nullptr},
                                           {"b2", &Group::beta_2, nullptr},
                                           {"eps", &Group::epsilon, nullptr},
                                           {"weight_decay", &Group::weight_decay, nullptr}};

DType dtype_of(const Buffer& buffer, const std::string& label) {
  switch (buffer.dtype) {
    case DataType::kFloat32:
      return DType::kFloat32;
    case DataType::kFloat64:
      return DType::kFloat64;
    case DataType::kFloat16:
      return DType::kFloat16;
    case DataType::kBFloat16:
      return DType::kBFloat16;
    default:
      throw std::invalid_argument(label + " has XLA's type " +
                                  std::to_string(static_cast<int>(buffer.dtype)) +
                                  "; expected float32, float64, float16 or bfloat16");
  }
}

std::int64_t size_of(const Buffer& buffer) {
  std::int64_t size = 1;
  for (std::int64_t i = 0; i < buffer.rank; ++i) size *= buffer.dims[i];
  return size;
}

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

// The value of an attribute, if there is one of that name and type.
const void* find(const Attributes& attributes, std::string_view name, AttributeType type) {
  for (std::int64_t i = 0; i < attributes.size; ++i) {
    const ByteSpan& span = *attributes.names[i];
    if (std::string_view(span.data, span.size) != name) continue;
    require(attributes.types[i] == type, std::string(name) + " is an attribute of another type");
    return attributes.values[i];
  }
  return nullptr;
}

template <class Rule>
Rule read_rule(const Attributes& attributes, const char* name, std::string_view first, Rule rule,
               std::string_view second, Rule other) {
  const void* const found = find(attributes, name, AttributeType::kString);
  require(found != nullptr, std::string("the attribute ") + name + " is missing");
  const ByteSpan& span = *static_cast<const ByteSpan*>(found);
  const std::string_view word(span.data, span.size);
  if (word == first) return rule;
  if (word == second) return other;
  throw std::invalid_argument(std::string(name) + " is " + std::string(word) + "; expected " +
                              std::string(first) + " or " + std::string(second));
}

}  // namespace

StepCall read_call(const CallFrame& frame) {
  StepCall call;
  Group& group = call.group;
  const Attributes& attributes = frame.attributes;
  group.decay =
      read_rule(attributes, "decay", "decoupled", DecayRule::kDecoupled, "l2", DecayRule::kL2);
  group.epsilon_rule = read_rule(attributes, "epsilon_mode", "inside", EpsilonRule::kInside,
                                 "outside", EpsilonRule::kOutside);
  for (const StepCall::Setting& setting : kSettings) {
    if (const void* const found = find(attributes, setting.name, AttributeType::kScalar)) {
      const Scalar& scalar = *static_cast<const Scalar*>(found);
      require(scalar.dtype == DataType::kFloat64, std::string(setting.name) + " is no float64");
      group.*setting.member = *static_cast<const double*>(scalar.value);
    } else {
      call.arrays.push_back(setting);
    }
  }

  const Buffers& arguments = frame.arguments;
  const Buffers& results = frame.results;
  const std::int64_t n = (results.size - 1) / 3;
  const std::int64_t settings = arguments.size - (4 * n + 1);
  require(results.size == 3 * n + 1 && settings == std::ssize(call.arrays),
          "a step has 3 n + 1 results, and 4 n + 1 arguments beside its settings; received " +
              std::to_string(results.size) + " and " + std::to_string(arguments.size) + " with " +
              std::to_string(call.arrays.size()) + " settings");
  for (std::int64_t i = 0; i < arguments.size; ++i) {
    require(arguments.types[i] == ArgumentType::kBuffer, "an argument is no buffer");
    if (i >= results.size) continue;
    require(results.types[i] == ArgumentType::kBuffer, "a result is no buffer");
    require(results.buffers[i]->data == arguments.buffers[i]->data ||
                size_of(*arguments.buffers[i]) == 0,
            "result " + std::to_string(i) + " does not lie where its argument is");
  }

  for (std::int64_t i = 0; i < n; ++i) {
    const auto label = [i](const char* role) { return role + ("[" + std::to_string(i) + "]"); };
    const Buffer& param = *arguments.buffers[i];
    const Buffer& momentum = *arguments.buffers[n + i];
    const Buffer& norm = *arguments.buffers[2 * n + i];
    const Buffer& grad = *arguments.buffers[3 * n + 1 + i];
    const std::int64_t size = size_of(param);
    for (const auto& [role, buffer] :
         {std::pair{"mu", &momentum}, std::pair{"nu", &norm}, std::pair{"grads", &grad}}) {
      require(size_of(*buffer) == size, label(role) + " has " + std::to_string(size_of(*buffer)) +
                                            " elements; expected " + std::to_string(size) +
                                            " as its parameter");
    }
    const DType state = dtype_of(momentum, label("mu"));
    require(dtype_of(norm, label("nu")) == state, label("nu") + " has another type than mu");
    if (size == 0) continue;
    call.variables.push_back(
        {{param.data, grad.data, momentum.data, norm.data},
         size,
         {dtype_of(param, label("params")), dtype_of(grad, label("grads")), state}});
  }

  call.count = arguments.buffers[3 * n];
  require(call.count->dtype == DataType::kInt32 && size_of(*call.count) == 1,
          "count must be one int32; received " + std::to_string(size_of(*call.count)) +
              " elements of XLA's type " + std::to_string(static_cast<int>(call.count->dtype)));
  for (std::size_t k = 0; k < call.arrays.size(); ++k) {
    StepCall::Setting& setting = call.arrays[k];
    setting.value = arguments.buffers[4 * n + 1 + static_cast<std::int64_t>(k)];
    const bool is_known =
        setting.value->dtype == DataType::kFloat32 || setting.value->dtype == DataType::kFloat64;
    require(is_known && size_of(*setting.value) == 1,
            std::string(setting.name) + " must be one float32 or float64; received " +
                std::to_string(size_of(*setting.value)) + " elements of XLA's type " +
                std::to_string(static_cast<int>(setting.value->dtype)));
  }
  return call;
}

}  // namespace adamax::xla
