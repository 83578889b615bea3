// group_norm_silu with channels inside (NHWC): a sample is cut into pieces of whole pixels, statistics are vectors over
// channels that are combined at the end. Pieces depend on the shape alone, so the number of threads changes no bit.
#pragma once

#include "group_norm.h"

namespace hypersd {
namespace {

constexpr int kRows = 4;         // pixels taken at once: what belongs to a channel is loaded once for all of them
constexpr int64_t kAhead = 16;   // pixels from what is computed to what is fetched: rows are too short to be foreseen

// Pixels of a piece; `item` counts the pieces of all samples.
template <class T>
struct Piece {
  int64_t sample, start, pixels;  // start: its first element

  HYPERSD_INLINE Piece(const Problem<T>& p, int64_t item) : sample(item / p.pieces) {
    const int64_t first = item % p.pieces * p.piece_pixels, left = p.pixels - first;
    pixels = left < p.piece_pixels ? left : p.piece_pixels;
    start = (sample * p.pixels + first) * p.channels;
  }
};

// Memory of a worker, vectors over channels. Those of one sample: z = (x + shift - mean) scale + bias,
// dx = dz scale - ((x + shift - mean) slope + offset).
template <class T>
struct Channels {
  using C = Work<T>;
  std::unique_ptr<C[]> memory;
  std::unique_ptr<double[]> wide;  // two vectors
  C *mean, *scale, *slope, *offset, *a, *b;
  const C* shift = nullptr;  // of the problem
  int64_t sample = -1;  // whose `mean` and `scale` are

  explicit Channels(const Problem<T>& p) : memory(new C[6 * p.channels]), wide(new double[2 * p.channels]) {
    C* at = memory.get();
    for (C** vector : {&mean, &scale, &slope, &offset, &a, &b}) *vector = at, at += p.channels;
  }
  void fill(const Problem<T>& p, int64_t n) {
    if (sample == n) return;
    sample = n;
    if (p.shift) shift = p.shift + n * p.channels;
    const int64_t group = p.per_group();
    for (int64_t g = 0; g < p.groups; ++g)
      for (int64_t c = g * group; c < (g + 1) * group; ++c)
        mean[c] = p.mean[n * p.groups + g], scale[c] = p.rstd[n * p.groups + g] * p.weight[c];
  }
};
template <class T>
using Vectors = Channels<T>&;

template <class T>
HYPERSD_INLINE void fetch(const T* from, int64_t count) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i);
#endif
}

// four(i) for kRows pixels from i on, one(i) for a single one: all of [begin, end). `ahead(i, count)` fetches pixels.
template <class Four, class One, class Ahead>
HYPERSD_INLINE void over_pixels(int64_t begin, int64_t end, const Four& four, const One& one, const Ahead& ahead) {
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) {
    ahead(i + kAhead, kRows);
    four(i);
  }
  for (; i < end; ++i) one(i);
}

// Adds d and d^2, d = x - center, channel by channel.
template <int Rows, class T, class C>
HYPERSD_INLINE void moments_rows(const T* HYPERSD_RESTRICT x, const C* HYPERSD_RESTRICT center, int64_t channels,
                                 C* HYPERSD_RESTRICT total, C* HYPERSD_RESTRICT squares) {
  for (int64_t c = 0; c < channels; ++c) {
    C sum = 0, square = 0;
    for (int r = 0; r < Rows; ++r) {
      const C d = widen(x[r * channels + c]) - center[c];
      sum += d;
      square += d * d;
    }
    total[c] += sum;
    squares[c] += square;
  }
}
template <class T, class C>
HYPERSD_INLINE void add_pixel(const T* HYPERSD_RESTRICT x, C share, int64_t channels, C* HYPERSD_RESTRICT mean) {
  for (int64_t c = 0; c < channels; ++c) mean[c] += widen(x[c]) * share;
}
// Joins the sums of `n` pixels about `mean` to the moments of `seen` pixels.
template <class C>
HYPERSD_INLINE void join(const C* HYPERSD_RESTRICT total, const C* HYPERSD_RESTRICT spread, double seen, double n,
                         int64_t channels, C* HYPERSD_RESTRICT mean, C* HYPERSD_RESTRICT squares) {
  const C share = static_cast<C>(1 / (seen + n));
  for (int64_t c = 0; c < channels; ++c) {
    squares[c] += spread[c] - total[c] * total[c] * share;  // about the old mean, less what moving it takes away
    mean[c] += total[c] * share;
  }
}

