// rho(d) per sample, d = (p0 x_t + p1 eps_student) - (q0 x_s + q1 eps_target), and its slope p1 rho'(d) in the same pass.
#include "device.h"

namespace hypersd {
namespace {

constexpr int kThreads = 128;
enum Kind : int64_t { mse = 0, huber = 1, pseudo_huber = 2, l1 = 3 };

// rho(d), and rho'(d) into `derivative`.
__device__ inline float distance(int64_t kind, float c, float d, float& derivative) {
  const float size = fabsf(d);
  if (kind == mse) {
    derivative = 2 * d;
    return d * d;
  }
  if (kind == huber) {
    derivative = size > c ? copysignf(c, d) : d;  // so asked, nan is inside
    return size > c ? c * (size - 0.5f * c) : 0.5f * d * d;
  }
  if (kind == pseudo_huber) {  // sqrt(d^2 + c^2) - c = d^2 / (root + c), which does not cancel for small d
    const float root = sqrtf(d * d + c * c);
    derivative = d / root;
    return d * d / (root + c);
  }
  derivative = d > 0 ? 1.0f : d < 0 ? -1.0f : d;
  return size;
}

template <class A>
__global__ void __launch_bounds__(kThreads) loss_kernel(ConsistencyLoss p) {
  const unsigned chunks = static_cast<unsigned>(up(p.width, kThreads * A::N));
  const int64_t row = blockIdx.x / chunks;
  const int64_t inside = (static_cast<int64_t>(blockIdx.x % chunks) * kThreads + threadIdx.x) * A::N;
  float total = 0;
  if (inside < p.width) {
    const int64_t offset = row * p.width + inside;
    typename A::Raw raw[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) raw[j] = A::fetch(p.in[j], p.type[j], offset);
    float k[4], eps_student[A::N], x_t[A::N], eps_target[A::N], x_s[A::N], slope[A::N];
#pragma unroll
    for (int j = 0; j < 4; ++j) k[j] = read(p.coef, p.coef_type, row * p.coef_stride + j);
    A::unpack(raw[0], eps_student), A::unpack(raw[1], x_t), A::unpack(raw[2], eps_target), A::unpack(raw[3], x_s);
#pragma unroll
    for (int e = 0; e < A::N; ++e) {
      const float d = (k[0] * x_t[e] + k[1] * eps_student[e]) - (k[2] * x_s[e] + k[3] * eps_target[e]);
      float derivative;
      total += distance(p.kind, p.c, d, derivative);
      slope[e] = k[1] * derivative;
    }
    if (p.slope) A::store(p.slope, p.type[0], offset, slope);
  }
  total = block_sum(total, reinterpret_cast<float*>(shared_memory()));
  if (threadIdx.x == 0) p.partial[blockIdx.x] = total;
}

struct Finish {
  ConsistencyLoss p;
  int64_t chunks, rows;  // partial sums of a sample, samples of an output
};

// One block per output: the partial sums of its samples, each thread's in order.
__global__ void __launch_bounds__(kThreads) finish_kernel(Finish f) {
  const int64_t first = blockIdx.x * f.rows;
  float total = 0;
  for (int64_t row = 0; row < f.rows; ++row) {
    const float weight = f.p.weight ? read(f.p.weight, f.p.weight_type, first + row) : 1.0f;
    float sample = 0;
    for (int64_t i = threadIdx.x; i < f.chunks; i += kThreads) sample += f.p.partial[(first + row) * f.chunks + i];
    total += weight * sample;
  }
  total = block_sum(total, reinterpret_cast<float*>(shared_memory()));
  // two divisions: the product of the sizes need not be a float
  if (threadIdx.x == 0) f.p.loss[blockIdx.x] = total / static_cast<float>(f.p.width) / static_cast<float>(f.rows);
}

template <class A>
__global__ void __launch_bounds__(kThreads) scale_kernel(ConsistencyScale p) {
  const unsigned chunks = static_cast<unsigned>(up(p.width, kThreads * A::N));
  const int64_t row = blockIdx.x / chunks;
  const int64_t inside = (static_cast<int64_t>(blockIdx.x % chunks) * kThreads + threadIdx.x) * A::N;
  if (inside >= p.width) return;
  float v[A::N];
  const typename A::Raw raw = A::fetch(p.slope, p.type, row * p.width + inside);
  float factor = read(p.upstream, p.upstream_type, row * p.upstream_stride) * p.inverse_count;
  if (p.weight) factor *= read(p.weight, p.weight_type, row * p.weight_stride);
  A::unpack(raw, v);
#pragma unroll
  for (int e = 0; e < A::N; ++e) v[e] *= factor;
  A::store(p.out, p.type, row * p.width + inside, v);
}

bool wide(const ConsistencyLoss& p) {
  bool all = aligned(p.slope) && p.width % per_vector(p.type[0]) == 0;
  for (int j = 0; j < 4; ++j) all = all && p.type[j] == p.type[0] && aligned(p.in[j]);
  return all;
}
int64_t chunks_of(const ConsistencyLoss& p) { return up(p.width, kThreads * (wide(p) ? per_vector(p.type[0]) : 1)); }

}  // namespace

int64_t consistency_partials(const ConsistencyLoss& p) { return p.rows * chunks_of(p); }

void consistency_loss(const ConsistencyLoss& p, void* stream) {
  const int64_t chunks = chunks_of(p), shared = kThreads / 32 * sizeof(float);
  with_access(wide(p), p.type[0], [&](auto access) {
    launch({p.rows * chunks, kThreads, stream, shared}, loss_kernel<decltype(access)>, p);
  });
  launch({p.mean ? 1 : p.rows, kThreads, stream, shared}, finish_kernel, Finish{p, chunks, p.mean ? p.rows : 1});
}

void consistency_loss_backward(const ConsistencyScale& p, void* stream) {
  const bool wide = aligned(p.slope) && aligned(p.out) && p.width % per_vector(p.type) == 0;
  with_access(wide, p.type, [&](auto access) {
    using A = decltype(access);
    launch({p.rows * up(p.width, kThreads * A::N), kThreads, stream}, scale_kernel<A>, p);
  });
}

}  // namespace hypersd
