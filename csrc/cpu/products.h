// The products with query, key, value and gradients: in float32 whatever the tensors' dtype, or in bfloat16 where the
// instruction set multiplies that.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "rows.h"

#define REATTN_STRING_OF(x) #x
#define REATTN_STRING(x) REATTN_STRING_OF(x)

namespace reattn {
namespace REATTN_ISA {

struct Float32 {
  using Operand = float;
  static constexpr int64_t kGroup = 1;

  static void store(float* to, Vec v) { reattn::REATTN_ISA::store(to, v); }
  static void load_row(Dtype dtype, const char* from, int64_t stride, int64_t size, float* to, int64_t padded) {
    reattn::REATTN_ISA::load_row(dtype, from, stride, size, to, padded);
  }

  template <Start kStart>
  static void product(
      int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
      int64_t ldc) {
    reattn::REATTN_ISA::product<Order::kRows, kStart>(rows, columns, depth, a, lda, b, ldb, c, ldc);
  }

  // A product reads its left side down or across: no copy is needed.
  static int64_t transposed_size(int64_t, int64_t) { return 0; }
  static int64_t paired_size(int64_t, int64_t) { return 0; }
  static void transpose_rows(const float*, int64_t, int64_t, float*) {}

  static void add_transposed(
      int64_t dim, int64_t columns, int64_t rows, const float* a, int64_t lda, const float*, const float* maps,
      int64_t ld_maps, float*, float* c, int64_t ldc, bool first) {
    if (first)
      reattn::REATTN_ISA::product<Order::kColumns, Start::kZero>(dim, columns, rows, a, lda, maps, ld_maps, c, ldc);
    else
      reattn::REATTN_ISA::product<Order::kColumns, Start::kAccumulate>(dim, columns, rows, a, lda, maps, ld_maps, c, ldc);
  }

  // [keys, ld_dim], zero beyond head_dim.
  static void pack_rows(
      Dtype dtype, const char* from, const Tensor& t, int64_t keys, int64_t dim, const Plan& plan, float* to) {
    for (int64_t j = 0; j < keys; j++)
      load_row(dtype, from + j * t.row * int64_t(bytes(dtype)), t.dim, dim, to + j * plan.ld_dim, plan.ld_dim);
  }

  // [head_dim, ld_keys], zero beyond the keys.
  static void pack_columns(
      Dtype dtype, const char* from, const Tensor& t, int64_t keys, int64_t dim, const Plan& plan, float* to) {
    constexpr int64_t kRows = 4;
    float rows[kRows * 128], columns[128 * kRows];
    const int64_t padded = round_up(dim, 4);
    for (int64_t j = 0; j < plan.keys; j += kRows) {
      for (int64_t r = 0; r < kRows; r++) {
        const bool inside = j + r < keys;
        load_row(dtype, inside ? from + (j + r) * t.row * int64_t(bytes(dtype)) : from, t.dim, inside ? dim : 0,
                 rows + r * padded, padded);
      }
      if (dim == padded) {
        transpose(rows, padded, kRows, dim, to + j, plan.ld_keys);
        continue;
      }
      transpose(rows, padded, kRows, padded, columns, kRows);
      for (int64_t d = 0; d < dim; d++) std::memcpy(to + d * plan.ld_keys + j, columns + d * kRows, sizeof(Vec4));
    }
  }
};

}  // namespace REATTN_ISA
}  // namespace reattn
