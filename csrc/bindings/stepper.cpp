// Steps on variables whose state somebody else keeps, with a step count each: those of torch.
#include "bindings/stepper.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <unordered_map>

#include "bindings/busy.hpp"

namespace adamax::bindings {
namespace {

// Of an entry.
enum Role { kParam, kGrad, kMomentum, kNorm, kSteps, kNumRoles };
constexpr std::string_view kRoles[] = {"params", "grads", "momentum", "norm", "steps"};

Label label(Role role, std::size_t i) {
  return {kRoles[role], static_cast<py::ssize_t>(i), nullptr};
}

py::handle item(const py::tuple& arrays, std::size_t i, Role role) {
  return PyTuple_GET_ITEM(arrays.ptr(), static_cast<py::ssize_t>(kNumRoles * i + role));
}

// Whether an exception says that memory is not as a kernel needs it.
bool is_refusal(const py::error_already_set& error) {
  return error.matches(PyExc_ValueError) || error.matches(PyExc_TypeError) ||
         error.matches(PyExc_BufferError);
}

// One number in device memory, as its importer found it.
ScalarType scalar_type(const Buffer& number, const Label& label) {
  if (number.size == 1 && number.dtype == DType::kFloat32) return ScalarType::kFloat32;
  if (number.size == 1 && number.dtype == DType::kFloat64) return ScalarType::kFloat64;
  throw py::value_error(label.text() + " has " + std::to_string(number.size) + " elements of " +
                        std::string(dtype_name(number.dtype)) +
                        "; expected one, of float32 or float64");
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

  void add(const Entry& entry, std::size_t settings, const Group& group) {
    variables.push_back(entry.variable);
    if (entry.count_device != kHost) {  // nobody knows yet whether it is that of another one
      groups.push_back(group);
      groups.back().device.step = entry.count;
      groups.back().device.step_type =
          entry.count_dtype == DType::kFloat64 ? ScalarType::kFloat64 : ScalarType::kFloat32;
      variables.back().group = static_cast<std::uint32_t>(groups.size() - 1);
      return;
    }
    if (settings != last_settings) by_step.clear();
    last_settings = settings;
    const auto step = static_cast<std::int64_t>(entry.step);
    const auto [found, is_new] = by_step.try_emplace(step, groups.size());
    if (is_new) {
      groups.push_back(group);
      groups.back().step = step;
    }
    variables.back().group = found->second;
  }
};

Stepper::~Stepper() {
  const py::gil_scoped_release release;  // a GPU may have to finish first
  runners_.clear();
}

std::span<const char> Stepper::Entry::param() const {
  return {static_cast<const char*>(variable.memory.param),
          variable.size * itemsize(variable.storage.param)};
}

void Stepper::Entry::add_to(WrittenMemory& written, std::size_t i) const {
  const std::size_t bytes = variable.size * itemsize(variable.storage.state);
  written.add(variable.memory.param, param().size(), label(kParam, i));
  written.add(variable.memory.momentum, bytes, label(kMomentum, i));
  written.add(variable.memory.norm, bytes, label(kNorm, i));
  written.add(count, itemsize(count_dtype), label(kSteps, i));
}

std::span<const char> Stepper::Entry::grad() const {
  return {static_cast<const char*>(variable.memory.grad),
          variable.size * itemsize(variable.storage.grad)};
}

// In the type of the count, where large numbers stop rising, as torch counts.
double Stepper::Entry::raised(double completed) const {
  return count_dtype == DType::kFloat64 ? completed + 1.0 : static_cast<float>(completed) + 1.0f;
}

double Stepper::Entry::completed() const {
  return count_dtype == DType::kFloat64 ? *static_cast<double*>(count)
                                        : *static_cast<float*>(count);
}

void Stepper::Entry::write_count() const {
  if (count_dtype == DType::kFloat64) {
    *static_cast<double*>(count) = step;
  } else {
    *static_cast<float*>(count) = static_cast<float>(step);
  }
}

void Stepper::import(std::size_t i, const py::tuple& arrays, Leases& leases) {
  Entry& entry = entries_[i];
  Buffer param, buffer;
  const auto note = [&](auto*& known, auto* now) {
    if (known != now) written_is_current_ = false;
    known = now;
  };
  const auto place = [&](void*& known, const Buffer& seen) {
    if (seen.device != kHost) streams_[seen.device].add(seen);
    note(known, static_cast<void*>(seen.data));
  };
  Arrays& memory = entry.variable.memory;

  const Label param_label = label(kParam, i);
  import_buffer(item(arrays, i, kParam), param_label, Access::kWrite, leases, param, memory.param);
  require_dense(param, param_label);
  const DType state = compute_dtype(param.dtype);
  if (param.size != entry.variable.size || param.dtype != entry.variable.storage.param) {
    written_is_current_ = false;
  }
  entry.variable.size = param.size;
  entry.device = param.device;
  place(memory.param, param);

  const Label grad_label = label(kGrad, i);
  import_buffer(item(arrays, i, kGrad), grad_label, Access::kRead, leases, buffer);
  require_pair(param, param_label, buffer, grad_label);
  require_same_layout(buffer, grad_label, param, param_label);
  if (buffer.device != kHost) streams_[buffer.device].add(buffer);
  memory.grad = buffer.data;
  entry.variable.storage = {param.dtype, buffer.dtype, state};

  const auto import_state = [&](Role role, void*& known) {
    import_buffer(item(arrays, i, role), label(role, i), Access::kWrite, leases, buffer, known);
    require_state_dtype(buffer, label(role, i), param);
    require_same_layout(buffer, label(role, i), param, param_label);
    place(known, buffer);
  };
  import_state(kMomentum, memory.momentum);
  import_state(kNorm, memory.norm);

  const Label count_label = label(kSteps, i);
  import_counts(item(arrays, i, kSteps), count_label, leases, buffer);
  if (buffer.device != kHost) require_same_device(buffer, count_label, param, param_label);
  scalar_type(buffer, count_label);
  entry.count_device = buffer.device;
  entry.count_dtype = buffer.dtype;
  place(entry.count, buffer);
}

// Those in device memory.
void Stepper::import_numbers(StepSettings& settings, Leases& leases) {
  const auto imported = [&](const py::handle& array, const Label& label, Buffer& buffer) {
    import_buffer(array, label, Access::kRead, leases, buffer);
    if (buffer.device == kHost) {
      throw py::value_error(label.text() + " is in host memory; expected that of a GPU");
    }
    streams_[buffer.device].add(buffer);
  };
  Buffer buffer;
  for (std::size_t i = 0; i < settings.learning_rates.size(); ++i) {
    const Label label{"learning_rates", static_cast<py::ssize_t>(i)};
    const py::object rate = settings.learning_rates[i];
    if (rate.is_none()) continue;
    imported(rate, label, buffer);
    DeviceScalars& device = settings.groups.at(i).device;
    device.learning_rate = buffer.data;
    device.learning_rate_type = scalar_type(buffer, label);
  }
  loss_scales_.clear();
  for (const py::handle pair : settings.loss_scales) {
    const py::tuple numbers = py::reinterpret_borrow<py::tuple>(pair);
    const auto number = [&](int k, const char* role) -> const float* {
      const py::object array = numbers[k];
      if (array.is_none()) return nullptr;
      imported(array, {role}, buffer);
      if (scalar_type(buffer, {role}) != ScalarType::kFloat32) {
        throw py::value_error(std::string(role) + " has dtype float64; expected float32");
      }
      return reinterpret_cast<const float*>(buffer.data);
    };
    const float* const scale = number(0, "grad_scale");
    const float* const found_inf = number(1, "found_inf");
    if (scale == nullptr && found_inf == nullptr) continue;
    loss_scales_[buffer.device] = {scale, found_inf, /*writes_gradients=*/scale != nullptr};
  }
}

// Whether something that is written lies in other memory of the call.
bool Stepper::share_memory() {
  try {
    if (!written_is_current_) {
      WrittenMemory written;
      for (std::size_t i = 0; i < entries_.size(); ++i) entries_[i].add_to(written, i);
      written.seal();
      written_ = std::move(written);
      written_is_current_ = true;
    }
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      Entry& entry = entries_[i];
      written_.require_readable(entry.grad(), label(kGrad, i), entry.param(), entry.grad_place);
    }
  } catch (const py::value_error&) {
    return true;
  }
  return false;
}

// Finds the numbers of this step where they are counted on the host.
void Stepper::number(bool one_by_one) {
  std::unordered_map<const void*, double> steps;  // of counts that variables share
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    if (entry.count_device != kHost) continue;
    entry.step = entry.raised(entry.completed());
    if (one_by_one) {
      const auto [before, is_first] = steps.emplace(entry.count, entry.step);
      if (!is_first) entry.step = before->second = entry.raised(before->second);
    }
    if (!(entry.step >= 1 && entry.step < 0x1p63) || entry.step != std::floor(entry.step)) {
      throw py::value_error(label(kSteps, i).text() + " must be a whole number >= 0; received " +
                            std::to_string(entry.completed()));
    }
  }
}

