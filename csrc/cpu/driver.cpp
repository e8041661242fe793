#include "driver.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include <pthread.h>
#include <unistd.h>

#include "parallel.h"

namespace reattn {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }
int64_t elements_of_mask(const Problem& p) {
  const int64_t* sizes = p.mask.sizes;
  return sizes[0] * sizes[1] * sizes[2] * sizes[3];
}

// Rows that far apart fall into different sets of the L1 cache.
int64_t spread(int64_t row) {
  const int64_t sixteens = ceil_div(row, 16);
  return 16 * (sixteens | 1);
}

// What the maps of a block should take, with their gradients in the backward pass. Larger blocks are read from farther
// away, but keys, values and their gradients less often.
constexpr int64_t kForwardBytes = 384 << 10, kBackwardBytes = 512 << 10, kLongBytes = 5 << 20;
// Of the L1 cache, the maps that are mixed at a time.
constexpr int64_t kTileBytes = 12 << 10;
// The keys of a block that does not have all: fewer would leave short loops.
constexpr int64_t kStretchOfKeys = 384;
// Of the L3 cache, the packed keys and values of a wave; of memory, the gradients of all units.
constexpr int64_t kWaveBytes = 16 << 20, kGroupBytes = 192 << 20;
// What a thread that takes whole samples may have for one.
constexpr int64_t kAloneBytes = 64 << 20;
// Units of work that the gradient of a mask which samples share is summed by, if memory for the parts suffices.
constexpr int64_t kMaskUnits = 32;
// The blocks and the groups that a call has at least, if blocks do not become too low.
constexpr int64_t kFewestBlocks = 16, kFewestGroups = 4;
// The blocks of a group where there are many.
constexpr int64_t kBlocksOfGroup = 16;
// Units of work for each thread, so that all end at about one time.
constexpr int64_t kUnitsPerThread = 4;

// What the maps of a block may take for the sake of whole rows, which need one sweep over the keys instead of two: a
// core's share of the L3 cache, at least 5 MB and at most 12.
int64_t find_whole_bytes() {
#ifdef _SC_LEVEL3_CACHE_SIZE
  const int64_t share = sysconf(_SC_LEVEL3_CACHE_SIZE) / std::max(sysconf(_SC_NPROCESSORS_ONLN), 1L);
  return std::clamp(share, kLongBytes, int64_t(12) << 20);
#else
  return kLongBytes;
#endif
}
std::atomic<int64_t> whole_bytes{find_whole_bytes()};

// Cuts the blocks of a sample into groups that take about the same time: with a causal mask a row takes as long as it
// sees keys.
void cut_groups(const Problem& p, Plan& plan) {
  const double rows = double(p.seqlen), keys = double(p.seqlen_k), triangle = keys * keys / 2;
  const double work = rows < keys ? rows * rows / 2 : triangle + (rows - keys) * keys;
  for (int64_t group = 1; group <= plan.groups; group++) {
    const double before = work * double(group) / double(plan.groups);
    const double row = before < triangle ? std::sqrt(2 * before) : keys / 2 + before / keys;
    int64_t end = group * plan.blocks / plan.groups;
    if (p.mask.causal) end = std::max(int64_t(row) / plan.block_rows, group > 1 ? plan.group_ends[group - 2] + 1 : 1);
    plan.group_ends[group - 1] = std::min(end, plan.blocks - plan.groups + group);
  }
  plan.group_ends[plan.groups - 1] = plan.blocks;
}

// Whether the gradient of the mask can be written in place: each element is of one position.
bool grad_mask_in_place(const Problem& p) {
  const int64_t* sizes = p.mask.sizes;
  return sizes[0] == p.batch && sizes[2] == p.seqlen && sizes[3] == p.seqlen_k;
}

