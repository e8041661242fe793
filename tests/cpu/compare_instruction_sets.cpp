// Every instruction set that this CPU, or an emulator of another one, can run, against the portable one: forward,
// statistics and backward pass on small problems. Needs neither Python nor torch, so that it runs wherever a static
// program does. Prints a line for each comparison; exits with 1 if any result is off, NaN or missing.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"
#include "driver.h"

using namespace reattn;

#if defined(REATTN_EMULATED)
namespace reattn::emulated_dots {
extern const Kernels kFloat32, kBFloat16;
}
namespace reattn::emulated_amx {
extern const Kernels kFloat32, kBFloat16;
}
#endif

namespace {

struct Case {
  Dtype dtype;
  int64_t batch, heads, seqlen, seqlen_k, head_dim;
  bool normalise, coupled;
  double dropout_p;
};

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_bfloat16(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// (batch, seqlen, heads, head_dim) in memory.
struct Buffer {
  Dtype dtype;
  std::vector<float> floats;
  std::vector<uint16_t> halves;
  Tensor tensor;

  Buffer(Dtype dtype, int64_t batch, int64_t heads, int64_t rows, int64_t dim, std::mt19937* generator) : dtype(dtype) {
    std::normal_distribution<float> normal;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    floats.resize(size_t(batch * heads * rows * dim));
    for (float& value : floats) value = generator ? normal(*generator) : nan;
    if (dtype == Dtype::kBFloat16)
      for (float value : floats) halves.push_back(to_bfloat16(value));
    void* data = dtype == Dtype::kFloat32 ? static_cast<void*>(floats.data()) : static_cast<void*>(halves.data());
    tensor = {data, heads * rows * dim, dim, heads * dim, 1};
  }

  std::vector<double> values() const {
    std::vector<double> all;
    for (size_t i = 0; i < floats.size(); i++)
      all.push_back(dtype == Dtype::kFloat32 ? floats[i] : from_bfloat16(halves[i]));
    return all;
  }
};

std::vector<std::vector<double>> run(const Kernels& kernels, const Case& c, int threads) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  const auto random = [&](int64_t size, float scale, float mean) {
    std::vector<float> values(static_cast<size_t>(size));
    for (float& value : values) value = mean + scale * normal(generator);
    return values;
  };
  Problem p{};
  p.dtype = c.dtype;
  p.batch = c.batch, p.heads = c.heads, p.seqlen = c.seqlen, p.seqlen_k = c.seqlen_k, p.head_dim = c.head_dim;
  p.scale = 1.0f / std::sqrt(float(c.head_dim)), p.eps = 1e-5f, p.dropout_p = c.dropout_p;
  const auto buffer = [&](int64_t rows, std::mt19937* with) {
    return Buffer(c.dtype, c.batch, c.heads, rows, c.head_dim, with);
  };
  Buffer query = buffer(c.seqlen, &generator), key = buffer(c.seqlen_k, &generator),
         value = buffer(c.seqlen_k, &generator);
  Buffer grad = buffer(c.seqlen, &generator), out = buffer(c.seqlen, nullptr);
  Buffer grad_query = buffer(c.seqlen, nullptr), grad_key = buffer(c.seqlen_k, nullptr),
         grad_value = buffer(c.seqlen_k, nullptr);
  p.query = query.tensor, p.key = key.tensor, p.value = value.tensor, p.grad = grad.tensor, p.out = out.tensor;
  p.grad_query = grad_query.tensor, p.grad_key = grad_key.tensor, p.grad_value = grad_value.tensor;
  const int64_t heads = c.heads;
  auto weight = random(heads * heads, 0.5f, 0), shift = random(heads, 0.5f, 0), gamma = random(heads, 0.3f, 1),
       beta = random(heads, 1, 0);
  auto coupled = random(heads * heads, 0.1f, 0), constant = random(heads, 0.1f, 0);
  p.weight = weight.data(), p.shift = shift.data();
  if (c.normalise) p.gamma = gamma.data(), p.beta = beta.data();
  if (c.coupled) p.coupled = coupled.data(), p.constant = constant.data();
  std::vector<float> lse(size_t(c.batch * heads * c.seqlen), std::numeric_limits<float>::quiet_NaN());
  std::vector<double> sums(heads), products(heads * heads), grads((heads + 3) * heads), dots(heads);
  const int64_t seed = 123456789012345;
  p.lse = lse.data(), p.seed = &seed, p.sums = sums.data(), p.products = products.data();
  run_statistics(kernels, p, threads);
  std::fill(lse.begin(), lse.end(), std::numeric_limits<float>::quiet_NaN());
  run_forward(kernels, p, false, threads);
  p.grad_weight = grads.data(), p.grad_shift = p.grad_weight + heads * heads;
  p.grad_gamma = p.grad_shift + heads, p.grad_beta = p.grad_gamma + heads;
  run_backward(kernels, p, threads);
  p.sums = dots.data();
  run_grad_dot_out(kernels, p, threads);
  return {out.values(),
          std::vector<double>(lse.begin(), lse.end()),
          products,
          grad_query.values(),
          grad_key.values(),
          grad_value.values(),
          grads,
          dots};
}

double relative_error(const std::vector<double>& found, const std::vector<double>& right) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < right.size(); i++) {
    difference += (found[i] - right[i]) * (found[i] - right[i]);
    size += right[i] * right[i];
  }
  return std::sqrt(difference / size);
}

}  // namespace

