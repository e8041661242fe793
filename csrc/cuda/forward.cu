// The output and the LSE; with batch statistics, what the mixed maps make of the values, and sums over the mixed maps.
#include "mixed_scores.cuh"

namespace reattn {

// Shared memory.
constexpr int kStages = kMapBytes;
constexpr int kWarpStages = kDirect ? 0 : 2 * kStageBytes;
constexpr int kSums = round_up(kStages + kWarps * kWarpStages, 128);  // of softmax, by row and head
constexpr int kReferences = kSums + kRows * kPaddedHeads * 4;         // by row and head, where they are read again
constexpr int kFolded = round_up(kReferences + (kResident ? 0 : kRows * kPaddedHeads * 4), 128);
constexpr int kMoments = kFolded + kFoldedBytes;  // (2, warps, padded heads); with a mask 3, its positions the last
constexpr int kNumbers = kMasked ? 3 : 2;
constexpr int kBytes = kMoments + (kStatistics ? kNumbers * kWarps * kPaddedHeads * 4 : 0);
static_assert(kBytes == REATTN_SHARED_BYTES, "the plan knows how much shared memory a block takes");

constexpr bool kLessStored = kStatistics && kSmallRange;

REATTN_DEVICE Shared<float> of_row(int offset, int row, int head) {
  return as<float>(at(offset)) + (row * kPaddedHeads + head);
}

// Sums over the mixed maps of a warp and over their squares, of heads 8 block + lane % 4 * 2 and the next; on tensor
// cores of what lies on the diagonal of products, in the first. With a mask, the number of positions that are seen:
// where heads do not differ, in the first for all of them.
struct MixedSums {
  float sums[kHeadBlocks][2] = {}, squares[kHeadBlocks][2] = {}, positions[kHeadBlocks][2] = {};

  REATTN_DEVICE void count(const Visible& visible) {
    if constexpr (kMaskByHead)
      for_each_element([&](int block, int i, int, int) { positions[block][i % 2] += visible(block, i); });
    else
      positions[0][0] += float(visible.count());
  }

  // To those of the warp's other rows, in shared memory.
  REATTN_DEVICE void add_up(int warp) {
    const Shared<float> moments = as<float>(at(kMoments));
#pragma unroll
    for (int block = 0; block < kHeadBlocks; block++) {
      if constexpr (kFloat) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int mask = 4; mask < kWarp; mask *= 2) {
            sums[block][i] += shuffle_xor(sums[block][i], mask);
            squares[block][i] += shuffle_xor(squares[block][i], mask);
          }
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (lane() < 4) {
            const int head = 8 * block + lane() * 2 + i;
            add_to(moments + (warp * kPaddedHeads + head), sums[block][i]);
            add_to(moments + ((kWarps + warp) * kPaddedHeads + head), squares[block][i]);
          }
      } else if (lane() % 4 == lane() / 8) {
        // The diagonal of the products of maps with maps.
        add_to(moments + (warp * kPaddedHeads + 8 * block + lane() / 4), sums[block][0]);
        add_to(moments + ((kWarps + warp) * kPaddedHeads + 8 * block + lane() / 4), squares[block][0]);
      }
    }
    if constexpr (kMasked) add_up_positions(moments + (2 * kWarps + warp) * kPaddedHeads);
  }

  // What is added to, and what all warps come to, added up in order. All threads have to come here.
  static REATTN_DEVICE void clear() {
    for (int i = thread(); i < kNumbers * kWarps * kPaddedHeads; i += threads())
      reattn::store(as<float>(at(kMoments)) + i, 0.0f);
  }
  static REATTN_DEVICE void store(const Params& p) {
    sync_block();
    if (block_y() > 0) return;  // blocks for other columns of an output have the same
    for (int i = thread(); i < kNumbers * kHeads; i += threads()) {
      float sum = 0;
      for (int from = 0; from < kWarps; from++)
        sum += load<float>(as<float>(at(kMoments)) + ((i / kHeads * kWarps + from) * kPaddedHeads + i % kHeads));
      write(p.vectors + (i * p.blocks + block_x()), sum);
    }
  }

 private:
  static REATTN_DEVICE void add_to(Shared<float> sum, float number) { reattn::store(sum, load<float>(sum) + number); }
  REATTN_DEVICE void add_up_positions(Shared<float> to) {
    if constexpr (!kMaskByHead) {
      if (lane() < kPaddedHeads) add_to(to + lane(), positions[0][0]);
    } else {
#pragma unroll
      for (int block = 0; block < kHeadBlocks; block++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float& number = positions[block][i];
#pragma unroll
          for (int mask = 4; mask < kWarp; mask *= 2) number += shuffle_xor(number, mask);
          if (lane() < 4) add_to(to + (8 * block + lane() * 2 + i), number);
        }
    }
  }
};

// The softmax of a warp's rows, whose scores are mixed over the heads: of what leave_products left in the heads' tiles
// it makes maps in their place, as Softmax does. The largest score of a row is the reference.
class RowSoftmax {
 public:
  REATTN_DEVICE RowSoftmax(const Params& p, const Block& block) : p_(p), block_(block), scores_(p, block) {}

