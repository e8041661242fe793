// The sums over all maps from which batch statistics are known, and the LSE.
#include "kernels.h"
#include "launch.h"
#include "mixing.cuh"

namespace reattn {

// A block of query rows: sums of P - centre by head, and of its products over pairs of heads.
template <class T, int kPadded, int kTiles>
__global__ void __launch_bounds__(kMaxThreads) statistics_kernel(const __grid_constant__ Params p) {
  const Place place(p, out_dims(kPadded));
  const Mixing<T, kPadded> mixing(p, place);
  typename Mixing<T, kPadded>::Sums sums;
  float by_head[heads_of_a_warp(kPadded)] = {};
  const auto add = [&](int head, float sum) {
  // An index known only when it runs would keep them in memory.
#pragma unroll
    for (int i = 0; i < heads_of_a_warp(kPadded); i++)
      if (head == place.warp + i * p.plan.warps) by_head[i] += sum;
  };

  Mixing<T, kPadded>::prepare(p);
  for (int head = place.warp; head < p.heads; head += p.plan.warps) {
    Softmax<T, kTiles> softmax;
    softmax.sweep(p, place, head);
    if (p.plan.resident) add(head, softmax.finish(p, place, head));
  }
  for (int first = 0; first < p.key.rows; first += p.plan.tile) {
    if (!p.plan.resident)
      for (int head = place.warp; head < p.heads; head += p.plan.warps)
        add(head, fill_maps<T, kTiles, false, true>(p, place, head, first));
    sync_block();
    mixing.add_map_products(sums);
    sync_block();
  }
  mixing.store_sums(sums);
  sync_block();  // that wrote zeros where the sums by head go
  for_each_head<heads_of_a_warp(kPadded)>(p, place, [&](int i, int head) {
    const float sum = warp_sum(by_head[i]);
    if (lane() == 0) write(p.vectors + (int64_t(block_x()) * 3 * kPadded + head), sum);
  });
}

template <class T>
void statistics(const Params& p, const Launch& how) {
  if constexpr (sizeof(T) == 2)
    if (p.plan.own == 32) return start(statistics_kernel<T, 16, 2>, "statistics", p, how);
  if (padded_heads(p.heads) == 16) return start(statistics_kernel<T, 16, 1>, "statistics", p, how);
  start(statistics_kernel<T, 32, 1>, "statistics", p, how);
}

template void statistics<REATTN_ELEMENT>(const Params& p, const Launch& how);

}  // namespace reattn
