// y = silu(z), z = (x + shift - mean) rstd weight + bias: one pass where a cluster of blocks can hold its groups, else two.
// With a residual h = x + residual is written by the pass that takes the statistics, and stands for x from then on.
#include <algorithm>

#include "group_norm.h"

namespace hypersd {
namespace {

// x + residual, rounded: stored, and as a fetch would give it.
template <class A>
__device__ inline typename A::Raw add_residual(const GroupNorm& p, const typename A::Raw& x, const typename A::Raw& residual,
                                               int64_t to) {
  float v[A::N], r[A::N];
  A::unpack(x, v), A::unpack(residual, r);
#pragma unroll
  for (int e = 0; e < A::N; ++e) v[e] += r[e];
  return A::store_rounded(p.h, p.type, to, v);
}

// Mean (of x + shift) and squared deviations of every channel of the block's tile, into `means` and `squares`; keep(x, c,
// i) sees each slot. A thread's own by Welford's recurrence, then together (Chan, Golub and LeVeque).
template <class A, bool Residual, class Keep>
__device__ inline void moments(const GroupNorm& p, const Place& at, float* memory, const Keep& keep, float* means,
                               float* squares) {
  Table table(p, memory);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const float pixels = pixels_of(p, at.chunk);
  const auto pixels_of_thread = [&](int t) {
    const int left = at.end - at.begin - t;
    return static_cast<float>(left > 0 ? static_cast<int>(up(left, p.pixel_threads)) * p.per_slot : 0);
  };
  for (int c0 = 0; c0 < at.slots; c0 += p.channel_threads) {
    const int c = c0 + at.channel_thread;
    if (at.works && c < at.slots) {
      float mean[A::N] = {}, square[A::N] = {};
      int seen = 0;
      over_pixels<A, Residual>(p, at, at.first + c, p.residual, [&](typename A::Raw x, const typename A::Raw& r, int i) {
        float v[A::N];
        if (Residual) x = add_residual<A>(p, x, r, offset<A>(p, at, at.first + c, i));
        keep(x, c, i);
        A::unpack(x, v);
        const float share = 1.0f / static_cast<float>(++seen);
#pragma unroll
        for (int e = 0; e < A::N; ++e) {
          const float apart = v[e] - mean[e];
          mean[e] += apart * share;
          square[e] += apart * (v[e] - mean[e]);
        }
      });
      if (p.per_slot > 1) {  // the lanes are pixels of one channel
        float center = 0, spread = 0;
#pragma unroll
        for (int e = 1; e < A::N; ++e) center += (mean[e] - mean[0]) * (1.0f / A::N);
        center += mean[0];
#pragma unroll
        for (int e = 0; e < A::N; ++e) spread += square[e] + seen * ((mean[e] - center) * (mean[e] - center));
        mean[0] = center, square[0] = spread;
      }
      table.put(p, at, mean, square);
    }
    __syncthreads();
    const int channels = min(p.channel_threads, at.slots - c0) * p.lanes;
    for (int k = warp; k < channels; k += warps) {
      float sum = 0, spread = 0;
      const float guess = table.first[k];  // sums of what is left are small: no rounding of the size of a far mean
      for (int t = lane; t < p.pixel_threads; t += 32)
        sum += pixels_of_thread(t) * (table.first[t * table.stride + k] - guess);
      const float center = pixels > 0 ? guess + warp_sum(sum) / pixels : 0;
      for (int t = lane; t < p.pixel_threads; t += 32) {
        const float apart = table.first[t * table.stride + k] - center;
        spread += table.second[t * table.stride + k] + pixels_of_thread(t) * (apart * apart);
      }
      spread = warp_sum(spread);
      if (lane) continue;
      means[c0 * p.lanes + k] = center + shift_of(p, at, (at.first + c0) * p.lanes + k);
      squares[c0 * p.lanes + k] = spread;
    }
    __syncthreads();
  }
}

template <class A>
__device__ inline void normalize(const GroupNorm& p, const Affine<A>& k, const typename A::Raw& x, int64_t to) {
  float v[A::N];
  A::unpack(x, v);
#pragma unroll
  for (int e = 0; e < A::N; ++e) {
    const float z = k.center(v[e], e) * (k.rstd[e] * k.weight[e]) + k.bias[e];
    v[e] = p.silu ? __fdividef(z, 1.0f + __expf(-z)) : z;
  }
  A::store(p.out, p.type, to, v);
}

// ----------------------------------------------------------------------------------------------------------- one pass

// A cluster (before sm_90: a block) has whole groups of one sample, each of its blocks a chunk of their pixels.
template <class A, bool Residual>
__global__ void __launch_bounds__(kMostThreads, 1) one_pass_kernel(GroupNorm p) {
  const Place at = place(p);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const int per_group = p.channels / p.groups, channels = p.slab * p.lanes, groups = channels / per_group;
  auto* kept = reinterpret_cast<typename A::Raw*>(shared_memory());
  float* means = reinterpret_cast<float*>(kept + p.slab * p.chunk);
  float *squares = means + channels, *group_mean = squares + channels, *group_rstd = group_mean + groups;
  const int step_c = p.inside ? 1 : p.chunk, step_i = p.inside ? p.slab : 1;
  const auto keep = [&](const typename A::Raw& x, int c, int i) { kept[c * step_c + (i - at.begin) * step_i] = x; };
  moments<A, Residual>(p, at, group_rstd + groups, keep, means, squares);
  cluster_arrive(), cluster_wait();

  const int first_channel = at.first * p.lanes;
  const float elements = static_cast<float>(p.pixels) * per_group;
  for (int g = warp; g < groups; g += warps) {  // every block for itself, from the memory of all
    float sum = 0, spread = 0;
    const float guess = of_block(means, 0)[g * per_group];
    for (int k = lane; k < p.chunks * per_group; k += 32)
      sum += pixels_of(p, k / per_group) * (of_block(means, k / per_group)[g * per_group + k % per_group] - guess);
    const float center = guess + warp_sum(sum) / elements;
    for (int k = lane; k < p.chunks * per_group; k += 32) {
      const int rank = k / per_group, channel = g * per_group + k % per_group;
      const float apart = of_block(means, rank)[channel] - center;
      spread += of_block(squares, rank)[channel] + pixels_of(p, rank) * (apart * apart);
    }
    const float rstd = 1.0f / sqrtf(warp_sum(spread) / elements + p.eps);
    if (lane == 0) {
      group_mean[g] = center, group_rstd[g] = rstd;
      const int64_t item = at.sample * p.groups + first_channel / per_group + g;
      if (at.chunk == 0) p.mean[item] = center, p.rstd[item] = rstd;
    }
  }
  cluster_arrive();  // this block has read what it needs of the others
  __syncthreads();
  for (int c = at.channel_thread; at.works && c < at.slots; c += p.channel_threads) {
    const Affine<A> k(p, at, at.first + c, first_channel, group_mean, group_rstd);
    for (int i = at.begin + at.pixel_thread; i < at.end; i += p.pixel_threads)
      normalize<A>(p, k, kept[c * step_c + (i - at.begin) * step_i], offset<A>(p, at, at.first + c, i));
  }
  cluster_wait();  // a block's memory lives until all have read it
}

// ---------------------------------------------------------------------------------------------------------- two passes

template <class A, bool Residual>
__global__ void __launch_bounds__(kTileThreads, 2) moments_kernel(GroupNorm p) {
  const Place at = place(p);
  float* means = p.partial + (at.sample * p.chunks + at.chunk) * 2 * p.channels + at.first * p.lanes;
  const auto keep = [](const typename A::Raw&, int, int) {};
  moments<A, Residual>(p, at, reinterpret_cast<float*>(shared_memory()), keep, means, means + p.channels);
}

// One block per sample and group: the moments of its tiles together.
__global__ void __launch_bounds__(kFinishThreads) finish_moments_kernel(GroupNorm p) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int per_group = p.channels / p.groups, group = blockIdx.x % p.groups;
  const float* means = p.partial + static_cast<int64_t>(blockIdx.x / p.groups) * p.chunks * 2 * p.channels + group * per_group;
  const float elements = static_cast<float>(p.pixels) * per_group;
  float sum = 0, spread = 0;
  const float guess = means[0];
  for (int k = threadIdx.x; k < p.chunks * per_group; k += kFinishThreads) {
    const int64_t at = static_cast<int64_t>(k / per_group) * 2 * p.channels + k % per_group;
    sum += pixels_of(p, k / per_group) * (means[at] - guess);
  }
  const float center = guess + block_sum(sum, scratch) / elements;
  for (int k = threadIdx.x; k < p.chunks * per_group; k += kFinishThreads) {
    const float* one = means + static_cast<int64_t>(k / per_group) * 2 * p.channels + k % per_group;
    const float apart = *one - center;
    spread += one[p.channels] + pixels_of(p, k / per_group) * (apart * apart);
  }
  spread = block_sum(spread, scratch);
  if (threadIdx.x == 0) p.mean[blockIdx.x] = center, p.rstd[blockIdx.x] = 1.0f / sqrtf(spread / elements + p.eps);
}

template <class A>
__global__ void __launch_bounds__(kTileThreads, 2) apply_kernel(GroupNorm p) {
  const Place at = place(p);
  const float *mean = p.mean + at.sample * p.groups, *rstd = p.rstd + at.sample * p.groups;
  for (int c = at.channel_thread; at.works && c < at.slots; c += p.channel_threads) {
    const Affine<A> k(p, at, at.first + c, 0, mean, rstd);
    over_pixels<A, false>(p, at, at.first + c, nullptr, [&](const typename A::Raw& x, const typename A::Raw&, int i) {
      normalize<A>(p, k, x, offset<A>(p, at, at.first + c, i));
    });
  }
}

// --------------------------------------------------------------------------------------------------------------- plan

int power_of_two(int64_t at_least, int most) {
  int power = 1;
  while (power < at_least && power < most) power *= 2;
  return power;
}

// Threads of a block over its slab and chunk: those of one warp along the innermost dimension.
void cut_threads(GroupNorm& p, int threads) {
  p.channel_threads = p.inside ? std::min(p.slab, threads) : 1;
  p.pixel_threads = p.inside ? std::min(p.chunk, threads / p.channel_threads) : power_of_two(p.chunk, threads);
  if (!p.inside) p.channel_threads = std::min(p.slab, threads / p.pixel_threads);
}

bool plan_one_pass(GroupNormPlan& plan, const Device& device) {
  GroupNorm& p = plan.p;
  const int per_group = p.channels / p.groups, raw = plan.wide ? 16 : 4;
  int whole = per_group;  // the fewest channels that are whole groups and whole slots
  while (whole % p.lanes) whole += per_group;
  const int base = whole / p.lanes, parts = p.channel_slots / base;
  for (int factor = std::max(1, p.inside ? 8 / base : 1); factor; --factor) {  // runs of 128 bytes, where groups are thin
    if (parts % factor) continue;
    p.slab = base * factor, p.slabs = parts / factor;
    for (p.chunks = 1; p.chunks <= (device.major >= 9 ? 8 : 1); p.chunks *= 2) {
      p.chunk = static_cast<int>(up(p.pixel_slots, p.chunks));
      const int64_t slots = static_cast<int64_t>(p.slab) * p.chunk;
      plan.threads = power_of_two(up(slots, kBatch), kMostThreads);
      plan.threads = std::max(plan.threads, 32);
      cut_threads(p, plan.threads);
      const int64_t groups = p.slab * p.lanes / per_group;
      plan.shared = slots * raw + 4 * (2 * p.slab * p.lanes + 2 * groups + table_floats(p));
      const bool starved = p.batch * p.slabs * p.chunks * 2 <= device.multiprocessors && slots > kMostThreads * kBatch;
      const bool last = p.chunks == (device.major >= 9 ? 8 : 1);
      if (plan.shared <= device.shared && (!starved || last)) return true;
    }
  }
  return false;
}

}  // namespace