Plan make_plan(const Kernels& kernels, const Problem& p, bool backward, int64_t threads) {
  Plan plan{};
  plan.keys = round_up(p.seqlen_k, std::max(kernels.lanes, kernels.depth_multiple));
  plan.packed_keys = round_up(plan.keys, kernels.column_tile);
  plan.ld_keys = spread(plan.keys);
  plan.ld_dim = round_up(p.head_dim, kernels.lanes);
  plan.depth = round_up(p.head_dim, kernels.depth_multiple);

  const int64_t tile = kernels.row_tile, wanted_bytes = backward ? kBackwardBytes : kForwardBytes;
  const int64_t most_heads = std::max(p.heads, p.heads_out);
  const int64_t element_bytes = (backward ? 2 : 1) * most_heads * int64_t(sizeof(float));
  const int64_t row_bytes = element_bytes * plan.ld_keys;
  const int64_t fewest = 2 * tile, most = 8 * tile;
  const int64_t tall = std::clamp(kLongBytes / row_bytes, fewest, 4 * tile);
  plan.block_rows = std::clamp(wanted_bytes / row_bytes, tall, most);
  plan.block_keys = p.seqlen_k;
  if (tall * row_bytes > whole_bytes) {
    plan.block_rows = 4 * tile;
    plan.block_keys = kStretchOfKeys;
  }
  plan.ld_block = spread(round_up(plan.block_keys, kernels.lanes));
  const int64_t vectors = ceil_div(plan.block_keys, kernels.lanes);
  const int64_t tile_vectors = std::max<int64_t>(kTileBytes / (most_heads * kernels.lanes * int64_t(sizeof(float))), 1);
  plan.tile_keys = ceil_div(vectors, ceil_div(vectors, tile_vectors)) * kernels.lanes;
  const int64_t enough = ceil_div(p.batch * p.seqlen, kFewestBlocks), low = (backward ? 3 : 2) * tile;
  plan.block_rows = std::clamp(enough, std::min(low, plan.block_rows), plan.block_rows);
  plan.blocks = ceil_div(p.seqlen, plan.block_rows);
  plan.block_rows = round_up(ceil_div(p.seqlen, plan.blocks), tile);
  plan.blocks = ceil_div(p.seqlen, plan.block_rows);
  // A row of one head ends, in the sets of the L1 cache, where that of the next begins.
  constexpr int64_t kSets = 1024;  // floats
  plan.ld_head = plan.block_rows * plan.ld_block;
  plan.ld_head += (plan.ld_block + kSets - plan.ld_head % kSets) % kSets;

  const int64_t both_heads = p.heads + p.heads_out;
  const int64_t packed_bytes = both_heads * plan.packed_keys * plan.depth * kernels.operand_bytes;
  const int64_t grad_bytes = backward ? both_heads * plan.ld_keys * p.head_dim * int64_t(sizeof(float)) : 0;
  const bool sums_mask = backward && p.mask.grad && !grad_mask_in_place(p);
  const int64_t alone_bytes = (backward ? 2 : 1) * packed_bytes + 2 * grad_bytes;
  // Threads that would wait while others take their last sample are an eighth of all at most.
  plan.alone = !sums_mask && 8 * ceil_div(p.batch, threads) * threads <= 9 * p.batch &&
               threads * alone_bytes <= std::max(kGroupBytes, threads * kAloneBytes);
  plan.groups = 1;
  if (backward) {
    // What sums the gradient of a mask over samples takes these one after the other.
    const int64_t at_a_time = sums_mask && p.mask.sizes[0] < p.batch ? 1 : p.batch;
    const int64_t wanted = ceil_div(std::clamp(plan.blocks / kBlocksOfGroup, kFewestGroups, kMostGroups), at_a_time);
    plan.groups = std::clamp(std::min(wanted, kGroupBytes / grad_bytes), int64_t(1), plan.blocks);
    cut_groups(p, plan);
    int64_t largest = 0;
    for (int64_t g = 0; g < plan.groups; g++)
      largest = std::max(largest, plan.group_ends[g] - (g > 0 ? plan.group_ends[g - 1] : 0));
    // Besides the blocks of a group, the sum of the groups before it.
    const int64_t affordable = kGroupBytes / grad_bytes, least = std::min(largest + 1, plan.blocks);
    const int64_t together = kGroupBytes / (2 * packed_bytes + plan.groups * grad_bytes);
    const int64_t units = std::clamp(together, int64_t(1), p.batch) * plan.groups;
    plan.by_block = !sums_mask && !plan.alone && units < threads && least <= affordable;
    plan.slots = plan.alone ? std::min<int64_t>(plan.groups, 2) : plan.groups;
    if (plan.by_block) plan.slots = std::min({plan.blocks, affordable, std::max(least, 2 * threads)});
  }
  const int64_t sample_bytes = (backward ? 2 : 1) * packed_bytes + plan.slots * grad_bytes;
  const int64_t units = !backward || plan.by_block ? plan.blocks : plan.groups;
  // Where samples share the gradient of a mask, the parts that sum it depend on the wave.
  const int64_t by_threads = sums_mask ? 1 : ceil_div(kUnitsPerThread * threads, units);
  const int64_t enough_samples = std::max(kWaveBytes / sample_bytes, by_threads);
  plan.wave = plan.alone ? 1 : std::clamp<int64_t>(std::min(enough_samples, kGroupBytes / sample_bytes), 1, p.batch);
  plan.parts = plan.wave;
  if (sums_mask && p.mask.sizes[0] < p.batch) {
    const int64_t affordable = kGroupBytes / (int64_t(sizeof(double)) * elements_of_mask(p));
    plan.parts = std::clamp<int64_t>(std::min(ceil_div(kMaskUnits, plan.groups), affordable), 1, plan.wave);
  }
  return plan;
}

