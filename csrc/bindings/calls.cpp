// Calls without an optimizer: a step on the caller's buffers, norms, copies, descriptions.
#include "bindings/calls.hpp"

#include <algorithm>
#include <vector>

#include "bindings/backend.hpp"
#include "bindings/buffer.hpp"
#include "bindings/kept.hpp"
#include "bindings/overlap.hpp"
#include "bindings/settings.hpp"
#include "bindings/without_gil.hpp"

namespace adamax::bindings {

void update(const UpdateBuffers& buffers, const Group& group, double grad_scale,
            WeightRounding rounding, const VariablePlace& place) {
  Leases leases;
  Streams streams;
  WrittenMemory written;
  std::vector<py::handle> objects;
  Buffer w, buffer;
  const auto note = [&](const py::object& object, const Label& label) {
    written.add(buffer.data, buffer.bytes(), label);
    streams.add(buffer);
    objects.push_back(object);
  };
  Variable variable{};
  import_buffer(buffers.param, {"param"}, Access::kWrite, leases, w);
  require_dense(w, {"param"});
  buffer = w;
  note(buffers.param, {"param"});
  variable.memory.param = w.data;
  variable.size = w.size;
  variable.storage = {w.dtype, w.dtype};
  variable.storage.rounding = rounding_of(w.dtype, rounding, {"param"});
  variable.number = place.number;
  variable.first_element = place.first_element;
  const auto import = [&](Kept kind, const py::object& object, std::string_view name) {
    if (import_kept(kind, object, {name}, w, {"param"}, variable, leases, buffer)) {
      note(object, {name});
    }
  };
  import(Kept::kMomentum, buffers.m, "m");
  import(Kept::kNorm, buffers.u, "u");
  import(Kept::kAverage, buffers.average, "average");
  import(Kept::kNormScale, buffers.norm_scale, "norm_scale");
  import(Kept::kRemainder, buffers.remainder, "remainder");
  written.seal();

  import_buffer(buffers.grad, {"grad"}, Access::kRead, leases, buffer);
  require_pair(w, {"param"}, buffer, {"grad"});
  require_same_layout(buffer, {"grad"}, w, {"param"});
  std::size_t grad_place = 0;
  written.require_readable(buffer.memory(), {"grad"}, w.memory(), grad_place);
  streams.add(buffer);
  variable.memory.grad = buffer.data;
  variable.storage.grad = buffer.dtype;

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
  import_state(to, labels[0], Access::kWrite, leases, target);
  import_state(from, labels[1], Access::kRead, leases, source);
  const bool are_halves = holds_bfloat16(target) && holds_bfloat16(source);
  if (target.dtype != source.dtype && !are_halves) {
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
  const WithoutGil released;
  backend.copy(streams.queue(device), target.data, source.data, target.bytes());
}

py::tuple describe(const py::object& object, const std::string& role, py::ssize_t index) {
  Leases leases;
  Buffer buffer;
  const Label label{role, index};
  import_state(object, label, Access::kRead, leases, buffer);
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
