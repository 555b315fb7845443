// The fixed shape of a sum: the same order of additions, so the same bits, on every machine.
//
// Numbers are padded with zeros to blocks of kBlock. Element e of a block goes to lane e mod
// kLanes, in order; lanes fold by halves; the sums of the blocks are added by the same scheme,
// again, until one number is left.
#pragma once

#include <cstdint>

#include "core/host_device.hpp"

namespace adamax {

constexpr std::int64_t kBlock = 4096;
constexpr int kLanes = 16;

constexpr std::int64_t num_blocks(std::int64_t size) { return (size + kBlock - 1) / kBlock; }

ADAMAX_HOST_DEVICE double fold_lanes(double* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] = lanes[lane] + lanes[lane + half];
  }
  return lanes[0];
}

}  // namespace adamax
