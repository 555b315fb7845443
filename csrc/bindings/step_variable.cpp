// A variable whose arrays somebody else keeps, imported at each step.
#include "bindings/step_variable.hpp"

#include <string>
#include <utility>

#include "bindings/kept.hpp"
#include "bindings/settings.hpp"

namespace adamax::bindings {
namespace {

constexpr std::string_view kRoles[] = {"params", "grads",         "exp_avg",  "exp_inf",
                                       "step",   "exp_inf_scale", "remainder"};
constexpr std::pair<Role, Kept> kKept[] = {{kMomentum, Kept::kMomentum},
                                           {kNorm, Kept::kNorm},
                                           {kNormScale, Kept::kNormScale},
                                           {kRemainder, Kept::kRemainder}};

// Bytes of an element of a moment.
std::size_t moment_itemsize(const Storage& storage) {
  if (storage.state == StateFormat::kFull) return itemsize(compute_dtype(storage.param));
  return storage.state == StateFormat::k16Bits ? 2 : 1;
}

py::handle entry(const py::tuple& arrays, std::size_t i, Role role) {
  return PyTuple_GET_ITEM(arrays.ptr(), static_cast<py::ssize_t>(kWidth * i + role));
}

void require_extras(const py::tuple& arrays, std::size_t i) {
  constexpr int kCount = kNumRoles - kExtras;
  const py::handle extras = entry(arrays, i, kExtras);
  if (extras.is_none()) return;
  if (py::isinstance<py::tuple>(extras) && py::len(extras) == kCount) return;
  throw py::value_error(Label{"extras", static_cast<py::ssize_t>(i)}.text() +
                        " must be None or a tuple of " + std::to_string(kCount) + "; received " +
                        py::cast<std::string>(repr(extras)));
}

}  // namespace

Label label(Role role, std::size_t i) {
  return {kRoles[role], static_cast<py::ssize_t>(i), nullptr};
}

py::handle item(const py::tuple& arrays, std::size_t i, Role role) {
  if (role < kExtras) return entry(arrays, i, role);
  const py::handle extras = entry(arrays, i, kExtras);
  return extras.is_none() ? extras : PyTuple_GET_ITEM(extras.ptr(), role - kExtras);
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
  const std::size_t bytes = variable.size * moment_itemsize(variable.storage);
  written.add(variable.memory.param, param().size(), label(kParam, i));
  written.add(variable.memory.momentum, bytes, label(kMomentum, i));
  written.add(variable.memory.norm, bytes, label(kNorm, i));
  written.add(count, itemsize(count_dtype), label(kSteps, i));
  if (variable.memory.norm_scale != nullptr) {
    const auto scales = number_of_scales(variable.size, variable.storage.state);
    written.add(variable.memory.norm_scale, scales * sizeof(float), label(kNormScale, i));
  }
  if (variable.memory.remainder != nullptr) {
    written.add(variable.memory.remainder, variable.size * sizeof(std::int16_t),
                label(kRemainder, i));
  }
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

bool StepVariable::import(const py::tuple& arrays, std::size_t i, WeightRounding rounding,
                          Leases& leases, std::map<int, Streams>& streams) {
  require_extras(arrays, i);
  Buffer param, buffer;
  const auto note = [&](const Buffer& seen) {
    if (seen.device != kHost) streams[seen.device].add(seen);
  };
  Variable before = variable;
  Arrays& known = variable.memory;

  const Label param_label = label(kParam, i);
  import_buffer(item(arrays, i, kParam), param_label, Access::kWrite, leases, param, known.param);
  require_dense(param, param_label);
  note(param);
  known.param = param.data;
  variable.size = param.size;
  device = param.device;

  const Label grad_label = label(kGrad, i);
  import_buffer(item(arrays, i, kGrad), grad_label, Access::kRead, leases, buffer);
  require_pair(param, param_label, buffer, grad_label);
  require_same_layout(buffer, grad_label, param, param_label);
  note(buffer);
  known.grad = buffer.data;
  variable.storage = {param.dtype, buffer.dtype, StateFormat::kFull,
                      rounding_of(param.dtype, rounding, param_label)};

  for (const auto [role, kind] : kKept) {
    if (import_kept(kind, item(arrays, i, role), label(role, i), param, param_label, variable,
                    leases, buffer)) {
      note(buffer);
    }
  }
  if (item(arrays, i, kNumber).is_none()) {
    variable.number = 0, variable.first_element = 0;
  } else {
    variable.number = py::cast<std::uint32_t>(item(arrays, i, kNumber));
    variable.first_element = py::cast<std::int64_t>(item(arrays, i, kFirstElement));
  }

  const Label count_label = label(kSteps, i);
  import_counts(item(arrays, i, kSteps), count_label, leases, buffer);
  if (buffer.device != kHost) require_same_device(buffer, count_label, param, param_label);
  scalar_type(buffer, count_label);
  count_device = buffer.device;
  count_dtype = buffer.dtype;
  note(buffer);
  before.memory.grad = known.grad;  // which is only read
  return std::exchange(count, buffer.data) == buffer.data && before.memory == known &&
         before.size == variable.size && before.storage == variable.storage;
}

}  // namespace adamax::bindings
