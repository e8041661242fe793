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

#include "driver.h"
#include "kernels.cpp"
#include "parallel.h"

using namespace reattn;
using namespace reattn::REATTN_ISA;

namespace {

double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

// Operations a second of independent multiply-adds out of registers, as A's products do them: the best of several
// tries.
template <class A>
double peak(double terms) {
  double best = 0;
  for (int trial = 0; trial < 10; trial++) {
    constexpr int kChains = 12, kRounds = 1000000;
    Vec sums[kChains] = {};
    typename A::Words left{}, right{};
    const double start = seconds();
    for (int i = 0; i < kRounds; i++)
#pragma GCC unroll 12
      for (int c = 0; c < kChains; c++) {
        asm volatile("" : "+v"(left));  // not the same product for all
        sums[c] = A::add(sums[c], left, right);
      }
    Vec total = sums[0];
    for (int c = 1; c < kChains; c++) total += sums[c];
    volatile float used = total[0];
    (void)used;
    best = std::max(best, 2.0 * terms * kLanes * kChains * kRounds / (seconds() - start));
  }
  return best;
}

// Name of a stage -> the least time it took, over repetitions, in the order of first use.
class Stages {
 public:
  // Without what stages within it take.
  template <class Work>
  void time(const std::string& name, double operations, Work work) {
    if (!now_.count(name)) order_.push_back(name);
    const double start = seconds(), before = within_;
    work();
    const double all = seconds() - start;
    now_[name] += all - (within_ - before);
    within_ = before + all;
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
  double within_ = 0;
};

std::vector<float> random_values(int64_t count) {
  static std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(size_t(count), 0.0f);
  for (float& value : values) value = normal(generator);
  return values;
}

Stages stages;
// Operations of a product of all maps with query, key or value, and with the weights.
double in_products, in_mixing;

// The operations of a stage, in all units.
double operations(const std::string& stage) {
  if (stage == "mixing and norm") return in_mixing;
  if (stage == "softmax, mixing, norm and back") return 3 * in_mixing;
  if (stage == "gradients of keys and values") return 2 * in_products;
  for (const char* one :
       {"sweep for the LSE", "scores", "gradients of the maps", "product with values", "gradient of queries"})
    if (stage == one) return in_products;
  return 0;
}

// Takes the place of Untimed.
struct Timed {
  template <class Work>
  void operator()(const char* name, Work work) const {
    stages.time(name, operations(name), work);
  }
};

template <class E>
void timed_pack(const Job& job, int64_t unit, bool backward) {
  stages.time("pack keys and values", 0, [&] { pack<E>(job, unit, backward); });
}
void timed_reduce(const Job& job, int64_t unit) {
  stages.time("store gradients of keys, values", 0, [&] { reduce(job, unit); });
}
void timed_finish(const Job& job, int64_t unit) {
  stages.time("finish the output", 0, [&] { finish(job, unit); });
}
void timed_grad_sums(const Job& job, int64_t unit) {
  stages.time("sums for the statistics", 0, [&] { grad_sums(job, unit); });
}

template <class E>
Kernels timed(Kernels kernels) {
  kernels.pack = timed_pack<E>, kernels.reduce = timed_reduce;
  kernels.forward = forward<E, Timed>, kernels.backward = backward<E, Timed>;
  kernels.finish = timed_finish, kernels.grad_sums = timed_grad_sums;
  return kernels;
}

// What threads that took the units as they came would take for all parallel regions, and what they would work of it.
double elapsed, worked;

void run(Call call, const char* direction, void (*work)(const Call&), double rate, int repetitions) {
  stages = {};
  for (int i = 0; i < repetitions; i++) {
    stages.time("all but the stages", 0, [&] { work(call); });
    stages.end_repetition();
  }
  stages.print(direction, rate);
  for (const int threads : {2, 8, 64}) {
    call.threads = threads;
    double best = 0, busy = 0;
    for (int i = 0; i < repetitions; i++) {
      elapsed = worked = 0;
      work(call);
      if (i > 0 && elapsed > best) continue;
      best = elapsed, busy = worked / (threads * elapsed);
    }
    std::printf("  by %2d threads %31.2f%17.0f %% busy\n", threads, 1e3 * best, 100 * busy);
  }
}

}  // namespace

// In the place of parallel.cpp: one thread does all units, whose times tell what more would take.
void reattn::parallel_for(int threads, int64_t units, const std::function<void(int, int64_t)>& work) {
  std::vector<double> ends(size_t(std::max(threads, 1)), 0.0);
  for (int64_t unit = 0; unit < units; unit++) {
    const auto next = std::min_element(ends.begin(), ends.end());
    const double start = seconds();
    work(int(next - ends.begin()), unit);
    *next += seconds() - start;
  }
  if (threads == 1) return;  // a region within one, or a run by one thread
  elapsed += *std::max_element(ends.begin(), ends.end());
  for (const double end : ends) worked += end;
}

// Arguments: dtype, norm, batch, heads, seqlen, head_dim, repetitions.
int main(int count, char** arguments) {
  if (count != 8) return 2;
  const std::string dtype = arguments[1], norm = arguments[2];
  const auto argument = [&](int i) { return int64_t(std::atoll(arguments[i])); };
  const int64_t batch = argument(3), heads = argument(4), seqlen = argument(5), dim = argument(6);
  const double maps = double(batch * heads * seqlen * seqlen);
  in_products = 2 * maps * double(dim), in_mixing = 2 * maps * double(heads);

  Kernels kernels = timed<Float32>(kFloat32);
  double rate = peak<Floats>(1);
  const bool half = dtype == "bfloat16";
#if defined(REATTN_BFLOAT16)
#if defined(REATTN_AMX)
  using Products = BFloat16Tiles;
#else
  using Products = BFloat16Dots;
#endif
  if (half) kernels = timed<Products>(kBFloat16), rate = peak<BFloat16Pairs>(2);
#endif
  std::printf("%ldx%ldx%ldx%ld %s, %s norm, one thread; multiply-adds out of registers: %.1f GFLOP/s\n", long(batch),
              long(heads), long(seqlen), long(dim), dtype.c_str(), norm.c_str(), 1e-9 * rate);

  std::vector<float> projection = random_values(batch * seqlen * 4 * heads * dim), theta = random_values(heads * heads),
                     vector(size_t(heads), 1.0f);
  if (half)
    for (size_t i = 0; i < projection.size(); i += kLanes)
      store_as(reinterpret_cast<uint16_t*>(projection.data()) + i, to_bfloat16(load(projection.data() + i)));
  const size_t elements = size_t(batch * seqlen * heads * dim);
  std::vector<float> out(elements), grads(3 * elements), lse(size_t(batch * heads * seqlen)),
      value_sum(size_t(batch * heads * dim)), grad_theta(theta), grad_vectors(3 * vector.size());
  const auto view = [&](std::vector<float>& data, int64_t parts, int64_t part) {
    const int64_t row = parts * heads * dim, first = part * heads * dim;
    char* address = reinterpret_cast<char*>(data.data()) + first * (half ? 2 : 4);
    return Tensor{address, seqlen * row, dim, row, 1};
  };
  Call call{};
  call.kernels = &kernels, call.threads = 1;
  Problem& p = call.problem;
  p.dtype = half ? Dtype::kBFloat16 : Dtype::kFloat32;
  p.batch = batch, p.heads = p.heads_out = heads, p.seqlen = p.seqlen_k = seqlen, p.head_dim = dim;
  p.scale = 1.0f / __builtin_sqrtf(float(dim));
  p.query = view(projection, 4, 0), p.key = view(projection, 4, 1), p.value = view(projection, 4, 2);
  p.grad = view(projection, 4, 3), p.out = view(out, 1, 0);
  p.grad_query = view(grads, 3, 0), p.grad_key = view(grads, 3, 1), p.grad_value = view(grads, 3, 2);
  p.lse = lse.data(), p.value_sum = value_sum.data();
  Parameters& parameters = call.parameters;
  std::vector<double> statistics(size_t(3 * heads));
  parameters.theta = theta.data(), parameters.bias = parameters.norm_weight = parameters.norm_bias = vector.data();
  parameters.statistics = statistics.data();
  parameters.norm = norm == "layer" ? Norm::kLayer : norm == "batch" ? Norm::kBatch : Norm::kNone;
  parameters.training = true, parameters.heads = parameters.heads_out = int(heads);
  parameters.output_scale = parameters.unit_scale = 1, parameters.eps = 1e-5f;
  call.grad_theta = grad_theta.data(), call.grad_bias = grad_vectors.data();
  call.grad_norm_weight = call.grad_bias + heads, call.grad_norm_bias = call.grad_norm_weight + heads;
  run(call, "forward", run_forward, rate, int(argument(7)));
  run(call, "backward", run_backward, rate, int(argument(7)));
  return 0;
}
