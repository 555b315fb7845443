// Which instruction set runs: what the processor has, or what ADAMAX_EXT_ISA forces.
#pragma once

#include <string_view>

#include "cpu/kernel_table.hpp"

namespace adamax::cpu {

// Throws std::invalid_argument if ADAMAX_EXT_ISA names none that this processor runs.
const KernelTable& active_table();

// For benchmarks: another instruction set from now on; throws as active_table().
void use_isa(std::string_view name);

}  // namespace adamax::cpu
