// out = k0 x + k1 eps_cond + k2 eps_uncond + k3 history + k4 noise, one row of coefficients per sample.
#include "kernels.h"

namespace hypersd {
namespace {

struct Problem {
  int terms;                // tensors present, x first
  const char* data[5];
  Type type[5];
  int column[5];            // the coefficient of each
  const Coefficients* coef;
  int64_t width;
  char* out;
  Type out_type;
};

template <class C, int N>
HYPERSD_INLINE void combine(const C* const* in, const C* k, C* HYPERSD_RESTRICT out, int64_t count) {
  const C k0 = k[0], k1 = N > 1 ? k[1] : 0, k2 = N > 2 ? k[2] : 0, k3 = N > 3 ? k[3] : 0, k4 = N > 4 ? k[4] : 0;
  const C* HYPERSD_RESTRICT a = in[0];
  const C* HYPERSD_RESTRICT b = in[N > 1 ? 1 : 0];
  const C* HYPERSD_RESTRICT c = in[N > 2 ? 2 : 0];
  const C* HYPERSD_RESTRICT d = in[N > 3 ? 3 : 0];
  const C* HYPERSD_RESTRICT e = in[N > 4 ? 4 : 0];
  for (int64_t i = 0; i < count; ++i) {
    C sum = k0 * a[i];
    if (N > 1) sum += k1 * b[i];
    if (N > 2) sum += k2 * c[i];
    if (N > 3) sum += k3 * d[i];
    if (N > 4) sum += k4 * e[i];
    out[i] = sum;
  }
}

template <class C>
HYPERSD_INLINE void combine_range_body(const Problem& p, int64_t begin, int64_t end) {
  alignas(64) C buffer[6][kChunk];
  while (begin < end) {
    const int64_t row = begin / p.width, row_end = (row + 1) * p.width, stop = row_end < end ? row_end : end;
    C k[5];
    for (int j = 0; j < p.terms; ++j) k[j] = static_cast<C>(p.coef->at(row, p.column[j]));
    for (; begin < stop; begin += kChunk) {
      const int64_t count = stop - begin < kChunk ? stop - begin : kChunk;
      const C* in[5];
      for (int j = 0; j < p.terms; ++j) in[j] = load<C>(p.data[j], p.type[j], begin, count, buffer[j]);
      C* out = target<C>(p.out, p.out_type, begin, buffer[5]);
      switch (p.terms) {
        case 1: combine<C, 1>(in, k, out, count); break;
        case 2: combine<C, 2>(in, k, out, count); break;
        case 3: combine<C, 3>(in, k, out, count); break;
        case 4: combine<C, 4>(in, k, out, count); break;
        default: combine<C, 5>(in, k, out, count);
      }
      store<C>(p.out, p.out_type, begin, count, out);
    }
    begin = stop;
  }
}
HYPERSD_INLINE void combine_float_body(const Problem& p, int64_t begin, int64_t end) {
  combine_range_body<float>(p, begin, end);
}
HYPERSD_INLINE void combine_double_body(const Problem& p, int64_t begin, int64_t end) {
  combine_range_body<double>(p, begin, end);
}
HYPERSD_KERNEL(combine_float, (const Problem& p, int64_t begin, int64_t end), (p, begin, end))
HYPERSD_KERNEL(combine_double, (const Problem& p, int64_t begin, int64_t end), (p, begin, end))

struct Gradients {
  const char* grad;
  Type type;
  const Coefficients* coef;
  int64_t width;
  int outputs;
  int column[5];
  char* out[5];
};

// Reads the gradient once and writes all that are needed, chunk by chunk.
template <class C>
HYPERSD_INLINE void scale_range_body(const Gradients& p, int64_t begin, int64_t end) {
  alignas(64) C buffer[2][kChunk];
  while (begin < end) {
    const int64_t row = begin / p.width, row_end = (row + 1) * p.width, stop = row_end < end ? row_end : end;
    for (; begin < stop; begin += kChunk) {
      const int64_t count = stop - begin < kChunk ? stop - begin : kChunk;
      const C* HYPERSD_RESTRICT in = load<C>(p.grad, p.type, begin, count, buffer[0]);
      for (int j = 0; j < p.outputs; ++j) {
        const C k = static_cast<C>(p.coef->at(row, p.column[j]));
        C* HYPERSD_RESTRICT out = target<C>(p.out[j], p.type, begin, buffer[1]);
        for (int64_t i = 0; i < count; ++i) out[i] = k * in[i];
        store<C>(p.out[j], p.type, begin, count, out);
      }
    }
    begin = stop;
  }
}
HYPERSD_INLINE void scale_float_body(const Gradients& p, int64_t begin, int64_t end) {
  scale_range_body<float>(p, begin, end);
}
HYPERSD_INLINE void scale_double_body(const Gradients& p, int64_t begin, int64_t end) {
  scale_range_body<double>(p, begin, end);
}
HYPERSD_KERNEL(scale_float, (const Gradients& p, int64_t begin, int64_t end), (p, begin, end))
HYPERSD_KERNEL(scale_double, (const Gradients& p, int64_t begin, int64_t end), (p, begin, end))

}  // namespace

Tensor affine_step(Tensor x, Tensor eps_cond, Tensor coef, std::optional<Tensor> eps_uncond,
                   std::optional<Tensor> history, std::optional<Tensor> noise) {
  static const char* const names[5] = {"x", "eps_cond", "eps_uncond", "history", "noise"};
  const auto given = [](const std::optional<Tensor>& t) { return t ? &*t : nullptr; };
  const Tensor* tensors[5] = {&x, &eps_cond, given(eps_uncond), given(history), given(noise)};
  const View shape(x);
  STD_TORCH_CHECK(shape.dim > 0, "x: expected a batch dimension");
  const Coefficients k(coef, "coef", shape.size[0], 5);
  Output output(x, shape, k.rows > 1);
  const View layout(output.work());
  std::optional<Tensor> kept[5];
  Problem p{0, {}, {}, {}, &k, shape.numel / k.rows, layout.data, layout.type};
  bool wide = false;
  for (int j = 0; j < 5; ++j) {
    if (!tensors[j]) continue;
    p.data[p.terms] = read_input(*tensors[j], names[j], shape, "x", layout, kept[j], p.type[p.terms]);
    wide = wide || p.type[p.terms] == Type::float64;
    p.column[p.terms++] = j;
  }
  over_elements(shape.numel, [&](int64_t begin, int64_t end) {
    wide ? combine_double(p, begin, end) : combine_float(p, begin, end);
  });
  return output.finish();
}

// d out / d tensor_j = k_j: one output per bit j of `needed`, in order.
std::vector<Tensor> affine_step_backward(Tensor grad, Tensor coef, int64_t needed) {
  const View shape(grad);
  STD_TORCH_CHECK(shape.dim > 0 && shape.type != Type::other, "grad: expected a floating-point batch");
  const Coefficients k(coef, "coef", shape.size[0], 5);
  std::vector<Output> outputs;
  outputs.reserve(5);
  Gradients p{nullptr, shape.type, &k, shape.numel / k.rows, 0, {}, {}};
  for (int j = 0; j < 5; ++j) {
    if (!(needed >> j & 1)) continue;
    outputs.emplace_back(grad, shape, k.rows > 1);
    p.out[p.outputs] = data_of(outputs.back().work());
    p.column[p.outputs++] = j;
  }
  std::vector<Tensor> result;
  if (outputs.empty()) return result;
  std::optional<Tensor> kept;
  p.grad = matched(grad, shape, View(outputs[0].work()), kept);
  over_elements(shape.numel, [&](int64_t begin, int64_t end) {
    shape.type == Type::float64 ? scale_double(p, begin, end) : scale_float(p, begin, end);
  });
  for (Output& output : outputs) result.push_back(output.finish());
  return result;
}

}  // namespace hypersd
