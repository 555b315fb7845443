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

// The groups of a call: settings with a step number.
class NumberedGroups {
 public:
  explicit NumberedGroups(const std::vector<Group>& settings) : settings_(settings) {}

  // The position of a group. Those with the same settings are best asked for together.
  std::uint32_t with(std::size_t settings, std::int64_t step) {
    if (groups_.empty() || settings != last_settings_) {
      last_settings_ = settings;
      by_step_.clear();
    } else if (groups_.back().step == step) {
      return static_cast<std::uint32_t>(groups_.size() - 1);
    }
    const auto [found, is_new] = by_step_.emplace(step, groups_.size());
    if (is_new) {
      groups_.push_back(settings_.at(settings));
      groups_.back().step = step;
    }
    return found->second;
  }

  const std::vector<Group>& groups() const { return groups_; }

 private:
  const std::vector<Group>& settings_;
  std::vector<Group> groups_;
  std::size_t last_settings_ = 0;
  std::unordered_map<std::int64_t, std::uint32_t> by_step_;  // of the last settings
};

}  // namespace

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
  require_same_device(buffer, count_label, {}, {"the host"});
  if (buffer.size != 1 || compute_dtype(buffer.dtype) != buffer.dtype) {
    throw py::value_error(count_label.text() + " has " + std::to_string(buffer.size) +
                          " elements of " + std::string(dtype_name(buffer.dtype)) +
                          "; expected one, of float32 or float64");
  }
  entry.count_dtype = buffer.dtype;
  place(entry.count, buffer);
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

// Everything is checked here, before the first of it runs.
std::vector<Stepper::Work> Stepper::plan_work(const std::vector<std::size_t>& sizes,
                                              const std::vector<Group>& settings, bool one_by_one) {
  NumberedGroups groups(settings);
  std::vector<std::pair<int, std::vector<Variable>>> parts;  // a device each, or a variable each
  std::unordered_map<const void*, double> steps;  // of counts that are shared, one by one
  std::size_t i = 0;
  for (std::size_t group = 0; group < sizes.size(); ++group) {
    for (const std::size_t end = i + sizes[group]; i < end; ++i) {
      Entry& entry = entries_.at(i);
      entry.step = entry.raised(entry.completed());
      if (one_by_one) {
        const auto [before, is_first] = steps.emplace(entry.count, entry.step);
        if (!is_first) entry.step = before->second = entry.raised(before->second);
        WrittenMemory written;
        entry.add_to(written, i);
        written.seal();
        std::size_t place = 0;
        written.require_readable(entry.grad(), label(kGrad, i), entry.param(), place);
      }
      if (!(entry.step >= 1 && entry.step < 0x1p63) || entry.step != std::floor(entry.step)) {
        throw py::value_error(label(kSteps, i).text() + " must be a whole number >= 0; received " +
                              std::to_string(entry.completed()));
      }
      Variable variable = entry.variable;
      variable.group = groups.with(group, static_cast<std::int64_t>(entry.step));
      const auto same_device = [&](const auto& part) { return part.first == entry.device; };
      auto part = one_by_one ? parts.end() : std::find_if(parts.begin(), parts.end(), same_device);
      if (part == parts.end()) {
        parts.push_back({entry.device, {}});
        part = parts.end() - 1;
      }
      part->second.push_back(variable);
    }
  }
  std::vector<Work> work;
  for (const auto& [device, variables] : parts) {
    work.push_back({device, make_program(variables, groups.groups(), {})});
  }
  return work;
}

std::vector<std::size_t> Stepper::step(const py::tuple& arrays,
                                       const std::vector<std::size_t>& sizes,
                                       const std::vector<Group>& groups, bool is_strict) {
  const Busy busy(is_busy_);
  const std::size_t count = arrays.size() / kNumRoles;
  if (std::accumulate(sizes.begin(), sizes.end(), std::size_t{0}) * kNumRoles != arrays.size() ||
      sizes.size() != groups.size()) {
    throw py::value_error(
        "sizes must have an entry for each of the " + std::to_string(groups.size()) +
        " groups, which add up to a fifth of the " + std::to_string(arrays.size()) + " arrays");
  }
  Leases leases;
  streams_.clear();
  if (entries_.size() != count) {
    written_is_current_ = false;
    entries_.resize(count);
  }
  std::vector<std::size_t> odd;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
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

  for (const Work& work : plan_work(sizes, groups, share_memory())) {
    runners_.try_emplace(work.device, work.device)
        .first->second.run(work.program, streams_[work.device], leases);
  }
  std::vector<py::handle> written;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    entries_[i].write_count();
    written.push_back(item(arrays, i, kParam));
  }
  note_written(written);
  return {};
}

}  // namespace adamax::bindings
