// softmax(scale q k^T) v for keys that stay in the second cache: whole rows of scores, every product on packed rows.
//
// A head's keys and values are packed once into rows padded to whole vectors (transposed where they are the right-hand
// side of a product over the head dimension); queries go through in blocks. Everything is computed in float32 (float64
// for float64), whatever the tensors hold. A task is a block of queries (forward) or a head (backward): the order of
// every sum is fixed, whoever runs it.
#include <cmath>
#include <limits>

#include "attention.h"
#include "products.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors as results: everything here is inlined, no call has an ABI
#endif

namespace hypersd {
namespace {

constexpr int kRows = 6;  // rows of a product computed at a time, against one to four vectors of columns

// W: bytes of a vector, what the instructions in use have. Rows are padded to whole vectors of 64.
template <class C>
constexpr int64_t kWhole = 64 / sizeof(C);
template <class C, int W>
struct Lanes {
  typedef C type __attribute__((vector_size(W)));
  static constexpr int count = W / sizeof(C);
};
template <class C, int W>
using Vec = typename Lanes<C, W>::type;
template <int W, class C>
HYPERSD_INLINE Vec<C, W> vector_at(const C* from) {
  Vec<C, W> v;
  std::memcpy(&v, from, W);
  return v;
}

template <class C, int W, int R, int J>
HYPERSD_INLINE void micro(const C* a, int64_t a_row, int64_t a_inner, const C* b, int64_t ldb, C* c, int64_t ldc,
                          int64_t inner, bool accumulate) {
  constexpr int lanes = Lanes<C, W>::count;
  Vec<C, W> sum[R][J] = {};
  for (int64_t i = 0; i < inner; ++i) {
    Vec<C, W> right[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) right[j] = vector_at<W>(b + i * ldb + j * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const C left = a[r * a_row + i * a_inner];
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) sum[r][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      C* const to = c + r * ldc + j * lanes;
      if (accumulate) sum[r][j] += vector_at<W>(to);  // once: one long sum loses digits
      std::memcpy(to, &sum[r][j], W);
    }
}

// c (rows, n) (+)= a b: a(r, i) = a[r a_row + i a_inner], b (inner, n) and c in rows of whole vectors.
template <class C>
struct Operands {
  const C* a;
  int64_t a_row, a_inner;
  const C* b;
  int64_t ldb;
  C* c;
  int64_t ldc, rows, n, inner;
  bool accumulate;
};
template <class C, int W, int J>
HYPERSD_INLINE void columns(const Operands<C>& o, int64_t column) {
  const C *a = o.a, *const b = o.b + column;
  C* c = o.c + column;
  int64_t r = 0;
  for (; r + kRows <= o.rows; r += kRows, a += kRows * o.a_row, c += kRows * o.ldc)
    micro<C, W, kRows, J>(a, o.a_row, o.a_inner, b, o.ldb, c, o.ldc, o.inner, o.accumulate);
  switch (o.rows - r) {
    case 5: micro<C, W, 5, J>(a, o.a_row, o.a_inner, b, o.ldb, c, o.ldc, o.inner, o.accumulate); break;
    case 4: micro<C, W, 4, J>(a, o.a_row, o.a_inner, b, o.ldb, c, o.ldc, o.inner, o.accumulate); break;
    case 3: micro<C, W, 3, J>(a, o.a_row, o.a_inner, b, o.ldb, c, o.ldc, o.inner, o.accumulate); break;
    case 2: micro<C, W, 2, J>(a, o.a_row, o.a_inner, b, o.ldb, c, o.ldc, o.inner, o.accumulate); break;
    case 1: micro<C, W, 1, J>(a, o.a_row, o.a_inner, b, o.ldb, c, o.ldc, o.inner, o.accumulate); break;
    default: break;
  }
}
// Four vectors of columns at a time where there are registers for 6 x 4 sums, else two; none alone at the end of five, where
// a sum would wait for itself.
template <class C, int W>
HYPERSD_INLINE void product_of(const Operands<C>& o) {
  constexpr int64_t lanes = Lanes<C, W>::count;
  if constexpr (W < 64) {  // n is padded to vectors of 64 bytes
    for (int64_t j = 0; j < o.n; j += 2 * lanes) columns<C, W, 2>(o, j);
  } else {
    for (int64_t j = 0, left = o.n / lanes, take; left > 0; j += take * lanes, left -= take) {
      take = left == 5 ? 3 : left < 4 ? left : 4;
      switch (take) {
        case 4: columns<C, W, 4>(o, j); break;
        case 3: columns<C, W, 3>(o, j); break;
        case 2: columns<C, W, 2>(o, j); break;
        default: columns<C, W, 1>(o, j);
      }
    }
  }
}
template <int W>
HYPERSD_INLINE void product_float_body(const Operands<float>& o) { product_of<float, W>(o); }
template <int W>
HYPERSD_INLINE void product_double_body(const Operands<double>& o) { product_of<double, W>(o); }
HYPERSD_VECTOR_KERNEL(product_float, (const Operands<float>& o), (o))
HYPERSD_VECTOR_KERNEL(product_double, (const Operands<double>& o), (o))
void product(const Operands<float>& o) { product_float(o); }
void product(const Operands<double>& o) { product_double(o); }

// join over N lanes, by halves.
template <int N, class C, class F>
HYPERSD_INLINE C over_lanes(const C* lanes, const F& join) {
  if constexpr (N == 2) {
    return join(lanes[0], lanes[1]);
  } else {
    constexpr int W = N / 2 * sizeof(C);
    const Vec<C, W> joined = join(vector_at<W>(lanes), vector_at<W>(lanes + N / 2));
    return over_lanes<N / 2>(reinterpret_cast<const C*>(&joined), join);
  }
}
template <class C, int W, class F>
HYPERSD_INLINE C over_lanes(const Vec<C, W>& v, const F& join) {
  return over_lanes<Lanes<C, W>::count>(reinterpret_cast<const C*>(&v), join);
}
struct Larger {
  template <class T>
  HYPERSD_INLINE T operator()(const T& a, const T& b) const { return a > b ? a : b; }
};
struct Sum {
  template <class T>
  HYPERSD_INLINE T operator()(const T& a, const T& b) const { return a + b; }
};

// e^t for t <= 0 (Cody and Waite's reduction, a minimax polynomial of degree 6; NaN stays NaN).
template <int W>
HYPERSD_INLINE Vec<float, W> exponential(const Vec<float, W>& t) {
  const Vec<float, W> magic = Vec<float, W>{} + 12582912.0f;
  const Vec<float, W> shifted = t * 1.44269504088896341f + magic, k = shifted - magic;
  const Vec<float, W> r = (t - k * 0.693359375f) - k * -2.12194440e-4f;
  Vec<float, W> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Vec<int32_t, W> power, zero;
  std::memcpy(&power, &shifted, W);
  std::memcpy(&zero, &magic, W);
  power = (power - zero + 127) << 23;
  Vec<float, W> scale;
  std::memcpy(&scale, &power, W);
  return t < -87.0f ? Vec<float, W>{} : p * scale;
}
template <int W>
HYPERSD_INLINE Vec<double, W> exponential(const Vec<double, W>& t) {
  Vec<double, W> e;
  for (int l = 0; l < Lanes<double, W>::count; ++l) e[l] = std::exp(t[l]);
  return e;
}

// Scores to exponentials in place, zeros from `keys` to `width`; returns 1 / their sum.
template <class C, int W>
HYPERSD_INLINE C softmax_row(C* s, int64_t keys, int64_t width) {
  constexpr int64_t lanes = Lanes<C, W>::count;
  const C low = -std::numeric_limits<C>::infinity();
  for (int64_t j = keys; j < width; ++j) s[j] = low;
  Vec<C, W> highs = Vec<C, W>{} + low, sums{};
  for (int64_t j = 0; j < width; j += lanes) highs = Larger{}(vector_at<W>(s + j), highs);
  const C high = over_lanes<C, W>(highs, Larger{});
  for (int64_t j = 0; j < width; j += lanes) {
    const Vec<C, W> e = exponential<W>(vector_at<W>(s + j) - high);
    sums += e;
    std::memcpy(s + j, &e, W);
  }
  for (int64_t j = keys; j < width; ++j) s[j] = 0;
  return C(1) / over_lanes<C, W>(sums, Sum{});
}

// Rows of scores to unnormalised probabilities, and the factors that normalise them.
template <class C, int W>
HYPERSD_INLINE void softmax_rows(C* s, int64_t rows, int64_t keys, int64_t width, C* norm) {
  for (int64_t i = 0; i < rows; ++i) norm[i] = softmax_row<C, W>(s + i * width, keys, width);
}
// Rows of scores and of dP to P and dS = P * (dP - rowsum(P * dP)).
template <class C, int W>
HYPERSD_INLINE void slope_rows(C* s, C* slopes, int64_t rows, int64_t keys, int64_t width) {
  constexpr int64_t lanes = Lanes<C, W>::count;
  for (int64_t i = 0; i < rows; ++i, s += width, slopes += width) {
    const C norm = softmax_row<C, W>(s, keys, width);
    Vec<C, W> sums{};
    for (int64_t j = 0; j < width; j += lanes) {
      const Vec<C, W> p = vector_at<W>(s + j) * norm;
      sums += p * vector_at<W>(slopes + j);
      std::memcpy(s + j, &p, W);
    }
    const C mean = over_lanes<C, W>(sums, Sum{});
    for (int64_t j = 0; j < width; j += lanes) {
      const Vec<C, W> slope = vector_at<W>(s + j) * (vector_at<W>(slopes + j) - mean);
      std::memcpy(slopes + j, &slope, W);
    }
  }
}

template <class C>
HYPERSD_INLINE void fetch(const Heads& t, int64_t head, int64_t token, C* HYPERSD_RESTRICT row, C* buffer) {
  const int64_t dim = t.view.size[3], stride = t.view.stride[3], offset = t.offset(head, token);
  if (stride == 1 || dim == 1) {
    const C* HYPERSD_RESTRICT from = load<C>(t.view.data, t.view.type, offset, dim, buffer);
    for (int64_t d = 0; d < dim; ++d) row[d] = from[d];
  } else {
    for (int64_t d = 0; d < dim; ++d) row[d] = *load<C>(t.view.data, t.view.type, offset + d * stride, 1, buffer);
  }
}
template <class C>
HYPERSD_INLINE void put(const Heads& t, int64_t head, int64_t token, const C* row, C factor, C* buffer) {
  const int64_t dim = t.view.size[3], stride = t.view.stride[3], offset = t.offset(head, token);
  const bool dense = stride == 1 || dim == 1;
  for (int64_t d = 0; d < dim; d += dense ? dim : 1) {
    const int64_t count = dense ? dim : 1, at = dense ? offset : offset + d * stride;
    C* HYPERSD_RESTRICT out = target<C>(t.view.data, t.view.type, at, buffer);
    for (int64_t i = 0; i < count; ++i) out[i] = factor * row[d + i];
    store<C>(t.view.data, t.view.type, at, count, out);
  }
}

// `count` tokens as rows of `ld`, times `factor`, zeros behind.
template <class C>
HYPERSD_INLINE void pack_rows(const Heads& t, int64_t head, int64_t first, int64_t count, C factor, C* rows, int64_t ld,
                              C* buffer) {
  const int64_t dim = t.view.size[3];
  for (int64_t i = 0; i < count; ++i) {
    C* HYPERSD_RESTRICT row = rows + i * ld;
    fetch<C>(t, head, first + i, row, buffer);
    if (factor != C(1))
      for (int64_t d = 0; d < dim; ++d) row[d] *= factor;
    for (int64_t d = dim; d < ld; ++d) row[d] = 0;
  }
}

// The same tokens as columns of `width`, zeros behind; dimensions up to `ld`.
template <class C>
void turn(const C* rows, int64_t ld, int64_t count, C* columns, int64_t width) {
#if HYPERSD_PRODUCTS
  if constexpr (sizeof(C) == 4) {
    if (isa() >= Isa::avx512) {
      for (int64_t i = 0; i < width; i += kLanes)
        for (int64_t d = 0; d < ld; d += kLanes)
          transpose<Float32>(rows + i * ld + d, ld, count - i < kLanes ? count - i : kLanes,
                             reinterpret_cast<int32_t*>(columns + d * width + i), width);
      return;
    }
  }
#endif
  for (int64_t d = 0; d < ld; ++d) {
    for (int64_t i = 0; i < count; ++i) columns[d * width + i] = rows[i * ld + d];
    for (int64_t i = count; i < width; ++i) columns[d * width + i] = 0;
  }
}

template <class C>
HYPERSD_INLINE void unpack_rows(const Heads& t, int64_t head, int64_t first, int64_t count, const C* rows, int64_t ld,
                                const C* factors, C factor, C* buffer) {
  for (int64_t i = 0; i < count; ++i)
    put<C>(t, head, first + i, rows + i * ld, factors ? factors[i] : factor, buffer);
}

// The same for each type, compiled for each instruction set.
#define HYPERSD_FOR(C)                                                                                             \
  template <int W>                                                                                                 \
  HYPERSD_INLINE void softmax_##C##_body(C* s, int64_t rows, int64_t keys, int64_t width, C* norm) {               \
    softmax_rows<C, W>(s, rows, keys, width, norm);                                                                   \
  }                                                                                                                \
  template <int W>                                                                                                 \
  HYPERSD_INLINE void slopes_##C##_body(C* s, C* ds, int64_t rows, int64_t keys, int64_t width) {                  \
    slope_rows<C, W>(s, ds, rows, keys, width);                                                                       \
  }                                                                                                                \
  HYPERSD_INLINE void pack_##C##_body(const Heads& t, int64_t head, int64_t first, int64_t count, C factor,        \
                                      C* rows, int64_t ld, C* buffer) {                                            \
    pack_rows<C>(t, head, first, count, factor, rows, ld, buffer);                                                 \
  }                                                                                                                \
  HYPERSD_INLINE void unpack_##C##_body(const Heads& t, int64_t head, int64_t first, int64_t count, const C* rows, \
                                        int64_t ld, const C* factors, C factor, C* buffer) {                       \
    unpack_rows<C>(t, head, first, count, rows, ld, factors, factor, buffer);                                      \
  }                                                                                                                \
  HYPERSD_VECTOR_KERNEL(softmax_##C, (C * s, int64_t rows, int64_t keys, int64_t width, C* norm),                         \
                 (s, rows, keys, width, norm))                                                                     \
  HYPERSD_VECTOR_KERNEL(slopes_##C, (C * s, C * ds, int64_t rows, int64_t keys, int64_t width),                           \
                 (s, ds, rows, keys, width))                                                                       \
  HYPERSD_KERNEL(pack_##C, (const Heads& t, int64_t head, int64_t first, int64_t count, C factor, C* rows,         \
                 int64_t ld, C* buffer), (t, head, first, count, factor, rows, ld, buffer))                        \
  HYPERSD_KERNEL(unpack_##C, (const Heads& t, int64_t head, int64_t first, int64_t count, const C* rows,           \
                 int64_t ld, const C* factors, C factor, C* buffer),                                               \
                 (t, head, first, count, rows, ld, factors, factor, buffer))                                       \
  void pack(const Heads& t, int64_t head, int64_t first, int64_t count, C factor, C* rows, int64_t ld,             \
            C* buffer) {                                                                                           \
    pack_##C(t, head, first, count, factor, rows, ld, buffer);                                                     \
  }
