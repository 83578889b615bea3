// (x_fake - x_real) * weight / mean |x - x_real|, the mean over each sample; 0 where that is not a finite number.
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"

namespace hypersd {
namespace {

struct Problem {
  const char* data[3];  // x, x_real, x_fake
  Type type[3];
  int64_t width, chunks;  // elements and chunks of one sample
  double* partial;        // one sum per chunk: the order of addition does not depend on the number of threads
  const double* factor;   // one per sample
  char* out;
  Type out_type;
  double limit;  // the least number that out_type rounds to infinity
};

template <class C>
HYPERSD_INLINE void distance_chunks_body(const Problem& p, int64_t begin, int64_t end) {
  alignas(64) C buffer[2][kChunk];
  constexpr int kLanes = 32;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index / p.chunks, first = (index - row * p.chunks) * kChunk, offset = row * p.width + first;
    const int64_t count = p.width - first < kChunk ? p.width - first : kChunk;
    const C* HYPERSD_RESTRICT x = load<C>(p.data[0], p.type[0], offset, count, buffer[0]);
    const C* HYPERSD_RESTRICT x_real = load<C>(p.data[1], p.type[1], offset, count, buffer[1]);
    C lane[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int j = 0; j < kLanes; ++j) lane[j] += std::fabs(x[i + j] - x_real[i + j]);
    double total = 0;
    for (int j = 0; j < kLanes; ++j) total += lane[j];
    for (; i < count; ++i) total += std::fabs(x[i] - x_real[i]);
    p.partial[index] = total;
  }
}

template <class C>
HYPERSD_INLINE void direction_chunks_body(const Problem& p, int64_t begin, int64_t end) {
  alignas(64) C buffer[3][kChunk];
  const C limit = static_cast<C>(p.limit);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index / p.chunks, first = (index - row * p.chunks) * kChunk, offset = row * p.width + first;
    const int64_t count = p.width - first < kChunk ? p.width - first : kChunk;
    const C* HYPERSD_RESTRICT x_real = load<C>(p.data[1], p.type[1], offset, count, buffer[0]);
    const C* HYPERSD_RESTRICT x_fake = load<C>(p.data[2], p.type[2], offset, count, buffer[1]);
    C* HYPERSD_RESTRICT out = target<C>(p.out, p.out_type, offset, buffer[2]);
    const C factor = static_cast<C>(p.factor[row]);
    for (int64_t i = 0; i < count; ++i) {
      const C value = factor * (x_fake[i] - x_real[i]);
      out[i] = std::fabs(value) < limit ? value : C(0);  // false for nan
    }
    store<C>(p.out, p.out_type, offset, count, out);
  }
}
HYPERSD_INLINE void distance_float_body(const Problem& p, int64_t b, int64_t e) { distance_chunks_body<float>(p, b, e); }
HYPERSD_INLINE void distance_double_body(const Problem& p, int64_t b, int64_t e) { distance_chunks_body<double>(p, b, e); }
HYPERSD_INLINE void direction_float_body(const Problem& p, int64_t b, int64_t e) { direction_chunks_body<float>(p, b, e); }
HYPERSD_INLINE void direction_double_body(const Problem& p, int64_t b, int64_t e) { direction_chunks_body<double>(p, b, e); }
HYPERSD_KERNEL(distance_float, (const Problem& p, int64_t begin, int64_t end), (p, begin, end))
HYPERSD_KERNEL(distance_double, (const Problem& p, int64_t begin, int64_t end), (p, begin, end))
HYPERSD_KERNEL(direction_float, (const Problem& p, int64_t begin, int64_t end), (p, begin, end))
HYPERSD_KERNEL(direction_double, (const Problem& p, int64_t begin, int64_t end), (p, begin, end))

double first_infinite(Type type) {
  if (type == Type::float16) return 65520.0;
  if (type == Type::bfloat16) return 0x1.ffp127;
  return std::numeric_limits<double>::infinity();
}

}  // namespace

Tensor score_gradient(Tensor x, Tensor x_real, Tensor x_fake, std::optional<Tensor> weight) {
  static const char* const names[3] = {"x", "x_real", "x_fake"};
  const Tensor* tensors[3] = {&x, &x_real, &x_fake};
  const View shape(x);
  STD_TORCH_CHECK(shape.dim > 0, "x: expected a batch dimension");
  const int64_t batch = shape.size[0], width = batch ? shape.numel / batch : 0;
  std::optional<Vector> w;
  if (weight) w.emplace(*weight, "weight", batch);
  STD_TORCH_CHECK(!w || w->view.dim == 1, "weight: wrong shape");
  for (int64_t row = 0; w && row < batch; ++row)
    STD_TORCH_CHECK(std::isfinite(w->at(row)), "weight: expected finite numbers");
  std::vector<double> factor(batch);
  Output output(x, shape, true);
  const View layout(output.work());
  std::optional<Tensor> kept[3];
  Problem p{{}, {}, width, (width + kChunk - 1) / kChunk, nullptr, nullptr, layout.data, layout.type,
            first_infinite(layout.type)};
  bool wide = false;
  for (int j = 0; j < 3; ++j) {
    p.data[j] = read_input(*tensors[j], names[j], shape, "x", layout, kept[j], p.type[j]);
    wide = wide || p.type[j] == Type::float64;
  }
  const int64_t total = batch * p.chunks;
  std::vector<double> partial(total);
  p.partial = partial.data();
  p.factor = factor.data();
  const auto over_chunks = [&](const auto& run) {
    if (shape.numel <= kGrain) {
      run(0, total);
    } else {
      parallel_for(total, kGrain / (width < kChunk ? width : kChunk), run);
    }
  };
  over_chunks([&](int64_t begin, int64_t end) { wide ? distance_double(p, begin, end) : distance_float(p, begin, end); });
  for (int64_t row = 0; row < batch; ++row) {
    double distance = 0;
    for (int64_t j = 0; j < p.chunks; ++j) distance += partial[row * p.chunks + j];
    distance /= width;
    factor[row] = distance > 0 && std::isfinite(distance) ? (w ? w->at(row) : 1.0) / distance : 0.0;
  }
  over_chunks([&](int64_t begin, int64_t end) { wide ? direction_double(p, begin, end) : direction_float(p, begin, end); });
  return output.finish();
}

}  // namespace hypersd