template <class T>
HYPERSD_INLINE void inside_moments(const Problem<T>& p, int64_t item, Vectors<T> k) {
  using C = Work<T>;
  const int64_t channels = p.channels;
  const Piece<T> piece(p, item);
  const T* x = p.normalized() + piece.start;
  C *mean = p.partial + item * 2 * channels, *squares = mean + channels;
  add_residual(p, piece.start, piece.pixels * channels);  // a loop of its own streams fastest; h is in cache then
  // the first pixels are taken about the mean of a few of them: near enough that squares do not cancel
  const int64_t few = piece.pixels < 8 ? piece.pixels : 8;
  for (int64_t c = 0; c < channels; ++c) mean[c] = squares[c] = 0;
  for (int64_t i = 0; i < few; ++i) add_pixel<T, C>(x + i * channels, static_cast<C>(1.0 / few), channels, mean);
  for (int64_t first = 0; first < piece.pixels; first += kPixels) {
    const int64_t stop = piece.pixels - first < kPixels ? piece.pixels : first + kPixels;
    for (int64_t c = 0; c < channels; ++c) k.a[c] = k.b[c] = 0;
    over_pixels(
        first, stop,
        [&](int64_t i) HYPERSD_LAMBDA_INLINE { moments_rows<kRows, T, C>(x + i * channels, mean, channels, k.a, k.b); },
        [&](int64_t i) HYPERSD_LAMBDA_INLINE { moments_rows<1, T, C>(x + i * channels, mean, channels, k.a, k.b); },
        [&](int64_t i, int64_t n) HYPERSD_LAMBDA_INLINE { fetch(x + i * channels, n * channels); });
    join<C>(k.a, k.b, static_cast<double>(first), static_cast<double>(stop - first), channels, mean, squares);
  }
}

template <class C>
HYPERSD_INLINE void add_means(const C* HYPERSD_RESTRICT mean, double share, int64_t channels, double* HYPERSD_RESTRICT to) {
  for (int64_t c = 0; c < channels; ++c) to[c] += share * mean[c];
}
template <class C>
HYPERSD_INLINE void add_squares(const C* HYPERSD_RESTRICT mean, const C* HYPERSD_RESTRICT squares,
                                const double* HYPERSD_RESTRICT center, double pixels, int64_t channels,
                                double* HYPERSD_RESTRICT to) {
  for (int64_t c = 0; c < channels; ++c) {
    const double apart = mean[c] - center[c];
    to[c] += squares[c] + pixels * apart * apart;
  }
}

// The statistics of the groups of a sample from those of its pieces: by channel, then over the channels of a group.
template <class T>
HYPERSD_INLINE void inside_finish(const Problem<T>& p, int64_t sample, Vectors<T> k) {
  const int64_t group = p.per_group(), channels = p.channels, first = sample * p.pieces;
  double *center = k.wide.get(), *squares = center + channels;
  const auto partial = [&](int64_t item) HYPERSD_LAMBDA_INLINE { return p.partial + item * 2 * channels; };
  const auto pixels = [&](int64_t item) HYPERSD_LAMBDA_INLINE { return static_cast<double>(Piece<T>(p, item).pixels); };
  for (int64_t c = 0; c < 2 * channels; ++c) center[c] = 0;
  for (int64_t i = first; i < first + p.pieces; ++i) add_means(partial(i), pixels(i) / p.pixels, channels, center);
  for (int64_t i = first; i < first + p.pieces; ++i)
    add_squares(partial(i), partial(i) + channels, center, pixels(i), channels, squares);
  if (p.shift) add_means(p.shift + sample * channels, 1.0, channels, center);  // it moves no deviation of a channel
  for (int64_t g = 0; g < p.groups; ++g) {
    Moments moments;
    for (int64_t c = g * group; c < (g + 1) * group; ++c)
      moments.add(static_cast<double>(p.pixels), center[c], squares[c]);
    moments.finish(p.eps, p.mean[sample * p.groups + g], p.rstd[sample * p.groups + g]);
  }
}

template <int Rows, class T, bool Silu, bool Shift, class C>
HYPERSD_INLINE void apply_rows(const T* HYPERSD_RESTRICT x, const C* HYPERSD_RESTRICT shift,
                               const C* HYPERSD_RESTRICT mean, const C* HYPERSD_RESTRICT scale,
                               const C* HYPERSD_RESTRICT bias, int64_t channels, T* HYPERSD_RESTRICT y) {
  for (int64_t c = 0; c < channels; ++c)
    for (int r = 0; r < Rows; ++r) {
      const int64_t at = r * channels + c;
      const C centered = center<Shift>(x[at], shift_of<Shift>(shift, c), mean[c]);
      assign(y[at], activate<Silu>(centered * scale[c] + bias[c]));
    }
}

