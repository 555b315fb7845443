// A variable whose arrays somebody else keeps, imported at each step.
#include "bindings/step_variable.hpp"

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "bindings/settings.hpp"

namespace adamax::bindings {
namespace {

constexpr std::string_view kRoles[] = {"params", "grads",         "exp_avg",   "exp_inf",
                                       "step",   "exp_inf_scale", "remainder", "place"};

// Bytes of an element of a moment.
std::size_t moment_itemsize(const Storage& storage) {
  if (storage.state == StateFormat::kFull) return itemsize(compute_dtype(storage.param));
  return storage.state == StateFormat::k16Bits ? 2 : 1;
}

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

bool StepVariable::import(const py::tuple& arrays, std::size_t i, const py::object* rounding,
                          Leases& leases, std::map<int, Streams>& streams) {
  bool is_where_it_was = true;
  Buffer param, buffer;
  const auto place = [&](auto*& known, const Buffer& seen) {
    void* const data = seen.data;
    if (seen.device != kHost) streams[seen.device].add(seen);
    is_where_it_was = is_where_it_was && known == data;
    known = static_cast<std::remove_reference_t<decltype(known)>>(data);
  };
  Arrays& memory = variable.memory;
  const StateFormat known_format = variable.storage.state;

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
  if (rounding != nullptr) {
    variable.storage.rounding = weight_rounding(*rounding, param.dtype, param_label);
  }

  const auto import_one = [&](Role role, auto*& known, const auto& check) {
    import_state(item(arrays, i, role), label(role, i), Access::kWrite, leases, buffer, known);
    check(label(role, i));
    place(known, buffer);
  };
  const auto with_layout = [&](const auto& check) {
    return [&](const Label& label) {
      check(label);
      require_same_layout(buffer, label, param, param_label);
    };
  };
  StateFormat& format = variable.storage.state;
  import_one(kMomentum, memory.momentum,
             with_layout([&](const Label& label) { format = state_format(buffer, label, param); }));
  import_one(kNorm, memory.norm,
             with_layout([&](const Label& label) { require_norm(buffer, label, param, format); }));
  is_where_it_was = is_where_it_was && format == known_format;
  // What is None unless it is needed.
  const auto import_if = [&](bool is_needed, Role role, auto*& known, const char* where,
                             const auto& check) {
    const bool is_given = !item(arrays, i, role).is_none();
    if (is_given != is_needed) {
      throw py::value_error(label(role, i).text() + " must be " +
                            (is_needed ? "in the state" : "None") + " where " + where +
                            "; received " + (is_given ? "a buffer" : "None"));
    }
    if (is_needed) return import_one(role, known, check);
    is_where_it_was = is_where_it_was && known == nullptr;
    known = nullptr;
  };
  const bool is_full = format == StateFormat::kFull;
  import_if(!is_full, kNormScale, memory.norm_scale,
            is_full ? "exp_avg is not in fewer bits" : "exp_avg is in 16 or 8 bits",
            [&](const Label& label) { require_norm_scale(buffer, label, param, format); });
  const bool has_remainder = variable.storage.rounding == WeightRounding::kRemainder;
  import_if(has_remainder, kRemainder, memory.remainder,
            has_remainder ? "weight_rounding is 'remainder'" : "weight_rounding is not 'remainder'",
            with_layout([&](const Label& label) { require_remainder(buffer, label, param); }));
  const py::handle where = item(arrays, i, kPlace);
  std::tie(variable.number, variable.first_element) =
      where.is_none() ? std::pair<std::uint32_t, std::int64_t>{}
                      : py::cast<std::pair<std::uint32_t, std::int64_t>>(where);

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
