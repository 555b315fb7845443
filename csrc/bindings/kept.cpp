// The arrays that are kept for a variable: their import, and whether they are there and fit.
#include "bindings/kept.hpp"

namespace adamax::bindings {
namespace {

constexpr void* Arrays::* kMembers[kNumKept] = {&Arrays::momentum, &Arrays::norm,
                                                &Arrays::average,  &Arrays::accumulator,
                                                nullptr,           &Arrays::remainder};

// Whether it is there, which it must be if, and only if, it is needed.
bool require_given(py::handle object, const Label& label, bool is_needed, const char* where) {
  if (object.is_none() != is_needed) return is_needed;
  throw py::value_error(label.text() + " must be " + (is_needed ? "given" : "None") + " where " +
                        where + "; received " + (is_needed ? "None" : "a buffer"));
}

bool is_there(Kept kind, py::handle object, const Label& label, const Storage& storage) {
  if (kind == Kept::kNormScale) {
    const bool is_full = storage.state == StateFormat::kFull;
    return require_given(object, label, !is_full,
                         is_full ? "momentum and norm are not in fewer bits"
                                 : "momentum and norm are in fewer bits");
  }
  if (kind == Kept::kRemainder) {
    const bool is_needed = storage.rounding == WeightRounding::kRemainder;
    return require_given(
        object, label, is_needed,
        is_needed ? "weight_rounding is 'remainder'" : "no remainder of the weights is kept");
  }
  const bool is_optional = kind == Kept::kAverage || kind == Kept::kAccumulator;
  return !is_optional || !object.is_none();
}

}  // namespace

bool import_kept(Kept kind, py::handle object, const Label& label, const Buffer& param,
                 const Label& param_label, Variable& variable, Leases& leases, Buffer& buffer) {
  Arrays& memory = variable.memory;
  StateFormat& format = variable.storage.state;
  const bool is_given = is_there(kind, object, label, variable.storage);
  if (kind == Kept::kNormScale) {
    if (is_given) {
      import_state(object, label, Access::kWrite, leases, buffer, memory.norm_scale);
      require_norm_scale(buffer, label, param, format);
    }
    memory.norm_scale = is_given ? reinterpret_cast<float*>(buffer.data) : nullptr;
    return is_given;
  }
  void*& known = memory.*kMembers[static_cast<int>(kind)];
  if (!is_given) {
    known = nullptr;
    return false;
  }
  import_state(object, label, Access::kWrite, leases, buffer, known);
  if (kind == Kept::kMomentum) {
    format = state_format(buffer, label, param);
  } else if (kind == Kept::kNorm) {
    require_norm(buffer, label, param, format);
  } else if (kind == Kept::kRemainder) {
    require_remainder(buffer, label, param);
  } else {
    require_computed(buffer, label, param);
  }
  require_same_layout(buffer, label, param, param_label);
  known = buffer.data;
  return true;
}

}  // namespace adamax::bindings
