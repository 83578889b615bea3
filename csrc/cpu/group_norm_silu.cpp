// GroupNorm, then SiLU: x^ = (x - mean) rstd per sample and group, z = w x^ + b per channel, y = z sigmoid(z).
//
// Two memory orders, each with its own loops. Channels outside (NCHW): a group of a sample is one piece of memory and
// one task. Channels inside (NHWC): a sample is cut into pieces of whole pixels, and statistics are vectors over channels,
// combined at the end. Pieces depend on the shape alone, so the number of threads changes no bit.
#include <memory>
#include <vector>

#include "elementary.h"
#include "kernels.h"

namespace hypersd {
namespace {

constexpr int64_t kBlock = 8 * kChunk;    // elements that channels-inside loops hold converted
constexpr int64_t kPiece = 32 * kChunk;   // elements of a piece of a sample
constexpr int64_t kScratch = 256 * kChunk;  // largest group whose dz is kept from the first pass to the second

template <class C>
struct Problem {
  int64_t batch, channels, groups, pixels;
  bool silu;
  double eps;
  const char *x, *dy;
  char* out;  // y, or dx; null: not wanted
  Type type, dy_type;
  const C *weight, *bias;      // by channel
  C *mean, *rstd;              // (batch, groups)
  C *channel_dz, *channel_dzx; // sums of dz and dz x^ over pixels: (batch, channels), or by piece (pieces, channels)
  C *offset, *slope;           // (batch, groups): dx = rstd w dz - ((x - mean) slope + offset); channels inside alone
  int64_t piece_pixels, pieces;  // of a sample
  C* partial;                    // (batch, pieces, 2, channels): means and squared deviations of a piece by channel

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

template <class C, bool Silu>
HYPERSD_INLINE C activate(C z) { return Silu ? z * sigmoid(z) : z; }

// dy silu'(z)
template <class C, bool Silu>
HYPERSD_INLINE C derive(C dy, C z) {
  if (!Silu) return dy;
  const C s = sigmoid(z);
  return dy * (s * (1 + z * (1 - s)));
}

// The loops proper. Pointers are parameters, because only there compilers hold on to `restrict`.

// y = activate((x - mean) scale + shift) over one row of a channel
template <class C, bool Silu>
HYPERSD_INLINE void apply_row(const C* HYPERSD_RESTRICT x, C mean, C scale, C shift, int64_t count,
                              C* HYPERSD_RESTRICT y) {
  for (int64_t i = 0; i < count; ++i) y[i] = activate<C, Silu>((x[i] - mean) * scale + shift);
}

// the same over the channels of one pixel
template <class C, bool Silu>
HYPERSD_INLINE void apply_pixel(const C* HYPERSD_RESTRICT x, const C* HYPERSD_RESTRICT mean,
                                const C* HYPERSD_RESTRICT scale, const C* HYPERSD_RESTRICT shift, int64_t count,
                                C* HYPERSD_RESTRICT y) {
  for (int64_t c = 0; c < count; ++c) y[c] = activate<C, Silu>((x[c] - mean[c]) * scale[c] + shift[c]);
}

template <class C, bool Silu>
HYPERSD_INLINE void derive_row(const C* HYPERSD_RESTRICT x, const C* HYPERSD_RESTRICT dy, C mean, C scale, C shift,
                               int64_t count, C* HYPERSD_RESTRICT dz) {
  for (int64_t i = 0; i < count; ++i) dz[i] = derive<C, Silu>(dy[i], (x[i] - mean) * scale + shift);
}

template <class C, bool Silu>
HYPERSD_INLINE void derive_pixel(const C* HYPERSD_RESTRICT x, const C* HYPERSD_RESTRICT dy,
                                 const C* HYPERSD_RESTRICT mean, const C* HYPERSD_RESTRICT scale,
                                 const C* HYPERSD_RESTRICT shift, int64_t count, C* HYPERSD_RESTRICT dz) {
  for (int64_t c = 0; c < count; ++c) dz[c] = derive<C, Silu>(dy[c], (x[c] - mean[c]) * scale[c] + shift[c]);
}

// dx = dz scale - ((x - mean) slope + offset)
template <class C>
HYPERSD_INLINE void dx_row(const C* HYPERSD_RESTRICT x, const C* HYPERSD_RESTRICT dz, C mean, C scale, C slope,
                           C offset, int64_t count, C* HYPERSD_RESTRICT dx) {
  for (int64_t i = 0; i < count; ++i) dx[i] = dz[i] * scale - ((x[i] - mean) * slope + offset);
}

template <class C>
HYPERSD_INLINE void dx_pixel(const C* HYPERSD_RESTRICT x, const C* HYPERSD_RESTRICT dz, const C* HYPERSD_RESTRICT mean,
                             const C* HYPERSD_RESTRICT scale, const C* HYPERSD_RESTRICT slope,
                             const C* HYPERSD_RESTRICT offset, int64_t count, C* HYPERSD_RESTRICT dx) {
  for (int64_t c = 0; c < count; ++c) dx[c] = dz[c] * scale[c] - ((x[c] - mean[c]) * slope[c] + offset[c]);
}

// a += v, b += v (x - mean), channel by channel
template <class C>
HYPERSD_INLINE void add_pixel(const C* HYPERSD_RESTRICT v, const C* HYPERSD_RESTRICT x, const C* HYPERSD_RESTRICT mean,
                              int64_t count, C* HYPERSD_RESTRICT a, C* HYPERSD_RESTRICT b) {
  for (int64_t c = 0; c < count; ++c) {
    a[c] += v[c];
    b[c] += v[c] * (x[c] - mean[c]);
  }
}

// ---- channels outside -----------------------------------------------------------------------------------------------

// Calls run(first channel, channels, first pixel, pixels) over pieces of a group: whole channels where several fit.
template <class C, class F>
HYPERSD_INLINE void over_rows(const Problem<C>& p, const F& run) {
  const int64_t together = p.pixels < kChunk ? kChunk / p.pixels : 1, group = p.per_group();
  for (int64_t c = 0; c < group; c += together) {
    const int64_t rows = group - c < together ? group - c : together;
    for (int64_t first = 0; first < p.pixels; first += kChunk)
      run(c, rows, first, p.pixels - first < kChunk ? p.pixels - first : kChunk);
  }
}

template <class C, bool Silu>
HYPERSD_INLINE void outside_forward(const Problem<C>& p, int64_t begin, int64_t end) {
  alignas(64) C buffer[2][kChunk];
  const int64_t group = p.per_group(), width = group * p.pixels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t start = item * width;
    Moments moments;
    const C* HYPERSD_RESTRICT x = nullptr;
    for (int64_t first = 0; first < width; first += kChunk) {
      const int64_t count = width - first < kChunk ? width - first : kChunk;
      x = load<C>(p.x, p.type, start + first, count, buffer[0]);
      const C mean = sum<C>(count, [&](int64_t i) HYPERSD_LAMBDA_INLINE { return x[i]; }) / count;
      const C squares = sum<C>(count, [&](int64_t i) HYPERSD_LAMBDA_INLINE { return (x[i] - mean) * (x[i] - mean); });
      moments.add(count, mean, squares);
    }
    C mean, rstd;
    moments.finish(p.eps, mean, rstd);
    p.mean[item] = mean, p.rstd[item] = rstd;
    const C* weight = p.weight + item % p.groups * group;
    const C* bias = p.bias + item % p.groups * group;
    const bool held = width <= kChunk;  // x of the whole group is still in the buffer
    over_rows<C>(p, [&](int64_t channel, int64_t rows, int64_t first, int64_t pixels) HYPERSD_LAMBDA_INLINE {
      const int64_t at = channel * p.pixels + first, count = rows * pixels;
      const C* in = held ? x + at : load<C>(p.x, p.type, start + at, count, buffer[0]);
      C* y = target<C>(p.out, p.type, start + at, buffer[1]);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = r * pixels;
        apply_row<C, Silu>(in + i, mean, rstd * weight[channel + r], bias[channel + r], pixels, y + i);
      }
      store<C>(p.out, p.type, start + at, count, y);
    });
  }
}

template <class C, bool Silu>
HYPERSD_INLINE void outside_backward(const Problem<C>& p, int64_t begin, int64_t end) {
  alignas(64) C buffer[4][kChunk];
  const int64_t group = p.per_group(), width = group * p.pixels;
  const bool keep = Silu && width <= kScratch;  // dz, from the first pass to the second
  std::unique_ptr<C[]> scratch(new C[keep ? width : 1]);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t start = item * width, first_channel = item % p.groups * group;
    const C* weight = p.weight + first_channel;
    const C* bias = p.bias + first_channel;
    C* channel_dz = p.channel_dz + item / p.groups * p.channels + first_channel;
    C* channel_dzx = p.channel_dzx + item / p.groups * p.channels + first_channel;
    const C mean = p.mean[item], rstd = p.rstd[item];
    for (int64_t c = 0; c < group; ++c) channel_dz[c] = channel_dzx[c] = 0;
    over_rows<C>(p, [&](int64_t channel, int64_t rows, int64_t first, int64_t pixels) HYPERSD_LAMBDA_INLINE {
      const int64_t at = channel * p.pixels + first, count = rows * pixels;
      const C* x = load<C>(p.x, p.type, start + at, count, buffer[0]);
      const C* dy = load<C>(p.dy, p.dy_type, start + at, count, buffer[1]);
      C* dz = keep ? scratch.get() + at : buffer[2];
      for (int64_t r = 0; r < rows; ++r) {
        const C* HYPERSD_RESTRICT row = x + r * pixels;
        const C* HYPERSD_RESTRICT g = Silu ? dz + r * pixels : dy + r * pixels;
        if (Silu)
          derive_row<C, Silu>(row, dy + r * pixels, mean, rstd * weight[channel + r], bias[channel + r], pixels,
                              dz + r * pixels);
        channel_dz[channel + r] += sum<C>(pixels, [&](int64_t i) HYPERSD_LAMBDA_INLINE { return g[i]; });
        channel_dzx[channel + r] +=
            sum<C>(pixels, [&](int64_t i) HYPERSD_LAMBDA_INLINE { return g[i] * (row[i] - mean); });
      }
    });
    for (int64_t c = 0; c < group; ++c) channel_dzx[c] *= rstd;
    if (!p.out) continue;
    double offset = 0, slope = 0;
    for (int64_t c = 0; c < group; ++c) {
      offset += double(weight[c]) * channel_dz[c];
      slope += double(weight[c]) * channel_dzx[c];
    }
    const C a = static_cast<C>(rstd * (offset / width)), b = static_cast<C>(double(rstd) * rstd * (slope / width));
    over_rows<C>(p, [&](int64_t channel, int64_t rows, int64_t first, int64_t pixels) HYPERSD_LAMBDA_INLINE {
      const int64_t at = channel * p.pixels + first, count = rows * pixels;
      const C* x = load<C>(p.x, p.type, start + at, count, buffer[0]);
      const C* dy = keep ? nullptr : load<C>(p.dy, p.dy_type, start + at, count, buffer[1]);
      C* dx = target<C>(p.out, p.type, start + at, buffer[3]);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = r * pixels;
        const C scale = rstd * weight[channel + r];
        const C* dz = keep ? scratch.get() + at + i : Silu ? buffer[2] + i : dy + i;
        if (Silu && !keep) derive_row<C, Silu>(x + i, dy + i, mean, scale, bias[channel + r], pixels, buffer[2] + i);
        dx_row<C>(x + i, dz, mean, scale, b, a, pixels, dx + i);
      }
      store<C>(p.out, p.type, start + at, count, dx);
    });
  }
}