HYPERSD_FOR(float)
HYPERSD_FOR(double)

void softmax(double* s, int64_t rows, int64_t keys, int64_t width, double* norm) {
  softmax_double(s, rows, keys, width, norm);
}
void slopes(double* s, double* ds, int64_t rows, int64_t keys, int64_t width) {
  slopes_double(s, ds, rows, keys, width);
}
void unpack(const Heads& t, int64_t head, int64_t first, int64_t count, const double* rows, int64_t ld,
            const double* factors, double factor, double* buffer) {
  unpack_double(t, head, first, count, rows, ld, factors, factor, buffer);
}
using hypersd::slopes;
using hypersd::softmax;
using hypersd::unpack;

template <class C>
void forward_tasks(const Problem& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kWhole<C>;
  const int64_t width = padded(p.keys, lanes), ld = padded(p.dim, lanes), blocks = (p.queries + kQueries - 1) / kQueries;
  Scratch<C> scratch(2 * p.keys * ld + ld * width + kQueries * (2 * ld + width) + ld + 8 * lanes);
  C *kt = scratch.take(ld * width), *k = scratch.take(p.keys * ld), *v = scratch.take(p.keys * ld);
  C *q = scratch.take(kQueries * ld), *s = scratch.take(kQueries * width), *o = scratch.take(kQueries * ld);
  C *buffer = scratch.take(ld), norm[kQueries];
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / blocks, first = task % blocks * kQueries;
    const int64_t rows = p.queries - first < kQueries ? p.queries - first : kQueries;
    if (head != packed) {
      pack(p.k, head, 0, p.keys, C(1), k, ld, buffer);
      pack(p.v, head, 0, p.keys, C(1), v, ld, buffer);
      turn(k, ld, p.keys, kt, width);
      packed = head;
    }
    pack(p.q, head, first, rows, static_cast<C>(p.scale), q, ld, buffer);
    product(Operands<C>{q, ld, 1, kt, width, s, width, rows, width, p.dim, false});
    softmax(s, rows, p.keys, width, norm);
    product(Operands<C>{s, width, 1, v, ld, o, ld, rows, ld, p.keys, false});
    unpack(*p.out, head, first, rows, o, ld, norm, C(1), buffer);
  }
}

