// State in fewer bits, and weights with remainders, to and from float32, on arrays in host memory.
#include "bindings/conversions.hpp"

#include "bindings/buffer.hpp"

namespace adamax::bindings {
namespace {

// Arrays of one call, of one layout.
class HostArrays {
 public:
  // The first one is what the others are compared with.
  Buffer import(const py::object& object, const Label& label, Access access) {
    Buffer buffer = import_any_layout(object, label, access);
    require_dense(buffer, label);
    if (first_label_.role.empty()) {
      first_ = buffer;
      first_label_ = label;
    }
    require_same_layout(buffer, label, first_, first_label_);
    return buffer;
  }
  float* import_float32(const py::object& object, const Label& label, Access access) {
    const Buffer buffer = import(object, label, access);
    require_dtype(buffer, label, DType::kFloat32);
    return reinterpret_cast<float*>(buffer.data);
  }
  Buffer import_any_layout(const py::object& object, const Label& label, Access access) {
    Buffer buffer;
    import_state(object, label, access, leases_, buffer);
    if (buffer.device == kHost) return buffer;
    throw py::value_error(label.text() + " is on CUDA device " + std::to_string(buffer.device) +
                          "; expected host memory");
  }
  static void require_dtype(const Buffer& buffer, const Label& label, DType expected) {
    const bool are_halves = expected == DType::kBFloat16 && holds_bfloat16(buffer);
    if (buffer.dtype == expected || are_halves) return;
    throw py::type_error(label.text() + " has dtype " + std::string(dtype_name(buffer.dtype)) +
                         "; expected " + std::string(dtype_name(expected)));
  }
  std::int64_t size() const { return first_.size; }

 private:
  Leases leases_;
  Buffer first_{};
  Label first_label_{};
};

struct State {
  StateFormat format;
  Arrays memory;
};

State import_state_arrays(HostArrays& arrays, const py::object& momentum, const py::object& norm,
                          const py::object& norm_scale, Access access) {
  const Buffer m = arrays.import(momentum, {"momentum"}, access);
  Buffer param = m;
  param.dtype = DType::kFloat32;
  State state{state_format(m, {"momentum"}, param), {}};
  const Buffer u = arrays.import(norm, {"norm"}, access);
  require_norm(u, {"norm"}, param, state.format);
  state.memory.momentum = m.data;
  state.memory.norm = u.data;
  if (state.format != StateFormat::kFull) {
    const Buffer scale = arrays.import_any_layout(norm_scale, {"norm_scale"}, access);
    require_norm_scale(scale, {"norm_scale"}, param, state.format);
    state.memory.norm_scale = reinterpret_cast<float*>(scale.data);
  }
  return state;
}

void decode(const py::object& momentum, const py::object& norm, const py::object& norm_scale,
            double epsilon, const py::object& to_momentum, const py::object& to_norm) {
  HostArrays arrays;
  const State state = import_state_arrays(arrays, momentum, norm, norm_scale, Access::kRead);
  float* const m = arrays.import_float32(to_momentum, {"to_momentum"}, Access::kWrite);
  float* const u = arrays.import_float32(to_norm, {"to_norm"}, Access::kWrite);
  decode_state(state.format, state.memory, arrays.size(), epsilon, m, u);
}

void encode(const py::object& from_momentum, const py::object& from_norm, double epsilon,
            const py::object& momentum, const py::object& norm, const py::object& norm_scale) {
  HostArrays arrays;
  const State state = import_state_arrays(arrays, momentum, norm, norm_scale, Access::kWrite);
  const float* const m = arrays.import_float32(from_momentum, {"from_momentum"}, Access::kRead);
  const float* const u = arrays.import_float32(from_norm, {"from_norm"}, Access::kRead);
  encode_state(state.format, state.memory, arrays.size(), epsilon, m, u);
}

struct Weights {
  BFloat16* halves;
  std::int16_t* remainders;
};

Weights import_weights(HostArrays& arrays, const py::object& weights, const py::object& remainders,
                       Access access) {
  const Buffer halves = arrays.import(weights, {"weights"}, access);
  HostArrays::require_dtype(halves, {"weights"}, DType::kBFloat16);
  const Buffer lower = arrays.import(remainders, {"remainders"}, access);
  HostArrays::require_dtype(lower, {"remainders"}, DType::kInt16);
  return {reinterpret_cast<BFloat16*>(halves.data), reinterpret_cast<std::int16_t*>(lower.data)};
}

void join(const py::object& weights, const py::object& remainders, const py::object& joined) {
  HostArrays arrays;
  const Weights from = import_weights(arrays, weights, remainders, Access::kRead);
  float* const to = arrays.import_float32(joined, {"joined"}, Access::kWrite);
  join_weights(from.halves, from.remainders, arrays.size(), to);
}

void split(const py::object& joined, const py::object& weights, const py::object& remainders) {
  HostArrays arrays;
  const Weights to = import_weights(arrays, weights, remainders, Access::kWrite);
  const float* const from = arrays.import_float32(joined, {"joined"}, Access::kRead);
  split_weights(from, arrays.size(), to.halves, to.remainders);
}

}  // namespace

void register_conversions(py::module_& m) {
  m.def("decode_state", &decode, py::arg("momentum"), py::arg("norm"), py::arg("norm_scale"),
        py::arg("epsilon"), py::arg("to_momentum"), py::arg("to_norm"));
  m.def("encode_state", &encode, py::arg("from_momentum"), py::arg("from_norm"), py::arg("epsilon"),
        py::arg("momentum"), py::arg("norm"), py::arg("norm_scale"));
  m.def("join_weights", &join, py::arg("weights"), py::arg("remainders"), py::arg("joined"));
  m.def("split_weights", &split, py::arg("joined"), py::arg("weights"), py::arg("remainders"));
}

}  // namespace adamax::bindings
