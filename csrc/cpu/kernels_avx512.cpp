// The kernels with 16 floats or 8 doubles at a time (needs AVX-512 F, BW, DQ and VL).
#include <utility>

#include "core/update_rule.hpp"
#include "cpu/kernel_table.hpp"
#include "cpu/vec_avx512.hpp"

namespace adamax::cpu::avx512 {
namespace {
#include "cpu/kernels.inl"
}
constexpr KernelTable kTable = make_table("avx512");
}  // namespace adamax::cpu::avx512