template <class T, bool Silu, bool Shift>
HYPERSD_INLINE void inside_apply(const Problem<T>& p, int64_t item, Vectors<T> k) {
  const Piece<T> piece(p, item);
  const int64_t channels = p.channels;
  k.fill(p, piece.sample);
  const T* x = p.normalized() + piece.start;
  T* y = p.out + piece.start;
  const auto rows = [&](auto count, int64_t i) HYPERSD_LAMBDA_INLINE {
    const int64_t at = i * channels;
    apply_rows<decltype(count)::value, T, Silu, Shift, Work<T>>(x + at, k.shift, k.mean, k.scale, p.bias, channels,
                                                                y + at);
  };
  over_pixels(
      0, piece.pixels, [&](int64_t i) HYPERSD_LAMBDA_INLINE { rows(std::integral_constant<int, kRows>{}, i); },
      [&](int64_t i) HYPERSD_LAMBDA_INLINE { rows(std::integral_constant<int, 1>{}, i); },
      [&](int64_t i, int64_t n) HYPERSD_LAMBDA_INLINE { fetch(x + i * channels, n * channels); });
}

// a += dz, b += dz (x + shift - mean); with `Keep` leaves dz itself in `dz`.
template <int Rows, class T, bool Silu, bool Shift, bool Keep, class C>
HYPERSD_INLINE void sum_rows(const T* HYPERSD_RESTRICT x, const T* HYPERSD_RESTRICT dy, const C* HYPERSD_RESTRICT shift,
                             const C* HYPERSD_RESTRICT mean, const C* HYPERSD_RESTRICT scale,
                             const C* HYPERSD_RESTRICT bias, int64_t channels, C* HYPERSD_RESTRICT dz,
                             C* HYPERSD_RESTRICT a, C* HYPERSD_RESTRICT b) {
  for (int64_t c = 0; c < channels; ++c) {
    C sum = 0, product = 0;
    for (int r = 0; r < Rows; ++r) {
      const int64_t at = r * channels + c;
      const C centered = center<Shift>(x[at], shift_of<Shift>(shift, c), mean[c]);
      const C g = derive<Silu>(widen(dy[at]), centered * scale[c] + bias[c]);
      if (Keep) dz[at] = g;
      sum += g;
      product += g * centered;
    }
    a[c] += sum;
    b[c] += product;
  }
}
template <class C>
HYPERSD_INLINE void add_to(C* HYPERSD_RESTRICT to, const C* HYPERSD_RESTRICT from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Where dz waits for the second pass: in dx, if that has the type to hold it.
template <class T>
HYPERSD_INLINE Work<T>* waiting(const Problem<T>& p) {
  if constexpr (std::is_same_v<T, Work<T>>) return p.keep ? p.out : nullptr;
  return nullptr;
}

// Sums by channel of a piece.
template <class T, bool Silu, bool Shift>
HYPERSD_INLINE void inside_sums(const Problem<T>& p, int64_t item, Vectors<T> k) {
  using C = Work<T>;
  const int64_t channels = p.channels;
  const Piece<T> piece(p, item);
  k.fill(p, piece.sample);
  const T *x = p.x + piece.start, *dy = p.dy + piece.start;
  C* const dz = waiting(p) ? waiting(p) + piece.start : nullptr;
  C *channel_dz = p.channel_dz + item * channels, *channel_dzx = p.channel_dzx + item * channels;
  for (int64_t c = 0; c < channels; ++c) channel_dz[c] = channel_dzx[c] = 0;
  const auto sums = [&](auto rows, int64_t i) HYPERSD_LAMBDA_INLINE {
    constexpr int kCount = decltype(rows)::value;
    const int64_t at = i * channels;
    const auto add = [&](auto keep, C* to) HYPERSD_LAMBDA_INLINE {
      sum_rows<kCount, T, Silu, Shift, decltype(keep)::value, C>(x + at, dy + at, k.shift, k.mean, k.scale, p.bias,
                                                                 channels, to, k.a, k.b);
    };
    if (dz) add(std::true_type{}, dz + at);
    else add(std::false_type{}, nullptr);
  };
  for (int64_t first = 0; first < piece.pixels; first += kPixels) {
    const int64_t stop = piece.pixels - first < kPixels ? piece.pixels : first + kPixels;
    for (int64_t c = 0; c < channels; ++c) k.a[c] = k.b[c] = 0;
    over_pixels(
        first, stop, [&](int64_t i) HYPERSD_LAMBDA_INLINE { sums(std::integral_constant<int, kRows>{}, i); },
        [&](int64_t i) HYPERSD_LAMBDA_INLINE { sums(std::integral_constant<int, 1>{}, i); },
        [&](int64_t i, int64_t n) HYPERSD_LAMBDA_INLINE {
          fetch(x + i * channels, n * channels);
          fetch(dy + i * channels, n * channels);
        });
    add_to<C>(channel_dz, k.a, channels);
    add_to<C>(channel_dzx, k.b, channels);
  }
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t c = g * p.per_group(); c < (g + 1) * p.per_group(); ++c)
      channel_dzx[c] *= p.rstd[piece.sample * p.groups + g];
}

