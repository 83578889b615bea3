// A linear layer or convolution with a low-rank update, and its backward, each summed in float32 and rounded once:
//
//   S  = scale conv(x, a)            y  = bias + conv1x1(S, b) + conv(x, W)
//   dS = scale conv1x1^T(dy, b)      dx = conv^T(dS, a) + conv^T(dy, W)      da = dS^T x      db = dy^T S
//
// A linear layer is a convolution of 1 x 1 pixels. Pixels are rows of channels (channels last), so that a convolution is
// a product whose left rows are gathered: nothing is unfolded. The adapter may be float32 beside bfloat16 weights.
#include <algorithm>
#include <cstdlib>
#include <optional>
#include <type_traits>
#include <vector>

#include "amx.h"
#include "kernels.h"

namespace hypersd {
namespace {

#if HYPERSD_PRODUCTS

// Memory that a thread keeps from call to call, in pieces: fresh pages cost more than packing into them. One of each use at
// a time in a thread.
enum class Use { call, panel };
class Scratch {
 public:
  Scratch(Use use, size_t bytes) {
    static thread_local Kept each[2];
    Kept& kept = each[static_cast<int>(use)];
    memory_ = &kept;
    if (kept.size < bytes || kept.size > kLimit) {
      std::free(kept.data);
      kept.size = bytes;
      kept.data = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      STD_TORCH_CHECK(kept.data, "lora: no memory for ", bytes, " bytes of scratch");
    }
  }
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_->data + used_);
    used_ += room<T>(count);
    return piece;
  }
  template <class T>
  static size_t room(int64_t count) { return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64; }

 private:
  static constexpr size_t kLimit = size_t{16} << 20;
  struct Kept {
    char* data = nullptr;
    size_t size = 0;
    ~Kept() { std::free(data); }
  };
  Kept* memory_;
  size_t used_ = 0;
};

// What surrounds the channels of a convolution; a linear layer is its rows as a batch of single pixels.
struct Shape {
  int64_t batch, in_h, in_w, out_h, out_w, kh, kw, sh, sw, ph, pw, in, out, rank;

  int64_t taps() const { return kh * kw; }
  int64_t sources() const { return batch * in_h * in_w; }
  int64_t results() const { return batch * out_h * out_w; }

  // Input pixel that output pixel m reads at a tap; -1 outside the picture.
  int64_t source(int64_t m, int64_t tap) const {
    const int64_t ox = m % out_w, oy = m / out_w % out_h, n = m / (out_w * out_h);
    const int64_t iy = oy * sh - ph + tap / kw, ix = ox * sw - pw + tap % kw;
    return iy < 0 || iy >= in_h || ix < 0 || ix >= in_w ? -1 : (n * in_h + iy) * in_w + ix;
  }
  // Output pixel that reads input pixel p at a tap; -1 if none does.
  int64_t reader(int64_t p, int64_t tap) const {
    const int64_t ix = p % in_w, iy = p / in_w % in_h, n = p / (in_w * in_h);
    const int64_t y = iy + ph - tap / kw, x = ix + pw - tap % kw;
    if (y < 0 || x < 0 || y % sh || x % sw || y / sh >= out_h || x / sw >= out_w) return -1;
    return (n * out_h + y / sh) * out_w + x / sw;
  }
};

Shape shape_of(const View& x, const View& w, int64_t rank, int64_t sh, int64_t sw, int64_t ph, int64_t pw) {
  const int64_t in = w.size[1], out = w.size[0];
  if (w.dim == 2) return {in ? x.numel / in : 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, in, out, rank};
  Shape s{x.size[0], x.size[2], x.size[3], 0, 0, w.size[2], w.size[3], sh, sw, ph, pw, in, out, rank};
  s.out_h = (s.in_h + 2 * s.ph - s.kh) / s.sh + 1;
  s.out_w = (s.in_w + 2 * s.pw - s.kw) / s.sw + 1;
  return s;
}

// A weight (out, in[, kh, kw]) at one tap as B[k][column]: columns are outputs, or (transposed) inputs.
Matrix tap_of(const View& w, const Shape& s, int64_t tap, bool transposed) {
  const int64_t item = w.type == Type::float32 ? 4 : 2;
  const int64_t offset = w.dim == 4 ? tap / s.kw * w.stride[2] + tap % s.kw * w.stride[3] : 0;
  const char* data = w.data + offset * item;
  if (transposed) return {data, w.type, w.stride[0], w.stride[1], w.size[0]};
  return {data, w.type, w.stride[1], w.stride[0], w.size[1]};
}

