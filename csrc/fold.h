// What a norm makes of theta, bias and its own parameters, and of their gradients: the only place in C++ that knows a
// norm's name. The CPU extension and the CUDA kernels include it. Derivation: docs/operator.md, sections 2 to 4.
//
// The maps are mixed as A[g] = sum_h weight(h, g) (P[h] - taken) + shift(g). Layer norm divides them by their root mean
// square over the heads and makes gamma(g) A + beta(g) of the quotient. So does batch norm in the backward pass, where
// A has unit variance already; in the forward pass its running statistics are in weight and shift, and those of the
// batch, known only afterwards, in slope(g) and level(g), which make the output of what the mixed maps make of the
// values.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define REATTN_FOLD __host__ __device__ __forceinline__
#else
#define REATTN_FOLD inline
#endif

namespace reattn {

enum class Norm : int { kNone, kLayer, kBatch };

// Vectors have an element for each head after mixing, and are null where there are none.
struct Parameters {
  const float* theta;  // (heads, heads_out): heads before mixing down, after it across
  const float *bias, *norm_weight, *norm_bias;
  float *running_mean, *running_var;
  int64_t* num_batches_tracked;
  double* statistics;  // of the batch, (3, heads_out): mean of the centred maps, 1 / deviation, positions
  double* grad_sums;   // (2, heads_out): of grad * out, and of grad times the sum of the values
  Norm norm;
  bool training;  // batch norm: statistics of the batch
  int heads, heads_out;
  float output_scale, eps;
  float momentum;    // of the running statistics; negative: the mean over all batches
  float centre;      // the mean of the maps, nearly: what their statistics are summed about
  float taken;       // what kernels take from maps before they mix them
  float unit_scale;  // of the mixed maps in the forward pass, where batch statistics divide by it again: a power of two
};

struct Fold {
  Parameters p;
  bool backward;

  REATTN_FOLD static float or_else(const float* vector, int head, float otherwise) {
    return vector ? vector[head] : otherwise;
  }
  REATTN_FOLD bool batch_statistics() const { return p.norm == Norm::kBatch && p.training; }
  // Whether gamma and beta act on the mixed maps.
  REATTN_FOLD bool has_gamma() const { return p.norm == Norm::kLayer || (p.norm == Norm::kBatch && backward); }

  REATTN_FOLD float gamma(int g) const { return p.output_scale * or_else(p.norm_weight, g, 1.0f); }
  REATTN_FOLD float beta(int g) const { return p.output_scale * or_else(p.norm_bias, g, 0.0f); }
  // 1 / standard deviation, of the batch or as it runs.
  REATTN_FOLD float inverse_deviation(int g) const {
    return p.training ? float(p.statistics[p.heads_out + g]) : 1.0f / std::sqrt(p.running_var[g] + p.eps);
  }

  // What layer norm takes from the weights of head h: centring over the heads after mixing is linear.
  REATTN_FOLD float row_mean(int h) const {
    if (p.norm != Norm::kLayer) return 0.0f;
    float sum = 0;
    for (int g = 0; g < p.heads_out; g++) sum += p.theta[h * p.heads_out + g];
    return sum / float(p.heads_out);
  }
  // The factor of a column of theta.
  REATTN_FOLD float column_factor(int g) const {
    if (p.norm == Norm::kNone) return p.output_scale;
    if (p.norm == Norm::kLayer) return 1.0f;
    if (batch_statistics() && !backward) return p.unit_scale;
    return inverse_deviation(g) * (backward ? 1.0f : gamma(g));
  }
  REATTN_FOLD float weight(int h, int g) const { return weight(h, g, row_mean(h)); }
  REATTN_FOLD float weight(int h, int g, float row_mean) const { return weight(h, g, row_mean, column_factor(g)); }
  REATTN_FOLD float weight(int h, int g, float row_mean, float column_factor) const {
    return (p.theta[h * p.heads_out + g] - row_mean) * column_factor;
  }
  // column_sum: of the weights of g over h, not rounded to the maps' dtype.
  REATTN_FOLD float shift(int g, float column_sum) const {
    const float taken = p.taken * column_sum, bias = or_else(p.bias, g, 0.0f);
    if (p.norm == Norm::kNone) return p.output_scale * bias + taken;
    if (p.norm == Norm::kLayer) {
      float sum = 0;
      for (int other = 0; other < p.heads_out; other++) sum += or_else(p.bias, other, 0.0f);
      return bias - sum / float(p.heads_out) + taken;
    }
    if (p.training) {
      const float offset = backward ? float(p.statistics[g]) * inverse_deviation(g) : 0.0f;
      return (p.taken - p.centre) * column_sum - offset;
    }
    const float shift = (bias - p.running_mean[g]) * column_factor(g) + taken;
    return backward ? shift : shift + beta(g);
  }

