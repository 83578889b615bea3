// Products with gathered rows (products.h) of bfloat16 by the tile unit of newer Xeons (AMX): one instruction adds the
// products of 16 rows of 32 elements with 32 rows of 16 columns to 16 x 16 float32 sums. float32 goes there in three parts
// (triple.h).
//
// Four tiles hold the sums of 32 rows and 32 columns; two more each side. A panel of the right side, [units][columns], is
// already what the tile unit wants; here it has 32 columns, so that what is read from the second cache is read in order, which is
// twice as fast. The rows of the left side are copied into tiles, once for all products with them.
#pragma once

#include "products.h"
#include "triple.h"

#if HYPERSD_PRODUCTS && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HYPERSD_TILES 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <type_traits>
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
constexpr int64_t kTilePanel = 2 * kLanes;                      // columns of a panel

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
  const int32_t* right;  // 16 units of the panel, or 3 x 16 of a Triple's
  int64_t index;         // of the left side's tiles, one or three
};

// Rows of float32, `stride` bytes apart.
struct Sums {
  float* data;
  int64_t stride;
  float* rows(int64_t first) const { return reinterpret_cast<float*>(reinterpret_cast<char*>(data) + first * stride); }
};

template <class E>
constexpr int64_t kTilesOf = std::is_same<E, Triple>::value ? kParts : 1;  // of a chunk

// out = start + chunks: M tiles of rows and V of columns. `start` without data is zero, with a stride of 0 one row for all. The
// left side passes once for each panel: it is read as a stream, so that the panel stays in the first cache.
template <class E, int M, int V>
HYPERSD_AMX void sum_tiles(const char* left0, const char* left1, const Chunk* chunks, int64_t count, int64_t stride,
                           const Sums& start, const Sums& out) {
#define HYPERSD_LEFT(part)                                     \
  _tile_stream_loadd(4, left0 + at + (part) * kTileBytes, 64); \
  if (M > 1) _tile_stream_loadd(5, left1 + at + (part) * kTileBytes, 64)
#define HYPERSD_RIGHT(part)                                       \
  _tile_loadd(6, right + (part) * kLanes * (stride / 4), stride); \
  if (V > 1) _tile_loadd(7, right + (part) * kLanes * (stride / 4) + kLanes, stride)
#define HYPERSD_PRODUCTS_OF_TILES     \
  _tile_dpbf16ps(0, 4, 6);            \
  if (M > 1) _tile_dpbf16ps(2, 5, 6); \
  if (V > 1) _tile_dpbf16ps(1, 4, 7); \
  if (M > 1 && V > 1) _tile_dpbf16ps(3, 5, 7)
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
    const int32_t* const right = chunks[c].right;
    const int64_t at = chunks[c].index * kTilesOf<E> * kTileBytes;
    if constexpr (kTilesOf<E> == 1) {
      HYPERSD_LEFT(0);
      HYPERSD_RIGHT(0);
      HYPERSD_PRODUCTS_OF_TILES;
    } else {  // six of the nine products, the small ones first
      HYPERSD_LEFT(2);
      HYPERSD_RIGHT(0);
      HYPERSD_PRODUCTS_OF_TILES;
      HYPERSD_LEFT(1);
      HYPERSD_PRODUCTS_OF_TILES;
      HYPERSD_RIGHT(1);
      HYPERSD_PRODUCTS_OF_TILES;
      HYPERSD_LEFT(0);
      HYPERSD_PRODUCTS_OF_TILES;
      HYPERSD_RIGHT(2);
      HYPERSD_PRODUCTS_OF_TILES;
      HYPERSD_RIGHT(0);
      HYPERSD_PRODUCTS_OF_TILES;
    }
  }