// What a thread's second cache keeps of one side of a product beside the other.
constexpr int64_t kCache = int64_t{1} << 20;

// Rows of a block of a left side of so many units: on the tile unit as many as stay in the second cache, where the packed
// weight then passes fewer times.
template <class E>
int64_t block_of(int64_t units) {
  if (!tiled<E>()) return kBlock;
  const int64_t fitting = kCache / (4 * units + 1) / 32 * 32;
  return std::min<int64_t>(std::max(fitting, kBlock), 8 * kBlock);
}

// Runs task(first, count) over blocks of rows, in parallel where there is work for more than one thread.
template <class E, class F>
void over_blocks(int64_t rows, int64_t block, int64_t flops_of_row, const F& task) {
  const int64_t group = tiled<E>() ? 32 : kGroup;
  const int64_t groups = (rows + group - 1) / group, grain = 3000000 / (flops_of_row * group + 1) + 1;
  const auto run = [&](int64_t begin, int64_t end) {
    const int64_t last = end * group < rows ? end * group : rows;
    for (int64_t m = begin * group; m < last; m += block) task(m, last - m < block ? last - m : block);
  };
  if (groups > grain) parallel_for(groups, grain, run);
  else run(0, groups);
}

const char* zeros(int64_t bytes) {
  static thread_local std::vector<char> memory;
  if (static_cast<int64_t>(memory.size()) < bytes) memory.assign(bytes, 0);
  return memory.data();
}

template <class E>
void widen_bias(const std::optional<Tensor>& bias, int64_t count, float* out) {
  std::memset(out, 0, sizeof(float) * padded(count));
  if (!bias) return;
  const View view(*bias);
  const auto* from = reinterpret_cast<const typename E::Element*>(view.data);
  for (int64_t i = 0; i < count; ++i)
    out[i] = bits_to_float(converted<Float32>(from[i * view.stride[0]]));
}

// Packs a panel of W + scale b a, all float32: the update joins it while the cache has it.
void pack_folded(const Shape& s, const View& w, const View& a, const View& b, float scale, int64_t column, int64_t count,
                 int32_t* panel) {
  const int64_t width = padded(count);
  std::vector<int32_t> right(s.rank * width);
  std::vector<const char*> left(s.in);
  std::vector<char*> out(s.in);
  pack_panel<Float32, float>({b.data, b.type, b.stride[1], b.stride[0], s.rank}, column, count, right.data());
  for (int32_t& unit : right)
    unit = static_cast<int32_t>(float_to_bits(scale * bits_to_float(static_cast<uint32_t>(unit))));
  for (int64_t tap = 0; tap < s.taps(); ++tap, panel += s.in * width) {
    const Matrix update = tap_of(a, s, tap, false);
    pack_panel<Float32, float>(tap_of(w, s, tap, false), column, count, panel);
    for (int64_t k = 0; k < s.in; ++k) {
      left[k] = update.data + 4 * k * update.inner_stride;
      out[k] = reinterpret_cast<char*>(panel + k * width);
    }
    const Segment segment{left.data(), s.rank, 4 * update.column_stride};
    multiply<Float32>(&segment, 1, s.in, nullptr, right.data(), 0, width, nullptr, out.data(), 1.0f, true);
  }
}

// The same panel in three parts.
void pack_folded_parts(const Shape& s, const View& w, const View& a, const View& b, float scale, int64_t column, int64_t count,
                       int32_t* panel) {
  const int64_t width = padded(count);
  std::vector<int32_t> whole(s.taps() * s.in * width);
  pack_folded(s, w, a, b, scale, column, count, whole.data());
  const Matrix tap{nullptr, Type::float32, 0, 0, s.in};
  for (int64_t t = 0; t < s.taps(); ++t)
    split_panel(whole.data() + t * s.in * width, s.in, width, panel + t * units_of<Triple>(tap) * width);
}

template <class E>
Segment segment_of(const Matrix& part, const char* const* rows = nullptr) {
  return {rows, units_of<E>(part), 4, part.inner};
}

