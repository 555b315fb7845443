// The variables of one optimizer, checked once; a step reads only their pointers again.
#include "bindings/plan.hpp"

#include <algorithm>

#include "bindings/busy.hpp"
#include "bindings/settings.hpp"
#include "bindings/without_gil.hpp"

namespace adamax::bindings {

Plan::Plan(const py::tuple& params, std::vector<std::string> names,
           const std::vector<std::uint32_t>& groups, const KeptLists& lists,
           WeightRounding rounding) {
  Leases leases;
  Streams streams;
  entries_.resize(params.size());
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    entry.param = params[i];
    entry.name = std::move(names.at(i));
    Buffer& param = entry.buffer;
    import_buffer(entry.param, label("variables", i), Access::kWrite, leases, param);
    require_dense(param, label("variables", i));
    require_same_device(param, label("variables", i), entries_[0].buffer, label("variables", 0));
    streams.add(param);
    index_by_identity_.emplace(entry.param.ptr(), i);
    has_versions_ = has_versions_ || has_version(entry.param);

    const Storage storage{param.dtype, param.dtype, StateFormat::kFull,
                          rounding_of(param.dtype, rounding, label("variables", i))};
    entry.variable = {.memory = {.param = param.data},
                      .size = param.size,
                      .storage = storage,
                      .group = groups.at(i),
                      .number = static_cast<std::uint32_t>(i)};
    for (int kind = 0; kind < kNumKept; ++kind) {
      if (!lists[kind].is_none()) entry.kept[kind].object = lists[kind][py::int_(i)];
    }
    refresh_kept(i, leases);
  }
  find_written_memory();
  runner_.emplace(entries_.empty() ? kHost : entries_[0].buffer.device);
  // The state may still be filled, on another stream than that of the first step.
  runner_->prepare(largest_program(), streams);
}

Plan::~Plan() {
  const WithoutGil released;  // a GPU may have to finish first
  runner_.reset();
}

// One that needs as much memory while it runs as any call.
Program Plan::largest_program() const {
  std::vector<Variable> variables;
  std::vector<Group> groups(1);
  for (const Entry& entry : entries_) {
    variables.push_back(entry.variable);
    variables.back().memory.grad = entry.variable.memory.param;
    groups.resize(std::max<std::size_t>(groups.size(), entry.variable.group + 1));
  }
  return make_program(variables, groups, {.clip = {ClipRule::kNorm, 1.0}, .require_finite = true});
}

std::vector<bool> Plan::accumulated() {
  const Busy busy(is_busy_);
  std::vector<bool> result;
  for (const Entry& entry : entries_) result.push_back(entry.variable.has_accumulated);
  return result;
}

void Plan::set_accumulated(const std::vector<bool>& accumulated) {
  const Busy busy(is_busy_);
  if (accumulated.size() != entries_.size()) {
    throw py::value_error("accumulated must have " + std::to_string(entries_.size()) +
                          " entries; received " + std::to_string(accumulated.size()));
  }
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    entries_[i].variable.has_accumulated = accumulated[i];
  }
}

int Plan::traverse(visitproc visit, void* arg) const {
  for (const Entry& entry : entries_) {
    Py_VISIT(entry.param.ptr());
    for (const KeptArray& kept : entry.kept) Py_VISIT(kept.object.ptr());
  }
  return 0;
}

void Plan::clear() {
  entries_.clear();
  index_by_identity_.clear();
  index_by_memory_.clear();
}

void Plan::find_written_memory() {
  WrittenMemory written;
  index_by_memory_.clear();
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const Buffer& param = entries_[i].buffer;
    index_by_memory_.emplace(std::pair(param.data, param.bytes()), i);
    written.add(param.data, param.bytes(), label("variables", i));
    for (int kind = 0; kind < kNumKept; ++kind) {
      const std::span<const char> memory = entries_[i].kept[kind].memory;
      written.add(memory.data(), memory.size(), label(kKeptNames[kind], i));
    }
  }
  written.seal();
  written_ = std::move(written);
  written_is_current_ = true;
}

