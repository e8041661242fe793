// What a launch is given; cuda_plan.py in reattn/backends has the same.
#pragma once

#include <cstdint>

#include "../fold.h"

namespace reattn {

// (batch, heads, rows, head_dim), the last contiguous; strides in elements.
struct Tensor {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
  int rows;
};

// Broadcast to (batch, heads, rows, keys); strides in elements, 0 where all have the same.
struct MaskTensor {
  const void* data;
  int64_t batch_stride, head_stride, row_stride, key_stride;
};

struct Params {
  Tensor query, key, value, out, grad, grad_query, grad_key, grad_value;
  Fold fold;
  const int64_t* seed;
  float* lse;        // (batch, heads, seqlen), to base 2
  float* value_sum;  // (batch, heads, 1 or seqlen, head_dim)
  // Partial sums of blocks. Forward, and before the backward pass: (2 heads, blocks) in vectors, forward with a mask
  // (3 heads, blocks); backward: (blocks, 3, padded heads) and, in products, (blocks, padded heads, padded heads).
  float *vectors, *products;
  // Maps that the backward sweep leaves to the products: (samples of the launch, heads, rows of the launch, keys), keys
  // a multiple of 16, both normalised and as gradients of the scores. Where the rows of a sequence take several
  // launches, the sums over them go on in float32, (samples of the launch, heads, seqlen_k, head_dim).
  void *mixed, *grad_scores;
  float *grad_key_sum, *grad_value_sum;
  int first_sample, first_row, rows_of_launch, row_blocks_of_launch;
  bool first_rows, last_rows;  // of a sequence are among those of the launch
  int64_t blocks;              // that left the partial sums
  float *grad_theta, *grad_bias, *grad_norm_weight, *grad_norm_bias;
  float scale, scale_log2, keep_scale;
  float centre;  // what is taken from the maps before they are rounded: nearly 1 / seqlen_k
  uint32_t drop_below;
  bool added_up;             // statistics holds sums already: of ranks, or of many blocks
  double positions;          // queries times keys, of the batch, where there is no mask
  double* final_statistics;  // where finish writes them
  int splits;  // blocks that share the rows of a sample and head, where sums are taken or outputs rescaled
  MaskTensor mask;
  // Mixing before the softmax: (heads, heads), heads of query and key down; partial sums of its gradient, as products.
  const float* pre_theta;
  float *pre_products, *grad_pre_theta;
};
static_assert(sizeof(Params) == REATTN_PARAMS_BYTES, "reattn/backends/cuda_plan.py has them otherwise");

constexpr int kSumThreads = 256;                   // of a block that sums what others left
constexpr int kSumBytes = 256 + 32 * kSumThreads;  // of shared memory, for it

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int greater(int a, int b) { return a > b ? a : b; }
constexpr int round_up(int number, int multiple) { return (number + multiple - 1) / multiple * multiple; }

}  // namespace reattn
