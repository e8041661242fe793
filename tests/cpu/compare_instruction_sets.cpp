// Every instruction set that this CPU, or an emulator of another one, can run, against the portable one: forward and
// backward pass on small problems, with every norm. Needs neither Python nor torch, so that it runs wherever a static
// program does. Prints a line for each comparison; exits with 1 if any result is off, NaN or missing.
//
// With "save FILE" the results of the portable one are written, with "against FILE" compared with those of another
// machine.
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
  Norm norm;
  bool training;
  double dropout_p;
  MaskKind mask = MaskKind::kNone;  // boolean: of keys; added: of heads, queries and keys
  bool causal = false;
  int64_t heads_out = 0;  // 0: as many as before mixing
  bool pre_mixed = false;
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
  Call call{};
  call.kernels = &kernels, call.threads = threads;
  Problem& p = call.problem;
  p.dtype = c.dtype;
  const int64_t heads = c.heads, heads_out = c.heads_out > 0 ? c.heads_out : heads;
  p.batch = c.batch, p.heads = heads, p.heads_out = heads_out;
  p.seqlen = c.seqlen, p.seqlen_k = c.seqlen_k, p.head_dim = c.head_dim;
  p.scale = 1.0f / std::sqrt(float(c.head_dim)), p.dropout_p = c.dropout_p;
  const auto buffer = [&](int64_t of_heads, int64_t rows, std::mt19937* with) {
    return Buffer(c.dtype, c.batch, of_heads, rows, c.head_dim, with);
  };
  Buffer query = buffer(heads, c.seqlen, &generator), key = buffer(heads, c.seqlen_k, &generator),
         value = buffer(heads_out, c.seqlen_k, &generator);
  Buffer grad = buffer(heads_out, c.seqlen, &generator), out = buffer(heads_out, c.seqlen, nullptr);
  Buffer grad_query = buffer(heads, c.seqlen, nullptr), grad_key = buffer(heads, c.seqlen_k, nullptr),
         grad_value = buffer(heads_out, c.seqlen_k, nullptr);
  p.query = query.tensor, p.key = key.tensor, p.value = value.tensor, p.grad = grad.tensor, p.out = out.tensor;
  p.grad_query = grad_query.tensor, p.grad_key = grad_key.tensor, p.grad_value = grad_value.tensor;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  auto theta = random(heads * heads_out, 0.5f, 0), bias = random(heads_out, 0.5f, 0),
       norm_weight = random(heads_out, 0.3f, 1), norm_bias = random(heads_out, 1, 0),
       running_mean = random(heads_out, 0.1f, 0), running_var = random(heads_out, 0, 0.01f),
       pre_theta = random(heads * heads, 0.5f, 0);
  if (c.pre_mixed) call.pre_theta = pre_theta.data();
  Parameters& parameters = call.parameters;
  parameters.theta = theta.data(), parameters.bias = bias.data();
  parameters.norm_weight = norm_weight.data(), parameters.norm_bias = norm_bias.data();
  parameters.running_mean = running_mean.data(), parameters.running_var = running_var.data();
  parameters.norm = c.norm, parameters.training = c.training;
  parameters.heads = int(heads), parameters.heads_out = int(heads_out);
  parameters.output_scale = 0.5f, parameters.eps = 1e-5f, parameters.momentum = 0.1f;
  parameters.centre = 1.0f / float(c.seqlen_k), parameters.unit_scale = 1;
  std::vector<uint8_t> hides(size_t(c.batch * c.seqlen_k));
  for (size_t i = 0; i < hides.size(); i++) hides[i] = i % 3 > 0;
  Buffer added(c.dtype, 1, heads, c.seqlen, c.seqlen_k, &generator);
  std::vector<float> grad_mask;
  p.mask.kind = c.mask, p.mask.causal = c.causal;
  if (c.mask == MaskKind::kBool) {
    p.mask.tensor = {hides.data(), c.seqlen_k, 0, 0, 1};
    p.mask.sizes[0] = c.batch, p.mask.sizes[1] = p.mask.sizes[2] = 1, p.mask.sizes[3] = c.seqlen_k;
  } else if (c.mask == MaskKind::kFloat) {
    p.mask.tensor = added.tensor, p.mask.tensor.batch = 0;
    p.mask.sizes[0] = 1, p.mask.sizes[1] = heads, p.mask.sizes[2] = c.seqlen, p.mask.sizes[3] = c.seqlen_k;
    grad_mask.resize(size_t(heads * c.seqlen * c.seqlen_k));
  }
  p.value_rows = c.causal || c.mask == MaskKind::kFloat ? c.seqlen : 1;
  std::vector<float> lse(size_t(c.batch * heads * c.seqlen), nan),
      value_sum(size_t(c.batch * heads_out * p.value_rows * c.head_dim), nan);
  std::vector<double> statistics(size_t(3 * heads_out), nan);
  std::vector<float> grads(size_t((heads + 3) * heads_out), nan), grad_pre_theta;
  const int64_t seed = 123456789012345;
  p.lse = lse.data(), p.seed = &seed, p.value_sum = value_sum.data(), parameters.statistics = statistics.data();
  run_forward(call);
  call.grad_theta = grads.data(), call.grad_bias = call.grad_theta + heads * heads_out;
  call.grad_norm_weight = call.grad_bias + heads_out, call.grad_norm_bias = call.grad_norm_weight + heads_out;
  if (c.pre_mixed) grad_pre_theta.assign(size_t(heads * heads), nan), call.grad_pre_theta = grad_pre_theta.data();
  p.mask.grad = grad_mask.empty() ? nullptr : grad_mask.data();
  run_backward(call);
  if (!c.training) statistics.clear();
  running_mean.insert(running_mean.end(), running_var.begin(), running_var.end());
  return {out.values(),
          std::vector<double>(lse.begin(), lse.end()),
          statistics,
          std::vector<double>(running_mean.begin(), running_mean.end()),
          grad_query.values(),
          grad_key.values(),
          grad_value.values(),
          std::vector<double>(grads.begin(), grads.end()),
          std::vector<double>(grad_pre_theta.begin(), grad_pre_theta.end()),
          std::vector<double>(grad_mask.begin(), grad_mask.end())};
}