  // Of the first keys, and maybe the last, some at a time. kSum: finds reference and sum; kFill: leaves the maps, after
  // dropout.
  template <bool kFill, bool kSum>
  REATTN_DEVICE void run(int warp, int rows, int first_key, int keys) const {
    const Dropout dropout(p_, block_.sample, 0);
    const bool begins = kResident || first_key == 0, ends = kResident || first_key + keys == block_.range.end;
    Heads<> first(at(0), warp);
#pragma unroll 1
    for (int row = warp; row < rows; row += kWarps, first.descend(kWarps)) {
      float reference[kHeadBlocks][2], sum[kHeadBlocks][2] = {};
      if constexpr (kSum) {
        for_each_head_of_lane([&](int block, int i, int) { reference[block][i] = -kInfinity; });
        sweep(first, row, first_key, keys, [&](HeadsTile& scores, const Heads<>&, int) {
          for_each_element([&](int block, int i, int, int) {
            reference[block][i % 2] = larger(reference[block][i % 2], scores[block][i]);
          });
        });
        for_each_head_of_lane([&](int block, int i, int head) {
          float& largest = reference[block][i];
#pragma unroll
          for (int mask = 4; mask < kWarp; mask *= 2) largest = larger(largest, shuffle_xor(largest, mask));
          if (begins) return;
          head = smaller(head, kHeads - 1);
          const float before = load<float>(of_row(kReferences, row, head));
          largest = larger(largest, before);
          // Of the keys before; in one lane.
          if (lane() < 4) sum[block][i] = load<float>(of_row(kSums, row, head)) * fast_exp2(before - shift_of(largest));
        });
      } else {
        for_each_head_of_lane([&](int block, int i, int head) {
          reference[block][i] = load<float>(of_row(kReferences, row, smaller(head, kHeads - 1)));
        });
      }
      sweep(first, row, first_key, keys, [&](HeadsTile& maps, const Heads<>& heads, int key) {
        for_each_element([&](int block, int i, int, int) {
          float& map = maps[block][i];
          map = fast_exp2(map - shift_of(reference[block][i % 2]));
          if constexpr (kSum && kFloat) sum[block][i % 2] += map;
        });
        if constexpr (kSum && !kFloat) {  // of what is held
#pragma unroll
          for (int i = 0; i < 2 * kHeadBlocks; i++) {
            const float* pair = maps[i / 2] + i % 2 * 2;
            const float2 held = unpack<Half>(pack<Half>(pair[0], pair[1]));
            sum[i / 2][0] += held.x, sum[i / 2][1] += held.y;
          }
        }
        if constexpr (!kFill) return;
        if constexpr (kDropout) {
#pragma unroll
          for (int block = 0; block < kHeadBlocks; block++) {
            const uint32_t kept = dropout.kept_of_heads(8 * block, block_.first_row + row, first_key + key);
#pragma unroll
            for (int i = 0; i < 4; i++)
              if (!(kept >> i & 1)) maps[block][i] = 0;
          }
        }
        if constexpr (!kFloat) clear_absent(maps);
        sync_warp();  // all lanes have the products
        if constexpr (kFloat)
          for_each_element([&](int block, int i, int head, int lower) {
            if (head < kHeads)
              store(ScoreWeights<false>::number(0, head, row, key + 8 * lower + lane() / 4), maps[block][i]);
          });
        else
          heads.store<Half>(maps);
      });
      if constexpr (!kSum) continue;
      for_each_head_of_lane([&](int block, int i, int) {
#pragma unroll
        for (int mask = 4; mask < kWarp; mask *= 2) sum[block][i] += shuffle_xor(sum[block][i], mask);
      });
      sync_warp();  // all lanes have read what was there
      if (lane() < 4)
        for_each_head_of_lane([&](int block, int i, int head) {
          if (head >= kHeads) return;
          const float all = sum[block][i], shift = shift_of(reference[block][i]);
          // Maps of a row that sees nothing are zero, divided by whatever else.
          store(of_row(kSums, row, head), kMasked && ends && all == 0 ? 1.0f : all);
          if constexpr (!kResident) store(of_row(kReferences, row, head), ends ? shift : reference[block][i]);
          // Blocks for other columns of an output have the same.
          if (ends && block_y() == 0)
            write(p_.lse + row_index(p_, block_.sample, head, block_.first_row + row),
                  shift + (kFloat ? log2(all) : fast_log2(all)));
        });
    }
  }

 private:
  // Else -inf - -inf.
  static REATTN_DEVICE float shift_of(float reference) { return reference == -kInfinity ? 0.0f : reference; }

  // Calls function(scores, where their keys lie, key) for all keys of a row, 16 at a time.
  template <class Function>
  REATTN_DEVICE void sweep(Heads<> heads, int row, int first_key, int keys, Function function) const {
#pragma unroll 1
    for (int key = 0; key < keys; key += 16, heads.advance()) {
      HeadsTile scores;
      scores_.get(scores, heads, row, first_key, key);
      function(scores, heads, key);
    }
  }

  const Params& p_;
  const Block& block_;
  MixedScores scores_;
};

