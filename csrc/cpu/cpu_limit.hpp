// How many processors this process may use: the affinity mask and the cgroup's CPU quota.
#pragma once

#include <string>

namespace adamax::cpu {

int cpu_limit();

// The quota of the process's cgroup and its parents, in whole processors rounded up; 0 if there is
// none. `membership` is the path of a /proc/<pid>/cgroup file, `mount` where the cgroup file
// systems are mounted.
int cgroup_cpu_limit(const std::string& membership, const std::string& mount);

}  // namespace adamax::cpu
