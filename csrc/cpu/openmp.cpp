// The OpenMP runtime that another library brought into the process, used without being linked.
#include "cpu/openmp.hpp"

#ifdef __linux__
#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>
#endif

namespace adamax::cpu {

// Note [One runtime]: idle threads of an OpenMP pool spin for a while, in wait for the next region.
// A wheel such as torch's brings a runtime of its own, and beside threads of ours its threads would
// spin on the processors that ours work on. So its threads do our work, too.
#ifdef __linux__
namespace {

struct Search {
  unsigned long long seen = 0, now = 0;  // libraries that were ever loaded
  std::vector<std::string> paths;
};

int look_at(dl_phdr_info* info, std::size_t, void* data) {
  auto& search = *static_cast<Search*>(data);
  search.now = info->dlpi_adds;
  if (search.now == search.seen) return 1;  // no need to go on
  const std::string_view path = info->dlpi_name;
  const std::string_view name = path.substr(path.rfind('/') + 1);
  for (const char* const runtime : {"libgomp", "libomp", "libiomp"}) {
    if (name.starts_with(runtime)) search.paths.emplace_back(path);
  }
  return 0;
}

const OpenMP* search_openmp() {
  static Search search;
  dl_iterate_phdr(look_at, &search);
  search.seen = search.now;
  for (const std::string& path : std::exchange(search.paths, {})) {
    void* const library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) continue;
    static OpenMP found;
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
    found.max_threads =
        reinterpret_cast<decltype(found.max_threads)>(dlsym(library, "omp_get_max_threads"));
    if (found.parallel != nullptr && found.max_threads != nullptr) return &found;
    dlclose(library);
  }
  return nullptr;
}

}  // namespace

const OpenMP* loaded_openmp() {
  static std::atomic<const OpenMP*> found{nullptr};
  if (const OpenMP* const known = found.load(std::memory_order_acquire)) return known;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (found.load() == nullptr) found = search_openmp();
  return found;
}
#else
const OpenMP* loaded_openmp() { return nullptr; }
#endif

}  // namespace adamax::cpu
