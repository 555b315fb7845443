// Which instruction set runs: what the processor has, or what ADAMAX_EXT_ISA forces.
#pragma once

#include "cpu/kernel_table.hpp"

namespace adamax::cpu {

// Throws std::invalid_argument if ADAMAX_EXT_ISA names none that this processor runs.
const KernelTable& active_table();

}  // namespace adamax::cpu
