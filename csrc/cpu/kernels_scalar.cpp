// The kernels with one element at a time, for any processor.
#include <type_traits>
#include <utility>

#include "core/low_state.hpp"
#include "core/random.hpp"
#include "core/update_rule.hpp"
#include "core/vec_scalar.hpp"
#include "cpu/kernel_table.hpp"

namespace adamax::cpu::scalar {
namespace {
using adamax::scalar::F32;
using adamax::scalar::F64;
using adamax::scalar::widen;
#include "cpu/kernels.inl"
}  // namespace
extern constexpr KernelTable kTable = make_table("scalar", "");
}  // namespace adamax::cpu::scalar
