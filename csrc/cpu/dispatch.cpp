// Which instruction set runs: what the processor has, or what ADAMAX_EXT_ISA forces.
#include "cpu/dispatch.hpp"

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <sstream>

#include "adamax/adamax.hpp"

namespace adamax {
namespace cpu {

// ADAMAX_EXT_ISAS is the list of CMakeLists.txt: ISA(scalar), then better and better ones.
#define ISA(name)                  \
  namespace name {                 \
  extern const KernelTable kTable; \
  }
ADAMAX_EXT_ISAS
#undef ISA

namespace {

#define ISA(name) &name::kTable,
constexpr const KernelTable* kTables[] = {ADAMAX_EXT_ISAS};
#undef ISA

// The compiler's test asks CPUID for the instructions and XCR0 whether the operating system saves
// the registers.
bool processor_has(std::string_view feature) {
#ifdef __x86_64__
  unsigned eax, ebx, ecx = 0, edx;  // not every compiler's test knows F16C
  const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  if (feature == "f16c") return has_f16c;
  if (feature == "avx2") return __builtin_cpu_supports("avx2");
  if (feature == "avx512f") return __builtin_cpu_supports("avx512f");
  if (feature == "avx512bw") return __builtin_cpu_supports("avx512bw");
  if (feature == "avx512dq") return __builtin_cpu_supports("avx512dq");
  if (feature == "avx512vl") return __builtin_cpu_supports("avx512vl");
#endif
  return false;
}

// What a table needs and this processor lacks; empty if it runs.
std::string lacking(const KernelTable& table) {
  std::istringstream features(table.features);
  std::string lacks;
  for (std::string feature; features >> feature;) {
    if (!processor_has(feature)) lacks += (lacks.empty() ? "" : " ") + feature;
  }
  return lacks;
}

const KernelTable& select_table(std::string_view name) {
  const KernelTable* best = nullptr;
  std::string valid = "auto", reason;
  for (const KernelTable* table : kTables) {
    const std::string lacks = lacking(*table);
    if (lacks.empty()) {
      best = table;
      if (name == table->isa) return *table;
      valid += std::string(", ") + table->isa;
    } else if (name == table->isa) {
      reason = std::string(", which needs ") + table->features + ": this processor lacks " + lacks;
    }
  }
  if (name == "auto") return *best;
  throw std::invalid_argument("ADAMAX_EXT_ISA must be one of " + valid +
                              " on this processor; received '" + std::string(name) + "'" + reason);
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
  for (const cpu::KernelTable* table : cpu::kTables) {
    if (cpu::lacking(*table).empty()) names.emplace_back(table->isa);
  }
  return names;
}

std::string active_isa() { return cpu::active_table().isa; }

}  // namespace adamax
