// The Python module _core: the plan of an optimizer, one-off steps, norms, ISA and thread control.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "adamax/adamax.hpp"
#include "bindings/buffer.hpp"
#include "bindings/gpu.hpp"
#include "bindings/overlap.hpp"
#include "bindings/plan.hpp"
#include "cpu/cpu_limit.hpp"
#include "cpu/fp_mode.hpp"
#include "cpu/parallel.hpp"

namespace adamax::bindings {
namespace {

// One step on buffers that the caller owns.
void update(const py::object& param, const py::object& grad, const py::object& m,
            const py::object& u, std::int64_t step, double learning_rate, double beta_1,
            double beta_2, double epsilon, double weight_decay, bool l2_decay, bool epsilon_inside,
            double grad_scale, std::optional<double> clipvalue, const py::object& average,
            double ema_momentum) {
  Hyperparameters h;
  h.learning_rate = learning_rate;
  h.beta_1 = beta_1;
  h.beta_2 = beta_2;
  h.epsilon = epsilon;
  h.weight_decay = weight_decay;
  h.decay = l2_decay ? Decay::kL2 : Decay::kDecoupled;
  h.epsilon_mode = epsilon_inside ? EpsilonMode::kInside : EpsilonMode::kOutside;
  h.clipvalue = clipvalue;
  h.ema_momentum = ema_momentum;
  Call call;
  call.step = step;
  call.grad_scale = grad_scale;

  Leases leases;
  WrittenMemory written;
  Buffer buffers[5];  // param, then the state
  const Label labels[5] = {{"param"}, {"m"}, {"u"}, {"average"}, {"grad"}};
  import_buffer(param, labels[0], Access::kWrite, leases, buffers[0]);
  require_dense(buffers[0], labels[0]);
  written.add(buffers[0].data, buffers[0].bytes(), labels[0]);
  const py::object* const state[3] = {&m, &u, &average};
  void* data[3] = {};
  for (int s = 0; s < 3; ++s) {
    if (s == 2 && average.is_none()) continue;
    Buffer& buffer = buffers[s + 1];
    import_buffer(*state[s], labels[s + 1], Access::kWrite, leases, buffer);
    require_state_dtype(buffer, labels[s + 1], buffers[0].dtype);
    require_same_layout(buffer, labels[s + 1], buffers[0], labels[0]);
    written.add(buffer.data, buffer.bytes(), labels[s + 1]);
    data[s] = buffer.data;
  }
  written.seal();
  Buffer& gradient = buffers[4];
  import_buffer(grad, labels[4], Access::kRead, leases, gradient);
  require_pair(buffers[0].dtype, gradient.dtype, labels[0], labels[4]);
  require_same_layout(gradient, labels[4], buffers[0], labels[0]);
  std::size_t place = 0;
  written.require_readable(gradient, labels[4], buffers[0], place);

  const Variable variable{buffers[0].dtype, gradient.dtype, buffers[0].size, buffers[0].data,
                          gradient.data,    data[0],        data[1],         data[2]};
  const int device = buffers[0].device;
  if (device == kHost) {
    const py::gil_scoped_release release;
    adamax::step({&variable, 1}, h, call);
    return;
  }
  Streams streams;
  for (const Buffer& buffer : buffers) streams.add(buffer);
  const cuda::Queue queue = streams.queue(device);
  const cuda::Api& api = cuda_api();
  const std::unique_ptr<cuda::Workspace> workspace(api.make_workspace(device));
  const py::gil_scoped_release release;
  api.step(queue, *workspace, {&variable, 1}, h, call);
  if (leases.needs_synchronization) api.synchronize(queue);
}

double norm_of_buffers(const py::iterable& buffers) {
  Leases leases;
  const py::list objects(buffers);  // holds them while the GIL is released
  std::vector<ConstBuffer> imported;
  Streams streams;
  Buffer buffer, first;
  for (std::size_t i = 0; i < objects.size(); ++i) {
    const Label label{"buffers", static_cast<py::ssize_t>(i)};
    import_buffer(py::object(objects[i]), label, Access::kRead, leases, buffer);
    require_dense(buffer, label);
    if (i == 0) first = buffer;
    require_same_device(buffer, label, first, {"buffers", 0});
    streams.add(buffer);
    imported.push_back({buffer.dtype, buffer.size, buffer.data});
  }
  if (imported.empty() || first.device == kHost) {
    const py::gil_scoped_release release;
    return global_norm(imported);
  }
  const cuda::Api& api = cuda_api();
  const std::unique_ptr<cuda::Workspace> workspace(api.make_workspace(first.device));
  const py::gil_scoped_release release;
  return api.global_norm(streams.queue(first.device), *workspace, imported);
}

// Copies all elements between host and device memory, or within one of them.
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
  if (device == kHost) {
    std::memmove(target.data, source.data, target.bytes());
  } else {
    const py::gil_scoped_release release;
    cuda_api().copy(streams.queue(device), target.data, source.data, target.bytes());
  }
}

// Shape and strides (in elements) as they are, dtype of the state, address, bytes, and the device
// (-1 for the host).
py::tuple describe(const py::object& object, const std::string& role, py::ssize_t index) {
  Leases leases;
  Buffer buffer;
  const Label label{role, index};
  import_buffer(object, label, Access::kWrite, leases, buffer);
  require_dense(buffer, label);
  const auto list = [&](const std::int64_t* values) {
    py::tuple result(buffer.layout.axes);
    for (int i = 0; i < buffer.layout.axes; ++i) result[i] = values[i];
    return result;
  };
  return py::make_tuple(list(buffer.layout.shape), list(buffer.layout.strides),
                        std::string(dtype_name(compute_dtype(buffer.dtype))),
                        reinterpret_cast<std::uintptr_t>(buffer.data), buffer.bytes(),
                        buffer.device);
}

Hyperparameters hyperparameters_from(double learning_rate, double beta_1, double beta_2,
                                     double epsilon, std::optional<double> weight_decay,
                                     std::optional<double> clipnorm,
                                     std::optional<double> clipvalue,
                                     std::optional<double> global_clipnorm, double ema_momentum,
                                     std::optional<std::int64_t> gradient_accumulation_steps) {
  Hyperparameters h;
  h.learning_rate = learning_rate;
  h.beta_1 = beta_1;
  h.beta_2 = beta_2;
  h.epsilon = epsilon;
  h.weight_decay = weight_decay.value_or(0.0);
  h.clipnorm = clipnorm;
  h.clipvalue = clipvalue;
  h.global_clipnorm = global_clipnorm;
  h.ema_momentum = ema_momentum;
  h.gradient_accumulation_steps = gradient_accumulation_steps.value_or(1);
  return h;
}

py::dict build_info() {
  py::dict info;
  info["version"] = ADAMAX_EXT_VERSION;
  info["compiler"] = ADAMAX_EXT_COMPILER;
  info["flags"] = ADAMAX_EXT_FLAGS;
  info["isas_built"] = py::str(ADAMAX_EXT_ISAS).attr("split")(",");
  info["isa_active"] = active_isa();
  info["openmp"] = py::bool_(ADAMAX_EXT_HAS_OPENMP);
  info["cuda_architectures"] = py::str(ADAMAX_EXT_CUDA_ARCHITECTURES).attr("split")();
  return info;
}

}  // namespace
}  // namespace adamax::bindings