// Mixes the heads of a warp's rows, and normalises them.
class RowMixing {
 public:
  REATTN_DEVICE RowMixing(const Params& p, MixedSums& moments)
      : p_(p),
        moments_(moments),
        folded_(kFolded),
        squares_and_eps_([&] {
          const float unit = folded_.vector_apart(kUnit, 0);
          return p.fold.p.eps * kHeads * unit * unit;
        }),
        keep_(kDropout ? p.keep_scale : 1.0f),
        centre_(kFloat ? p.centre : p.centre / keep_),
        stored_(kLessStored ? stored_part(p.key.rows) : 1.0f) {
    for_each_element([&](int block, int i, int head, int) {
      shift_[block][i] = folded_.vector_apart(kShift, head);
      // Layer norm divides by the root of the sum of squares, not of their mean.
      gamma_[block][i % 2] = folded_.vector(kGamma, head) * square_root(float(kHeads));
      beta_[block][i % 2] = folded_.vector(kBeta, head);
    });
    if constexpr (!kFloat)
      for_each_weight([&](int step, int block, int i, int from, int to) {
        weights_[step][block][i] = folded_.weight(from, to) * folded_.vector(kUnit, 8 * block + lane() / 4);
      });
  }

  // The maps of the warp's rows, in place; those outside the sequence become zero where they would not be finite or are
  // summed, those that are hidden always.
  REATTN_DEVICE void mix(const Block& block, int first_key, int warp, int rows, int keys) {
    Heads<> first(at(0), warp);
#pragma unroll 1
    for (int row = warp; row < rows; row += kWarps, first.descend(kWarps)) {
      if constexpr (!kFloat) weigh(row);
      Heads<> heads = first;
      float sums[kHeadSteps][4] = {}, squares[kHeadBlocks][4] = {};
      // Nothing is hidden of those in pairs.
      const int in_pairs = block.range.unhidden(first_key, keys) / 32 * 32;
      if constexpr (kStatistics && kMasked) moments_.positions[0][0] += float(in_pairs);
#pragma unroll kAtOnce
      for (int key = 0; key < in_pairs; key += 32)
        mix_some<2, false>(block, first_key, heads, row, key, keys, sums, squares);
#pragma unroll 1
      for (int key = in_pairs; key < keys; key += 16)
        mix_some<1, kLayer || kStatistics>(block, first_key, heads, row, key, keys, sums, squares);
      // Row by row: long sums of products on tensor cores lose digits.
      if constexpr (kStatistics && !kFloat)
#pragma unroll
        for (int block = 0; block < kHeadBlocks; block++) {
          const int lower = block % 2 * 2;
          moments_.sums[block][0] += sums[block / 2][lower];
          moments_.squares[block][0] += lane() / 4 % 2 ? squares[block][lower + 1] : squares[block][lower];
        }
    }
  }

 private:
  static constexpr int kAtOnce = kHeadSteps > 1 ? 1 : 2;  // loops are unrolled where there is little in them

  // The maps of kGroups times 16 keys.
  template <int kGroups, bool kRagged>
  REATTN_DEVICE void mix_some(const Block& owned, int first_key, Heads<>& heads, int row, int key, int keys,
                              float (&sums)[kHeadSteps][4], float (&squares)[kHeadBlocks][4]) {
    HeadsTile mixed[kGroups];
    multiply(mixed, heads, row, key);
#pragma unroll
    for (int group = 0; group < kGroups; group++) {
      HeadsTile& tile = mixed[group];
      if constexpr (kLayer) {
        const float2 sums =
            sums_over_heads(squares_and_eps_, [&](int block, int i) { return tile[block][i] * tile[block][i]; });
        const float scales[2] = {fast_inverse_sqrt(sums.x), fast_inverse_sqrt(sums.y)};
        for_each_element([&](int block, int i, int, int lower) {
          tile[block][i] = fmaf(tile[block][i] * scales[lower], gamma_[block][i % 2], beta_[block][i % 2]);
        });
      }
      if constexpr (kLessStored) for_each_element([&](int block, int i, int, int) { tile[block][i] *= stored_; });
      if constexpr (kMasked && kGroups == 1) {
        const Visible visible(p_, owned, owned.first_row + row, first_key + key);
        if constexpr (kStatistics) moments_.count(visible);
        for_each_element([&](int block, int i, int, int) {
          if (!visible(block, i)) tile[block][i] = 0;
        });
      } else if constexpr (kRagged) {
        for_each_element([&](int block, int i, int, int lower) {
          if (key + 16 * group + 8 * lower + lane() / 4 >= keys) tile[block][i] = 0;
        });
      }
    }
    if constexpr (kFloat) {
      sync_warp();
#pragma unroll
      for (int group = 0; group < kGroups; group++)
        for_each_element([&](int block, int i, int head, int lower) {
          if (head < kHeads) store(map(head, row, key + 16 * group + 8 * lower + lane() / 4), mixed[group][block][i]);
          if constexpr (kStatistics) {
            moments_.sums[block][i % 2] += mixed[group][block][i];
            moments_.squares[block][i % 2] =
                fmaf(mixed[group][block][i], mixed[group][block][i], moments_.squares[block][i % 2]);
          }
        });
      heads.advance(kGroups);
    } else {
      sync_warp();
      Heads<> across = heads;
#pragma unroll
      for (int group = 0; group < kGroups; group++, heads.advance()) heads.store(mixed[group]);
      if constexpr (kStatistics) {
        sync_warp();
#pragma unroll
        for (int group = 0; group < kGroups; group++, across.advance()) add_moments(sums, squares, across);
      }
    }
  }