template <class E>
void pack_narrow(const std::vector<Matrix>& parts, int64_t columns, int32_t* out) {
  pack_all(units_of<E>(parts), columns, panel_of<E>(), out,
           [&](int64_t column, int64_t some, int32_t* panel) { pack_parts<E>(parts, column, some, panel); });
}

// Whether panels of columns, packed by whoever needs them, are to meet all rows, or blocks of rows the whole packed weight: what
// moves less memory. By panels the left side is read once a panel, if no cache keeps it; by blocks the packed weight is
// written and read, and read again by every block, if no cache keeps that. Tiles are copies of the left side: by panels each
// thread makes its own.
template <class E>
bool panels_first(int64_t left_bytes, int64_t units, int64_t rows, int64_t columns) {
  const int64_t block = block_of<E>(units), blocks = (rows + block - 1) / block, wide = panel_of<E>();
  const int64_t right_bytes = 4 * units * columns, left = tiled<E>() ? 4 * units * rows : left_bytes;
  const int64_t by_panels = (tiled<E>() ? 2 * left : 0) + (left > kCache ? left * ((columns + wide - 1) / wide) : 0);
  return by_panels <= right_bytes * (right_bytes > kCache ? 3 + blocks : 3);
}

// out = start + parts x panels, which pack_one(column, columns, memory) makes: whoever needs a panel packs it, into memory
// that stays in its second cache. table[part][row] has the rows of the left side, and last those of the result.
template <class E, class Pack>
void by_panels(const std::vector<Segment>& parts, int64_t rows, int64_t columns, const char* const* table,
               const char* zero, const float* start, const Pack& pack_one) {
  int64_t units = 0;
  for (const Segment& part : parts) units += part.units;
  const int64_t wide = panel_of<E>(), count = static_cast<int64_t>(parts.size()), block = tiled<E>() ? rows : kBlock;
  const int64_t blocks = rows ? (rows + block - 1) / block : 0, tasks = blocks * ((columns + wide - 1) / wide);
  const auto run = [&](int64_t begin, int64_t end) {
    Scratch scratch(Use::panel, Scratch::room<int32_t>(units * wide));
    int32_t* const panel = scratch.take<int32_t>(units * wide);
    std::vector<Segment> segments(parts);
    std::optional<LeftSide<E>> left;
    for (int64_t task = begin, packed = -1, at = -1; task < end; ++task) {
      const int64_t column = task / blocks * wide, width = columns - column < wide ? columns - column : wide;
      const int64_t first = task % blocks * block, some = rows - first < block ? rows - first : block;
      if (packed != column) pack_one(column, width, panel), packed = column;
      if (at != first) {
        for (int64_t s = 0; s < count; ++s) segments[s].rows = table + s * rows + first;
        left.emplace(segments.data(), count, some, zero), at = first;
      }
      left->times(panel, column, width, start, const_cast<char* const*>(table + count * rows + first), 1.0f);
    }
  };
  const int64_t each = 2 * units * E::per * wide * (rows < block ? rows : block), grain = 3000000 / (each + 1) + 1;
  if (tasks > grain) parallel_for(tasks, grain, run);
  else run(0, tasks);
}