// offset and slope of the groups of a sample from the sums of its pieces.
template <class T>
HYPERSD_INLINE void inside_finish_sums(const Problem<T>& p, int64_t sample, Vectors<T> k) {
  using C = Work<T>;
  const int64_t group = p.per_group(), channels = p.channels;
  double *dz = k.wide.get(), *dzx = dz + channels;
  for (int64_t c = 0; c < 2 * channels; ++c) dz[c] = 0;
  for (int64_t i = sample * p.pieces; i < (sample + 1) * p.pieces; ++i) {
    add_means(p.channel_dz + i * channels, 1.0, channels, dz);
    add_means(p.channel_dzx + i * channels, 1.0, channels, dzx);
  }
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t item = sample * p.groups + g;
    double offset = 0, slope = 0;
    for (int64_t c = g * group; c < (g + 1) * group; ++c) offset += p.weight[c] * dz[c], slope += p.weight[c] * dzx[c];
    const double factor = p.rstd[item] / static_cast<double>(group * p.pixels);
    p.offset[item] = static_cast<C>(factor * offset), p.slope[item] = static_cast<C>(factor * slope * p.rstd[item]);
  }
}

// With `Kept` dz lies in dx; with `Joined` dh is added.
template <int Rows, class T, bool Silu, bool Shift, bool Kept, bool Joined, class C>
HYPERSD_INLINE void dx_rows(const T* HYPERSD_RESTRICT x, const T* HYPERSD_RESTRICT dy, const C* HYPERSD_RESTRICT shift,
                            const C* HYPERSD_RESTRICT mean, const C* HYPERSD_RESTRICT scale,
                            const C* HYPERSD_RESTRICT bias, const C* HYPERSD_RESTRICT slope,
                            const C* HYPERSD_RESTRICT offset, const T* HYPERSD_RESTRICT dh, int64_t channels,
                            T* HYPERSD_RESTRICT dx) {
  for (int64_t c = 0; c < channels; ++c)
    for (int r = 0; r < Rows; ++r) {
      const int64_t at = r * channels + c;
      const C centered = center<Shift>(x[at], shift_of<Shift>(shift, c), mean[c]);
      const C g = Kept ? widen(dx[at]) : derive<Silu>(widen(dy[at]), centered * scale[c] + bias[c]);
      const C own = g * scale[c] - (centered * slope[c] + offset[c]);
      assign(dx[at], Joined ? own + widen(dh[at]) : own);
    }
}

template <class T, bool Silu, bool Shift>
HYPERSD_INLINE void inside_dx(const Problem<T>& p, int64_t item, Vectors<T> k) {
  using C = Work<T>;
  const Piece<T> piece(p, item);
  const int64_t channels = p.channels, group = p.per_group();
  k.fill(p, piece.sample);
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t c = g * group; c < (g + 1) * group; ++c)
      k.slope[c] = p.slope[piece.sample * p.groups + g], k.offset[c] = p.offset[piece.sample * p.groups + g];
  const T *x = p.x + piece.start, *dy = p.dy + piece.start, *dh = p.dh ? p.dh + piece.start : nullptr;
  T* dx = p.out + piece.start;
  const bool kept = waiting(p);
  const auto rows = [&](auto count, int64_t i) HYPERSD_LAMBDA_INLINE {
    constexpr int kCount = decltype(count)::value;
    const int64_t at = i * channels;
    with_flag(kept, [&](auto keeps) HYPERSD_LAMBDA_INLINE {
      with_flag(dh, [&](auto joins) HYPERSD_LAMBDA_INLINE {
        dx_rows<kCount, T, Silu, Shift, decltype(keeps)::value, decltype(joins)::value, C>(
            x + at, dy + at, k.shift, k.mean, k.scale, p.bias, k.slope, k.offset, dh + (dh ? at : 0), channels, dx + at);
      });
    });
  };
  over_pixels(
      0, piece.pixels, [&](int64_t i) HYPERSD_LAMBDA_INLINE { rows(std::integral_constant<int, kRows>{}, i); },
      [&](int64_t i) HYPERSD_LAMBDA_INLINE { rows(std::integral_constant<int, 1>{}, i); },
      [&](int64_t i, int64_t n) HYPERSD_LAMBDA_INLINE {
        fetch(x + i * channels, n * channels);
        fetch((kept ? dx : dy) + i * channels, n * channels);
        if (dh) fetch(dh + i * channels, n * channels);
      });
}

HYPERSD_NORM_PLAIN(inside_moments, Vectors)
HYPERSD_NORM_PLAIN(inside_finish, Vectors)
HYPERSD_NORM(inside_apply, Vectors)
HYPERSD_NORM(inside_sums, Vectors)
HYPERSD_NORM_PLAIN(inside_finish_sums, Vectors)
HYPERSD_NORM(inside_dx, Vectors)

}  // namespace
}  // namespace hypersd
