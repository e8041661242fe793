// delta, the gradient of the query, and the partial sums of the parameters' gradients.
#include "kernels.h"
#include "launch.h"
#include "mixing.cuh"

namespace reattn {

// A block of 16 query rows, all heads. delta = sum_j P dP needs all keys before any dS is known: where they are not
// resident, a second sweep computes their maps and gradients again. delta is not rowsum(dO * O), as in attention
// without mixing: the heads are coupled.
template <class T, int kPadded>
__global__ void __launch_bounds__(kMaxThreads) backward_query_kernel(const __grid_constant__ Params p) {
  constexpr int kColumns = out_dims(kPadded) / 8, kHeads = heads_of_a_warp(kPadded);
  const Place place(p, out_dims(kPadded));
  const int dims = smaller(p.head_dim - place.first_dim, 8 * kColumns);
  const auto fill = [&](int first) {
    for (int head = place.warp; head < p.heads; head += p.plan.warps) {
      fill_maps<T, 1, false, true>(p, place, head, first);
      fill_gradients<T, false>(p, place, head, first);
    }
    sync_block();
  };
  Mixing<T, kPadded>::prepare(p);

  float delta[kHeads][2] = {}, mass[kHeads][2] = {};
  typename Mixing<T, kPadded>::Sums sums;
#pragma unroll 1
  for (int first = 0; first < p.key.rows; first += p.plan.tile) {
    fill(first);
    Mixing<T, kPadded>(p, place).template backward<false, true>(sums, first);
    sync_block();
    for_each_head<kHeads>(p, place, [&](int i, int head) {
      for_each_gradient<T, false>(p, head, [&](int lower, int streamed, float2 prob, float2 weighed) {
        const bool inside = first + streamed < p.key.rows, next_inside = first + streamed + 1 < p.key.rows;
        delta[i][lower] += (inside ? weighed.x : 0.0f) + (next_inside ? weighed.y : 0.0f);
        mass[i][lower] += (inside ? prob.x : 0.0f) + (next_inside ? prob.y : 0.0f);
        return weighed;
      });
    });
  }
  Mixing<T, kPadded>(p, place).store_sums(sums);
  for_each_head<kHeads>(p, place, [&](int i, int head) {
    for_each_row<1>([&](int, int lower, int own) {
      // Large scores leave rows of P that sum to 1 only nearly: what dP has in common would then not cancel.
      delta[i][lower] = quad_sum(delta[i][lower]) / quad_sum(mass[i][lower]);
      const int row = place.first_row + own;
      if (lane() % 4 == 0 && row < p.query.rows)
        write(p.delta + row_index(p, place.sample, head, row), delta[i][lower]);
    });
  });

  float grad_query[kHeads][1][kColumns][4] = {};
#pragma unroll 1
  for (int first = 0; first < p.key.rows; first += p.plan.tile) {
    if (!p.plan.resident) {
      fill(first);
      Mixing<T, kPadded>(p, place).template backward<false, false>(sums, first);
      sync_block();
    }
    for_each_head<kHeads>(p, place, [&](int i, int head) {
      for_each_gradient<T, true>(p, head, [&](int lower, int streamed, float2 prob, float2 weighed) {
        return float2{first + streamed < p.key.rows ? weighed.x - prob.x * delta[i][lower] : 0.0f,
                      first + streamed + 1 < p.key.rows ? weighed.y - prob.y * delta[i][lower] : 0.0f};
      });
      sync_warp();
      Stream<T> keys(p, p.key, place, head, first, p.plan.tile, place.first_dim, place.first_dim + round_up(dims, 16));
      multiply_maps(grad_query[i], head_tile<T>(p, p.plan.grads, head), p.plan.tile, keys, dims);
    });
  }
  for_each_head<kHeads>(p, place,
                        [&](int i, int head) { store_rows<T>(p, p.grad_query, place, head, grad_query[i], p.scale); });
}

#ifndef __CUDACC_RTC__
template <class T>
void backward_query(const Params& p, const Launch& how) {
  choose_backward(p, [&](auto padded) { start(backward_query_kernel<T, padded>, "backward_query", p, how); });
}

template void backward_query<REATTN_ELEMENT>(const Params& p, const Launch& how);
#endif

}  // namespace reattn
