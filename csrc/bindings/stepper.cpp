// Steps on variables whose state somebody else keeps, with a step count each: those of torch.
#include "bindings/stepper.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <unordered_map>
#include <utility>

#include "bindings/busy.hpp"
#include "bindings/without_gil.hpp"

namespace adamax::bindings {
namespace {

// Whether an exception says that memory is not as a kernel needs it.
bool is_refusal(const py::error_already_set& error) {
  return error.matches(PyExc_ValueError) || error.matches(PyExc_TypeError) ||
         error.matches(PyExc_BufferError);
}

}  // namespace

// Variables of one device that are stepped together, in order, with their groups: settings with a
// step number.
struct Stepper::Part {
  int device;
  std::vector<Variable> variables;
  std::vector<Group> groups;
  // Of the settings that were added last: those with the same are best added together.
  std::size_t last_settings = 0;
  std::unordered_map<std::int64_t, std::uint32_t> by_step;

  void add(const StepVariable& variable, const Group& group) {
    variables.push_back(variable.variable);
    if (variable.count_device != kHost) {  // nobody knows yet whether it is that of another one
      groups.push_back(group);
      groups.back().device.step = variable.count;
      groups.back().device.step_type =
          variable.count_dtype == DType::kFloat64 ? ScalarType::kFloat64 : ScalarType::kFloat32;
      variables.back().group = static_cast<std::uint32_t>(groups.size() - 1);
      return;
    }
    if (variable.variable.group != last_settings) by_step.clear();
    last_settings = variable.variable.group;
    const auto step = static_cast<std::int64_t>(variable.step);
    const auto [found, is_new] = by_step.try_emplace(step, groups.size());
    if (is_new) {
      groups.push_back(group);
      groups.back().step = step;
    }
    variables.back().group = found->second;
  }
};

Stepper::~Stepper() {
  const WithoutGil released;  // a GPU may have to finish first
  runners_.clear();
}

// Puts the learning rates into the groups, and returns the loss scales by device.
std::map<int, DeviceLossScale> Stepper::import_device_scalars(
    StepSettings& settings, Leases& leases, std::map<int, Streams>& streams) const {
  Buffer buffer;
  const auto import = [&](const py::object& array, const Label& label) {
    import_buffer(array, label, Access::kRead, leases, buffer);
    if (buffer.device == kHost) {
      throw py::value_error(label.text() + " is in host memory; expected that of a GPU");
    }
    streams[buffer.device].add(buffer);
    return scalar_type(buffer, label);
  };
  std::size_t begin = 0;  // of the variables of a group
  for (std::size_t i = 0; i < settings.learning_rates.size(); begin += settings.sizes[i++]) {
    if (settings.learning_rates[i].is_none()) continue;
    const Label label{"lr", static_cast<py::ssize_t>(i)};
    DeviceScalars& scalars = settings.groups[i].device;
    scalars.learning_rate_type = import(settings.learning_rates[i], label);
    scalars.learning_rate = buffer.data;
    for (std::size_t k = begin; k < begin + settings.sizes[i]; ++k) {
      if (variables_[k].device == buffer.device) continue;
      throw py::value_error(label.text() + " must lie on the device of " +
                            bindings::label(kParam, k).text());
    }
  }
  std::map<int, DeviceLossScale> loss_scales;
  for (const auto& [grad_scale, found_inf] : settings.loss_scales) {
    const auto import_float = [&](const py::object& array, const char* role) -> const float* {
      if (array.is_none()) return nullptr;
      if (import(array, {role}) != ScalarType::kFloat32) {
        throw py::value_error(std::string(role) + " has dtype float64; expected float32");
      }
      return reinterpret_cast<const float*>(buffer.data);
    };
    const float* const scale = import_float(grad_scale, "grad_scale");
    const float* const veto = import_float(found_inf, "found_inf");
    if (scale == nullptr && veto == nullptr) continue;
    loss_scales[buffer.device] = {scale, veto, /*writes_gradients=*/scale != nullptr};
  }
  return loss_scales;
}

// Whether something that is written lies in other memory of the call.
bool Stepper::share_memory(bool writes_gradients) {
  try {
    if (writes_gradients) {
      WrittenMemory all;
      for (std::size_t i = 0; i < variables_.size(); ++i) {
        variables_[i].add_to(all, i);
        const std::span<const char> grad = variables_[i].grad();
        all.add(grad.data(), grad.size(), label(kGrad, i));
      }
      all.seal();
    }
    if (!written_is_current_) {
      WrittenMemory written;
      for (std::size_t i = 0; i < variables_.size(); ++i) variables_[i].add_to(written, i);
      written.seal();
      written_ = std::move(written);
      written_is_current_ = true;
    }
    for (std::size_t i = 0; i < variables_.size(); ++i) variables_[i].require_readable(written_, i);
  } catch (const py::value_error&) {
    return true;
  }
  return false;
}

// Finds the numbers of this step where they are counted on the host.
void Stepper::find_steps(bool one_by_one) {
  std::unordered_map<const void*, double> steps;  // of counts that variables share
  for (std::size_t i = 0; i < variables_.size(); ++i) {
    StepVariable& variable = variables_[i];
    if (variable.count_device != kHost) continue;
    variable.step = variable.incremented(variable.completed_steps());
    if (one_by_one) {
      const auto [before, is_first] = steps.emplace(variable.count, variable.step);
      if (!is_first) variable.step = before->second = variable.incremented(before->second);
    }
    if (!(variable.step >= 1 && variable.step < 0x1p63) ||
        variable.step != std::floor(variable.step)) {
      throw py::value_error(label(kSteps, i).text() + " must be a whole number >= 0; received " +
                            std::to_string(variable.completed_steps()));
    }
  }
}

std::vector<Stepper::Part> Stepper::parts(const StepSettings& settings, bool one_by_one) {
  std::vector<Part> parts;  // one for each device, or each variable
  for (const StepVariable& variable : variables_) {
    auto part = std::find_if(parts.begin(), parts.end(), [&](const Part& other) {
      return !one_by_one && other.device == variable.device;
    });
    if (part == parts.end()) {
      part = parts.insert(part, Part{.device = variable.device});
      if (!one_by_one) part->variables.reserve(variables_.size());
    }
    part->add(variable, settings.groups[variable.variable.group]);
  }
  return parts;
}

std::vector<std::size_t> Stepper::step(const py::tuple& arrays, StepSettings settings,
                                       bool is_strict) {
  const Busy busy(is_busy_);
  const std::size_t count =
      std::accumulate(settings.sizes.begin(), settings.sizes.end(), std::size_t{0});
  const std::size_t groups = settings.groups.size();
  if (count * kWidth != arrays.size() || settings.sizes.size() != groups ||
      (!settings.learning_rates.empty() && settings.learning_rates.size() != groups)) {
    throw py::value_error("arrays must have " + std::to_string(kWidth) +
                          " entries for each of the " + std::to_string(count) +
                          " variables of sizes, and sizes and learning_rates an entry for each "
                          "of " +
                          std::to_string(groups) + " groups; received " +
                          std::to_string(arrays.size()) + " arrays");
  }
  Leases leases;
  std::map<int, Streams> streams;
  bool is_where_it_was = std::exchange(written_is_current_, false) && variables_.size() == count;
  variables_.resize(count);
  std::vector<std::size_t> unfit;
  const auto try_with = [&](std::size_t i, const auto& check) {
    try {
      check(variables_[i]);
    } catch (const py::builtin_exception&) {
      if (is_strict) throw;
      unfit.push_back(i);
    } catch (const py::error_already_set& error) {
      if (is_strict || !is_refusal(error)) throw;
      unfit.push_back(i);
    }
  };
  std::size_t i = 0;
  for (std::uint32_t group = 0; group < groups; ++group) {
    for (const std::size_t end = i + settings.sizes[group]; i < end; ++i) {
      try_with(i, [&](StepVariable& variable) {
        variable.variable.group = group;
        is_where_it_was &=
            variable.import(arrays, i, settings.groups[group].weight_rounding, leases, streams);
      });
    }
  }
  if (!unfit.empty()) return unfit;
  written_is_current_ = is_where_it_was;
  const auto loss_scales = import_device_scalars(settings, leases, streams);

  const bool one_by_one = share_memory(/*writes_gradients=*/!loss_scales.empty());
  if (one_by_one) {  // each by itself has to be sound
    for (i = 0; i < count; ++i) {
      try_with(i, [&](StepVariable& variable) {
        WrittenMemory written;
        variable.add_to(written, i);
        written.seal();
        variable.require_readable(written, i);
      });
    }
    if (!unfit.empty()) return unfit;
  }
  find_steps(one_by_one);
  std::vector<std::pair<int, Program>> programs;  // all of them are checked before the first runs
  for (const Part& part : parts(settings, one_by_one)) {
    const auto scale = loss_scales.find(part.device);
    const Call call{.device = scale != loss_scales.end() ? scale->second : DeviceLossScale{}};
    programs.emplace_back(part.device, make_program(part.variables, part.groups, call));
  }
  // What can fail on a device comes before the first of them runs, and devices before the host.
  std::stable_partition(programs.begin(), programs.end(),
                        [](const auto& item) { return item.first != kHost; });
  for (const auto& [device, program] : programs) {
    const auto [runner, _] = runners_.try_emplace(device, device, /*for_graphs=*/true);
    runner->second.reserve(program, streams[device]);
  }
  for (const auto& [device, program] : programs) {
    runners_.at(device).run(program, streams[device], leases);
  }
  ++calls;
  std::vector<py::handle> written;
  written.reserve(count);
  for (i = 0; i < count; ++i) {
    if (variables_[i].count_device == kHost) variables_[i].write_count();
    written.push_back(item(arrays, i, kParam));
  }
  note_written(written);
  return {};
}

}  // namespace adamax::bindings
