// Elementary functions without branches or calls, so that the loops around them vectorise; double goes to libm.
#pragma once

#include <cmath>

#include "rows.h"

namespace hypersd {

// 2^t to about 2 ulp, for t in [-126, 127): 2^n 2^f with f in [-1/2, 1/2], 2^f fitted to 9e-8.
HYPERSD_INLINE float power_of_two(float t) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float shifted = t + kRound, f = t - (shifted - kRound);
  float p = 1.32647269e-3f;
  p = p * f + 9.67151266e-3f;
  p = p * f + 5.55073374e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  p = p * f + 1.0f;
  return bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
}

// 1 / (1 + e^-v). Rounding v log2(e) costs relative accuracy only where the result is small. A NaN becomes a number: use
// the result in a product with v.
HYPERSD_INLINE float sigmoid(float v) {
  float t = v * -1.44269504f;
  t = t > -126.0f ? t : -126.0f;
  t = t < 126.0f ? t : 126.0f;
  return 1.0f / (1.0f + power_of_two(t));
}
HYPERSD_INLINE double sigmoid(double v) { return 1.0 / (1.0 + std::exp(-v)); }

// The standard normal distribution: Phi(v) to about 4 ulp (of Phi(v), also in the lower tail to |v| = 2) and its density.
// Phi(-a) = exp(-a^2 / 2) P(1 / (1 + 0.295 a)) for a >= 0, P fitted to 3e-8 (the form is Abramowitz and Stegun 7.1.26).
HYPERSD_INLINE void normal(float v, float& phi, float& density) {
  float power = v * v * -0.721347520f;
  power = power > -126.0f ? power : -126.0f;
  const float bell = power_of_two(power), t = 1.0f / (1.0f + 0.295f * std::fabs(v));
  float p = 0.0397192331f;
  p = p * t - 0.184752417f;
  p = p * t + 0.273592245f;
  p = p * t - 0.119791195f;
  p = p * t + 0.168019409f;
  p = p * t + 0.0840671274f;
  p = p * t + 0.121858677f;
  p = p * t + 0.117268819f;
  p = p * t + 1.81164548e-5f;
  const float tail = bell * p;
  phi = v < 0 ? tail : 1.0f - tail;
  density = 0.398942280f * bell;
}
HYPERSD_INLINE void normal(double v, double& phi, double& density) {
  phi = 0.5 * std::erfc(-v * 0.70710678118654752440);
  density = 0.39894228040143267794 * std::exp(-0.5 * v * v);
}

// Sums in 32 lanes, in an order that depends on `count` alone: of term(i) for i in [0, count).
template <class C, class F>
HYPERSD_INLINE C sum(int64_t count, const F& term) {
  constexpr int kLanes = 32;
  C lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] += term(i + j);
  for (int j = 0; i < count; ++i, ++j) lane[j] += term(i);
  for (int half = kLanes / 2; half; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0];
}

}  // namespace hypersd
