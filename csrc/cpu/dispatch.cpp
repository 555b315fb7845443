// Which instruction set runs: what the processor has, or what ADAMAX_EXT_ISA forces.
#include "cpu/dispatch.hpp"

#include <atomic>
#include <cstdlib>
#include <sstream>

#include "adamax/adamax.hpp"

#ifdef __x86_64__
#include <cpuid.h>  // last: its macros have the names of functions in Windows' headers
#endif

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

// Not __builtin_cpu_supports: it needs a variable of the compiler's runtime, which is not linked on
// Windows, and not every compiler knows F16C by it.
bool processor_has([[maybe_unused]] std::string_view feature) {
#ifdef __x86_64__
  unsigned eax, ebx = 0, ecx = 0, edx, unused;
  __get_cpuid(1, &eax, &unused, &ecx, &edx);
  if ((ecx & bit_OSXSAVE) == 0) return false;
  __get_cpuid_count(7, 0, &eax, &ebx, &unused, &edx);
  // Which registers the operating system saves: XMM, YMM; the masks and both parts of ZMM.
  // Volatile: else compilers may ask before they know that one can.
  unsigned saved;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(edx) : "c"(0));
  const bool has_avx = (saved & 0x06) == 0x06, has_avx512 = (saved & 0xe6) == 0xe6;
  if (feature == "f16c") return has_avx && (ecx & bit_F16C) != 0;
  if (feature == "avx2") return has_avx && (ebx & bit_AVX2) != 0;
  if (feature == "avx512f") return has_avx512 && (ebx & bit_AVX512F) != 0;
  if (feature == "avx512bw") return has_avx512 && (ebx & bit_AVX512BW) != 0;
  if (feature == "avx512dq") return has_avx512 && (ebx & bit_AVX512DQ) != 0;
  if (feature == "avx512vl") return has_avx512 && (ebx & bit_AVX512VL) != 0;
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
