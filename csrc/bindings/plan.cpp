// The variables of one optimizer, checked once; a step reads only their pointers again.
#include "bindings/plan.hpp"

#include <array>

namespace adamax::bindings {
namespace {

constexpr std::array<std::string_view, 4> kStateRoles = {"momentum", "norm", "average",
                                                         "gradient_accumulator"};

}  // namespace

Plan::Plan(const py::sequence& params, std::vector<std::string> names, const py::sequence& momentum,
           const py::sequence& norm, const py::object& averages, const py::object& accumulators,
           const std::vector<bool>& decays) {
  Leases leases;
  entries_.resize(params.size());
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    entry.param = params[i];
    entry.name = std::move(names.at(i));
    Buffer& param = entry.buffer;
    import_buffer(entry.param, label("variables", i), Access::kWrite, leases, param);
    require_dense(param, label("variables", i));
    require_same_device(param, label("variables", i), entries_[0].buffer, label("variables", 0));
    index_by_identity_.emplace(entry.param.ptr(), i);

    const auto item = [i](const py::object& list) {
      return list.is_none() ? py::object(py::none()) : py::object(list[py::int_(i)]);
    };
    const py::object state[4] = {momentum[i], norm[i], item(averages), item(accumulators)};
    char* data[4] = {};
    for (int s = 0; s < 4; ++s) {
      if (state[s].is_none()) continue;
      Buffer buffer;
      import_buffer(state[s], label(kStateRoles[s], i), Access::kWrite, leases, buffer);
      require_state_dtype(buffer, label(kStateRoles[s], i), param.dtype);
      require_same_layout(buffer, label(kStateRoles[s], i), param, label("variables", i));
      data[s] = buffer.data;
    }
    entry.variable = {param.dtype, param.dtype, param.size, param.data, nullptr,
                      data[0],     data[1],     data[2],    data[3],    decays.at(i)};
  }
  find_written_memory();
  if (!entries_.empty()) device_ = entries_[0].buffer.device;
  if (device_ != kHost) workspace_.reset(cuda_api().make_workspace(device_));
}

void Plan::find_written_memory() {
  WrittenMemory written;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const Variable& v = entries_[i].variable;
    written.add(v.param, entries_[i].buffer.bytes(), label("variables", i));
    const std::size_t bytes = v.size * itemsize(compute_dtype(v.param_dtype));
    void* const state[4] = {v.momentum, v.norm, v.average, v.accumulator};
    for (int s = 0; s < 4; ++s) {
      if (state[s] != nullptr) written.add(state[s], bytes, label(kStateRoles[s], i));
    }
  }
  written.seal();
  written_ = std::move(written);
  written_is_current_ = true;
}

// A parameter may have moved (a tensor that was given new data) or been closed since the last step.
void Plan::refresh_parameters(Leases& leases, Streams& streams) {
  Buffer now;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    import_buffer(entry.param, label("variables", i), Access::kWrite, leases, now);
    const Buffer& planned = entry.buffer;
    if (now.dtype != planned.dtype) {
      throw py::type_error(label("variables", i).text() + " has dtype " +
                           std::string(dtype_name(now.dtype)) + "; the optimizer was built with " +
                           std::string(dtype_name(planned.dtype)));
    }
    require_same_layout(now, label("variables", i), planned,
                        {"the variable at build", -1, nullptr});
    streams.add(now);
    if (now.data == planned.data) continue;
    written_is_current_ = false;  // also if a later variable is refused
    entry.buffer.data = now.data;
    entry.variable.param = now.data;
  }
  if (!written_is_current_) find_written_memory();
}

std::size_t Plan::index_of(py::handle variable, std::size_t position, Leases& leases) {
  if (position < entries_.size() && entries_[position].param.is(variable)) return position;
  const auto found = index_by_identity_.find(variable.ptr());
  if (found != index_by_identity_.end()) return found->second;
  // Another object for the same memory, such as a view.
  const Label passed{"variables", static_cast<py::ssize_t>(position), nullptr};
  Buffer buffer;
  import_buffer(variable, passed, Access::kWrite, leases, buffer);
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const Buffer& known = entries_[i].buffer;
    if (known.size > 0 && known.data == buffer.data && known.bytes() == buffer.bytes()) return i;
  }
  throw py::value_error(passed.text() +
                        " is not one of the variables that the optimizer was built with; make a "
                        "new optimizer for new variables");
}

