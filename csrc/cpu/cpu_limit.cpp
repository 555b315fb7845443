// How many processors this process may use: the affinity mask and the cgroup's CPU quota.
#include "cpu/cpu_limit.hpp"

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <thread>

namespace adamax::cpu {
namespace {

int affinity_cpus() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

// Quota over period as a number of processors; 0 without a limit ("max", -1, or no such file).
double quota_of_v2(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  double quota = 0, period = 0;
  return file >> quota >> period && quota > 0 && period > 0 ? quota / period : 0;
}

double quota_of_v1(const std::string& folder) {
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us"),
      period_file(folder + "/cpu.cfs_period_us");
  double quota = 0, period = 0;
  return quota_file >> quota && period_file >> period && quota > 0 && period > 0 ? quota / period
                                                                                 : 0;
}

bool contains_cpu(const std::string& controllers) {
  std::istringstream list(controllers);
  for (std::string name; std::getline(list, name, ',');) {
    if (name == "cpu") return true;
  }
  return false;
}

}  // namespace

int cgroup_cpu_limit(const std::string& membership, const std::string& mount) {
  double limit = 0;
  const auto tighten = [&limit](double quota) {
    if (quota > 0) limit = limit > 0 ? std::min(limit, quota) : quota;
  };
  std::ifstream file(membership);
  for (std::string line; std::getline(file, line);) {
    // hierarchy:controllers:/path, where version 2 has hierarchy 0 and no controllers.
    const auto first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool is_v2 = controllers.empty();
    if (!is_v2 && !contains_cpu(controllers)) continue;
    // A limit holds for everything below it; in a container only the upper folders may be visible.
    for (std::string path = line.substr(second + 1);; path.resize(path.find_last_of('/'))) {
      if (is_v2) {
        tighten(quota_of_v2(mount + path));
      } else {
        tighten(quota_of_v1(mount + "/cpu" + path));
      }
      if (path.find('/') == std::string::npos) break;
    }
  }
  return static_cast<int>(std::ceil(limit));
}

int cpu_limit() {
  // The quota is read once; affinity can be changed by the program itself.
  static const int quota = cgroup_cpu_limit("/proc/self/cgroup", "/sys/fs/cgroup");
  const int cpus = affinity_cpus();
  return quota > 0 ? std::min(quota, cpus) : cpus;
}

}  // namespace adamax::cpu