template <class C>
void backward_tasks(const Problem& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kWhole<C>;
  const int64_t width = padded(p.keys, lanes), ld = padded(p.dim, lanes);
  Scratch<C> scratch(4 * p.keys * ld + 2 * ld * width + kQueries * (3 * ld + 2 * width) + ld + 16 * lanes);
  C *kt = scratch.take(ld * width), *k = scratch.take(p.keys * ld), *dk = scratch.take(p.keys * ld);
  C *vt = scratch.take(ld * width), *v = scratch.take(p.keys * ld), *dv = scratch.take(p.keys * ld);
  C *q = scratch.take(kQueries * ld), *dout = scratch.take(kQueries * ld), *dq = scratch.take(kQueries * ld);
  C *s = scratch.take(kQueries * width), *ds = scratch.take(kQueries * width), *buffer = scratch.take(ld);
  for (int64_t head = begin; head < end; ++head) {
    pack(p.k, head, 0, p.keys, C(1), k, ld, buffer);
    pack(p.v, head, 0, p.keys, C(1), v, ld, buffer);
    turn(k, ld, p.keys, kt, width);
    turn(v, ld, p.keys, vt, width);
    for (int64_t first = 0; first < p.queries; first += kQueries) {
      const int64_t rows = p.queries - first < kQueries ? p.queries - first : kQueries;
      pack(p.q, head, first, rows, static_cast<C>(p.scale), q, ld, buffer);
      pack(*p.dout, head, first, rows, C(1), dout, ld, buffer);
      product(Operands<C>{q, ld, 1, kt, width, s, width, rows, width, p.dim, false});
      product(Operands<C>{dout, ld, 1, vt, width, ds, width, rows, width, p.dim, false});
      slopes(s, ds, rows, p.keys, width);
      product(Operands<C>{s, 1, width, dout, ld, dv, ld, p.keys, ld, rows, first > 0});
      product(Operands<C>{ds, 1, width, q, ld, dk, ld, p.keys, ld, rows, first > 0});
      product(Operands<C>{ds, width, 1, k, ld, dq, ld, rows, ld, p.keys, false});
      unpack(*p.dq, head, first, rows, dq, ld, nullptr, static_cast<C>(p.scale), buffer);
    }
    unpack(*p.dk, head, 0, p.keys, dk, ld, nullptr, C(1), buffer);
    unpack(*p.dv, head, 0, p.keys, dv, ld, nullptr, C(1), buffer);
  }
}

Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale) {
  Problem p{Heads(q), Heads(k), Heads(v), 0, 0, 0, 0, 0};
  const View &a = p.q.view, &b = p.k.view;
  STD_TORCH_CHECK(q.is_cpu() && k.is_cpu() && v.is_cpu(), "attention: expected CPU tensors");
  STD_TORCH_CHECK(a.type != Type::other && b.type == a.type && p.v.view.type == a.type, "attention: dtypes differ");
  STD_TORCH_CHECK(a.dim == 4 && b.dim == 4 && b.same_size(p.v.view) && a.size[0] == b.size[0] &&
                      a.size[1] == b.size[1] && a.size[3] == b.size[3] && a.size[3] > 0,
                  "attention: shapes do not fit");
  p.heads = a.size[0] * a.size[1], p.queries = a.size[2], p.keys = b.size[2], p.dim = a.size[3];
  p.scale = scale ? *scale : 1 / std::sqrt(static_cast<double>(p.dim));
  STD_TORCH_CHECK(std::isfinite(p.scale), "attention: scale is not finite");
  return p;
}

