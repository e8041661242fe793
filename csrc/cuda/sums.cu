// What stands before and after the sweeps: sums over the batch, in a fixed order, and what is made of them.
#include <cstring>

#include "kernels.h"
#include "launch.h"
#include "stream.cuh"

namespace reattn {

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

// The sum over all threads of a block, for each of them.
REATTN_DEVICE double block_sum(double value) {
  sync_block();  // what was there before has been read
  store_double(scratch() + thread(), value);
  sync_block();
  double sum = 0;
  if (thread() < kWarp)
    for (int i = thread(); i < threads(); i += kWarp) sum += load_double(scratch() + i);
  sync_block();
  if (thread() < kWarp) store_double(scratch() + thread(), sum);
  sync_block();
  sum = 0;
  for (int i = 0; i < kWarp; i++) sum += load_double(scratch() + i);
  return sum;
}

// The sum of one of the numbers that blocks left in vectors, (numbers, blocks).
REATTN_DEVICE double sum_of(const Params& p, int number) {
  double sum = 0;
  for (int64_t block = thread(); block < p.blocks; block += threads())
    sum += double(read<float>(p.vectors + (number * p.blocks + block)));
  return block_sum(sum);
}

REATTN_DEVICE double positions_of(const Params& p, int batch) {
  return double(batch) * double(p.query.rows) * double(p.key.rows);
}

// Statistics of one head: from what the forward blocks left, or from sums over ranks.
REATTN_DEVICE Moments moments_of(const Params& p, int head, double& positions) {
  const double* statistics = p.fold.p.statistics;
  positions = p.positions;
  if (p.synchronised) {
    positions = read<double>(statistics + 2 * p.heads);
    return Moments(read<double>(statistics + head), read<double>(statistics + p.heads + head), positions, p.fold.p.eps);
  }
  const double sum = sum_of(p, head), squares = sum_of(p, p.heads + head);
  const RawSums raw(p.fold.p, head, sum, squares, positions);
  return Moments(raw.sum, raw.squares, positions, p.fold.p.eps);
}

// The sums of what blocks left, for an all-reduce; a block for each head. After the forward pass for statistics, before
// the backward pass for grad_sums.
template <class T>
__global__ void __launch_bounds__(kSumThreads) add_up_kernel(const __grid_constant__ Params p) {
  const int head = block_x();
  const double first = sum_of(p, head), second = sum_of(p, p.heads + head);
  if (thread() > 0) return;
  if (p.fold.backward) {
    write(p.fold.p.grad_sums + head, first);
    write(p.fold.p.grad_sums + p.heads + head, second);
    return;
  }
  const RawSums raw(p.fold.p, head, first, second, p.positions);
  write(p.fold.p.statistics + head, raw.sum);
  write(p.fold.p.statistics + p.heads + head, raw.squares);
  if (head == 0) write(p.fold.p.statistics + 2 * p.heads, p.positions);
}

// A block's rows of one sample and head, two columns to a thread.
template <class T>
struct Part {
  int sample, head, first_row, end_row, pairs, lanes, column, row;

