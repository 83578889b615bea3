// What the launches of the CUDA kernels say about tensors and the device.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef HYPERSD_EMULATED
#include "cuda_emulated.h"  // tests/kernels: the threads of a cluster as coroutines on the CPU
#else
#include <cuda_runtime_api.h>
#endif

namespace hypersd {

enum class Type : int { float64, float32, float16, bfloat16, other };
enum class Half : uint16_t {};
enum class BFloat : uint16_t {};

__host__ __device__ inline int64_t up(int64_t count, int64_t by) { return (count + by - 1) / by; }

#ifndef HYPERSD_EMULATED
inline void ensure(cudaError_t code, const char* what) {
  if (code != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

// What decides how work is cut up.
struct Device {
  int major, multiprocessors, shared;  // compute capability; bytes of shared memory that a block can have

  static Device current() {
    int device;
    Device found{};
    ensure(cudaGetDevice(&device), "current device");
    ensure(cudaDeviceGetAttribute(&found.major, cudaDevAttrComputeCapabilityMajor, device), "device");
    ensure(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device), "device");
    ensure(cudaDeviceGetAttribute(&found.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device");
    return found;
  }
};
#endif

}  // namespace hypersd
