// Products with gathered rows (products.h) of bfloat16 by the tile unit of newer Xeons (AMX): one instruction adds the
// products of 16 rows of 32 elements with 32 rows of 16 columns to 16 x 16 float32 sums.
//
// Four tiles hold the sums of 32 rows and 32 columns; two more each side. A panel of the right side, [units][columns], is
// already what the tile unit wants. The rows of the left side are copied into tiles, once for all products with them.
#pragma once

#include "products.h"

#if HYPERSD_PRODUCTS && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HYPERSD_TILES 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <vector>

#define HYPERSD_AMX \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,xsave")))

namespace hypersd {

// Whether the processor has it, the system saves its registers, and the kernel lets this process use it.
inline bool has_amx() {
  static const bool has = [] {
    unsigned a, b, c, d;
    constexpr unsigned bfloat16 = 1u << 22, tile = 1u << 24;
    if (!has_bfloat16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & bfloat16) || !(d & tile)) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // of arch_prctl, asm/prctl.h
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return has;
}

constexpr int64_t kTileRows = 16, kTileBytes = 64 * kTileRows;  // 16 units in each row

// Eight tiles of 16 rows of 64 bytes, until the end of the scope.
class Tiles {
 public:
  HYPERSD_AMX Tiles() {
    struct alignas(64) Layout {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Layout layout;
    _tile_loadconfig(&layout);
  }
  HYPERSD_AMX ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

struct Chunk {
  const int32_t* right;  // 16 units of the panel
  int64_t index;         // of the left side's tiles
};

// Rows of float32, `stride` bytes apart.
struct Sums {
  float* data;
  int64_t stride;
  float* rows(int64_t first) const { return reinterpret_cast<float*>(reinterpret_cast<char*>(data) + first * stride); }
};

// out = start + chunks, from `column` of them on: M tiles of rows and V of columns. `start` without data is zero, with a stride
// of 0 one row for all.
template <int M, int V>
HYPERSD_AMX void sum_tiles(const char* left0, const char* left1, const Chunk* chunks, int64_t count, int64_t column,
                           int64_t stride, const Sums& start, const Sums& out) {
  if (start.data) {
    _tile_loadd(0, start.data, start.stride);
    if (V > 1) _tile_loadd(1, start.data + kLanes, start.stride);
    if (M > 1) _tile_loadd(2, start.rows(kTileRows), start.stride);
    if (M > 1 && V > 1) _tile_loadd(3, start.rows(kTileRows) + kLanes, start.stride);
  } else {
    _tile_zero(0);
    if (V > 1) _tile_zero(1);
    if (M > 1) _tile_zero(2);
    if (M > 1 && V > 1) _tile_zero(3);
  }
  for (int64_t c = 0; c < count; ++c) {
    const int32_t* const right = chunks[c].right + column;
    const int64_t at = chunks[c].index * kTileBytes;
    _tile_loadd(6, right, stride);
    _tile_loadd(4, left0 + at, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (M > 1) {
      _tile_loadd(5, left1 + at, 64);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (V > 1) {
      _tile_loadd(7, right + kLanes, stride);
      _tile_dpbf16ps(1, 4, 7);
      if (M > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out.data, out.stride);
  if (V > 1) _tile_stored(1, out.data + kLanes, out.stride);
  if (M > 1) _tile_stored(2, out.rows(kTileRows), out.stride);
  if (M > 1 && V > 1) _tile_stored(3, out.rows(kTileRows) + kLanes, out.stride);
}

// The one of these for so many rows and columns.
inline auto sum_tiles_for(bool two_rows, bool two_columns) {
  return two_rows ? (two_columns ? sum_tiles<2, 2> : sum_tiles<2, 1>) : two_columns ? sum_tiles<1, 2> : sum_tiles<1, 1>;
}

// Rows of a segment as tiles, up to 16 from `first` on; units that fill up the last tile are zero. Rows that are not there
// keep what was there: their sums are not used.
HYPERSD_AMX inline void copy_tiles(const Segment& segment, int64_t first, int64_t rows, char* out) {
  const int64_t whole = segment.units / kLanes, rest = segment.units % kLanes;
  const __mmask16 mask = static_cast<__mmask16>((1u << rest) - 1);
  for (int64_t i = 0; i < rows; ++i, out += 64) {
    const char* const from = segment.rows[first + i];
    for (int64_t c = 0; c < whole; ++c)
      _mm512_storeu_si512(out + c * kTileBytes, _mm512_loadu_si512(from + 64 * c));
    if (rest) _mm512_storeu_si512(out + whole * kTileBytes, _mm512_maskz_loadu_epi32(mask, from + 64 * whole));
  }
}

// One row of up to 32 sums to its target.
HYPERSD_AMX inline void store_row(const float* sums, char* out, int64_t column, int64_t columns, float scale, bool add) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const int64_t left = columns - j;
    const __mmask16 mask = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __m512 sum = _mm512_loadu_ps(sums + j);
    if (add) {
      float* const p = reinterpret_cast<float*>(out) + column + j;
      _mm512_mask_storeu_ps(p, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, p), sum));
    } else {
      const __m256bh narrow = _mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_set1_ps(scale), sum));
      _mm256_mask_storeu_epi16(reinterpret_cast<uint16_t*>(out) + column + j, mask, (__m256i)narrow);
    }
  }
}

// Rows of bfloat16 as tiles, segment by segment as products first need them. The memory is the thread's: one at a time.
class TiledRows {
 public:
  TiledRows(const Segment* segments, int64_t parts, int64_t count, const char* zero)
      : segments_(segments), parts_(parts), count_(count), tiles_((count + kTileRows - 1) / kTileRows), zero_(zero),
        m_(memory()) {
    m_.first.resize(parts + 1);
    m_.first[0] = 0;
    for (int64_t s = 0; s < parts; ++s) m_.first[s + 1] = m_.first[s] + chunks_of(segments[s]);
    if (const int64_t size = tiles_ * m_.first[parts] * kTileBytes; static_cast<int64_t>(m_.tiles.size()) < size)
      m_.tiles.resize(size);
    m_.copied.assign(parts, 0);
    m_.present.assign(tiles_ * parts, 0);
    m_.chunks.resize((tiles_ + 1) / 2 * m_.first[parts]);
    m_.kept.resize((tiles_ + 1) / 2);
    m_.ends.resize(parts * kTileRows * kPanel);
  }

