// How a problem is cut into blocks and tiles that fit a card.
#pragma once

#include "params.h"

namespace reattn {

enum class Kernel { kForward, kBackwardQuery, kBackwardKey };

struct Size {
  int element_bytes, heads, depth;
  int batch, seqlen, seqlen_k;
  bool dropout;
  bool statistics;  // forward: of the batch
};

// The plan that reads least through the L2 cache among those that fit into shared_bytes; bytes is 0 if none does.
Plan make_plan(Kernel kernel, const Size& size, int shared_bytes, int multiprocessors);

}  // namespace reattn
