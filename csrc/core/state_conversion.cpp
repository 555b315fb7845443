// State in fewer bits as float32 and back, and weights with their remainders: the words of the step
// on whole arrays.
#include <algorithm>

#include "adamax/adamax.hpp"
#include "core/fp_mode.hpp"
#include "core/low_state.hpp"

namespace adamax {
namespace {

using V = scalar::F32;

// Of whatever alignment.
template <class T>
V::Bits bits_at(const void* array, std::int64_t i) {
  return V::load_bits(static_cast<const T*>(array) + i);
}
template <class T>
void set_bits_at(void* array, std::int64_t i, V::Bits bits) {
  V::store_bits(bits, static_cast<T*>(array) + i);
}

// The scale of a block whose state is to be stored.
float scale_for(const float* norm, std::int64_t begin, std::int64_t end) {
  V largest(0.0f);
  for (std::int64_t i = begin; i < end; ++i) {
    const V u = V::load(norm + i);
    if (u.v < kPoison) largest = larger_number(u, largest);
  }
  return next_block_scale(0.0f, largest.v, 0.0f);
}

}  // namespace

void decode_state(StateFormat format, const Arrays& memory, std::int64_t size, double epsilon,
                  float* momentum, float* norm) {
  const FloatingPointMode ieee;
  const V eps(static_cast<float>(epsilon));
  for (std::int64_t i = 0; i < size; ++i) {
    V m, u;
    if (format == StateFormat::kFull) {
      m = V::load(static_cast<const float*>(memory.momentum) + i);
      u = V::load(static_cast<const float*>(memory.norm) + i);
    } else if (format == StateFormat::k16Bits) {
      m = V::load(static_cast<const BFloat16*>(memory.momentum) + i);
      u = V::load(static_cast<const BFloat16*>(memory.norm) + i) * V::load(memory.norm_scale);
    } else {
      u = decoded_norm(bits_at<std::uint8_t>(memory.norm, i),
                       V::load(memory.norm_scale + i / kStateBlock));
      m = decoded_ratio<V>(bits_at<std::int8_t>(memory.momentum, i)) * (u + eps);
    }
    m.store(momentum + i);
    u.store(norm + i);
  }
}

void encode_state(StateFormat format, const Arrays& memory, std::int64_t size, double epsilon,
                  const float* momentum, const float* norm) {
  const FloatingPointMode ieee;
  const V eps(static_cast<float>(epsilon));
  if (format == StateFormat::k16Bits) V(1.0f).store(memory.norm_scale);
  float scale = 0.0f;
  for (std::int64_t i = 0; i < size; ++i) {
    const V m = V::load(momentum + i), u = V::load(norm + i);
    if (format == StateFormat::kFull) {
      m.store(static_cast<float*>(memory.momentum) + i);
      u.store(static_cast<float*>(memory.norm) + i);
    } else if (format == StateFormat::k16Bits) {
      set_bits_at<std::uint16_t>(memory.momentum, i, half_nearest_away(m));
      set_bits_at<std::uint16_t>(memory.norm, i, half_nearest_away(u));
    } else {
      if (i % kStateBlock == 0) {
        scale = scale_for(norm, i, std::min(size, i + kStateBlock));
        V(scale).store(memory.norm_scale + i / kStateBlock);
      }
      const V::Bits rounded = rounded_norm(u, V(inverse_scale(scale)));
      const V denominator = stored_norm(rounded, V(scale)) + eps;
      const V ratio = denominator.v > 0.0f ? m / denominator : V(0.0f);
      constexpr V::Bits kNearest = 128, kMost = 255;
      set_bits_at<std::uint8_t>(memory.norm, i, std::min(norm_code<V>(rounded), kMost));
      set_bits_at<std::int8_t>(memory.momentum, i, ratio_code(ratio, kNearest));
    }
  }
}

void join_weights(const BFloat16* weights, const std::int16_t* remainders, std::int64_t size,
                  float* joined_weights) {
  for (std::int64_t i = 0; i < size; ++i) {
    joined<V>(bits_at<std::uint16_t>(weights, i), bits_at<std::int16_t>(remainders, i))
        .store(joined_weights + i);
  }
}

void split_weights(const float* joined_weights, std::int64_t size, BFloat16* weights,
                   std::int16_t* remainders) {
  for (std::int64_t i = 0; i < size; ++i) {
    const V w = V::load(joined_weights + i);
    set_bits_at<std::uint16_t>(weights, i, half_nearest_away(w));
    set_bits_at<std::int16_t>(remainders, i, remainder_of(w));
  }
}

}  // namespace adamax
