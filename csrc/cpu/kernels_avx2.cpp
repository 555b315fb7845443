// The kernels with 8 floats or 4 doubles at a time (needs AVX2 and F16C).
#include <utility>

#include "core/update_rule.hpp"
#include "cpu/kernel_table.hpp"
#include "cpu/vec_avx2.hpp"

namespace adamax::cpu::avx2 {
namespace {
#include "cpu/kernels.inl"
}
constexpr KernelTable kTable = make_table("avx2");
}  // namespace adamax::cpu::avx2
