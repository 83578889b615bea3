// attention of bfloat16 tensors with the CPU's bfloat16 products: sums of pairs, so every operand is stored as pairs
// along the dimension that is summed, one 32-bit word each. Sums, scores and softmax stay in float32; probabilities and
// dS are rounded to bfloat16 between two products, as the plain expression in bfloat16 rounds them.
#include "attention.h"

#include <optional>
#include <vector>

#include "amx.h"

#if defined(__x86_64__) && defined(__GNUC__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own intrinsics
#endif
#include <immintrin.h>
#define HYPERSD_BF16_INLINE inline __attribute__((always_inline)) HYPERSD_BF16

namespace hypersd {
namespace {

constexpr int kRows = 6;

struct Words {  // a(r, i) = a[r a_row + i a_inner] and b (inner, n) in pairs; c (rows, n) in float32, n whole vectors
  const uint32_t* a;
  int64_t a_row, a_inner;
  const uint32_t* b;
  int64_t ldb;
  float* c;
  int64_t ldc, rows, n, inner;
  bool accumulate;
};

template <int R, int J>
HYPERSD_BF16_INLINE void micro(const Words& o, int64_t row, int64_t column) {
  const uint32_t* a = o.a + row * o.a_row;
  const uint32_t* b = o.b + column;
  float* c = o.c + row * o.ldc + column;
  __m512 sum[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) sum[r][j] = o.accumulate ? _mm512_loadu_ps(c + r * o.ldc + j * 16) : _mm512_setzero_ps();
  for (int64_t i = 0; i < o.inner; ++i) {
    __m512i right[J];
    for (int j = 0; j < J; ++j) right[j] = _mm512_loadu_si512(b + i * o.ldb + j * 16);
    for (int r = 0; r < R; ++r) {
      const __m512i left = _mm512_set1_epi32(static_cast<int>(a[r * o.a_row + i * o.a_inner]));
      for (int j = 0; j < J; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], (__m512bh)left, (__m512bh)right[j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) _mm512_storeu_ps(c + r * o.ldc + j * 16, sum[r][j]);
}

template <int J>
HYPERSD_BF16_INLINE void columns(const Words& o, int64_t column) {
  int64_t row = 0;
  for (; row + kRows <= o.rows; row += kRows) micro<kRows, J>(o, row, column);
  switch (o.rows - row) {
    case 5: micro<5, J>(o, row, column); break;
    case 4: micro<4, J>(o, row, column); break;
    case 3: micro<3, J>(o, row, column); break;
    case 2: micro<2, J>(o, row, column); break;
    case 1: micro<1, J>(o, row, column); break;
    default: break;
  }
}

#if HYPERSD_TILES
// The same by the tile unit. Where a is read across (a_row is 1), whole vectors of rows can be read.
HYPERSD_AMX void product_tiles(const Words& o) {
  static thread_local CacheLines left, end;  // end: the last, incomplete tile of b
  static thread_local std::vector<Chunk> chunks;
  const int64_t tiles = (o.rows + kTileRows - 1) / kTileRows, number = (o.inner + 15) / 16, rest = o.inner % 16;
  left.reserve(tiles * number * kTileBytes);
  chunks.resize(number);
  if (rest) {
    end.reserve(64 * o.n);
    std::memset(end.data, 0, 64 * o.n);
    for (int64_t i = 0; i < rest; ++i) std::memcpy(end.data + 4 * i * o.n, o.b + ((number - 1) * 16 + i) * o.ldb, 4 * o.n);
  }
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t rows = o.rows - t * kTileRows < kTileRows ? o.rows - t * kTileRows : kTileRows;
    for (int64_t c = 0; c < number; ++c) {
      const int64_t units = o.inner - 16 * c < 16 ? o.inner - 16 * c : 16;
      int32_t* const to = reinterpret_cast<int32_t*>(left.data + (t * number + c) * kTileBytes);
      if (o.a_inner == 1) {
        const __mmask16 mask = static_cast<__mmask16>((1u << units) - 1);
        for (int64_t i = 0; i < rows; ++i)
          _mm512_storeu_si512(to + 16 * i,
                              _mm512_maskz_loadu_epi32(mask, o.a + (t * kTileRows + i) * o.a_row + 16 * c));
      } else {
        transpose<Float32>(reinterpret_cast<const int32_t*>(o.a) + t * kTileRows + 16 * c * o.a_inner, o.a_inner, units,
                           to, 16);
      }
    }
  }
  alignas(64) float sums[32 * 32];
  for (int64_t column = 0; column < o.n; column += 32) {
    const bool wide = o.n - column > 16;
    for (int64_t t = 0; t < tiles; t += 2) {
      const int64_t rows = o.rows - t * kTileRows < 32 ? o.rows - t * kTileRows : 32;
      const char* const from = left.data + t * number * kTileBytes;
      for (int64_t c = 0; c < number; ++c)  // every chunk has the stride of the whole ones but the last
        chunks[c] = {reinterpret_cast<const int32_t*>(o.b) + 16 * c * o.ldb + column, c};
      const Sums target{o.c + t * kTileRows * o.ldc + column, 4 * o.ldc}, buffer{sums, 4 * 32};
      const bool whole = rows == 32 || rows == 16;
      const Sums& out = whole ? target : buffer;
      for (int64_t i = 0; i < rows && o.accumulate && !whole; ++i)
        std::memcpy(buffer.rows(i), target.rows(i), wide ? 128 : 64);
      const auto sum = sum_tiles_for<BFloat16>(rows > 16, wide);
      sum(from, from + number * kTileBytes, chunks.data(), number - (rest > 0), 4 * o.ldb,
          o.accumulate ? out : Sums{nullptr, 0}, out);
      if (rest) {
        const Chunk last{reinterpret_cast<int32_t*>(end.data) + column, number - 1};
        sum(from, from + number * kTileBytes, &last, 1, 4 * o.n, out, out);
      }
      for (int64_t i = 0; i < rows && !whole; ++i) std::memcpy(target.rows(i), buffer.rows(i), wide ? 128 : 64);
    }
  }
}
#endif

// The tile unit is set up for the products of a scope, where it is used.
struct TileScope {
#if HYPERSD_TILES
  std::optional<Tiles> tiles;
  TileScope() {
    if (isa() == Isa::amx) tiles.emplace();
  }
#endif
};

HYPERSD_BF16 void product(const Words& o) {
#if HYPERSD_TILES
  if (isa() == Isa::amx) return product_tiles(o);
#endif
  int64_t column = 0;
  for (; column + 32 <= o.n; column += 32) columns<2>(o, column);
  for (; column < o.n; column += 16) columns<1>(o, column);
}

// `count` tokens as rows of 2 ld halves, zeros behind; an odd row is followed by one of zeros.
HYPERSD_BF16 void pack(const Heads& t, int64_t head, int64_t first, int64_t count, uint32_t* rows, int64_t ld) {
  const int64_t dim = t.view.size[3], stride = t.view.stride[3];
  for (int64_t i = 0; i < count; ++i) {
    uint16_t* row = reinterpret_cast<uint16_t*>(rows + i * ld);
    const uint16_t* from = reinterpret_cast<const uint16_t*>(t.view.data) + t.offset(head, first + i);
    if (stride == 1) std::memcpy(row, from, 2 * dim);
    else for (int64_t d = 0; d < dim; ++d) row[d] = from[d * stride];
    for (int64_t d = dim; d < 2 * ld; ++d) row[d] = 0;
  }
  if (count % 2) std::memset(rows + count * ld, 0, 4 * ld);
}

// Rows (count, ld words) to words (ld, width): pairs along the head dimension, one column a token, zeros behind.
HYPERSD_BF16 void across(const uint32_t* rows, int64_t count, int64_t ld, uint32_t* out, int64_t width) {
  alignas(64) int32_t square[16 * 16];  // a row is read up to 15 words too far: there is memory behind the last
  for (int64_t w = 0; w < ld; w += 16)
    for (int64_t i = 0; i < width; i += 16) {
      transpose<Float32>(reinterpret_cast<const int32_t*>(rows) + i * ld + w, ld, count - i, square, 16);
      for (int64_t r = 0; r < 16 && w + r < ld; ++r)
        _mm512_storeu_si512(out + (w + r) * width + i, _mm512_load_si512(square + 16 * r));
    }
}

// Rows to words (pairs of rows, 2 ld columns): pairs along the tokens.
HYPERSD_BF16 void pairs(const uint32_t* rows, int64_t count, int64_t ld, uint32_t* out) {
  for (int64_t i = 0; i < count; i += 2) {
    const uint16_t* even = reinterpret_cast<const uint16_t*>(rows + i * ld);
    const uint16_t* odd = reinterpret_cast<const uint16_t*>(rows + (i + 1) * ld);
    uint32_t* HYPERSD_RESTRICT to = out + i * ld;
    for (int64_t d = 0; d < 2 * ld; ++d) to[d] = even[d] | uint32_t{odd[d]} << 16;
  }
}

HYPERSD_BF16_INLINE __m256i rounded(const float* x) { return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x)); }

// Rows of float32 (count, width) to bfloat16 rows.
HYPERSD_BF16 void narrow(const float* x, int64_t count, int64_t width, uint32_t* out) {
  for (int64_t i = 0; i < count * width; i += 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i / 2), rounded(x + i));
}