// ---- channels inside ------------------------------------------------------------------------------------------------

// Calls run(first element, pixels) over blocks of a piece; `item` counts the pieces of all samples.
template <class C, class F>
HYPERSD_INLINE void over_blocks(const Problem<C>& p, int64_t item, const F& run) {
  const int64_t sample = item / p.pieces, first = item % p.pieces * p.piece_pixels;
  const int64_t stop = first + p.piece_pixels < p.pixels ? first + p.piece_pixels : p.pixels;
  const int64_t step = p.channels < kBlock ? kBlock / p.channels : 1;
  for (int64_t pixel = first; pixel < stop; pixel += step)
    run((sample * p.pixels + pixel) * p.channels, stop - pixel < step ? stop - pixel : step);
}

template <class C>
int64_t block_elements(const Problem<C>& p) { return p.channels < kBlock ? kBlock : p.channels; }

template <class C, bool>
HYPERSD_INLINE void inside_moments(const Problem<C>& p, int64_t begin, int64_t end) {
  const int64_t channels = p.channels;
  std::unique_ptr<C[]> memory(new C[block_elements(p) + 2 * channels]);
  C* HYPERSD_RESTRICT total = memory.get() + block_elements(p);
  C* HYPERSD_RESTRICT spread = total + channels;
  for (int64_t item = begin; item < end; ++item) {
    C* HYPERSD_RESTRICT mean = p.partial + item * 2 * channels;
    C* HYPERSD_RESTRICT squares = mean + channels;
    for (int64_t c = 0; c < channels; ++c) mean[c] = squares[c] = 0;
    double seen = 0;
    over_blocks<C>(p, item, [&](int64_t start, int64_t pixels) HYPERSD_LAMBDA_INLINE {
      const C* x = load<C>(p.x, p.type, start, pixels * channels, memory.get());
      for (int64_t c = 0; c < channels; ++c) total[c] = spread[c] = 0;
      for (int64_t i = 0; i < pixels; ++i)
        for (int64_t c = 0; c < channels; ++c) total[c] += x[i * channels + c];
      const C share = static_cast<C>(1.0 / pixels);
      for (int64_t c = 0; c < channels; ++c) total[c] *= share;
      for (int64_t i = 0; i < pixels; ++i)
        for (int64_t c = 0; c < channels; ++c) {
          const C d = x[i * channels + c] - total[c];
          spread[c] += d * d;
        }
      const double all = seen + pixels;
      const C step = static_cast<C>(pixels / all), factor = static_cast<C>(seen * pixels / all);
      for (int64_t c = 0; c < channels; ++c) {
        const C delta = total[c] - mean[c];
        mean[c] += delta * step;
        squares[c] += spread[c] + delta * delta * factor;
      }
      seen = all;
    });
  }
}

