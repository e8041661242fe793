// Starting a kernel, and what the host has to know of a device. Nothing where NVRTC compiles the kernels alone.
#pragma once

#ifndef __CUDACC_RTC__
#include "dispatch.h"
#include "kernels.h"

#ifdef REATTN_EMULATED
#include "cuda_host.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace reattn {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + " (" + cudaGetErrorString(status) +
                           ")");
}

struct Device {
  int shared_bytes;  // that a block may have
  int multiprocessors;
};

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

inline Device describe(int device) {
  return {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMultiProcessorCount, device)};
}

// Lets a kernel have all the shared memory of the current device, the first time that it is launched there. Always the
// same limit: another thread may launch this kernel with more at the same time.
inline void allow_shared_memory(const void* function, const char* name) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*> > allowed;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({device, function})) return;
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, describe(device).shared_bytes),
        name);
  allowed.emplace(device, function);
}

template <class Params>
void launch(void (*kernel)(Params), const char* name, int64_t blocks_x, int blocks_y, int threads, int shared_bytes,
            uint64_t stream, const Params& params) {
  const auto function = reinterpret_cast<const void*>(kernel);
  allow_shared_memory(function, name);
  Params copy = params;
  void* arguments[] = {&copy};
  check(cudaLaunchKernel(function, dim3(unsigned(blocks_x), blocks_y), dim3(threads), arguments, shared_bytes,
                         reinterpret_cast<cudaStream_t>(stream)),
        name);
}

// Memory that the next kernel may read or write; the emulator checks every access.
inline void declare(const void*, int64_t) {}

// Throws where the current device has no code of this kernel to run.
inline void check_kernel(void (*kernel)(Params)) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "cudaFuncGetAttributes");
}

inline int count_devices() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "no CUDA device");
  return count;
}

// Of the driver, 0 if there is none, and of the runtime in this library: 13000 for CUDA 13.0.
inline std::pair<int, int> cuda_versions() {
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  return {driver, runtime};
}

}  // namespace reattn
#endif

namespace reattn {

template <class Kernel>
void start(Kernel kernel, const char* name, const Params& p, const Launch& how) {
  launch(kernel, name, how.blocks, how.chunks, p.plan.warps * 32, p.plan.bytes, how.stream, p);
}

}  // namespace reattn
#endif