  // out = start + segments from `from` on x packed: `multiply` of products.h.
  HYPERSD_AMX void multiply(int64_t from, const int32_t* packed, int64_t column, int64_t columns, const float* start,
                            char* const* out, float scale, bool add) {
    const int64_t end = column + columns;
    int64_t units = 0;
    for (int64_t s = from; s < parts_; ++s) units += segments_[s].units, copy(s);
    alignas(64) float sums[32 * 32];
    const Tiles configured;
    for (int64_t c = column; c < end; c += kPanel, packed += units * kPanel) {
      const int64_t width = end - c < kPanel ? end - c : kPanel, lanes = padded(width);
      int64_t most = 1;
      for (int64_t t = 0; t < tiles_; t += 2) most = std::max(most, m_.kept[t / 2] = list(from, t, packed, lanes));
      if (most > kStretch) m_.totals.resize((tiles_ + 1) / 2 * 2 * kTileRows * kPanel);
      for (int64_t begin = 0; begin < most; begin += kStretch)
        for (int64_t half = 0; half < width; half += 32)
          for (int64_t t = 0; t < tiles_; t += 2) {
            const int64_t kept = m_.kept[t / 2], number = std::min(kStretch, kept - begin);
            if (begin > 0 && number <= 0) continue;
            const char* const left = m_.tiles.data() + t * m_.first[parts_] * kTileBytes;
            const int64_t some = width - half < 32 ? width - half : 32;
            const bool ends = begin + kStretch >= kept;
            const Sums total{m_.totals.data() + t * kTileRows * kPanel + half, 4 * kPanel};
            const Sums bias{start ? const_cast<float*>(start) + c + half : nullptr, 0}, last{sums, 4 * 32};
            sum_tiles_for(t + 1 < tiles_, some > kLanes)(left, left + m_.first[parts_] * kTileBytes,
                                                         chunks_from(t) + begin, number, half, 4 * lanes,
                                                         begin ? total : bias, ends ? last : total);
            const int64_t rows = count_ - t * kTileRows < 2 * kTileRows ? count_ - t * kTileRows : 2 * kTileRows;
            for (int64_t i = 0; ends && i < rows; ++i)
              store_row(sums + 32 * i, out[t * kTileRows + i], c + half, some, scale, add);
          }
    }
  }