// Memory may have moved (a tensor that was given new data) or been closed since the last step.
void Plan::refresh(Leases& leases, Streams& streams) {
  Buffer now;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    const Buffer& planned = entry.buffer;
    import_buffer(entry.param, label("variables", i), Access::kWrite, leases, now, planned.data);
    if (now.dtype != planned.dtype) {
      throw py::type_error(label("variables", i).text() + " has dtype " +
                           std::string(dtype_name(now.dtype)) + "; the optimizer was built with " +
                           std::string(dtype_name(planned.dtype)));
    }
    require_same_layout(now, label("variables", i), planned,
                        {"the variable at build", -1, nullptr});
    streams.add(now);
    if (planned.device != kHost) refresh_kept(i, leases);
    if (now.data == planned.data) continue;
    written_is_current_ = false;  // also if a later variable is refused
    entry.buffer.data = now.data;
    entry.variable.memory.param = now.data;
  }
  if (!written_is_current_) find_written_memory();
}

void Plan::refresh_kept(std::size_t i, Leases& leases) {
  Entry& entry = entries_[i];
  Buffer now;
  for (int kind = 0; kind < kNumKept; ++kind) {
    KeptArray& kept = entry.kept[kind];
    if (!import_kept(static_cast<Kept>(kind), kept.object, label(kKeptNames[kind], i), entry.buffer,
                     label("variables", i), entry.variable, leases, now)) {
      continue;
    }
    const std::span<const char> before = kept.memory;
    kept.memory = now.memory();
    if (kept.memory.data() != before.data() || kept.memory.size() != before.size()) {
      written_is_current_ = false;
    }
  }
}

std::optional<std::size_t> Plan::find_object(py::handle variable, std::size_t position) const {
  if (position < entries_.size() && entries_[position].param.is(variable)) return position;
  const auto found = index_by_identity_.find(variable.ptr());
  return found == index_by_identity_.end() ? std::nullopt : std::optional(found->second);
}

std::size_t Plan::find_memory(py::handle variable, std::size_t position,
                              std::span<const py::handle> taken, Leases& leases) const {
  const Label passed{"variables", static_cast<py::ssize_t>(position), nullptr};
  Buffer buffer;
  import_buffer(variable, passed, Access::kWrite, leases, buffer);
  const std::pair<const char*, std::size_t> key{buffer.data, buffer.bytes()};
  std::optional<std::size_t> found;
  // Empty arrays can share an address; then any one of that shape will do that is left.
  const auto is_found = [&](std::size_t i) {
    const Buffer& known = entries_[i].buffer;
    if (buffer.size == 0 && !(known.layout == buffer.layout)) return false;
    found = i;
    return taken.empty() || !taken[i];
  };
  if (position < entries_.size() && entries_[position].buffer.data == key.first &&
      entries_[position].buffer.bytes() == key.second && is_found(position)) {
    return position;
  }
  const auto [begin, end] = index_by_memory_.equal_range(key);
  std::find_if(begin, end, [&](const auto& item) { return is_found(item.second); });
  if (found) return *found;
  throw py::value_error(passed.text() +
                        " is not one of the variables that the optimizer was built with; make a "
                        "new optimizer for new variables");
}

// Null for a variable that is not part of the call.
std::vector<py::handle> Plan::gradients_by_variable(const py::tuple& grads,
                                                    const std::optional<py::tuple>& variables,
                                                    Leases& leases) {
  std::vector<py::handle> ordered(entries_.size());
  const auto expect = [&grads](std::size_t expected, const char* what) {
    if (grads.size() == expected) return;
    throw py::value_error("grads has " + std::to_string(grads.size()) + " entries; expected " +
                          std::to_string(expected) + ", one for each of the " + what);
  };
  const auto item = [](const py::tuple& tuple, std::size_t i) {
    return py::handle(PyTuple_GET_ITEM(tuple.ptr(), static_cast<py::ssize_t>(i)));
  };
  if (!variables) {
    expect(entries_.size(), "variables that the optimizer was built with");
    for (std::size_t i = 0; i < ordered.size(); ++i) ordered[i] = item(grads, i);
    return ordered;
  }
  expect(variables->size(), "variables passed with it");
  const auto take = [&](std::size_t k, std::size_t i) {
    if (ordered[i]) {
      throw py::value_error("variables[" + std::to_string(k) + "] is variable '" +
                            entries_[i].name + "', which was passed before; expected it once");
    }
    ordered[i] = item(grads, k);
  };
  std::vector<std::size_t> others;  // no view takes what is passed itself
  for (std::size_t k = 0; k < grads.size(); ++k) {
    const std::optional<std::size_t> i = find_object(item(*variables, k), k);
    i ? take(k, *i) : others.push_back(k);
  }
  for (const std::size_t k : others) take(k, find_memory(item(*variables, k), k, ordered, leases));
  return ordered;
}

