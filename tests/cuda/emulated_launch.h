// What csrc/cuda/launch.h does, for the kernels compiled for the host: a launch runs at once, and throws what a kernel
// did wrong.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "emulated.h"

namespace reattn {

// The kernel launched next may touch these bytes.
inline void declare(const void* begin, int64_t bytes) { emulated::Machine::own().declare(begin, bytes); }

template <class Params>
void launch(void (*kernel)(Params), const char* name, int64_t blocks_x, int blocks_y, int threads, int shared_bytes,
            uint64_t /*stream*/, const Params& params) {
  struct Own {
    emulated::Machine& machine = emulated::Machine::own();
    ~Own() { machine.forget_declared(); }
  } own;
  if (threads < 1 || threads > emulated::kMostThreads || threads % kWarp || shared_bytes < 0 ||
      shared_bytes > emulated::kMostShared || blocks_x < 1 || blocks_x > INT32_MAX || blocks_y < 1 || blocks_y > 65535)
    throw std::runtime_error(std::string(name) + ": cudaErrorInvalidValue (emulated)");
  struct Call {
    void (*kernel)(Params);
    const Params& params;
  } const call{kernel, params};
  own.machine.run(
      name, blocks_x, blocks_y, threads, shared_bytes,
      [](const void* call) { static_cast<const Call*>(call)->kernel(static_cast<const Call*>(call)->params); }, &call);
}

}  // namespace reattn
