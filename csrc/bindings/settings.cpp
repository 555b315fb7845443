// Group and Call as Python classes.
#include "bindings/settings.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>

namespace adamax::bindings {
namespace {

namespace py = pybind11;

constexpr std::array kDecays = {std::pair("decoupled", DecayRule::kDecoupled),
                                std::pair("l2", DecayRule::kL2)};
constexpr std::array kEpsilonModes = {std::pair("outside", EpsilonRule::kOutside),
                                      std::pair("inside", EpsilonRule::kInside)};
constexpr std::array kRoundings = {std::pair("nearest", WeightRounding::kNearest),
                                   std::pair("stochastic", WeightRounding::kStochastic),
                                   std::pair("remainder", WeightRounding::kRemainder)};

// What the word stands for. Throws ValueError, with the name of the setting, for another one.
template <class Rule, std::size_t n>
Rule read_word(const std::array<std::pair<const char*, Rule>, n>& words, const char* name,
               const py::object& value) {
  std::string expected;
  for (std::size_t i = 0; i < n; ++i) {
    const auto& [word, rule] = words[i];
    if (py::isinstance<py::str>(value) && value.equal(py::str(word))) return rule;
    expected += (i == 0 ? "'" : i + 1 < n ? ", '" : " or '") + std::string(word) + "'";
  }
  throw py::value_error(std::string(name) + " must be " + expected + "; received " +
                        py::cast<std::string>(repr(value)));
}
template <class Rule, std::size_t n>
const char* word_of(Rule rule, const std::array<std::pair<const char*, Rule>, n>& words) {
  return std::find_if(words.begin(), words.end(),
                      [&](const auto& item) { return item.second == rule; })
      ->first;
}

// A member of a class as a word.
template <auto member, const auto& words, class Class>
void def_word(Class& settings, const char* name) {
  using Self = typename Class::type;
  settings.def_property(
      name, [](const Self& self) { return word_of(self.*member, words); },
      [name](Self& self, const py::object& value) {
        self.*member = read_word(words, name, value);
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

WeightRounding read_rounding(const py::object& word) {
  return read_word(kRoundings, "weight_rounding", word);
}

WeightRounding rounding_of(DType param, WeightRounding rounding, const Label& label) {
  if (rounding == WeightRounding::kNearest || param == DType::kBFloat16) return rounding;
  if (param != DType::kFloat16) return WeightRounding::kNearest;  // nothing is rounded
  throw py::type_error(label.text() + " has dtype float16, which weight_rounding '" +
                       word_of(rounding, kRoundings) +
                       "' does not know; expected bfloat16, or weight_rounding 'nearest'");
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

  py::class_<StepGroup, Group> step_group(m, "StepGroup", "A group of a Stepper.");
  step_group.def(py::init<>());
  def_word<&StepGroup::weight_rounding, kRoundings>(step_group, "weight_rounding");

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
