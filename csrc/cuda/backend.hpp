// The backend of the device that is linked in, real or emulated.
#pragma once

#include "core/backend.hpp"

namespace adamax::cuda {

const Backend& backend();

constexpr const char* kCaptureRefused =
    "the stream is being captured into a CUDA graph; expected a stream that runs: a captured step "
    "would repeat its step number, unless all groups take it from device memory (in torch: "
    "capturable=True), and memory that is in use on other streams cannot be waited for";

}  // namespace adamax::cuda
