// softmax(scale q k^T) v of short sequences, a head at a time: its scores stay in the cache, and backward computes them
// again. q (batch, queries, heads d), k and v (batch, keys, heads d): heads are read where the projections left them.
#include <cmath>
#include <vector>

#include "kernels.h"
#include "products.h"

namespace hypersd {
namespace {

#if HYPERSD_PRODUCTS

// exp(v) for v <= 0 to about 2 ulp: 2^n times a polynomial of the remainder.
HYPERSD_AVX512 inline __m512 exponential(__m512 v) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), v);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// Rows of `width` floats, of which `keys` count, to their softmax; the rest becomes 0.
HYPERSD_AVX512 void softmax(float* rows, int64_t count, int64_t keys, int64_t width, float scale) {
  for (int64_t t = 0; t < count; ++t, rows += width) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < width; j += kLanes) {
      const __mmask16 mask = keys - j >= kLanes ? 0xffff : static_cast<__mmask16>((1u << (keys > j ? keys - j : 0)) - 1);
      const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(rows + j), _mm512_set1_ps(scale));
      _mm512_storeu_ps(rows + j, v);
      most = _mm512_mask_max_ps(most, mask, most, v);
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t j = 0; j < width; j += kLanes) {
      const __mmask16 mask = keys - j >= kLanes ? 0xffff : static_cast<__mmask16>((1u << (keys > j ? keys - j : 0)) - 1);
      const __m512 e = _mm512_maskz_mov_ps(mask, exponential(_mm512_sub_ps(_mm512_loadu_ps(rows + j), top)));
      _mm512_storeu_ps(rows + j, e);
      sum = _mm512_add_ps(sum, e);
    }
    const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
    for (int64_t j = 0; j < width; j += kLanes)
      _mm512_storeu_ps(rows + j, _mm512_mul_ps(_mm512_loadu_ps(rows + j), inverse));
  }
}

// dp := scale p (dp - sum(p dp)), row by row.
HYPERSD_AVX512 void softmax_backward(const float* p, float* dp, int64_t count, int64_t width, float scale) {
  for (int64_t t = 0; t < count; ++t, p += width, dp += width) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < width; j += kLanes)
      sum = _mm512_fmadd_ps(_mm512_loadu_ps(p + j), _mm512_loadu_ps(dp + j), sum);
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum)), factor = _mm512_set1_ps(scale);
    for (int64_t j = 0; j < width; j += kLanes) {
      const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(dp + j), mean);
      _mm512_storeu_ps(dp + j, _mm512_mul_ps(factor, _mm512_mul_ps(_mm512_loadu_ps(p + j), centred)));
    }
  }
}

template <class E>
HYPERSD_AVX512 void narrow(const float* from, int64_t count, typename E::Element* HYPERSD_RESTRICT out) {
  for (int64_t i = 0; i < count; ++i)
    if (E::per == 1) out[i] = static_cast<typename E::Element>(from[i]);
    else out[i] = static_cast<typename E::Element>(to_bfloat16(from[i]));
}

// (tokens, width) elements as units of two rows (or one): [ceil(tokens / per)][width].
template <class E>
HYPERSD_AVX512 void pair_rows(const typename E::Element* rows, int64_t tokens, int64_t width,
                              int32_t* HYPERSD_RESTRICT out) {
  for (int64_t t = 0; t < tokens; t += E::per, out += width)
    for (int64_t j = 0; j < width; ++j) {
      const uint32_t high = E::per == 2 && t + 1 < tokens ? converted<E>(rows[(t + 1) * width + j]) << 16 : 0;
      out[j] = static_cast<int32_t>(converted<E>(rows[t * width + j]) | high);
    }
}

struct Heads {
  int64_t batch, heads, queries, keys, d;
  float scale;
  int64_t width() const { return padded(keys); }
};

// One head of a (batch, tokens, heads d) tensor.
struct Head {
  char* data;  // its first token
  int64_t tokens, step;  // bytes from token to token

  std::vector<char*> rows() const {
    std::vector<char*> found(tokens);
    for (int64_t t = 0; t < tokens; ++t) found[t] = data + t * step;
    return found;
  }
};