  // Visits a lane's part of the weights as the second operand of a product over heads.
  template <class Function>
  static REATTN_DEVICE void for_each_weight(Function function) {
#pragma unroll
    for (int step = 0; step < kHeadSteps; step++)
#pragma unroll
      for (int block = 0; block < kHeadBlocks; block++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          function(step, block, i, 16 * step + i / 2 * 8 + lane() % 4 * 2 + i % 2, 8 * block + lane() / 4);
  }

  static REATTN_DEVICE Shared<float> map(int head, int row, int key) {
    return as<float>(at(head * kHeadStride + row * kRowStride)) + key;
  }

  // The weights for a row, which divide the maps by their sums; and what makes them maps less their centre: exactly, of
  // the weights as they are rounded, so that rounding counts only for what differs from the centre.
  REATTN_DEVICE void weigh(int row) {
    float factors[kHeadSteps][4];
    uint32_t centres[kHeadSteps][4];
#pragma unroll
    for (int step = 0; step < kHeadSteps; step++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int head = 16 * step + 8 * half + lane() % 4 * 2;
        const float2 sums = head < kPaddedHeads ? load<float2>(of_row(kSums, row, head)) : float2{1, 1};
        factors[step][2 * half] = keep_ * fast_inverse(sums.x),
                          factors[step][2 * half + 1] = keep_ * fast_inverse(sums.y);
        const float first = centre_ * sums.x, second = centre_ * sums.y;
        // What float16 cannot hold of it lies in the lower eight rows.
        centres[step][2 * half] = pack<Half>(first, second);
        const float2 held = unpack<Half>(centres[step][2 * half]);
        centres[step][2 * half + 1] = pack<Half>(first - held.x, second - held.y);
      }
    for_each_weight([&](int step, int block, int i, int, int) {
      if (i % 2 == 0)
        operand_[step][block][i / 2] = pack<Half>(weights_[step][block][i] * factors[step][i],
                                                  weights_[step][block][i + 1] * factors[step][i + 1]);
    });
#pragma unroll
    for (int block = 0; block < kHeadBlocks; block++) {
      float taken[4] = {};
#pragma unroll
      for (int step = 0; step < kHeadSteps; step++) multiply_add<Half>(taken, centres[step], operand_[step][block]);
#pragma unroll
      for (int i = 0; i < 4; i++) first_[block][i] = shift_[block][i] - (taken[i % 2] + taken[2 + i % 2]);
    }
  }

  template <int kGroups>
  REATTN_DEVICE void multiply(HeadsTile (&mixed)[kGroups], Heads<> heads, int row, int key) const {
    if constexpr (kFloat) {
#pragma unroll
      for (int group = 0; group < kGroups; group++)
        for_each_element([&](int block, int i, int, int) { mixed[group][block][i] = shift_[block][i]; });
      for (int head = 0; head < kHeads; head++) {
        const float factor = keep_ / load<float>(of_row(kSums, row, head));
#pragma unroll
        for (int group = 0; group < kGroups; group++) {
          float maps[2];
#pragma unroll
          for (int lower = 0; lower < 2; lower++)
            maps[lower] =
                fmaf(load<float>(map(head, row, key + 16 * group + 8 * lower + lane() / 4)), factor, -centre_);
          for_each_element([&](int block, int i, int to, int lower) {
            mixed[group][block][i] = fmaf(maps[lower], folded_.weight(head, to), mixed[group][block][i]);
          });
        }
      }
    } else {
#pragma unroll
      for (int group = 0; group < kGroups; group++, heads.advance()) {
        const HeadsOperand operand = heads.load();
#pragma unroll
        for (int block = 0; block < kHeadBlocks; block++) {
          multiply_from<Half>(mixed[group][block], operand.part[0], operand_[0][block], first_[block]);
#pragma unroll
          for (int step = 1; step < kHeadSteps; step++)
            multiply_add<Half>(mixed[group][block], operand.part[step], operand_[step][block]);
        }
      }
    }
  }

  // Sums over 16 positions of the maps as they are stored, and of their products: on tensor cores, with ones and with
  // the maps themselves, of which the diagonal counts.
  static REATTN_DEVICE void add_moments(float (&sums)[kHeadSteps][4], float (&squares)[kHeadBlocks][4],
                                        const Heads<>& heads) {
#pragma unroll
    for (int step = 0; step < kHeadSteps; step++) {
      uint32_t maps[4];
      heads.load_across(maps, step);
      multiply_add<Narrow>(sums[step], maps, {pack<Narrow>(1, 1), pack<Narrow>(1, 1)});
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (2 * step + half < kHeadBlocks) {
          multiply_add_half<Narrow>(squares[2 * step + half], {maps[0], maps[1]}, maps[half]);
          multiply_add_half<Narrow>(squares[2 * step + half], {maps[2], maps[3]}, maps[2 + half]);
        }
    }
  }

  const Params& p_;
  MixedSums& moments_;
  Folded folded_;
  NeighbourSums squares_and_eps_;
  float keep_, centre_, stored_;
  float gamma_[kHeadBlocks][2], beta_[kHeadBlocks][2];
  float weights_[kHeadSteps][kHeadBlocks][4];  // from heads (i / 2 * 8 + lane % 4 * 2 + i % 2) to head lane / 4
  uint32_t operand_[kHeadSteps][kHeadBlocks][2];
  HeadsTile shift_, first_;
};

// What values are multiplied by: maps as they are, and then what is not finite of the values may count as zero; or
// ones.
enum class Weights { kMaps, kStrict, kOnes };

// The output of one head: its mixed maps times the values. Of a tile of 8 rows it is transposed, columns down, so that
// no product is wasted: rows lane % 4 * 2 and the next, and columns of two 8, laid out as those of Values.
struct Output {
  static constexpr int kFullTiles = kRows / 16;
  float sums[kFullTiles][kOutDims / 8][4] = {}, half[kHalfTile ? kOutDims / 16 : 1][4] = {};
  static_assert(!kHalfTile || (kDirect && kResident && !kMasked), "as the plan has it");

