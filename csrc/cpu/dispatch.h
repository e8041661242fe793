// Which kernels were built, and which of them this CPU can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace reattn {

struct InstructionSet {
  std::string name;
  const Kernels* float32;   // for tensors of any dtype
  const Kernels* bfloat16;  // products in bfloat16; null where the instruction set has none
  bool runs_here;
  bool pays = true;  // taken unless another is named
};

// Every one that was built, from the plainest to the best.
const std::vector<InstructionSet>& instruction_sets();

}  // namespace reattn