std::vector<py::object> Plan::gradients_by_variable(const py::sequence& grads,
                                                    const py::object& variables, Leases& leases) {
  std::vector<py::object> ordered(entries_.size());
  const py::ssize_t count = PySequence_Size(grads.ptr());
  const auto expect = [count](std::size_t expected, const char* what) {
    if (static_cast<std::size_t>(count) == expected) return;
    throw py::value_error("grads has " + std::to_string(count) + " entries; expected " +
                          std::to_string(expected) + ", one for each of the " + what);
  };
  if (variables.is_none()) {
    expect(entries_.size(), "variables that the optimizer was built with");
    // Itself if it is a list or a tuple, whose items come without a call.
    const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(grads.ptr(), "grads"));
    if (!items) throw py::error_already_set();
    PyObject* const* const first = PySequence_Fast_ITEMS(items.ptr());
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      ordered[i] = py::reinterpret_borrow<py::object>(first[i]);
    }
    return ordered;
  }
  const auto passed = py::reinterpret_borrow<py::sequence>(variables);
  expect(passed.size(), "variables passed with it");
  for (py::ssize_t k = 0; k < count; ++k) {
    const std::size_t i = index_of(py::object(passed[k]), k, leases);
    if (ordered[i]) {
      throw py::value_error("variables[" + std::to_string(k) + "] is variable '" +
                            entries_[i].name + "', which was passed before; expected it once");
    }
    ordered[i] = grads[k];
  }
  return ordered;
}

void Plan::import_gradient(std::size_t i, py::handle grad, Leases& leases, Streams& streams) {
  Entry& entry = entries_[i];
  Buffer buffer;
  import_buffer(grad, label("grads", i), Access::kRead, leases, buffer);
  require_pair(entry.buffer.dtype, buffer.dtype, label("variables", i), label("grads", i));
  require_same_layout(buffer, label("grads", i), entry.buffer, label("variables", i));
  written_.require_readable(buffer, label("grads", i), entry.buffer, entry.gradient_place);
  streams.add(buffer);
  variables_[i].grad_dtype = buffer.dtype;
  // An empty array may have a null pointer, which would stand for a skipped variable; with no
  // elements it makes no difference.
  variables_[i].grad = buffer.data;
}

bool Plan::step(const py::sequence& grads, const py::object& variables,
                const Hyperparameters& hyperparameters, const Call& call) {
  Leases leases;
  Streams streams;
  refresh_parameters(leases, streams);
  const std::vector<py::object> gradients = gradients_by_variable(grads, variables, leases);
  variables_.clear();
  std::string skipped;
  bool has_gradient = false;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    variables_.push_back(entries_[i].variable);
    const py::object& grad = gradients[i];
    if (!grad) continue;  // not among the variables of this call
    if (grad.is_none()) {
      skipped += (skipped.empty() ? "'" : ", '") + entries_[i].name + "'";
      continue;
    }
    import_gradient(i, grad, leases, streams);
    has_gradient = true;
  }
  if (!has_gradient) {
    throw py::value_error("grads has no gradient for any variable: every entry is None");
  }
  // Before anything is written: the warning may be an error.
  if (!skipped.empty() &&
      PyErr_WarnEx(PyExc_UserWarning,
                   ("no gradient for " + skipped + ": skipped in this call").c_str(), 4) != 0) {
    throw py::error_already_set();
  }
  bool applied;
  {
    const py::gil_scoped_release release;
    if (device_ == kHost) {
      applied = adamax::step(variables_, hyperparameters, call);
    } else {
      const cuda::Queue queue = streams.queue(device_);
      applied = cuda_api().step(queue, *workspace_, variables_, hyperparameters, call);
      if (leases.needs_synchronization) cuda_api().synchronize(queue);
    }
  }
  // Here, and not in Python, where an interrupt could come between the step and its count.
  calls += applied;
  return applied;
}

void Plan::overwrite(const py::object& variables) {
  Leases leases;
  Streams streams;
  refresh_parameters(leases, streams);
  std::vector<Variable> chosen;
  if (variables.is_none()) {
    for (const Entry& entry : entries_) chosen.push_back(entry.variable);
  } else {
    const auto passed = py::reinterpret_borrow<py::sequence>(variables);
    for (std::size_t k = 0; k < passed.size(); ++k) {
      chosen.push_back(entries_[index_of(py::object(passed[k]), k, leases)].variable);
    }
  }
  const py::gil_scoped_release release;
  if (device_ == kHost) {
    adamax::overwrite_with_averages(chosen);
  } else {
    const cuda::Queue queue = streams.queue(device_);
    cuda_api().overwrite_with_averages(queue, chosen);
    if (leases.needs_synchronization) cuda_api().synchronize(queue);
  }
}

}  // namespace adamax::bindings