  using Values = std::conditional_t<kDirect, DirectColumns<kValueStride>, Stream<kOutDims, kValueStride>>;

  // Of the values' first `end` keys.
  template <Weights kWeights = Weights::kMaps>
  REATTN_DEVICE void add(Values& values, Shared<char> maps, int end) {
    // In pairs those that have 32 more behind them.
    const int in_pairs = greater(end - 32, 0) / 32 * 32;
    OwnTiles from(maps);
    const int offset = kept(lane_row() * kStageStride + lane_column() * 2);
    int key = 0;
#pragma unroll 1
    for (; key < in_pairs; key += 32, from.advance(32))
#pragma unroll
      for (int i = 0; i < 2; i++) take<true, kWeights>(values, i, offset, maps, from, key + 16 * i);
#pragma unroll 1
    for (; key < end; key += 32, from.advance(32))
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (key + 16 * i < end) take<false, kWeights>(values, i, offset, maps, from, key + 16 * i);
  }
  // Of the keys from the first on, up to `end` behind it.
  template <Weights kWeights = Weights::kMaps>
  REATTN_DEVICE void add(const Params& p, Shared<char> stages, Shared<char> maps, const Block& block, int head,
                         int first_key, int end, int first_dim) {
    Values values(stages, p.value, block.sample, head, first_key, first_key + end, first_dim);
    add<kWeights>(values, maps, end);
  }

  // The same where nothing hidden may reach a row: zero times what is not finite would. Maps of keys whose value is not
  // finite become NaN where they are seen.
  REATTN_DEVICE void add_strictly(const Params& p, Shared<char> stages, Shared<char> maps, const Block& block, int head,
                                  int first_key, int keys, int first_dim) {
    const HeadMask mask = block.mask(p, head);
    sync_warp();  // all lanes have read the maps
    const Element* value = head_rows(p.value, block.sample, head) + first_key * p.value.row_stride;
    for (int key = first_key; key < first_key + keys; key++, value += p.value.row_stride) {
      bool finite = true;
      for (int dim = lane(); dim < kHeadDim; dim += kWarp)
        finite = finite && absolute(number_at(value + dim)) < kInfinity;
      if (all(finite) || lane() >= kRows || !mask.sees(block.first_row + lane(), key)) continue;
      const Shared<char> row = maps + lane() * kRowStride;
      if constexpr (kFloat)
        reattn::store(as<float>(row) + (key - first_key), __int_as_float(0x7fffffff));
      else
        reattn::store(as<uint16_t>(row) + (key - first_key), uint16_t(0x7fff));
    }
    sync_warp();
    add<Weights::kStrict>(p, stages, maps, block, head, first_key, keys, first_dim);
  }
  // Whether the values of all keys were. Those of one that are not leave a mark in every row: one is asked.
  REATTN_DEVICE bool finite() const {
    float zeros = 0;
#pragma unroll
    for (int i = 0; i < kOutDims / 4; i++) zeros = fmaf(sums[0][i / 2][i % 2], 0.0f, zeros);
    return all(zeros == 0);
  }

  // Whole rows go by way of the head's maps, which this warp alone has read, so that neighbours write what lies side by
  // side.
  REATTN_DEVICE void store(const Params& p, Shared<char> maps, const Block& block, int head, int first_dim) {
    const int first_row = block.first_row;
    const float slope = kLayer || kStatistics ? 1.0f : 1.0f / Folded(kFolded).vector(kUnit, head);
    const int dim = first_dim + lane() % 4 * (kDirect ? kOutDims / 4 : 2);
    Element* to = head_rows(p.out, block.sample, head);
    if constexpr (kWholeRows) sync_warp();
    for_each_row<kFullTiles>([&](int tile, int lower, int row) {
      if (!kWholeRows && first_row + row >= p.out.rows) return;
      Element* to_row = to + (dim + (first_row + row) * row_stride<kOutStride>(p.out));
      float values[kOutDims / 8][2];
#pragma unroll
      for (int column = 0; column < kOutDims / 8; column++)
#pragma unroll
        for (int i = 0; i < 2; i++) values[column][i] = sums[tile][column][2 * lower + i] * slope;
#pragma unroll
      for (int i = 0; i < kOutDims / 8; i++) {
        if constexpr (kWholeRows) {
          if (i % 4 == 0)
            reattn::store(maps + (row * kRowStride + 2 * dim + 4 * i),
                          uint4{pair(values, i), pair(values, i + 1), pair(values, i + 2), pair(values, i + 3)});
        } else if constexpr (kDirect) {  // 2 kOutDims / 8 neighbours
          constexpr int kColumns = kOutDims / 8;
          const int column = 2 * i % kColumns, right = 2 * i / kColumns;
          write_pair(to_row + 2 * i, dim + 2 * i, values[column][right], values[column + 1][right]);
        } else {
          write_pair(to_row + 8 * i, dim + 8 * i, values[i][0], values[i][1]);
        }
      }
    });
    if constexpr (kHalfTile) {
      constexpr int kColumns = kOutDims / 8;
      const int first = lane() / 4 * kColumns;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = kRows - 8 + lane() % 4 * 2 + i;
        Element* to_row = to + (first + (first_row + row) * row_stride<kOutStride>(p.out));
#pragma unroll
        for (int j = 0; j < kColumns / 2; j++) {
          const float left = half[j][i] * slope, right = half[j][2 + i] * slope;
          if constexpr (kWholeRows)
            reattn::store(as<uint32_t>(maps + (row * kRowStride + 2 * first)) + j, pack<Narrow>(left, right));
          else if (first_row + row < p.out.rows)
            write_pair(to_row + 2 * j, first + 2 * j, left, right);
        }
      }
    }
    if constexpr (kWholeRows) {
      sync_warp();
      constexpr int kPieces = kOutDims / 8, kRowsAtOnce = kWarp / kPieces;  // of 16 bytes, in a row
#pragma unroll
      for (int i = 0; i < kRows / kRowsAtOnce; i++) {
        const int row = i * kRowsAtOnce + lane() / kPieces, piece = lane() % kPieces;
        if (first_row + row < p.out.rows)
          write(to + ((first_row + row) * row_stride<kOutStride>(p.out) + 8 * piece),
                load<uint4>(maps + (row * kRowStride + 16 * piece)));
      }
    }
  }

