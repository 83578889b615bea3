// Products with gathered rows: out[m] = start + sum over segments s of rows[s][m] B[s], in float32, for float32 and for
// bfloat16 operands (AVX512_BF16). A segment is a stretch of the inner dimension that is contiguous in memory on the left:
// a linear layer has one, a convolution one per tap of its kernel, a low-rank update one more.
//
// The inner dimension is counted in units of four bytes: one float, or a pair of bfloat16 that one instruction
// multiplies and adds. The right side is packed into panels of up to 64 columns, [units][columns].
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "isa.h"
#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HYPERSD_PRODUCTS 1
#if !defined(__clang__)  // gcc 12 warns of its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define HYPERSD_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))

namespace hypersd {

struct Float32 {
  using Element = float;
  static constexpr Type type = Type::float32;
  static constexpr int64_t per = 1;  // elements in a unit
};
struct BFloat16 {
  using Element = uint16_t;
  static constexpr Type type = Type::bfloat16;
  static constexpr int64_t per = 2;
};
struct Triple;  // float32 as three bfloat16: triple.h

inline bool has_bfloat16() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
}

constexpr int64_t kLanes = 16, kPanel = 4 * kLanes;  // columns of a vector, of a panel
constexpr int64_t kGroup = 6, kBlock = 16 * kGroup;  // rows of a tile, of a task
constexpr int64_t kSum = 128;  // units summed on their own: one long float32 sum loses digits, a longer panel the first cache

struct Segment {
  const char* const* rows;  // of the left side
  int64_t units, step;      // units of the inner dimension, bytes from one to the next
  int64_t inner = 0;        // elements, where units do not say it
};

struct Target {
  char* const* rows;
  int64_t column, columns;  // first, count
  float scale;
  bool add;  // to float32 rows; else stored as elements
};

template <class E>
HYPERSD_BF16 HYPERSD_INLINE __m512 multiply_add(__m512 sum, __m512i left, __m512i right) {
  if (E::per == 1) return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum);
  return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
}

// One stretch of the inner dimension: units [from, to) of all segments, the first that begins the sum or the last that ends it.
struct Stretch {
  int64_t from, to;
  bool begins, ends;
};

// One tile: M rows from `first` on, V vectors of columns, over one stretch, which is summed on its own; `total` has the sum of
// those before. Segments whose rows are all `zero` are skipped.
template <class E, int M, int V>
HYPERSD_BF16 void tile(const Segment* segments, int64_t count, int64_t first, const Stretch& stretch, const char* zero,
                       const int32_t* panel, const float* start, float* total, const Target& target) {
  __m512 sum[M][V];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j)
      sum[i][j] = stretch.begins && start ? _mm512_loadu_ps(start + kLanes * j) : _mm512_setzero_ps();
  int64_t before = 0;
  for (int64_t s = 0; s < count && before < stretch.to; before += segments[s++].units) {
    const Segment& segment = segments[s];
    const int64_t low = stretch.from > before ? stretch.from - before : 0;
    const int64_t high = stretch.to - before < segment.units ? stretch.to - before : segment.units;
    if (low >= high) continue;
    const char* row[M];
    bool any = false;
    const int64_t step = segment.step;
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const char* const from = segment.rows[first + i];
      any |= from != zero;
      row[i] = from + low * step;
    }
    if (!any) continue;
    const int32_t* right = panel + (before + low) * kLanes * V;
    int64_t at = 0;
    for (int64_t u = low; u < high; ++u, at += step, right += kLanes * V) {
      __m512i b[V];
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) b[j] = _mm512_loadu_si512(right + kLanes * j);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        int32_t unit;
        std::memcpy(&unit, row[i] + at, 4);
        const __m512i a = _mm512_set1_epi32(unit);
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) sum[i][j] = multiply_add<E>(sum[i][j], a, b[j]);
      }
    }
  }
  if (!stretch.begins || !stretch.ends) {
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) {
        float* const t = total + (i * V + j) * kLanes;
        if (!stretch.begins) sum[i][j] = _mm512_add_ps(_mm512_load_ps(t), sum[i][j]);
        if (!stretch.ends) _mm512_store_ps(t, sum[i][j]);
      }
    if (!stretch.ends) return;
  }
  const __m512 scale = _mm512_set1_ps(target.scale);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      const int64_t left = target.columns - kLanes * j;
      const __mmask16 mask = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << (left > 0 ? left : 0)) - 1);
      const int64_t column = target.column + kLanes * j;
      char* const out = target.rows[first + i];
      if (target.add) {
        float* p = reinterpret_cast<float*>(out) + column;
        _mm512_mask_storeu_ps(p, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, p), sum[i][j]));
      } else if (E::per == 1) {
        _mm512_mask_storeu_ps(reinterpret_cast<float*>(out) + column, mask, _mm512_mul_ps(scale, sum[i][j]));
      } else {
        const __m256bh narrow = _mm512_cvtneps_pbh(_mm512_mul_ps(scale, sum[i][j]));
        _mm256_mask_storeu_epi16(reinterpret_cast<uint16_t*>(out) + column, mask, (__m256i)narrow);
      }
    }
  }
}