template <class F>
void over_ranges(int64_t tasks, int64_t multiplications, const F& run) {
  constexpr int64_t least = 1 << 18;  // a share of the work that a second thread is worth
  const int64_t grain = multiplications > least ? 1 : least / (multiplications + 1);
  if (tasks > grain) {
    parallel_for(tasks, grain, run);
  } else if (tasks > 0) {
    run(0, tasks);
  }
}

}  // namespace

void softmax(float* s, int64_t rows, int64_t keys, int64_t width, float* norm) {
  softmax_float(s, rows, keys, width, norm);
}
void slopes(float* s, float* ds, int64_t rows, int64_t keys, int64_t width) { slopes_float(s, ds, rows, keys, width); }
void unpack(const Heads& t, int64_t head, int64_t first, int64_t count, const float* rows, int64_t ld,
            const float* factors, float factor, float* buffer) {
  unpack_float(t, head, first, count, rows, ld, factors, factor, buffer);
}

Tensor attention(Tensor q, Tensor k, Tensor v, std::optional<double> scale) {
  Problem p = problem(q, k, v, scale);
  Tensor result = torch::stable::empty_like(q);
  const Heads out(result);
  p.out = &out;
  const auto run = out.view.type == Type::float64                        ? forward_tasks<double>
                   : out.view.type == Type::bfloat16 && multiplies_bfloat16() ? forward_bfloat16
                                                                       : forward_tasks<float>;
  if (p.keys == 0 && out.view.numel) return torch::stable::fill_(result, 0.0);
  const int64_t blocks = (p.queries + kQueries - 1) / kQueries;
  over_ranges(p.heads * blocks, 2 * p.queries * p.keys * p.dim / (blocks ? blocks : 1), [&](int64_t begin, int64_t end) { run(p, begin, end); });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v,
                                                      std::optional<double> scale) {
  Problem p = problem(q, k, v, scale);
  Tensor results[3] = {torch::stable::empty_like(q), torch::stable::empty_like(k), torch::stable::empty_like(k)};
  const Heads gradient(dout), dq(results[0]), dk(results[1]), dv(results[2]);
  STD_TORCH_CHECK(gradient.view.same_size(p.q.view) && gradient.view.type == p.q.view.type && dout.is_cpu(),
                  "attention: the gradient does not fit the output");
  p.dout = &gradient, p.dq = &dq, p.dk = &dk, p.dv = &dv;
  const auto run = dq.view.type == Type::float64                        ? backward_tasks<double>
                   : dq.view.type == Type::bfloat16 && multiplies_bfloat16() ? backward_bfloat16
                                                                      : backward_tasks<float>;
  if (p.keys == 0 || p.queries == 0) {
    for (Tensor& t : results) torch::stable::fill_(t, 0.0);
  } else {
    over_ranges(p.heads, 5 * p.queries * p.keys * p.dim, [&](int64_t begin, int64_t end) { run(p, begin, end); });
  }
  return {results[0], results[1], results[2]};
}

}  // namespace hypersd
