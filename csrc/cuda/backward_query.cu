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
  const Dropout dropout(p);
  const int dims = smaller(p.head_dim - place.first_dim, 8 * kColumns);
  Softmax<T, 1> softmax[kHeads];
  typename Mixing<T, kPadded>::Sums sums;
  float delta[kHeads][2] = {}, mass[kHeads][2] = {};

  Mixing<T, kPadded>::prepare(p);
  for_each_head<kHeads>(p, [&](int i, int head) { softmax[i].read_lse(p, place, head); });
  const auto fill = [&](int first) {
    for_each_head<kHeads>(p, [&](int i, int head) {
      fill_maps<T, 1, false>(p, place, head, first, softmax[i], dropout);
      fill_gradients<T, false>(p, place, head, first);
    });
    sync_block();
  };
  // function(head of the warp, head, upper or lower row, streamed row, P, P after dropout times its gradient) returns
  // what takes the gradient's place.
  const auto for_each_gradient = [&](int first, auto function) {
    for_each_head<kHeads>(p, [&](int i, int head) {
      const Rows<T> maps = head_tile<T>(p, p.plan.maps, head), grads = head_tile<T>(p, p.plan.grads, head);
      const Rows<T> probs = head_tile<T>(p, p.plan.probs, head);
      for (int streamed = lane() % 4 * 2; streamed < p.plan.tile; streamed += 8)
#pragma unroll
        for (int lower = 0; lower < 2; lower++) {
          const int own = 8 * lower + lane() / 4;
          const float2 centred = Operand<T>::pair(maps.at(own, streamed));
          const float2 kept = {centred.x + p.centre, centred.y + p.centre};
          const float2 prob = p.plan.probs ? Operand<T>::pair(probs.at(own, streamed)) : kept;
          const float2 grad = Operand<T>::pair(grads.at(own, streamed));
          function(i, lower, grads.at(own, streamed), first + streamed < p.key.rows,
                   first + streamed + 1 < p.key.rows, prob, float2{kept.x * grad.x, kept.y * grad.y});
        }
    });
  };

  for (int first = 0; first < p.key.rows; first += p.plan.tile) {
    fill(first);
    Mixing<T, kPadded> mixing(p);
    mixing.read_parameters();
    mixing.template backward<false, true>(sums);
    sync_block();
    for_each_gradient(first, [&](int i, int lower, Shared<T>, bool inside, bool next_inside, float2 prob, float2 weighed) {
      if (inside) delta[i][lower] += weighed.x, mass[i][lower] += prob.x;
      if (next_inside) delta[i][lower] += weighed.y, mass[i][lower] += prob.y;
    });
  }
  for_each_head<kHeads>(p, [&](int i, int head) {
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
      // Large scores leave rows of P that sum to 1 only nearly: what dP has in common would then not cancel.
      delta[i][lower] = quad_sum(delta[i][lower]) / quad_sum(mass[i][lower]);
      const int row = place.first_row + 8 * lower + lane() / 4;
      if (lane() % 4 == 0 && row < p.query.rows && place.first_dim == 0)
        write(p.delta + row_index(p, place.sample, head, row), delta[i][lower]);
    }
  });

  float grad_query[kHeads][1][kColumns][4] = {};
  for (int first = 0; first < p.key.rows; first += p.plan.tile) {
    if (!p.plan.resident) {
      sync_block();
      fill(first);
      Mixing<T, kPadded> mixing(p);
      mixing.read_parameters();
      mixing.template backward<false, false>(sums);
      sync_block();
    }
    for_each_gradient(first, [&](int i, int lower, Shared<T> place, bool inside, bool next_inside, float2 prob, float2 weighed) {
      Operand<T>::set_pair(place, inside ? weighed.x - prob.x * delta[i][lower] : 0.0f,
                           next_inside ? weighed.y - prob.y * delta[i][lower] : 0.0f);
    });
    sync_warp();
    for_each_head<kHeads>(p, [&](int i, int head) {
      Stream<T> keys(p, p.key, place.sample, head, first, p.plan.tile, place.first_dim,
                     place.first_dim + round_up(dims, 16));
      multiply_maps(grad_query[i], head_tile<T>(p, p.plan.grads, head), p.plan.tile, keys, dims);
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
