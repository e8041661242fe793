// Executes a kernel block by block, each block's warps in turn from barrier to barrier.
//
// A fault ends the launch: a Fault that names kernel, block, warp, lane, and the PTX line.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "program.h"

namespace emulator {

struct Memory {
  uint64_t address, bytes;
};

struct Launch {
  std::array<int, 3> grid{1, 1, 1};
  int threads = 32;
  int shared_bytes = 0;  // beside what the kernel declares itself
  std::vector<uint8_t> arguments;
  std::vector<Memory> memory;   // that the kernel may read and write
  std::vector<int64_t> blocks;  // linear numbers; none for all
  bool check_races = true;
  bool count_wavefronts = false;
};

// Of a static instruction: how often a warp executed it, and what its accesses to shared memory took.
struct Count {
  uint64_t executed = 0;
  uint64_t accesses = 0, wavefronts = 0, without_conflicts = 0;
  uint64_t device_bytes = 0;  // that its lanes loaded, stored or copied
};

struct Report {
  std::vector<Count> counts;  // by instruction of the program
};

Report run(const Program& program, const Launch& launch);

}  // namespace emulator
