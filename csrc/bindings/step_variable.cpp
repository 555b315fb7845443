// A variable whose arrays somebody else keeps, imported at each step.
#include "bindings/step_variable.hpp"

#include <string>

namespace adamax::bindings {
namespace {

constexpr std::string_view kRoles[] = {"params", "grads", "exp_avg", "exp_inf", "step"};

}  // namespace

Label label(Role role, std::size_t i) {
  return {kRoles[role], static_cast<py::ssize_t>(i), nullptr};
}

py::handle item(const py::tuple& arrays, std::size_t i, Role role) {
  return PyTuple_GET_ITEM(arrays.ptr(), static_cast<py::ssize_t>(kNumRoles * i + role));
}

ScalarType scalar_type(const Buffer& number, const Label& label) {
  if (number.size == 1 && number.dtype == DType::kFloat32) return ScalarType::kFloat32;
  if (number.size == 1 && number.dtype == DType::kFloat64) return ScalarType::kFloat64;
  throw py::value_error(label.text() + " has " + std::to_string(number.size) + " elements of " +
                        std::string(dtype_name(number.dtype)) +
                        "; expected one, of float32 or float64");
}

std::span<const char> StepVariable::param() const {
  return {static_cast<const char*>(variable.memory.param),
          variable.size * itemsize(variable.storage.param)};
}

void StepVariable::add_to(WrittenMemory& written, std::size_t i) const {
  const std::size_t bytes = variable.size * itemsize(compute_dtype(variable.storage.param));
  written.add(variable.memory.param, param().size(), label(kParam, i));
  written.add(variable.memory.momentum, bytes, label(kMomentum, i));
  written.add(variable.memory.norm, bytes, label(kNorm, i));
  written.add(count, itemsize(count_dtype), label(kSteps, i));
}

void StepVariable::require_readable(const WrittenMemory& written, std::size_t i) {
  written.require_readable(grad(), label(kGrad, i), param(), grad_place);
}

std::span<const char> StepVariable::grad() const {
  return {static_cast<const char*>(variable.memory.grad),
          variable.size * itemsize(variable.storage.grad)};
}

// In the type of the count, where large numbers stop rising, as torch counts.
double StepVariable::incremented(double completed) const {
  return count_dtype == DType::kFloat64 ? completed + 1.0 : static_cast<float>(completed) + 1.0f;
}

double StepVariable::completed_steps() const {
  return count_dtype == DType::kFloat64 ? *static_cast<double*>(count)
                                        : *static_cast<float*>(count);
}

void StepVariable::write_count() const {
  if (count_dtype == DType::kFloat64) {
    *static_cast<double*>(count) = step;
  } else {
    *static_cast<float*>(count) = static_cast<float>(step);
  }
}

bool StepVariable::import(const py::tuple& arrays, std::size_t i, Leases& leases,
                          std::map<int, Streams>& streams) {
  bool is_where_it_was = true;
  Buffer param, buffer;
  const auto place = [&](void*& known, const Buffer& seen) {
    if (seen.device != kHost) streams[seen.device].add(seen);
    is_where_it_was = is_where_it_was && known == seen.data;
    known = seen.data;
  };
  Arrays& memory = variable.memory;

  const Label param_label = label(kParam, i);
  import_buffer(item(arrays, i, kParam), param_label, Access::kWrite, leases, param, memory.param);
  require_dense(param, param_label);
  if (param.size != variable.size || param.dtype != variable.storage.param) {
    is_where_it_was = false;
  }
  variable.size = param.size;
  device = param.device;
  place(memory.param, param);

  const Label grad_label = label(kGrad, i);
  import_buffer(item(arrays, i, kGrad), grad_label, Access::kRead, leases, buffer);
  require_pair(param, param_label, buffer, grad_label);
  require_same_layout(buffer, grad_label, param, param_label);
  if (buffer.device != kHost) streams[buffer.device].add(buffer);
  memory.grad = buffer.data;
  variable.storage = {param.dtype, buffer.dtype};

  const auto import_state = [&](Role role, void*& known) {
    import_buffer(item(arrays, i, role), label(role, i), Access::kWrite, leases, buffer, known);
    require_computed(buffer, label(role, i), param);
    require_same_layout(buffer, label(role, i), param, param_label);
    place(known, buffer);
  };
  import_state(kMomentum, memory.momentum);
  import_state(kNorm, memory.norm);

  const Label count_label = label(kSteps, i);
  import_counts(item(arrays, i, kSteps), count_label, leases, buffer);
  if (buffer.device != kHost) require_same_device(buffer, count_label, param, param_label);
  scalar_type(buffer, count_label);
  count_device = buffer.device;
  count_dtype = buffer.dtype;
  place(count, buffer);
  return is_where_it_was;
}

}  // namespace adamax::bindings
