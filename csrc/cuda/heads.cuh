// What a warp does for all heads at 16 positions: 16 keys of one own row. Positions are rows, heads columns: with g =
// lane / 4 and t = lane % 4 a lane holds of 8 heads (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
#pragma once

#include "tiles.cuh"

namespace reattn {

// Floats in shared memory that one warp folds: see csrc/fold.h.
enum Vector { kShift, kGamma, kBeta, kCommon, kAlong, kUnit, kUnitFrom };
constexpr int kVectors = 7;
constexpr int kWeightStride = kPaddedHeads + 1;
constexpr int kFoldedBytes = round_up((kHeads * kWeightStride + kVectors * kPaddedHeads) * 4, 128);

class Folded {
 public:
  REATTN_DEVICE explicit Folded(int offset) : weights_(as<float>(at(offset))) {}

  // By one warp, a lane a head, those beyond the last one as well; the others read it after a sync of the block.
  // kScaled: with units, see unit_of: of the weights to a head, which the shift is multiplied by already, and of those
  // from a head. Layer norm compares the heads, they have one unit.
  template <bool kScaled>
  REATTN_DEVICE void prepare(const Params& p) const {
    Fold fold = p.fold;
    // Known when the kernel is compiled; and all that is read before anything is stored: the other warps wait for this
    // one.
    fold.p.norm = Norm(REATTN_NORM), fold.p.training = REATTN_TRAINING, fold.p.heads = fold.p.heads_out = kHeads;
    const int head = smaller(lane(), kHeads - 1);
    const bool inside = lane() < kHeads, has_gamma = inside && fold.has_gamma();
    const float gamma = has_gamma ? fold.gamma(head) : 0.0f, beta = has_gamma ? fold.beta(head) : 0.0f;
    const float common = has_gamma ? fold.common(head) : 0.0f, along = has_gamma ? fold.along(head) : 0.0f;
    const float mean = fold.row_mean(head), factor = fold.column_factor(head);
    float weights[kHeads];
#pragma unroll
    for (int g = 0; g < kHeads; g++) weights[g] = fold.weight(head, g, mean, shuffle(factor, g));
    float column_sum = 0, largest = 0, largest_from = 0;
#pragma unroll
    for (int g = 0; g < kHeads; g++) {
      store(weights_ + (head * kWeightStride + g), weights[g]);
      largest_from = larger(largest_from, absolute(weights[g]));
    }
    sync_warp();
    for (int from = 0; from < kHeads; from++) {
      const float weight = load<float>(weights_ + (from * kWeightStride + head));
      column_sum += weight, largest = larger(largest, absolute(weight));
    }
    const float shift = fold.shift(head, column_sum);
    // Maps that are kept are as much larger. Of a shift that is larger than all weights, these are next to nothing.
    largest = larger(largest * p.keep_scale, absolute(shift) * (kLayer ? 0x1p-40f : 0.125f));
    if constexpr (kLayer)
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) largest = larger(largest, shuffle_xor(largest, mask));
    const float unit = kScaled ? unit_of(largest, kLayer ? 50 : 116) : 1.0f;
    if (lane() < kPaddedHeads) {
      set(kShift, inside ? shift * unit : 0.0f);
      set(kGamma, gamma), set(kBeta, beta), set(kCommon, common), set(kAlong, along);
      set(kUnit, unit);
      set(kUnitFrom, kScaled ? unit_of(largest_from, 116) : 1.0f);
    }
  }

  REATTN_DEVICE float vector(Vector which, int head) const { return load<float>(weights_ + place(which, head)); }
  // See load_apart.
  REATTN_DEVICE float vector_apart(Vector which, int head) const { return load_apart(weights_ + place(which, head)); }
  // Zero outside.
  REATTN_DEVICE float weight(int from, int to) const {
    return from < kHeads && to < kHeads ? load<float>(weights_ + (from * kWeightStride + to)) : 0.0f;
  }

 private:
  static REATTN_DEVICE int place(Vector which, int head) {
    return kHeads * kWeightStride + which * kPaddedHeads + head;
  }
  REATTN_DEVICE void set(Vector which, float value) const { store(weights_ + place(which, lane()), value); }

  Shared<float> weights_;
};

// All heads at 16 positions, as a product over heads takes them, in float32 what it makes.
using HeadsTile = float[kHeadBlocks][4];
struct HeadsOperand {
  uint32_t part[kHeadSteps][4];
};

// Calls function(which 8 heads, index in a lane's four numbers, head, 0 or 1 for the lower 8 positions).
template <class Function>
REATTN_DEVICE void for_each_element(Function function) {
#pragma unroll
  for (int block = 0; block < kHeadBlocks; block++)
#pragma unroll
    for (int i = 0; i < 4; i++) function(block, i, 8 * block + lane() % 4 * 2 + i % 2, i / 2);
}

// Calls function(which 8 heads, index in a lane's two, head).
template <class Function>
REATTN_DEVICE void for_each_head_of_lane(Function function) {
#pragma unroll
  for (int block = 0; block < kHeadBlocks; block++)
#pragma unroll
    for (int i = 0; i < 2; i++) function(block, i, 8 * block + lane() % 4 * 2 + i);
}

