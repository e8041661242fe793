// Whole calls: cuts the problem, hands out the units of work, sums what they leave.
#pragma once

#include "kernels.h"

namespace reattn {

void run_statistics(const Kernels& kernels, const Problem& problem, int threads);
void run_forward(const Kernels& kernels, const Problem& problem, bool lse_known, int threads);
void run_backward(const Kernels& kernels, const Problem& problem, int threads);
// sums[heads] = sum grad * out.
void run_grad_dot_out(const Kernels& kernels, const Problem& problem, int threads);
// Frees the memory that calls leave for each other.
void empty_cache();

}  // namespace reattn