  // Into value_sum.
  REATTN_DEVICE void store_sums(const Params& p, const Block& block, int head, int first_dim) {
    for_each_row<kSeenByRow ? kTiles : 1>([&](int tile, int lower, int row) {
      if (kSeenByRow ? block.first_row + row >= p.out.rows : row > 0) return;
      const int64_t of_head = int64_t(block.sample) * kHeads + head;
      float* to =
          p.value_sum + (kSeenByRow ? row_index(p, block.sample, head, block.first_row + row) : of_head) * kHeadDim;
#pragma unroll
      for (int column = 0; column < kOutDims / 8; column++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int dim =
              first_dim + (kDirect ? (lane() % 4 * 2 + i) * (kOutDims / 8) + column : 8 * column + lane() % 4 * 2 + i);
          if (dim < kHeadDim) write(to + dim, sums[tile][column][2 * lower + i]);
        }
    });
  }

 private:
  // Lanes have 16 bytes of rows, which have room in the maps'.
  static constexpr bool kWholeRows =
      kDirect && kHeadDim == kOutDims && kOutDims % 32 == 0 && 2 * kOutDims <= kRowStride;

  static REATTN_DEVICE uint32_t pair(const float (&values)[kOutDims / 8][2], int i) {
    const int column = 2 * i % (kOutDims / 8), right = 2 * i / (kOutDims / 8);
    return pack<Narrow>(values[column][right], values[column + 1][right]);
  }

  // 16 keys.
  template <bool kWhole, Weights kWeights>
  REATTN_DEVICE void take(Values& values, int slot, int offset, Shared<char> maps, const OwnTiles& from, int key) {
    constexpr bool kStrict = kWeights == Weights::kStrict, kOnes = kWeights == Weights::kOnes;
    constexpr int kOwnTiles = kOnes ? 1 : kFullTiles;  // of ones, all rows have the same
    if constexpr (kFloat) {
      const Shared<char> stage = values.template next<kWhole>();
      if constexpr (kStrict) make_finite<kOutDims>(stage);
      for (int step = 0; step < 16; step++) {
        float map[kOwnTiles][2];
        for_each_row<kOwnTiles>([&](int tile, int lower, int row) {
          map[tile][lower] = kOnes ? 1.0f : load<float>(as<float>(maps + row * kRowStride) + (key + step));
        });
#pragma unroll
        for (int column = 0; column < kOutDims / 8; column++) {
          const float2 value = load<float2>(as<float>(stage + step * kStageStride) + (8 * column + lane() % 4 * 2));
          for_each_row<kOwnTiles>([&](int tile, int lower, int) {
            sums[tile][column][2 * lower] = fmaf(map[tile][lower], value.x, sums[tile][column][2 * lower]);
            sums[tile][column][2 * lower + 1] = fmaf(map[tile][lower], value.y, sums[tile][column][2 * lower + 1]);
          });
        }
      }
    } else {
      uint32_t mixed[kOwnTiles][4], operands[kOutDims / 8][2];
      if constexpr (kDirect) {
        values.template next<kWhole>(operands, slot);
        if constexpr (kStrict)
#pragma unroll
          for (int i = 0; i < kOutDims / 4; i++) operands[i / 2][i % 2] = finite_or_zero(operands[i / 2][i % 2]);
      } else {
        const Shared<char> stage = values.template next<kWhole>();
        if constexpr (kStrict) make_finite<kOutDims>(stage);
#pragma unroll
        for (int column = 0; column < kOutDims / 8; column += 2) {
          uint32_t four[4];
          load_matrices_transposed(four, stage + (offset + 16 * column));
          operands[column][0] = four[0], operands[column][1] = four[1];
          operands[column + 1][0] = four[2], operands[column + 1][1] = four[3];
        }
      }
#pragma unroll
      for (int tile = 0; tile < kOwnTiles; tile++)
        if constexpr (kOnes)
          for (uint32_t& part : mixed[tile]) part = pack<Narrow>(1, 1);
        else
          from.load(mixed[tile], tile, 16 * slot);
      uint32_t last[2];
      if constexpr (kHalfTile && !kOnes) from.load_half(last, 16 * slot);
#pragma unroll
      for (int column = 0; column < kOutDims / 8; column += 2) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int tile = 0; tile < kOwnTiles; tile++)
            multiply_add<Narrow>(sums[tile][column + i], mixed[tile], operands[column + i]);
        if constexpr (kHalfTile && !kOnes) {
          const uint32_t (&left)[2] = operands[column], (&right)[2] = operands[column + 1];
          multiply_add<Narrow>(half[column / 2], {left[0], right[0], left[1], right[1]}, last);
        }
      }
    }
  }
};

