// group_norm_silu with channels outside (NCHW): a group of a sample is one piece of memory and one task.
#pragma once

#include "group_norm.h"

namespace hypersd {
namespace {

template <class T, bool Silu, class C>
HYPERSD_INLINE void apply_row(const T* HYPERSD_RESTRICT x, C mean, C scale, C shift, int64_t count,
                              T* HYPERSD_RESTRICT y) {
  for (int64_t i = 0; i < count; ++i) assign(y[i], activate<Silu>((widen(x[i]) - mean) * scale + shift));
}

// Adds the sums of dz and dz (x - mean) over a row; with SiLU leaves dz itself in `dz`.
template <class T, bool Silu, class C>
HYPERSD_INLINE void sum_row(const T* HYPERSD_RESTRICT x, const T* HYPERSD_RESTRICT dy, C mean, C scale, C shift,
                            int64_t count, C* HYPERSD_RESTRICT dz, C& sum_dz, C& sum_dzx) {
  if (!Silu) {  // nothing to keep: two plain sums vectorise better
    sum_dz += sum<C>(count, [=](int64_t i) HYPERSD_LAMBDA_INLINE { return widen(dy[i]); });
    sum_dzx += sum<C>(count, [=](int64_t i) HYPERSD_LAMBDA_INLINE { return widen(dy[i]) * (widen(x[i]) - mean); });
    return;
  }
  constexpr int kLanes = 16;
  C a[kLanes] = {}, b[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const C centered = widen(x[i + j]) - mean, g = derive<Silu>(widen(dy[i + j]), centered * scale + shift);
      dz[i + j] = g;
      a[j] += g;
      b[j] += g * centered;
    }
  for (int j = 0; i < count; ++i, ++j) {
    const C centered = widen(x[i]) - mean, g = derive<Silu>(widen(dy[i]), centered * scale + shift);
    dz[i] = g;
    a[j] += g;
    b[j] += g * centered;
  }
  for (int half = kLanes / 2; half; half /= 2)
    for (int j = 0; j < half; ++j) a[j] += a[j + half], b[j] += b[j + half];
  sum_dz += a[0];
  sum_dzx += b[0];
}

// dx = dz scale - ((x - mean) slope + offset), with dz as kept by sum_row (Kept) or from dy
template <class T, bool Silu, bool Kept, class C>
HYPERSD_INLINE void dx_row(const T* HYPERSD_RESTRICT x, const T* HYPERSD_RESTRICT dy, const C* HYPERSD_RESTRICT dz,
                           C mean, C scale, C shift, C slope, C offset, int64_t count, T* HYPERSD_RESTRICT dx) {
  for (int64_t i = 0; i < count; ++i) {
    const C centered = widen(x[i]) - mean;
    const C g = Kept ? dz[i] : derive<Silu>(widen(dy[i]), centered * scale + shift);
    assign(dx[i], g * scale - (centered * slope + offset));
  }
}

// Memory of a worker: nothing, or dz of a group, or of a row of it.
template <class T>
using Row = Work<T>*;

template <class T, bool Silu>
HYPERSD_INLINE void outside_forward(const Problem<T>& p, int64_t item, Row<T>) {
  using C = Work<T>;
  const int64_t group = p.per_group(), width = group * p.pixels;
  const T* x = p.x + item * width;
  Moments moments;
  for (int64_t first = 0; first < width; first += kChunk) {
    const int64_t count = width - first < kChunk ? width - first : kChunk;
    const T* HYPERSD_RESTRICT part = x + first;
    const C mean = sum<C>(count, [=](int64_t i) HYPERSD_LAMBDA_INLINE { return widen(part[i]); }) / count;
    const C squares = sum<C>(count, [=](int64_t i) HYPERSD_LAMBDA_INLINE {
      return (widen(part[i]) - mean) * (widen(part[i]) - mean);
    });
    moments.add(count, mean, squares);
  }
  C mean, rstd;
  moments.finish(p.eps, mean, rstd);
  p.mean[item] = mean, p.rstd[item] = rstd;
  const int64_t channel = item % p.groups * group;
  for (int64_t c = 0; c < group; ++c)
    apply_row<T, Silu, C>(x + c * p.pixels, mean, rstd * p.weight[channel + c], p.bias[channel + c], p.pixels,
                          p.out + item * width + c * p.pixels);
}

template <class T, bool Silu>
HYPERSD_INLINE void outside_backward(const Problem<T>& p, int64_t item, Row<T> scratch) {
  using C = Work<T>;
  const int64_t group = p.per_group(), width = group * p.pixels;
  const bool kept = Silu && width <= kScratch;
  const int64_t channel = item % p.groups * group, row = item / p.groups * p.channels + channel;
  const T *x = p.x + item * width, *dy = p.dy + item * width;
  const C mean = p.mean[item], rstd = p.rstd[item];
  const C *weight = p.weight + channel, *bias = p.bias + channel;
  double offset = 0, slope = 0;
  for (int64_t c = 0; c < group; ++c) {
    const int64_t at = c * p.pixels;
    C sum_dz = 0, sum_dzx = 0;
    sum_row<T, Silu, C>(x + at, dy + at, mean, rstd * weight[c], bias[c], p.pixels, scratch + (kept ? at : 0),
                        sum_dz, sum_dzx);
    p.channel_dz[row + c] = sum_dz, p.channel_dzx[row + c] = sum_dzx * rstd;
    offset += double(weight[c]) * sum_dz;
    slope += double(weight[c]) * sum_dzx * rstd;
  }
  if (!p.out) return;
  const C a = static_cast<C>(rstd * (offset / width)), b = static_cast<C>(double(rstd) * rstd * (slope / width));
  for (int64_t c = 0; c < group; ++c) {
    const int64_t at = c * p.pixels;
    T* dx = p.out + item * width + at;
    const C scale = rstd * weight[c];
    if (kept)
      dx_row<T, Silu, true, C>(x + at, dy + at, scratch + at, mean, scale, bias[c], b, a, p.pixels, dx);
    else
      dx_row<T, Silu, false, C>(x + at, dy + at, nullptr, mean, scale, bias[c], b, a, p.pixels, dx);
  }
}

HYPERSD_NORM(outside_forward, Row)
HYPERSD_NORM(outside_backward, Row)

}  // namespace
}  // namespace hypersd
