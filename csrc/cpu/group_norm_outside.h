// group_norm_silu with channels outside (NCHW): a group of a sample is one piece of memory and one task.
#pragma once

#include "group_norm.h"

namespace hypersd {
namespace {

// `shift` of the row, which is one channel, is added to x with Shift.
template <class T, bool Silu, bool Shift, class C>
HYPERSD_INLINE void apply_row(const T* HYPERSD_RESTRICT x, C shift, C mean, C scale, C bias, int64_t count,
                              T* HYPERSD_RESTRICT y) {
  for (int64_t i = 0; i < count; ++i) assign(y[i], activate<Silu>(center<Shift>(x[i], shift, mean) * scale + bias));
}

// Adds the sums of dz and dz (x + shift - mean) over a row; with SiLU leaves dz itself in `dz`.
template <class T, bool Silu, bool Shift, class C>
HYPERSD_INLINE void sum_row(const T* HYPERSD_RESTRICT x, const T* HYPERSD_RESTRICT dy, C shift, C mean, C scale, C bias,
                            int64_t count, C* HYPERSD_RESTRICT dz, C& sum_dz, C& sum_dzx) {
  if (!Silu) {  // nothing to keep: two plain sums vectorise better
    sum_dz += sum<C>(count, [=](int64_t i) HYPERSD_LAMBDA_INLINE { return widen(dy[i]); });
    sum_dzx += sum<C>(count, [=](int64_t i) HYPERSD_LAMBDA_INLINE {
      return widen(dy[i]) * center<Shift>(x[i], shift, mean);
    });
    return;
  }
  constexpr int kLanes = 16;
  C a[kLanes] = {}, b[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const C centered = center<Shift>(x[i + j], shift, mean);
      const C g = derive<Silu>(widen(dy[i + j]), centered * scale + bias);
      dz[i + j] = g;
      a[j] += g;
      b[j] += g * centered;
    }
  for (int j = 0; i < count; ++i, ++j) {
    const C centered = center<Shift>(x[i], shift, mean), g = derive<Silu>(widen(dy[i]), centered * scale + bias);
    dz[i] = g;
    a[j] += g;
    b[j] += g * centered;
  }
  for (int half = kLanes / 2; half; half /= 2)
    for (int j = 0; j < half; ++j) a[j] += a[j + half], b[j] += b[j + half];
  sum_dz += a[0];
  sum_dzx += b[0];
}

// dx = dz scale - ((x + shift - mean) slope + offset), with dz as kept by sum_row (Kept) or from dy; and dh (Joined)
template <class T, bool Silu, bool Shift, bool Kept, bool Joined, class C>
HYPERSD_INLINE void dx_row(const T* HYPERSD_RESTRICT x, const T* HYPERSD_RESTRICT dy, const C* HYPERSD_RESTRICT dz,
                           const T* HYPERSD_RESTRICT dh, C shift, C mean, C scale, C bias, C slope, C offset,
                           int64_t count, T* HYPERSD_RESTRICT dx) {
  for (int64_t i = 0; i < count; ++i) {
    const C centered = center<Shift>(x[i], shift, mean);
    const C g = Kept ? dz[i] : derive<Silu>(widen(dy[i]), centered * scale + bias);
    const C own = g * scale - (centered * slope + offset);
    assign(dx[i], Joined ? own + widen(dh[i]) : own);
  }
}

// x + shift of the elements [first, first + count) of a group.
template <class T, class C>
HYPERSD_INLINE void add_shift(const T* HYPERSD_RESTRICT x, const C* HYPERSD_RESTRICT shift, int64_t pixels, int64_t first,
                              int64_t count, C* HYPERSD_RESTRICT sums) {
  const int64_t end = first + count;
  for (int64_t i = first; i < end;) {
    const int64_t c = i / pixels, stop = (c + 1) * pixels < end ? (c + 1) * pixels : end;
    for (; i < stop; ++i) sums[i - first] = widen(x[i]) + shift[c];
  }
}

// Memory of a worker: nothing, or dz of a group, or of a row of it.
template <class T>
using Row = Work<T>*;

template <class T, bool Silu, bool Shift>
HYPERSD_INLINE void outside_forward(const Problem<T>& p, int64_t item, Row<T>) {
  using C = Work<T>;
  const int64_t group = p.per_group(), width = group * p.pixels;
  const int64_t channel = item % p.groups * group, row = item / p.groups * p.channels + channel;
  const T* x = p.normalized() + item * width;
  const C* shift = Shift ? p.shift + row : nullptr;
  C sums[Shift ? kChunk : 1];
  Moments moments;
  for (int64_t first = 0; first < width; first += kChunk) {
    const int64_t count = width - first < kChunk ? width - first : kChunk;
    add_residual(p, item * width + first, count);
    const auto moments_of = [&](const auto* HYPERSD_RESTRICT part) HYPERSD_LAMBDA_INLINE {
      const C mean = sum<C>(count, [=](int64_t i) HYPERSD_LAMBDA_INLINE { return widen(part[i]); }) / count;
      const C squares = sum<C>(count, [=](int64_t i) HYPERSD_LAMBDA_INLINE {
        return (widen(part[i]) - mean) * (widen(part[i]) - mean);
      });
      moments.add(count, mean, squares);
    };
    if (Shift) {
      add_shift<T, C>(x, shift, p.pixels, first, count, sums);
      moments_of(sums);
    } else {
      moments_of(x + first);
    }
  }
  C mean, rstd;
  moments.finish(p.eps, mean, rstd);
  p.mean[item] = mean, p.rstd[item] = rstd;
  for (int64_t c = 0; c < group; ++c)
    apply_row<T, Silu, Shift, C>(x + c * p.pixels, shift_of<Shift>(shift, c), mean, rstd * p.weight[channel + c],
                                 p.bias[channel + c], p.pixels, p.out + item * width + c * p.pixels);
}

template <class T, bool Silu, bool Shift>
HYPERSD_INLINE void outside_backward(const Problem<T>& p, int64_t item, Row<T> scratch) {
  using C = Work<T>;
  const int64_t group = p.per_group(), width = group * p.pixels;
  const bool kept = Silu && width <= kScratch;
  const int64_t channel = item % p.groups * group, row = item / p.groups * p.channels + channel;
  const T *x = p.x + item * width, *dy = p.dy + item * width, *dh = p.dh ? p.dh + item * width : nullptr;
  const C mean = p.mean[item], rstd = p.rstd[item];
  const C *weight = p.weight + channel, *bias = p.bias + channel, *shift = Shift ? p.shift + row : nullptr;
  double offset = 0, slope = 0;
  for (int64_t c = 0; c < group; ++c) {
    const int64_t at = c * p.pixels;
    C sum_dz = 0, sum_dzx = 0;
    sum_row<T, Silu, Shift, C>(x + at, dy + at, shift_of<Shift>(shift, c), mean, rstd * weight[c], bias[c], p.pixels,
                               scratch + (kept ? at : 0), sum_dz, sum_dzx);
    p.channel_dz[row + c] = sum_dz, p.channel_dzx[row + c] = sum_dzx * rstd;
    offset += double(weight[c]) * sum_dz;
    slope += double(weight[c]) * sum_dzx * rstd;
  }
  if (!p.out) return;
  const C a = static_cast<C>(rstd * (offset / width)), b = static_cast<C>(double(rstd) * rstd * (slope / width));
  for (int64_t c = 0; c < group; ++c) {
    const int64_t at = c * p.pixels;
    T* dx = p.out + item * width + at;
    const C scale = rstd * weight[c], add = shift_of<Shift>(shift, c);
    with_flag(kept, [&](auto keeps) HYPERSD_LAMBDA_INLINE {
      with_flag(dh, [&](auto joins) HYPERSD_LAMBDA_INLINE {
        dx_row<T, Silu, Shift, decltype(keeps)::value, decltype(joins)::value, C>(
            x + at, dy + at, scratch + (kept ? at : 0), dh + (dh ? at : 0), add, mean, scale, bias[c], b, a, p.pixels, dx);
      });
    });
  }
}

HYPERSD_NORM(outside_forward, Row)
HYPERSD_NORM(outside_backward, Row)

}  // namespace
}  // namespace hypersd
