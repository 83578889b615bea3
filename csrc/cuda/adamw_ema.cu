// AdamW, its moving average and a copy in another type over flat buffers, in place and in one pass.
#include "device.h"

namespace hypersd {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 4;  // numbers of a thread: 128 bits of each buffer

// Four gradients or shadows, whose type is not that of the buffers: 128 or 64 bits.
__device__ inline void read_four(const void* p, Type type, int64_t i, float (&v)[kEach]) {
  if (type == Type::float32) return Wide<float>::unpack(Wide<float>::fetch(p, type, i), v);
  const uint2 raw = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p) + i));
  const uint32_t words[2] = {raw.x, raw.y};
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const uint16_t bits = static_cast<uint16_t>(words[e / 2] >> 16 * (e % 2));
    v[e] = type == Type::float16 ? widen(static_cast<Half>(bits)) : widen(static_cast<BFloat>(bits));
  }
}
__device__ inline void write_four(void* p, Type type, int64_t i, const float (&v)[kEach]) {
  if (type == Type::float32) return Wide<float>::store(p, type, i, v);
  __stwb(reinterpret_cast<uint2*>(static_cast<uint16_t*>(p) + i),
         type == Type::float16 ? uint2{narrow_two(v[0], v[1], Half{}), narrow_two(v[2], v[3], Half{})}
                               : uint2{narrow_two(v[0], v[1], BFloat{}), narrow_two(v[2], v[3], BFloat{})});
}

// Everything of `count` numbers from `first` on: kEach of them, or one.
template <bool Four>
__global__ void __launch_bounds__(kThreads) adamw_ema_kernel(AdamwEma u) {
  constexpr int N = Four ? kEach : 1;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  const float clip = u.clip ? read(u.clip, u.clip_type, 0) : 1.0f;
  if (i >= u.count || !isfinite(clip)) return;  // a gradient that is not finite leaves everything as it is
  float p[N], m[N], v[N], e[N], g[N];
  if constexpr (Four) {
    const auto load = [i](const float* buffer, float(&to)[N]) {
      const float4 raw = *reinterpret_cast<const float4*>(buffer + i);  // written below: not through the read-only cache
      to[0] = raw.x, to[1] = raw.y, to[2] = raw.z, to[3] = raw.w;
    };
    load(u.param, p), load(u.exp_avg, m), load(u.exp_avg_sq, v), load(u.ema, e);
    read_four(u.grad, u.grad_type, i, g);
  } else {
    p[0] = u.param[i], m[0] = u.exp_avg[i], v[0] = u.exp_avg_sq[i], e[0] = u.ema[i];
    g[0] = read(u.grad, u.grad_type, i);
  }
  float decay = u.decay, step_size = u.step_size, root2 = u.root2;
  if (u.step_tensor || u.lr_tensor) {
    const float rate = static_cast<float>(u.lr) * (u.lr_tensor ? read(u.lr_tensor, u.lr_type, 0) : 1.0f);
    const double t = u.step * (u.step_tensor ? read(u.step_tensor, u.step_type, 0) : 1.0f);
    decay = rate * u.weight_decay;
    // 1 - beta^t, which cancels in float while t is small
    step_size = rate / -expm1f(static_cast<float>(t * u.log_beta1));
    root2 = 1.0f / sqrtf(-expm1f(static_cast<float>(t * u.log_beta2)));
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float scaled = clip * g[k];
    m[k] += u.weight1 * (scaled - m[k]);
    v[k] += u.weight2 * (scaled * scaled - v[k]);
    // the change is summed before it meets p: one rounding of p's size
    p[k] -= decay * p[k] + step_size * (m[k] / (sqrtf(v[k]) * root2 + u.eps));
    e[k] += u.weight_ema * (p[k] - e[k]);
  }
  if constexpr (Four) {
    const Type type = Type::float32;
    Wide<float>::store(u.exp_avg, type, i, m), Wide<float>::store(u.exp_avg_sq, type, i, v);
    Wide<float>::store(u.param, type, i, p), Wide<float>::store(u.ema, type, i, e);
    if (u.shadow) write_four(u.shadow, u.shadow_type, i, p);
  } else {
    u.exp_avg[i] = m[0], u.exp_avg_sq[i] = v[0], u.param[i] = p[0], u.ema[i] = e[0];
    if (u.shadow) write(u.shadow, u.shadow_type, i, p[0]);
  }
}

}  // namespace

void adamw_ema_(const AdamwEma& u, void* stream) {
  bool four = u.count % kEach == 0;
  for (const void* p : {static_cast<const void*>(u.param), static_cast<const void*>(u.exp_avg),
                        static_cast<const void*>(u.exp_avg_sq), static_cast<const void*>(u.ema), u.grad,
                        static_cast<const void*>(u.shadow)})
    four = four && aligned(p);
  const Launch by_four{up(u.count, kThreads * kEach), kThreads, stream}, by_one{up(u.count, kThreads), kThreads, stream};
  four ? launch(by_four, adamw_ema_kernel<true>, u) : launch(by_one, adamw_ema_kernel<false>, u);
}

}  // namespace hypersd
