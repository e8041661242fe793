// Scores that are mixed over the heads before the softmax. The scaled products of query and key of a block's rows,
// rounded to the elements' type, lie in the heads' tiles; a warp mixes those of a row at a time. Both directions make
// the same scores of them, bit by bit.
#pragma once

#include "heads.cuh"
#include "scores.cuh"

namespace reattn {

// pre_theta as the second operand of products over heads. kBack: transposed, for gradients. In float16 times a power of
// two.
template <bool kBack>
class ScoreWeights {
 public:
  REATTN_DEVICE explicit ScoreWeights(const Params& p) : p_(p), unit_(kSmallRange ? unit_of(largest(), 116) : 1.0f) {
    if constexpr (!kFloat) {
#pragma unroll
      for (int step = 0; step < kHeadSteps; step++)
#pragma unroll
        for (int block = 0; block < kHeadBlocks; block++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int from = 16 * step + 8 * half + lane() % 4 * 2, to = 8 * block + lane() / 4;
            operand_[step][block][half] = pack<Narrow>(weight(from, to) * unit_, weight(from + 1, to) * unit_);
          }
    }
  }

  // What the sums of multiply are in units of.
  REATTN_DEVICE float unit() const { return unit_; }

  // Sums over the heads of what lies at 16 keys of a row, in tiles that begin at an offset.
  template <class RowHeads>
  REATTN_DEVICE void multiply(HeadsTile& sums, const RowHeads& heads, int offset, int row, int key) const {
    for_each_element([&](int block, int i, int, int) { sums[block][i] = 0; });
    if constexpr (kFloat) {
      for (int head = 0; head < kHeads; head++) {
        float numbers[2];
#pragma unroll
        for (int lower = 0; lower < 2; lower++)
          numbers[lower] = load<float>(number(offset, head, row, key + 8 * lower + lane() / 4));
        for_each_element([&](int block, int i, int to, int lower) {
          sums[block][i] = fmaf(numbers[lower], weight(head, to), sums[block][i]);
        });
      }
    } else {
      multiply(sums, heads.load(offset));
    }
  }
  REATTN_DEVICE void multiply(HeadsTile& sums, const HeadsOperand& operand) const {
#pragma unroll
    for (int block = 0; block < kHeadBlocks; block++)
#pragma unroll
      for (int step = 0; step < kHeadSteps; step++)
        multiply_add<Narrow>(sums[block], operand.part[step], operand_[step][block]);
  }

  static REATTN_DEVICE Shared<float> number(int offset, int head, int row, int key) {
    return as<float>(at(offset + head * kHeadStride + row * kRowStride)) + key;
  }

 private:
  // Zero outside.
  REATTN_DEVICE float weight(int from, int to) const {
    const int first = smaller(kBack ? to : from, kHeads - 1), second = smaller(kBack ? from : to, kHeads - 1);
    const float weight = read<float>(p_.pre_theta + unsigned(first * kHeads + second));
    return from < kHeads && to < kHeads ? weight : 0.0f;
  }
  REATTN_DEVICE float largest() const {
    float most = 0;
    for (int i = lane(); i < kHeads * kHeads; i += kWarp) most = larger(most, absolute(read<float>(p_.pre_theta + i)));
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) most = larger(most, shuffle_xor(most, mask));
    return most;
  }

  const Params& p_;
  float unit_;
  uint32_t operand_[kHeadSteps][kHeadBlocks][2];
};

// The mixed scores of rows of a block, from products that lie in the first tiles.
class MixedScores {
 public:
  REATTN_DEVICE MixedScores(const Params& p, const Block& block)
      : p_(p), block_(block), weights_(p), factor_(kLog2E / weights_.unit()) {}

  // To base 2, of 16 keys, as the mask leaves them: -infinity where it hides a key or there is none.
  template <class RowHeads>
  REATTN_DEVICE void get(HeadsTile& scores, const RowHeads& heads, int row, int first_key, int key) const {
    weights_.multiply(scores, heads, 0, row, key);
    // Rounded on its own, as in a softmax without mixing.
    for_each_element(
        [&](int block, int i, int, int) { scores[block][i] = rounded_product(scores[block][i], factor_); });
    hide(scores, block_.first_row + row, first_key + key);
  }

 private:
  REATTN_DEVICE void hide(HeadsTile& scores, int row, int first_key) const {
    const int key = first_key + lane() / 4;
    if (!kMasked || block_.range.is_whole(first_key)) {
      if (first_key + 16 > p_.key.rows)
        for_each_element([&](int block, int i, int, int lower) {
          if (key + 8 * lower >= p_.key.rows) scores[block][i] = -kInfinity;
        });
      return;
    }
    const auto add = [](float& score, float added) {
      if constexpr (kAdded) score = fmaf(added, kLog2E, score);
      if (added == -kInfinity) score = -kInfinity;
    };
    if constexpr (kMaskByHead) {
      for_each_element([&](int block, int i, int head, int lower) {
        add(scores[block][i], block_.mask(p_, smaller(head, kHeads - 1)).added(row, key + 8 * lower));
      });
    } else {
      const HeadMask mask = block_.mask(p_, 0);
      const float added[2] = {mask.added(row, key), mask.added(row, key + 8)};
      for_each_element([&](int block, int i, int, int lower) { add(scores[block][i], added[lower]); });
    }
  }

  const Params& p_;
  const Block& block_;
  ScoreWeights<false> weights_;
  float factor_;
};

// Nothing for heads that do not exist: what is stored of them may lie in the same place.
REATTN_DEVICE void clear_absent(HeadsTile& tile) {
  if constexpr (kPaddedHeads > kHeads)
    for_each_element([&](int block, int i, int head, int) {
      if (head >= kHeads) tile[block][i] = 0;
    });
}

// Of 16 keys a bit for each that some head sees of a row.
REATTN_DEVICE uint32_t seen_by_any(const Params& p, const Block& block, int row, int first_key) {
  if (block.range.is_whole(first_key)) return 0xffffu >> greater(first_key + 16 - p.key.rows, 0);
  const int key = first_key + lane() % 16;
  bool sees = false;
  for (int head = kMaskByHead ? lane() / 16 : 0; head < (kMaskByHead ? kHeads : 1); head += 2)
    sees = sees || block.mask(p, head).sees(row, key);
  const uint32_t bits = ballot(sees);
  return (bits | bits >> 16) & 0xffff;
}

}  // namespace reattn
