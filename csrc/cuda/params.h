// What a launch is given, and how it cuts the problem: see plan.cpp.
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

// A block owns some rows of one sequence, all heads of them, and streams the rows of the other through tiles. Maps of a
// tile lie in shared memory as [head][own row][streamed row]. Offsets and strides in bytes.
struct Plan {
  int own;          // rows that a block owns: 16 or 32
  int blocks;       // blocks of them in a sequence
  int tile;         // streamed rows in a tile, a multiple of 16
  bool resident;    // one tile holds them all
  int warps;        // a warp works on heads warp, warp + warps, ...
  int row_stride;   // of maps; if there is room an odd multiple of 16, so that 8 rows lie in different banks, and heads
  int head_stride;  //
  int stage_stride;  // of rows in a warp's stages
  int stages;        // the groups of 16 rows that a warp has in flight: 1 or 2
  // Where things lie, and how much there is of it all. Tiles: maps, after dropout and centred (in the forward pass
  // mixed and normalised in place); grads, the gradients first of the normalised maps, then of the mixed ones, of the
  // maps after dropout, of the scores; mixed, the normalised maps; probs, the maps before dropout, 0 for none as maps
  // lie there.
  int maps, grads, mixed, probs, staged, matrices, vectors, maxima, sums, bytes;
};

struct Params {
  Tensor query, key, value, out, grad, grad_query, grad_key, grad_value;
  Fold fold;
  const int64_t* seed;
  float *lse, *delta;  // (batch, heads, seqlen)
  float* value_sum;    // (batch, heads, head_dim)
  // Partial sums of blocks. Forward, and before the backward pass: (2 heads, blocks) in vectors; backward: (blocks, 3,
  // padded heads) and, in products, (blocks, padded heads, padded heads).
  float *vectors, *products;
  int64_t blocks;  // that left them
  float *grad_theta, *grad_bias, *grad_norm_weight, *grad_norm_bias;
  float scale, scale_log2, keep_scale, inverse_heads;
  float centre;  // what is taken from the maps before they are rounded: nearly 1 / seqlen_k
  uint32_t drop_below;
  bool synchronised;         // statistics are summed over ranks between the kernels
  double positions;          // queries times keys, of the batch
  double* final_statistics;  // where finish writes them
  int64_t rescaling_blocks;  // of finish, but for the one that writes the statistics
  int splits;  // blocks that share the rows of a sample and head, where sums are taken or outputs rescaled
  int heads, head_dim;
  int depth;  // columns that may be read: head_dim, or more with zeros; a multiple of 16 bytes
  Plan plan;
};

constexpr int kMaxThreads = 384;  // which leaves a thread 168 registers
constexpr int kPieceBytes = 128;  // of a row, in a stage
constexpr int kChunk = 64;        // streamed rows whose scores a warp holds at once
constexpr int kSumThreads = 256;  // of a block that sums what others left
constexpr int kMatrices = 2;      // heads x heads, in shared memory
constexpr int kVectors = 5;

template <class T>
constexpr int kPieceDims = kPieceBytes / int(sizeof(T));

// Up to 12 heads have a warp each; more are mixed as 32, and three share a warp.
constexpr int padded_heads(int heads) { return heads <= 12 ? 16 : 32; }
constexpr int heads_of_a_warp(int padded_heads) { return padded_heads == 16 ? 1 : 3; }
// Columns of an output that a block computes; more head_dim means more blocks.
constexpr int out_dims(int padded_heads) { return padded_heads == 16 ? 64 : 32; }
constexpr int key_dims(int padded_heads) { return padded_heads == 16 ? 64 : 16; }

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int round_up(int number, int multiple) { return (number + multiple - 1) / multiple * multiple; }

}  // namespace reattn