using Tile = void (*)(const Segment*, int64_t, int64_t, const Stretch&, const char*, const int32_t*, const float*, float*,
                      const Target&);

template <class E>
Tile tile_for(int64_t rows, int64_t vectors) {
  static constexpr Tile table[4][kGroup] = {
      {tile<E, 1, 1>, tile<E, 2, 1>, tile<E, 3, 1>, tile<E, 4, 1>, tile<E, 5, 1>, tile<E, 6, 1>},
      {tile<E, 1, 2>, tile<E, 2, 2>, tile<E, 3, 2>, tile<E, 4, 2>, tile<E, 5, 2>, tile<E, 6, 2>},
      {tile<E, 1, 3>, tile<E, 2, 3>, tile<E, 3, 3>, tile<E, 4, 3>, tile<E, 5, 3>, tile<E, 6, 3>},
      {tile<E, 1, 4>, tile<E, 2, 4>, tile<E, 3, 4>, tile<E, 4, 4>, tile<E, 5, 4>, tile<E, 6, 4>},
  };
  return table[vectors - 1][rows - 1];
}

// out (count rows) = start + segments x packed, `columns` columns from `column` on, panels one after the other. `start` has a
// number for each column, those that fill the last panel too. A stretch of a panel stays in the first cache while a block of
// rows meets it.
template <class E>
inline void multiply(const Segment* segments, int64_t parts, int64_t count, const char* zero, const int32_t* packed,
                     int64_t column, int64_t columns, const float* start, char* const* out, float scale, bool add) {
  alignas(64) float totals[kBlock * kPanel];
  const int64_t end = column + columns;
  int64_t units = 0;
  for (int64_t s = 0; s < parts; ++s) units += segments[s].units;
  for (int64_t c = column; c < end; c += kPanel, packed += units * kPanel) {
    const int64_t width = end - c < kPanel ? end - c : kPanel, vectors = (width + kLanes - 1) / kLanes;
    const Target target{out, c, width, scale, add};
    for (int64_t first = 0; first < count; first += kBlock) {
      const int64_t last = first + kBlock < count ? first + kBlock : count;
      for (int64_t from = 0; from == 0 || from < units; from += kSum) {
        const Stretch stretch{from, from + kSum < units ? from + kSum : units, from == 0, from + kSum >= units};
        for (int64_t m = first; m < last; m += kGroup) {
          const int64_t rows = last - m < kGroup ? last - m : kGroup;
          tile_for<E>(rows, vectors)(segments, parts, m, stretch, zero, packed, start ? start + c : nullptr,
                                     totals + (m - first) * kPanel, target);
        }
      }
    }
  }
}

// The right side of one segment, B[k][column], read with strides (in elements) from float32 or bfloat16 memory.
struct Matrix {
  const char* data;
  Type type;
  int64_t inner_stride, column_stride, inner;
};

template <class E>
inline int64_t units_of(const Matrix& b) { return (b.inner + E::per - 1) / E::per; }

template <class E, class S>
HYPERSD_INLINE uint32_t converted(S value) {
  if (E::per == 1) {
    if (sizeof(S) == 4) return float_to_bits(static_cast<float>(value));
    return uint32_t{static_cast<uint16_t>(value)} << 16;
  }
  if (sizeof(S) == 4) return to_bfloat16(static_cast<float>(value));
  return static_cast<uint16_t>(value);
}

// Up to 16 columns (`across` apart) of 16 units each, contiguous in memory, to 16 rows of units.
template <class E, class S>
HYPERSD_BF16 inline void transpose(const S* from, int64_t across, int64_t columns, int32_t* to, int64_t width) {
  __m512i r[16], s[16];
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) {
    if (j >= columns) {
      r[j] = _mm512_setzero_si512();
    } else if (sizeof(S) == 4 && E::per == 2) {
      const float* p = reinterpret_cast<const float*>(from + j * across);
      r[j] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + kLanes), _mm512_loadu_ps(p));
    } else {
      r[j] = _mm512_loadu_si512(from + j * across);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < 16; j += 2) {
    s[j] = _mm512_unpacklo_epi32(r[j], r[j + 1]);
    s[j + 1] = _mm512_unpackhi_epi32(r[j], r[j + 1]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 16; j += 4) {
    r[j] = _mm512_unpacklo_epi64(s[j], s[j + 2]);
    r[j + 1] = _mm512_unpackhi_epi64(s[j], s[j + 2]);
    r[j + 2] = _mm512_unpacklo_epi64(s[j + 1], s[j + 3]);
    r[j + 3] = _mm512_unpackhi_epi64(s[j + 1], s[j + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    s[j] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);
    s[j + 4] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
    s[j + 8] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88);
    s[j + 12] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm512_storeu_si512(to + j * width, _mm512_shuffle_i32x4(s[j], s[j + 8], 0x88));
    _mm512_storeu_si512(to + (j + 8) * width, _mm512_shuffle_i32x4(s[j], s[j + 8], 0xdd));
    _mm512_storeu_si512(to + (j + 4) * width, _mm512_shuffle_i32x4(s[j + 4], s[j + 12], 0x88));
    _mm512_storeu_si512(to + (j + 12) * width, _mm512_shuffle_i32x4(s[j + 4], s[j + 12], 0xdd));
  }
}

