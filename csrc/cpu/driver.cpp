#include "driver.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include <pthread.h>

#include "parallel.h"

namespace reattn {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// Rows that far apart fall into different sets of the L1 cache.
int64_t spread(int64_t row) {
  const int64_t sixteens = ceil_div(row, 16);
  return 16 * (sixteens | 1);
}

// What the maps of a block should take, with their gradients in the backward pass; and what they may take for the sake
// of whole rows, which need one sweep over the keys instead of two. Larger blocks are read from farther away, but keys,
// values and their gradients less often.
constexpr int64_t kForwardBytes = 384 << 10, kBackwardBytes = 1 << 20, kWholeBytes = 5 << 20;
// Of the L1 cache, the maps that are mixed at a time.
constexpr int64_t kTileBytes = 12 << 10;
// Of the L3 cache, the packed keys and values of a wave; of memory, the gradients of all groups.
constexpr int64_t kWaveBytes = 16 << 20, kGroupBytes = 192 << 20;
// Units of work for threads to share, and the fewest query rows of a group: its sums are work as well.
constexpr int64_t kForwardUnits = 16, kBackwardUnits = 8, kGroupRows = 48;
static_assert(kBackwardUnits <= kGroupRows, "rounding up the rows of a group would leave the last one empty");

Plan make_plan(const Kernels& kernels, const Problem& p, bool backward) {
  Plan plan{};
  plan.keys = round_up(p.seqlen_k, std::max(kernels.lanes, kernels.depth_multiple));
  plan.packed_keys = round_up(plan.keys, kernels.column_tile);
  plan.ld_keys = spread(plan.keys);
  plan.ld_dim = round_up(p.head_dim, kernels.lanes);
  plan.depth = round_up(p.head_dim, kernels.depth_multiple);

  const int64_t tile = kernels.row_tile, wanted_bytes = backward ? kBackwardBytes : kForwardBytes;
  const int64_t element_bytes = (backward ? 2 : 1) * p.heads * int64_t(sizeof(float));
  const int64_t row_bytes = element_bytes * plan.ld_keys;
  const int64_t fewest = (backward ? 4 : 2) * tile, most = 8 * tile;
  plan.block_rows = std::clamp(wanted_bytes / row_bytes, fewest, most);
  plan.block_keys = p.seqlen_k;
  if (plan.block_rows * row_bytes > kWholeBytes) {
    plan.block_rows = most;
    plan.block_keys = std::max<int64_t>(wanted_bytes / (most * element_bytes) / 96, 1) * 96;
  }
  plan.ld_block = spread(round_up(plan.block_keys, kernels.lanes));
  const int64_t vectors = ceil_div(plan.block_keys, kernels.lanes);
  const int64_t tile_vectors = std::max<int64_t>(kTileBytes / (p.heads * kernels.lanes * int64_t(sizeof(float))), 1);
  plan.tile_keys = ceil_div(vectors, ceil_div(vectors, tile_vectors)) * kernels.lanes;

  const int64_t key_bytes = p.heads * plan.packed_keys * plan.depth * kernels.operand_bytes;
  int64_t sample_bytes = 2 * key_bytes;
  plan.groups = 1;
  if (backward) {
    const int64_t grad_bytes = 2 * p.heads * plan.ld_keys * p.head_dim * int64_t(sizeof(float));
    const int64_t wanted = ceil_div(kBackwardUnits, p.batch), affordable = kGroupBytes / grad_bytes;
    plan.groups = std::max<int64_t>(std::min({wanted, affordable, p.seqlen / kGroupRows}), 1);
    sample_bytes = 4 * key_bytes + plan.groups * grad_bytes;
  } else {
    plan.block_rows = std::clamp(ceil_div(p.batch * p.seqlen, kForwardUnits), fewest, plan.block_rows);
  }
  // Groups, and the blocks of each, of about one size.
  plan.group_rows = ceil_div(p.seqlen, plan.groups);
  const int64_t blocks = ceil_div(plan.group_rows, plan.block_rows);
  plan.block_rows = round_up(ceil_div(plan.group_rows, blocks), tile);
  plan.wave = std::clamp<int64_t>(kWaveBytes / sample_bytes, 1, p.batch);
  return plan;
}

// Memory that calls leave for each other: fresh pages cost as much as the work on a small problem.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(round_up(int64_t(bytes), 64)) {
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
    for (; total > kKept; parts.erase(parts.begin())) {
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
  static constexpr size_t kKept = 64 << 20;

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
  size_t bytes_;
};

// Work on one wave of samples after the other.
class Call {
 public:
  Call(const Kernels& kernels, const Problem& problem, bool backward, int threads)
      : kernels_(kernels),
        job_{problem, make_plan(kernels, problem, backward), {}, 0, 0, false},
        backward_(backward),
        threads_(threads) {}

