// Products of bfloat16 in float32 sums, for tensors of that dtype. The right side of a product has two neighbours along
// the depth side by side in one word; the left side has them so already, its rows being what is summed over.
#pragma once

#include "products.h"

#if defined(REATTN_BFLOAT16)

namespace reattn {
namespace REATTN_ISA {

// What both kinds of products share. kGroup: sums run over whole groups, padded with zeros.
template <int64_t kGroupSize>
struct BFloat16Operands {
  using Operand = uint16_t;
  static constexpr int64_t kGroup = kGroupSize;
  static constexpr uint16_t kNaN = 0x7fc0;

  static void store(uint16_t* to, Vec v) {
    store_as(to, reinterpret_cast<VecH>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v))));
  }

  static void load_row(Dtype, const char* from, int64_t stride, int64_t size, uint16_t* to, int64_t padded) {
    const uint16_t* source = reinterpret_cast<const uint16_t*>(from);
    if (stride == 1)
      std::memcpy(to, source, size_t(size) * sizeof(uint16_t));
    else
      for (int64_t i = 0; i < size; i++) to[i] = source[i * stride];
    std::memset(to + size, 0, size_t(padded - size) * sizeof(uint16_t));
  }

  static const int32_t* words(const uint16_t* operands) { return reinterpret_cast<const int32_t*>(operands); }

  // words[i] = low[i], high[i]; either may be null, which stands for zeros. count is a multiple of the vector length.
  static void pair(const uint16_t* low, const uint16_t* high, int64_t count, uint16_t* to) {
    for (int64_t i = 0; i < count; i += kLanes) {
      VecU both{};
      if (low) both = __builtin_convertvector(load_as<VecH>(low + i), VecU);
      if (high) both |= __builtin_convertvector(load_as<VecH>(high + i), VecU) << 16;
      store_as(to + 2 * i, both);
    }
  }

  // Rows of a transposed left side, as many as depth, sums over rows in whole groups.
  static int64_t transposed_size(int64_t rows, int64_t depth) { return round_up(depth, 16) * round_up(rows, kGroup); }
  static void transpose_rows(const uint16_t* from, int64_t rows, int64_t depth, uint16_t* to) {
    const int64_t padded = round_up(rows, kGroup);
    for (int64_t d = 0; d < depth; d++) {
      for (int64_t r = 0; r < rows; r++) to[d * padded + r] = from[r * depth + d];
      for (int64_t r = rows; r < padded; r++) to[d * padded + r] = 0;
    }
  }

  static int64_t paired_size(int64_t rows, int64_t ld_maps) { return round_up(rows, kGroup) * ld_maps; }
  // Maps, rows of operands in the place of float32 values, as a right side.
  static void pair_rows(const float* maps, int64_t ld_maps, int64_t rows, int64_t columns, uint16_t* to) {
    const uint16_t* row = reinterpret_cast<const uint16_t*>(maps);
    for (int64_t r = 0; r < round_up(rows, kGroup); r += 2)
      pair(r < rows ? row + 2 * r * ld_maps : nullptr, r + 1 < rows ? row + 2 * (r + 1) * ld_maps : nullptr, columns,
           to + r * ld_maps);
  }

  // Four keys into columns: panels of kPanel keys, [depth / 2, kPanel] words each; and into rows, [keys / 2, ld_dim]
  // words.
  static void pack_four(Dtype dtype, const char* from, const Tensor& t, int64_t first, int64_t keys, int64_t dim,
                        const Plan& plan, uint16_t* columns, uint16_t* rows) {
    constexpr int64_t kLongest = 128;
    const int64_t inside = smaller(4, keys - first), padded = round_up(dim, 32);
    uint16_t four[4 * kLongest];
    for (int64_t r = 0; r < 4; r++)
      load_row(dtype, from + r * t.row * 2, t.dim, r < inside ? dim : 0, four + r * padded, padded);
    if (rows)
      for (int64_t r = 0; r < 4; r += 2)
        pair(four + r * padded, four + (r + 1) * padded, plan.ld_dim, rows + (first + r) * plan.ld_dim);
    if (!columns) return;
    float turned[kLongest / 2 * 4];
    transpose(reinterpret_cast<const float*>(four), padded / 2, 4, padded / 2, turned, 4);
    uint16_t* target = columns + first / kPanel * kPanel * plan.depth + 2 * (first % kPanel);
    for (int64_t d = 0; d < plan.depth / 2; d++) std::memcpy(target + 2 * d * kPanel, turned + 4 * d, sizeof(Vec4));
  }
};

// By the instruction set's dot products of pairs.
struct BFloat16Dots : BFloat16Operands<2> {
  static void begin() {}
  static void end() {}