// With `fold` (float32 alone, nothing kept) there is no S: the weight is folded as it is packed.
template <class E>
void forward(const Shape& s, const View& x, const View& w, const std::optional<Tensor>& bias, const View& a,
             const View& b, float scale, char* y, char* kept, bool fold) {
  constexpr int64_t item = sizeof(typename E::Element);
  const int64_t taps = s.taps(), rows = s.results(), first_tap = fold ? 0 : 1;
  std::vector<Matrix> narrow, wide;  // of W's product the first part is that of S
  if (!fold) wide.push_back({b.data, b.type, b.stride[1], b.stride[0], s.rank});
  for (int64_t t = 0; t < taps; ++t) {
    narrow.push_back(tap_of(a, s, t, false));
    wide.push_back(tap_of(w, s, t, false));
  }
  std::vector<Segment> parts;
  for (const Matrix& part : wide) parts.push_back(segment_of<E>(part));
  const int64_t count_of_parts = first_tap + taps, listed = count_of_parts + 1;  // the rows of y come last
  const int64_t units = units_of<E>(wide);
  // S and y of a block of rows, which tiles copy once; or S of all rows, then y by panels
  const bool blocks = !panels_first<E>(x.numel * item, units, rows, s.out);
  const int64_t narrow_size = fold ? 0 : units_of<E>(narrow) * padded(s.rank);
  const int64_t wide_size = blocks ? units * padded(s.out) : 0;
  const int64_t s_size = kept || fold ? 0 : rows * s.rank;
  Scratch scratch(Use::call, Scratch::room<int32_t>(narrow_size) + Scratch::room<int32_t>(wide_size) +
                                 Scratch::room<float>(padded(s.out)) + Scratch::room<int32_t>(s_size) +
                                 Scratch::room<const char*>(listed * rows));
  int32_t* const packed_a = scratch.take<int32_t>(narrow_size);
  int32_t* const packed_w = scratch.take<int32_t>(wide_size);
  float* const start = scratch.take<float>(padded(s.out));
  char* const s_rows = kept ? kept : reinterpret_cast<char*>(scratch.take<int32_t>(s_size));
  const char** const table = scratch.take<const char*>(listed * rows);
  const auto pack_w = [&](int64_t column, int64_t columns, int32_t* panel) {
    if (fold && std::is_same<E, Triple>::value) pack_folded_parts(s, w, a, b, scale, column, columns, panel);
    else if (fold) pack_folded(s, w, a, b, scale, column, columns, panel);
    else pack_parts<E>(wide, column, columns, panel);
  };
  if (!fold) pack_narrow<E>(narrow, s.rank, packed_a);
  if (blocks) pack_all(units, s.out, panel_of<E>(), packed_w, pack_w);
  widen_bias<E>(bias, s.out, start);
  const char* const zero = zeros(s.in * item);

  const int64_t flops = 2 * (fold ? 0 : taps * s.in * s.rank) + (blocks ? 2 * (taps * s.in + s.rank) * s.out : 100 * taps);
  over_blocks<E>(rows, block_of<E>(units), flops, [&](int64_t first, int64_t count) {
    std::vector<Segment> segments(parts);
    for (int64_t p = 0; p < count_of_parts; ++p) segments[p].rows = table + p * rows + first;
    for (int64_t m = first; m < first + count; ++m) {
      if (!fold) table[m] = s_rows + m * s.rank * item;
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t from = s.source(m, t);
        table[(first_tap + t) * rows + m] = from < 0 ? zero : x.data + from * s.in * item;
      }
      table[count_of_parts * rows + m] = y + m * s.out * item;
    }
    const auto out = [&](int64_t part) { return const_cast<char* const*>(table + part * rows + first); };
    LeftSide<E> left(segments.data(), count_of_parts, count, zero);
    if (!fold) left.times(packed_a, 0, s.rank, nullptr, out(0), scale, 1);
    if (blocks) left.times(packed_w, 0, s.out, start, out(count_of_parts), 1.0f);
  });
  if (!blocks) by_panels<E>(parts, rows, s.out, table, zero, start, pack_w);
}

// rows (count, columns) of elements as units of the row dimension: [ceil(count / per)][columns].
template <class E>
HYPERSD_AVX512 void interleave(const char* const* rows, int64_t count, int64_t columns, int64_t column, const char* zero,
                               int64_t width, int32_t* HYPERSD_RESTRICT out) {
  using T = typename E::Element;
  for (int64_t m = 0; m < count; m += E::per, out += width) {
    const T* HYPERSD_RESTRICT low = reinterpret_cast<const T*>(rows[m]) + column;
    if (E::per == 1) {
      std::memcpy(out, low, 4 * columns);
    } else {
      const T* HYPERSD_RESTRICT high = reinterpret_cast<const T*>(m + 1 < count ? rows[m + 1] : zero) + column;
      for (int64_t j = 0; j < columns; ++j)
        out[j] = static_cast<int32_t>(converted<E>(low[j]) | converted<E>(high[j]) << 16);
    }
    for (int64_t j = columns; j < width; ++j) out[j] = 0;
  }
}

void store_grad(const View& out, int64_t offset, float value) {
  if (out.type == Type::float32) reinterpret_cast<float*>(out.data)[offset] = value;
  else reinterpret_cast<uint16_t*>(out.data)[offset] = to_bfloat16(value);
}

