// out = k0 x + k1 eps_cond + k2 eps_uncond + k3 history + k4 noise, one row of coefficients per sample.
#include "device.h"

namespace hypersd {
namespace {

constexpr int kThreads = 128;

template <class A>
__global__ void __launch_bounds__(kThreads) affine_step_kernel(AffineStep p) {
  const unsigned chunks = static_cast<unsigned>(up(p.width, kThreads * A::N));
  const int64_t row = blockIdx.x / chunks;
  const int64_t inside = (static_cast<int64_t>(blockIdx.x % chunks) * kThreads + threadIdx.x) * A::N;
  if (inside >= p.width) return;
  const int64_t offset = row * p.width + inside;
  typename A::Raw raw[5];
#pragma unroll
  for (int j = 0; j < 5; ++j)
    if (p.in[j]) raw[j] = A::fetch(p.in[j], p.type[j], offset);
  float total[A::N] = {};
#pragma unroll
  for (int j = 0; j < 5; ++j) {
    if (!p.in[j]) continue;
    const float k = p.coef ? read(p.coef, p.coef_type, row * p.coef_stride + j) : p.host[j];
    float v[A::N];
    A::unpack(raw[j], v);
#pragma unroll
    for (int e = 0; e < A::N; ++e) total[e] += k * v[e];
  }
  A::store(p.out, p.out_type, offset, total);
}

}  // namespace

void affine_step(const AffineStep& p, void* stream) {
  bool wide = aligned(p.out) && p.width % per_vector(p.out_type) == 0;
  for (int j = 0; j < 5; ++j) wide = wide && (!p.in[j] || (p.type[j] == p.out_type && aligned(p.in[j])));
  with_access(wide, p.out_type, [&](auto access) {
    using A = decltype(access);
    launch({p.rows * up(p.width, kThreads * A::N), kThreads, stream}, affine_step_kernel<A>, p);
  });
}

}  // namespace hypersd
