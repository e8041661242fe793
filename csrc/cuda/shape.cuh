// The element type and shape that the kernels are compiled for, and what all of them say of rows.
#pragma once

#include <type_traits>

#include "instructions.cuh"
#include "params.h"

#define REATTN_DEVICE __device__ __forceinline__

// A call without mixing before the softmax compiles nothing of it.
#ifndef REATTN_PRE_MIXED
#define REATTN_PRE_MIXED 0
#endif

namespace reattn {

using Element = REATTN_ELEMENT;
constexpr bool kFloat = std::is_same_v<Element, float>;
using Narrow = std::conditional_t<kFloat, Half, Element>;  // for what only compiles where there is no use for it
constexpr int kHeads = REATTN_HEADS, kHeadDim = REATTN_HEAD_DIM;

constexpr int kVector = 16 / int(sizeof(Element));
constexpr int kDepth = round_up(kHeadDim, kVector);  // columns that may be read: head_dim, or more with zeros
constexpr int kDims = round_up(kHeadDim, 16);
constexpr int kOutDims = smaller(kDims, 64);   // columns of an output that a block computes
constexpr int kHeadBlocks = (kHeads + 7) / 8;  // of 8 heads
constexpr int kPaddedHeads = 8 * kHeadBlocks;
constexpr bool kPreMixed = REATTN_PRE_MIXED;  // the scores

REATTN_DEVICE Shared<char> at(int offset) { return shared_memory() + offset; }

template <class T = Element>
REATTN_DEVICE T* head_rows(const Tensor& tensor, int sample, int head) {
  return static_cast<T*>(tensor.data) + (sample * tensor.batch_stride + head * tensor.head_stride);
}

REATTN_DEVICE float number_at(const Element* from) {
  if constexpr (kFloat)
    return read<float>(from);
  else
    return unpack<Narrow>(read<uint16_t>(from)).x;
}

// What weights are multiplied by, whose largest is given: a power of two, 2^10 over the size of that. Float16 then
// holds them divided by a row's sum, and what they make of maps up to 1. The size's exponent counts up to `most`.
REATTN_DEVICE float unit_of(float largest, int most) {
  const int exponent = exponent_above(largest);
  return power_of_two(10 - (exponent < -most ? -most : exponent > most ? most : exponent));
}

// Batch statistics come after the product with the values, which in float16 has to stay in range until then. Maps of N
// keys are about 1 / N, but may be 1; statistics then make sqrt(N) of it at most. So they are stored in less: some
// eighth of sqrt(N) instead of 2^10, a power of two.
constexpr bool kSmallRange = std::is_same_v<Element, Half>;
REATTN_DEVICE float stored_part(int seqlen_k) {
  return power_of_two(greater(exponent_above(seqlen_k) / 2 - 3, 0) - 10);
}

// Two neighbours of a row in device memory, the first at an even column; those beyond head_dim are left out.
REATTN_DEVICE void write_pair(Element* to, int dim, float first, float second) {
  if constexpr (kHeadDim % 2 == 0) {
    if (kHeadDim % kOutDims != 0 && dim >= kHeadDim) return;
    if constexpr (kFloat)
      write(to, float2{first, second});
    else
      write(to, pack<Narrow>(first, second));
  } else if constexpr (kFloat) {
    if (dim < kHeadDim) write(to, first);
    if (dim + 1 < kHeadDim) write(to + 1, second);
  } else {
    if (dim < kHeadDim) write(to, uint16_t(pack<Narrow>(first, 0)));
    if (dim + 1 < kHeadDim) write(to + 1, uint16_t(pack<Narrow>(second, 0)));
  }
}

}  // namespace reattn