std::vector<Stepper::Part> Stepper::parts(const StepSettings& settings, bool one_by_one) {
  std::vector<Part> parts;  // one for each device, or each variable
  std::size_t i = 0;
  for (std::size_t group = 0; group < settings.sizes.size(); ++group) {
    for (const std::size_t end = i + settings.sizes[group]; i < end; ++i) {
      const Entry& entry = entries_[i];
      if (one_by_one) {  // each by itself has to be sound
        WrittenMemory written;
        entry.add_to(written, i);
        written.seal();
        std::size_t place = 0;
        written.require_readable(entry.grad(), label(kGrad, i), entry.param(), place);
      }
      auto part = std::find_if(parts.begin(), parts.end(), [&](const Part& other) {
        return !one_by_one && other.device == entry.device;
      });
      if (part == parts.end()) part = parts.insert(part, Part{.device = entry.device});
      part->add(entry, group, settings.groups[group]);
    }
  }
  return parts;
}

std::vector<std::size_t> Stepper::step(const py::tuple& arrays, StepSettings settings,
                                       bool is_strict) {
  const Busy busy(is_busy_);
  const std::size_t count =
      std::accumulate(settings.sizes.begin(), settings.sizes.end(), std::size_t{0});
  if (count * kNumRoles != arrays.size() || settings.sizes.size() != settings.groups.size()) {
    throw py::value_error(
        "sizes must have an entry for each of the " + std::to_string(settings.groups.size()) +
        " groups, which add up to a fifth of the " + std::to_string(arrays.size()) +
        " arrays; received a sum of " + std::to_string(count));
  }
  Leases leases;
  streams_.clear();
  if (entries_.size() != count) {
    written_is_current_ = false;
    entries_.resize(count);
  }
  std::vector<std::size_t> odd;
  for (std::size_t i = 0; i < count; ++i) {
    try {
      import(i, arrays, leases);
    } catch (const py::builtin_exception&) {
      if (is_strict) throw;
      odd.push_back(i);
    } catch (const py::error_already_set& error) {
      if (is_strict || !is_refusal(error)) throw;
      odd.push_back(i);
    }
  }
  if (!odd.empty()) return odd;
  import_numbers(settings, leases);

  const bool one_by_one = share_memory();
  number(one_by_one);
  std::vector<std::pair<int, Program>> programs;  // all of them are checked before the first runs
  for (const Part& part : parts(settings, one_by_one)) {
    const auto scale = loss_scales_.find(part.device);
    const Call call{.device = scale != loss_scales_.end() ? scale->second : DeviceLossScale{}};
    programs.emplace_back(part.device, make_program(part.variables, part.groups, call));
  }
  for (const auto& [device, program] : programs) {
    const auto [runner, _] = runners_.try_emplace(device, device, /*for_graphs=*/true);
    runner->second.run(program, streams_[device], leases);
  }
  std::vector<py::handle> written;
  for (std::size_t i = 0; i < count; ++i) {
    if (entries_[i].count_device == kHost) entries_[i].write_count();
    written.push_back(item(arrays, i, kParam));
  }
  note_written(written);
  return {};
}

}  // namespace adamax::bindings
