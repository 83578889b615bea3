// Runs csrc/cuda on a CPU, for tests: the threads of a cluster are coroutines that take turns at every barrier and warp
// shuffle. Blocks run one after the other, clusters of blocks together. Shared memory is exactly as large as was asked for,
// begins as NaN and has a guard behind it; a barrier that not every thread reaches is an error.
// HYPERSD_EMULATED_DEVICE="9,132,232448" gives the compute capability, multiprocessors and shared memory of the device.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "../../csrc/cpu/half.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
void __stwb(T* p, T value) {
  *p = value;
}
inline float __expf(float v) { return std::exp(v); }
inline float __fdividef(float a, float b) { return a / b; }
using std::isfinite;
using std::max;
using std::min;

namespace emulated {

struct Barrier {
  int members = 0, arrived = 0;
  int64_t generation = 0;
};

struct Block {
  std::unique_ptr<char[]> memory;
  int64_t shared;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<float> lanes[2];  // what shuffles exchange, by turns
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  int block = 0, index = 0;
  int64_t shuffles = 0, arrived_at = 0;
  bool done = false;
  static constexpr int kStack = 64 * 1024;
};

struct Index {
  unsigned x = 0;
};

struct State {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Block> blocks;  // of the cluster
  Barrier cluster;
  ucontext_t scheduler;
  Thread* now = nullptr;
  std::function<void()> body;
  int64_t progress = 0;
  Index thread_index, block_index, block_size;
};
inline State& state() {
  static State one;
  return one;
}

[[noreturn]] inline void fail(const char* what) {  // no exception passes a coroutine's stack
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

inline void yield() {
  State& s = state();
  swapcontext(&s.now->context, &s.scheduler);
}

inline int64_t arrive(Barrier& barrier) {
  const int64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++state().progress;
  }
  return generation;
}
inline void wait(const Barrier& barrier, int64_t generation) {
  while (barrier.generation == generation) yield();
}

inline Block& block() { return state().blocks[state().now->block]; }

inline void begin() {
  State& s = state();
  s.body();
  s.now->done = true;
  ++s.progress;
  Block& b = s.blocks[s.now->block];
  for (Barrier* one : {&b.barrier, &b.warps[s.now->index / 32], &s.cluster}) {  // who left is not waited for
    --one->members;
    if (one->members && one->arrived == one->members) one->arrived = 0, ++one->generation;
  }
  swapcontext(&s.now->context, &s.scheduler);
}

inline void run_cluster(int64_t first, int cluster, int threads, int64_t shared) {
  State& s = state();
  s.blocks.clear();
  s.blocks.resize(cluster);
  s.cluster = {cluster * threads};
  for (Block& b : s.blocks) {
    b.shared = shared;
    b.memory.reset(new char[shared + 64]);
    std::memset(b.memory.get(), 0xff, shared);  // NaN
    std::memset(b.memory.get() + shared, 0x5a, 64);
    b.barrier = {threads};
    b.warps.assign(threads / 32, Barrier{32});
    for (auto& turn : b.lanes) turn.assign(threads, 0.0f);
  }
  while (static_cast<int>(s.threads.size()) < cluster * threads) s.threads.emplace_back(new Thread);
  for (int t = 0; t < cluster * threads; ++t) {
    Thread& thread = *s.threads[t];
    thread.block = t / threads, thread.index = t % threads, thread.shuffles = 0, thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = Thread::kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, begin, 0);
  }
  for (int left = 1; left;) {
    left = 0;
    const int64_t before = s.progress;
    for (int t = 0; t < cluster * threads; ++t) {
      Thread& thread = *s.threads[t];
      if (thread.done) continue;
      s.now = &thread;
      s.thread_index.x = thread.index;
      s.block_index.x = static_cast<unsigned>(first + thread.block);
      swapcontext(&s.scheduler, &thread.context);
      left += !thread.done;
    }
    if (left && s.progress == before) fail("a barrier that not every thread reaches");
  }
  for (const Block& b : s.blocks)
    for (int i = 0; i < 64; ++i)
      if (b.memory[b.shared + i] != 0x5a) fail("a write behind shared memory");
}

}  // namespace emulated

#define threadIdx (emulated::state().thread_index)
#define blockIdx (emulated::state().block_index)
#define blockDim (emulated::state().block_size)

inline void __syncthreads() {
  emulated::Barrier& barrier = emulated::block().barrier;
  emulated::wait(barrier, emulated::arrive(barrier));
}

inline float __shfl_xor_sync(unsigned, float value, int apart) {
  emulated::Block& block = emulated::block();
  emulated::Thread& thread = *emulated::state().now;
  std::vector<float>& lanes = block.lanes[thread.shuffles++ % 2];
  lanes[thread.index] = value;
  emulated::Barrier& warp = block.warps[thread.index / 32];
  emulated::wait(warp, emulated::arrive(warp));
  return lanes[thread.index ^ apart];
}

namespace hypersd {

enum class Half : uint16_t;
enum class BFloat : uint16_t;

inline float widen(Half v) { return from_half(static_cast<uint16_t>(v)); }
inline float widen(BFloat v) { return from_bfloat16(static_cast<uint16_t>(v)); }
inline uint32_t narrow_two(float a, float b, Half) { return to_half(a) | static_cast<uint32_t>(to_half(b)) << 16; }
inline uint32_t narrow_two(float a, float b, BFloat) {
  return to_bfloat16(a) | static_cast<uint32_t>(to_bfloat16(b)) << 16;
}

inline char* shared_memory() { return emulated::block().memory.get(); }
inline void cluster_arrive() { emulated::state().now->arrived_at = emulated::arrive(emulated::state().cluster); }
inline void cluster_wait() { emulated::wait(emulated::state().cluster, emulated::state().now->arrived_at); }
template <class T>
const T* of_block(const T* shared, int rank) {
  const char* here = reinterpret_cast<const char*>(shared);
  return reinterpret_cast<const T*>(emulated::state().blocks[rank].memory.get() + (here - shared_memory()));
}

struct Device {
  int major, multiprocessors, shared;

  static Device current() {
    Device found{9, 132, 232448};
    if (const char* asked = std::getenv("HYPERSD_EMULATED_DEVICE"))
      std::sscanf(asked, "%d,%d,%d", &found.major, &found.multiprocessors, &found.shared);
    return found;
  }
};

struct Launch {
  int64_t blocks;
  int threads;
  void* stream;
  int64_t shared = 0;
  int cluster = 1;
};

template <class Problem>
void launch(const Launch& l, void (*kernel)(Problem), const Problem& problem) {
  const Device device = Device::current();
  if (l.threads % 32 || l.threads > 1024) emulated::fail("threads of a block");
  if (l.blocks % l.cluster || l.cluster > (device.major >= 9 ? 8 : 1)) emulated::fail("blocks of a cluster");
  if (l.shared > std::max(device.shared, 48 * 1024)) emulated::fail("shared memory of a block");
  emulated::State& s = emulated::state();
  s.block_size.x = l.threads;
  s.body = [&] { kernel(problem); };
  for (int64_t first = 0; first < l.blocks; first += l.cluster)
    emulated::run_cluster(first, l.cluster, l.threads, l.shared);
}

}  // namespace hypersd
