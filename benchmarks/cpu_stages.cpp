// Where the time of the CPU kernels goes: each stage of a unit of work, on one thread, beside what its arithmetic would
// take at the rate that multiply-adds out of registers reach. Compiled and run by benchmarks/cpu_stages.py.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "kernels.cpp"

using namespace reattn;
using namespace reattn::REATTN_ISA;

namespace {

double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

// Operations a second of independent multiply-adds, the best of several tries.
double peak() {
  double best = 0;
  for (int trial = 0; trial < 10; trial++) {
    constexpr int kChains = 12, kRounds = 2000000;
    const Vec factor = broadcast(0.999f), term = broadcast(1e-3f);
    Vec sums[kChains];
    for (int c = 0; c < kChains; c++) sums[c] = broadcast(float(c));
    const double start = seconds();
    for (int i = 0; i < kRounds; i++)
#pragma GCC unroll 12
      for (int c = 0; c < kChains; c++) sums[c] = sums[c] * factor + term;
    Vec total = sums[0];
    for (int c = 1; c < kChains; c++) total += sums[c];
    volatile float used = total[0];
    (void)used;
    best = std::max(best, 2.0 * kLanes * kChains * kRounds / (seconds() - start));
  }
  return best;
}

// Name of a stage -> the least time it took, over repetitions, in the order of first use.
class Stages {
 public:
  template <class Work>
  void time(const std::string& name, double operations, Work work) {
    if (!now_.count(name)) order_.push_back(name);
    const double start = seconds();
    work();
    now_[name] += seconds() - start;
    operations_[name] = operations;
  }
  void end_repetition() {
    for (const std::string& name : order_) {
      best_[name] = best_.count(name) ? std::min(best_[name], now_[name]) : now_[name];
      now_[name] = 0;
    }
  }
  void print(const char* title, double rate) const {
    std::printf("%s\n  %-34s%10s%10s%12s\n", title, "stage", "ms", "GFLOP/s", "% of peak");
    double total = 0, operations = 0;
    for (const std::string& name : order_) {
      line(name, best_.at(name), operations_.at(name), rate);
      total += best_.at(name);
      operations += operations_.at(name);
    }
    line("all", total, operations, rate);
  }

 private:
  static void line(const std::string& name, double time, double operations, double rate) {
    if (operations > 0)
      std::printf("  %-34s%10.2f%10.1f%12.0f\n", name.c_str(), 1e3 * time, 1e-9 * operations / time,
                  100 * operations / time / rate);
    else
      std::printf("  %-34s%10.2f\n", name.c_str(), 1e3 * time);
  }

  std::vector<std::string> order_;
  std::map<std::string, double> now_, best_, operations_;
};

std::vector<float> random_values(int64_t count) {
  static std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(size_t(count), 0.0f);
  for (float& value : values) value = normal(generator);
  return values;
}

char* zeros(int64_t bytes) {
  char* memory = static_cast<char*>(std::aligned_alloc(64, size_t(round_up(bytes, 64))));
  std::memset(memory, 0, size_t(bytes));
  return memory;
}

}  // namespace