int main() {
  const Dtype f32 = Dtype::kFloat32, bf16 = Dtype::kBFloat16;
  const Case cases[] = {
      {f32, 2, 3, 17, 17, 16, true, false, 0},      {f32, 1, 12, 50, 50, 33, false, true, 0},
      {f32, 1, 12, 30, 197, 32, true, false, 0.2},  {f32, 2, 6, 1, 1, 35, false, false, 0},
      {f32, 1, 32, 9, 1500, 8, true, false, 0},     {f32, 1, 17, 20, 40, 128, false, true, 0.1},
      {bf16, 2, 3, 17, 17, 16, true, false, 0},     {bf16, 1, 12, 50, 50, 33, false, true, 0},
      {bf16, 1, 12, 30, 197, 32, true, false, 0.2}, {bf16, 2, 6, 1, 1, 35, false, false, 0},
      {bf16, 1, 32, 9, 1500, 8, true, false, 0},    {bf16, 1, 17, 20, 40, 128, false, true, 0.1},
      {bf16, 1, 5, 70, 70, 64, true, false, 0},     {bf16, 1, 1, 33, 65, 1, false, false, 0},
  };
  const char* names[] = {"out",      "lse",        "products",        "grad_query",
                         "grad_key", "grad_value", "grad_parameters", "grad_dot_out"};
  int wrong = 0, compared = 0;
  std::vector<InstructionSet> sets = instruction_sets();
#if defined(REATTN_EMULATED)
  sets.push_back({"emulated bf16", &emulated_dots::kFloat32, &emulated_dots::kBFloat16, true});
  sets.push_back({"emulated amx", &emulated_amx::kFloat32, &emulated_amx::kBFloat16, true});
#endif
  for (const InstructionSet& set : sets) {
    if (!set.runs_here) {
      std::printf("%s: this CPU does not run it\n", set.name.c_str());
      continue;
    }
    for (const Case& c : cases) {
      const bool rounded = c.dtype == bf16 && set.bfloat16;
      const auto right = run(*sets[0].float32, c, 1), found = run(rounded ? *set.bfloat16 : *set.float32, c, 1);
      double worst = 0;
      const char* where = "";
      for (size_t i = 0; i < right.size(); i++) {
        // One key, or one head of one: gradients that are nothing but rounding.
        double size = 0;
        for (double value : right[i]) size += value * value;
        if (size < 1e-12) continue;
        const double error = relative_error(found[i], right[i]);
        if (!(error <= worst)) worst = error, where = names[i];
      }
      // Maps, and gradients of scores, are rounded to bfloat16 before their products: half a unit in 2^-8, here and
      // there made larger by what cancels.
      const double allowed = rounded ? 0.02 : c.dtype == bf16 ? 0.003 : 2e-5;
      const bool right_enough = worst <= allowed;
      wrong += !right_enough;
      compared++;
      std::printf("%-13s %s %ldx%ldx%ldx%ldx%ld%s%s%s: %.2g in %s%s\n", set.name.c_str(),
                  c.dtype == f32 ? "float32 " : "bfloat16", long(c.batch), long(c.heads), long(c.seqlen),
                  long(c.seqlen_k), long(c.head_dim), c.normalise ? " norm" : "", c.coupled ? " coupled" : "",
                  c.dropout_p > 0 ? " dropout" : "", worst, where, right_enough ? "" : "  WRONG");
      std::fflush(stdout);
    }
  }
  std::printf("%d comparisons, %d wrong\n", compared, wrong);
  return wrong > 0;
}