void Plan::import_gradient(std::size_t i, py::handle grad, Leases& leases, Streams& streams) {
  Entry& entry = entries_[i];
  Buffer buffer;
  import_buffer(grad, label("grads", i), Access::kRead, leases, buffer);
  require_pair(entry.buffer, label("variables", i), buffer, label("grads", i));
  require_same_layout(buffer, label("grads", i), entry.buffer, label("variables", i));
  written_.require_readable(buffer.memory(), label("grads", i), entry.buffer.memory(),
                            entry.gradient_place);
  streams.add(buffer);
  variables_[i].storage.grad = buffer.dtype;
  variables_[i].memory.grad = buffer.data;
}

void Plan::note_done(const Program& program) {
  std::vector<py::handle> written;
  for (const Row& row : program.rows) {
    Entry& entry = entries_[row.variable];
    if (row.operation == Operation::kAccumulate) entry.variable.has_accumulated = true;
    if (row.operation == Operation::kUpdate) entry.variable.has_accumulated = false;
    const bool is_written =
        row.operation == Operation::kUpdate ||
        (row.operation == Operation::kAverage && program.groups[row.group].overwrite);
    if (has_versions_ && is_written) written.push_back(entry.param);
  }
  note_written(written);
}

bool Plan::step(const py::tuple& grads, const std::optional<py::tuple>& variables,
                const std::vector<Group>& groups, Call call) {
  const Busy busy(is_busy_);
  Leases leases;
  Streams streams;
  refresh(leases, streams);
  const std::vector<py::handle> gradients = gradients_by_variable(grads, variables, leases);
  std::string skipped;
  bool has_gradient = false;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (!gradients[i]) continue;
    if (!gradients[i].is_none()) {
      has_gradient = true;
    } else {
      skipped += (skipped.empty() ? "'" : ", '") + entries_[i].name + "'";
    }
  }
  if (!has_gradient) {
    throw py::value_error("grads has no gradient for any variable: every entry is None");
  }
  if (!skipped.empty()) {
    // Before anything is written: the warning may be an error. It runs Python, which can move what
    // was imported.
    if (PyErr_WarnEx(PyExc_UserWarning,
                     ("no gradient for " + skipped + ": skipped in this call").c_str(), 4) != 0) {
      throw py::error_already_set();
    }
    refresh(leases, streams);
  }
  variables_.clear();
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    variables_.push_back(entries_[i].variable);
    if (gradients[i] && !gradients[i].is_none()) {
      import_gradient(i, gradients[i], leases, streams);
    }
  }
  const Program program = make_program(variables_, groups, call);
  if (!runner_->run(program, streams, leases).is_finite) return false;
  // Here, and not in Python, where an interrupt could come between the step and its count.
  ++calls;
  note_done(program);
  return true;
}

void Plan::finalize(const std::optional<py::tuple>& variables) {
  const Busy busy(is_busy_);
  Leases leases;
  Streams streams;
  refresh(leases, streams);
  std::vector<bool> is_chosen(entries_.size(), !variables);
  for (std::size_t k = 0; variables && k < variables->size(); ++k) {
    const py::object variable = (*variables)[k];
    const std::optional<std::size_t> i = find_object(variable, k);
    is_chosen[i ? *i : find_memory(variable, k, {}, leases)] = true;
  }
  variables_.clear();
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    Variable variable = entries_[i].variable;
    variable.group = 0;
    if (!is_chosen[i]) variable.memory.average = nullptr;
    variables_.push_back(variable);
  }
  const Group unused;
  const Program program = make_program(variables_, {&unused, 1}, {.phase = Phase::kFinalize});
  runner_->run(program, streams, leases);
  note_done(program);
}

}  // namespace adamax::bindings