 private:
  struct Memory {
    std::vector<char> tiles;     // [tile of rows][chunk] of kTileBytes
    std::vector<int64_t> first;  // each segment's first chunk, and how many there are
    std::vector<char> copied;    // by segment
    std::vector<char> present;   // [tile of rows][segment]: 0 where all rows are zero and nothing was copied
    std::vector<Chunk> chunks;   // [two tiles of rows] of one panel
    std::vector<int64_t> kept;   // how many of them
    std::vector<float> totals;   // [row][column of a panel], between stretches
    std::vector<int32_t> ends;   // each segment's last, incomplete tile of a panel
  };
  static Memory& memory() {
    static thread_local Memory kept;
    return kept;
  }
  // Chunks whose half panel stays in the first cache while all rows meet it.
  static constexpr int64_t kStretch = 16;

  Chunk* chunks_from(int64_t t) { return m_.chunks.data() + t / 2 * m_.first[parts_]; }
  static int64_t chunks_of(const Segment& s) { return (s.units + kLanes - 1) / kLanes; }
  char* tile(int64_t t, int64_t s) { return m_.tiles.data() + (t * m_.first[parts_] + m_.first[s]) * kTileBytes; }

  void copy(int64_t s) {
    if (m_.copied[s]) return;
    m_.copied[s] = 1;
    for (int64_t t = 0; t < tiles_; ++t) {
      const int64_t first = t * kTileRows, rows = count_ - first < kTileRows ? count_ - first : kTileRows;
      char& present = m_.present[t * parts_ + s];
      for (int64_t i = first; i < first + rows && !present; ++i) present = segments_[s].rows[i] != zero_;
      if (present) copy_tiles(segments_[s], first, rows, tile(t, s));
    }
  }

  // The chunks of a panel that two tiles of rows, t and the next, have a part in; returns how many.
  int64_t list(int64_t from, int64_t t, const int32_t* panel, int64_t lanes) {
    int64_t kept = 0;
    const int64_t last = t + 1 < tiles_ ? t + 1 : t;
    for (int64_t s = from; s < parts_; panel += segments_[s].units * lanes, ++s) {
      const int64_t number = chunks_of(segments_[s]), rest = segments_[s].units % kLanes;
      int32_t* const end = m_.ends.data() + s * kTileRows * kPanel;
      if (rest && t == 0) {
        std::memcpy(end, panel + (number - 1) * kLanes * lanes, 4 * rest * lanes);
        std::memset(end + rest * lanes, 0, 4 * (kTileRows - rest) * lanes);
      }
      char &first = m_.present[t * parts_ + s], &second = m_.present[last * parts_ + s];
      if (!first && !second) continue;
      if (!first) std::memset(tile(t, s), 0, number * kTileBytes), first = 1;
      if (!second) std::memset(tile(last, s), 0, number * kTileBytes), second = 1;
      for (int64_t n = 0; n < number; ++n)
        chunks_from(t)[kept++] = {rest && n == number - 1 ? end : panel + n * kLanes * lanes, m_.first[s] + n};
    }
    return kept;
  }

  const Segment* segments_;
  int64_t parts_, count_, tiles_;
  const char* zero_;
  Memory& m_;
};

}  // namespace hypersd
#else
#define HYPERSD_TILES 0
namespace hypersd {
inline bool has_amx() { return false; }
}  // namespace hypersd
#endif

#if HYPERSD_PRODUCTS
namespace hypersd {

// Whether products of E run on the tile unit.
template <class E>
inline bool tiled() {
#if HYPERSD_TILES
  return E::per == 2 && isa() == Isa::amx;
#else
  return false;
#endif
}

// The left side of products, by the instructions in use. One at a time in a thread; where E is bfloat16, the units of every
// segment lie side by side.
template <class E>
class LeftSide {
 public:
  LeftSide(const Segment* segments, int64_t parts, int64_t count, const char* zero)
      : segments_(segments), parts_(parts), count_(count), zero_(zero) {
#if HYPERSD_TILES
    if (tiled<E>()) tiled_.emplace(segments, parts, count, zero);
#endif
  }
  // `multiply` of products.h, of the segments from `from` on.
  void times(const int32_t* packed, int64_t column, int64_t columns, const float* start, char* const* out, float scale,
             int64_t from = 0, bool add = false) {
#if HYPERSD_TILES
    if (tiled_) return tiled_->multiply(from, packed, column, columns, start, out, scale, add);
#endif
    multiply<E>(segments_ + from, parts_ - from, count_, zero_, packed, column, columns, start, out, scale, add);
  }

 private:
  const Segment* segments_;
  int64_t parts_, count_;
  const char* zero_;
#if HYPERSD_TILES
  std::optional<TiledRows> tiled_;
#endif
};

}  // namespace hypersd
#endif