// Whether all warps of the block say so; where maps are, and all threads have to come here.
REATTN_DEVICE bool in_all_warps(int warp, bool yes) {
  const Shared<uint32_t> votes = as<uint32_t>(at(0));
  sync_block();
  if (lane() == 0) store(votes + warp, uint32_t(yes));
  sync_block();
  for (int i = 0; i < kWarps; i++) yes = yes && load<uint32_t>(votes + i);
  sync_block();
  return yes;
}

// The sum of the values that a row sees, or all rows, for finish: products with maps of ones, in a head's tile.
REATTN_DEVICE void see(const Params& p, Shared<char> stages, Shared<char> maps, const Block& block, int head,
                       int first_dim) {
  const HeadMask mask = block.mask(p, head);
  const int end = block.range.end, unhidden = block.range.unhidden(0, end);
  const int in_all = unhidden < end ? unhidden / 16 * 16 : end;  // keys that all rows see
  Output seen;
  // Most often once. Not unrolled: what runs in few blocks, and seldom twice, is compiled once.
#pragma unroll 1
  for (int times = 0; times < (kMasked ? 2 : 1); times++) {
    seen = Output();
    if (in_all > 0) seen.add<Weights::kOnes>(p, stages, maps, block, head, 0, in_all, first_dim);
#pragma unroll
    for (int i = 0; i < kOutDims / 2; i++) seen.sums[Output::kFullTiles - 1][i / 4][i % 4] = seen.sums[0][i / 4][i % 4];
#pragma unroll 1
    for (int first_key = in_all; kMasked && first_key < end; first_key += kKeys) {
      const int keys = smaller(kKeys, end - first_key);
      sync_warp();
#pragma unroll 1
      for (int key = 0; key < keys; key += 16) {
        float ones[kTiles][2][4];
        for (int i = 0; i < kTiles * 8; i++) ones[i / 8][i / 4 % 2][i % 4] = 1;
        mask.for_each<kTiles>(block.first_row, first_key + key, [&](int tile, int right, int i, float added) {
          if (added == -kInfinity) ones[tile][right][i] = 0;
        });
        for (int tile = 0; tile < kTiles; tile++)
          if constexpr (kFloat)
            store_tile(as<float>(maps + 16 * tile * kRowStride) + key, kRowStride, ones[tile]);
          else
            store_matrices(maps + ((16 * tile + lane_row()) * kRowStride + (lane_column() + key) * 2),
                           Packed<Narrow>(ones[tile]).part);
      }
      sync_warp();
      if (times > 0)
        seen.add_strictly(p, stages, maps, block, head, first_key, keys, first_dim);
      else
        seen.add(p, stages, maps, block, head, first_key, keys, first_dim);
    }
    if (kMasked && seen.finite()) break;
  }
  seen.store_sums(p, block, head, first_dim);
}

// Has a warp ask the L2 cache for its heads' query rows of the block that comes next, and for its share of their keys
// and values.
REATTN_DEVICE void prefetch_rows(const Params& p, int next, int warp) {
  if (next >= p.row_blocks_of_launch) return;
  const int blocks = (p.query.rows + kRows - 1) / kRows, sample = unsigned(next) / unsigned(blocks);
  const int block = next - sample * blocks;
  prefetch_heads(p, sample, warp, block, blocks);
#pragma unroll 1
  for (int head = warp; head < kHeads; head += kWarps)
#pragma unroll 1
    for (int row = lane(); row < kRows; row += kWarp)
      prefetch(head_rows(p.query, sample, head) +
               smaller(block * kRows + row, p.query.rows - 1) * row_stride<kQueryStride>(p.query));
}