// Products of one head, with buffers of their own; every result is (tokens, columns).
template <class E>
class HeadProducts {
 public:
  using T = typename E::Element;
  static constexpr int64_t item = sizeof(T);

  explicit HeadProducts(const Heads& s)
      : s_(s), packed_(longest(s) * padded(longest(s))), units_(s.queries * s.width()) {}

  // out (left.tokens, width) = left right^T over d, in float32
  void scores(const Head& left, const Head& right, float* out) {
    const Matrix b{right.data, E::type, 1, right.step / item, s_.d};
    pack(b, right.tokens);
    std::memset(out, 0, sizeof(float) * left.tokens * s_.width());
    run(left.rows(), s_.d / E::per, 4, right.tokens, float_rows(out, left.tokens), true);
  }
  // out (left tokens, d) = weights (left tokens, width) right (keys, d)
  void combine(const T* weights, int64_t tokens, const Head& right, const Head& out) {
    pack({right.data, E::type, right.step / item, 1, right.tokens}, s_.d);
    std::vector<char*> rows(tokens);
    for (int64_t t = 0; t < tokens; ++t) rows[t] = reinterpret_cast<char*>(const_cast<T*>(weights) + t * s_.width());
    run(rows, (right.tokens + E::per - 1) / E::per, 4, s_.d, out.rows(), false);
  }
  // out (keys, d) = weights^T (keys, queries) right (queries, d)
  void combine_transposed(const T* weights, const Head& right, const Head& out) {
    pack({right.data, E::type, right.step / item, 1, right.tokens}, s_.d);
    pair_rows<E>(weights, right.tokens, s_.width(), units_.data());
    std::vector<char*> rows(s_.keys);
    for (int64_t j = 0; j < s_.keys; ++j) rows[j] = reinterpret_cast<char*>(units_.data() + j);
    run(rows, (right.tokens + E::per - 1) / E::per, 4 * s_.width(), s_.d, out.rows(), false);
  }

 private:
  void pack(const Matrix& b, int64_t columns) {
    int32_t* to = packed_.data();
    for (int64_t c = 0; c < columns; c += kPanel) {
      const int64_t count = columns - c < kPanel ? columns - c : kPanel;
      pack_panel<E, T>(b, c, count, to);
      to += units_of<E>(b) * padded(count);
    }
  }
  void run(const std::vector<char*>& left, int64_t units, int64_t step, int64_t columns, const std::vector<char*>& out,
           bool add) {
    const Segment segment{left.data(), units, step};
    multiply<E>(&segment, 1, left.size(), nullptr, packed_.data(), columns, nullptr, out.data(), 1.0f, add);
  }
  std::vector<char*> float_rows(float* out, int64_t count) const {
    std::vector<char*> rows(count);
    for (int64_t t = 0; t < count; ++t) rows[t] = reinterpret_cast<char*>(out + t * s_.width());
    return rows;
  }

  static int64_t longest(const Heads& s) {
    const int64_t tokens = s.queries > s.keys ? s.queries : s.keys;
    return tokens > s.d ? tokens : s.d;
  }

  const Heads& s_;
  std::vector<int32_t> packed_, units_;
};

template <class F>
void over_heads(const Heads& s, const F& run) {
  const int64_t count = s.batch * s.heads, grain = 500000 / (s.queries * s.keys * s.d + 1) + 1;
  if (count > grain) torch::stable::parallel_for(0, count, grain, run);
  else run(0, count);
}

template <class E>
Head head_of(const char* data, const Heads& s, int64_t index, int64_t tokens) {
  constexpr int64_t item = sizeof(typename E::Element);
  const int64_t step = s.heads * s.d * item;
  return {const_cast<char*>(data) + index / s.heads * tokens * step + index % s.heads * s.d * item, tokens, step};
}

template <class E>
void forward(const Heads& s, const char* q, const char* k, const char* v, char* out) {
  over_heads(s, [&](int64_t begin, int64_t end) {
    HeadProducts<E> products(s);
    std::vector<float> p(s.queries * s.width());
    std::vector<typename E::Element> weights(p.size());
    for (int64_t i = begin; i < end; ++i) {
      products.scores(head_of<E>(q, s, i, s.queries), head_of<E>(k, s, i, s.keys), p.data());
      softmax(p.data(), s.queries, s.keys, s.width(), s.scale);
      narrow<E>(p.data(), p.size(), weights.data());
      products.combine(weights.data(), s.queries, head_of<E>(v, s, i, s.keys), head_of<E>(out, s, i, s.queries));
    }
  });
}

