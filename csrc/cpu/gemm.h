// Small products out of registers. Rows of B and C lie ld apart and are read and written in whole vectors.
#pragma once

#include "vec.h"

namespace reattn {
namespace REATTN_ISA {

#if defined(REATTN_AVX512)
constexpr int kRowTile = 8, kColumnVecs = 3;
#else
constexpr int kRowTile = 6, kColumnVecs = 2;
#endif

// What C holds before the products are added.
enum class Start { kZero, kAccumulate, kBias };
// Where A[m, k] lies: rows m, or columns k, are lda apart.
enum class Order { kRows, kColumns };

// What is multiplied: a word of A with each lane of a row of B.
struct Floats {
  using Word = float;
  using Words = Vec;
  static Vec add(Vec sum, Vec a, Vec b) { return sum + a * b; }
};

#if defined(REATTN_BFLOAT16)
// Two neighbours along the depth in each word.
struct BFloat16Pairs {
  typedef int32_t Word __attribute__((may_alias));
  using Words = VecI;
  static Vec add(Vec sum, VecI a, VecI b) {
    return reinterpret_cast<Vec>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
};
#endif

template <class A, int M, int N, Order kOrder, Start kStart>
__attribute__((noinline)) void product_tile(const typename A::Word* __restrict a, int64_t lda,
                                            const typename A::Word* __restrict b, int64_t ldb, float* __restrict c,
                                            int64_t ldc, int64_t depth, const float* bias) {
  Vec acc[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      acc[m][n] = kStart == Start::kBias ? broadcast(bias[m]) : Vec{};
    }
  for (int64_t k = 0; k < depth; k++) {
    typename A::Words row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) row[n] = load_as<typename A::Words>(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const typename A::Words factor = broadcast(kOrder == Order::kRows ? a[m * lda] : a[m]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) acc[m][n] = A::add(acc[m][n], factor, row[n]);
    }
    b += ldb;
    a += kOrder == Order::kRows ? 1 : lda;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      float* to = c + m * ldc + n * kLanes;
      store(to, kStart == Start::kAccumulate ? acc[m][n] + load(to) : acc[m][n]);
    }
}

template <class A, int M, Order kOrder, Start kStart>
inline void product_rows(int64_t vecs, const typename A::Word* a, int64_t lda, const typename A::Word* b, int64_t ldb,
                         float* c, int64_t ldc, int64_t depth, const float* bias) {
  if constexpr (kColumnVecs >= 3)
    if (vecs == 3) return product_tile<A, M, 3, kOrder, kStart>(a, lda, b, ldb, c, ldc, depth, bias);
  if (vecs == 2) return product_tile<A, M, 2, kOrder, kStart>(a, lda, b, ldb, c, ldc, depth, bias);
  product_tile<A, M, 1, kOrder, kStart>(a, lda, b, ldb, c, ldc, depth, bias);
}

// The longest sum that is not cut into parts: rounding errors grow with the length.
constexpr int64_t kLongestSum = 128;

// Columns that a tile of a product covers.
constexpr int64_t kPanel = kColumnVecs * kLanes;

// C[rows, columns] = start + A[rows, depth] B[depth, columns], columns a multiple of the vector length. Where B is
// packed in panels of kPanel columns, each [depth, kPanel], panel is the distance between them and ldb is kPanel. Depth
// and all distances are in words.
template <Order kOrder, Start kStart, class A = Floats>
void product(int64_t rows, int64_t columns, int64_t depth, const typename A::Word* a, int64_t lda,
             const typename A::Word* b, int64_t ldb, float* c, int64_t ldc, const float* bias = nullptr,
             int64_t panel = kPanel) {
  if (depth > kLongestSum) {
    const int64_t head = (depth + 1) / 2;
    product<kOrder, kStart, A>(rows, columns, head, a, lda, b, ldb, c, ldc, bias, panel);
    a += kOrder == Order::kRows ? head : head * lda;
    return product<kOrder, Start::kAccumulate, A>(rows, columns, depth - head, a, lda, b + head * ldb, ldb, c, ldc,
                                                  nullptr, panel);
  }
  const int64_t tiles = (rows + kRowTile - 1) / kRowTile, size = rows / tiles, larger = rows % tiles;
  for (int64_t column = 0; column < columns; column += kPanel, b += panel) {
    const int64_t left = (columns - column) / kLanes, vecs = left < kColumnVecs ? left : kColumnVecs;
    int64_t row = 0;
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t m = size + (tile < larger);
      const typename A::Word* a_tile = a + (kOrder == Order::kRows ? row * lda : row);
      const float* bias_tile = kStart == Start::kBias ? bias + row : nullptr;
      float* c_tile = c + row * ldc + column;
#define REATTN_CASE(M)                                                                              \
  case M:                                                                                           \
    if constexpr (M <= kRowTile)                                                                    \
      product_rows<A, M, kOrder, kStart>(vecs, a_tile, lda, b, ldb, c_tile, ldc, depth, bias_tile); \
    break;
      switch (m) {
        // clang-format off
        REATTN_CASE(1) REATTN_CASE(2) REATTN_CASE(3) REATTN_CASE(4)
        REATTN_CASE(5) REATTN_CASE(6) REATTN_CASE(7) REATTN_CASE(8)
        // clang-format on
      }
#undef REATTN_CASE
      row += m;
    }
  }
}

template <int M, int N>
__attribute__((noinline)) void dot_tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                                        int64_t vecs) {
  Vec acc[M][N];
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) acc[m][n] = load(c + (m * ldc + n) * kLanes);
  for (int64_t i = 0; i < vecs; i++) {
    Vec right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) right[n] = load(b + n * ldb + i * kLanes);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      const Vec left = load(a + m * lda + i * kLanes);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) acc[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(c + (m * ldc + n) * kLanes, acc[m][n]);
}

// C[m, n] += A[m, :] . B[n, :] over whole vectors of columns, lane by lane: C holds a vector for each of its ldc
// columns. With upper, only tiles that reach the diagonal or lie above it.
inline void dot_rows(int64_t rows, int64_t columns, int64_t vecs, const float* a, int64_t lda, const float* b,
                     int64_t ldb, float* c, int64_t ldc, bool upper = false) {
  constexpr int kM = 3, kN = 4;
  for (int64_t m = 0; m < rows; m += kM)
    for (int64_t n = upper ? m / kN * kN : 0; n < columns; n += kN) {
      const int64_t height = rows - m < kM ? rows - m : kM, width = columns - n < kN ? columns - n : kN;
      const float *a_tile = a + m * lda, *b_tile = b + n * ldb;
      float* c_tile = c + (m * ldc + n) * kLanes;
#define REATTN_CASE(M, N)                                        \
  case 4 * (M - 1) + (N - 1):                                    \
    dot_tile<M, N>(a_tile, lda, b_tile, ldb, c_tile, ldc, vecs); \
    break;
      switch (4 * (height - 1) + (width - 1)) {
        // clang-format off
        REATTN_CASE(1, 1) REATTN_CASE(1, 2) REATTN_CASE(1, 3) REATTN_CASE(1, 4)
        REATTN_CASE(2, 1) REATTN_CASE(2, 2) REATTN_CASE(2, 3) REATTN_CASE(2, 4)
        REATTN_CASE(3, 1) REATTN_CASE(3, 2) REATTN_CASE(3, 3) REATTN_CASE(3, 4)
        // clang-format on
      }
#undef REATTN_CASE
    }
}

}  // namespace REATTN_ISA
}  // namespace reattn
