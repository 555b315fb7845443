// The backend of the device that is linked in, real or emulated.
#pragma once

#include "core/backend.hpp"

namespace adamax::cuda {

const Backend& backend();

constexpr const char* kCaptureRefused =
    "the stream is being captured into a CUDA graph; expected one that runs: a first step "
    "allocates memory, and a later one would repeat the step numbers that the host tells (in torch "
    "those are without capturable=True), and could not wait for other streams";

}  // namespace adamax::cuda