#undef HYPERSD_LEFT
#undef HYPERSD_RIGHT
#undef HYPERSD_PRODUCTS_OF_TILES
  _tile_stored(0, out.data, out.stride);
  if (V > 1) _tile_stored(1, out.data + kLanes, out.stride);
  if (M > 1) _tile_stored(2, out.rows(kTileRows), out.stride);
  if (M > 1 && V > 1) _tile_stored(3, out.rows(kTileRows) + kLanes, out.stride);
}

// The one of these for so many rows and columns.
template <class E>
auto sum_tiles_for(bool two_rows, bool two_columns) {
  return two_rows ? (two_columns ? sum_tiles<E, 2, 2> : sum_tiles<E, 2, 1>)
                  : two_columns ? sum_tiles<E, 1, 2> : sum_tiles<E, 1, 1>;
}

// Rows of a segment as tiles, up to 16 from `first` on; units that fill up the last tile are zero. Rows that are not there
// keep what was there: their sums are not used.
template <class E>
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
template <>
HYPERSD_AMX inline void copy_tiles<Triple>(const Segment& segment, int64_t first, int64_t rows, char* out) {
  for (int64_t i = 0; i < rows; ++i, out += 64) {
    const float* const from = reinterpret_cast<const float*>(segment.rows[first + i]);
    char* to = out;
    for (int64_t k = 0; k < segment.inner; k += kStretch32, to += kParts * kTileBytes) {
      const int64_t left = segment.inner - k;
      const uint32_t mask = left >= kStretch32 ? ~0u : (1u << left) - 1;
      const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from + k);
      split_row(low, _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> kLanes), from + k + kLanes), to, kTileBytes);
    }
  }
}

// Rows of 32 sums to their targets, the first `columns` of each.
template <class E>
HYPERSD_AMX void store_rows(const float* sums, int64_t rows, char* const* out, int64_t column, int64_t columns, float scale,
                            bool add) {
  const uint32_t wanted = columns >= kTilePanel ? ~0u : (1u << columns) - 1;
  const __mmask16 first = static_cast<__mmask16>(wanted), second = static_cast<__mmask16>(wanted >> kLanes);
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < rows; ++i, sums += kTilePanel) {
    __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + kLanes);
    float* const to = reinterpret_cast<float*>(out[i]) + column;
    if (add) {
      low = _mm512_add_ps(_mm512_maskz_loadu_ps(first, to), low);
      high = _mm512_add_ps(_mm512_maskz_loadu_ps(second, to + kLanes), high);
    } else {
      low = _mm512_mul_ps(factor, low);
      high = _mm512_mul_ps(factor, high);
    }
    if (add || E::type == Type::float32) {
      _mm512_mask_storeu_ps(to, first, low);
      _mm512_mask_storeu_ps(to + kLanes, second, high);
    } else {
      const __m512i narrow = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      _mm512_mask_storeu_epi16(reinterpret_cast<uint16_t*>(out[i]) + column, wanted, narrow);
    }
  }
}

// Rows of 32 sums to those of the stretches before: each is summed on its own, as one long float32 sum loses digits.
HYPERSD_AMX inline void add_rows(const float* sums, int64_t rows, float* totals) {
  for (int64_t i = 0; i < rows * kTilePanel; i += kLanes)
    _mm512_store_ps(totals + i, _mm512_add_ps(_mm512_load_ps(totals + i), _mm512_load_ps(sums + i)));
}

// At whole cache lines: a tile whose rows lie across two takes twice as long to load.
struct CacheLines {
  char* data = nullptr;
  int64_t size = 0;
  void reserve(int64_t bytes) {
    if (bytes <= size) return;
    std::free(data);
    size = (bytes + 63) / 64 * 64;
    data = static_cast<char*>(std::aligned_alloc(64, size));
    STD_TORCH_CHECK(data, "no memory for ", bytes, " bytes of tiles");
  }
  ~CacheLines() { std::free(data); }
};