// rows (count, rank) of bfloat16 as units of the row dimension, one rank after the other: [rank][pitch], from `out` on.
HYPERSD_BF16 void across_rows(const char* const* rows, int64_t count, int64_t rank, const char* zero, int64_t pitch,
                              int32_t* out) {
  const int64_t width = padded(rank), units = (count + 1) / 2;
  std::vector<int32_t> pairs(kLanes * width);
  alignas(64) int32_t square[kLanes * kLanes];
  for (int64_t u = 0; u < units; u += kLanes) {
    const int64_t left = units - u < kLanes ? units - u : kLanes;
    interleave<BFloat16>(rows + 2 * u, count - 2 * u < 2 * left ? count - 2 * u : 2 * left, rank, 0, zero, width,
                         pairs.data());
    const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
    for (int64_t i = 0; i < rank; i += kLanes) {
      transpose<Float32>(pairs.data() + i, width, kLanes, square, kLanes);
      for (int64_t r = i; r < rank && r < i + kLanes; ++r)
        _mm512_mask_storeu_epi32(out + r * pitch + u, mask, _mm512_load_si512(square + (r - i) * kLanes));
    }
  }
}

// out[i][j] = sum over rows m of left[i][m] right[m][j], 64 columns j from `column` on: rows in chunks, each summed on its
// own. left[i] begins i * `across` units from `left` on and goes on every `step` units; right_row(m) finds the rows of the
// right side. Ends in store(i, j, value).
template <class E, class Rows, class Store>
void outer(const int32_t* left, int64_t across, int64_t step, int64_t rank, int64_t rows, int64_t column,
           int64_t columns, const char* zero, const Rows& right_row, const Store& store) {
  constexpr int64_t units_of_chunk = 64 * E::per, chunk = units_of_chunk * E::per;
  const int64_t wide = panel_of<E>();
  alignas(64) int32_t right[units_of_chunk * kPanel];
  std::vector<float> total(rank * kPanel);
  std::vector<char*> totals(rank);
  std::vector<const char*> lefts(rank);
  const char* found[chunk];
  for (int64_t i = 0; i < rank; ++i) totals[i] = reinterpret_cast<char*>(total.data() + i * kPanel);
  for (int64_t m = 0; m < rows; m += chunk) {
    const int64_t count = rows - m < chunk ? rows - m : chunk, units = (count + E::per - 1) / E::per;
    for (int64_t i = 0; i < count; ++i) found[i] = right_row(m + i);
    for (int64_t j = 0; j < columns; j += wide) {
      const int64_t some = columns - j < wide ? columns - j : wide;
      interleave<E>(found, count, some, column + j, zero, padded(some), right + units * j);
    }
    for (int64_t i = 0; i < rank; ++i)
      lefts[i] = reinterpret_cast<const char*>(left + i * across + m / E::per * step);
    const Segment segment{lefts.data(), units, 4 * step};
    LeftSide<E>(&segment, 1, rank, nullptr).times(right, 0, columns, nullptr, totals.data(), 1.0f, 0, true);
  }
  for (int64_t i = 0; i < rank; ++i)
    for (int64_t j = 0; j < columns; ++j) store(i, column + j, total[i * kPanel + j]);
}

