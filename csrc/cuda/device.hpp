// What module.cpp asks of the device that it is linked with, real or emulated.
#pragma once

#include "cuda/api.hpp"

namespace adamax::cuda {

const Api& api();

constexpr const char* kCaptureRefused =
    "the stream is being captured into a CUDA graph; expected a stream that runs: a captured step "
    "would repeat its step number and learning rate";

}  // namespace adamax::cuda
