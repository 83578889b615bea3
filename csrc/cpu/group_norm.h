// What the loops of group_norm_silu share, whatever the memory order: types, the problem, statistics, SiLU.
#pragma once

#include <memory>
#include <type_traits>

#include "elementary.h"

namespace hypersd {
namespace {

constexpr int64_t kPiece = 32 * kChunk;     // elements of a piece of a sample
constexpr int64_t kShare = 32 * kChunk;     // elements for which a thread is worth waking
constexpr int64_t kScratch = 256 * kChunk;  // largest group (channels outside) whose dz is kept for the second pass
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
  const C* shift;                 // (batch, channels), what is added to x; null: nothing
  const T* residual;              // forward: h = x + residual, rounded, stands for x; null: x itself does
  T* h;
  const T* dh;                    // backward: what is added to dx; null: nothing
  C *mean, *rstd;                 // (batch, groups)
  C *channel_dz, *channel_dzx;    // sums of dz and dz x^ over pixels: (batch, channels), or (batch, pieces, channels)
  C *offset, *slope;              // (batch, groups): dx = rstd w dz - ((x - mean) slope + offset); channels inside alone
  bool keep;                      // channels inside: dz waits in `out` for the second pass
  int64_t piece_pixels, pieces;   // of a sample
  C* partial;                     // (batch, pieces, 2, channels): means and squared deviations of a piece by channel

  int64_t per_group() const { return channels / groups; }
  const T* normalized() const { return residual ? h : x; }
};

// h = x + residual of `count` elements from `at` on; nothing without a residual.
template <class T>
HYPERSD_INLINE void add_rows(const T* HYPERSD_RESTRICT x, const T* HYPERSD_RESTRICT residual, int64_t count,
                             T* HYPERSD_RESTRICT h) {
  for (int64_t i = 0; i < count; ++i) assign(h[i], widen(x[i]) + widen(residual[i]));
}
template <class T>
HYPERSD_INLINE void add_residual(const Problem<T>& p, int64_t at, int64_t count) {
  if (p.residual) add_rows(p.x + at, p.residual + at, count, p.h + at);
}

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

// The shift of channel c; 0, and nothing read, without one.
template <bool Shift, class C>
HYPERSD_INLINE C shift_of(const C* shift, int64_t c) { return Shift ? shift[c] : 0; }

// x + shift - mean; without a shift nothing is added.
template <bool Shift, class T, class C>
HYPERSD_INLINE C center(T x, C shift, C mean) { return (Shift ? widen(x) + shift : widen(x)) - mean; }

template <bool Silu, class C>
HYPERSD_INLINE C activate(C z) { return Silu ? z / one_plus_exp(z) : z; }

// dy silu'(z)
template <bool Silu, class C>
HYPERSD_INLINE C derive(C dy, C z) {
  if (!Silu) return dy;
  const C s = 1 / one_plus_exp(z);
  return dy * (s * (1 + z * (1 - s)));
}

// run(std::true_type) or run(std::false_type)
template <class F>
HYPERSD_INLINE void with_flag(bool flag, const F& run) { flag ? run(std::true_type{}) : run(std::false_type{}); }

// One function per type and instruction set: NAME(p, i, k), i the task, k its worker's memory. NAME is a template of the
// type, with HYPERSD_NORM also of whether SiLU follows and whether there is a shift.
#define HYPERSD_NORM_RUN(NAME, SUFFIX, T, K)                                                   \
  HYPERSD_KERNEL(NAME##_##SUFFIX, (const Problem<T>& p, int64_t i, K k), (p, i, k))            \
  void run_##NAME(const Problem<T>& p, int64_t i, K k) { NAME##_##SUFFIX(p, i, k); }
#define HYPERSD_NORM_OF(NAME, SUFFIX, T, K)                                                    \
  HYPERSD_INLINE void NAME##_##SUFFIX##_body(const Problem<T>& p, int64_t i, K k) {            \
    if (p.shift) p.silu ? NAME<T, true, true>(p, i, k) : NAME<T, false, true>(p, i, k);        \
    else p.silu ? NAME<T, true, false>(p, i, k) : NAME<T, false, false>(p, i, k);              \
  }                                                                                            \
  HYPERSD_NORM_RUN(NAME, SUFFIX, T, K)
#define HYPERSD_NORM_PLAIN_OF(NAME, SUFFIX, T, K)                                              \
  HYPERSD_INLINE void NAME##_##SUFFIX##_body(const Problem<T>& p, int64_t i, K k) { NAME<T>(p, i, k); } \
  HYPERSD_NORM_RUN(NAME, SUFFIX, T, K)
#define HYPERSD_NORM_TYPES(OF, NAME, K) \
  OF(NAME, float, float, K<float>) OF(NAME, double, double, K<double>) OF(NAME, bfloat, BFloat, K<BFloat>)
#define HYPERSD_NORM(NAME, K) HYPERSD_NORM_TYPES(HYPERSD_NORM_OF, NAME, K)
#define HYPERSD_NORM_PLAIN(NAME, K) HYPERSD_NORM_TYPES(HYPERSD_NORM_PLAIN_OF, NAME, K)

}  // namespace
}  // namespace hypersd
