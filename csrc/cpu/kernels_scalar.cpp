// The kernels with one element at a time, for any processor.
#include <utility>

#include "cpu/kernel_table.hpp"
#include "cpu/vec_scalar.hpp"

namespace adamax::cpu::scalar {
namespace {
#include "cpu/kernels.inl"
}
constexpr KernelTable kTable = make_table("scalar");
}  // namespace adamax::cpu::scalar