PYBIND11_MODULE(_core, m) {
  using namespace adamax;
  using namespace adamax::bindings;
  m.doc() = "Native core of adamax_ext.";
  m.attr("__version__") = ADAMAX_EXT_VERSION;

  struct IeeeMode {
    std::optional<cpu::FloatingPointMode> mode;  // set while a `with` statement runs
  };
  py::class_<IeeeMode>(m, "IeeeMode", "IEEE arithmetic while Python computes scalars of a step.")
      .def(py::init<>())
      .def("__enter__", [](IeeeMode& self) { self.mode.emplace(); })
      .def("__exit__", [](IeeeMode& self, const py::args&) { self.mode.reset(); });

  py::class_<Plan>(m, "Plan")
      .def(py::init<const py::sequence&, std::vector<std::string>, const py::sequence&,
                    const py::sequence&, const py::object&, const py::object&,
                    const std::vector<bool>&>(),
           py::arg("params"), py::arg("names"), py::arg("momentum"), py::arg("norm"),
           py::arg("averages"), py::arg("accumulators"), py::arg("decays"))
      .def(
          "step",
          [](Plan& plan, const py::sequence& grads, const py::object& variables, std::int64_t step,
             double loss_scale, bool accumulate_only, bool overwrite, bool require_finite,
             double learning_rate, double beta_1, double beta_2, double epsilon,
             std::optional<double> weight_decay, std::optional<double> clipnorm,
             std::optional<double> clipvalue, std::optional<double> global_clipnorm,
             double ema_momentum, std::optional<std::int64_t> gradient_accumulation_steps) {
            return plan.step(
                grads, variables,
                hyperparameters_from(learning_rate, beta_1, beta_2, epsilon, weight_decay, clipnorm,
                                     clipvalue, global_clipnorm, ema_momentum,
                                     gradient_accumulation_steps),
                {step, 1.0, loss_scale, accumulate_only, overwrite, require_finite});
          },
          py::arg("grads"), py::arg("variables"), py::arg("step"), py::arg("loss_scale"),
          py::arg("accumulate_only"), py::arg("overwrite"), py::arg("require_finite"),
          py::arg("learning_rate"), py::arg("beta_1"), py::arg("beta_2"), py::arg("epsilon"),
          py::arg("weight_decay"), py::arg("clipnorm"), py::arg("clipvalue"),
          py::arg("global_clipnorm"), py::arg("ema_momentum"),
          py::arg("gradient_accumulation_steps"))
      .def("overwrite", &Plan::overwrite, py::arg("variables"))
      .def_readwrite("calls", &Plan::calls);

  m.def("update", &update, py::arg("param"), py::arg("grad"), py::arg("m"), py::arg("u"),
        py::arg("step"), py::arg("learning_rate"), py::arg("beta_1"), py::arg("beta_2"),
        py::arg("epsilon"), py::arg("weight_decay"), py::arg("l2_decay"), py::arg("epsilon_inside"),
        py::arg("grad_scale"), py::arg("clipvalue"), py::arg("average"), py::arg("ema_momentum"));
  m.def("global_norm", &norm_of_buffers, py::arg("buffers"));
  m.def("copy", &copy, py::arg("to"), py::arg("from_"));
  m.def("describe", &describe, py::arg("buffer"), py::arg("role"), py::arg("index"));
  m.def("build_info", &build_info);
  m.def("available_isas", &available_isas);
  m.def("active_isa", &active_isa);
  m.def("set_num_threads", &set_num_threads, py::arg("n"));
  m.def("get_num_threads", &get_num_threads);
  m.def("_override_cpu_limit", &cpu::override_cpu_limit, py::arg("cpus"));
  m.def("_cgroup_cpu_limit", &cpu::cgroup_cpu_limit, py::arg("membership"), py::arg("mount"));
}