// Rows of float32 (count, width) to words (pairs of rows, width); a missing last row counts as zeros.
HYPERSD_BF16 void narrow_pairs(const float* x, int64_t count, int64_t width, uint32_t* out) {
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t j = 0; j < width; j += 16) {
      const __m512i even = _mm512_cvtepu16_epi32(rounded(x + i * width + j));
      const __m512i odd = i + 1 < count ? _mm512_cvtepu16_epi32(rounded(x + (i + 1) * width + j)) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + i / 2 * width + j, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

HYPERSD_BF16 void scale_all(float* x, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

}  // namespace

bool multiplies_bfloat16() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has && isa() >= Isa::avx512;
}

HYPERSD_BF16 void forward_bfloat16(const Problem& p, int64_t begin, int64_t end) {
  const TileScope configured;
  const int64_t width = padded(p.keys, 16), ld = padded(p.dim, 16) / 2, even = padded(p.keys, 2);
  const int64_t blocks = (p.queries + kQueries - 1) / kQueries;
  Scratch<uint32_t> words(ld * width + even * ld * 2 + kQueries * (ld + width / 2) + 128);
  Scratch<float> floats(kQueries * (width + 2 * ld) + 2 * ld + 128);
  uint32_t *kt = words.take(ld * width), *rows = words.take(even * ld), *v = words.take(even * ld);
  uint32_t *q = words.take(kQueries * ld), *prob = words.take(kQueries * width / 2);
  float *s = floats.take(kQueries * width), *o = floats.take(kQueries * 2 * ld), *buffer = floats.take(2 * ld), norm[kQueries];
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / blocks, first = task % blocks * kQueries;
    const int64_t count = p.queries - first < kQueries ? p.queries - first : kQueries;
    if (head != packed) {
      pack(p.k, head, 0, p.keys, rows, ld);
      across(rows, p.keys, ld, kt, width);
      pack(p.v, head, 0, p.keys, rows, ld);
      pairs(rows, p.keys, ld, v);
      packed = head;
    }
    pack(p.q, head, first, count, q, ld);
    product({q, ld, 1, kt, width, s, width, count, width, ld, false});
    scale_all(s, count * width, static_cast<float>(p.scale));
    softmax(s, count, p.keys, width, norm);
    narrow(s, count, width, prob);
    product({prob, width / 2, 1, v, 2 * ld, o, 2 * ld, count, 2 * ld, even / 2, false});
    unpack(*p.out, head, first, count, o, 2 * ld, norm, 1.0f, buffer);
  }
}

