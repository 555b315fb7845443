// The Python module _core: registers what the other files define.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "adamax/adamax.hpp"
#include "bindings/calls.hpp"
#include "bindings/collect.hpp"
#include "bindings/conversions.hpp"
#include "bindings/plan.hpp"
#include "bindings/settings.hpp"
#include "bindings/stepper.hpp"
#include "core/bias_correction.hpp"
#include "core/fp_mode.hpp"
#include "cpu/cpu_limit.hpp"
#include "cpu/openmp.hpp"
#include "cpu/parallel.hpp"
#include "xla/handler.hpp"

// What PYBIND11_MODULE makes of _core; CPython calls the PyInit__core at the end of this file.
#define PyInit__core init_by_pybind11

namespace adamax::bindings {
namespace {

// Note [One interpreter]: types, and what is remembered of them, are those of one interpreter.
// Declaring that to CPython is not enough: it asks no sooner than version 3.12, and not at all for
// interpreters that share the GIL. Both before pybind11 begins, which waits for ever for the GIL
// that its thread holds (before 3.12), and after, because 3.13 begins in the main interpreter.
void require_main_interpreter() {
  PyInterpreterState* const here = PyInterpreterState_Get();
  if (here == PyInterpreterState_Main()) return;
  throw std::runtime_error(
      "adamax_ext must be imported in the main interpreter; received an import in subinterpreter " +
      std::to_string(PyInterpreterState_GetID(here)));
}

py::dict build_info() {
  py::dict info;
  info["version"] = ADAMAX_EXT_VERSION;
  info["compiler"] = ADAMAX_EXT_COMPILER;
  info["flags"] = ADAMAX_EXT_FLAGS;
  info["isas_built"] = py::str(ADAMAX_EXT_ISAS).attr("split")(",");
  info["isa_active"] = active_isa();
  info["openmp"] = py::bool_(cpu::loaded_openmp().parallel != nullptr);
  info["cuda_architectures"] = py::str(ADAMAX_EXT_CUDA_ARCHITECTURES).attr("split")();
  return info;
}

py::capsule handler(xla::Handler* function) {
  return py::capsule(reinterpret_cast<void*>(function), "xla._CUSTOM_CALL_TARGET");
}

// Lets the garbage collector see the variables of a plan, which may hold the plan.
void let_collect(PyHeapTypeObject* heap_type) {
  const auto plan_of = [](PyObject* self) -> Plan* {
    const auto value = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
    return value.holder_constructed() ? value.value_ptr<Plan>() : nullptr;
  };
  static const auto find = plan_of;
  PyTypeObject* const type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) -> int {
    Py_VISIT(Py_TYPE(self));
    const Plan* const plan = find(self);
    return plan == nullptr ? 0 : plan->traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) -> int {
    if (Plan* const plan = find(self)) plan->clear();
    return 0;
  };
}

}  // namespace
}  // namespace adamax::bindings