// Arguments: batch heads seqlen head_dim, rows of a forward and of a backward block.
int main(int count, char** arguments) {
  if (count != 7) return 2;
  const auto argument = [&](int i) { return int64_t(std::atoll(arguments[i])); };
  const int64_t batch = argument(1), heads = argument(2), seqlen = argument(3), dim = argument(4);
  const double rate = peak(), maps = double(batch * heads * seqlen * seqlen);
  std::printf("%ldx%ldx%ldx%ld float32, layer norm, one thread; multiply-adds out of registers: %.1f GFLOP/s\n",
              long(batch), long(heads), long(seqlen), long(dim), 1e-9 * rate);

  const std::vector<float> projection = random_values(batch * seqlen * 4 * heads * dim),
                           weight = random_values(heads * heads), vector = random_values(heads);
  std::vector<float> out(size_t(batch * seqlen * heads * dim)), grads(3 * out.size()),
      lse(size_t(batch * heads * seqlen));
  const auto view = [&](const float* data, int64_t parts, int64_t part) {
    return Tensor{const_cast<float*>(data) + part * heads * dim, seqlen * parts * heads * dim, dim, parts * heads * dim,
                  1};
  };
  Problem p{};
  p.dtype = Dtype::kFloat32;
  p.batch = batch, p.heads = heads, p.seqlen = p.seqlen_k = seqlen, p.head_dim = dim;
  p.scale = 1.0f / __builtin_sqrtf(float(dim));
  p.query = view(projection.data(), 4, 0), p.key = view(projection.data(), 4, 1),
  p.value = view(projection.data(), 4, 2);
  p.grad = view(projection.data(), 4, 3), p.out = view(out.data(), 1, 0);
  p.grad_query = view(grads.data(), 3, 0), p.grad_key = view(grads.data(), 3, 1),
  p.grad_value = view(grads.data(), 3, 2);
  p.lse = lse.data();
  Mixing mixing{};
  mixing.weight = weight.data(), mixing.shift = mixing.gamma = mixing.beta = vector.data();
  mixing.over_heads = true, mixing.eps = 1e-5f;

  for (const bool backward : {false, true}) {
    Plan plan{};
    plan.keys = round_up(seqlen, kLanes);
    plan.packed_keys = round_up(plan.keys, kPanel);
    plan.ld_keys = plan.ld_block = 16 * ((plan.keys + 15) / 16 | 1);
    plan.ld_dim = round_up(dim, kLanes);
    plan.depth = dim;
    plan.block_rows = argument(backward ? 6 : 5);
    plan.block_keys = seqlen;
    plan.tile_keys = round_up(smaller(plan.keys, 12 * 1024 / 4 / heads), kLanes);
    plan.groups = 1;
    plan.group_ends[0] = seqlen;
    plan.wave = batch;
    Job job{p, mixing, plan, {}, 0, batch, 0};
    const int64_t columns = batch * heads * plan.packed_keys * dim * 4,
                  rows = batch * heads * plan.keys * plan.ld_dim * 4;
    const int64_t gradient = heads * dim * plan.ld_keys;
    job.work.key_columns = zeros(columns), job.work.value_rows = zeros(rows);
    if (backward) {
      job.work.value_columns = zeros(columns), job.work.key_rows = zeros(rows);
      job.work.grad_key = reinterpret_cast<float*>(zeros(4 * batch * gradient));
      job.work.grad_value = reinterpret_cast<float*>(zeros(4 * batch * gradient));
    }
    Scratch<Float32> scratch(job, backward, zeros(int64_t(scratch_bytes<Float32>(job, backward))));
    if (backward) std::memset(scratch.products, 0, size_t((heads + 1) * heads) * sizeof(Vec));
    std::memset(scratch.norm_sums, 0, size_t(2 * heads) * sizeof(Vec));
    const int64_t stretches = batch * ((plan.keys + kStretch - 1) / kStretch);

    Stages stages;
    for (int repetition = 0; repetition < 20; repetition++) {
      stages.time("pack keys and values", 0, [&] {
        for (int64_t i = 0; i < stretches; i++) pack<Float32>(job, i, backward);
      });
      for (int64_t sample = 0; sample < batch; sample++)
        for (int64_t row = 0; row < seqlen; row += plan.block_rows) {
          const int64_t height = smaller(plan.block_rows, seqlen - row);
          Block<Float32> block(job, scratch, sample, row, height);
          stages.time(backward ? "load queries and gradients" : "load queries", 0,
                      [&] { block.load_queries(backward); });
          block.set_keys(0);
          stages.time("scores", 2 * maps * double(dim), [&] { block.compute_scores(); });
          if (!backward) {
            const float* weights = nullptr;
            for (int64_t r = 0; r < height; r++) {
              stages.time("softmax", 0, [&] {
                block.softmax(r, false, false);
                weights = block.weights(false);
              });
              stages.time("mixing and norm", 2 * maps * double(heads), [&] { block.mix(r, weights); });
            }
            stages.time("product with values", 2 * maps * double(dim), [&] { block.multiply_values(); });
            stages.time("store the output", 0, [&] { block.store_outs(p.out); });
            continue;
          }
          stages.time("gradients of the maps", 2 * maps * double(dim), [&] { block.compute_grad_maps(); });
          stages.time("softmax, mixing, norm and back", 6 * maps * double(heads), [&] {
            for (int64_t r = 0; r < height; r++) block.backward_row(r, true, true);
          });
          stages.time("gradients of keys and values", 4 * maps * double(dim), [&] {
            block.add_grad_columns(job.work.grad_key + sample * gradient, job.work.grad_value + sample * gradient,
                                   row == 0);
          });
          stages.time("gradient of queries", 2 * maps * double(dim), [&] { block.multiply_keys(); });
          stages.time("store the gradient of queries", 0, [&] { block.store_outs(p.grad_query); });
        }
      if (backward)
        stages.time("store gradients of keys, values", 0, [&] {
          for (int64_t i = 0; i < stretches; i++) reduce(job, i);
        });
      stages.end_repetition();
    }
    stages.print(backward ? "backward" : "forward", rate);
  }
  return 0;
}
