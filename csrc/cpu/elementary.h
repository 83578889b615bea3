// Numbers as loops want them: types read and written in place, elementary functions without branches or calls (double goes
// to libm), sums in lanes. So the loops around them vectorise.
#pragma once

#include <cmath>

#include "rows.h"

namespace hypersd {

// 2^t to about 2 ulp for t in [-126, 128]: 2^n 2^f with f in [-1/2, 1/2], 2^f fitted to 9e-8 (Coarse: 3e-6, for 16-bit
// results). Above it is infinity, from -127 on 0, and a NaN becomes a number: use the result beside t. The limits are
// integer minima of the bits of t, signed for the upper, unsigned for the lower.
template <bool Coarse = false>
HYPERSD_INLINE float power_of_two(float t) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  constexpr int32_t kUpper = 0x43000000;    // 128
  constexpr uint32_t kLower = 0xc2fe0000u;  // -127
  const int32_t signed_bits = static_cast<int32_t>(float_to_bits(t));
  const uint32_t capped = static_cast<uint32_t>(signed_bits < kUpper ? signed_bits : kUpper);
  t = bits_to_float(capped < kLower ? capped : kLower);
  const float shifted = t + kRound, f = t - (shifted - kRound);
  float p;
  if (Coarse) {
    p = 9.58285287e-3f;
    p = p * f + 5.59064249e-2f;
    p = p * f + 2.40240986e-1f;
    p = p * f + 6.93124193e-1f;
  } else {
    p = 1.32647269e-3f;
    p = p * f + 9.67151266e-3f;
    p = p * f + 5.55073374e-2f;
    p = p * f + 2.40222421e-1f;
    p = p * f + 6.93146978e-1f;
  }
  p = p * f + 1.0f;
  return bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
}

// 1 + e^-v. Rounding v log2(e) costs relative accuracy only where the result is large.
HYPERSD_INLINE float one_plus_exp(float v) { return 1.0f + power_of_two(v * -1.44269504f); }
HYPERSD_INLINE double one_plus_exp(double v) { return 1.0 + std::exp(-v); }

// The standard normal distribution: Phi(v) to about 4 ulp (of Phi(v), also in the lower tail to |v| = 2) and its density.
// Phi(-a) = exp(-a^2 / 2) P(1 / (1 + k a)) for a >= 0 (the form is Abramowitz and Stegun 7.1.26), P fitted to 3e-8
// relative, Coarse to 5e-5.
template <bool Coarse = false>
HYPERSD_INLINE void normal(float v, float& phi, float& density) {
  const float bell = power_of_two<Coarse>(v * v * -0.721347520f);
  const float t = 1.0f / (1.0f + (Coarse ? 0.28f : 0.295f) * std::fabs(v));
  float p;
  if (Coarse) {
    p = 0.337157721f;
    p = p * t - 0.161307362f;
    p = p * t + 0.239337912f;
    p = p * t + 0.0821496485f;
    p = p * t + 0.00264916261f;
  } else {
    p = 0.0397192331f;
    p = p * t - 0.184752417f;
    p = p * t + 0.273592245f;
    p = p * t - 0.119791195f;
    p = p * t + 0.168019409f;
    p = p * t + 0.0840671274f;
    p = p * t + 0.121858677f;
    p = p * t + 0.117268819f;
    p = p * t + 1.81164548e-5f;
  }
  const float tail = bell * p;
  phi = v < 0 ? tail : 1.0f - tail;
  density = 0.398942280f * bell;
}
template <bool = false>
HYPERSD_INLINE void normal(double v, double& phi, double& density) {
  phi = 0.5 * std::erfc(-v * 0.70710678118654752440);
  density = 0.39894228040143267794 * std::exp(-0.5 * v * v);
}

// T is the type in memory, Work<T> the one computed in.
enum class Half : uint16_t {};
enum class BFloat : uint16_t {};
template <class T>
struct WorkOf {
  using type = float;
};
template <>
struct WorkOf<double> {
  using type = double;
};
template <class T>
using Work = typename WorkOf<T>::type;

HYPERSD_INLINE float widen(float v) { return v; }
HYPERSD_INLINE double widen(double v) { return v; }
HYPERSD_INLINE float widen(BFloat v) { return from_bfloat16(static_cast<uint16_t>(v)); }
HYPERSD_INLINE float widen(Half v) { return from_half(static_cast<uint16_t>(v)); }
HYPERSD_INLINE void assign(float& to, float v) { to = v; }
HYPERSD_INLINE void assign(double& to, double v) { to = v; }
HYPERSD_INLINE void assign(BFloat& to, float v) { to = static_cast<BFloat>(to_bfloat16(v)); }
HYPERSD_INLINE void assign(Half& to, float v) { to = static_cast<Half>(to_half(v)); }

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
