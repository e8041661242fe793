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
  const Place place(p, kPadded);
  const int dims = smaller(p.head_dim - place.first_dim, 8 * kColumns);
  typename Mixing<T, kPadded>::Sums sums;
  float delta[kHeads][2] = {}, mass[kHeads][2] = {};
  float grad_query[kHeads][1][kColumns][4] = {};

  Mixing<T, kPadded>::prepare(p);
#pragma unroll 1
  for (int sweep = 0; sweep < 2; sweep++) {
#pragma unroll 1
    for (int first = 0; first < p.key.rows; first += p.plan.tile) {
      if (sweep == 0 || !p.plan.resident) {
        for (int head = warp(); head < p.heads; head += warps()) {
          fill_maps<T, 1, false>(p, place, head, first);
          fill_gradients<T, false>(p, place, head, first);
        }
        sync_block();
        Mixing<T, kPadded> mixing(p);
        mixing.template backward<false>(sums, sweep == 0);
        sync_block();
      }
      for_each_head<kHeads>(p, [&](int i, int head) {
        for_each_gradient<T>(p, head, [&](int lower, int streamed, float2 prob, float2 weighed) {
          const bool inside = first + streamed < p.key.rows, next_inside = first + streamed + 1 < p.key.rows;
          if (sweep == 0) {
            delta[i][lower] += (inside ? weighed.x : 0.0f) + (next_inside ? weighed.y : 0.0f);
            mass[i][lower] += (inside ? prob.x : 0.0f) + (next_inside ? prob.y : 0.0f);
          }
          return float2{inside ? weighed.x - prob.x * delta[i][lower] : 0.0f,
                        next_inside ? weighed.y - prob.y * delta[i][lower] : 0.0f};
        }, sweep == 1);
        if (sweep == 0) return;
        sync_warp();
        Stream<T> keys(p, p.key, place.sample, head, first, p.plan.tile, place.first_dim,
                       place.first_dim + round_up(dims, 16));
        multiply_maps(grad_query[i], head_tile<T>(p, p.plan.grads, head), p.plan.tile, keys, dims);
      });
    }
    if (sweep == 1) break;
    for_each_head<kHeads>(p, [&](int i, int head) {
      for_each_row<1>([&](int, int lower, int own) {
        // Large scores leave rows of P that sum to 1 only nearly: what dP has in common would then not cancel.
        delta[i][lower] = quad_sum(delta[i][lower]) / quad_sum(mass[i][lower]);
        const int row = place.first_row + own;
        if (lane() % 4 == 0 && row < p.query.rows)
          write(p.delta + row_index(p, place.sample, head, row), delta[i][lower]);
      });
    });
  }
  for_each_head<kHeads>(p, [&](int i, int head) {
    store_rows<T>(p, p.grad_query, place.sample, head, place.first_row, place.first_dim, grad_query[i], p.scale);
  });
  Mixing<T, kPadded>(p).store_sums(sums);
}

template <>
void backward_query<REATTN_ELEMENT>(const Params& p, const Launch& how) {
  if (padded_heads(p.heads) == 16) return start(backward_query_kernel<REATTN_ELEMENT, 16>, "backward_query", p, how);
  start(backward_query_kernel<REATTN_ELEMENT, 32>, "backward_query", p, how);
}

}  // namespace reattn