template <class E>
void backward(const Heads& s, const char* dout, const char* q, const char* k, const char* v, char* dq, char* dk, char* dv) {
  over_heads(s, [&](int64_t begin, int64_t end) {
    HeadProducts<E> products(s);
    std::vector<float> p(s.queries * s.width()), dp(p.size());
    std::vector<typename E::Element> weights(p.size());
    for (int64_t i = begin; i < end; ++i) {
      const Head of_q = head_of<E>(q, s, i, s.queries), of_k = head_of<E>(k, s, i, s.keys);
      const Head of_v = head_of<E>(v, s, i, s.keys), of_dout = head_of<E>(dout, s, i, s.queries);
      products.scores(of_q, of_k, p.data());
      softmax(p.data(), s.queries, s.keys, s.width(), s.scale);
      narrow<E>(p.data(), p.size(), weights.data());
      products.combine_transposed(weights.data(), of_dout, head_of<E>(dv, s, i, s.keys));
      products.scores(of_dout, of_v, dp.data());
      softmax_backward(p.data(), dp.data(), s.queries, s.width(), s.scale);
      narrow<E>(dp.data(), dp.size(), weights.data());
      products.combine(weights.data(), s.queries, of_k, head_of<E>(dq, s, i, s.queries));
      products.combine_transposed(weights.data(), of_q, head_of<E>(dk, s, i, s.keys));
    }
  });
}

#endif

Heads heads_of(const View& q, const View& k, const View& v, int64_t heads, double scale) {
  STD_TORCH_CHECK(q.dim == 3 && k.dim == 3 && k.same_size(v) && q.size[0] == k.size[0] && q.size[2] == k.size[2] &&
                      heads > 0 && q.size[2] % (2 * heads) == 0,
                  "short_attention: q, k and v do not fit");
  STD_TORCH_CHECK(q.type == k.type && k.type == v.type, "short_attention: q, k and v have different dtypes");
  for (const View* view : {&q, &k, &v})
    STD_TORCH_CHECK(view->dense(false) && view->stride[2] == 1, "short_attention: expected contiguous tensors");
  return {q.size[0], heads, q.size[1], k.size[1], q.size[2] / heads, static_cast<float>(scale)};
}

}  // namespace

Tensor short_attention(Tensor q, Tensor k, Tensor v, int64_t heads, double scale) {
#if HYPERSD_PRODUCTS
  const View vq(q), vk(k), vv(v);
  const Heads s = heads_of(vq, vk, vv, heads, scale);
  Tensor out = empty_strided(vq, vq.stride, vq.type);
  (vq.type == Type::float32 ? forward<Float32> : forward<BFloat16>)(s, vq.data, vk.data, vv.data, data_of(out));
  return out;
#else
  STD_TORCH_CHECK(false, "short_attention: this build has no kernel for this processor");
#endif
}

std::tuple<Tensor, Tensor, Tensor> short_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, int64_t heads,
                                                            double scale) {
#if HYPERSD_PRODUCTS
  const View vd(dout), vq(q), vk(k), vv(v);
  const Heads s = heads_of(vq, vk, vv, heads, scale);
  STD_TORCH_CHECK(vd.same_size(vq) && vd.type == vq.type && vd.dense(false), "short_attention: wrong gradient");
  Tensor dq = empty_strided(vq, vq.stride, vq.type);
  Tensor dk = empty_strided(vk, vk.stride, vk.type), dv = empty_strided(vv, vv.stride, vv.type);
  (vq.type == Type::float32 ? backward<Float32> : backward<BFloat16>)(s, vd.data, vq.data, vk.data, vv.data, data_of(dq),
                                                                      data_of(dk), data_of(dv));
  return {dq, dk, dv};
#else
  STD_TORCH_CHECK(false, "short_attention_backward: this build has no kernel for this processor");
#endif
}

}  // namespace hypersd
