#include "plan.h"

#include <algorithm>

namespace reattn {
namespace {

int odd_multiple_of_16(int bytes) { return round_up(bytes, 16) | 16; }

// The layout of shared memory for a choice of own, tile and stages; compact: rows follow one another without a gap.
Plan lay_out(Kernel kernel, const Size& size, int own, int tile, int stages, bool compact = false) {
  const bool query = kernel != Kernel::kBackwardKey;
  const int own_rows = query ? size.seqlen : size.seqlen_k, streamed_rows = query ? size.seqlen_k : size.seqlen;
  const int padded = padded_heads(size.heads);
  Plan plan{};
  plan.own = own;
  plan.blocks = (own_rows + own - 1) / own;
  plan.tile = tile;
  plan.resident = tile >= streamed_rows;
  plan.warps = (size.heads + heads_of_a_warp(padded) - 1) / heads_of_a_warp(padded);
  plan.row_stride = compact ? tile * size.element_bytes : odd_multiple_of_16(tile * size.element_bytes);
  plan.head_stride = own * plan.row_stride + 16;
  plan.stage_stride = std::min(round_up(size.depth, 16) * size.element_bytes, kPieceBytes) + 16;
  plan.stages = stages;

  int next = 0;
  const auto take = [&](int bytes) {
    const int offset = next;
    next = round_up(next + bytes, 128);
    return offset;
  };
  const bool backward = kernel == Kernel::kBackwardQuery || kernel == Kernel::kBackwardKey;
  const int maps = size.heads * plan.head_stride;
  plan.maps = take(maps);
  if (backward) plan.grads = take(maps);
  if (kernel == Kernel::kBackwardKey) plan.mixed = take(maps);
  if (backward && size.dropout) plan.probs = take(maps);
  plan.staged = take(plan.warps * stages * 16 * plan.stage_stride);
  plan.matrices = take(kMatrices * padded * (padded * size.element_bytes + 16) + 16);
  plan.vectors = take(kVectors * padded * 4);
  if (!backward && plan.resident) plan.maxima = take(plan.warps * own * ((tile + kChunk - 1) / kChunk) * 4);
  if (kernel == Kernel::kBackwardQuery) plan.sums = take((3 + padded) * padded * 4);
  if (!backward && size.statistics) plan.sums = take(plan.warps * 2 * padded * 4);
  plan.bytes = next;
  return plan;
}

}  // namespace

Plan make_plan(Kernel kernel, const Size& size, int shared_bytes, int multiprocessors) {
  const bool query = kernel != Kernel::kBackwardKey;
  const int streamed = round_up(std::max(query ? size.seqlen_k : size.seqlen, 1), 16);
  // Keys and values are read once for every block: taller ones read less, as long as they still occupy the card.
  const bool tall = kernel == Kernel::kForward && size.element_bytes == 2 && padded_heads(size.heads) == 16 &&
                    size.depth <= 64 && int64_t(size.batch) * ((size.seqlen + 31) / 32) >= multiprocessors;
  const auto fits = [&](const Plan& plan) { return plan.bytes <= shared_bytes; };
  // Rows that could not possibly fit would not fit into 32 bits either.
  if (query && streamed <= shared_bytes / size.element_bytes)
    for (int own : {32, 16})
      if (const Plan plan = lay_out(kernel, size, own, streamed, 2); fits(plan) && (tall || own == 16)) return plan;
  for (int tile : {64, 32, 16})
    for (int own : {32, 16})
      if (const Plan plan = lay_out(kernel, size, own, std::min(tile, streamed), 2); fits(plan) && (tall || own == 16))
        return plan;
  for (bool compact : {false, true})
    if (const Plan plan = lay_out(kernel, size, 16, 16, 1, compact); fits(plan)) return plan;
  return {};
}

}  // namespace reattn