// What TiledRows keeps from one to the next.
struct TileMemory {
  CacheLines tiles;            // [tile of rows][chunk] of kTileBytes
  std::vector<int64_t> first;  // each segment's first chunk, and how many there are
  std::vector<char> copied;    // by segment
  std::vector<char> present;   // [tile of rows][segment]: 0 where all rows are zero and nothing was copied
  std::vector<Chunk> chunks;   // [two tiles of rows] of one panel
  std::vector<int64_t> kept;   // how many of them
  CacheLines totals;           // float32 [row][column of a panel], between stretches
  CacheLines ends;             // int32: each segment's last, incomplete tile of a panel
};
inline TileMemory& tile_memory() {
  static thread_local TileMemory kept;
  return kept;
}

// Rows of bfloat16, or of float32 in three parts, as tiles, segment by segment as products first need them. The memory is the
// thread's: one at a time.
template <class E>
class TiledRows {
 public:
  TiledRows(const Segment* segments, int64_t parts, int64_t count, const char* zero)
      : segments_(segments), parts_(parts), count_(count), tiles_((count + kTileRows - 1) / kTileRows), zero_(zero),
        m_(tile_memory()) {
    m_.first.resize(parts + 1);
    m_.first[0] = 0;
    for (int64_t s = 0; s < parts; ++s) m_.first[s + 1] = m_.first[s] + chunks_of(segments[s]);
    m_.tiles.reserve(tiles_ * m_.first[parts] * kTilesOf<E> * kTileBytes);
    m_.copied.assign(parts, 0);
    m_.present.assign(tiles_ * parts, 0);
    m_.chunks.resize((tiles_ + 1) / 2 * m_.first[parts]);
    m_.kept.resize((tiles_ + 1) / 2);
    m_.ends.reserve(parts * kTileRows * kTilePanel * 4);
  }

  // out = start + segments from `from` on x packed: `multiply` of products.h.
  HYPERSD_AMX void multiply(int64_t from, const int32_t* packed, int64_t column, int64_t columns, const float* start,
                            char* const* out, float scale, bool add) {
    const int64_t end = column + columns;
    int64_t units = 0;
    for (int64_t s = from; s < parts_; ++s) units += segments_[s].units, copy(s);
    alignas(64) float sums[2 * kTileRows * kTilePanel];
    const Tiles configured;
    for (int64_t c = column; c < end; c += kTilePanel, packed += units * kTilePanel) {
      const int64_t width = end - c < kTilePanel ? end - c : kTilePanel, lanes = padded(width);
      int64_t most = 1;
      for (int64_t t = 0; t < tiles_; t += 2) most = std::max(most, m_.kept[t / 2] = list(from, t, packed, lanes));
      if (most > kStretch) m_.totals.reserve((tiles_ + 1) / 2 * 2 * kTileRows * kTilePanel * 4);
      float* const totals = reinterpret_cast<float*>(m_.totals.data);
      for (int64_t begin = 0; begin < most; begin += kStretch)
        for (int64_t t = 0; t < tiles_; t += 2) {
          const int64_t kept = m_.kept[t / 2], number = std::min(kStretch, kept - begin);
          if (begin > 0 && number <= 0) continue;
          const int64_t next = m_.first[parts_] * kTilesOf<E> * kTileBytes;  // tile of rows
          const char* const left = m_.tiles.data + t * next;
          const bool ends = begin + kStretch >= kept;
          const Sums total{totals + t * kTileRows * kTilePanel, 4 * kTilePanel}, part{sums, 4 * kTilePanel};
          const Sums bias{start && begin == 0 ? const_cast<float*>(start) + c : nullptr, 0};
          sum_tiles_for<E>(t + 1 < tiles_, width > kLanes)(left, left + next, chunks_from(t) + begin, number, 4 * lanes, bias,
                                                           begin == 0 && !ends ? total : part);
          const int64_t rows = count_ - t * kTileRows < 2 * kTileRows ? count_ - t * kTileRows : 2 * kTileRows;
          if (begin) add_rows(sums, rows, total.data);
          if (ends) store_rows<E>(begin ? total.data : sums, rows, out + t * kTileRows, c, width, scale, add);
        }
    }
  }

