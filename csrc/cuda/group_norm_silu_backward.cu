// dx = rstd (weight dz - m(weight dz) - x^ m(weight dz x^)), dweight = sum dz x^, dbias = sum dz;  dz = dy silu'(z),
// x^ = (x + shift - mean) rstd, m the mean over a group. Two passes over x and dy, with sums by tile and channel in between.
#include "group_norm.h"

namespace hypersd {
namespace {

constexpr int kColumns = 32, kRows = 8;  // threads of a block that sums by channel

// dy silu'(z)
__device__ inline float derive(const GroupNorm& p, float dy, float z) {
  if (!p.silu) return dy;
  const float gate = __fdividef(1.0f, 1.0f + __expf(-z));
  return dy * (gate * (1.0f + z * (1.0f - gate)));
}

// Sums of dz and dz x^ over the pixels of a tile, by channel.
template <class A>
__global__ void __launch_bounds__(kTileThreads, 2) sums_kernel(GroupNorm p) {
  const Place at = place(p);
  Table table(p, reinterpret_cast<float*>(shared_memory()));
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  float* out = p.partial + (at.sample * p.chunks + at.chunk) * 2 * p.channels + at.first * p.lanes;
  for (int c0 = 0; c0 < at.slots; c0 += p.channel_threads) {
    const int c = c0 + at.channel_thread;
    if (at.works && c < at.slots) {
      const Affine<A> k(p, at, at.first + c, 0, p.mean + at.sample * p.groups, p.rstd + at.sample * p.groups);
      float level[A::N] = {}, tilt[A::N] = {};
      over_pixels<A, true>(p, at, at.first + c, p.dy, [&](const typename A::Raw& x, const typename A::Raw& dy, int) {
        float v[A::N], d[A::N];
        A::unpack(x, v), A::unpack(dy, d);
#pragma unroll
        for (int e = 0; e < A::N; ++e) {
          const float hat = k.center(v[e], e) * k.rstd[e], dz = derive(p, d[e], hat * k.weight[e] + k.bias[e]);
          level[e] += dz;
          tilt[e] += dz * hat;
        }
      });
      if (p.per_slot > 1) {  // the lanes are pixels of one channel
#pragma unroll
        for (int e = 1; e < A::N; ++e) level[0] += level[e], tilt[0] += tilt[e];
      }
      table.put(p, at, level, tilt);
    }
    __syncthreads();
    const int channels = min(p.channel_threads, at.slots - c0) * p.lanes;
    for (int j = warp; j < channels; j += warps) {
      float level = 0, tilt = 0;
      for (int t = lane; t < p.pixel_threads; t += 32) {
        level += table.first[t * table.stride + j];
        tilt += table.second[t * table.stride + j];
      }
      level = warp_sum(level), tilt = warp_sum(tilt);
      if (lane == 0) out[c0 * p.lanes + j] = level, out[p.channels + c0 * p.lanes + j] = tilt;
    }
    __syncthreads();
  }
}

// One block per sample and group: dx = rstd weight dz - ((x + shift - mean) tilt + level).
__global__ void __launch_bounds__(kFinishThreads) finish_sums_kernel(GroupNorm p) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int per_group = p.channels / p.groups, first = blockIdx.x % p.groups * per_group;
  const float* sums = p.partial + static_cast<int64_t>(blockIdx.x / p.groups) * p.chunks * 2 * p.channels + first;
  float level = 0, tilt = 0;
  for (int k = threadIdx.x; k < p.chunks * per_group; k += kFinishThreads) {
    const float* one = sums + static_cast<int64_t>(k / per_group) * 2 * p.channels + k % per_group;
    const float weight = p.weight ? read(p.weight, p.weight_type, first + k % per_group) : 1.0f;
    level += weight * one[0];
    tilt += weight * one[p.channels];
  }
  level = block_sum(level, scratch), tilt = block_sum(tilt, scratch);
  if (threadIdx.x) return;
  const float rstd = p.rstd[blockIdx.x], factor = rstd / (static_cast<float>(p.pixels) * per_group);
  p.level[blockIdx.x] = level * factor;
  p.tilt[blockIdx.x] = tilt * factor * rstd;
}

// The gradients of weight and bias: sums over all tiles of all samples, in order.
__global__ void __launch_bounds__(kColumns* kRows) channel_sums_kernel(GroupNorm p) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns, channel = blockIdx.x * kColumns + column;
  float bias = 0, weight = 0;
  for (int64_t tile = row; channel < p.channels && tile < p.batch * p.chunks; tile += kRows) {
    bias += p.partial[tile * 2 * p.channels + channel];
    weight += p.partial[(tile * 2 + 1) * p.channels + channel];
  }
  scratch[threadIdx.x] = bias;
  scratch[kColumns * kRows + threadIdx.x] = weight;
  __syncthreads();
  if (row || channel >= p.channels) return;
  for (int r = 1; r < kRows; ++r) {
    bias += scratch[r * kColumns + column];
    weight += scratch[(kRows + r) * kColumns + column];
  }
  if (p.dbias) write(p.dbias, p.bias_type, channel, bias);
  if (p.dweight) write(p.dweight, p.weight_type, channel, weight);
}

// With Joined dh is added.
template <class A, bool Joined>
__global__ void __launch_bounds__(kTileThreads, 2) dx_kernel(GroupNorm p) {
  const Place at = place(p);
  const int64_t items = at.sample * p.groups;
  for (int c = at.channel_thread; at.works && c < at.slots; c += p.channel_threads) {
    const Affine<A> k(p, at, at.first + c, 0, p.mean + items, p.rstd + items);
    float level[A::N], tilt[A::N];
#pragma unroll
    for (int e = 0; e < A::N; ++e) {
      const int group = (p.inside ? (at.first + c) * A::N + e : at.first + c) / (p.channels / p.groups);
      level[e] = p.level[items + group];
      tilt[e] = p.tilt[items + group];
    }
    over_pixels<A, true>(p, at, at.first + c, p.dy, [&](const typename A::Raw& x, const typename A::Raw& dy, int i) {
      const int64_t to = offset<A>(p, at, at.first + c, i);
      float v[A::N], d[A::N], joined[A::N];
      A::unpack(x, v), A::unpack(dy, d);
      if (Joined) A::unpack(A::fetch(p.dh, p.type, to), joined);
#pragma unroll
      for (int e = 0; e < A::N; ++e) {
        const float centered = k.center(v[e], e), scale = k.rstd[e] * k.weight[e];
        v[e] = derive(p, d[e], centered * scale + k.bias[e]) * scale - (centered * tilt[e] + level[e]);
        if (Joined) v[e] += joined[e];
      }
      A::store(p.out, p.type, to, v);
    });
  }
}

}  // namespace

void group_norm_silu_backward(const GroupNormPlan& plan, void* stream) {
  const GroupNorm& p = plan.p;
  const Launch tiles{p.batch * p.slabs * p.chunks, plan.threads, stream, plan.shared};
  with_access(plan.wide, p.type, [&](auto access) {
    using A = decltype(access);
    launch(tiles, sums_kernel<A>, p);
    if (p.out) {
      launch({p.batch * p.groups, kFinishThreads, stream, kFinishThreads / 32 * 4}, finish_sums_kernel, p);
      launch(tiles, p.dh ? dx_kernel<A, true> : dx_kernel<A, false>, p);
    }
  });
  if (p.dweight || p.dbias)
    launch({up(p.channels, kColumns), kColumns * kRows, stream, 2 * 4 * kColumns * kRows}, channel_sums_kernel, p);
}

}  // namespace hypersd