// The statistics of the groups of samples [begin, end) from those of their pieces.
template <class C>
void inside_finish(const Problem<C>& p, int64_t begin, int64_t end) {
  const int64_t group = p.per_group();
  for (int64_t item = begin * p.groups; item < end * p.groups; ++item) {
    Moments moments;
    for (int64_t piece = 0; piece < p.pieces; ++piece) {
      const C* mean = p.partial + ((item / p.groups) * p.pieces + piece) * 2 * p.channels + item % p.groups * group;
      const C* squares = mean + p.channels;
      const int64_t first = piece * p.piece_pixels, left = p.pixels - first;
      const double pixels = static_cast<double>(left < p.piece_pixels ? left : p.piece_pixels);
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

// By channel of one sample: z = (x - mean) scale + shift, dx = dz scale - ((x - mean) slope + offset).
template <class C>
struct ByChannel {
  C *mean, *rstd, *scale, *slope, *offset;

  ByChannel(C* memory, int64_t channels)
      : mean(memory), rstd(mean + channels), scale(rstd + channels), slope(scale + channels), offset(slope + channels) {}
  HYPERSD_INLINE void fill(const Problem<C>& p, int64_t sample, bool dx) {
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

template <class C, bool Silu>
HYPERSD_INLINE void inside_apply(const Problem<C>& p, int64_t begin, int64_t end) {
  const int64_t channels = p.channels, size = block_elements(p);
  std::unique_ptr<C[]> memory(new C[2 * size + 5 * channels]);
  ByChannel<C> by_channel(memory.get() + 2 * size, channels);
  for (int64_t item = begin; item < end; ++item) {
    if (item == begin || item % p.pieces == 0) by_channel.fill(p, item / p.pieces, false);
    over_blocks<C>(p, item, [&](int64_t start, int64_t pixels) HYPERSD_LAMBDA_INLINE {
      const int64_t count = pixels * channels;
      const C* x = load<C>(p.x, p.type, start, count, memory.get());
      C* y = target<C>(p.out, p.type, start, memory.get() + size);
      for (int64_t i = 0; i < count; i += channels)
        apply_pixel<C, Silu>(x + i, by_channel.mean, by_channel.scale, p.bias, channels, y + i);
      store<C>(p.out, p.type, start, count, y);
    });
  }
}

// dz and its sums by channel, for whole pieces; dz is left in `kept` where that is not null.
template <class C, bool Silu>
HYPERSD_INLINE void inside_sums(const Problem<C>& p, int64_t begin, int64_t end, C* kept) {
  const int64_t channels = p.channels, size = block_elements(p), origin = begin / p.pieces * channels * p.pixels;
  std::unique_ptr<C[]> memory(new C[3 * size + 7 * channels]);
  ByChannel<C> by_channel(memory.get() + 3 * size, channels);
  C* HYPERSD_RESTRICT block_dz = by_channel.offset + channels;
  C* HYPERSD_RESTRICT block_dzx = block_dz + channels;
  for (int64_t item = begin; item < end; ++item) {
    if (item == begin || item % p.pieces == 0) by_channel.fill(p, item / p.pieces, false);
    C* HYPERSD_RESTRICT channel_dz = p.channel_dz + item * channels;
    C* HYPERSD_RESTRICT channel_dzx = p.channel_dzx + item * channels;
    for (int64_t c = 0; c < channels; ++c) channel_dz[c] = channel_dzx[c] = 0;
    over_blocks<C>(p, item, [&](int64_t start, int64_t pixels) HYPERSD_LAMBDA_INLINE {
      const int64_t count = pixels * channels;
      const C* x = load<C>(p.x, p.type, start, count, memory.get());
      const C* dy = load<C>(p.dy, p.dy_type, start, count, memory.get() + size);
      C* HYPERSD_RESTRICT dz = kept ? kept + (start - origin) : memory.get() + 2 * size;
      for (int64_t c = 0; c < channels; ++c) block_dz[c] = block_dzx[c] = 0;
      for (int64_t i = 0; i < count; i += channels) {
        if (Silu)
          derive_pixel<C, Silu>(x + i, dy + i, by_channel.mean, by_channel.scale, p.bias, channels, dz + i);
        add_pixel<C>(Silu ? dz + i : dy + i, x + i, by_channel.mean, channels, block_dz, block_dzx);
      }
      for (int64_t c = 0; c < channels; ++c) channel_dz[c] += block_dz[c], channel_dzx[c] += block_dzx[c];
    });
    for (int64_t c = 0; c < channels; ++c) channel_dzx[c] *= by_channel.rstd[c];
  }
}

// offset and slope of the groups of samples [begin, end) from the sums of their pieces.
template <class C>
void inside_finish_sums(const Problem<C>& p, int64_t begin, int64_t end) {
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

template <class C, bool Silu>
HYPERSD_INLINE void inside_dx(const Problem<C>& p, int64_t begin, int64_t end, const C* kept) {
  const int64_t channels = p.channels, size = block_elements(p), origin = begin / p.pieces * channels * p.pixels;
  std::unique_ptr<C[]> memory(new C[3 * size + 6 * channels]);
  ByChannel<C> by_channel(memory.get() + 3 * size + channels, channels);
  for (int64_t item = begin; item < end; ++item) {
    if (item == begin || item % p.pieces == 0) by_channel.fill(p, item / p.pieces, true);
    over_blocks<C>(p, item, [&](int64_t start, int64_t pixels) HYPERSD_LAMBDA_INLINE {
      const int64_t count = pixels * channels;
      const C* x = load<C>(p.x, p.type, start, count, memory.get());
      C* dx = target<C>(p.out, p.type, start, memory.get() + 2 * size);
      const C* dy = kept ? nullptr : load<C>(p.dy, p.dy_type, start, count, memory.get() + size);
      C* derived = memory.get() + 3 * size;
      for (int64_t i = 0; i < count; i += channels) {
        const C* dz = kept ? kept + (start - origin) + i : Silu ? derived : dy + i;
        if (Silu && !kept)
          derive_pixel<C, Silu>(x + i, dy + i, by_channel.mean, by_channel.scale, p.bias, channels, derived);
        dx_pixel<C>(x + i, dz, by_channel.mean, by_channel.scale, by_channel.slope, by_channel.offset, channels, dx + i);
      }
      store<C>(p.out, p.type, start, count, dx);
    });
  }
}

// One function per instruction set and type, with and without SiLU.
#define HYPERSD_NORM(NAME, C, PARAMETERS, ARGUMENTS)                                           \
  HYPERSD_INLINE void NAME##_##C##_body PARAMETERS {                                           \
    if (p.silu) NAME<C, true> ARGUMENTS; else NAME<C, false> ARGUMENTS;                        \
  }                                                                                            \
  HYPERSD_KERNEL(NAME##_##C, PARAMETERS, ARGUMENTS)                                            \
  void run_##NAME PARAMETERS { NAME##_##C ARGUMENTS; }
#define HYPERSD_RANGE(C) const Problem<C>& p, int64_t begin, int64_t end
HYPERSD_NORM(outside_forward, float, (HYPERSD_RANGE(float)), (p, begin, end))
HYPERSD_NORM(outside_forward, double, (HYPERSD_RANGE(double)), (p, begin, end))
HYPERSD_NORM(outside_backward, float, (HYPERSD_RANGE(float)), (p, begin, end))
HYPERSD_NORM(outside_backward, double, (HYPERSD_RANGE(double)), (p, begin, end))
HYPERSD_NORM(inside_moments, float, (HYPERSD_RANGE(float)), (p, begin, end))
HYPERSD_NORM(inside_moments, double, (HYPERSD_RANGE(double)), (p, begin, end))
HYPERSD_NORM(inside_apply, float, (HYPERSD_RANGE(float)), (p, begin, end))
HYPERSD_NORM(inside_apply, double, (HYPERSD_RANGE(double)), (p, begin, end))
HYPERSD_NORM(inside_sums, float, (HYPERSD_RANGE(float), float* kept), (p, begin, end, kept))
HYPERSD_NORM(inside_sums, double, (HYPERSD_RANGE(double), double* kept), (p, begin, end, kept))
HYPERSD_NORM(inside_dx, float, (HYPERSD_RANGE(float), const float* kept), (p, begin, end, kept))
HYPERSD_NORM(inside_dx, double, (HYPERSD_RANGE(double), const double* kept), (p, begin, end, kept))

// ---- the operators --------------------------------------------------------------------------------------------------

// What x is: sizes, and its memory order or that of the contiguous copy that stands for it.
struct Layout {
  View view;
  bool inside = false, taken = true;  // channels inside; `taken`: x can be read as it lies
  int64_t contiguous[64];

  explicit Layout(const Tensor& x) : view(x) {
    STD_TORCH_CHECK(view.dim >= 2 && view.dim <= 64, "x: expected (batch, channels, ...)");
    STD_TORCH_CHECK(view.type != Type::other, "x: not a floating-point tensor");
    STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
    for (int64_t d = view.dim - 1, all = 1; d >= 0; --d) contiguous[d] = all, all *= view.size[d] ? view.size[d] : 1;
    int64_t inner[64], all = view.size[1];
    for (int64_t d = view.dim - 1; d >= 2; --d) inner[d] = all, all *= view.size[d];
    inner[1] = 1, inner[0] = all;
    const auto lies = [&](const int64_t* stride) {
      View other = view;
      other.stride = stride;
      return view.numel == 0 || view.same_layout(other);
    };
    if (lies(contiguous)) return;
    inside = lies(inner);
    taken = inside;
  }
  View wanted() const {
    View like = view;
    if (!taken) like.stride = contiguous;
    return like;
  }
};

template <class C>
std::vector<C> by_channel(const std::optional<Tensor>& t, const char* name, int64_t channels, C otherwise) {
  std::vector<C> values(channels, otherwise);
  if (!t) return values;
  const View view(*t);
  STD_TORCH_CHECK(view.dim == 1 && view.size[0] == channels, name, ": expected one number per channel");
  STD_TORCH_CHECK(view.type != Type::other && t->is_cpu(), name, ": not a floating-point CPU tensor");
  std::optional<Tensor> kept;
  const int64_t one = 1;
  View dense = view;
  dense.stride = &one;
  const char* data = matched(*t, view, dense, kept);
  const C* loaded = load<C>(data, view.type, 0, channels, values.data());
  if (loaded != values.data()) std::memcpy(values.data(), loaded, sizeof(C) * channels);
  return values;
}

template <class C>
Problem<C> problem(const Layout& layout, int64_t groups, bool silu) {
  const View& v = layout.view;
  STD_TORCH_CHECK(groups > 0 && v.size[1] % groups == 0, "num_groups: does not divide the channels of x");
  Problem<C> p{};
  p.batch = v.size[0], p.channels = v.size[1], p.groups = groups, p.silu = silu, p.type = v.type, p.pixels = 1;
  for (int64_t d = 2; d < v.dim; ++d) p.pixels *= v.size[d];
  if (v.numel == 0) return p;
  p.piece_pixels = p.channels < kPiece ? kPiece / p.channels : 1;
  p.pieces = (p.pixels + p.piece_pixels - 1) / p.piece_pixels;
  return p;
}

// Over groups (channels outside): `width` elements each.
template <class F>
void over_groups(int64_t count, int64_t width, const F& run) {
  torch::stable::parallel_for(0, count, 8 * kChunk / width + 1, run);
}

// Two passes over the pieces of every sample with `finish` in between: sample by sample, while it is in the cache, where
// there are samples for all threads; else piece by piece. `kept`: memory for one sample, where that is wanted and small.
template <class C, class First, class Finish, class Second>
void over_samples(const Problem<C>& p, bool keep, const First& first, const Finish& finish, const Second& second) {
  const int64_t width = p.channels * p.pixels;
  if (p.batch >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    torch::stable::parallel_for(0, p.batch, 8 * kChunk / width + 1, [&](int64_t begin, int64_t end) {
      std::unique_ptr<C[]> kept(keep && width <= kScratch ? new C[width] : nullptr);
      for (int64_t n = begin; n < end; ++n) {
        first(n * p.pieces, (n + 1) * p.pieces, kept.get());
        finish(n, n + 1);
        second(n * p.pieces, (n + 1) * p.pieces, kept.get());
      }
    });
    return;
  }
  torch::stable::parallel_for(0, p.batch * p.pieces, 1, [&](int64_t b, int64_t e) { first(b, e, nullptr); });
  finish(0, p.batch);
  torch::stable::parallel_for(0, p.batch * p.pieces, 1, [&](int64_t b, int64_t e) { second(b, e, nullptr); });
}

Tensor empty_2d(const View& like, int64_t rows, int64_t columns, Type type) {
  const int64_t size[2] = {rows, columns}, stride[2] = {columns > 0 ? columns : 1, 1};
  View shape = like;
  shape.dim = 2, shape.size = size;
  return empty_strided(shape, stride, type);
}

template <class C>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Layout& layout, int64_t groups,
                                           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                           double eps, bool silu) {
  Problem<C> p = problem<C>(layout, groups, silu);
  const View wanted = layout.wanted();
  Tensor y = empty_strided(wanted, wanted.stride, p.type);
  Tensor mean = empty_2d(layout.view, p.batch, groups, TypeOf<C>::value);
  Tensor rstd = empty_2d(layout.view, p.batch, groups, TypeOf<C>::value);
  const std::vector<C> w = by_channel<C>(weight, "weight", p.channels, 1), b = by_channel<C>(bias, "bias", p.channels, 0);
  if (layout.view.numel == 0) return {y, mean, rstd};
  std::optional<Tensor> kept;
  p.x = matched(x, layout.view, wanted, kept), p.out = data_of(y), p.eps = eps;
  p.weight = w.data(), p.bias = b.data();
  p.mean = reinterpret_cast<C*>(data_of(mean)), p.rstd = reinterpret_cast<C*>(data_of(rstd));
  if (!layout.inside) {
    over_groups(p.batch * groups, p.per_group() * p.pixels, [&](int64_t begin, int64_t end) { run_outside_forward(p, begin, end); });
    return {y, mean, rstd};
  }
  std::vector<C> partial(p.batch * p.pieces * 2 * p.channels);
  p.partial = partial.data();
  over_samples(
      p, false, [&](int64_t begin, int64_t end, C*) { run_inside_moments(p, begin, end); },
      [&](int64_t begin, int64_t end) { inside_finish(p, begin, end); },
      [&](int64_t begin, int64_t end, C*) { run_inside_apply(p, begin, end); });
  return {y, mean, rstd};
}

// Rows of sums by channel -> one gradient of the type of `like`, added up in double and in order.
template <class C>
Tensor column_sums(const std::vector<C>& rows, int64_t channels, const View& shape, Type type) {
  const int64_t one = 1;
  View like = shape;
  like.dim = 1, like.size = &channels;
  Tensor out = empty_strided(like, &one, type);
  std::vector<double> total(channels, 0.0);
  for (size_t i = 0; i < rows.size(); i += channels)
    for (int64_t c = 0; c < channels; ++c) total[c] += rows[i + c];
  if (type == Type::float64) std::memcpy(out.data_ptr(), total.data(), sizeof(double) * channels);
  else store<double>(data_of(out), type, 0, channels, total.data());
  return out;
}

template <class C>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Layout& layout, const Tensor& mean,
                                            const Tensor& rstd, const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& bias, int64_t groups, bool silu, bool need_x,
                                            bool need_affine) {
  Problem<C> p = problem<C>(layout, groups, silu);
  const View wanted = layout.wanted(), upstream(dy);
  STD_TORCH_CHECK(upstream.same_size(layout.view) && upstream.type != Type::other, "dy: its shape is not that of x");
  const View m(mean), r(rstd);
  STD_TORCH_CHECK(m.type == TypeOf<C>::value && r.type == m.type && m.numel == p.batch * groups && r.numel == m.numel &&
                      mean.is_contiguous() && rstd.is_contiguous(),
                  "mean, rstd: not those of the forward pass");
  const int64_t none = 0, one = 1;
  View empty = layout.view;
  empty.dim = 1, empty.size = &none;
  Tensor dx = need_x ? empty_strided(wanted, wanted.stride, p.type) : empty_strided(empty, &one, p.type);
  const std::vector<C> w = by_channel<C>(weight, "weight", p.channels, 1), b = by_channel<C>(bias, "bias", p.channels, 0);
  const int64_t rows = layout.view.numel == 0 ? 0 : layout.inside ? p.batch * p.pieces : p.batch;
  std::vector<C> channel_dz(rows * p.channels), channel_dzx(rows * p.channels), slope, offset;
  if (layout.view.numel) {
    std::optional<Tensor> kept[2];
    p.x = matched(x, layout.view, wanted, kept[0]), p.dy = matched(dy, upstream, wanted, kept[1]);
    p.dy_type = upstream.type, p.out = need_x ? data_of(dx) : nullptr;
    p.weight = w.data(), p.bias = b.data();
    p.mean = reinterpret_cast<C*>(m.data), p.rstd = reinterpret_cast<C*>(r.data);
    p.channel_dz = channel_dz.data(), p.channel_dzx = channel_dzx.data();
    if (!layout.inside) {
      over_groups(p.batch * groups, p.per_group() * p.pixels, [&](int64_t begin, int64_t end) { run_outside_backward(p, begin, end); });
    } else {
      slope.resize(p.batch * groups), offset.resize(p.batch * groups);
      p.slope = slope.data(), p.offset = offset.data();
      over_samples(
          p, need_x && silu, [&](int64_t begin, int64_t end, C* kept) { run_inside_sums(p, begin, end, kept); },
          [&](int64_t begin, int64_t end) { inside_finish_sums(p, begin, end); },
          [&](int64_t begin, int64_t end, const C* kept) { if (need_x) run_inside_dx(p, begin, end, kept); });
    }
  }
  const auto gradient = [&](const std::optional<Tensor>& like, const std::vector<C>& sums) {
    if (!need_affine || !like) return empty_strided(empty, &one, p.type);
    return column_sums(sums, p.channels, layout.view, type_of(*like));
  };
  return {dx, gradient(weight, channel_dzx), gradient(bias, channel_dz)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(Tensor x, int64_t num_groups, std::optional<Tensor> weight,
                                                   std::optional<Tensor> bias, double eps, bool silu) {
  const Layout layout(x);
  return layout.view.type == Type::float64 ? forward<double>(x, layout, num_groups, weight, bias, eps, silu)
                                           : forward<float>(x, layout, num_groups, weight, bias, eps, silu);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd,
                                                            std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                            int64_t num_groups, bool silu, bool need_x,
                                                            bool need_affine) {
  const Layout layout(x);
  return layout.view.type == Type::float64
             ? backward<double>(dy, x, layout, mean, rstd, weight, bias, num_groups, silu, need_x, need_affine)
             : backward<float>(dy, x, layout, mean, rstd, weight, bias, num_groups, silu, need_x, need_affine);
}

}  // namespace hypersd
