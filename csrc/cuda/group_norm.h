// What the kernels of group_norm_silu share: how blocks and threads walk over a sample, whatever the memory order.
//
// A sample is channel slots by pixel slots. A block has a slab of the channel slots and a chunk of the pixel slots; each of
// its threads goes through channel slots one by one, and through every pixel_threads-th pixel slot of each.
#pragma once

#include "device.h"

namespace hypersd {
namespace {

constexpr int kMostThreads = 512;  // of a block of the one-pass kernel
constexpr int kTileThreads = 256;
constexpr int kFinishThreads = 128;
constexpr int kBatch = 4;  // loads of a thread in flight

struct Place {
  int64_t sample;
  int chunk;
  int first, slots;  // channel slots of the block
  int begin, end;    // pixel slots of the block
  int channel_thread, pixel_thread;
  bool works;        // the last threads of a block may have nothing to do
};

__device__ inline int first_of_chunk(const GroupNorm& p, int chunk) { return min(chunk * p.chunk, p.pixel_slots); }
// Pixels of a chunk.
__device__ inline float pixels_of(const GroupNorm& p, int chunk) {
  return static_cast<float>((first_of_chunk(p, chunk + 1) - first_of_chunk(p, chunk)) * p.per_slot);
}

__device__ inline Place place(const GroupNorm& p) {
  Place at;
  const int block = static_cast<int>(blockIdx.x), part = block / p.chunks, thread = static_cast<int>(threadIdx.x);
  at.chunk = block % p.chunks;
  at.sample = part / p.slabs;
  at.first = part % p.slabs * p.slab;
  at.slots = min(p.slab, p.channel_slots - at.first);
  at.begin = first_of_chunk(p, at.chunk);
  at.end = first_of_chunk(p, at.chunk + 1);
  at.channel_thread = p.inside ? thread % p.channel_threads : thread / p.pixel_threads;
  at.pixel_thread = p.inside ? thread / p.channel_threads : thread % p.pixel_threads;
  at.works = at.channel_thread < p.channel_threads && at.pixel_thread < p.pixel_threads;
  return at;
}

// Where slot (c, i) of the block's sample begins.
template <class A>
__device__ inline int64_t offset(const GroupNorm& p, const Place& at, int c, int i) {
  const int64_t base = at.sample * p.channels * p.pixels;
  return base + (p.inside ? static_cast<int64_t>(i) * p.channels + c * A::N : static_cast<int64_t>(c) * p.pixels + i * A::N);
}

// visit(x, other, i) for the thread's pixel slots of channel slot c; `other` is loaded with Both alone.
template <class A, bool Both, class F>
__device__ inline void over_pixels(const GroupNorm& p, const Place& at, int c, const void* other, const F& visit) {
  constexpr int kLoads = Both ? kBatch / 2 : kBatch;
  const int step = p.pixel_threads;
  for (int i = at.begin + at.pixel_thread; i < at.end; i += kLoads * step) {
    typename A::Raw x[kLoads], beside[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if (i + j * step >= at.end) continue;
      const int64_t from = offset<A>(p, at, c, i + j * step);
      x[j] = A::fetch(p.x, p.type, from);
      if (Both) beside[j] = A::fetch(other, p.type, from);
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
      if (i + j * step < at.end) visit(x[j], beside[j], i + j * step);
  }
}

// What is added to x in a channel of the block's sample.
__device__ inline float shift_of(const GroupNorm& p, const Place& at, int channel) {
  return p.shift ? read(p.shift, p.shift_type, at.sample * p.channels + channel) : 0.0f;
}

// What z = (x + shift - mean) rstd weight + bias needs, for the lanes of channel slot c.
template <class A>
struct Affine {
  float mean[A::N], rstd[A::N], weight[A::N], bias[A::N], shift[A::N];

  // `mean` and `rstd` by group, from that of channel `origin` on.
  __device__ Affine(const GroupNorm& p, const Place& at, int c, int origin, const float* mean_of, const float* rstd_of) {
    const int per_group = p.channels / p.groups;
#pragma unroll
    for (int e = 0; e < A::N; ++e) {
      const int channel = p.inside ? c * A::N + e : c, group = (channel - origin) / per_group;
      mean[e] = mean_of[group];
      rstd[e] = rstd_of[group];
      weight[e] = p.weight ? read(p.weight, p.weight_type, channel) : 1.0f;
      bias[e] = p.bias ? read(p.bias, p.bias_type, channel) : 0.0f;
      shift[e] = shift_of(p, at, channel);
    }
  }
  __device__ float center(float x, int e) const { return x + shift[e] - mean[e]; }
};

// Sums of two numbers a thread and lane over the pixel threads of a block, in a fixed order: `rows` holds them by pixel
// thread and channel of the slots at hand.
struct Table {
  float *first, *second;
  int stride;

  __device__ Table(const GroupNorm& p, float* memory)
      : first(memory), stride(p.channel_threads * p.lanes + 1) {
    second = first + stride * p.pixel_threads;
  }
  template <int N>
  __device__ void put(const GroupNorm& p, const Place& at, const float (&one)[N], const float (&two)[N]) {
    const int from = at.pixel_thread * stride + at.channel_thread * p.lanes;
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (e < p.lanes) first[from + e] = one[e], second[from + e] = two[e];
  }
};
inline int64_t table_floats(const GroupNorm& p) {
  return 2 * static_cast<int64_t>(p.channel_threads * p.lanes + 1) * p.pixel_threads;
}

}  // namespace
}  // namespace hypersd