template <class E>
void backward(const Shape& s, const View& dy, const View& x, const char* kept, const View& w, const View& a,
              const View& b, float scale, char* dx, const View* da, const View* db) {
  constexpr int64_t item = sizeof(typename E::Element);
  const int64_t taps = s.taps(), rows = s.results();
  using Gradient = std::conditional_t<std::is_same<E, Triple>::value, Float32, E>;  // of dA and dB
  const std::vector<Matrix> shrink{{b.data, b.type, b.stride[0], b.stride[1], s.out}};
  std::vector<Matrix> narrow, wide;
  for (int64_t t = 0; t < taps; ++t) {
    narrow.push_back(tap_of(a, s, t, false));
    wide.push_back(tap_of(a, s, t, true));
    wide.push_back(tap_of(w, s, t, true));
  }
  const bool again = da && !kept;  // S = conv(x, a) was not kept
  const int64_t shrink_size = units_of<E>(shrink) * padded(s.rank), units = units_of<E>(wide);
  const int64_t narrow_size = again ? units_of<E>(narrow) * padded(s.rank) : 0;
  const bool blocks = !panels_first<E>(dy.numel * item, units, s.sources(), s.in);
  const int64_t wide_size = dx && blocks ? units * padded(s.in) : 0;
  const int64_t sources = s.sources(), table_size = dx ? (2 * taps + 1) * sources : 0;
  const int64_t narrow_rows_size = rows * s.rank, pitch = (rows + 1) / 2, pairs = pitch * s.rank;
  const bool paired = da && E::per == 2;
  Scratch scratch(Use::call, Scratch::room<int32_t>(shrink_size) + Scratch::room<int32_t>(narrow_size) +
                                 Scratch::room<int32_t>(wide_size) + 2 * Scratch::room<int32_t>(narrow_rows_size) +
                                 2 * Scratch::room<int32_t>(pairs) + Scratch::room<const char*>(table_size));
  int32_t* const packed_b = scratch.take<int32_t>(shrink_size);
  int32_t* const packed_a = scratch.take<int32_t>(narrow_size);
  int32_t* const packed_w = scratch.take<int32_t>(wide_size);
  char* const ds = reinterpret_cast<char*>(scratch.take<int32_t>(narrow_rows_size));
  char* const computed = reinterpret_cast<char*>(scratch.take<int32_t>(narrow_rows_size));
  int32_t* ds_units = scratch.take<int32_t>(pairs);
  int32_t* s_units = scratch.take<int32_t>(pairs);
  const char** const table = scratch.take<const char*>(table_size);
  if (!paired) {
    ds_units = reinterpret_cast<int32_t*>(ds);
    s_units = reinterpret_cast<int32_t*>(kept ? const_cast<char*>(kept) : computed);
  }
  const auto pack_w = [&](int64_t column, int64_t columns, int32_t* panel) {
    pack_parts<E>(wide, column, columns, panel);
  };
  pack_narrow<E>(shrink, s.rank, packed_b);
  if (again) pack_narrow<E>(narrow, s.rank, packed_a);
  if (dx && blocks) pack_all(units, s.in, panel_of<E>(), packed_w, pack_w);
  const int64_t widest = s.in > s.out ? s.in : s.out;
  const char* const zero = zeros((widest > s.rank ? widest : s.rank) * item);

  // Where input and output pixels are the same, dS and dx of a block of rows, which tiles copy once
  const bool together = dx && blocks && taps == 1 && s.sh * s.sw == 1 && s.ph + s.pw == 0;
  const int64_t narrow_flops = 2 * s.rank * (s.out + (again ? taps * s.in : 0));
  const int64_t joint_flops = together ? narrow_flops + 2 * (s.out + s.rank) * s.in : narrow_flops;
  over_blocks<E>(rows, together ? block_of<E>(units) : kBlock, joint_flops, [&](int64_t first, int64_t count) {
    std::vector<const char*> left(count);
    std::vector<char*> ds_rows(count), s_rows(count), out(together ? count : 0);
    for (int64_t i = 0; i < count; ++i) {
      left[i] = dy.data + (first + i) * s.out * item;
      ds_rows[i] = ds + (first + i) * s.rank * item;
      s_rows[i] = (kept ? const_cast<char*>(kept) : computed) + (first + i) * s.rank * item;
      if (together) out[i] = dx + (first + i) * s.in * item;
    }
    if (again) {
      std::vector<const char*> gathered(taps * count);
      std::vector<Segment> segments(taps);
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t from = s.source(first + i, t);
          gathered[t * count + i] = from < 0 ? zero : x.data + from * s.in * item;
        }
        segments[t] = segment_of<E>(narrow[t], gathered.data() + t * count);
      }
      LeftSide<E>(segments.data(), taps, count, zero).times(packed_a, 0, s.rank, nullptr, s_rows.data(), scale);
    }
    const Segment both[2] = {segment_of<E>(wide[0], ds_rows.data()), segment_of<E>(shrink[0], left.data())};
    LeftSide<E> side(together ? both : both + 1, together ? 2 : 1, count, zero);
    side.times(packed_b, 0, s.rank, nullptr, ds_rows.data(), scale, together ? 1 : 0);
    if (together) side.times(packed_w, 0, s.in, nullptr, out.data(), 1.0f);
    if (paired) {
      across_rows(ds_rows.data(), count, s.rank, zero, pitch, ds_units + first / 2);
      across_rows(s_rows.data(), count, s.rank, zero, pitch, s_units + first / 2);
    }
  });

  if (dx && !together) {
    // Under a stride an input pixel is read at few taps; pixels with the same taps go together, the others are skipped.
    std::vector<int64_t> order;
    if (s.sh * s.sw > 1)
      for (int64_t phase = 0; phase < s.sh * s.sw; ++phase)
        for (int64_t p = 0; p < sources; ++p)
          if (p % s.in_w % s.sw == phase % s.sw && p / s.in_w % s.in_h % s.sh == phase / s.sw) order.push_back(p);
    std::vector<Segment> parts;
    for (const Matrix& part : wide) parts.push_back(segment_of<E>(part));
    const int64_t flops = blocks ? 2 * taps * (s.out + s.rank) * s.in / (s.sh * s.sw) : 100 * taps;
    over_blocks<E>(sources, block_of<E>(units), flops, [&](int64_t first, int64_t count) {
      for (int64_t i = first; i < first + count; ++i) {
        const int64_t p = order.empty() ? i : order[i];
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t m = s.reader(p, t);
          table[2 * t * sources + i] = m < 0 ? zero : ds + m * s.rank * item;
          table[(2 * t + 1) * sources + i] = m < 0 ? zero : dy.data + m * s.out * item;
        }
        table[2 * taps * sources + i] = dx + p * s.in * item;
      }
      if (!blocks) return;
      std::vector<Segment> segments(parts);
      for (int64_t p = 0; p < 2 * taps; ++p) segments[p].rows = table + p * sources + first;
      char* const* const out = const_cast<char* const*>(table + 2 * taps * sources + first);
      LeftSide<E>(segments.data(), 2 * taps, count, zero).times(packed_w, 0, s.in, nullptr, out, 1.0f);
    });
    if (!blocks) by_panels<E>(parts, sources, s.in, table, zero, nullptr, pack_w);
  }

  if (da) {
    const int64_t panels_a = (s.in + kPanel - 1) / kPanel, panels_b = (s.out + kPanel - 1) / kPanel;
    const int64_t across = paired ? pitch : 1, step = paired ? 1 : s.rank;
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const bool of_a = task < taps * panels_a;
        const int64_t tap = of_a ? task / panels_a : 0;
        const int64_t column = (of_a ? task % panels_a : task - taps * panels_a) * kPanel, size = of_a ? s.in : s.out;
        const int64_t columns = size - column < kPanel ? size - column : kPanel;
        if (of_a) {
          const int64_t row_stride = s.in * taps;  // da is (rank, in, kh, kw), contiguous
          outer<Gradient>(ds_units, across, step, s.rank, rows, column, columns, zero,
                   [&](int64_t m) {
                     const int64_t from = s.source(m, tap);
                     return from < 0 ? zero : x.data + from * s.in * item;
                   },
                   [&](int64_t i, int64_t j, float v) { store_grad(*da, i * row_stride + j * taps + tap, v); });
        } else {
          outer<Gradient>(s_units, across, step, s.rank, rows, column, columns, zero,
                   [&](int64_t m) { return static_cast<const char*>(dy.data) + m * s.out * item; },
                   [&](int64_t i, int64_t j, float v) { store_grad(*db, j * s.rank + i, v); });
        }
      }
    };
    const int64_t tasks = taps * panels_a + panels_b;
    if (rows * s.rank * (taps * s.in + s.out) > 1000000) parallel_for(tasks, 1, run);
    else run(0, tasks);
  }
}

