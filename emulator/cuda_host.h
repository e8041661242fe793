// What csrc/cuda/launch.h does, where no GPU is: a launch calls the Python function that set_launcher was given.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "params.h"

namespace reattn {

// Those of an H100's block, and few enough multiprocessors for a small problem to occupy.
struct Device {
  int shared_bytes, multiprocessors;
};
inline Device describe(int) { return {232448, 4}; }
inline int count_devices() { return 1; }

// launcher(source, name, grid, threads, shared_bytes, params, memory): the kernel that NVRTC calls `name` of
// csrc/cuda/<source>.cu, (blocks in x, in y), the bytes of its Params, and [(address, bytes)] that it may touch. What
// it raises comes out of the call that launched.
void set_launcher(pybind11::function launcher);

// The kernel launched next may touch these bytes.
void declare(const void* begin, int64_t bytes);

struct Instantiation {
  const char* source;
  std::string name;
};

void launch(const Instantiation& kernel, const char* name, int64_t blocks_x, int blocks_y, int threads,
            int shared_bytes, uint64_t stream, const Params& params);

}  // namespace reattn
