// Group and Call as Python classes.
#include "bindings/settings.hpp"

#include <pybind11/stl.h>

#include <array>
#include <string>

namespace adamax::bindings {
namespace {

namespace py = pybind11;

constexpr std::array kDecays = {std::pair("decoupled", DecayRule::kDecoupled),
                                std::pair("l2", DecayRule::kL2)};
constexpr std::array kEpsilonModes = {std::pair("outside", EpsilonRule::kOutside),
                                      std::pair("inside", EpsilonRule::kInside)};

// A member of Group as one of two words. Throws ValueError, naming the property, for another one.
template <auto member, const auto& words>
void def_word(py::class_<Group>& group, const char* name) {
  group.def_property(
      name,
      [](const Group& self) {
        return self.*member == words[0].second ? words[0].first : words[1].first;
      },
      [name](Group& self, const py::object& value) {
        for (const auto& [word, rule] : words) {
          if (py::isinstance<py::str>(value) && value.equal(py::str(word))) {
            self.*member = rule;
            return;
          }
        }
        throw py::value_error(std::string(name) + " must be '" + words[0].first + "' or '" +
                              words[1].first + "'; received " + py::cast<std::string>(repr(value)));
      });
}

// The limit of one rule of clipping, or None; setting one replaces the other.
template <ClipRule rule>
void def_clip(py::class_<Call>& call, const char* name) {
  call.def_property(
      name,
      [](const Call& self) {
        return self.clip.rule == rule ? std::optional(self.clip.limit) : std::nullopt;
      },
      [](Call& self, std::optional<double> limit) {
        if (limit) {
          self.clip = {rule, *limit};
        } else if (self.clip.rule == rule) {
          self.clip = {};
        }
      });
}

}  // namespace

WeightRounding weight_rounding(const py::object& word, DType param, const Label& label) {
  constexpr std::array kRoundings = {std::pair("nearest", WeightRounding::kNearest),
                                     std::pair("stochastic", WeightRounding::kStochastic),
                                     std::pair("remainder", WeightRounding::kRemainder)};
  for (const auto& [name, rounding] : kRoundings) {
    if (!py::isinstance<py::str>(word) || !word.equal(py::str(name))) continue;
    if (rounding == WeightRounding::kNearest || param == DType::kBFloat16) return rounding;
    if (param != DType::kFloat16) return WeightRounding::kNearest;  // nothing is rounded
    throw py::type_error(label.text() + " has dtype float16, which weight_rounding '" + name +
                         "' does not know; expected bfloat16, or weight_rounding 'nearest'");
  }
  throw py::value_error(
      "weight_rounding must be 'nearest', 'stochastic' or 'remainder'; received " +
      py::cast<std::string>(repr(word)));
}

void register_settings(py::module_& m) {
  py::class_<Group> group(m, "Group", "Settings that variables share.");
  group.def(py::init<>())
      .def_readwrite("learning_rate", &Group::learning_rate)
      .def_readwrite("beta_1", &Group::beta_1)
      .def_readwrite("beta_2", &Group::beta_2)
      .def_readwrite("epsilon", &Group::epsilon)
      .def_readwrite("weight_decay", &Group::weight_decay)
      .def_readwrite("clipvalue", &Group::clipvalue)
      .def_readwrite("ema_momentum", &Group::ema_momentum)
      .def_readwrite("step", &Group::step)
      .def_readwrite("maximize", &Group::maximize)
      .def_readwrite("seed", &Group::seed);
  def_word<&Group::decay, kDecays>(group, "decay");
  def_word<&Group::epsilon_rule, kEpsilonModes>(group, "epsilon_mode");

  py::class_<Call> call(m, "Call", "What one call does with all variables.");
  call.def(py::init<>())
      .def_readwrite("grad_scale", &Call::grad_scale)
      .def_readwrite("micro_batches", &Call::micro_batches)
      .def_readwrite("overwrite", &Call::overwrite)
      .def_readwrite("require_finite", &Call::require_finite)
      .def_property(
          "accumulate_only", [](const Call& self) { return self.phase == Phase::kAccumulate; },
          [](Call& self, bool on) { self.phase = on ? Phase::kAccumulate : Phase::kUpdate; });
  def_clip<ClipRule::kNorm>(call, "clipnorm");
  def_clip<ClipRule::kGlobalNorm>(call, "global_clipnorm");
}

}  // namespace adamax::bindings
