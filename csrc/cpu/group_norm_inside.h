// group_norm_silu with channels inside (NHWC): a sample is cut into pieces of whole pixels, statistics are vectors over
// channels that are combined at the end. Pieces depend on the shape alone, so the number of threads changes no bit.
#pragma once

#include "group_norm.h"

namespace hypersd {
namespace {

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

// By channel of one sample: z = (x - mean) scale + shift, dx = dz scale - ((x - mean) slope + offset).
template <class T>
struct ByChannel {
  using C = Work<T>;
  std::unique_ptr<C[]> memory;
  C *mean, *rstd, *scale, *slope, *offset;

  explicit ByChannel(const Problem<T>& p)
      : memory(new C[5 * p.channels]), mean(memory.get()), rstd(mean + p.channels), scale(rstd + p.channels),
        slope(scale + p.channels), offset(slope + p.channels) {}
  void fill(const Problem<T>& p, int64_t sample, bool dx) {
    const int64_t group = p.per_group();
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t item = sample * p.groups + g;
      for (int64_t c = g * group; c < (g + 1) * group; ++c) {
        mean[c] = p.mean[item], rstd[c] = p.rstd[item], scale[c] = p.rstd[item] * p.weight[c];
        if (dx) slope[c] = p.slope[item], offset[c] = p.offset[item];
      }
    }
  }
};

// Adds d and d^2, d = x - center, channel by channel, for one pixel and for four.
template <class T, class C>
HYPERSD_INLINE void moments_pixel(const T* HYPERSD_RESTRICT x, const C* HYPERSD_RESTRICT center, int64_t channels,
                                  C* HYPERSD_RESTRICT total, C* HYPERSD_RESTRICT squares) {
  for (int64_t c = 0; c < channels; ++c) {
    const C d = widen(x[c]) - center[c];
    total[c] += d;
    squares[c] += d * d;
  }
}
template <class T, class C>
HYPERSD_INLINE void moments_four(const T* HYPERSD_RESTRICT x, const C* HYPERSD_RESTRICT center, int64_t channels,
                                 C* HYPERSD_RESTRICT total, C* HYPERSD_RESTRICT squares) {
  const T* HYPERSD_RESTRICT x1 = x + channels;
  const T* HYPERSD_RESTRICT x2 = x1 + channels;
  const T* HYPERSD_RESTRICT x3 = x2 + channels;
  for (int64_t c = 0; c < channels; ++c) {
    const C m = center[c], d0 = widen(x[c]) - m, d1 = widen(x1[c]) - m, d2 = widen(x2[c]) - m, d3 = widen(x3[c]) - m;
    total[c] += (d0 + d1) + (d2 + d3);
    squares[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
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

template <class T, bool>
HYPERSD_INLINE void inside_moments(const Problem<T>& p, int64_t begin, int64_t end) {
  using C = Work<T>;
  const int64_t channels = p.channels;
  std::unique_ptr<C[]> memory(new C[2 * channels]);
  C *total = memory.get(), *spread = total + channels;
  for (int64_t item = begin; item < end; ++item) {
    const Piece<T> piece(p, item);
    const T* x = p.x + piece.start;
    C *mean = p.partial + item * 2 * channels, *squares = mean + channels;
    // the first pixels are taken about the mean of a few of them: near enough that squares do not cancel
    const int64_t few = piece.pixels < 8 ? piece.pixels : 8;
    for (int64_t c = 0; c < channels; ++c) mean[c] = squares[c] = 0;
    for (int64_t i = 0; i < few; ++i) add_pixel<T, C>(x + i * channels, static_cast<C>(1.0 / few), channels, mean);
    for (int64_t first = 0; first < piece.pixels; first += kPixels) {
      const int64_t stop = piece.pixels - first < kPixels ? piece.pixels : first + kPixels;
      for (int64_t c = 0; c < channels; ++c) total[c] = spread[c] = 0;
      int64_t i = first;
      for (; i + 4 <= stop; i += 4) moments_four<T, C>(x + i * channels, mean, channels, total, spread);
      for (; i < stop; ++i) moments_pixel<T, C>(x + i * channels, mean, channels, total, spread);
      join<C>(total, spread, static_cast<double>(first), static_cast<double>(stop - first), channels, mean, squares);
    }
  }
}

// The statistics of the groups of samples [begin, end) from those of their pieces.
template <class T>
void inside_finish(const Problem<T>& p, int64_t begin, int64_t end) {
  const int64_t group = p.per_group();
  for (int64_t item = begin * p.groups; item < end * p.groups; ++item) {
    Moments moments;
    for (int64_t piece = 0; piece < p.pieces; ++piece) {
      const Work<T>* mean = p.partial + (item / p.groups * p.pieces + piece) * 2 * p.channels + item % p.groups * group;
      const Work<T>* squares = mean + p.channels;
      const double pixels = static_cast<double>(Piece<T>(p, piece).pixels);
      double center = 0, spread = 0, inner = 0;
      for (int64_t c = 0; c < group; ++c) center += mean[c];
      center /= group;
      for (int64_t c = 0; c < group; ++c) {
        spread += (mean[c] - center) * (mean[c] - center);
        inner += squares[c];
      }
      moments.add(pixels * group, center, inner + pixels * spread);
    }
    moments.finish(p.eps, p.mean[item], p.rstd[item]);
  }
}

template <class T, bool Silu, class C>
HYPERSD_INLINE void apply_pixel(const T* HYPERSD_RESTRICT x, const C* HYPERSD_RESTRICT mean,
                                const C* HYPERSD_RESTRICT scale, const C* HYPERSD_RESTRICT shift, int64_t channels,
                                T* HYPERSD_RESTRICT y) {
  for (int64_t c = 0; c < channels; ++c) assign(y[c], activate<Silu>((widen(x[c]) - mean[c]) * scale[c] + shift[c]));
}

template <class T, bool Silu>
HYPERSD_INLINE void inside_apply(const Problem<T>& p, int64_t begin, int64_t end) {
  ByChannel<T> by_channel(p);
  for (int64_t item = begin; item < end; ++item) {
    const Piece<T> piece(p, item);
    if (item == begin || item % p.pieces == 0) by_channel.fill(p, piece.sample, false);
    for (int64_t i = 0; i < piece.pixels; ++i) {
      const int64_t at = piece.start + i * p.channels;
      apply_pixel<T, Silu, Work<T>>(p.x + at, by_channel.mean, by_channel.scale, p.bias, p.channels, p.out + at);
    }
  }
}

// a += dz, b += dz (x - mean); with SiLU and `Keep` leaves dz itself in `dz`.
template <class T, bool Silu, bool Keep, class C>
HYPERSD_INLINE void sum_pixel(const T* HYPERSD_RESTRICT x, const T* HYPERSD_RESTRICT dy, const C* HYPERSD_RESTRICT mean,
                              const C* HYPERSD_RESTRICT scale, const C* HYPERSD_RESTRICT shift, int64_t channels,
                              C* HYPERSD_RESTRICT dz, C* HYPERSD_RESTRICT a, C* HYPERSD_RESTRICT b) {
  for (int64_t c = 0; c < channels; ++c) {
    const C centered = widen(x[c]) - mean[c], g = derive<Silu>(widen(dy[c]), centered * scale[c] + shift[c]);
    if (Keep) dz[c] = g;
    a[c] += g;
    b[c] += g * centered;
  }
}
template <class C>
HYPERSD_INLINE void add_to(C* HYPERSD_RESTRICT to, const C* HYPERSD_RESTRICT from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Sums by channel for whole pieces; dz is left in `kept`, memory for the sample of the first piece, where not null.
template <class T, bool Silu>
HYPERSD_INLINE void inside_sums(const Problem<T>& p, int64_t begin, int64_t end, Work<T>* kept) {
  using C = Work<T>;
  const int64_t channels = p.channels;
  ByChannel<T> by_channel(p);
  std::unique_ptr<C[]> memory(new C[2 * channels]);
  C *a = memory.get(), *b = a + channels;
  for (int64_t item = begin; item < end; ++item) {
    const Piece<T> piece(p, item);
    if (item == begin || item % p.pieces == 0) by_channel.fill(p, piece.sample, false);
    C *channel_dz = p.channel_dz + item * channels, *channel_dzx = p.channel_dzx + item * channels;
    for (int64_t c = 0; c < channels; ++c) channel_dz[c] = channel_dzx[c] = 0;
    for (int64_t first = 0; first < piece.pixels; first += kPixels) {
      const int64_t stop = piece.pixels - first < kPixels ? piece.pixels : first + kPixels;
      for (int64_t c = 0; c < 2 * channels; ++c) a[c] = 0;
      for (int64_t i = first; i < stop; ++i) {
        const int64_t at = piece.start + i * channels;
        if (kept)
          sum_pixel<T, Silu, true, C>(p.x + at, p.dy + at, by_channel.mean, by_channel.scale, p.bias, channels,
                                      kept + (at - piece.sample * p.pixels * channels), a, b);
        else
          sum_pixel<T, Silu, false, C>(p.x + at, p.dy + at, by_channel.mean, by_channel.scale, p.bias, channels,
                                       nullptr, a, b);
      }
      add_to<C>(channel_dz, a, channels);
      add_to<C>(channel_dzx, b, channels);
    }
    for (int64_t c = 0; c < channels; ++c) channel_dzx[c] *= by_channel.rstd[c];
  }
}

// offset and slope of the groups of samples [begin, end) from the sums of their pieces.
template <class T>
void inside_finish_sums(const Problem<T>& p, int64_t begin, int64_t end) {
  using C = Work<T>;
  const int64_t group = p.per_group();
  for (int64_t item = begin * p.groups; item < end * p.groups; ++item) {
    const int64_t first = item % p.groups * group;
    double offset = 0, slope = 0;
    for (int64_t piece = 0; piece < p.pieces; ++piece) {
      const int64_t at = (item / p.groups * p.pieces + piece) * p.channels;
      for (int64_t c = first; c < first + group; ++c) {
        offset += double(p.weight[c]) * p.channel_dz[at + c];
        slope += double(p.weight[c]) * p.channel_dzx[at + c];
      }
    }
    const double factor = p.rstd[item] / static_cast<double>(group * p.pixels);
    p.offset[item] = static_cast<C>(factor * offset), p.slope[item] = static_cast<C>(factor * slope * p.rstd[item]);
  }
}

template <class T, bool Silu, bool Kept, class C>
HYPERSD_INLINE void dx_pixel(const T* HYPERSD_RESTRICT x, const T* HYPERSD_RESTRICT dy, const C* HYPERSD_RESTRICT dz,
                             const C* HYPERSD_RESTRICT mean, const C* HYPERSD_RESTRICT scale,
                             const C* HYPERSD_RESTRICT shift, const C* HYPERSD_RESTRICT slope,
                             const C* HYPERSD_RESTRICT offset, int64_t channels, T* HYPERSD_RESTRICT dx) {
  for (int64_t c = 0; c < channels; ++c) {
    const C centered = widen(x[c]) - mean[c];
    const C g = Kept ? dz[c] : derive<Silu>(widen(dy[c]), centered * scale[c] + shift[c]);
    assign(dx[c], g * scale[c] - (centered * slope[c] + offset[c]));
  }
}

template <class T, bool Silu>
HYPERSD_INLINE void inside_dx(const Problem<T>& p, int64_t begin, int64_t end, const Work<T>* kept) {
  using C = Work<T>;
  const int64_t channels = p.channels;
  ByChannel<T> by_channel(p);
  for (int64_t item = begin; item < end; ++item) {
    const Piece<T> piece(p, item);
    if (item == begin || item % p.pieces == 0) by_channel.fill(p, piece.sample, true);
    for (int64_t i = 0; i < piece.pixels; ++i) {
      const int64_t at = piece.start + i * channels;
      const C* dz = kept + (at - piece.sample * p.pixels * channels);
      if (kept)
        dx_pixel<T, Silu, true, C>(p.x + at, p.dy + at, dz, by_channel.mean, by_channel.scale, p.bias, by_channel.slope,
                                   by_channel.offset, channels, p.out + at);
      else
        dx_pixel<T, Silu, false, C>(p.x + at, p.dy + at, nullptr, by_channel.mean, by_channel.scale, p.bias,
                                    by_channel.slope, by_channel.offset, channels, p.out + at);
    }
  }
}

HYPERSD_NORM(inside_moments)
HYPERSD_NORM(inside_apply)
HYPERSD_NORM_KEPT(inside_sums, )
HYPERSD_NORM_KEPT(inside_dx, const)

}  // namespace
}  // namespace hypersd
