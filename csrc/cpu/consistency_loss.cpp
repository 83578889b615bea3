// rho(d) per sample, d = (p0 x_t + p1 eps_student) - (q0 x_s + q1 eps_target), and its slope p1 rho'(d) in the same pass.
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"

namespace hypersd {
namespace {

enum Kind : int64_t { mse = 0, huber = 1, pseudo_huber = 2, l1 = 3 };

struct Problem {
  const char* data[4];  // x_t, eps_student, x_s, eps_target
  Type type[4];
  const Coefficients* coef;
  int64_t width, chunks;  // elements and chunks of one sample
  int64_t kind;
  double c;
  double* partial;  // one sum per chunk: the order of addition does not depend on the number of threads
  char* slope;      // null: not wanted
  Type slope_type;
};

// 1 / v to about 1.5 ulp on the multipliers, for a normal v > 0: the divider is busy with the square root. Three Newton
// steps from the guess that negating the exponent gives.
HYPERSD_INLINE float reciprocal(float v) {
  float r = bits_to_float(0x7ef311c7u - float_to_bits(v));
  r *= 2.0f - v * r;
  r *= 2.0f - v * r;
  return r * (2.0f - v * r);
}
HYPERSD_INLINE double reciprocal(double v) { return 1.0 / v; }

// Losses into `rho`, p1 rho'(d) into `slope` when wanted.
template <class C, bool Slope>
HYPERSD_INLINE void rho_and_slope(int64_t kind, C c, C p1, const C* HYPERSD_RESTRICT d, C* HYPERSD_RESTRICT rho,
                                  C* HYPERSD_RESTRICT slope, int64_t count) {
  switch (kind) {
    case mse:
      for (int64_t i = 0; i < count; ++i) rho[i] = d[i] * d[i];
      if (Slope)
        for (int64_t i = 0; i < count; ++i) slope[i] = p1 * (2 * d[i]);
      break;
    case huber:
      for (int64_t i = 0; i < count; ++i) {
        const C size = d[i] < 0 ? -d[i] : d[i], inner = C(0.5) * d[i] * d[i], outer = c * (size - C(0.5) * c);
        rho[i] = size > c ? outer : inner;  // so asked, nan is inner
        if (Slope) slope[i] = p1 * (size > c ? (d[i] < 0 ? -c : c) : d[i]);
      }
      break;
    case pseudo_huber:
      // sqrt(d^2 + c^2) - c = d^2 / (root + c), which does not cancel for small d. With a slope, one division serves
      // both: 1 / (root (root + c)).
      for (int64_t i = 0; i < count; ++i) {
        const C square = d[i] * d[i], root = std::sqrt(square + c * c);
        if (Slope) {
          const C inverse = 1 / (root * (root + c));
          rho[i] = square * root * inverse;
          slope[i] = p1 * (d[i] * ((root + c) * inverse));
        } else {
          // 1 / v has no guess for infinity; inf * 0 is the definition's nan
          rho[i] = square * (square < std::numeric_limits<C>::infinity() ? reciprocal(root + c) : C(0));
        }
      }
      break;
    default:
      for (int64_t i = 0; i < count; ++i) rho[i] = d[i] < 0 ? -d[i] : d[i];
      if (Slope)
        for (int64_t i = 0; i < count; ++i) slope[i] = p1 * (d[i] > 0 ? C(1) : d[i] < 0 ? C(-1) : d[i]);
  }
}

template <class C>
HYPERSD_INLINE double sum(const C* HYPERSD_RESTRICT values, int64_t count) {
  constexpr int kLanes = 32;
  C lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] += values[i + j];
  double total = 0;
  for (int j = 0; j < kLanes; ++j) total += lane[j];
  for (; i < count; ++i) total += values[i];
  return total;
}

template <class C>
HYPERSD_INLINE void loss_chunks_body(const Problem& p, int64_t begin, int64_t end) {
  alignas(64) C buffer[6][kChunk];
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index / p.chunks, first = (index - row * p.chunks) * kChunk, offset = row * p.width + first;
    const int64_t count = p.width - first < kChunk ? p.width - first : kChunk;
    const C p0 = static_cast<C>(p.coef->at(row, 0)), p1 = static_cast<C>(p.coef->at(row, 1));
    const C q0 = static_cast<C>(p.coef->at(row, 2)), q1 = static_cast<C>(p.coef->at(row, 3));
    const C* HYPERSD_RESTRICT x_t = load<C>(p.data[0], p.type[0], offset, count, buffer[0]);
    const C* HYPERSD_RESTRICT eps_student = load<C>(p.data[1], p.type[1], offset, count, buffer[1]);
    const C* HYPERSD_RESTRICT x_s = load<C>(p.data[2], p.type[2], offset, count, buffer[2]);
    const C* HYPERSD_RESTRICT eps_target = load<C>(p.data[3], p.type[3], offset, count, buffer[3]);
    C* HYPERSD_RESTRICT d = buffer[4];
    for (int64_t i = 0; i < count; ++i) d[i] = (p0 * x_t[i] + p1 * eps_student[i]) - (q0 * x_s[i] + q1 * eps_target[i]);
    C* rho = buffer[5];
    if (p.slope) {
      C* slope = target<C>(p.slope, p.slope_type, offset, buffer[0]);
      rho_and_slope<C, true>(p.kind, static_cast<C>(p.c), p1, d, rho, slope, count);
      store<C>(p.slope, p.slope_type, offset, count, slope);
    } else {
      rho_and_slope<C, false>(p.kind, static_cast<C>(p.c), p1, d, rho, nullptr, count);
    }
    p.partial[index] = sum<C>(rho, count);
  }
}
HYPERSD_INLINE void loss_float_body(const Problem& p, int64_t begin, int64_t end) { loss_chunks_body<float>(p, begin, end); }
HYPERSD_INLINE void loss_double_body(const Problem& p, int64_t begin, int64_t end) { loss_chunks_body<double>(p, begin, end); }
HYPERSD_KERNEL(loss_float, (const Problem& p, int64_t begin, int64_t end), (p, begin, end))
HYPERSD_KERNEL(loss_double, (const Problem& p, int64_t begin, int64_t end), (p, begin, end))

