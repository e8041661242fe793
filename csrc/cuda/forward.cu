// The output and the LSE; with batch statistics, what the mixed maps make of the values, and sums over the mixed maps.
#include "kernels.h"
#include "launch.h"
#include "mixing.cuh"

namespace reattn {

// A block of query rows, all heads. With the keys' maps resident, one sweep over keys and one over values; else the LSE
// comes first, and the maps again tile by tile.
template <class T, int kPadded, int kTiles, bool kSum>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(const __grid_constant__ Params p) {
  constexpr int kColumns = out_dims(kPadded) / 8, kHeads = heads_of_a_warp(kPadded);
  const Place place(p, out_dims(kPadded));
  const int dims = smaller(p.head_dim - place.first_dim, 8 * kColumns);

  Mixing<T, kPadded>::prepare(p);
  for (int head = place.warp; head < p.heads; head += p.plan.warps) {
    Softmax<T, kTiles> softmax;
    softmax.sweep(p, place, head);
    if (p.plan.resident) softmax.finish(p, place, head);
  }
  float out[kHeads][kTiles][kColumns][4] = {};
  for (int first = 0; first < p.key.rows; first += p.plan.tile) {
    if (!p.plan.resident)
      for (int head = place.warp; head < p.heads; head += p.plan.warps)
        fill_maps<T, kTiles, false, false>(p, place, head, first);
    sync_block();
    Mixing<T, kPadded> mixing(p, place);
    mixing.template forward<kSum>(first == 0);
    sync_block();
    for_each_head<kHeads>(p, place, [&](int i, int head) {
      Stream<T> values(p, p.value, place, head, first, p.plan.tile, place.first_dim,
                       place.first_dim + round_up(dims, 16));
      multiply_maps(out[i], head_tile<T>(p, p.plan.maps, head), p.plan.tile, values, dims);
    });
  }
  for_each_head<kHeads>(p, place, [&](int i, int head) { store_rows<T>(p, p.out, place, head, out[i], 1.0f); });
  if constexpr (kSum) Mixing<T, kPadded>(p, place).store_moments();
}

#ifndef __CUDACC_RTC__
template <class T>
void forward(const Params& p, const Launch& how) {
  choose_forward<T>(
      p, [&](auto padded, auto tiles, auto sum) { start(forward_kernel<T, padded, tiles, sum>, "forward", p, how); });
}

template void forward<REATTN_ELEMENT>(const Params& p, const Launch& how);
#endif

}  // namespace reattn