// Whether float32 is multiplied in three parts: by the tile unit, from as many rows as pay for taking the weight apart.
bool in_parts(const Shape& s) {
#if HYPERSD_TILES
  return isa() == Isa::amx && s.results() >= 4 * kTileRows;
#else
  return false;
#endif
}

#endif

Tensor made(int64_t dim, const int64_t* size, const int64_t* stride, Type type) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, size, stride, type_codes().code[static_cast<int>(type)], aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor made_rows(int64_t rows, int64_t columns, Type type) {
  const int64_t size[2] = {rows, columns}, stride[2] = {columns, 1};
  return made(2, size, stride, type);
}

// (batch, ..., channels) rows, or a picture with the channels last, as torch's strides say it.
Tensor made_like_rows(const View& like, int64_t channels, int64_t height, int64_t width) {
  int64_t size[64], stride[64];
  std::memcpy(size, like.size, sizeof(int64_t) * like.dim);
  if (like.dim == 4 && height >= 0) {
    size[1] = channels, size[2] = height, size[3] = width;
    const int64_t order[4] = {height * width * channels, 1, width * channels, channels};
    return made(4, size, order, like.type);
  }
  size[like.dim - 1] = channels;
  int64_t running = 1;
  for (int64_t d = like.dim - 1; d >= 0; --d) stride[d] = running, running *= size[d] ? size[d] : 1;
  return made(like.dim, size, stride, like.type);
}