double relative_error(const std::vector<double>& found, const std::vector<double>& right) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < right.size(); i++) {
    difference += (found[i] - right[i]) * (found[i] - right[i]);
    size += right[i] * right[i];
  }
  return std::sqrt(difference / size);
}

using Results = std::vector<std::vector<double>>;

void save(std::FILE* file, const Results& results) {
  for (const std::vector<double>& values : results) {
    const uint64_t size = values.size();
    std::fwrite(&size, sizeof size, 1, file);
    std::fwrite(values.data(), sizeof(double), values.size(), file);
  }
}

// As many as there are here, of the same sizes.
Results load(std::FILE* file, Results results) {
  for (std::vector<double>& values : results) {
    uint64_t size = 0;
    if (std::fread(&size, sizeof size, 1, file) != 1 || size != values.size() ||
        std::fread(values.data(), sizeof(double), values.size(), file) != values.size()) {
      std::printf("the file is of other cases\n");
      std::exit(2);
    }
  }
  return results;
}

}  // namespace

int main(int count, char** arguments) {
  const bool saves = count == 3 && !std::strcmp(arguments[1], "save"),
             compares = count == 3 && !std::strcmp(arguments[1], "against");
  std::FILE* file = saves || compares ? std::fopen(arguments[2], saves ? "wb" : "rb") : nullptr;
  if (count != 1 && !file) return 2;
  const Dtype f32 = Dtype::kFloat32, bf16 = Dtype::kBFloat16;
  const Norm none = Norm::kNone, layer = Norm::kLayer, batch = Norm::kBatch;
  const Case cases[] = {
      {f32, 2, 3, 17, 17, 16, layer, false, 0},
      {f32, 1, 12, 50, 50, 33, batch, true, 0},
      {f32, 1, 12, 30, 197, 32, layer, false, 0.2},
      {f32, 2, 6, 1, 1, 35, none, false, 0},
      {f32, 1, 32, 9, 1500, 8, layer, false, 0},
      {f32, 1, 17, 20, 40, 128, batch, true, 0.1},
      {f32, 2, 6, 20, 30, 24, batch, false, 0},
      {f32, 1, 12, 9, 1500, 8, batch, true, 0},
      {bf16, 2, 3, 17, 17, 16, layer, false, 0},
      {bf16, 1, 12, 50, 50, 33, batch, true, 0},
      {bf16, 1, 12, 30, 197, 32, layer, false, 0.2},
      {bf16, 2, 6, 1, 1, 35, none, false, 0},
      {bf16, 1, 32, 9, 1500, 8, layer, false, 0},
      {bf16, 1, 17, 20, 40, 128, batch, true, 0.1},
      {bf16, 1, 5, 70, 70, 64, layer, false, 0},
      {bf16, 1, 1, 33, 65, 1, none, false, 0},
      {bf16, 2, 6, 20, 30, 24, batch, false, 0},
      {bf16, 1, 12, 9, 1500, 8, batch, true, 0},
      {f32, 2, 6, 20, 70, 24, layer, false, 0, MaskKind::kBool, true},
      {f32, 2, 6, 20, 30, 24, batch, true, 0, MaskKind::kFloat, false},
      {bf16, 2, 6, 40, 70, 24, layer, false, 0.1, MaskKind::kBool, false},
      {bf16, 2, 6, 20, 30, 24, batch, true, 0, MaskKind::kFloat, true},
      {bf16, 1, 5, 70, 50, 33, none, false, 0, MaskKind::kNone, true},
      {bf16, 1, 32, 9, 1500, 8, layer, false, 0, MaskKind::kFloat, false},
      {f32, 2, 6, 20, 70, 24, layer, false, 0.1, MaskKind::kBool, true, 9, true},
      {f32, 1, 12, 9, 1500, 8, batch, true, 0, MaskKind::kNone, false, 5, true},
      {bf16, 2, 3, 17, 33, 16, batch, true, 0, MaskKind::kBool, false, 7, true},
      {bf16, 2, 6, 20, 30, 24, layer, false, 0, MaskKind::kFloat, true, 0, true},
      {bf16, 1, 32, 9, 1500, 8, none, false, 0, MaskKind::kNone, false, 17, true},
  };
  const char* names[] = {"out",      "lse",        "statistics",      "running",        "grad_query",
                         "grad_key", "grad_value", "grad_parameters", "grad_pre_theta", "grad_mask"};
  int wrong = 0, compared = 0;
  set_whole_bytes(512 << 10);  // rows of 1500 keys are cut
  std::vector<InstructionSet> sets = instruction_sets();
#if defined(REATTN_EMULATED)
  sets.push_back({"emulated bf16", &emulated_dots::kFloat32, &emulated_dots::kBFloat16, true});
  sets.push_back({"emulated amx", &emulated_amx::kFloat32, &emulated_amx::kBFloat16, true});
#endif
  if (saves) {
    for (const Case& c : cases) save(file, run(*sets[0].float32, c, 1));
    return std::fclose(file) != 0;
  }
  for (const InstructionSet& set : sets) {
    if (file) std::rewind(file);
    if (!set.runs_here) {
      std::printf("%s: this CPU does not run it\n", set.name.c_str());
      continue;
    }
    for (const Case& c : cases) {
      const bool rounded = c.dtype == bf16 && set.bfloat16;
      const Results here = run(*sets[0].float32, c, 1), right = file ? load(file, here) : here,
                    found = run(rounded ? *set.bfloat16 : *set.float32, c, 1);
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
      std::printf("%-13s %s %ldx%ldx%ldx%ldx%ld%s%s%s%s%s: %.2g in %s%s\n", set.name.c_str(),
                  c.dtype == f32 ? "float32 " : "bfloat16", long(c.batch), long(c.heads), long(c.seqlen),
                  long(c.seqlen_k), long(c.head_dim),
                  c.norm == none    ? ""
                  : c.norm == layer ? " layer"
                                    : " batch",
                  c.training ? " training" : "", c.dropout_p > 0 ? " dropout" : "",
                  c.mask == MaskKind::kNone   ? ""
                  : c.mask == MaskKind::kBool ? " boolean mask"
                                              : " added mask",
                  c.causal ? " causal" : "", worst, where, right_enough ? "" : "  WRONG");
      std::fflush(stdout);
    }
  }
  std::printf("%d comparisons, %d wrong\n", compared, wrong);
  return wrong > 0;
}