  // sums: whether units leave any; values: whether they need them.
  void run(bool sums, bool values, int64_t units_per_sample, void (*work)(const Job&, int64_t, char*)) {
    const Problem& p = job_.problem;
    const Plan& plan = job_.plan;
    const int64_t packed = plan.wave * p.heads;
    const int64_t columns = packed * plan.packed_keys * plan.depth * kernels_.operand_bytes;
    const int64_t rows = packed * plan.keys * plan.ld_dim * kernels_.operand_bytes;
    const int64_t grads = backward_ ? packed * plan.groups * plan.ld_keys * p.head_dim * int64_t(sizeof(float)) : 0;
    const int64_t most = plan.wave * units_per_sample, threads = std::min<int64_t>(threads_, most);
    const int64_t scratch = round_up(int64_t(kernels_.scratch_bytes(job_, backward_)), 4096) + 64;
    const int64_t sizes[] = {columns, values ? rows : 0, backward_ ? columns : 0, backward_ ? rows : 0, grads,
                             grads,   scratch * threads};
    int64_t total = 0;
    for (int64_t size : sizes) total += round_up(size, 64);
    Memory memory{size_t(total)};
    char* parts[7];
    char* at = memory.data();
    for (int i = 0; i < 7; i++) {
      parts[i] = sizes[i] ? at : nullptr;
      at += round_up(sizes[i], 64);
    }
    if (sums) partial_.resize(size_t(p.batch * units_per_sample * partial_size(p.heads)));
    job_.work = {parts[0],
                 parts[3],
                 parts[2],
                 parts[1],
                 reinterpret_cast<float*>(parts[4]),
                 reinterpret_cast<float*>(parts[5]),
                 partial_.data()};
    for (job_.first = 0; job_.first < p.batch; job_.first += plan.wave) {
      job_.samples = std::min(plan.wave, p.batch - job_.first);
      const auto scratch_of = [&](int thread) { return parts[6] + thread * scratch; };
      const int64_t stretches = job_.samples * ceil_div(plan.keys, kernels_.stretch);
      parallel_for(threads_, stretches, [&](int, int64_t unit) { kernels_.pack(job_, unit, backward_); });
      parallel_for(int(threads), job_.samples * units_per_sample,
                   [&](int thread, int64_t unit) { work(job_, unit, scratch_of(thread)); });
      if (backward_) parallel_for(threads_, stretches, [&](int, int64_t unit) { kernels_.reduce(job_, unit); });
      if (sums) job_.work.partial += job_.samples * units_per_sample * partial_size(p.heads);
    }
  }

  // The units' sums, added in their order.
  std::vector<double> sums() const {
    const size_t size = size_t(partial_size(job_.problem.heads));
    std::vector<double> total(size);
    for (size_t i = 0; i < partial_.size(); i++) total[i % size] += partial_[i];
    return total;
  }

  Job& job() { return job_; }

 private:
  const Kernels& kernels_;
  Job job_;
  bool backward_;
  int threads_;
  std::vector<double> partial_;
};

}  // namespace

void run_statistics(const Kernels& kernels, const Problem& p, int threads) {
  Call call(kernels, p, false, threads);
  call.run(true, false, ceil_div(p.seqlen, call.job().plan.block_rows), kernels.statistics);
  const std::vector<double> sums = call.sums();
  // Symmetric, and computed above the diagonal.
  for (int64_t h = 0; h < p.heads; h++)
    for (int64_t g = 0; g < p.heads; g++)
      p.products[h * p.heads + g] = sums[size_t(std::min(g, h) * p.heads + std::max(g, h))];
  std::copy_n(sums.begin() + p.heads * p.heads, p.heads, p.sums);
}

void run_forward(const Kernels& kernels, const Problem& p, bool lse_known, int threads) {
  Call call(kernels, p, false, threads);
  call.job().lse_known = lse_known;
  call.run(false, true, ceil_div(p.seqlen, call.job().plan.block_rows), kernels.forward);
}

void run_backward(const Kernels& kernels, const Problem& p, int threads) {
  Call call(kernels, p, true, threads);
  call.run(true, true, call.job().plan.groups, kernels.backward);
  const std::vector<double> sums = call.sums();
  auto from = sums.begin();
  from = std::copy_n(from, p.heads * p.heads, p.grad_weight) - p.grad_weight + sums.begin();
  for (double* target : {p.grad_shift, p.grad_gamma, p.grad_beta}) {
    std::copy_n(from, p.heads, target);
    from += p.heads;
  }
}

void run_grad_dot_out(const Kernels& kernels, const Problem& p, int threads) {
  Job job{p, {}, {}, 0, 0, false};
  std::vector<double> partial(size_t(p.batch * p.heads));
  job.work.partial = partial.data();
  parallel_for(threads, p.batch * p.heads, [&](int, int64_t unit) { kernels.grad_dot_out(job, unit); });
  for (int64_t i = 0; i < p.batch * p.heads; i++) p.sums[i % p.heads] += partial[size_t(i)];
}

void empty_cache() { Memory::free_kept(); }

}  // namespace reattn
