// The public calls for memory of a GPU.
#include "adamax/cuda.hpp"

#include "cuda/backend.hpp"

namespace adamax::cuda {

std::size_t scratch_bytes(std::span<const Variable> variables, std::span<const Group> groups,
                          const Call& call) {
  return backend().scratch_bytes(make_program(variables, groups, call));
}

bool step(const Stream& stream, void* scratch, std::span<const Variable> variables,
          std::span<const Group> groups, const Call& call) {
  const Program program = make_program(variables, groups, call);
  backend().require_usable(stream.device);
  const std::size_t bytes = backend().scratch_bytes(program);
  if (scratch == nullptr && bytes > 0) {
    throw std::invalid_argument("scratch must have the bytes of scratch_bytes(); received null");
  }
  return backend().run({stream.device, stream.handle}, {scratch, bytes}, program).is_finite;
}

}  // namespace adamax::cuda