// Some query rows of a sample, all heads. With the keys' maps resident, one sweep over keys and one over values; else
// the LSE comes first, and the maps again some keys at a time. All threads have to come here.
REATTN_DEVICE void run(const Params& p, const Block& block, int next) {
  const int warp = reattn::warp();
  const int sample = block.sample, first_row = block.first_row, first_dim = block_y() * kOutDims;
  const Shared<char> stages = at(kStages + warp * kWarpStages);
  const auto for_each_head = [&](auto function) {
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++)
      if (const int head = warp + turn * kWarps; head < kHeads) function(turn, head, at(head * kHeadStride));
  };
  // The same where nothing is kept for each turn: compiled once.
  const auto for_each_alike = [&](auto function) {
#pragma unroll 1
    for (int turn = 0; turn < kTurns; turn++)
      if (const int head = warp + turn * kWarps; head < kHeads) function(turn, head, at(head * kHeadStride));
  };

  if constexpr (kPreMixed)
    for (int first_key = 0; first_key < block.range.end; first_key += kKeys) {
      const int keys = smaller(kKeys, block.range.end - first_key);
      for_each_alike([&](int, int head, Shared<char> maps) {
        Softmax(p, stages, block, head).leave_products(maps, first_key, first_key + keys);
      });
      sync_block();
      RowSoftmax(p, block).run<kResident, true>(warp, smaller(kRows, p.query.rows - first_row), first_key, keys);
      sync_block();
    }
  else
    for_each_alike([&](int, int head, Shared<char> maps) {
      Softmax softmax(p, stages, block, head);
      softmax.sweep<kResident>(maps);
      const Shared<float> sums = of_row(kSums, lane() / 4, head);
      float* lse = p.lse + row_index(p, sample, head, first_row + lane() / 4);
      const int rows_with_lse =
          block_y() == 0 ? p.query.rows : 0;  // blocks for other columns of an output have the same
      if (lane() % 4 == 0)
        for_each_row<kTiles>([&](int tile, int lower, int row) {
          const int further = 16 * tile + 8 * lower;
          // Maps of a row that sees nothing are zero, divided by whatever else.
          const float sum = softmax.sum_[tile][lower];
          store(sums + further * kPaddedHeads, kMasked && sum == 0 ? 1.0f : sum);
          if constexpr (!kResident) store(of_row(kReferences, row, head), softmax.reference_[tile][lower]);
          if (first_row + row < rows_with_lse) write(lse + further, softmax.lse(tile, lower));
        });
    });

  const int rows = smaller(kRows, p.query.rows - first_row), end = block.range.end;
  sync_block();
  MixedSums moments;
  if constexpr (kResident) {
    prefetch_rows(p, next, warp);  // while nobody waits for anything from there
    RowMixing(p, moments).mix(block, 0, warp, rows, end);
    if constexpr (kStatistics) moments.add_up(warp);
    // The first are on their way while other warps mix.
    Output::Values values(stages, p.value, sample, warp, 0, end, first_dim);
    sync_block();
    for_each_alike([&](int turn, int head, Shared<char> maps) {
      if (turn > 0) values = Output::Values(stages, p.value, sample, head, 0, end, first_dim);
      Output out;
      out.add(values, maps, end);
      if (kMasked && !out.finite()) {
        out = Output();
        out.add_strictly(p, stages, maps, block, head, 0, end, first_dim);
      }
      out.store(p, maps, block, head, first_dim);
    });
  } else {
    Output out[kTurns];
    const auto sweep = [&](bool strict) {
      for (int first_key = 0; first_key < end; first_key += kKeys) {
        const int keys = smaller(kKeys, end - first_key);
        for_each_alike([&](int, int head, Shared<char> maps) {
          Softmax softmax(p, stages, block, head);
          if constexpr (kPreMixed) return softmax.leave_products(maps, first_key, first_key + keys);
          for_each_row<kTiles>([&](int tile, int lower, int row) {
            softmax.reference_[tile][lower] = load<float>(of_row(kReferences, row, head));
          });
          softmax.fill(maps, first_key);
        });
        sync_block();
        if constexpr (kPreMixed) {
          RowSoftmax(p, block).run<true, false>(warp, rows, first_key, keys);
          sync_block();
        }
        RowMixing(p, moments).mix(block, first_key, warp, rows, keys);
        sync_block();
        for_each_head([&](int turn, int head, Shared<char> maps) {
          if (kMasked && strict)
            out[turn].add_strictly(p, stages, maps, block, head, first_key, keys, first_dim);
          else
            out[turn].add(p, stages, maps, block, head, first_key, keys, first_dim);
        });
      }
    };
    // Once, or twice with a mask; not unrolled, which would compile all of it twice.
#pragma unroll 1
    for (bool strict = false;; strict = true) {
      sweep(strict);
      if constexpr (!kMasked) break;
      if (strict) {
        sync_block();  // as the vote leaves it
        break;
      }
      bool finite = true;
      for_each_head([&](int turn, int, Shared<char>) { finite = finite && out[turn].finite(); });
      if (in_all_warps(warp, finite)) break;
      for (Output& again : out) again = Output();
      moments = MixedSums();
    }
    if constexpr (kStatistics) moments.add_up(warp);
    for_each_head([&](int turn, int head, Shared<char> maps) { out[turn].store(p, maps, block, head, first_dim); });
  }
  // Where all rows see the same, one block is enough: the last one, which has the fewest rows.
  if (kStatistics && (kSeenByRow || first_row + kRows >= p.query.rows))
    for_each_alike([&](int, int head, Shared<char> maps) { see(p, stages, maps, block, head, first_dim); });
}

// With the keys' maps resident, as many blocks as run at a time, and each takes rows until there are none left: of its
// warps some multiply values while others are at the next rows' scores. Registers are for one block: its maps fill
// shared memory.
__global__ void __launch_bounds__(32 * kWarps, 1) forward(const __grid_constant__ Params p) {
  if (warp() == 0) Folded(kFolded).prepare<!kFloat>(p);
  if constexpr (kPaddedHeads > kHeads)
    for (int row = thread(); row < kRows; row += threads())
      for (int head = kHeads; head < kPaddedHeads; head++) store(of_row(kSums, row, head), 1.0f);
  if constexpr (kStatistics) MixedSums::clear();
  int i = block_x();
#pragma unroll 1
  do {
    const int blocks = (p.query.rows + kRows - 1) / kRows, sample = unsigned(i) / unsigned(blocks);
    run(p, Block(p, sample, (i - sample * blocks) * kRows, kRows), i + blocks_x());
    i += blocks_x();
  } while (kResident && i < p.row_blocks_of_launch);
  if constexpr (kStatistics) MixedSums::store(p);
}

}  // namespace reattn