struct Scaling {
  const char* in;
  char* out;
  Type type;
  int64_t width;
  const Vector *upstream, *weight;
  double inverse_count;
};

template <class C>
HYPERSD_INLINE void scale_range_body(const Scaling& p, int64_t begin, int64_t end) {
  alignas(64) C buffer[2][kChunk];
  while (begin < end) {
    const int64_t row = begin / p.width, row_end = (row + 1) * p.width, stop = row_end < end ? row_end : end;
    const double sample = p.upstream->at(row);
    const C factor = static_cast<C>(sample * (p.weight ? p.weight->at(row) : 1.0) * p.inverse_count);
    for (; begin < stop; begin += kChunk) {
      const int64_t count = stop - begin < kChunk ? stop - begin : kChunk;
      const C* HYPERSD_RESTRICT in = load<C>(p.in, p.type, begin, count, buffer[0]);
      C* out = target<C>(p.out, p.type, begin, buffer[1]);
      for (int64_t i = 0; i < count; ++i) out[i] = factor * in[i];
      store<C>(p.out, p.type, begin, count, out);
    }
    begin = stop;
  }
}
HYPERSD_INLINE void scale_float_body(const Scaling& p, int64_t begin, int64_t end) { scale_range_body<float>(p, begin, end); }
HYPERSD_INLINE void scale_double_body(const Scaling& p, int64_t begin, int64_t end) { scale_range_body<double>(p, begin, end); }
HYPERSD_KERNEL(scale_float, (const Scaling& p, int64_t begin, int64_t end), (p, begin, end))
HYPERSD_KERNEL(scale_double, (const Scaling& p, int64_t begin, int64_t end), (p, begin, end))

}  // namespace

