// The norm of a flat gradient and the factor that clips it, in one pass and a fixed order.
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"

namespace hypersd {
namespace {

struct Squares {
  const char* data;
  Type type;
  int64_t numel;
  double* partial;  // one sum per chunk: the order of addition does not depend on the number of threads
};

template <class C>
HYPERSD_INLINE void square_chunks_body(const Squares& s, int64_t begin, int64_t end) {
  alignas(64) C buffer[kChunk];
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index * kChunk, count = s.numel - first < kChunk ? s.numel - first : kChunk;
    const C* HYPERSD_RESTRICT values = load<C>(s.data, s.type, first, count, buffer);
    constexpr int kLanes = 16;
    double lane[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int j = 0; j < kLanes; ++j) lane[j] += static_cast<double>(values[i + j]) * values[i + j];
    double total = 0;
    for (int j = 0; j < kLanes; ++j) total += lane[j];
    for (; i < count; ++i) total += static_cast<double>(values[i]) * values[i];
    s.partial[index] = total;
  }
}
HYPERSD_INLINE void squares_float_body(const Squares& s, int64_t begin, int64_t end) {
  square_chunks_body<float>(s, begin, end);
}
HYPERSD_INLINE void squares_double_body(const Squares& s, int64_t begin, int64_t end) {
  square_chunks_body<double>(s, begin, end);
}
HYPERSD_KERNEL(squares_float, (const Squares& s, int64_t begin, int64_t end), (s, begin, end))
HYPERSD_KERNEL(squares_double, (const Squares& s, int64_t begin, int64_t end), (s, begin, end))

}  // namespace

// (norm, min(1, max_norm / (norm + 1e-6))), the second nan where the first is not finite.
std::tuple<Tensor, Tensor> clip_coefficient(Tensor grad, double max_norm) {
  const View view(grad);
  STD_TORCH_CHECK(view.dim > 0, "grad: expected a dimension");
  STD_TORCH_CHECK(max_norm > 0, "max_norm: expected a positive number");
  STD_TORCH_CHECK(grad.is_cpu() && view.type != Type::other, "grad: expected a floating-point CPU tensor");
  std::optional<Tensor> copy;
  if (!view.dense(false)) copy = torch::stable::contiguous(grad);
  const int64_t chunks = (view.numel + kChunk - 1) / kChunk;
  std::vector<double> partial(chunks);
  const bool wide = view.type == Type::float64;
  const Squares s{copy ? data_of(*copy) : view.data, view.type, view.numel, partial.data()};
  const auto run = [&](int64_t begin, int64_t end) { wide ? squares_double(s, begin, end) : squares_float(s, begin, end); };
  if (view.numel > kGrain) {
    parallel_for(chunks, kGrain / kChunk, run);
  } else {
    run(0, chunks);
  }
  double total = 0;
  for (const double sum : partial) total += sum;
  const double norm = std::sqrt(total), ratio = max_norm / (norm + 1e-6);
  const double values[2] = {norm, !std::isfinite(norm) ? std::numeric_limits<double>::quiet_NaN() : ratio < 1 ? ratio : 1};
  View scalar(grad);
  scalar.dim = 0;
  std::optional<Tensor> result[2];
  for (int i = 0; i < 2; ++i) {
    result[i] = empty_strided(scalar, scalar.stride, wide ? Type::float64 : Type::float32);
    if (wide) {
      *reinterpret_cast<double*>(data_of(*result[i])) = values[i];
    } else {
      *reinterpret_cast<float*>(data_of(*result[i])) = static_cast<float>(values[i]);
    }
  }
  return {*result[0], *result[1]};
}

}  // namespace hypersd
