// What the loops of group_norm_silu share, whatever the memory order: types, the problem, statistics, SiLU.
#pragma once

#include <memory>

#include "elementary.h"

namespace hypersd {
namespace {

constexpr int64_t kPiece = 32 * kChunk;     // elements of a piece of a sample
constexpr int64_t kScratch = 256 * kChunk;  // largest group or sample whose dz is kept from the first pass to the second
constexpr int64_t kPixels = 64;             // summed in float before they join the sum of a piece

template <class T>
struct Problem {
  using C = Work<T>;
  int64_t batch, channels, groups, pixels;
  bool silu;
  double eps;
  const T *x, *dy;
  T* out;                         // y, or dx; null: not wanted
  const C *weight, *bias;         // by channel
  C *mean, *rstd;                 // (batch, groups)
  C *channel_dz, *channel_dzx;    // sums of dz and dz x^ over pixels: (batch, channels), or (batch, pieces, channels)
  C *offset, *slope;              // (batch, groups): dx = rstd w dz - ((x - mean) slope + offset); channels inside alone
  int64_t piece_pixels, pieces;   // of a sample
  C* partial;                     // (batch, pieces, 2, channels): means and squared deviations of a piece by channel

  int64_t per_group() const { return channels / groups; }
};

// Chan, Golub and LeVeque: the mean and the sum of squared deviations of two sets together.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  HYPERSD_INLINE void add(double n, double m, double s) {
    const double delta = m - mean, all = count + n;
    mean += delta * (n / all);
    squares += s + delta * delta * (count * n / all);
    count = all;
  }
  template <class C>
  HYPERSD_INLINE void finish(double eps, C& m, C& rstd) const {
    m = static_cast<C>(mean);
    rstd = static_cast<C>(1.0 / std::sqrt(squares / count + eps));
  }
};

template <bool Silu, class C>
HYPERSD_INLINE C activate(C z) { return Silu ? z / one_plus_exp(z) : z; }

// dy silu'(z)
template <bool Silu, class C>
HYPERSD_INLINE C derive(C dy, C z) {
  if (!Silu) return dy;
  const C s = 1 / one_plus_exp(z);
  return dy * (s * (1 + z * (1 - s)));
}

// One function per type and instruction set, with and without SiLU.
#define HYPERSD_NORM_OF(NAME, SUFFIX, T, PARAMETERS, ARGUMENTS)                \
  HYPERSD_INLINE void NAME##_##SUFFIX##_body PARAMETERS {                      \
    if (p.silu) NAME<T, true> ARGUMENTS; else NAME<T, false> ARGUMENTS;        \
  }                                                                            \
  HYPERSD_KERNEL(NAME##_##SUFFIX, PARAMETERS, ARGUMENTS)                       \
  void run_##NAME PARAMETERS { NAME##_##SUFFIX ARGUMENTS; }
#define HYPERSD_NORM(NAME)                                                                               \
  HYPERSD_NORM_OF(NAME, float, float, (const Problem<float>& p, int64_t b, int64_t e), (p, b, e))        \
  HYPERSD_NORM_OF(NAME, double, double, (const Problem<double>& p, int64_t b, int64_t e), (p, b, e))     \
  HYPERSD_NORM_OF(NAME, bfloat, BFloat, (const Problem<BFloat>& p, int64_t b, int64_t e), (p, b, e))
#define HYPERSD_NORM_KEPT(NAME, CONST)                                                                                  \
  HYPERSD_NORM_OF(NAME, float, float, (const Problem<float>& p, int64_t b, int64_t e, CONST float* k), (p, b, e, k))     \
  HYPERSD_NORM_OF(NAME, double, double, (const Problem<double>& p, int64_t b, int64_t e, CONST double* k), (p, b, e, k)) \
  HYPERSD_NORM_OF(NAME, bfloat, BFloat, (const Problem<BFloat>& p, int64_t b, int64_t e, CONST float* k), (p, b, e, k))

}  // namespace
}  // namespace hypersd
