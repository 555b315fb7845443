// Calls without an optimizer: a step on the caller's buffers, norms, copies, descriptions.
#include "bindings/calls.hpp"

#include <algorithm>
#include <vector>

#include "bindings/backend.hpp"
#include "bindings/buffer.hpp"
#include "bindings/overlap.hpp"

namespace adamax::bindings {

void update(const py::object& param, const py::object& grad, const py::object& m,
            const py::object& u, const py::object& average, const Group& group, double grad_scale) {
  Leases leases;
  Streams streams;
  WrittenMemory written;
  std::vector<py::handle> objects;
  Buffer w, buffer;
  const auto import_written = [&](const py::object& object, const Label& label) -> void* {
    import_buffer(object, label, Access::kWrite, leases, buffer);
    if (!objects.empty()) {
      require_state_dtype(buffer, label, w);
      require_same_layout(buffer, label, w, {"param"});
    }
    written.add(buffer.data, buffer.bytes(), label);
    streams.add(buffer);
    objects.push_back(object);
    return buffer.data;
  };
  Variable variable{};
  variable.memory.param = import_written(param, {"param"});
  w = buffer;
  require_dense(w, {"param"});
  variable.memory.momentum = import_written(m, {"m"});
  variable.memory.norm = import_written(u, {"u"});
  if (!average.is_none()) variable.memory.average = import_written(average, {"average"});
  written.seal();
  import_buffer(grad, {"grad"}, Access::kRead, leases, buffer);
  require_pair(w, {"param"}, buffer, {"grad"});
  require_same_layout(buffer, {"grad"}, w, {"param"});
  std::size_t place = 0;
  written.require_readable(buffer.memory(), {"grad"}, w.memory(), place);
  streams.add(buffer);
  variable.memory.grad = buffer.data;
  variable.size = w.size;
  variable.storage = {w.dtype, buffer.dtype};

  const Program program = make_program({&variable, 1}, {&group, 1}, Call{.grad_scale = grad_scale});
  run_once(w.device, program, streams, leases);
  note_written(objects);
}

double norm_of_buffers(const py::tuple& buffers) {
  Leases leases;
  std::vector<ConstBuffer> imported;
  Streams streams;
  Buffer buffer, first;
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    const Label label{"buffers", static_cast<py::ssize_t>(i)};
    import_buffer(py::object(buffers[i]), label, Access::kRead, leases, buffer);
    require_dense(buffer, label);
    if (i == 0) first = buffer;
    require_same_device(buffer, label, first, {"buffers", 0});
    streams.add(buffer);
    imported.push_back({buffer.dtype, buffer.size, buffer.data});
  }
  return run_once(first.device, make_norm_program(imported), streams, leases).norm;
}

void copy(const py::object& to, const py::object& from) {
  Leases leases;
  Buffer target, source;
  const Label labels[2] = {{"to"}, {"from"}};
  import_buffer(to, labels[0], Access::kWrite, leases, target);
  import_buffer(from, labels[1], Access::kRead, leases, source);
  if (target.dtype != source.dtype) {
    throw py::type_error("from has dtype " + std::string(dtype_name(source.dtype)) +
                         "; expected the " + std::string(dtype_name(target.dtype)) + " of to");
  }
  Streams streams;
  streams.add(target);
  streams.add(source);
  const int device = std::max(target.device, source.device);
  source.device = target.device;  // the one thing in which they may differ
  require_same_layout(source, labels[1], target, labels[0]);
  require_dense(target, labels[0]);
  const Backend& backend = backend_of(device);
  const py::gil_scoped_release release;
  backend.copy(streams.queue(device), target.data, source.data, target.bytes());
}

py::tuple describe(const py::object& object, const std::string& role, py::ssize_t index) {
  Leases leases;
  Buffer buffer;
  const Label label{role, index};
  import_buffer(object, label, Access::kRead, leases, buffer);
  require_dense(buffer, label);
  const auto list = [&](const std::int64_t* values) {
    py::tuple result(buffer.layout.axes);
    for (int i = 0; i < buffer.layout.axes; ++i) result[i] = values[i];
    return result;
  };
  return py::make_tuple(
      list(buffer.layout.shape), list(buffer.layout.strides), std::string(dtype_name(buffer.dtype)),
      std::string(dtype_name(compute_dtype(buffer.dtype))),
      reinterpret_cast<std::uintptr_t>(buffer.data), buffer.bytes(), buffer.device);
}

}  // namespace adamax::bindings
