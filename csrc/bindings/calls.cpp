// Calls without an optimizer: a step on the caller's buffers, norms, copies, descriptions.
#include "bindings/calls.hpp"

#include <algorithm>
#include <vector>

#include "bindings/backend.hpp"
#include "bindings/buffer.hpp"
#include "bindings/overlap.hpp"
#include "bindings/settings.hpp"

namespace adamax::bindings {

void update(const UpdateBuffers& buffers, const Group& group, double grad_scale,
            const py::object& rounding, const VariablePlace& place) {
  Leases leases;
  Streams streams;
  WrittenMemory written;
  std::vector<py::handle> objects;
  Buffer w, buffer;
  const auto note = [&](const py::object& object, const Label& label) -> void* {
    written.add(buffer.data, buffer.bytes(), label);
    streams.add(buffer);
    objects.push_back(object);
    return buffer.data;
  };
  Variable variable{};
  Arrays& memory = variable.memory;
  import_buffer(buffers.param, {"param"}, Access::kWrite, leases, w);
  require_dense(w, {"param"});
  buffer = w;
  memory.param = note(buffers.param, {"param"});
  variable.size = w.size;
  variable.storage = {w.dtype, w.dtype};
  variable.storage.rounding = weight_rounding(rounding, w.dtype, {"param"});
  variable.number = place.number;
  variable.first_element = place.first_element;

  StateFormat& format = variable.storage.state;
  // What has an element for each of the parameter.
  const auto import_like_param = [&](const py::object& object, const Label& label,
                                     const auto& check) {
    import_state(object, label, leases, buffer);
    check(label);
    require_same_layout(buffer, label, w, {"param"});
    return note(object, label);
  };
  memory.momentum = import_like_param(
      buffers.m, {"m"}, [&](const Label& label) { format = state_format(buffer, label, w); });
  memory.norm = import_like_param(
      buffers.u, {"u"}, [&](const Label& label) { require_norm(buffer, label, w, format); });
  if (!buffers.average.is_none()) {
    memory.average = import_like_param(buffers.average, {"average"}, [&](const Label& label) {
      require_computed(buffer, label, w);
    });
  }
  // What is there if, and only if, it is needed.
  const auto require_given = [](const py::object& object, const char* name, bool is_needed,
                                const std::string& where) {
    if (object.is_none() != is_needed) return is_needed;
    throw py::value_error(std::string(name) + " must be " + (is_needed ? "given" : "None") +
                          " where " + where + "; received " + (is_needed ? "None" : "a buffer"));
  };
  const bool is_full = format == StateFormat::kFull;
  if (require_given(buffers.norm_scale, "norm_scale", !is_full,
                    is_full ? "m and u are not in fewer bits" : "m and u are in 16 or 8 bits")) {
    import_state(buffers.norm_scale, {"norm_scale"}, leases, buffer);
    require_norm_scale(buffer, {"norm_scale"}, w, format);
    memory.norm_scale = static_cast<float*>(note(buffers.norm_scale, {"norm_scale"}));
  }
  const bool has_remainder = variable.storage.rounding == WeightRounding::kRemainder;
  if (require_given(
          buffers.remainder, "remainder", has_remainder,
          has_remainder ? "weight_rounding is 'remainder'" : "no remainder of param is kept")) {
    memory.remainder = import_like_param(buffers.remainder, {"remainder"}, [&](const Label& label) {
      require_remainder(buffer, label, w);
    });
  }
  written.seal();

  import_buffer(buffers.grad, {"grad"}, Access::kRead, leases, buffer);
  require_pair(w, {"param"}, buffer, {"grad"});
  require_same_layout(buffer, {"grad"}, w, {"param"});
  std::size_t grad_place = 0;
  written.require_readable(buffer.memory(), {"grad"}, w.memory(), grad_place);
  streams.add(buffer);
  memory.grad = buffer.data;
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