Tensor nothing(Type type) {
  const int64_t size[1] = {0}, stride[1] = {1};
  return made(1, size, stride, type);
}

}  // namespace

// The dtypes that lora_rows takes here and now, by bit: 1 float32, 2 bfloat16.
int64_t lora_rows_dtypes() {
#if HYPERSD_PRODUCTS
  return isa() < Isa::avx512 ? 0 : has_bfloat16() ? 3 : 1;
#else
  return 0;
#endif
}

std::tuple<Tensor, Tensor> lora_rows(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor a, Tensor b,
                                     double scale, int64_t sh, int64_t sw, int64_t ph, int64_t pw, bool keep,
                                     bool fold) {
#if HYPERSD_PRODUCTS
  const View in(x), w(weight), va(a), vb(b);
  STD_TORCH_CHECK(!fold || (!keep && in.type == Type::float32), "lora_rows: only float32 folds, and keeps nothing");
  const Shape s = shape_of(in, w, va.size[0], sh, sw, ph, pw);
  Tensor y = w.dim == 4 ? made_like_rows(in, s.out, s.out_h, s.out_w) : made_like_rows(in, s.out, -1, -1);
  Tensor kept = keep ? made_rows(s.results(), s.rank, in.type) : nothing(in.type);
  char* const kept_data = keep ? data_of(kept) : nullptr;
  const float factor = static_cast<float>(scale);
  if (in.type == Type::float32 && in_parts(s)) forward<Triple>(s, in, w, bias, va, vb, factor, data_of(y), kept_data, fold);
  else if (in.type == Type::float32) forward<Float32>(s, in, w, bias, va, vb, factor, data_of(y), kept_data, fold);
  else forward<BFloat16>(s, in, w, bias, va, vb, factor, data_of(y), kept_data, false);
  return {y, kept};
#else
  STD_TORCH_CHECK(false, "lora_rows: this build has no kernel for this processor");
#endif
}

std::tuple<Tensor, Tensor, Tensor> lora_rows_backward(Tensor dy, Tensor x, Tensor s_kept, Tensor weight, Tensor a,
                                                      Tensor b, double scale, int64_t sh, int64_t sw, int64_t ph,
                                                      int64_t pw, bool need_x, bool need_adapter) {
#if HYPERSD_PRODUCTS
  const View grad(dy), in(x), w(weight), va(a), vb(b), vs(s_kept);
  const Shape s = shape_of(in, w, va.size[0], sh, sw, ph, pw);
  Tensor dx = !need_x ? nothing(in.type)
              : w.dim == 4 ? made_like_rows(in, s.in, s.in_h, s.in_w)
                           : made_like_rows(in, s.in, -1, -1);
  const int64_t dense_a[4] = {s.in * s.taps(), s.taps(), s.kw, 1}, dense_b[4] = {s.rank, 1, 1, 1};
  Tensor da = need_adapter ? made(va.dim, va.size, dense_a, va.type) : nothing(va.type);
  Tensor db = need_adapter ? made(vb.dim, vb.size, dense_b, vb.type) : nothing(vb.type);
  const View out_a(da), out_b(db);
  const char* const kept = vs.dim == 2 ? vs.data : nullptr;
  char* const to = need_x ? data_of(dx) : nullptr;
  const View* const oa = need_adapter ? &out_a : nullptr;
  const float factor = static_cast<float>(scale);
  if (in.type == Type::float32 && in_parts(s)) backward<Triple>(s, grad, in, kept, w, va, vb, factor, to, oa, &out_b);
  else if (in.type == Type::float32) backward<Float32>(s, grad, in, kept, w, va, vb, factor, to, oa, &out_b);
  else backward<BFloat16>(s, grad, in, kept, w, va, vb, factor, to, oa, &out_b);
  return {dx, da, db};
#else
  STD_TORCH_CHECK(false, "lora_rows_backward: this build has no kernel for this processor");
#endif
}

}  // namespace hypersd
