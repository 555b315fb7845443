// The host as a backend: runs programs in one parallel region.
#pragma once

#include "core/backend.hpp"

namespace adamax::cpu {

const Backend& backend();

}  // namespace adamax::cpu
