// What stands before and after the sweeps: sums over the batch, in a fixed order, and what is made of them.
#include <cstring>

#include "mask.cuh"

namespace reattn {

// Columns of a row that a thread reads at once. Of an even head_dim rows begin at whole pairs, of one that is a
// multiple of 16 bytes at those.
constexpr int kWidth = kHeadDim % kVector == 0 ? kVector : kHeadDim % 2 == 0 ? 2 : 1;
constexpr int kLanes = kHeadDim / kWidth;          // threads to a row
constexpr int kRowsAtOnce = kSumThreads / kLanes;  // of a block

constexpr int kPieceSize = kWidth * int(sizeof(Element));  // in bytes
using Piece = std::conditional_t<
    kPieceSize == 16, uint4,
    std::conditional_t<kPieceSize == 8, uint2, std::conditional_t<kPieceSize == 4, uint32_t, uint16_t>>>;

struct Columns {
  float column[kWidth];

  REATTN_DEVICE explicit Columns(const Element* from) {
    const Piece piece = read<Piece>(from);
    uint32_t words[(kPieceSize + 3) / 4] = {};
    memcpy(words, &piece, sizeof piece);
#pragma unroll
    for (int i = 0; i < kWidth; i++)
      if constexpr (kFloat) {
        memcpy(column + i, words + i, 4);
      } else {
        const float2 pair = unpack<Narrow>(words[i / 2]);
        column[i] = i % 2 ? pair.y : pair.x;
      }
  }
  REATTN_DEVICE void write_to(Element* to) const {
    uint32_t words[(kPieceSize + 3) / 4];
#pragma unroll
    for (int i = 0; i < kWidth; i++)
      if constexpr (kFloat)
        memcpy(words + i, column + i, 4);
      else if (i % 2 == 0)
        words[i / 2] = pack<Narrow>(column[i], i + 1 < kWidth ? column[smaller(i + 1, kWidth - 1)] : 0.0f);
    Piece piece;
    memcpy(&piece, words, sizeof piece);
    write(to, piece);
  }
};

// A block's rows of one sample and head; a thread's columns of them.
struct Part {
  int sample, head, first_row, end_row, column, row;

  REATTN_DEVICE Part(const Params& p, int block, int rows) {
    const int part = block % p.splits, rows_of_part = (rows + p.splits - 1) / p.splits;
    head = block / p.splits % kHeads;
    sample = block / p.splits / kHeads;
    first_row = part * rows_of_part;
    end_row = smaller(first_row + rows_of_part, rows);
    column = thread() % kLanes * kWidth;
    row = thread() / kLanes;
  }
  REATTN_DEVICE bool idle() const { return row >= kRowsAtOnce; }
  template <class T>
  REATTN_DEVICE T* first(const Tensor& tensor) const {
    return head_rows<T>(tensor, sample, head) + column;
  }
  // Of a row, or of all.
  REATTN_DEVICE void read_value_sum(const Params& p, int rows, int row, float (&sum)[kWidth]) const {
    const int64_t before = int64_t(sample) * kHeads + head;
    const float* from = p.value_sum + ((kSeenByRow ? before * rows + row : before) * kHeadDim + column);
#pragma unroll
    for (int i = 0; i < kWidth; i++) sum[i] = read<float>(from + i);
  }
};

// A number of float64 in shared memory.
REATTN_DEVICE void store_double(Shared<float2> to, double value) {
  float2 halves;
  memcpy(&halves, &value, sizeof value);
  store(to, halves);
}
REATTN_DEVICE double load_double(Shared<float2> from) {
  const float2 halves = load<float2>(from);
  double value;
  memcpy(&value, &halves, sizeof value);
  return value;
}
REATTN_DEVICE Shared<float2> scratch() { return as<float2>(shared_memory()); }

struct Three {
  double first, second, third;  // the third with a mask alone
};
constexpr int kNumbers = kMasked ? 3 : 2;

// The sums over all lanes of a warp, for each of them.
REATTN_DEVICE Three warp_sum(Three three) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    three.first += shuffle_xor(three.first, mask);
    three.second += shuffle_xor(three.second, mask);
    if constexpr (kMasked) three.third += shuffle_xor(three.third, mask);
  }
  return three;
}

// The sums over all threads of a block, for each of them.
REATTN_DEVICE Three block_sum(Three three) {
  three = warp_sum(three);
  const Shared<float2> own = scratch() + kNumbers * warp();
  sync_block();  // what was there before has been read
  if (lane() == 0) {
    store_double(own, three.first);
    store_double(own + 1, three.second);
    if constexpr (kMasked) store_double(own + 2, three.third);
  }
  sync_block();
  three = {0, 0, 0};
  for (int i = 0; i < kSumThreads / kWarp; i++) {
    three.first += load_double(scratch() + kNumbers * i);
    three.second += load_double(scratch() + kNumbers * i + 1);
    if constexpr (kMasked) three.third += load_double(scratch() + kNumbers * i + 2);
  }
  return three;
}

