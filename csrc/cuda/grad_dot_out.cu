// Sums of grad * out by head, from which the gradient of batch statistics is known.
#include "kernels.h"
#include "launch.h"
#include "maps.cuh"

namespace reattn {

// Some rows of one sample and head: a partial sum for each block.
template <class T>
__global__ void __launch_bounds__(256) grad_dot_out_kernel(const __grid_constant__ Params p) {
  const int slices = (p.out.rows + kSlice - 1) / kSlice;
  const int slice = block_x() % slices, head = block_x() / slices % p.heads, sample = block_x() / slices / p.heads;
  const T *grad = head_rows<T>(p.grad, sample, head), *out = head_rows<T>(p.out, sample, head);
  float sum = 0;
  for (int i = thread(); i < kSlice * p.head_dim; i += threads()) {
    const int row = slice * kSlice + i / p.head_dim, column = i % p.head_dim;
    if (row >= p.out.rows) break;
    sum = fmaf(Operand<T>::get(grad + (row * p.grad.row_stride + column)),
               Operand<T>::get(out + (row * p.out.row_stride + column)), sum);
  }
  const Shared<float> sums = as<float>(shared_memory());
  sum = warp_sum(sum);
  if (lane() == 0) store(sums + warp(), sum);
  sync_block();
  if (thread() > 0) return;
  sum = 0;
  for (int i = 0; i < warps(); i++) sum += load<float>(sums + i);
  write(p.vectors + (int64_t(sample) * slices + slice) * p.heads + head, sum);
}

template <class T>
void grad_dot_out(const Params& p, const Launch& how) {
  start(grad_dot_out_kernel<T>, "grad_dot_out", p, how);
}

// Throws where there is nothing for this device to run.
template <class T>
void check_device(int device) {
  const OnDevice current(device);
  check_kernel(grad_dot_out_kernel<T>);
}

template void grad_dot_out<REATTN_ELEMENT>(const Params& p, const Launch& how);
template void check_device<REATTN_ELEMENT>(int device);

}  // namespace reattn
