// Whether kernels of this build run on a device, and if not, why: a decision on numbers alone.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

namespace adamax::cuda {

struct Found {
  int driver = 0;      // CUDA version that the driver supports, 1000 * major + 10 * minor; 0: none
  int runtime = 0;     // CUDA version that this module was built with, likewise
  int devices = 0;     // that can be seen
  std::string error;   // of looking for devices; empty if there was none
  int device = 0;      // that is asked for
  int capability = 0;  // of that device, 10 * major + minor
};

// Empty if the device can be used. Machine code of an architecture runs on devices of the same
// major version and no smaller minor one; the newest architecture is there as PTX too, which
// drivers compile for any newer device.
inline std::string why_unusable(const Found& found, const std::vector<int>& architectures) {
  const auto version = [](int v) {
    return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
  };
  const auto capability = [](int c) {
    return std::to_string(c / 10) + "." + std::to_string(c % 10);
  };
  constexpr int kLargeArguments = 12010;  // kernel arguments of 32,764 bytes
  const int needed = std::max(found.runtime / 1000 * 1000, kLargeArguments);
  const std::string runtime = "; this build has CUDA runtime " + version(found.runtime);
  if (found.driver == 0) {
    return "no CUDA driver was found (libcuda.so.1)" + runtime + " and needs a driver for CUDA " +
           version(needed) + " or newer";
  }
  const std::string driver = "the driver supports CUDA " + version(found.driver);
  if (found.driver < needed) {
    return driver + runtime + " and needs a driver for CUDA " + version(needed) + " or newer";
  }
  if (found.devices == 0) {
    return "no CUDA device was found" + (found.error.empty() ? "" : " (" + found.error + ")") +
           "; " + driver + runtime;
  }
  if (found.device < 0 || found.device >= found.devices) {
    return "there is no CUDA device " + std::to_string(found.device) + " among the " +
           std::to_string(found.devices) + " that were found; " + driver + runtime;
  }
  const int newest = *std::max_element(architectures.begin(), architectures.end());
  std::string built;
  bool runs = newest <= found.capability;
  for (const int a : architectures) {
    runs = runs || (a / 10 == found.capability / 10 && a <= found.capability);
    built += (built.empty() ? "" : ", ") + capability(a);
  }
  if (runs) return "";
  return "CUDA device " + std::to_string(found.device) + " has compute capability " +
         capability(found.capability) + "; this build has kernels for " + built +
         " and newer than " + capability(newest) + "; " + driver + runtime;
}

}  // namespace adamax::cuda
