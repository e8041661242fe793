// What the driver and the kernels of every instruction set share: plain structs, no code.
#pragma once

#include <cstddef>
#include <cstdint>

namespace reattn {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

// (batch, heads, seqlen, head_dim), strides in elements.
struct Tensor {
  void* data;
  int64_t batch, head, row, dim;
};

enum class MaskKind : int { kNone, kBool, kFloat };

// What is given as attn_mask, its dimensions of size 1 with a stride of 0; and whether a query sees no key behind it.
struct MaskTensor {
  MaskKind kind;
  bool causal;
  Tensor tensor;
  int64_t sizes[4];
  float* grad;  // contiguous, zeros at first; null where it is not wanted

  constexpr bool any() const { return kind != MaskKind::kNone || causal; }
};

// A call: names and meaning are those of reattn.backends.contract. Pointers that a direction has no use for are null.
struct Problem {
  Dtype dtype;
  int64_t batch, heads, heads_out, seqlen, seqlen_k, head_dim;  // heads before mixing, and after it
  float scale;
  double dropout_p;
  Tensor query, key, value, grad, out;
  Tensor grad_query, grad_key, grad_value;
  const int64_t* seed;
  float* lse;
  float* value_sum;        // (batch, heads_out, value_rows, head_dim)
  int64_t value_rows = 1;  // seqlen where queries see different keys
  MaskTensor mask;
};

// What the norm comes to for kernels: see csrc/fold.h. Null where there is none; vectors have an element for each head
// after mixing.
struct Mixing {
  const float* of_scores;       // S = of_scores^T R, of the products of query and key, before the mask
  const float *weight, *shift;  // A = W^T P + c
  const float *gamma, *beta;    // N = gamma A + beta, of the quotient with layer norm
  const float *common, *along;  // batch statistics in the backward pass: dA = gamma dN - common - along A
  const float *slope, *level;   // batch norm in the forward pass: out = slope out + level value_sum
  bool over_heads;              // layer norm
  bool sum_maps;                // batch statistics are wanted
  float eps;
};

constexpr int64_t kMostGroups = 8, kMostHeads = 32;

// How a problem is cut. A block is some query rows of all heads against a stretch of keys: its maps stay in the L2
// cache. What is summed, and in which order, depends on the problem and the machine alone, never on the number of
// threads: of gradients of keys and values, the blocks of a group are summed one after the other, then the groups,
// whether one thread does so or several leave what theirs add side by side.
struct Plan {
  int64_t keys;         // seqlen_k in whole vectors, and in whole groups where products sum over them
  int64_t packed_keys;  // seqlen_k in whole panels
  int64_t ld_keys;      // row length of what has a column for each key, an odd multiple of 16: no two rows in one set
  int64_t ld_dim;       // row length of what has a column for each element of head_dim
  int64_t depth;        // head_dim as a sum over it is taken, padded where the products need it
  int64_t block_rows;   // query rows of a block
  int64_t blocks;       // of a sample
  int64_t block_keys;   // keys of a block; all of them where they fit
  int64_t ld_block;     // row length of a block's maps
  int64_t ld_head;      // from a block's maps of one head to those of the next
  int64_t tile_keys;    // keys mixed at a time: their maps of all heads stay in the L1 cache
  int64_t groups;       // of a sample's blocks, in the backward pass
  int64_t group_ends[kMostGroups];  // their blocks, up to here
  // What threads do:
  bool alone;     // each takes whole samples: packs, computes and reduces them
  int64_t wave;   // else: samples whose keys and values are packed at a time
  bool by_block;  // in the backward pass a unit is a block, and not a group
  int64_t slots;  // gradients of keys and values, each of a unit, that are kept at a time for each sample
  int64_t parts;  // parts of a wave whose samples a thread takes one after the other
};

// Memory of one call, and of each thread.
struct Workspace {
  // By sample of the wave and head: of keys before mixing, of values after it.
  char* key_columns;  // keys, head_dim down and keys across, in panels
  char* key_rows;     // keys as they are
  char* value_columns;
  char* value_rows;
  float* grad_key;  // by sample of the wave, slot and head: head_dim down and keys across
  float* grad_value;
  float* value_sums;  // by sample, stretch of keys, head: head_dim; null where they are not wanted
  double* partial;    // sums over a block, by sample of the wave and block
  uint8_t* spoilt;    // with a mask, by sample of the wave, head and key: whether the value is not finite
  double* grad_mask;  // by part and group, as far as the mask is shared between them; null: written in place
};

struct Job {
  Problem problem;
  Mixing mixing;
  Plan plan;
  Workspace work;
  int64_t first, samples;  // the wave: samples first .. first + samples - 1
  // In the backward pass, the groups at work. Of later ones than the first, slot 0 has the sum of those before.
  int64_t first_group, end_group;
  int64_t partial_size;  // of a block's sums

  // The blocks of a group.
  int64_t first_block(int64_t group) const { return group > 0 ? plan.group_ends[group - 1] : 0; }
  int64_t end_block(int64_t group) const { return plan.group_ends[group]; }
  // Units at work for each sample, and the slot of one of them.
  int64_t units() const { return units_until(end_group); }
  int64_t units_until(int64_t end) const {
    return plan.by_block ? end_block(end - 1) - first_block(first_group) : end - first_group;
  }
  int64_t slot(int64_t unit) const { return unit + (first_group > 0); }
};

// The kernels for one instruction set and dtype of the products. A unit is what one thread does at a time.
struct Kernels {
  int64_t lanes;     // floats in a vector
  int64_t row_tile;  // rows and columns of a product that are held in registers
  int64_t column_tile;
  int64_t stretch;         // keys that are packed, and their gradients reduced, as a unit
  int64_t operand_bytes;   // size of an element of the products' operands
  int64_t depth_multiple;  // what sums over an index are padded to
  size_t (*scratch_bytes)(const Job&, bool backward);
  void (*pack)(const Job&, int64_t unit, bool backward);      // samples * stretches of keys
  void (*forward)(const Job&, int64_t unit, char* scratch);   // samples * row blocks; sums by head: A, A^2, 1
  void (*sum_values)(const Job&, int64_t unit);               // batch * heads_out * stretches_of_queries
  void (*finish)(const Job&, int64_t unit);                   // batch * stretches of queries
  void (*grad_sums)(const Job&, int64_t unit);                // batch * stretches of queries; sums by head
  void (*backward)(const Job&, int64_t unit, char* scratch);  // parts * units of a sample at work
  void (*reduce)(const Job&, int64_t unit);                   // samples * stretches of keys
};

// Parts of the queries for which the values that they see are summed.
constexpr int64_t stretches_of_queries(const Problem& p, int64_t stretch) {
  return p.mask.tensor.row != 0 ? (p.seqlen + stretch - 1) / stretch : 1;
}

// Sums that the backward pass leaves: P dA by pairs of heads; by head after mixing dA, dN A and dN; and R dS by pairs,
// where scores are mixed.
inline constexpr int64_t gradient_sums(const Problem& p, const Mixing& m) {
  return (p.heads + 3) * p.heads_out + (m.of_scores ? p.heads * p.heads : 0);
}

}  // namespace reattn
