// Which instruction set runs: what the processor has, or what ADAMAX_EXT_ISA forces.
#include "cpu/dispatch.hpp"

#ifdef ADAMAX_X86
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>

#include "adamax/adamax.hpp"

namespace adamax {
namespace cpu {
namespace {

// Tables that this processor runs, best last. The compiler's feature test asks CPUID for the
// instructions and XCR0 whether the operating system saves the registers.
std::vector<const KernelTable*> runnable_tables() {
  std::vector<const KernelTable*> tables{&scalar::kTable};
#ifdef ADAMAX_X86
  unsigned eax, ebx, ecx = 0, edx;  // not every compiler's test knows F16C
  const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  if (__builtin_cpu_supports("avx2") && has_f16c) {
    tables.push_back(&avx2::kTable);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    tables.push_back(&avx512::kTable);
  }
#endif
  return tables;
}

const KernelTable& select_table(std::string_view name) {
  const auto tables = runnable_tables();
  if (name == "auto") return *tables.back();
  std::string valid = "auto";
  for (const KernelTable* table : tables) {
    if (name == table->isa) return *table;
    valid += std::string(", ") + table->isa;
  }
  throw std::invalid_argument("ADAMAX_EXT_ISA must be one of " + valid +
                              " on this processor; received '" + std::string(name) + "'");
}

std::atomic<const KernelTable*>& active() {
  static std::atomic<const KernelTable*> table = [] {
    const char* const forced = std::getenv("ADAMAX_EXT_ISA");
    return &select_table(forced == nullptr || *forced == '\0' ? "auto" : forced);
  }();
  return table;
}

}  // namespace

const KernelTable& active_table() { return *active().load(std::memory_order_relaxed); }

void use_isa(std::string_view name) { active().store(&select_table(name)); }

}  // namespace cpu

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const cpu::KernelTable* table : cpu::runnable_tables()) names.emplace_back(table->isa);
  return names;
}

std::string active_isa() { return cpu::active_table().isa; }

}  // namespace adamax