  REATTN_DEVICE Part(const Params& p, int rows) {
    const int part = block_x() % p.splits, rows_of_part = (rows + p.splits - 1) / p.splits;
    head = block_x() / p.splits % p.heads;
    sample = block_x() / p.splits / p.heads;
    first_row = part * rows_of_part;
    end_row = smaller(first_row + rows_of_part, rows);
    pairs = (p.head_dim + 1) / 2;
    lanes = threads() / pairs;  // rows at once
    column = thread() % pairs * 2;
    row = thread() / pairs;
  }
  REATTN_DEVICE bool idle() const { return row >= lanes; }
};

// Two columns of a row, the second zero beyond head_dim. Of an even head_dim, rows begin at whole pairs.
template <class T>
REATTN_DEVICE float2 get_pair(const Params& p, const T* row, int column) {
  if (p.head_dim % 2 == 0) return Operand<T>::get_pair(row + column);
  return {Operand<T>::get(row + column), column + 1 < p.head_dim ? Operand<T>::get(row + column + 1) : 0.0f};
}
template <class T>
REATTN_DEVICE void put_pair(const Params& p, T* row, int column, float2 pair) {
  if (p.head_dim % 2 == 0) return Operand<T>::put_pair(row + column, pair.x, pair.y);
  Operand<T>::put(row + column, pair.x);
  if (column + 1 < p.head_dim) Operand<T>::put(row + column + 1, pair.y);
}

// out = slope out + level times the sum of the values; the block after all others writes the statistics.
template <class T>
__global__ void __launch_bounds__(kSumThreads) finish_kernel(const __grid_constant__ Params p) {
  double positions;
  if (block_x() == p.rescaling_blocks) {
    for (int head = 0; head < p.heads; head++) {
      const Moments moments = moments_of(p, head, positions);
      if (thread() > 0) continue;
      update_running(p.fold.p, moments, positions, head);
      write(p.final_statistics + head, moments.mean - mixed_centre(p.fold.p, head));
      write(p.final_statistics + p.heads + head, moments.inverse_deviation);
    }
    if (thread() > 0) return;
    write(p.final_statistics + 2 * p.heads, positions);
    if (p.fold.p.num_batches_tracked) *p.fold.p.num_batches_tracked += 1;
    return;
  }
  const Part<T> part(p, p.out.rows);
  const Moments moments = moments_of(p, part.head, positions);
  const double inverse = moments.inverse_deviation, offset = moments.mean - mixed_centre(p.fold.p, part.head);
  const float slope = p.fold.slope(part.head, inverse), level = p.fold.level(part.head, inverse, offset);

  const T* values = head_rows<T>(p.value, part.sample, part.head);
  const Shared<float> sums = as<float>(shared_memory() + threads() * 8);
  float2 sum = {0, 0};
  if (!part.idle())
    for (int row = part.row; row < p.value.rows; row += part.lanes) {
      const float2 pair = get_pair(p, values + row * p.value.row_stride, part.column);
      sum.x += pair.x, sum.y += pair.y;
    }
  store(sums + 2 * thread(), sum.x);
  store(sums + 2 * thread() + 1, sum.y);
  sync_block();
  if (part.idle()) return;
  sum = {0, 0};
  for (int lane = 0; lane < part.lanes; lane++) {
    sum.x += load<float>(sums + 2 * (lane * part.pairs + part.column / 2));
    sum.y += load<float>(sums + 2 * (lane * part.pairs + part.column / 2) + 1);
  }
  if (part.row == 0 && part.first_row == 0) {
    float* to = p.value_sum + ((int64_t(part.sample) * p.heads + part.head) * p.head_dim + part.column);
    write(to, sum.x);
    if (part.column + 1 < p.head_dim) write(to + 1, sum.y);
  }
  T* out = head_rows<T>(p.out, part.sample, part.head);
  for (int row = part.first_row + part.row; row < part.end_row; row += part.lanes) {
    const float2 pair = get_pair(p, out + row * p.out.row_stride, part.column);
    put_pair(p, out + row * p.out.row_stride, part.column,
             float2{fmaf(slope, pair.x, level * sum.x), fmaf(slope, pair.y, level * sum.y)});
  }
}

// Sums of grad * out and of grad times the sum of the values: see csrc/fold.h.
template <class T>
__global__ void __launch_bounds__(kSumThreads) grad_sums_kernel(const __grid_constant__ Params p) {
  const Part<T> part(p, p.grad.rows);
  const T* grads = head_rows<T>(p.grad, part.sample, part.head);
  const T* outs = head_rows<T>(p.out, part.sample, part.head);
  float of_out = 0, of_values = 0;
  if (!part.idle()) {
    const float* sums = p.value_sum + ((int64_t(part.sample) * p.heads + part.head) * p.head_dim + part.column);
    const float2 values = {read<float>(sums), part.column + 1 < p.head_dim ? read<float>(sums + 1) : 0.0f};
    for (int row = part.first_row + part.row; row < part.end_row; row += part.lanes) {
      const float2 grad = get_pair(p, grads + row * p.grad.row_stride, part.column);
      const float2 out = get_pair(p, outs + row * p.out.row_stride, part.column);
      of_out = fmaf(grad.x, out.x, fmaf(grad.y, out.y, of_out));
      of_values = fmaf(grad.x, values.x, fmaf(grad.y, values.y, of_values));
    }
  }
  const double first = block_sum(double(of_out)), second = block_sum(double(of_values));
  if (thread() > 0) return;
  const int64_t block = int64_t(part.sample) * p.splits + block_x() % p.splits;
  write(p.vectors + (part.head * p.blocks + block), float(first));
  write(p.vectors + ((p.heads + part.head) * p.blocks + block), float(second));
}

// Numbers of which shared memory holds several parts, added as they are asked for.
struct Totals {
  int numbers, parts;
  REATTN_DEVICE double operator[](int number) const {
    double sum = 0;
    for (int part = 0; part < parts; part++) sum += load_double(scratch() + (part * numbers + number));
    return sum;
  }
};

// The gradients of what the user gave from the sums that blocks of backward_query left: a block for each row of theta,
// and one for the vectors.
template <class T>
__global__ void __launch_bounds__(kSumThreads) unfold_kernel(const __grid_constant__ Params p) {
  const int padded = padded_heads(p.heads), row = block_x();
  const bool of_theta = row < p.heads;
  const int numbers = of_theta ? padded : 3 * padded, lanes = threads() / numbers;
  const int64_t stride = of_theta ? padded * padded : 3 * padded;
  const float* from = (of_theta ? p.products + row * padded : p.vectors) + thread() % numbers;
  double sum = 0;
  if (thread() < lanes * numbers)
    for (int64_t block = thread() / numbers; block < p.blocks; block += lanes)
      sum += double(read<float>(from + block * stride));
  // The kernels multiply centred maps: what the centre would add is the sum of the gradients of the shift.
  double shift = 0;
  if (of_theta && thread() < lanes * numbers)
    for (int64_t block = thread() / numbers; block < p.blocks; block += lanes)
      shift += double(read<float>(p.vectors + (block * 3 * padded + thread() % numbers)));
  sum += shift * double(p.centre);
  store_double(scratch() + thread(), sum);
  sync_block();
  const int g = thread();
  if (g >= p.heads) return;
  const Totals totals{numbers, lanes};
  if (of_theta) return write(p.grad_theta + (row * p.heads + g), float(p.fold.grad_theta(totals, g)));
  if (p.grad_bias) write(p.grad_bias + g, float(p.fold.grad_bias(totals, g)));
  if (p.grad_norm_weight) write(p.grad_norm_weight + g, float(p.fold.grad_norm(totals[padded + g])));
  if (p.grad_norm_bias) write(p.grad_norm_bias + g, float(p.fold.grad_norm(totals[2 * padded + g])));
}

#ifndef __CUDACC_RTC__
template <class T>
void add_up(const Params& p, const Launch& how) {
  start(add_up_kernel<T>, "add_up", p, how);
}
template <class T>
void finish(const Params& p, const Launch& how) {
  start(finish_kernel<T>, "finish", p, how);
}
template <class T>
void grad_sums(const Params& p, const Launch& how) {
  start(grad_sums_kernel<T>, "grad_sums", p, how);
}
template <class T>
void unfold(const Params& p, const Launch& how) {
  start(unfold_kernel<T>, "unfold", p, how);
}

// Throws where there is nothing for the current device to run.
template <class T>
void check_device() {
  check_kernel(unfold_kernel<T>);
}

template void add_up<REATTN_ELEMENT>(const Params& p, const Launch& how);
template void finish<REATTN_ELEMENT>(const Params& p, const Launch& how);
template void grad_sums<REATTN_ELEMENT>(const Params& p, const Launch& how);
template void unfold<REATTN_ELEMENT>(const Params& p, const Launch& how);
template void check_device<REATTN_ELEMENT>();
#endif

}  // namespace reattn