// Does not declare that it can do without the GIL: dicts and lists of the caller are read with
// borrowed references (collect.cpp), and no interpreter without it has run the tests.
PYBIND11_MODULE(_core, m) {
  using namespace adamax;
  using namespace adamax::bindings;
  m.doc() = "Native core of adamax_ext.";
  m.attr("__version__") = ADAMAX_EXT_VERSION;
  require_main_interpreter();

  struct IeeeMode {
    std::optional<FloatingPointMode> mode;  // set while a `with` statement runs
  };
  py::class_<IeeeMode>(m, "IeeeMode", "IEEE arithmetic while Python computes scalars of a step.")
      .def(py::init<>())
      .def("__enter__", [](IeeeMode& self) { self.mode.emplace(); })
      .def("__exit__", [](IeeeMode& self, const py::args&) { self.mode.reset(); });

  register_settings(m);
  register_conversions(m);
  py::class_<Plan>(m, "Plan", py::custom_type_setup(let_collect))
      .def(py::init([](const py::tuple& params, std::vector<std::string> names,
                       const std::vector<std::uint32_t>& groups, py::object momentum,
                       py::object norm, py::object averages, py::object accumulators,
                       py::object norm_scales, py::object remainders,
                       const py::object& weight_rounding) {
             return std::make_unique<Plan>(
                 params, std::move(names), groups,
                 KeptLists{std::move(momentum), std::move(norm), std::move(averages),
                           std::move(accumulators), std::move(norm_scales), std::move(remainders)},
                 read_rounding(weight_rounding));
           }),
           py::arg("params"), py::arg("names"), py::arg("groups"), py::kw_only(),
           py::arg("momentum"), py::arg("norm"), py::arg("averages"), py::arg("accumulators"),
           py::arg("norm_scales") = py::none(), py::arg("remainders") = py::none(),
           py::arg("weight_rounding") = "nearest")
      .def("step", &Plan::step, py::arg("grads"), py::arg("variables").none(true),
           py::arg("groups"), py::arg("call"))
      .def("finalize", &Plan::finalize, py::arg("variables").none(true))
      .def_property("accumulated", &Plan::accumulated, &Plan::set_accumulated)
      .def_property(
          "calls", [](const Plan& self) { return self.calls.load(); },
          [](Plan& self, std::int64_t calls) { self.calls = calls; });

  py::class_<Stepper>(m, "Stepper")
      .def(py::init<>())
      .def_readonly("calls", &Stepper::calls)
      .def(
          "step",
          [](Stepper& self, const py::tuple& arrays, std::vector<std::size_t> sizes,
             std::vector<StepGroup> groups, std::vector<py::object> learning_rates,
             std::vector<std::pair<py::object, py::object>> loss_scales, bool is_strict) {
            return self.step(arrays,
                             {std::move(sizes), std::move(groups), std::move(learning_rates),
                              std::move(loss_scales)},
                             is_strict);
          },
          py::arg("arrays"), py::kw_only(), py::arg("sizes"), py::arg("groups"),
          py::arg("learning_rates"), py::arg("loss_scales"), py::arg("is_strict"));

  m.def(
      "collect",
      [](const py::tuple& groups, const py::dict& states, const py::tuple& keys,
         const py::tuple& optional_keys, const py::tuple& options, const py::tuple& plain_types) {
        const Collected collected =
            collect(groups, states, keys, optional_keys, options, plain_types);
        return py::make_tuple(collected.arrays, collected.sizes, collected.to_inspect,
                              collected.with_options);
      },
      py::arg("groups"), py::arg("states"), py::kw_only(), py::arg("keys"),
      py::arg("optional_keys"), py::arg("options"), py::arg("plain_types"));

  m.def(
      "update",
      [](py::object param, py::object grad, py::object m, py::object u, py::object average,
         py::object norm_scale, py::object remainder, const Group& group, double grad_scale,
         const py::object& weight_rounding, std::uint32_t variable, std::int64_t first_element) {
        update({std::move(param), std::move(grad), std::move(m), std::move(u), std::move(average),
                std::move(norm_scale), std::move(remainder)},
               group, grad_scale, read_rounding(weight_rounding), {variable, first_element});
      },
      py::arg("param"), py::arg("grad"), py::arg("m"), py::arg("u"), py::kw_only(),
      py::arg("average"), py::arg("norm_scale"), py::arg("remainder"), py::arg("group"),
      py::arg("grad_scale"), py::arg("weight_rounding"), py::arg("variable"),
      py::arg("first_element"));
  m.def("global_norm", &norm_of_buffers, py::arg("buffers"));
  m.def("copy", &copy, py::arg("to"), py::arg("from_"));
  m.def("describe", &describe, py::arg("buffer"), py::arg("role"), py::arg("index"));
  py::list storages;
  for (const DTypePair& pair : kPairs) {
    storages.append(py::make_tuple(dtype_name(pair.param), dtype_name(pair.grad),
                                   dtype_name(compute_dtype(pair.param))));
  }
  m.attr("storages") = py::tuple(storages);
  m.attr("xla_step") = handler(&xla::step_on_host);
  m.attr("xla_refuse") = handler(&xla::refuse);
  m.def("build_info", &build_info);
  m.def("available_isas", &available_isas);
  m.def("active_isa", &active_isa);
  m.def("set_num_threads", &set_num_threads, py::arg("n"));
  m.def("get_num_threads", &get_num_threads);
  m.def("_override_cpu_limit", &cpu::override_cpu_limit, py::arg("cpus"));
  m.def("_cgroup_cpu_limit", &cpu::cgroup_cpu_limit, py::arg("membership"), py::arg("mount"));
  m.def("_bias_correction", &bias_correction, py::arg("beta"), py::arg("step"));
}

#undef PyInit__core
PyMODINIT_FUNC PyInit__core() {  // see Note [One interpreter]
  try {
    adamax::bindings::require_main_interpreter();
    return init_by_pybind11();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
}