// Memory that calls leave for each other: fresh pages cost as much as the work on a small problem.
class Memory {
 public:
  Memory(size_t bytes, int64_t threads)
      : bytes_(round_up(int64_t(bytes), 64)), kept_bytes_(std::max(kKept, size_t(threads) * kKeptByThread)) {
    std::lock_guard<std::mutex> lock(mutex());
    std::vector<Part>& parts = kept();
    auto best = parts.end();
    for (auto part = parts.begin(); part != parts.end(); ++part)
      if (part->bytes >= bytes_ && (best == parts.end() || part->bytes < best->bytes)) best = part;
    if (best != parts.end()) {
      data_ = best->data;
      bytes_ = best->bytes;
      parts.erase(best);
      return;
    }
    data_ = static_cast<char*>(std::aligned_alloc(64, bytes_));
    if (!data_) throw std::bad_alloc();
  }
  ~Memory() {
    std::lock_guard<std::mutex> lock(mutex());
    std::vector<Part>& parts = kept();
    parts.push_back({data_, bytes_});
    size_t total = 0;
    for (const Part& part : parts) total += part.bytes;
    for (; total > kept_bytes_; parts.erase(parts.begin())) {
      total -= parts.front().bytes;
      std::free(parts.front().data);
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data() const { return data_; }

  static void free_kept() {
    std::lock_guard<std::mutex> lock(mutex());
    for (const Part& part : kept()) std::free(part.data);
    kept().clear();
  }

 private:
  struct Part {
    char* data;
    size_t bytes;
  };
  static constexpr size_t kKept = 128 << 20, kKeptByThread = 32 << 20;

  // Neither is ever destroyed: threads may outlive what is static.
  static std::vector<Part>& kept() {
    static auto* parts = new std::vector<Part>;
    return *parts;
  }
  static std::mutex& mutex() {
    static auto* mutex = new std::mutex;
    // A fork must not leave it locked by a thread that the child does not have.
    static const int registered =
        pthread_atfork([] { mutex->lock(); }, [] { mutex->unlock(); }, [] { mutex->unlock(); });
    (void)registered;
    return *mutex;
  }

  char* data_ = nullptr;
  size_t bytes_, kept_bytes_;
};

// The norm as the kernels take it.
class Folded {
 public:
  Folded(const Call& call, bool backward) : fold_{call.parameters, backward}, heads_out_(call.parameters.heads_out) {
    const Parameters& p = call.parameters;
    vectors_ = size_t(p.heads * heads_out_);
    memory_.resize(vectors_ + size_t(7 * heads_out_));
    float *weight = memory_.data(), *shift = weight + vectors_;
    for (int h = 0; h < p.heads; h++) {
      const float mean = fold_.row_mean(h);
      for (int g = 0; g < heads_out_; g++) weight[h * heads_out_ + g] = (p.theta[h * heads_out_ + g] - mean);
    }
    for (int g = 0; g < heads_out_; g++) {
      const float factor = fold_.column_factor(g);
      float sum = 0;
      for (int h = 0; h < p.heads; h++) sum += weight[h * heads_out_ + g] *= factor;
      shift[g] = fold_.shift(g, sum);
    }
    mixing.of_scores = call.pre_theta;
    mixing.weight = weight, mixing.shift = shift;
    mixing.eps = p.eps;
    mixing.over_heads = p.norm == Norm::kLayer;
    mixing.sum_maps = fold_.batch_statistics() && !backward;
    if (!fold_.has_gamma()) return;
    mixing.gamma = fill(0, [&](int g) { return fold_.gamma(g); });
    mixing.beta = fill(1, [&](int g) { return fold_.beta(g); });
    if (!fold_.batch_statistics()) return;
    mixing.common = fill(2, [&](int g) { return fold_.common(g); });
    mixing.along = fill(3, [&](int g) { return fold_.along(g); });
  }

  // With the statistics that are final by now.
  void set_output() {
    const double *offset = fold_.p.statistics, *inverse = offset + heads_out_;
    mixing.slope = fill(4, [&](int g) { return fold_.slope(g, inverse[g]); });
    mixing.level = fill(5, [&](int g) { return fold_.level(g, inverse[g], offset[g]); });
  }

  Mixing mixing{};

 private:
  template <class Function>
  const float* fill(int which, Function function) {
    float* vector = memory_.data() + vectors_ + size_t((1 + which) * heads_out_);
    for (int g = 0; g < heads_out_; g++) vector[g] = function(g);
    return vector;
  }

  Fold fold_;
  int heads_out_;
  size_t vectors_;  // where they begin
  std::vector<float> memory_;
};

// Work on one wave of samples after the other; or, where each thread takes whole samples, on as many as threads.
class Run {
 public:
  Run(const Call& call, const Mixing& mixing, bool backward)
      : kernels_(*call.kernels), backward_(backward), threads_(std::max(call.threads, 1)) {
    job_.problem = call.problem, job_.mixing = mixing;
    job_.plan = make_plan(kernels_, call.problem, backward, threads_);
  }

  // sums: numbers that a block leaves; values: sums of the values are wanted, and all queries see the same.
  void run(int64_t sums, bool values) {
    const Problem& p = job_.problem;
    const Plan& plan = job_.plan;
    const int64_t stretches_of_keys = ceil_div(plan.keys, kernels_.stretch);
    const int64_t threads = std::min<int64_t>(threads_, plan.alone ? p.batch : plan.wave * plan.blocks);
    // Of a head of every sample.
    const int64_t columns = plan.wave * plan.packed_keys * plan.depth * kernels_.operand_bytes;
    const int64_t rows = plan.wave * plan.keys * plan.ld_dim * kernels_.operand_bytes;
    const int64_t grads = backward_ ? plan.wave * plan.slots * plan.ld_keys * p.head_dim * int64_t(sizeof(float)) : 0;
    const int64_t sizes[] = {p.heads * columns,
                             backward_ ? 0 : p.heads_out * rows,
                             backward_ ? p.heads_out * columns : 0,
                             backward_ ? p.heads * rows : 0,
                             p.heads * grads,
                             p.heads_out * grads,
                             p.mask.any() && !backward_ ? plan.wave * p.heads_out * plan.keys : 0};
    constexpr int kParts = sizeof sizes / sizeof *sizes;
    int64_t wave_bytes = 0;
    for (int64_t size : sizes) wave_bytes += round_up(size, 64);
    wave_bytes = round_up(wave_bytes, 4096) + 64;
    const int64_t scratch = round_up(int64_t(kernels_.scratch_bytes(job_, backward_)), 4096) + 64;
    const int64_t value_sums =
        values ? p.batch * stretches_of_keys * p.heads_out * p.head_dim * int64_t(sizeof(float)) : 0;
    const int64_t waves = plan.alone ? threads : 1;
    Memory memory(size_t(waves * wave_bytes + threads * scratch + value_sums), threads);
    char* const scratches = memory.data() + waves * wave_bytes;
    job_.partial_size = sums;
    partial_.resize(size_t(p.batch * plan.blocks * sums));
    float* const all_values = values ? reinterpret_cast<float*>(scratches + threads * scratch) : nullptr;
    double* const grad_mask = p.mask.grad && !grad_mask_in_place(p) ? make_grad_masks() : nullptr;

    // A job for the samples from first on, in one of the memories of a wave.
    const auto wave_from = [&](int64_t first, int64_t wave) {
      char* parts[kParts];
      char* at = memory.data() + wave * wave_bytes;
      for (int i = 0; i < kParts; i++) {
        parts[i] = sizes[i] ? at : nullptr;
        at += round_up(sizes[i], 64);
      }
      Job job = job_;
      job.first = first, job.samples = std::min(plan.wave, p.batch - first);
      job.work = {parts[0],
                  parts[3],
                  parts[2],
                  parts[1],
                  reinterpret_cast<float*>(parts[4]),
                  reinterpret_cast<float*>(parts[5]),
                  all_values,
                  partial_.data() + first * plan.blocks * sums,
                  reinterpret_cast<uint8_t*>(parts[6]),
                  grad_mask};
      return job;
    };
    const auto run_wave = [&](Job job, int threads_of_wave, char* first_scratch) {
      const int64_t stretches = job.samples * stretches_of_keys, parts = std::min(job.samples, plan.parts);
      const auto scratch_of = [&](int thread) { return first_scratch + thread * scratch; };
      parallel_for(threads_of_wave, stretches, [&](int, int64_t unit) { kernels_.pack(job, unit, backward_); });
      if (!backward_)
        return parallel_for(threads_of_wave, job.samples * plan.blocks,
                            [&](int thread, int64_t unit) { kernels_.forward(job, unit, scratch_of(thread)); });
      for (job.first_group = 0; job.first_group < plan.groups; job.first_group = job.end_group) {
        // As many groups as there are slots for, one at least.
        for (job.end_group = job.first_group + 1;
             job.end_group < plan.groups && job.slot(job.units_until(job.end_group + 1)) <= plan.slots;)
          job.end_group++;
        parallel_for(threads_of_wave, parts * job.units(),
                     [&](int thread, int64_t unit) { kernels_.backward(job, unit, scratch_of(thread)); });
        parallel_for(threads_of_wave, stretches, [&](int, int64_t unit) { kernels_.reduce(job, unit); });
      }
    };
    if (plan.alone)
      parallel_for(int(threads), p.batch, [&](int thread, int64_t sample) {
        run_wave(wave_from(sample, thread), 1, scratches + thread * scratch);
      });
    else
      for (int64_t first = 0; first < p.batch; first += plan.wave) run_wave(wave_from(first, 0), threads_, scratches);
    if (values) add_up_values(all_values, stretches_of_keys);
    if (!grad_masks_.empty()) add_up_grad_masks();
  }

  // Where queries see different keys: the sums of the values that each sees.
  void sum_seen_values() const {
    const Problem& p = job_.problem;
    parallel_for(threads_, p.batch * p.heads_out * stretches_of_queries(p, kernels_.stretch),
                 [&](int, int64_t unit) { kernels_.sum_values(job_, unit); });
  }

  // The blocks' sums, added in their order.
  std::vector<double> sums() const {
    std::vector<double> total(size_t(job_.partial_size));
    for (size_t i = 0; i < partial_.size(); i++) total[i % total.size()] += partial_[i];
    return total;
  }

 private:
  void add_up_values(const float* of_stretches, int64_t stretches) const {
    const Problem& p = job_.problem;
    const int64_t size = p.heads_out * p.head_dim;
    for (int64_t sample = 0; sample < p.batch; sample++) {
      const float* from = of_stretches + sample * stretches * size;
      float* to = p.value_sum + sample * size;
      std::copy_n(from, size, to);
      for (int64_t stretch = 1; stretch < stretches; stretch++)
        for (int64_t i = 0; i < size; i++) to[i] += from[stretch * size + i];
    }
  }

  // A gradient of the mask for all that sum one on their own: parts where samples share it, groups where rows do.
  double* make_grad_masks() {
    const Problem& p = job_.problem;
    const int64_t *sizes = p.mask.sizes, parts = sizes[0] < p.batch ? job_.plan.parts : 1,
                  groups = sizes[2] < p.seqlen ? job_.plan.groups : 1;
    grad_masks_.resize(size_t(parts * groups * elements_of_mask(p)));
    return grad_masks_.data();
  }
  void add_up_grad_masks() const {
    const size_t size = size_t(elements_of_mask(job_.problem)), piece = 4096;
    parallel_for(threads_, ceil_div(int64_t(size), piece), [&](int, int64_t unit) {
      for (size_t i = size_t(unit) * piece; i < std::min(size, size_t(unit + 1) * piece); i++) {
        double sum = 0;
        for (size_t at = i; at < grad_masks_.size(); at += size) sum += grad_masks_[at];
        job_.problem.mask.grad[i] = float(sum);
      }
    });
  }

  const Kernels& kernels_;
  Job job_{};
  bool backward_;
  int threads_;
  std::vector<double> partial_, grad_masks_;
};

}  // namespace

void run_forward(const Call& call) {
  const Problem& p = call.problem;
  const Parameters& parameters = call.parameters;
  const Folded folded(call, false);
  const bool sums = folded.mixing.sum_maps;
  const int64_t heads = p.heads_out;
  std::vector<double> found(size_t(3 * heads));
  if (p.batch * p.seqlen > 0) {
    Run run(call, folded.mixing, false);
    run.run(sums ? 3 * heads : 0, sums && p.value_rows == 1);
    if (sums && p.value_rows > 1) run.sum_seen_values();
    if (sums) found = run.sums();
  } else if (sums) {
    std::fill_n(p.value_sum, p.batch * heads * p.value_rows * p.head_dim, 0.0f);
  }
  if (!sums) return;
  for (int g = 0; g < heads; g++) {
    const double positions = found[size_t(2 * heads + g)];
    const RawSums raw(parameters, g, found[size_t(g)], found[size_t(heads + g)], positions);
    parameters.statistics[g] = raw.sum;
    parameters.statistics[heads + g] = raw.squares;
    parameters.statistics[2 * heads + g] = positions;
  }
  if (!call.synchronised) run_finish(call);
}

void run_finish(const Call& call) {
  const Problem& p = call.problem;
  const Parameters& parameters = call.parameters;
  const int64_t heads = p.heads_out;
  for (int g = 0; g < heads; g++) {
    const double positions = parameters.statistics[2 * heads + g];
    const Moments moments(parameters.statistics[g], parameters.statistics[heads + g], positions, parameters.eps);
    update_running(parameters, moments, positions, g);
    parameters.statistics[g] = moments.mean - mixed_centre(parameters, g);
    parameters.statistics[heads + g] = moments.inverse_deviation;
  }
  if (parameters.num_batches_tracked) ++*parameters.num_batches_tracked;
  Folded folded(call, false);
  folded.set_output();
  Job job{};
  job.problem = p, job.mixing = folded.mixing;
  parallel_for(call.threads, p.batch * ceil_div(p.seqlen, call.kernels->stretch),
               [&](int, int64_t unit) { call.kernels->finish(job, unit); });
}

void run_grad_sums(const Call& call) {
  const Problem& p = call.problem;
  const int64_t units = p.batch * ceil_div(p.seqlen, call.kernels->stretch), numbers = 2 * p.heads_out;
  std::vector<double> partial(size_t(units * numbers));
  Job job{};
  job.problem = p, job.partial_size = numbers, job.work.partial = partial.data();
  parallel_for(call.threads, units, [&](int, int64_t unit) { call.kernels->grad_sums(job, unit); });
  std::fill_n(call.parameters.grad_sums, numbers, 0.0);
  for (size_t i = 0; i < partial.size(); i++) call.parameters.grad_sums[i % size_t(numbers)] += partial[i];
}

void run_backward(const Call& call) {
  const Problem& p = call.problem;
  const Parameters& parameters = call.parameters;
  Call given = call;
  const int64_t heads_out = p.heads_out;
  std::vector<double> grad_sums(size_t(2 * heads_out));
  if (parameters.norm == Norm::kBatch && parameters.training && !parameters.grad_sums) {
    given.parameters.grad_sums = grad_sums.data();
    run_grad_sums(given);
  }
  const Folded folded(given, true);
  Run run(given, folded.mixing, true);
  run.run(gradient_sums(p, folded.mixing), false);
  const std::vector<double> sums = run.sums();
  const Fold fold{given.parameters, true};
  const double *of_theta = sums.data(), *of_shift = of_theta + p.heads * heads_out, *of_gamma = of_shift + heads_out,
               *of_beta = of_gamma + heads_out, *of_scores = of_beta + heads_out;
  for (int64_t i = 0; call.grad_pre_theta && i < p.heads * p.heads; i++)
    call.grad_pre_theta[i] = float(double(p.scale) * of_scores[i]);
  for (int g = 0; g < heads_out; g++) {
    for (int h = 0; h < p.heads; h++)
      call.grad_theta[h * heads_out + g] = float(fold.grad_theta(of_theta + h * heads_out, g));
    if (call.grad_bias) call.grad_bias[g] = float(fold.grad_bias(of_shift, g));
    if (call.grad_norm_weight) call.grad_norm_weight[g] = float(fold.grad_norm(of_gamma[g]));
    if (call.grad_norm_bias) call.grad_norm_bias[g] = float(fold.grad_norm(of_beta[g]));
  }
}

void empty_cache() { Memory::free_kept(); }

int64_t set_whole_bytes(int64_t bytes) { return whole_bytes.exchange(bytes); }

}  // namespace reattn