// The sums of a head's two numbers that blocks left in vectors, (2 heads, blocks), or of three: by a block, or by a
// warp.
template <bool kThree = false, bool kByWarp = false>
REATTN_DEVICE Three sums_of(const Params& p, int head) {
  const float *first = p.vectors + head * p.blocks, *second = first + kHeads * p.blocks;
  Three three{0, 0, 0};
#pragma unroll 4
  for (int64_t block = kByWarp ? lane() : thread(); block < p.blocks; block += kByWarp ? kWarp : kSumThreads) {
    three.first += double(read<float>(first + block)), three.second += double(read<float>(second + block));
    if constexpr (kThree) three.third += double(read<float>(second + kHeads * p.blocks + block));
  }
  return kByWarp ? warp_sum(three) : block_sum(three);
}
// Over the mixed maps; the third is the number of positions.
template <bool kByWarp = false>
REATTN_DEVICE Three forward_sums_of(const Params& p, int head) {
  Three sums = sums_of<kMasked, kByWarp>(p, head);
  if constexpr (!kMasked) sums.third = p.positions;
  return sums;
}

// The fold with the unit that the forward kernel multiplied the weights to a head by: see heads.cuh.
REATTN_DEVICE Fold in_units(const Params& p, int head) {
  Fold fold = p.fold;
  fold.p.heads = fold.p.heads_out = kHeads;  // known when compiled: loops over heads wait for memory once
  if constexpr (!kFloat) {
    float largest = absolute(p.fold.weight(smaller(lane(), kHeads - 1), head, 0)) * p.keep_scale;
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) largest = larger(largest, shuffle_xor(largest, mask));
    fold.p.unit_scale = unit_of(largest, 116) * (kSmallRange ? stored_part(p.key.rows) : 1.0f);
  }
  return fold;
}

// Statistics of one head: from what the forward blocks left, or from sums over ranks.
template <bool kByWarp = false>
REATTN_DEVICE Moments moments_of(const Params& p, const Fold& fold, int head, double& positions) {
  const double* statistics = p.fold.p.statistics;
  if (p.added_up) {
    positions = read<double>(statistics + 2 * kHeads + head);
    return Moments(read<double>(statistics + head), read<double>(statistics + kHeads + head), positions, p.fold.p.eps);
  }
  const Three sums = forward_sums_of<kByWarp>(p, head);
  positions = sums.third;
  const RawSums raw(fold.p, head, sums.first, sums.second, positions);
  return Moments(raw.sum, raw.squares, positions, p.fold.p.eps);
}

// The sums of what blocks left, for an all-reduce; a block for each head. After the forward pass for statistics, before
// the backward pass for grad_sums.
__global__ void __launch_bounds__(kSumThreads) add_up(const __grid_constant__ Params p) {
  const int head = block_x();
  if (p.fold.backward) {
    const Three sums = sums_of(p, head);
    if (thread() > 0) return;
    write(p.fold.p.grad_sums + head, sums.first);
    write(p.fold.p.grad_sums + kHeads + head, sums.second);
    return;
  }
  const Fold fold = in_units(p, head);
  const Three sums = forward_sums_of(p, head);
  if (thread() > 0) return;
  const RawSums raw(fold.p, head, sums.first, sums.second, sums.third);
  write(p.fold.p.statistics + head, raw.sum);
  write(p.fold.p.statistics + kHeads + head, raw.squares);
  write(p.fold.p.statistics + 2 * kHeads + head, sums.third);
}

// out = slope out + level times the sum of the values. The first block writes the statistics, a warp those of a head:
// it takes longer than the others.
__global__ void __launch_bounds__(kSumThreads) finish(const __grid_constant__ Params p) {
  double positions;
  if (block_x() == 0) {
    for (int head = warp(); head < kHeads; head += kSumThreads / kWarp) {
      const Fold fold = in_units(p, head);
      const Moments moments = moments_of<true>(p, fold, head, positions);
      if (lane() > 0) continue;
      update_running(fold.p, moments, positions, head);
      write(p.final_statistics + head, moments.mean - mixed_centre(fold.p, head));
      write(p.final_statistics + kHeads + head, moments.inverse_deviation);
      write(p.final_statistics + 2 * kHeads + head, positions);
    }
    sync_block();  // all have read the number of batches
    if (thread() == 0 && p.fold.p.num_batches_tracked) *p.fold.p.num_batches_tracked += 1;
    return;
  }
  const Part part(p, block_x() - 1, p.out.rows);
  float sum[kWidth];
  if (!kSeenByRow && !part.idle()) part.read_value_sum(p, 1, 0, sum);
  const Fold fold = in_units(p, part.head);
  const Moments moments = moments_of(p, fold, part.head, positions);
  const double inverse = moments.inverse_deviation, offset = moments.mean - mixed_centre(fold.p, part.head);
  const float slope = fold.slope(part.head, inverse), level = fold.level(part.head, inverse, offset);
  if (part.idle()) return;
  Element* out = part.first<Element>(p.out);
#pragma unroll 4
  for (int row = part.first_row + part.row; row < part.end_row; row += kRowsAtOnce) {
    Columns columns(out + row * p.out.row_stride);
    if constexpr (kSeenByRow) part.read_value_sum(p, p.out.rows, row, sum);
#pragma unroll
    for (int i = 0; i < kWidth; i++) columns.column[i] = fmaf(slope, columns.column[i], level * sum[i]);
    columns.write_to(out + row * p.out.row_stride);
  }
}