GroupNormPlan plan_group_norm(GroupNorm p, const Device& device, bool forward) {
  const int n = per_vector(p.type);
  bool wide = (p.inside ? p.channels : p.pixels) % n == 0;
  for (const void* t : {p.x, p.residual, static_cast<const void*>(p.h), p.dy, p.dh, static_cast<const void*>(p.out)})
    wide = wide && aligned(t);
  p.lanes = wide && p.inside ? n : 1;
  p.per_slot = wide && !p.inside ? n : 1;
  p.channel_slots = p.channels / p.lanes;
  p.pixel_slots = p.pixels / p.per_slot;
  GroupNormPlan plan{p, wide, true, kTileThreads, 0};
  if (forward && plan_one_pass(plan, device)) return plan;
  plan = {p, wide, false, kTileThreads, 0};
  GroupNorm& cut = plan.p;
  cut.chunk = p.pixel_slots;
  cut.slab = p.inside ? std::min(p.channel_slots, 32) : p.channel_slots;
  cut_threads(cut, kTileThreads);
  cut.slab = cut.channel_threads;
  cut.slabs = static_cast<int>(up(p.channel_slots, cut.slab));
  cut.chunk = std::min(p.pixel_slots, 2 * kBatch * cut.pixel_threads);
  cut.chunks = static_cast<int>(up(p.pixel_slots, cut.chunk));
  plan.shared = 4 * table_floats(cut);
  return plan;
}

void group_norm_silu(const GroupNormPlan& plan, void* stream) {
  const GroupNorm& p = plan.p;
  Launch tiles{p.batch * p.slabs * p.chunks, plan.threads, stream, plan.shared};
  with_access(plan.wide, p.type, [&](auto access) {
    using A = decltype(access);
    if (plan.one_pass) {
      tiles.cluster = p.chunks;
      return launch(tiles, p.residual ? one_pass_kernel<A, true> : one_pass_kernel<A, false>, p);
    }
    launch(tiles, p.residual ? moments_kernel<A, true> : moments_kernel<A, false>, p);
    launch({p.batch * p.groups, kFinishThreads, stream, kFinishThreads / 32 * 4}, finish_moments_kernel, p);
    GroupNorm normalized = p;
    if (p.residual) normalized.x = p.h;
    launch(tiles, apply_kernel<A>, normalized);
  });
}

}  // namespace hypersd