HYPERSD_BF16 void backward_bfloat16(const Problem& p, int64_t begin, int64_t end) {
  const TileScope configured;
  const int64_t width = padded(p.keys, 16), ld = padded(p.dim, 16) / 2, even = padded(p.keys, 2);
  const float scale = static_cast<float>(p.scale);
  Scratch<uint32_t> words(2 * ld * width + 2 * even * ld + kQueries * (4 * ld + 2 * width) + 256);
  Scratch<float> floats(kQueries * (2 * width + 2 * ld) + 4 * p.keys * ld + 2 * ld + 256);
  uint32_t *kt = words.take(ld * width), *vt = words.take(ld * width);
  uint32_t *rows = words.take(even * ld), *k = words.take(even * ld);
  uint32_t *q = words.take(kQueries * ld), *q2 = words.take(kQueries * ld);
  uint32_t *dout = words.take(kQueries * ld), *dout2 = words.take(kQueries * ld);
  uint32_t *prob = words.take(kQueries * width / 2), *slope = words.take(kQueries * width / 2);
  uint32_t* slope2 = words.take(kQueries * width / 2);
  float *s = floats.take(kQueries * width), *ds = floats.take(kQueries * width), *dq = floats.take(kQueries * 2 * ld);
  float *dk = floats.take(p.keys * 2 * ld), *dv = floats.take(p.keys * 2 * ld), *buffer = floats.take(2 * ld);
  for (int64_t head = begin; head < end; ++head) {
    pack(p.v, head, 0, p.keys, rows, ld);
    across(rows, p.keys, ld, vt, width);
    pack(p.k, head, 0, p.keys, rows, ld);
    across(rows, p.keys, ld, kt, width);
    pairs(rows, p.keys, ld, k);
    for (int64_t first = 0; first < p.queries; first += kQueries) {
      const int64_t count = p.queries - first < kQueries ? p.queries - first : kQueries, half = (count + 1) / 2;
      pack(p.q, head, first, count, q, ld);
      pack(*p.dout, head, first, count, dout, ld);
      product({q, ld, 1, kt, width, s, width, count, width, ld, false});
      product({dout, ld, 1, vt, width, ds, width, count, width, ld, false});
      scale_all(s, count * width, scale);
      slopes(s, ds, count, p.keys, width);
      narrow_pairs(s, count, width, prob);
      narrow(ds, count, width, slope);
      narrow_pairs(ds, count, width, slope2);
      pairs(q, count, ld, q2);
      pairs(dout, count, ld, dout2);
      product({prob, 1, width, dout2, 2 * ld, dv, 2 * ld, p.keys, 2 * ld, half, first > 0});
      product({slope2, 1, width, q2, 2 * ld, dk, 2 * ld, p.keys, 2 * ld, half, first > 0});
      product({slope, width / 2, 1, k, 2 * ld, dq, 2 * ld, count, 2 * ld, even / 2, false});
      unpack(*p.dq, head, first, count, dq, 2 * ld, nullptr, scale, buffer);
    }
    unpack(*p.dk, head, 0, p.keys, dk, 2 * ld, nullptr, scale, buffer);
    unpack(*p.dv, head, 0, p.keys, dv, 2 * ld, nullptr, 1.0f, buffer);
  }
}

}  // namespace hypersd

#else

namespace hypersd {
bool multiplies_bfloat16() { return false; }
void forward_bfloat16(const Problem&, int64_t, int64_t) {}
void backward_bfloat16(const Problem&, int64_t, int64_t) {}
}  // namespace hypersd

#endif