  // The output of batch statistics: slope times what the mixed maps made of the values, and level times their sum.
  // offset: the mean of the centred maps, mixed.
  REATTN_FOLD float slope(int g, double inverse) const { return gamma(g) * float(inverse) / p.unit_scale; }
  REATTN_FOLD float level(int g, double inverse, double offset) const {
    return beta(g) - gamma(g) * float(inverse * offset);
  }

  // Through batch statistics, the gradient of A is gamma dN - common - along A.
  REATTN_FOLD double positions(int g) const {
    const double positions = p.statistics[2 * p.heads_out + g];
    return positions > 0 ? positions : 1.0;
  }
  REATTN_FOLD float common(int g) const {
    return batch_statistics() ? float(gamma(g) * p.grad_sums[p.heads_out + g] / positions(g)) : 0.0f;
  }
  REATTN_FOLD float along(int g) const {
    return batch_statistics() ? float((p.grad_sums[g] - beta(g) * p.grad_sums[p.heads_out + g]) / positions(g)) : 0.0f;
  }

  // The gradients of what the user gave, from sums over all maps, by head: of P dA, of dA, of dN A, of dN.
  template <class Sums>
  REATTN_FOLD double grad_theta(const Sums& grad_weights_of_h, int g) const {
    double mean = 0;
    if (p.norm == Norm::kLayer) {
      for (int other = 0; other < p.heads_out; other++) mean += grad_weights_of_h[other];
      mean /= p.heads_out;
    }
    return (grad_weights_of_h[g] - mean) * column_factor(g);
  }
  template <class Sums>
  REATTN_FOLD double grad_bias(const Sums& grad_shift, int g) const {
    if (batch_statistics()) return 0;  // the mean takes it away
    double mean = 0;
    if (p.norm == Norm::kLayer) {
      for (int other = 0; other < p.heads_out; other++) mean += grad_shift[other];
      mean /= p.heads_out;
    }
    return (grad_shift[g] - mean) * column_factor(g);
  }
  REATTN_FOLD double grad_norm(double grad) const { return p.output_scale * grad; }
};

// Batch statistics of one head, from the sum and the sum of squares of its mixed maps without bias.
struct Moments {
  double mean, variance, inverse_deviation;

  REATTN_FOLD Moments(double sum, double squares, double positions, float eps) {
    const double count = positions > 0 ? positions : 1.0;
    mean = sum / count;
    variance = squares / count - mean * mean;
    if (variance < 0) variance = 0;
    inverse_deviation = positions > 0 ? 1.0 / std::sqrt(variance + double(eps)) : 0.0;
  }
};

// What a head's mixed maps are about: the centre of the maps, mixed.
REATTN_FOLD double mixed_centre(const Parameters& p, int g) {
  double column = 0;
  for (int h = 0; h < p.heads; h++) column += double(p.theta[h * p.heads_out + g]);
  return column * double(p.centre);
}

// The sums that Moments takes, from those of what kernels summed: unit_scale times the mixed maps less their centre.
struct RawSums {
  double sum, squares;

  REATTN_FOLD RawSums(const Parameters& p, int g, double scaled_sum, double scaled_squares, double positions) {
    const double scale = double(p.unit_scale), mean = mixed_centre(p, g), centred = scaled_sum / scale;
    sum = centred + positions * mean;
    squares = scaled_squares / (scale * scale) + 2 * mean * centred + positions * mean * mean;
  }
};

// Takes a batch's statistics of one head into the running ones, as torch.nn.BatchNorm2d does.
REATTN_FOLD void update_running(const Parameters& p, const Moments& moments, double positions, int g) {
  if (!p.running_mean || !(positions > 0)) return;
  const double share = p.momentum < 0 ? 1.0 / double(*p.num_batches_tracked + 1) : double(p.momentum);
  const double mean = moments.mean + (p.bias ? double(p.bias[g]) : 0.0);
  p.running_mean[g] = float(double(p.running_mean[g]) + share * (mean - double(p.running_mean[g])));
  if (!(positions > 1)) return;
  const double variance = moments.variance * (positions / (positions - 1));
  p.running_var[g] = float(double(p.running_var[g]) + share * (variance - double(p.running_var[g])));
}

}  // namespace reattn
