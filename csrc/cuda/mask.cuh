// Which keys a query sees, and what is added to its scores: the only place that reads attn_mask.
#pragma once

#include <limits>

#include "shape.cuh"

// A call without a mask compiles nothing of it.
#ifndef REATTN_MASK
#define REATTN_MASK 0
#define REATTN_MASK_BY_HEAD 0
#define REATTN_MASK_BY_ROW 0
#define REATTN_CAUSAL 0
#define REATTN_SEEN_BY_ROW 0
#endif

namespace reattn {

constexpr bool kHasMask = REATTN_MASK != 0, kAdded = REATTN_MASK == 2, kCausal = REATTN_CAUSAL;
constexpr bool kMasked = kHasMask || kCausal;
constexpr bool kMaskByHead = REATTN_MASK_BY_HEAD, kMaskByRow = REATTN_MASK_BY_ROW;  // it has strides of its own there
constexpr bool kSeenByRow = REATTN_SEEN_BY_ROW;  // value_sum has a row for each query

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.4426950408889634f;
// Hides a key, as -infinity does.
constexpr float kLowest = kFloat ? -3.4028234663852886e38f : kSmallRange ? -65504.0f : -3.3895313892515355e38f;

// What one head of a sample has in the mask.
class HeadMask {
 public:
  REATTN_DEVICE HeadMask(const Params& p, int sample, int head)
      : p_(p), first_(sample * p.mask.batch_stride + (kMaskByHead ? head * p.mask.head_stride : 0)) {}

  // What is added to a score: -infinity where the key is hidden or does not exist. Rows outside have what the last one
  // has.
  REATTN_DEVICE float operator()(int row, int key) const {
    if (key >= p_.key.rows || (kCausal && key > row)) return -kInfinity;
    if constexpr (!kHasMask) return 0;
    int64_t place = first_ + key * p_.mask.key_stride;
    if constexpr (kMaskByRow) place += smaller(row, p_.query.rows - 1) * p_.mask.row_stride;
    if constexpr (!kAdded) {
      return read<bool>(static_cast<const bool*>(p_.mask.data) + place) ? 0 : -kInfinity;
    } else {
      const float value = number_at(static_cast<const Element*>(p_.mask.data) + place);
      return value <= kLowest ? -kInfinity : value;  // NaN does not hide
    }
  }
  REATTN_DEVICE bool sees(int row, int key) const { return (*this)(row, key) != -kInfinity; }

 private:
  const Params& p_;
  int64_t first_;
};

// Visits what the mask has for tiles of 16 rows and 16 keys, laid out as products are: function(which 16 rows, left or
// right 8 keys, number, what is added). Where nothing is hidden or added, nobody is called.
template <int kTiles, class Function>
REATTN_DEVICE void for_each_masked(const HeadMask& mask, int first_row, int first_key, Function function) {
  // What the first row sees, all of them do.
  if (!kMaskByRow && !kAdded && all(mask.sees(first_row, first_key + lane() % 16))) return;
#pragma unroll
  for (int i = 0; i < kTiles * 8; i++) {
    const int tile = i / 8, right = i / 4 % 2, number = i % 4;
    const int row = first_row + 16 * tile + number / 2 * 8 + lane() / 4;
    function(tile, right, number, mask(row, first_key + 8 * right + lane() % 4 * 2 + number % 2));
  }
}

// What scores are multiplied by to be exponents of 2, once hide has seen them.
REATTN_DEVICE float score_factor(const Params& p) { return kAdded ? 1.0f : p.scale_log2; }

// Scores as the mask leaves them: -infinity where it hides a key, with what it adds to base 2.
template <int kTiles>
REATTN_DEVICE void hide(float (&scores)[kTiles][2][4], const Params& p, const HeadMask& mask, int first_row,
                        int first_key) {
  for_each_masked<kTiles>(mask, first_row, first_key, [&](int tile, int right, int i, float added) {
    float& score = scores[tile][right][i];
    if constexpr (kAdded) score = fmaf(added, kLog2E, rounded_product(score, p.scale_log2));
    if (added == -kInfinity) score = -kInfinity;
  });
}

// What strict sums make of numbers that are not finite.
REATTN_DEVICE float finite_or_zero(float number) { return absolute(number) < kInfinity ? number : 0.0f; }
REATTN_DEVICE uint32_t finite_or_zero(uint32_t word) {
  if constexpr (kFloat) {
    return absolute(__uint_as_float(word)) < kInfinity ? word : 0;
  } else {
    const float2 pair = unpack<Narrow>(word);
    return pack<Narrow>(finite_or_zero(pair.x), finite_or_zero(pair.y));
  }
}

}  // namespace reattn