// Sums of grad * out and of grad times the sum of the values: see csrc/fold.h.
__global__ void __launch_bounds__(kSumThreads) grad_sums(const __grid_constant__ Params p) {
  const Part part(p, block_x(), p.grad.rows);
  float of_out = 0, of_values = 0;
  if (!part.idle()) {
    const Element *grads = part.first<Element>(p.grad), *outs = part.first<Element>(p.out);
    float values[kWidth];
    if constexpr (!kSeenByRow) part.read_value_sum(p, p.grad.rows, 0, values);
#pragma unroll 4
    for (int row = part.first_row + part.row; row < part.end_row; row += kRowsAtOnce) {
      const Columns grad(grads + row * p.grad.row_stride), out(outs + row * p.out.row_stride);
      if constexpr (kSeenByRow) part.read_value_sum(p, p.grad.rows, row, values);
#pragma unroll
      for (int i = 0; i < kWidth; i++) {
        of_out = fmaf(grad.column[i], out.column[i], of_out);
        of_values = fmaf(grad.column[i], values[i], of_values);
      }
    }
  }
  const Three sums = block_sum({double(of_out), double(of_values), 0});
  if (thread() > 0) return;
  const int64_t block = int64_t(part.sample) * p.splits + block_x() % p.splits;
  write(p.vectors + (part.head * p.blocks + block), float(sums.first));
  write(p.vectors + ((kHeads + part.head) * p.blocks + block), float(sums.second));
}

// Numbers that lie in shared memory.
struct Totals {
  REATTN_DEVICE double operator[](int number) const { return load_double(scratch() + number); }
};

// The gradients of what the user gave from the sums that blocks of the backward sweep left: a block for each row of
// theta, one for the vectors, and where scores are mixed too, one for each row of what mixes them.
__global__ void __launch_bounds__(kSumThreads, 4) unfold(const __grid_constant__ Params p) {
  static_assert(kSumThreads * 4 * 8 <= kSumBytes, "a thread's four sums have room");
  constexpr int kVectorNumbers = 3 * kPaddedHeads, kMatrixNumbers = kPaddedHeads * kPaddedHeads;
  const bool of_scores = kPreMixed && block_x() > kHeads;
  const int row = of_scores ? block_x() - kHeads - 1 : block_x();
  const bool of_theta = of_scores || row < kHeads;
  const int numbers = of_theta ? kPaddedHeads : kVectorNumbers, fours = numbers / 4, parts = kSumThreads / fours;
  const int number = thread() % fours * 4, part = thread() / fours;
  const float* from = of_theta ? (of_scores ? p.pre_products : p.products) + row * kPaddedHeads : p.vectors;
  double sums[4] = {};
  if (part < parts) {
#pragma unroll 4
    for (int64_t block = part; block < p.blocks; block += parts) {
      const float4 four = read<float4>(from + (block * (of_theta ? kMatrixNumbers : kVectorNumbers) + number));
      sums[0] += double(four.x), sums[1] += double(four.y), sums[2] += double(four.z), sums[3] += double(four.w);
      if (!of_theta || of_scores) continue;
      // The kernels multiply centred maps: what the centre would add is the sum of the gradients of the shift.
      const float4 shift = read<float4>(p.vectors + (block * kVectorNumbers + number));
      sums[0] = fma(double(shift.x), double(p.centre), sums[0]),
      sums[1] = fma(double(shift.y), double(p.centre), sums[1]);
      sums[2] = fma(double(shift.z), double(p.centre), sums[2]),
      sums[3] = fma(double(shift.w), double(p.centre), sums[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) store_double(scratch() + (part * numbers + number + i), sums[i]);
  }
  sync_block();
  double total = 0;
  if (thread() < numbers)
    for (int i = 0; i < parts; i++) total += load_double(scratch() + (i * numbers + thread()));
  sync_block();
  if (thread() < numbers) store_double(scratch() + thread(), total);
  sync_block();
  const int g = thread();
  if (g >= kHeads) return;
  const Totals totals;
  if (of_scores) return write(p.grad_pre_theta + (row * kHeads + g), float(totals[g]));
  if (of_theta) return write(p.grad_theta + (row * kHeads + g), float(p.fold.grad_theta(totals, g)));
  if (p.grad_bias) write(p.grad_bias + g, float(p.fold.grad_bias(totals, g)));
  if (p.grad_norm_weight) write(p.grad_norm_weight + g, float(p.fold.grad_norm(totals[kPaddedHeads + g])));
  if (p.grad_norm_bias) write(p.grad_norm_bias + g, float(p.fold.grad_norm(totals[2 * kPaddedHeads + g])));
}

}  // namespace reattn
