// Whole calls: folds the norm, cuts the problem, hands out the units of work, sums what they leave.
#pragma once

#include "../fold.h"
#include "kernels.h"

namespace reattn {

// A call as it comes from Python: see reattn.backends.contract.
struct Call {
  const Kernels* kernels;
  int threads;
  Problem problem;
  Parameters parameters;
  const float* pre_theta;  // (heads, heads), or null
  bool synchronised;
  float *grad_pre_theta, *grad_theta, *grad_bias, *grad_norm_weight, *grad_norm_bias;
};

// The output; with batch statistics over several ranks, what finish needs of this one.
void run_forward(const Call& call);
// The output from the sums of all ranks, in place, and the final statistics.
void run_finish(const Call& call);
// What the backward pass has to know of the whole batch.
void run_grad_sums(const Call& call);
void run_backward(const Call& call);
// Frees the memory that calls leave for each other.
void empty_cache();
// What a block with all keys may take of the caches, in the place of what this machine has: tests make it small.
// Returns what it was.
int64_t set_whole_bytes(int64_t bytes);

}  // namespace reattn
