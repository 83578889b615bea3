// What the CUDA kernels share: numbers in memory, 128 bits or one element at a time; sums in a fixed order; launches.
//
// A kernel takes one struct and an access policy: Wide<T> where every tensor has the type T and lies so that 128 bits can
// be moved at a time, else Single, which reads any mix of types. Sums go by threads, then by warps, never by atomics.
#pragma once

#include "kernels.h"

namespace hypersd {

#ifndef HYPERSD_EMULATED
// Single instructions instead of cuda_fp16.h, cuda_bf16.h and cooperative_groups.h, which take seconds to parse.
__device__ inline float widen(Half v) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(static_cast<uint16_t>(v)));
  return wide;
}
__device__ inline float widen(BFloat v) { return __uint_as_float(static_cast<uint32_t>(v) << 16); }
// Two at a time, the first in the low half.
__device__ inline uint32_t narrow_two(float a, float b, Half) {
  uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(b), "f"(a));
  return two;
}
__device__ inline uint32_t narrow_two(float a, float b, BFloat) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(b), "f"(a));
  return two;
}

__device__ inline char* shared_memory() {
  extern __shared__ uint4 shared_bytes[];
  return reinterpret_cast<char*>(shared_bytes);
}

// Thread-block clusters: blocks that can read each other's shared memory. Before sm_90 every block is its own.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }
template <class T>
__device__ inline const T* of_block(const T* shared, int rank) {
  const T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
  return there;
}
#else
__device__ inline void cluster_arrive() { __syncthreads(); }
__device__ inline void cluster_wait() {}
template <class T>
__device__ inline const T* of_block(const T* shared, int) { return shared; }
#endif
#endif

template <class T>
__device__ inline T narrow(float v, T type) { return static_cast<T>(narrow_two(v, 0.0f, type) & 0xffff); }

// ------------------------------------------------------------------------------------------------- numbers in memory

__device__ inline float read(const void* p, Type type, int64_t i) {
  switch (type) {
    case Type::float64: return static_cast<float>(static_cast<const double*>(p)[i]);
    case Type::float32: return static_cast<const float*>(p)[i];
    case Type::float16: return widen(static_cast<const Half*>(p)[i]);
    default: return widen(static_cast<const BFloat*>(p)[i]);
  }
}
__device__ inline void write(void* p, Type type, int64_t i, float v) {
  switch (type) {
    case Type::float64: static_cast<double*>(p)[i] = v; break;
    case Type::float32: static_cast<float*>(p)[i] = v; break;
    case Type::float16: static_cast<Half*>(p)[i] = narrow(v, Half{}); break;
    default: static_cast<BFloat*>(p)[i] = narrow(v, BFloat{});
  }
}

__device__ inline float rounded(float v, Type type) {
  switch (type) {
    case Type::float16: return widen(narrow(v, Half{}));
    case Type::bfloat16: return widen(narrow(v, BFloat{}));
    default: return v;
  }
}

struct Single {
  using Raw = float;
  static constexpr int N = 1;
  __device__ static Raw fetch(const void* p, Type type, int64_t i) { return read(p, type, i); }
  __device__ static void unpack(const Raw& raw, float (&v)[N]) { v[0] = raw; }
  __device__ static void store(void* p, Type type, int64_t i, const float (&v)[N]) { write(p, type, i, v[0]); }
  // Stores v and makes it what a fetch would then give.
  __device__ static Raw store_rounded(void* p, Type type, int64_t i, const float (&v)[N]) {
    write(p, type, i, v[0]);
    return rounded(v[0], type);
  }
};

template <class T>
struct Wide {
  using Raw = uint4;
  static constexpr int N = 16 / sizeof(T);
  __device__ static Raw fetch(const void* p, Type, int64_t i) {
    return __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(p) + i));
  }
  __device__ static void unpack(const Raw& raw, float (&v)[N]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[2 * j] = widen(static_cast<T>(words[j] & 0xffff));
      v[2 * j + 1] = widen(static_cast<T>(words[j] >> 16));
    }
  }
  __device__ static void store(void* p, Type, int64_t i, const float (&v)[N]) {
    store_rounded(p, Type::other, i, v);
  }
  __device__ static Raw store_rounded(void* p, Type, int64_t i, const float (&v)[N]) {
    const Raw raw{narrow_two(v[0], v[1], T{}), narrow_two(v[2], v[3], T{}), narrow_two(v[4], v[5], T{}),
                  narrow_two(v[6], v[7], T{})};
    __stwb(reinterpret_cast<uint4*>(static_cast<T*>(p) + i), raw);  // an assignment may become four stores of 32 bits
    return raw;
  }
};

template <>
struct Wide<float> {
  using Raw = float4;
  static constexpr int N = 4;
  __device__ static Raw fetch(const void* p, Type, int64_t i) {
    return __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(p) + i));
  }
  __device__ static void unpack(const Raw& raw, float (&v)[N]) {
    v[0] = raw.x, v[1] = raw.y, v[2] = raw.z, v[3] = raw.w;
  }
  __device__ static void store(void* p, Type, int64_t i, const float (&v)[N]) {
    store_rounded(p, Type::other, i, v);
  }
  __device__ static Raw store_rounded(void* p, Type, int64_t i, const float (&v)[N]) {
    const Raw raw{v[0], v[1], v[2], v[3]};
    __stwb(reinterpret_cast<float4*>(static_cast<float*>(p) + i), raw);
    return raw;
  }
};

// Calls run with the policy for tensors of `type`.
template <class F>
void with_access(bool wide, Type type, const F& run) {
  if (wide && type == Type::float32) return run(Wide<float>{});
  if (wide && type == Type::float16) return run(Wide<Half>{});
  if (wide && type == Type::bfloat16) return run(Wide<BFloat>{});
  run(Single{});
}
inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline int per_vector(Type type) { return type == Type::float32 ? 4 : 8; }

// ------------------------------------------------------------------------------------------------------------- sums

// Over the warp; every lane gets it.
__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int apart = 16; apart; apart /= 2) v += __shfl_xor_sync(0xffffffffu, v, apart);
  return v;
}

// Over the block; every thread gets it. `scratch` holds a float per warp.
__device__ inline float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) total += scratch[warp];
  return total;
}

// --------------------------------------------------------------------------------------------------------- launches

#ifndef HYPERSD_EMULATED
struct Launch {
  int64_t blocks;
  int threads;  // a multiple of 32
  void* stream;
  int64_t shared = 0;  // bytes
  int cluster = 1;     // consecutive blocks that share their memory
};

template <class Problem>
void launch(const Launch& l, void (*kernel)(Problem), const Problem& problem) {
  if (l.blocks == 0) return;
  if (l.blocks > INT32_MAX) throw std::runtime_error("more blocks than a grid holds");
  if (l.shared > 48 * 1024)
    ensure(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(l.shared)),
           "shared memory of a kernel");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(l.blocks));
  config.blockDim = dim3(l.threads);
  config.dynamicSmemBytes = l.shared;
  config.stream = static_cast<cudaStream_t>(l.stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = l.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = l.cluster > 1;
  ensure(cudaLaunchKernelEx(&config, kernel, problem), "launch of a kernel");
}
#endif

}  // namespace hypersd