  template <Start kStart>
  static void product(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, int64_t lda, const uint16_t* b,
                      int64_t ldb, float* c, int64_t ldc) {
    reattn::REATTN_ISA::product<Order::kRows, kStart, BFloat16Pairs>(rows, columns, depth / 2, words(a), lda / 2,
                                                                     words(b), ldb, c, ldc);
  }
  static void product_with_panels(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, int64_t lda,
                                  const uint16_t* b, float* c, int64_t ldc) {
    reattn::REATTN_ISA::product<Order::kRows, Start::kZero, BFloat16Pairs>(
        rows, columns, depth / 2, words(a), lda / 2, words(b), kPanel, c, ldc, nullptr, depth / 2 * kPanel);
  }
  static void add_transposed(int64_t dim, int64_t columns, int64_t rows, const uint16_t*, int64_t,
                             const uint16_t* transposed, const float* maps, int64_t ld_maps, uint16_t* paired, float* c,
                             int64_t ldc, bool first) {
    const int64_t depth = round_up(rows, kGroup);
    pair_rows(maps, ld_maps, rows, columns, paired);
    if (first)
      product<Start::kZero>(dim, columns, depth, transposed, depth, paired, ld_maps, c, ldc);
    else
      product<Start::kAccumulate>(dim, columns, depth, transposed, depth, paired, ld_maps, c, ldc);
  }
};

#if defined(REATTN_AMX)

// By the tile unit: 16 x 16 sums of 32 products each. Rows of A and C are read and written in sixteens; C has them, or
// is written through a buffer.
struct BFloat16Tiles : BFloat16Operands<32> {
  static constexpr int64_t kTile = 16, kDepth = 32;

  // Every tile is of full size.
  static void begin() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    // GCC 12 takes only the first bytes for read.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  static void end() { _tile_release(); }

  // Two by two tiles of C, or fewer.
  template <Start kStart>
  static void four_tiles(bool two_rows, bool two_columns, int64_t depth, const uint16_t* a, int64_t lda,
                         const int32_t* b0, const int32_t* b1, int64_t ldb, float* c, int64_t ldc) {
    const int64_t c_bytes = ldc * 4, a_bytes = lda * 2, b_bytes = ldb * 4;
    float* lower = c + kTile * ldc;
    if constexpr (kStart == Start::kAccumulate) {
      _tile_loadd(0, c, c_bytes);
      if (two_columns) _tile_loadd(1, c + kTile, c_bytes);
      if (two_rows) _tile_loadd(2, lower, c_bytes);
      if (two_rows && two_columns) _tile_loadd(3, lower + kTile, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += kDepth) {
      _tile_loadd(4, a + k, a_bytes);
      _tile_loadd(6, b0 + k / 2 * ldb, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if (two_columns) {
        _tile_loadd(7, b1 + k / 2 * ldb, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (two_rows) {
        _tile_loadd(5, a + kTile * lda + k, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if (two_columns) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, c_bytes);
    if (two_columns) _tile_stored(1, c + kTile, c_bytes);
    if (two_rows) _tile_stored(2, lower, c_bytes);
    if (two_rows && two_columns) _tile_stored(3, lower + kTile, c_bytes);
  }

  // Rows are rounded up to whole tiles, in A and in C. ldb and panel are in words.
  template <Start kStart>
  static void product_in_tiles(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, int64_t lda,
                               const int32_t* b, int64_t ldb, float* c, int64_t ldc, int64_t panel = kPanel) {
    const auto at = [&](int64_t column) { return b + column / kPanel * panel + column % kPanel; };
    for (int64_t column = 0; column < columns; column += 2 * kTile)
      for (int64_t row = 0; row < rows; row += 2 * kTile) {
        const bool two_columns = column + kTile < columns;
        four_tiles<kStart>(row + kTile < rows, two_columns, depth, a + row * lda, lda, at(column),
                           two_columns ? at(column + kTile) : nullptr, ldb, c + row * ldc + column, ldc);
      }
  }

  template <Start kStart>
  static void product(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, int64_t lda, const uint16_t* b,
                      int64_t ldb, float* c, int64_t ldc) {
    product_in_tiles<kStart>(rows, columns, depth, a, lda, words(b), ldb, c, ldc);
  }
  static void product_with_panels(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, int64_t lda,
                                  const uint16_t* b, float* c, int64_t ldc) {
    product_in_tiles<Start::kZero>(rows, columns, depth, a, lda, words(b), kPanel, c, ldc, depth / 2 * kPanel);
  }
  static void add_transposed(int64_t dim, int64_t columns, int64_t rows, const uint16_t*, int64_t,
                             const uint16_t* transposed, const float* maps, int64_t ld_maps, uint16_t* paired, float* c,
                             int64_t ldc, bool first) {
    const int64_t depth = round_up(rows, kGroup);
    pair_rows(maps, ld_maps, rows, columns, paired);
    // By way of a buffer: what these rows add is a sum of its own, whether it is added here or elsewhere, and the rows
    // below the last whole tile are another head's.
    float sums[2 * kTile * 2 * kTile];
    for (int64_t row = 0; row < dim; row += 2 * kTile)
      for (int64_t column = 0; column < columns; column += 2 * kTile) {
        const int64_t height = smaller(2 * kTile, dim - row), width = smaller(2 * kTile, columns - column);
        product<Start::kZero>(height, width, depth, transposed + row * depth, depth, paired + 2 * column, ld_maps, sums,
                              2 * kTile);
        for (int64_t d = 0; d < height; d++)
          for (int64_t i = 0; i < width; i += kTile) {
            float* to = c + (row + d) * ldc + column + i;
            const Vec sum = load(sums + d * 2 * kTile + i);
            reattn::REATTN_ISA::store(to, first ? sum : sum + load(to));
          }
      }
  }
};

#endif

}  // namespace REATTN_ISA
}  // namespace reattn

#endif
