// The formula: Adamax (Kingma & Ba 2014, section 7.1), once, for every vector width and device.
//
// `V` is a vector of floats or doubles with + - * /, abs, maximum (propagates NaN), clamp (keeps
// NaN) and zero_below. Every operation is one correctly rounded IEEE operation; the order is the
// contract.
#pragma once

#include <cstdint>

#include "adamax/rules.hpp"
#include "core/host_device.hpp"
#include "core/scalars.hpp"

namespace adamax {

// Scalars rounded to the compute type and spread over a vector.
template <class V>
struct VectorScalars {
  using T = typename V::Scalar;
  V grad_scale, mean_scale, clip_scale, clip_value, decay, one_minus_beta_1, beta_2, epsilon, rate,
      ema_momentum, one_minus_ema_momentum;
  bool unscales, clips;  // whether these change anything; skipped otherwise

  VectorScalars() = default;
  ADAMAX_HOST_DEVICE VectorScalars(const Scalars& s, double clip)
      : grad_scale(static_cast<T>(s.grad_scale)),
        mean_scale(static_cast<T>(s.mean_scale)),
        clip_scale(static_cast<T>(clip)),
        clip_value(static_cast<T>(s.clip_value)),
        decay(static_cast<T>(s.decay)),
        one_minus_beta_1(static_cast<T>(s.one_minus_beta_1)),
        beta_2(static_cast<T>(s.beta_2)),
        epsilon(static_cast<T>(s.epsilon)),
        rate(static_cast<T>(s.rate)),
        ema_momentum(static_cast<T>(s.ema_momentum)),
        // Of the rounded momentum, and exact: the two shares add up.
        one_minus_ema_momentum(T(1) - static_cast<T>(s.ema_momentum)),
        unscales(s.grad_scale != 1.0),
        clips(clip != 1.0 || s.clip_value != __builtin_inf()) {}
};

// Magnitude below which `m`, and `u` with epsilon outside, become zero, so that a parameter whose
// gradient stays zero never reaches subnormals, which x86 computes many times slower.
template <class T>
constexpr T kTiny = static_cast<T>(sizeof(T) == 4 ? 0x1p-102 : 0x1p-960);

// The gradient that moves the moments: clipped, and with the L2 decay.
template <class V>
ADAMAX_HOST_DEVICE V limited(V h, V w, DecayRule decay, const VectorScalars<V>& s) {
  if (s.clips) h = clamp(h * s.clip_scale, s.clip_value);
  return decay == DecayRule::kL2 ? h + w * s.decay : h;
}
template <class V>
ADAMAX_HOST_DEVICE V decayed(V w, DecayRule decay, const VectorScalars<V>& s) {
  return decay == DecayRule::kDecoupled ? w - w * s.decay : w;
}

// Epsilon has one of two places: in what the norm is compared with, or in what divides.
template <class V>
ADAMAX_HOST_DEVICE V magnitude(V h, EpsilonRule epsilon, const VectorScalars<V>& s) {
  return epsilon == EpsilonRule::kInside ? abs(h) + s.epsilon : abs(h);
}
template <class V>
ADAMAX_HOST_DEVICE V divisor(V u, EpsilonRule epsilon, const VectorScalars<V>& s) {
  return epsilon == EpsilonRule::kInside ? u : u + s.epsilon;
}

// From there on: with `h` limited and `w` decayed.
template <class V>
ADAMAX_HOST_DEVICE void update_limited(V& w, V h, V& m, V& u, EpsilonRule epsilon,
                                       const VectorScalars<V>& s) {
  const V tiny(kTiny<typename V::Scalar>);
  m = zero_below(m + (h - m) * s.one_minus_beta_1, tiny);
  // With epsilon inside, u falls no further than there, and a smaller one may be what divides.
  const V quiet_norm = epsilon == EpsilonRule::kInside ? V(0) : tiny;
  u = zero_below(maximum(u * s.beta_2, magnitude(h, epsilon, s)), quiet_norm);
  w = w - (s.rate * m) / divisor(u, epsilon, s);
}

// `h` is the gradient after unscaling and averaging over micro-batches.
template <class V>
ADAMAX_HOST_DEVICE void update(V& w, V h, V& m, V& u, DecayRule decay, EpsilonRule epsilon,
                               const VectorScalars<V>& s) {
  h = limited(h, w, decay, s);
  w = decayed(w, decay, s);
  update_limited(w, h, m, u, epsilon, s);
}

// The exponential moving average of the weights; `overwrite` in a loop stores it over them.
template <class V>
ADAMAX_HOST_DEVICE void update_average(V& average, V w, AverageMode mode,
                                       const VectorScalars<V>& s) {
  if (mode == AverageMode::kStart) average = w;
  if (mode == AverageMode::kRunning) {
    average = average * s.ema_momentum + w * s.one_minus_ema_momentum;
  }
}

}  // namespace adamax
