// Mixing: products of weights with a row of all heads' maps, some vectors of keys at a time, all heads in registers.
#pragma once

#include "gemm.h"

namespace reattn {
namespace REATTN_ISA {

#if defined(REATTN_AVX512) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
// Vectors of keys at a time, beside which a weight and a vector of each are loaded; 0: too many heads.
constexpr int mixed_vectors(int heads) { return 2 * heads + 3 <= kRegisters ? 2 : heads + 2 <= kRegisters ? 1 : 0; }

// The weights: of row m and column k where Order is kRows, of row k and column m where it is kColumns.
struct Weights {
  const float* data;
  int64_t ld, depth;
  const float* bias;  // of each row, or null
};

template <int kHeads, int kVecs, Order kOrder, class Finish>
inline __attribute__((always_inline)) void mix_vectors(const Weights& w, const float* maps, int64_t ld, int64_t at,
                                                       const Finish& finish) {
  Vec sums[kHeads][kVecs];
#pragma GCC unroll 16
  for (int m = 0; m < kHeads; m++)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; v++) sums[m][v] = broadcast(w.bias ? w.bias[m] : 0.0f);
  const float *weight = w.data, *map = maps + at;
  for (int64_t k = 0; k < w.depth; k++) {
    Vec row[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; v++) row[v] = load(map + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kHeads; m++) {
      const Vec factor = broadcast(kOrder == Order::kRows ? weight[m * w.ld] : weight[m]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; v++) sums[m][v] += factor * row[v];
    }
    map += ld;
    weight += kOrder == Order::kRows ? 1 : w.ld;
  }
  finish(at, sums);
}

template <int kHeads, Order kOrder, class Finish>
__attribute__((noinline)) void mix_heads(const Weights& w, const float* maps, int64_t ld, int64_t size,
                                         const Finish& finish) {
  constexpr int kVecs = mixed_vectors(kHeads);
  // What is stored may lie anywhere, for all the compiler knows, but not here.
  const Weights weights = w;
  const Finish copy = finish;
  int64_t at = 0;
  for (; at + kVecs * kLanes <= size; at += kVecs * kLanes)
    mix_vectors<kHeads, kVecs, kOrder>(weights, maps, ld, at, copy);
  if (at < size) mix_vectors<kHeads, 1, kOrder>(weights, maps, ld, at, copy);
}

// Hands the products for so many heads, [heads, size], to finish(at, sums), some vectors from at on; maps are [depth,
// ld]. False, and nothing is done, if heads are more than registers hold.
template <Order kOrder, class Finish>
bool mix(int64_t heads, const Weights& w, const float* maps, int64_t ld, int64_t size, const Finish& finish) {
#define REATTN_CASE(M)                                                                                \
  case M:                                                                                             \
    if constexpr (mixed_vectors(M) > 0) return mix_heads<M, kOrder>(w, maps, ld, size, finish), true; \
    break;
  switch (heads) {
    // clang-format off
    REATTN_CASE(1) REATTN_CASE(2) REATTN_CASE(3) REATTN_CASE(4) REATTN_CASE(5) REATTN_CASE(6)
    REATTN_CASE(7) REATTN_CASE(8) REATTN_CASE(9) REATTN_CASE(10) REATTN_CASE(11) REATTN_CASE(12)
    REATTN_CASE(13) REATTN_CASE(14) REATTN_CASE(15) REATTN_CASE(16)
    // clang-format on
  }
#undef REATTN_CASE
  return false;
}

// Stores the products, to[heads, ld]; by a product that holds some heads at a time where there are many.
template <Order kOrder>
void mix_to(int64_t heads, const Weights& w, const float* maps, int64_t ld, int64_t size, float* to, int64_t ld_to) {
  const auto put = [=](int64_t at, const auto& sums) {
    constexpr int kHeads = sizeof sums / sizeof sums[0], kVecs = sizeof sums[0] / sizeof(Vec);
#pragma GCC unroll 16
    for (int m = 0; m < kHeads; m++)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; v++) store(to + m * ld_to + at + v * kLanes, sums[m][v]);
  };
  if (mix<kOrder>(heads, w, maps, ld, size, put)) return;
  if (w.bias)
    product<kOrder, Start::kBias>(heads, size, w.depth, w.data, w.ld, maps, ld, to, ld_to, w.bias);
  else
    product<kOrder, Start::kZero>(heads, size, w.depth, w.data, w.ld, maps, ld, to, ld_to);
}

}  // namespace REATTN_ISA
}  // namespace reattn
