// The OpenMP runtime that another library brought into the process, used without being linked.
#include "cpu/openmp.hpp"

#ifdef __linux__
#include <dlfcn.h>
#include <link.h>

#include <fstream>
#include <iterator>
#include <mutex>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>
#endif

namespace adamax::cpu {

// Note [One runtime]: idle threads of an OpenMP pool spin for a while, in wait for the next region.
// A wheel such as torch's brings a runtime of its own, and beside threads of ours its threads would
// spin on the processors that ours work on. So its threads do our work, too.
#ifdef __linux__
namespace {

struct Libraries {
  unsigned long long seen = 0, now = 0;  // that were ever loaded
  std::vector<std::string> runtimes;     // paths, in the order of loading
};

int look_at(dl_phdr_info* info, std::size_t, void* data) {
  auto& libraries = *static_cast<Libraries*>(data);
  libraries.now = info->dlpi_adds;
  if (libraries.now == libraries.seen) return 1;  // nothing is new
  const std::string_view path = info->dlpi_name;
  const std::string_view name = path.substr(path.rfind('/') + 1);
  for (const char* const runtime : {"libgomp", "libomp", "libiomp"}) {
    if (name.starts_with(runtime)) libraries.runtimes.emplace_back(path);
  }
  return 0;
}

// The runtime that all libraries see, as torch's is, or else the first. Those of LLVM and Intel end
// a process in which two of them begin to work: of several none is touched.
OpenMP choose(const std::vector<std::string>& paths) {
  std::vector<OpenMP> found, of_llvm;
  for (const std::string& path : paths) {
    void* const library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);  // never closed
    if (library == nullptr) continue;
    const auto symbol = [library](const char* name, auto& function) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      return function != nullptr;
    };
    OpenMP runtime{};
    if (!symbol("GOMP_parallel", runtime.parallel)) continue;
    if (!symbol("omp_get_max_threads", runtime.max_threads)) continue;
    (dlsym(library, "__kmpc_fork_call") != nullptr ? of_llvm : found).push_back(runtime);
  }
  if (of_llvm.size() == 1) found.push_back(of_llvm[0]);
  const auto seen_by_all = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  for (const OpenMP& runtime : found) {
    if (runtime.parallel == seen_by_all) return runtime;
  }
  return found.empty() ? OpenMP{} : found[0];
}

// Whether this process is a fork of another program, whose runtime it inherited: see Note [Fork].
bool is_fork() {
  constexpr unsigned long kForkedWithoutExec = 0x40;  // PF_FORKNOEXEC of Linux
  std::ifstream file("/proc/self/stat");
  std::string text((std::istreambuf_iterator<char>(file)), {});
  std::istringstream fields(text.substr(text.rfind(')') + 1));  // behind the program's name
  std::string skipped;
  unsigned long flags = 0;
  for (int i = 0; i < 6; ++i) fields >> skipped;
  fields >> flags;
  return (flags & kForkedWithoutExec) != 0;
}

}  // namespace

OpenMP loaded_openmp() {
  static const bool inherited = is_fork();
  if (inherited) return {};
  static std::mutex mutex;
  static Libraries libraries;
  static OpenMP chosen{};
  const std::lock_guard lock(mutex);
  dl_iterate_phdr(look_at, &libraries);
  if (libraries.now != libraries.seen) {
    chosen = choose(std::exchange(libraries.runtimes, {}));
    libraries.seen = libraries.now;
  }
  return chosen;
}
#else
OpenMP loaded_openmp() { return {}; }
#endif

}  // namespace adamax::cpu
