// Which keys a query sees, and what is added to its scores: the only place that reads attn_mask.
#pragma once

#include <limits>

#include "shape.cuh"

// A call without a mask compiles nothing of it.
#ifndef REATTN_MASK
#define REATTN_MASK 0
#define REATTN_MASK_BY_HEAD 0
#define REATTN_MASK_BY_ROW 0
#define REATTN_MASK_KEY_STRIDE 0
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

// What one head of a sample has in the mask. Of the first `whole` keys, as far as they exist, nothing is hidden or
// added for all rows of the block.
class HeadMask {
 public:
  REATTN_DEVICE HeadMask(const Params& p, int sample, int head, int whole = 0)
      : p_(p), first_(sample * p.mask.batch_stride + (kMaskByHead ? head * p.mask.head_stride : 0)), whole_(whole) {}

  // What is added to a score: -infinity where the key is hidden or, unless it is said to, does not exist. Rows outside
  // have what the last one has.
  template <bool kExists = false>
  REATTN_DEVICE float added(int row, int key) const {
    if ((!kExists && key >= p_.key.rows) || (kCausal && key > row)) return -kInfinity;
    return of_mask(row, key);
  }
  REATTN_DEVICE bool sees(int row, int key) const { return added(row, key) != -kInfinity; }
  // Of a key that exists, in the mask alone.
  REATTN_DEVICE float of_mask(int row, int key) const {
    if constexpr (!kHasMask) return 0;
    int64_t place = first_ + (REATTN_MASK_KEY_STRIDE ? key * REATTN_MASK_KEY_STRIDE : key * p_.mask.key_stride);
    if constexpr (kMaskByRow) place += smaller(row, p_.query.rows - 1) * p_.mask.row_stride;
    if constexpr (!kAdded) {
      return read<bool>(static_cast<const bool*>(p_.mask.data) + place) ? 0 : -kInfinity;
    } else {
      const float value = number_at(static_cast<const Element*>(p_.mask.data) + place);
      return value <= kLowest ? -kInfinity : value;  // NaN does not hide
    }
  }

  // Visits tiles of 16 rows and 16 keys, laid out as products are: function(which 16 rows, left or right 8 keys,
  // number, what is added). Where nothing is hidden or added, nobody is called.
  template <int kTiles, class Function>
  REATTN_DEVICE void for_each(int first_row, int first_key, Function function) const {
    if (first_key + 16 <= whole_) return;
    if (first_key + 16 <= p_.key.rows)
      visit<kTiles, true>(first_row, first_key, function);
    else
      visit<kTiles, false>(first_row, first_key, function);
  }

 private:
  template <int kTiles, bool kExists, class Function>
  REATTN_DEVICE void visit(int first_row, int first_key, Function function) const {
#pragma unroll
    for (int i = 0; i < kTiles * 8; i++) {
      const int tile = i / 8, right = i / 4 % 2, number = i % 4;
      const int row = first_row + 16 * tile + number / 2 * 8 + lane() / 4;
      function(tile, right, number, added<kExists>(row, first_key + 8 * right + lane() % 4 * 2 + number % 2));
    }
  }

  const Params& p_;
  int64_t first_;
  int whole_;
};

// Of the first `whole` keys, as far as they exist, nothing is hidden or added, from `end` on all are hidden.
struct KeyRange {
  static constexpr int kAllKeys = 1 << 30;
  int whole, end;

  // For some rows of a sample, by a warp: where the mask hides the same from all heads and rows, it is read.
  REATTN_DEVICE KeyRange(const Params& p, int sample, int first_row, int rows) {
    whole = kHasMask ? 0 : kAllKeys, end = p.key.rows;
    if constexpr (kHasMask && !kMaskByHead && !kMaskByRow) {
      const HeadMask mask(p, sample, 0);
      int first = kAllKeys, last = -1;  // key of which something is hidden or added, key that is not hidden
      for (int some = lane(); some < round_up(p.key.rows, kWarp); some += 8 * kWarp)
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int key = smaller(some + i * kWarp, p.key.rows - 1);
          const float added = mask.of_mask(0, key);
          if (added != 0) first = smaller(first, key);
          if (added != -kInfinity) last = greater(last, key);
        }
      whole = smallest(first), end = 1 - smallest(-last);
      end = greater(end, 1);  // sweeps begin with some key
    }
    if constexpr (kCausal) whole = smaller(whole, first_row + 1), end = smaller(end, first_row + rows);
  }

  // Of 16 keys nothing is hidden or added.
  REATTN_DEVICE bool is_whole(int first_key) const { return first_key + 16 <= whole; }
  // As many keys from the first on, or fewer: those before something is hidden or added.
  REATTN_DEVICE int unhidden(int first_key, int keys) const {
    return kMasked ? smaller(keys, greater(whole - first_key, 0)) : keys;
  }
};

// Rows of a sample that a block owns, and the keys that they see.
struct Block {
  int sample, first_row;
  KeyRange range;

  REATTN_DEVICE Block(const Params& p, int sample, int first_row, int rows)
      : sample(sample), first_row(first_row), range(p, sample, first_row, rows) {}
  REATTN_DEVICE HeadMask mask(const Params& p, int head) const { return {p, sample, head, range.whole}; }
};

// What scores are multiplied by to be exponents of 2, once hide has seen them.
REATTN_DEVICE float score_factor(const Params& p) { return kAdded ? 1.0f : p.scale_log2; }

// Scores as the mask leaves them: -infinity where it hides a key, with what it adds to base 2.
template <int kTiles>
REATTN_DEVICE void hide(float (&scores)[kTiles][2][4], const Params& p, const HeadMask& mask, int first_row,
                        int first_key) {
  if constexpr (kAdded)
#pragma unroll
    for (int i = 0; i < kTiles * 8; i++) {
      float& score = scores[i / 8][i / 4 % 2][i % 4];
      score = rounded_product(score, p.scale_log2);
    }
  mask.for_each<kTiles>(first_row, first_key, [&](int tile, int right, int i, float added) {
    float& score = scores[tile][right][i];
    if constexpr (kAdded) score = fmaf(added, kLog2E, score);
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