std::tuple<Tensor, Tensor> consistency_loss(Tensor eps_student, Tensor x_t, Tensor eps_target, Tensor x_s, Tensor coef,
                                            std::optional<Tensor> weight, int64_t kind, double c, bool mean,
                                            bool with_slope) {
  static const char* const names[4] = {"x_t", "eps_student", "x_s", "eps_target"};
  const Tensor* tensors[4] = {&x_t, &eps_student, &x_s, &eps_target};
  const View shape(eps_student);
  STD_TORCH_CHECK(shape.dim > 0, "eps_student: expected a batch dimension");
  STD_TORCH_CHECK(kind >= mse && kind <= l1, "kind: unknown");
  STD_TORCH_CHECK(c >= 1e-18 && c <= 1e18, "c: expected a positive number, 1e-18 to 1e18");
  const int64_t batch = shape.size[0], width = batch ? shape.numel / batch : 0;
  const Coefficients k(coef, "coef", batch, 4);
  std::optional<Vector> w;
  if (weight) w.emplace(*weight, "weight", batch);
  STD_TORCH_CHECK(!w || w->view.dim == 1, "weight: wrong shape");
  for (int64_t row = 0; w && row < batch; ++row)
    STD_TORCH_CHECK(std::isfinite(w->at(row)), "weight: expected finite numbers");

  Output output(eps_student, shape, true);
  const View layout(output.work());
  std::optional<Tensor> kept[4];
  Problem p{{}, {}, &k, width, (width + kChunk - 1) / kChunk, kind, c, nullptr, with_slope ? layout.data : nullptr,
            layout.type};
  bool wide = false;
  for (int j = 0; j < 4; ++j) {
    p.data[j] = read_input(*tensors[j], names[j], shape, "eps_student", layout, kept[j], p.type[j]);
    wide = wide || p.type[j] == Type::float64;
  }
  const int64_t total = batch * p.chunks;
  std::vector<double> partial(total);
  p.partial = partial.data();
  const auto run = [&](int64_t begin, int64_t end) { wide ? loss_double(p, begin, end) : loss_float(p, begin, end); };
  if (shape.numel <= kGrain) {
    run(0, total);
  } else {
    parallel_for(total, kGrain / (p.width < kChunk ? p.width : kChunk), run);
  }

  const int64_t one = 1;
  View loss_shape = shape;
  loss_shape.dim = mean ? 0 : 1;
  Tensor loss = empty_strided(loss_shape, &one, wide ? Type::float64 : Type::float32);
  const auto write = [&](int64_t index, double value) {
    if (wide) static_cast<double*>(loss.data_ptr())[index] = value;
    else static_cast<float*>(loss.data_ptr())[index] = static_cast<float>(value);
  };
  double all = 0;
  for (int64_t row = 0; row < batch; ++row) {
    double sample = 0;
    for (int64_t j = 0; j < p.chunks; ++j) sample += partial[row * p.chunks + j];
    sample *= w ? w->at(row) : 1.0;
    if (!mean) write(row, width ? sample / width : std::numeric_limits<double>::quiet_NaN());
    all += sample;
  }
  if (mean) write(0, shape.numel ? all / shape.numel : std::numeric_limits<double>::quiet_NaN());
  if (with_slope) return {loss, output.finish()};
  const int64_t none = 0;
  View empty = shape;
  empty.dim = 1, empty.size = &none;
  return {loss, empty_strided(empty, &one, shape.type)};
}

Tensor consistency_loss_backward(Tensor slope, Tensor upstream, std::optional<Tensor> weight) {
  const View shape(slope);
  const int64_t batch = shape.size[0];
  const bool mean = upstream.dim() == 0;
  Output output(slope, shape, true);
  const View layout(output.work());
  std::optional<Tensor> kept;
  std::optional<Vector> w;
  if (weight) w.emplace(*weight, "weight", batch);
  const int64_t width = batch ? shape.numel / batch : 0;
  const Vector u(upstream, "upstream", batch);
  const Scaling p{matched(slope, shape, layout, kept), layout.data, shape.type, width, &u, w ? &*w : nullptr,
                  1.0 / (mean ? shape.numel : width)};
  const bool wide = shape.type == Type::float64;
  const auto run = [&](int64_t begin, int64_t end) { wide ? scale_double(p, begin, end) : scale_float(p, begin, end); };
  over_elements(shape.numel, run);
  return output.finish();
}

}  // namespace hypersd
