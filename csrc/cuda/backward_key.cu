// The gradients of key and value.
#include "kernels.h"
#include "launch.h"
#include "mixing.cuh"

namespace reattn {

// A block of 16 keys, all heads, in one sweep over the query rows. Tiles of maps are transposed: own rows are keys.
template <class T, int kPadded>
__global__ void __launch_bounds__(kMaxThreads) backward_key_kernel(const __grid_constant__ Params p) {
  constexpr int kColumns = key_dims(kPadded) / 8, kHeads = heads_of_a_warp(kPadded);
  const Place place(p, key_dims(kPadded));
  const int dims = smaller(p.head_dim - place.first_dim, 8 * kColumns);
  const int last_dim = place.first_dim + round_up(dims, 16);
  float grad_key[kHeads][1][kColumns][4] = {}, grad_value[kHeads][1][kColumns][4] = {};

  Mixing<T, kPadded>::prepare(p);
#pragma unroll 1
  for (int first = 0; first < p.query.rows; first += p.plan.tile) {
    for (int head = place.warp; head < p.heads; head += p.plan.warps) {
      fill_maps<T, 1, true, false>(p, place, head, first);
      fill_gradients<T, true>(p, place, head, first);
    }
    sync_block();
    Mixing<T, kPadded> mixing(p, place);
    typename Mixing<T, kPadded>::Sums unused;
    mixing.template backward<true, false>(unused, first);
    sync_block();
    for_each_head<kHeads>(p, place, [&](int i, int head) {
      Stream<T> out_grads(p, p.grad, place, head, first, p.plan.tile, place.first_dim, last_dim);
      multiply_maps(grad_value[i], head_tile<T>(p, p.plan.mixed, head), p.plan.tile, out_grads, dims);
      // Rows outside the sequence have no gradient and no query: every term they add is zero.
      const auto delta_of = [&](int row) {
        return row < p.query.rows ? read<float>(p.delta + row_index(p, place.sample, head, row)) : 0.0f;
      };
      for_each_gradient<T, true>(p, head, [&](int, int streamed, float2 prob, float2 weighed) {
        return float2{weighed.x - prob.x * delta_of(first + streamed),
                      weighed.y - prob.y * delta_of(first + streamed + 1)};
      });
      sync_warp();
      Stream<T> queries(p, p.query, place, head, first, p.plan.tile, place.first_dim, last_dim);
      multiply_maps(grad_key[i], head_tile<T>(p, p.plan.grads, head), p.plan.tile, queries, dims);
    });
  }
  for_each_head<kHeads>(p, place, [&](int i, int head) {
    store_rows<T>(p, p.grad_key, place, head, grad_key[i], p.scale);
    store_rows<T>(p, p.grad_value, place, head, grad_value[i], 1.0f);
  });
}

#ifndef __CUDACC_RTC__
template <class T>
void backward_key(const Params& p, const Launch& how) {
  choose_backward(p, [&](auto padded) { start(backward_key_kernel<T, padded>, "backward_key", p, how); });
}

template void backward_key<REATTN_ELEMENT>(const Params& p, const Launch& how);
#endif

}  // namespace reattn
