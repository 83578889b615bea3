// out = k0 x + k1 eps_cond + k2 eps_uncond + k3 history + k4 noise, one row of coefficients per sample.
#include "kernels.h"

namespace hypersd {
namespace {

struct Problem {
  int terms;                // tensors present, x first
  const char* data[5];
  ScalarType type[5];
  int column[5];            // the coefficient of each
  const Coefficients* coef;
  int64_t width;
  char* out;
  ScalarType out_type;
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

// The sum over the tensors given (never x == nullptr), coefficient columns by position; null tensors are left out.
Tensor combine_all(const Tensor* const* tensors, const char* const* names, const int* columns, int given,
                   const Coefficients& coef, ScalarType out_type) {
  const Tensor& x = *tensors[0];
  const View shape(x);
  STD_TORCH_CHECK(shape.dim > 0, names[0], ": expected a batch dimension");
  Output output(x, shape, coef.rows > 1);
  const View layout(output.work);
  Tensor kept[5];
  Problem p{0, {}, {}, {}, &coef, coef.rows > 1 ? shape.numel / coef.rows : shape.numel, layout.data, out_type};
  bool wide = out_type == ScalarType::Double;
  for (int j = 0; j < given; ++j) {
    if (!tensors[j]) continue;
    const View view(*tensors[j]);
    STD_TORCH_CHECK(view.same_size(shape), names[j], ": its shape is not that of ", names[0]);
    STD_TORCH_CHECK(is_floating(view.type), names[j], ": not a floating-point tensor");
    STD_TORCH_CHECK(tensors[j]->is_cpu(), names[j], ": expected a CPU tensor");
    kept[j] = matched(*tensors[j], view, layout);
    p.data[p.terms] = static_cast<const char*>(kept[j].data_ptr());
    p.type[p.terms] = view.type;
    p.column[p.terms++] = columns[j];
    wide = wide || view.type == ScalarType::Double;
  }
  if (shape.numel > 0) {
    if (shape.numel <= kGrain) {
      wide ? combine_double(p, 0, shape.numel) : combine_float(p, 0, shape.numel);
    } else {
      torch::stable::parallel_for(0, shape.numel, kGrain, [&](int64_t begin, int64_t end) {
        wide ? combine_double(p, begin, end) : combine_float(p, begin, end);
      });
    }
  }
  return output.finish();
}

}  // namespace

Tensor affine_step(Tensor x, Tensor eps_cond, Tensor coef, std::optional<Tensor> eps_uncond,
                   std::optional<Tensor> history, std::optional<Tensor> noise) {
  static const char* const names[5] = {"x", "eps_cond", "eps_uncond", "history", "noise"};
  static const int columns[5] = {0, 1, 2, 3, 4};
  const auto given = [](const std::optional<Tensor>& t) { return t ? &*t : nullptr; };
  const Tensor* tensors[5] = {&x, &eps_cond, given(eps_uncond), given(history), given(noise)};
  const Coefficients k(coef, "coef", x.dim() ? x.size(0) : 1, 5);
  return combine_all(tensors, names, columns, 5, k, x.scalar_type());
}

// The gradient of the tensor with coefficient `term`: k[term] grad, per sample.
Tensor affine_step_backward(Tensor grad, Tensor coef, int64_t term) {
  static const char* const names[1] = {"grad"};
  const int columns[1] = {static_cast<int>(term)};
  const Tensor* tensors[1] = {&grad};
  const Coefficients k(coef, "coef", grad.dim() ? grad.size(0) : 1, 5);
  return combine_all(tensors, names, columns, 1, k, grad.scalar_type());
}

}  // namespace hypersd
