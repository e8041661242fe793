// The products with query, key, value and gradients, in float32 whatever the tensors' dtype; bfloat16.h is its like.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "rows.h"

namespace reattn {
namespace REATTN_ISA {

struct Float32 {
  using Operand = float;
  static constexpr int64_t kGroup = 1;
  static constexpr float kNaN = __builtin_nanf("");

  static void begin() {}
  static void end() {}

  static void store(float* to, Vec v) { reattn::REATTN_ISA::store(to, v); }
  static void load_row(Dtype dtype, const char* from, int64_t stride, int64_t size, float* to, int64_t padded) {
    reattn::REATTN_ISA::load_row(dtype, from, stride, size, to, padded);
  }

  template <Start kStart>
  static void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b,
                      int64_t ldb, float* c, int64_t ldc) {
    reattn::REATTN_ISA::product<Order::kRows, kStart>(rows, columns, depth, a, lda, b, ldb, c, ldc);
  }

  // C = A B, B as pack_columns leaves it from one of its panels on.
  static void product_with_panels(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda,
                                  const float* b, float* c, int64_t ldc) {
    reattn::REATTN_ISA::product<Order::kRows, Start::kZero>(rows, columns, depth, a, lda, b, kPanel, c, ldc, nullptr,
                                                            depth * kPanel);
  }

  // A product reads its left side down or across: no copy is needed.
  static int64_t transposed_size(int64_t, int64_t) { return 0; }
  static int64_t paired_size(int64_t, int64_t) { return 0; }
  static void transpose_rows(const float*, int64_t, int64_t, float*) {}

  static void add_transposed(int64_t dim, int64_t columns, int64_t rows, const float* a, int64_t lda, const float*,
                             const float* maps, int64_t ld_maps, float*, float* c, int64_t ldc, bool first) {
    if (first)
      reattn::REATTN_ISA::product<Order::kColumns, Start::kZero>(dim, columns, rows, a, lda, maps, ld_maps, c, ldc);
    else
      reattn::REATTN_ISA::product<Order::kColumns, Start::kAccumulate>(dim, columns, rows, a, lda, maps, ld_maps, c,
                                                                       ldc);
  }

  // Four keys into columns: panels of kPanel keys, [head_dim, kPanel] each, zero beyond the keys; and into rows [keys,
  // ld_dim], zero beyond head_dim. Either may be null.
  static void pack_four(Dtype dtype, const char* from, const Tensor& t, int64_t first, int64_t keys, int64_t dim,
                        const Plan& plan, float* columns, float* rows) {
    const int64_t padded = round_up(dim, 4), stride = t.row * int64_t(bytes(dtype)), inside = smaller(4, keys - first);
    if (rows)
      for (int64_t r = 0; r < inside; r++)
        load_row(dtype, from + r * stride, t.dim, dim, rows + (first + r) * plan.ld_dim, plan.ld_dim);
    if (!columns) return;
    float* target = columns + first / kPanel * kPanel * dim + first % kPanel;
    if (dtype == Dtype::kFloat32 && t.dim == 1 && dim == padded && inside == 4)
      return transpose(reinterpret_cast<const float*>(from), t.row, 4, dim, target, kPanel);
    float four[4 * 128], turned[128 * 4];
    for (int64_t r = 0; r < 4; r++)
      load_row(dtype, from + r * stride, t.dim, r < inside ? dim : 0, four + r * padded, padded);
    transpose(four, padded, 4, padded, turned, 4);
    for (int64_t d = 0; d < dim; d++) std::memcpy(target + d * kPanel, turned + d * 4, sizeof(Vec4));
  }
};

}  // namespace REATTN_ISA
}  // namespace reattn