// Which heads see which of 16 keys of a row; a lane knows it of its elements.
class Visible {
 public:
  Visible() = default;
  REATTN_DEVICE Visible(const Params& p, const Block& block, int row, int key) {
    if constexpr (kMaskByHead)
      for_each_element([&](int eight, int i, int head, int lower) {
        const HeadMask mask = block.mask(p, smaller(head, kHeads - 1));
        bits_ |= uint32_t(mask.sees(row, key + 8 * lower + lane() / 4)) << place(eight, i);
      });
    else if (block.range.is_whole(key))
      bits_ = 0xffff >> greater(key + 16 - p.key.rows, 0);
    else
      bits_ = ballot(block.mask(p, 0).sees(row, key + lane() % 16)) & 0xffff;
  }
  REATTN_DEVICE bool operator()(int block, int i) const { return bits_ >> place(block, i) & 1; }
  REATTN_DEVICE void clear_hidden(HeadsTile& tile) const {
    for_each_element([&](int block, int i, int, int) {
      if (!(*this)(block, i)) tile[block][i] = 0;
    });
  }
  // Keys, where heads do not differ.
  REATTN_DEVICE int count() const { return count_bits(bits_); }

 private:
  static REATTN_DEVICE int place(int block, int i) { return kMaskByHead ? block * 4 + i : i / 2 * 8 + lane() / 4; }

  uint32_t bits_ = 0;
};

// A walk along a row's keys, 16 at a time, through the maps of all heads, which lie with heads as rows.
// kSpare: across, the rows of heads that do not exist are the 16 ones that lie at `spare`.
template <bool kSpare = false>
class Heads {
 public:
  REATTN_DEVICE Heads(Shared<char> maps, int row, Shared<char> spare = {}) {
#pragma unroll
    for (int step = 0; step < kHeadSteps; step++) {
      const int head = 16 * step + lane() / 16 * 8 + lane() % 8;
      const Shared<char> first = maps + (row * kRowStride + lane() / 8 % 2 * 16);
      from_[step] = first + smaller(head, kHeads - 1) * kHeadStride;
      // Heads that do not exist go to the gaps behind a row, which nobody reads.
      int gap = 2 * (head - kHeads) + lane() / 8 % 2;
      if constexpr (2 * (kPaddedHeads - kHeads) > kHeads) gap %= kHeads;
      to_[step] = head < kHeads ? from_[step] : maps + (row * kRowStride + gap * kHeadStride + kRowStride - 16);
      advance_[step] = head < kHeads ? 32 : 0;
      const int across = 16 * step + lane_row();
      exists_[step] = !kSpare || across < kHeads;
      across_[step] = exists_[step] ? maps + (row * kRowStride + smaller(across, kHeads - 1) * kHeadStride) : spare;
      across_[step] = across_[step] + lane_column() * 2;
    }
  }
  REATTN_DEVICE void advance(int times = 1) {
#pragma unroll
    for (int step = 0; step < kHeadSteps; step++) {
      from_[step] = from_[step] + 32 * times;
      to_[step] = to_[step] + advance_[step] * times;
      across_[step] = across_[step] + (exists_[step] ? 32 * times : 0);
    }
  }
  // The walk along a row further down, from the same key.
  REATTN_DEVICE void descend(int rows) {
#pragma unroll
    for (int step = 0; step < kHeadSteps; step++) {
      from_[step] = from_[step] + rows * kRowStride;
      to_[step] = to_[step] + rows * kRowStride;
      across_[step] = across_[step] + (exists_[step] ? rows * kRowStride : 0);
    }
  }

  // Positions as rows. Offset: in bytes, of other maps or other keys.
  REATTN_DEVICE HeadsOperand load(int offset = 0) const {
    HeadsOperand heads;
#pragma unroll
    for (int step = 0; step < kHeadSteps; step++)
      if (2 * step + 1 < kHeadBlocks) {
        load_matrices_transposed(heads.part[step], from_[step] + offset);
      } else {
        uint32_t two[2];
        load_two_matrices_transposed(two, from_[step] + offset);
        heads.part[step][0] = two[0], heads.part[step][1] = two[1], heads.part[step][2] = heads.part[step][3] = 0;
      }
    return heads;
  }
  template <class T = Narrow>
  REATTN_DEVICE void store(const HeadsTile& tile, int offset = 0) const {
#pragma unroll
    for (int step = 0; step < kHeadSteps; step++) {
      const float (&left)[4] = tile[2 * step];
      if (2 * step + 1 < kHeadBlocks) {
        const float (&right)[4] = tile[smaller(2 * step + 1, kHeadBlocks - 1)];
        store_matrices_transposed(to_[step] + offset, {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                                                       pack<T>(right[0], right[1]), pack<T>(right[2], right[3])});
      } else {
        store_two_matrices_transposed(to_[step] + offset, {pack<T>(left[0], left[1]), pack<T>(left[2], left[3])});
      }
    }
  }
  // Heads as rows, 16 of them.
  REATTN_DEVICE void load_across(uint32_t (&matrices)[4], int step) const { load_matrices(matrices, across_[step]); }

 private:
  Shared<char> from_[kHeadSteps], to_[kHeadSteps], across_[kHeadSteps];
  int advance_[kHeadSteps];
  bool exists_[kHeadSteps];
};

// Sums over a lane's heads and those of its neighbours, at its two positions.
template <class Function>
REATTN_DEVICE float2 sums_over_heads(const NeighbourSums& neighbour_sums, Function function) {
  float sums[2];
#pragma unroll
  for (int i = 0; i < 4; i++) sums[i / 2] = i % 2 ? sums[i / 2] + function(0, i) : function(0, i);
#pragma unroll
  for (int block = 1; block < kHeadBlocks; block++)
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i / 2] += function(block, i);
  return neighbour_sums(sums[0], sums[1]);
}

}  // namespace reattn
