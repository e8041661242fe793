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
#include <stdexcept>
#include <string>

namespace reattn {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + " (" + cudaGetErrorString(status) +
                           ")");
}

// The device that a call works on; the one before is current again afterwards.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    device_ = device;
  }
  ~OnDevice() {
    if (device_ != before_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0, device_ = 0;
};

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

template <class Params>
void launch(void (*kernel)(Params), const char* name, int64_t blocks_x, int blocks_y, int threads, int shared_bytes,
            uint64_t stream, const Params& params) {
  const auto function = reinterpret_cast<const void*>(kernel);
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  // Always the same limit: another thread may launch this kernel with more at the same time.
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, describe(device).shared_bytes),
        name);
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

}  // namespace reattn
#endif

namespace reattn {

template <class Kernel>
void start(Kernel kernel, const char* name, const Params& p, const Launch& how) {
  launch(kernel, name, how.blocks, how.chunks, p.plan.warps * 32, p.plan.bytes, how.stream, p);
}

}  // namespace reattn
#endif