 private:
  static constexpr int64_t kUnits = kTilesOf<E> * kLanes;         // of a chunk
  static constexpr int64_t kStretch = kTilesOf<E> == 1 ? 20 : 6;  // chunks whose panel the first cache keeps while all rows meet it

  Chunk* chunks_from(int64_t t) { return m_.chunks.data() + t / 2 * m_.first[parts_]; }
  static int64_t chunks_of(const Segment& s) { return (s.units + kUnits - 1) / kUnits; }
  char* tile(int64_t t, int64_t s) { return m_.tiles.data + (t * m_.first[parts_] + m_.first[s]) * kTilesOf<E> * kTileBytes; }

  void copy(int64_t s) {
    if (m_.copied[s]) return;
    m_.copied[s] = 1;
    for (int64_t t = 0; t < tiles_; ++t) {
      const int64_t first = t * kTileRows, rows = count_ - first < kTileRows ? count_ - first : kTileRows;
      char& present = m_.present[t * parts_ + s];
      for (int64_t i = first; i < first + rows && !present; ++i) present = segments_[s].rows[i] != zero_;
      if (present) copy_tiles<E>(segments_[s], first, rows, tile(t, s));
    }
  }

  // The chunks of a panel that two tiles of rows, t and the next, have a part in; returns how many.
  int64_t list(int64_t from, int64_t t, const int32_t* panel, int64_t lanes) {
    int64_t kept = 0;
    const int64_t last = t + 1 < tiles_ ? t + 1 : t;
    for (int64_t s = from; s < parts_; panel += segments_[s].units * lanes, ++s) {
      const int64_t number = chunks_of(segments_[s]), rest = segments_[s].units % kUnits;
      int32_t* const end = reinterpret_cast<int32_t*>(m_.ends.data) + s * kTileRows * kTilePanel;
      if (rest && t == 0) {
        std::memcpy(end, panel + (number - 1) * kLanes * lanes, 4 * rest * lanes);
        std::memset(end + rest * lanes, 0, 4 * (kTileRows - rest) * lanes);
      }
      char &first = m_.present[t * parts_ + s], &second = m_.present[last * parts_ + s];
      if (!first && !second) continue;
      if (!first) std::memset(tile(t, s), 0, number * kTilesOf<E> * kTileBytes), first = 1;
      if (!second) std::memset(tile(last, s), 0, number * kTilesOf<E> * kTileBytes), second = 1;
      for (int64_t n = 0; n < number; ++n)
        chunks_from(t)[kept++] = {rest && n == number - 1 ? end : panel + n * kUnits * lanes, m_.first[s] + n};
    }
    return kept;
  }

  const Segment* segments_;
  int64_t parts_, count_, tiles_;
  const char* zero_;
  TileMemory& m_;
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
  return (E::per == 2 && isa() == Isa::amx) || std::is_same<E, Triple>::value;
#else
  return false;
#endif
}

// Columns of a panel of the right side, by the instructions in use.
template <class E>
inline int64_t panel_of() {
#if HYPERSD_TILES
  if (tiled<E>()) return kTilePanel;
#endif
  return kPanel;
}

// The left side of products, by the instructions in use. One at a time in a thread; where E is not float32, the units of
// every segment lie side by side.
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
    if constexpr (!std::is_same<E, Triple>::value)
      multiply<E>(segments_ + from, parts_ - from, count_, zero_, packed, column, columns, start, out, scale, add);
  }

 private:
  const Segment* segments_;
  int64_t parts_, count_;
  const char* zero_;
#if HYPERSD_TILES
  std::optional<TiledRows<E>> tiled_;
#endif
};

}  // namespace hypersd
#endif
