// Reads a call of XLA, and checks what Python has promised of it.
#include "xla/call.hpp"

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace adamax::xla {
namespace {

struct Setting {
  std::string_view name;
  double& (*number_of)(StepCall&);
};
constexpr Setting kSettings[] = {
    {"learning_rate", [](StepCall& call) -> double& { return call.group.learning_rate; }},
    {"b1", [](StepCall& call) -> double& { return call.group.beta_1; }},
    {"b2", [](StepCall& call) -> double& { return call.group.beta_2; }},
    {"eps", [](StepCall& call) -> double& { return call.group.epsilon; }},
    {"weight_decay", [](StepCall& call) -> double& { return call.group.weight_decay; }},
    {"loss_scale", [](StepCall& call) -> double& { return call.loss_scale; }},
};

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

template <class T>
std::optional<T> find_number(const Attributes& attributes, std::string_view name, DataType type) {
  const void* const found = find(attributes, name, AttributeType::kScalar);
  if (found == nullptr) return std::nullopt;
  const Scalar& scalar = *static_cast<const Scalar*>(found);
  require(scalar.dtype == type, std::string(name) + " is a number of another type");
  return *static_cast<const T*>(scalar.value);
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

// How many buffers there are, and of which arrays.
struct Counts {
  std::int64_t kinds;  // of arrays that are overwritten
  std::int64_t leaves, gradients;

  std::int64_t count() const { return kinds * leaves; }
  std::int64_t first_setting() const { return count() + 1 + gradients; }
};

// Throws unless results lie where their arguments are.
Counts read_counts(const CallFrame& frame, std::int64_t kinds, std::int64_t settings) {
  const Buffers& arguments = frame.arguments;
  const Buffers& results = frame.results;
  const Counts counts{kinds, results.size / kinds, arguments.size - results.size - 1 - settings};
  require(
      results.size == counts.count() && 0 <= counts.gradients && counts.gradients <= counts.leaves,
      std::to_string(kinds) + " kinds of arrays and " + std::to_string(settings) +
          " settings do not make " + std::to_string(results.size) + " results and " +
          std::to_string(arguments.size) + " arguments");
  for (std::int64_t i = 0; i < arguments.size; ++i) {
    require(arguments.types[i] == ArgumentType::kBuffer, "an argument is no buffer");
    if (i >= results.size) continue;
    require(results.types[i] == ArgumentType::kBuffer, "a result is no buffer");
    require(results.buffers[i]->data == arguments.buffers[i]->data ||
                size_of(*arguments.buffers[i]) == 0,
            "result " + std::to_string(i) + " does not lie where its argument is");
  }
  return counts;
}

Variable read_variable(const Buffers& arguments, const Counts& counts, std::int64_t i) {
  const Buffer& param = *arguments.buffers[i];
  const std::int64_t size = size_of(param);
  const auto label = [i](const char* role) { return role + ("[" + std::to_string(i) + "]"); };
  const auto checked = [&](const char* role, std::int64_t at) -> const Buffer& {
    const Buffer& buffer = *arguments.buffers[at];
    require(size_of(buffer) == size, label(role) + " has " + std::to_string(size_of(buffer)) +
                                         " elements; expected " + std::to_string(size) +
                                         " as its parameter");
    return buffer;
  };
  const Buffer& momentum = checked("mu", counts.leaves + i);
  const Buffer& norm = checked("nu", 2 * counts.leaves + i);
  const DType dtype = dtype_of(param, label("params")), state = dtype_of(momentum, label("mu"));
  require(state == compute_dtype(dtype),
          label("mu") + " is not of the type in which its parameter is computed");
  require(dtype_of(norm, label("nu")) == state, label("nu") + " has another type than mu");
  Variable variable{{param.data, nullptr, momentum.data, norm.data}, size, {dtype, dtype}};
  if (i < counts.gradients) {
    const Buffer& grad = checked("grads", counts.count() + 1 + i);
    variable.memory.grad = grad.data;
    variable.storage.grad = dtype_of(grad, label("grads"));
  }
  if (counts.kinds == 4) {
    const Buffer& average = checked("averages", 3 * counts.leaves + i);
    require(dtype_of(average, label("averages")) == state,
            label("averages") + " has another type than mu");
    variable.memory.average = average.data;
  }
  return variable;
}

const Buffer& read_scalar(const Buffers& arguments, std::int64_t at, std::string_view name,
                          std::initializer_list<DataType> types, const char* wanted) {
  const Buffer& buffer = *arguments.buffers[at];
  require(size_of(buffer) == 1 && std::ranges::find(types, buffer.dtype) != types.end(),
          std::string(name) + " must be one " + wanted + "; received " +
              std::to_string(size_of(buffer)) + " elements of XLA's type " +
              std::to_string(static_cast<int>(buffer.dtype)));
  return buffer;
}

}  // namespace

StepCall read_call(const CallFrame& frame) {
  const Attributes& attributes = frame.attributes;
  const auto number = [&attributes](std::string_view name) {
    return find_number<double>(attributes, name, DataType::kFloat64);
  };
  StepCall call;
  Group& group = call.group;
  group.decay =
      read_rule(attributes, "decay", "decoupled", DecayRule::kDecoupled, "l2", DecayRule::kL2);
  group.epsilon_rule = read_rule(attributes, "epsilon_mode", "inside", EpsilonRule::kInside,
                                 "outside", EpsilonRule::kOutside);
  for (const Setting& setting : kSettings) {
    if (const std::optional<double> known = number(setting.name)) {
      setting.number_of(call) = *known;
    } else {
      call.arrays.push_back({setting.name, setting.number_of, nullptr});
    }
  }
  group.clipvalue = number("clipvalue");
  const std::optional<double> ema_momentum = number("ema_momentum");
  group.ema_momentum = ema_momentum.value_or(0.0);

  const Buffers& arguments = frame.arguments;
  const Counts counts = read_counts(frame, ema_momentum ? 4 : 3, std::ssize(call.arrays));
  const std::int64_t decayed =
      find_number<std::int64_t>(attributes, "decayed", DataType::kInt64).value_or(counts.leaves);
  call.all_decay = decayed >= counts.leaves;
  for (std::int64_t i = 0; i < counts.leaves; ++i) {
    Variable variable = read_variable(arguments, counts, i);
    if (variable.size == 0) continue;
    variable.group = i < decayed ? 0 : 1;
    call.variables.push_back(variable);
  }
  call.count = &read_scalar(arguments, counts.count(), "count", {DataType::kInt32}, "int32");
  std::int64_t at = counts.first_setting();
  for (StepCall::Array& array : call.arrays) {
    array.value = &read_scalar(arguments, at++, array.setting,
                               {DataType::kFloat32, DataType::kFloat64}, "float32 or float64");
  }
  return call;
}

std::vector<Group> StepCall::groups() const {
  std::vector<Group> groups(all_decay ? 1 : 2, group);
  if (!all_decay) groups[1].weight_decay = 0;
  return groups;
}

}  // namespace adamax::xla
