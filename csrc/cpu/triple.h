// float32 products by a unit that multiplies bfloat16: a float32 is the sum of three bfloat16, high + middle + low, of 8 digits
// each, and of the nine products of two such sums the six that reach float32's last digit are added in float32. (Henry, Tang and
// Heinecke 2019, arXiv 1904.06376.) What is left out is below 2^-25 of a product.
//
// Infinities end as NaN (inf - inf), as do numbers above 3.39e38, which bfloat16 rounds to infinity; what is below 1.2e-38 in
// a part counts as zero.
#pragma once

#include "products.h"

#if HYPERSD_PRODUCTS
namespace hypersd {

// Each stretch of 32 elements is 3 x 16 units: of the high parts, of the middle, of the low.
struct Triple {
  using Element = float;
  static constexpr Type type = Type::float32;
  static constexpr int64_t per = 1;
};
constexpr int64_t kParts = 3, kStretch32 = 2 * kLanes;

template <>
inline int64_t units_of<Triple>(const Matrix& b) {
  return (b.inner + kStretch32 - 1) / kStretch32 * kParts * kLanes;
}

HYPERSD_BF16 HYPERSD_INLINE __m512 widened(__m512i pairs, bool second) {
  return _mm512_castsi512_ps(second ? _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))
                                    : _mm512_slli_epi32(pairs, 16));
}

// The parts of units (low[j], high[j]): a product's right side, whose pairs are one below the other.
HYPERSD_BF16 inline void split_columns(__m512 low, __m512 high, int32_t* out, int64_t plane) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairing = _mm512_load_si512(order);
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part, out += plane) {
    const __m512i units = _mm512_permutexvar_epi16(pairing, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    _mm512_storeu_si512(out, units);
    low = _mm512_sub_ps(low, widened(units, false));
    high = _mm512_sub_ps(high, widened(units, true));
  }
}

// The parts of 32 elements in a row, `plane` bytes apart: a left side.
HYPERSD_BF16 inline void split_row(__m512 low, __m512 high, char* out, int64_t plane) {
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part, out += plane) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(out, both);
    const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
    const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
    low = _mm512_sub_ps(low, widened(first, false));
    high = _mm512_sub_ps(high, widened(second, false));
  }
}

// `inner` rows of a panel of float32, [inner][width], as units.
HYPERSD_BF16 inline void split_panel(const int32_t* panel, int64_t inner, int64_t width, int32_t* out) {
  const __m512 none = _mm512_setzero_ps();
  const int64_t plane = kLanes * width;
  for (int64_t k = 0; k < inner; k += kStretch32, out += kParts * plane)
    for (int64_t u = 0; u < kLanes; ++u)
      for (int64_t j = 0; j < width; j += kLanes) {
        const int64_t at = k + 2 * u;
        const __m512 low = at < inner ? _mm512_loadu_ps(panel + at * width + j) : none;
        const __m512 high = at + 1 < inner ? _mm512_loadu_ps(panel + (at + 1) * width + j) : none;
        split_columns(low, high, out + u * width + j, plane);
      }
}

template <>
inline void pack_parts<Triple>(const std::vector<Matrix>& parts, int64_t column, int64_t columns, int32_t* panel) {
  alignas(64) int32_t some[kStretch32 * kPanel];
  const int64_t width = padded(columns);
  for (const Matrix& part : parts)
    for (int64_t k = 0; k < part.inner; k += kStretch32, panel += kParts * kLanes * width) {
      const int64_t inner = part.inner - k < kStretch32 ? part.inner - k : kStretch32;
      const char* const data = part.data + k * part.inner_stride * (part.type == Type::float32 ? 4 : 2);
      const Matrix piece{data, part.type, part.inner_stride, part.column_stride, inner};
      if (part.type == Type::float32) pack_panel<Float32, float>(piece, column, columns, some);
      else pack_panel<Float32, uint16_t>(piece, column, columns, some);
      split_panel(some, inner, width, panel);
    }
}

}  // namespace hypersd
#endif
