// The gradients of maps: what a warp does for one head, in a tile.
#pragma once

#include "scores.cuh"

namespace reattn {

// A head's tile of the normalised maps' gradients, grad value^T.
template <class T, bool kOwnKeys>
REATTN_DEVICE void fill_gradients(const Params& p, const Place& place, int head, int first_streamed) {
  const Rows<T> grads = head_tile<T>(p, p.plan.grads, head);
  for_each_product<T, 1>(p, kOwnKeys ? p.value : p.grad, kOwnKeys ? p.grad : p.value, place, head, first_streamed,
                         [&](int, int, int own, int streamed, float first, float second) {
                           Operand<T>::set_pair(grads.at(own, streamed), first, second);
                         });
}

// Visits a head's tile of gradients of the maps after dropout, 16 own rows: function(upper or lower 8, streamed row, P,
// P after dropout times its gradient) returns what takes the gradient's place, if that is asked for.
template <class T, bool kReplace, class Function>
REATTN_DEVICE void for_each_gradient(const Params& p, int head, Function function) {
  const Rows<T> maps = head_tile<T>(p, p.plan.maps, head), grads = head_tile<T>(p, p.plan.grads, head);
  const Rows<T> probs = head_tile<T>(p, p.plan.probs, head);
#pragma unroll 1
  for (int streamed = lane() % 4 * 2; streamed < p.plan.tile; streamed += 8)
    for_each_row<1>([&](int, int lower, int own) {
      const float2 centred = Operand<T>::pair(maps.at(own, streamed)), grad = Operand<T>::pair(grads.at(own, streamed));
      const float2 kept = {centred.x + p.centre, centred.y + p.centre};
      const float2 prob = p.plan.probs ? Operand<T>::pair(probs.at(own, streamed)) : kept;
      const float2 result = function(lower, streamed, prob, float2{kept.x * grad.x, kept.y * grad.y});
      if (kReplace) Operand<T>::set_pair(grads.at(own, streamed), result.x, result.y);
    });
}

}  // namespace reattn