template <class E, class S>
HYPERSD_AVX512 void pack_panel(const Matrix& b, int64_t column, int64_t columns, int32_t* HYPERSD_RESTRICT out) {
  const S* HYPERSD_RESTRICT from = reinterpret_cast<const S*>(b.data) + column * b.column_stride;
  const int64_t units = units_of<E>(b), width = (columns + kLanes - 1) / kLanes * kLanes;
  const int64_t inner = b.inner_stride, across = b.column_stride;
  for (int64_t u = 0; u < units; ++u)
    for (int64_t j = columns; j < width; ++j) out[u * width + j] = 0;
  if (across == 1) {
    for (int64_t u = 0; u < units; ++u) {
      const S* HYPERSD_RESTRICT low = from + E::per * u * inner;
      const S* HYPERSD_RESTRICT high = low + inner;
      int32_t* HYPERSD_RESTRICT to = out + u * width;
      if (E::per == 1 || 2 * u + 1 >= b.inner)
        for (int64_t j = 0; j < columns; ++j) to[j] = static_cast<int32_t>(converted<E>(low[j]));
      else
        for (int64_t j = 0; j < columns; ++j)
          to[j] = static_cast<int32_t>(converted<E>(low[j]) | converted<E>(high[j]) << 16);
    }
    return;
  }
  const bool whole = inner == 1 && b.inner % E::per == 0 && (sizeof(S) == 4 || E::per == 2);
  for (int64_t j0 = 0; j0 < columns; j0 += kLanes) {
    const int64_t count = columns - j0 < kLanes ? columns - j0 : kLanes;
    const S* HYPERSD_RESTRICT block = from + j0 * across;
    for (int64_t u0 = 0; u0 < units; u0 += kLanes) {
      const int64_t left = units - u0 < kLanes ? units - u0 : kLanes;
      int32_t* HYPERSD_RESTRICT to = out + u0 * width + j0;
      if (whole && left == kLanes && (E::per == 1 || has_bfloat16())) {
        transpose<E>(block + E::per * u0, across, count, to, width);
        continue;
      }
      for (int64_t j = 0; j < count; ++j) {
        const S* HYPERSD_RESTRICT low = block + j * across;
        for (int64_t u = u0; u < u0 + left; ++u) {
          uint32_t unit = converted<E>(low[E::per * u * inner]);
          if (E::per == 2 && 2 * u + 1 < b.inner) unit |= converted<E>(low[(2 * u + 1) * inner]) << 16;
          to[(u - u0) * width + j] = static_cast<int32_t>(unit);
        }
      }
    }
  }
}

// All parts of a panel one after the other, panels one after the other: units_of x padded units of four bytes in all.
inline int64_t padded(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }
template <class E>
inline int64_t units_of(const std::vector<Matrix>& parts) {
  int64_t units = 0;
  for (const Matrix& part : parts) units += units_of<E>(part);
  return units;
}
template <class E>
inline void pack_parts(const std::vector<Matrix>& parts, int64_t column, int64_t columns, int32_t* panel) {
  for (const Matrix& part : parts) {
    if (part.type == Type::float32) pack_panel<E, float>(part, column, columns, panel);
    else pack_panel<E, uint16_t>(part, column, columns, panel);
    panel += units_of<E>(part) * padded(columns);
  }
}

// Every panel, `wide` columns each, by pack_one(column, columns, memory).
template <class Pack>
inline void pack_all(int64_t units, int64_t columns, int64_t wide, int32_t* out, const Pack& pack_one) {
  const int64_t panels = (columns + wide - 1) / wide, grain = (int64_t{1} << 16) / (units * wide + 1) + 1;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t column = begin * wide; column < end * wide && column < columns; column += wide)
      pack_one(column, columns - column < wide ? columns - column : wide, out + units * column);
  };
  if (panels > grain) parallel_for(panels, grain, run);
  else run(0, panels);
}

}  // namespace hypersd
#else
#define HYPERSD_PRODUCTS 0
#endif
