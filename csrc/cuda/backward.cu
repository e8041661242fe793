// The gradient of the query and partial sums of the parameters' gradients; and, for the gradients of key and value,
// which are products of them (products.cu), the normalised maps and the gradients of the scores of some rows.
#include "mixed_scores.cuh"

namespace reattn {

static_assert(kTiles == 1, "a block owns 16 rows");

constexpr bool kScaled = std::is_same_v<Element, Half>;
constexpr bool kNorm = kLayer || kBatch;

// Shared memory: maps, less their centre, or with dropout the maps themselves, negative where they are dropped; the
// gradients first of the normalised maps, then of the maps.
constexpr int kMaps = 0, kGrads = kMapBytes;
constexpr int kScratch = 2 * kMapBytes;
constexpr int kBoxStride = 16 * int(sizeof(Element)) + 16;  // of heads, of 16 positions on their way
constexpr int kScratchBytes = greater(kDirect ? 0 : 2 * kStageBytes, kPaddedHeads* kBoxStride);  // of a warp
constexpr int kFolded = round_up(kScratch + kWarps * kScratchBytes, 128);
constexpr int kOnes = kFolded + kFoldedBytes;  // 16 of them
// In the end the sums of all warps lie there.
constexpr int kSumFloats = kPaddedHeads * (kPaddedHeads + 2);
constexpr int kBytes = greater(kOnes + 128, kWarps * kSumFloats * 4);
static_assert(kBytes == REATTN_SHARED_BYTES, "the plan knows how much shared memory a block takes");

// The sum of dA is a product of its own with ones, or where there are fewer heads than rows in a product with maps,
// that of a row of ones.
constexpr bool kSpareRow = !kFloat && !kDropout && kHeads % 16 != 0;
using RowHeads = Heads<kSpareRow>;

// Which rows this block owns, and where its workspace begins.
struct Place : Block {
  int rows, keys;     // keys: of a row of the workspace
  int64_t workspace;  // of head 0 and this block's first row, in elements
  int64_t head_stride;

  REATTN_DEVICE explicit Place(const Params& p)
      : Place(p, block_x() / p.row_blocks_of_launch, block_x() % p.row_blocks_of_launch * kRows) {}
  REATTN_DEVICE Place(const Params& p, int in_launch, int row)
      : Block(p, p.first_sample + in_launch, p.first_row + row, kRows) {
    rows = smaller(kRows, p.query.rows - first_row);
    keys = round_up(p.key.rows, 16);
    head_stride = int64_t(p.rows_of_launch) * keys;
    workspace = in_launch * kHeads * head_stride + int64_t(row) * keys;
  }
  // Keys come in tiles, the first of them with what is left over, so that most of them are still in shared memory after
  // the last.
  REATTN_DEVICE int tiles() const { return kResident ? 1 : (range.end + kKeys - 1) / kKeys; }
  REATTN_DEVICE int first_key(int tile) const {
    return tile == 0 ? 0 : round_up(range.end, 16) - (tiles() - tile) * kKeys;
  }
  REATTN_DEVICE int last_key(int tile) const { return tile + 1 < tiles() ? first_key(tile + 1) : range.end; }

  // Of all blocks of a backward pass.
  REATTN_DEVICE int64_t number(const Params& p) const {
    return int64_t(sample) * ((p.query.rows + kRows - 1) / kRows) + first_row / kRows;
  }
};

// Sums over positions: of dA and dN A by head, and of products of P and dA of every two heads, as mma.m16n8k16 lays
// them out.
struct Sums {
  float products[kHeadSteps][kHeadBlocks][4] = {}, shift[kHeadBlocks][4] = {}, gamma[kHeadBlocks][2] = {};

  REATTN_DEVICE void add(const Sums& other) {
#pragma unroll
    for (int block = 0; block < kHeadBlocks; block++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        shift[block][i] += other.shift[block][i];
#pragma unroll
        for (int step = 0; step < kHeadSteps; step++) products[step][block][i] += other.products[step][block][i];
      }
#pragma unroll
      for (int i = 0; i < 2; i++) gamma[block][i] += other.gamma[block][i];
    }
  }
};

// The way back through norm and mixing, of all heads of a row.
class RowGradients {
 public:
  REATTN_DEVICE RowGradients(const Params& p, const Place& place, int first_key, Shared<char> box)
      : p_(p),
        place_(place),
        first_key_(first_key),
        folded_(kFolded),
        box_(box),
        unit_(folded_.vector(kUnit, 0)),
        squares_and_eps_([&] {
          const float unit = folded_.vector_apart(kUnit, 0);
          return p.fold.p.eps * kHeads * unit * unit;
        }),
        no_more_([] { return 0.0f; }) {
    for_each_element([&](int block, int i, int head, int) { shift_[block][i] = folded_.vector_apart(kShift, head); });
    for_each_head_of_lane([&](int block, int i, int head) {
#pragma unroll
      for (int which = 0; which <= kAlong; which++) vectors_[which][block][i] = folded_.vector(Vector(which), head);
      // Of mixed maps as they come, with their unit.
      hat_scale_[block][i] = kScaled && !kLayer ? 1 / folded_.vector(kUnit, head) : 1.0f;
      from_scale_[block][i] = kScaled ? 1 / folded_.vector(kUnitFrom, head) : 1.0f;
      vectors_[kAlong][block][i] *= hat_scale_[block][i];
      normal_scale_[block][i] = (kNorm ? vectors_[kGamma][block][i] : 1.0f) * hat_scale_[block][i];
    });
    if constexpr (!kFloat)
#pragma unroll
      for (int step = 0; step < kHeadSteps; step++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int row = 16 * step + 8 * half + lane() % 4 * 2;
          const auto gamma = [&](int head) {
            return head < kHeads ? folded_.vector(kGamma, head) * (1.0f / kHeads) : 0.0f;
          };
          if constexpr (kLayer) {
            gamma_[0][step][half] = pack<Narrow>(gamma(row), gamma(row + 1));
            const float2 held = unpack<Narrow>(gamma_[0][step][half]);
            gamma_[1][step][half] = pack<Narrow>(gamma(row) - held.x, gamma(row + 1) - held.y);
          }
#pragma unroll
          for (int block = 0; block < kHeadBlocks; block++) {
            const int column = 8 * block + lane() / 4;
            const float unit = kScaled ? folded_.vector(kUnit, column) : 1.0f;
            const float from = kScaled ? folded_.vector(kUnitFrom, column) : 1.0f;
            mix_[step][block][half] =
                pack<Narrow>(folded_.weight(row, column) * unit, folded_.weight(row + 1, column) * unit);
            unmix_[step][block][half] =
                pack<Narrow>(folded_.weight(column, row) * from, folded_.weight(column, row + 1) * from);
          }
        }
  }

  // Of the warp's rows, gradients of the normalised maps become those of the maps, in place, and the normalised maps go
  // to the workspace, where those of this block's first row and key lie at mixed.
  REATTN_DEVICE void run(Sums& sums, int warp, int keys, Element* mixed) {
    const Place& place = place_;
    RowHeads first(at(kMaps), warp, at(kOnes));
    const int piece = lane() % kBoxPieces, head = lane() / kBoxPieces;
    mixed += head * place.head_stride + int64_t(warp) * place.keys + piece * kVector;
    boxed_ = {kept((box_ + (head * kBoxStride + piece * 16)).address)};
#pragma unroll 1
    for (int row = warp; row < place.rows; row += kWarps, first.descend(kWarps), mixed += kWarps * place.keys) {
      Sums of_row;
      RowHeads heads = first;
      Element* to = mixed;
      const int unhidden = place.range.unhidden(first_key_, keys);
      int key = 0;
#pragma unroll 1
      for (; key + 32 <= unhidden; key += 32, to += 32) {
        run_some<false>(of_row, heads, row, key, 16, to, place.head_stride);
        heads.advance();
        run_some<false>(of_row, heads, row, key + 16, 16, to + 16, place.head_stride);
        heads.advance();
      }
#pragma unroll 1
      for (; key < keys; key += 16, to += 16, heads.advance())
        run_some<true>(of_row, heads, row, key, keys - key, to, place.head_stride);
      // Row by row: long sums of products on tensor cores lose digits.
      for_each_head_of_lane([&](int block, int i, int) { of_row.gamma[block][i] *= hat_scale_[block][i]; });
      sums.add(of_row);
    }
  }

 private:
  static constexpr int kBoxPieces = 16 / kVector;  // of 16 bytes, of a head in the box

  // 16 keys, of which `inside` exist. Ragged: not all of them may, or some may be hidden.
  template <bool kRagged>
  REATTN_DEVICE void run_some(Sums& sums, const RowHeads& heads, int row, int key, int inside, Element* mixed,
                              int64_t head_stride) {
    const HeadsOperand map = kFloat ? HeadsOperand{} : heads.load();
    const HeadsOperand grads = kFloat ? HeadsOperand{} : heads.load(kGrads);
    HeadsOperand operand = map;
    if constexpr (kDropout && !kFloat)
#pragma unroll
      for (int step = 0; step < kHeadSteps; step++) keep(operand.part[step]);
    HeadsTile mix, grad, result;
    read(grad, grads, row, key);
    mix_heads(mix, operand, row, key);
    const bool hides = kMasked && kRagged && !place_.range.is_whole(first_key_ + key);
    const auto find_visible = [&] { return Visible(p_, place_, place_.first_row + row, first_key_ + key); };
    Visible visible;
    if (kMaskByHead && hides) {
      visible = find_visible();
      if constexpr (kBatch) visible.clear_hidden(mix);  // NaN of another head must be in no sum
    }
    undo_norm<kRagged>(mix, grad, grads, sums, inside);
    if constexpr (kRagged)
      for_each_element([&](int block, int i, int, int lower) {
        if (8 * lower + lane() / 4 >= inside) grad[block][i] = 0;
      });
    if (hides) {
      if constexpr (!kMaskByHead) visible = find_visible();
      visible.clear_hidden(mix);
      if constexpr (kStatistics) visible.clear_hidden(grad);
    }
    write_mixed(mix, mixed, head_stride);
    unmix(result, sums, grad, heads, row, key);
    if (kMaskByHead && hides) visible.clear_hidden(result);  // a map of zero times NaN of another head
    if constexpr (kDropout) drop(result, map, row, key);
    store(heads, result, row, key);
  }

  static REATTN_DEVICE Shared<float> number(int tile, int head, int row, int key) {
    return as<float>(at(tile + head * kHeadStride + row * kRowStride)) + key;
  }
  REATTN_DEVICE Shared<float> boxed(int head, int position) const {
    return as<float>(box_ + head * kBoxStride) + position;
  }

  // Gradients of the normalised maps; heads that do not exist have those of others, which their weights make nothing
  // of.
  REATTN_DEVICE void read(HeadsTile& grad, const HeadsOperand& packed, int row, int key) const {
    if constexpr (kFloat) {
      for_each_element([&](int block, int i, int head, int lower) {
        grad[block][i] = load<float>(number(kGrads, smaller(head, kHeads - 1), row, key + 8 * lower + lane() / 4));
      });
    } else {
#pragma unroll
      for (int block = 0; block < kHeadBlocks; block++)
#pragma unroll
        for (int lower = 0; lower < 2; lower++) {
          const float2 pair = unpack<Narrow>(packed.part[block / 2][block % 2 * 2 + lower]);
          grad[block][2 * lower] = pair.x, grad[block][2 * lower + 1] = pair.y;
        }
    }
  }

  REATTN_DEVICE void mix_heads(HeadsTile& mix, const HeadsOperand& map, int row, int key) const {
    if constexpr (kFloat) {
      for_each_element([&](int block, int i, int, int) { mix[block][i] = shift_[block][i]; });
      for (int head = 0; head < kHeads; head++) {
        float maps[2];
#pragma unroll
        for (int lower = 0; lower < 2; lower++)
          maps[lower] = kept_of(load<float>(number(kMaps, head, row, key + 8 * lower + lane() / 4)));
        for_each_element([&](int block, int i, int to, int lower) {
          mix[block][i] = fmaf(maps[lower], folded_.weight(head, to), mix[block][i]);
        });
      }
    } else {
#pragma unroll
      for (int block = 0; block < kHeadBlocks; block++) {
        multiply_from<Narrow>(mix[block], map.part[0], mix_[0][block], shift_[block]);
#pragma unroll
        for (int step = 1; step < kHeadSteps; step++)
          multiply_add<Narrow>(mix[block], map.part[step], mix_[step][block]);
      }
    }
  }

  // Mixed maps become normalised ones, the gradients of these those of the mixed maps: docs/operator.md, section 4.
  template <bool kRagged>
  REATTN_DEVICE void undo_norm(HeadsTile& mix, HeadsTile& grad, const HeadsOperand& packed, Sums& sums,
                               int inside) const {
    if constexpr (kLayer) {
      const float2 squares =
          sums_over_heads(squares_and_eps_, [&](int block, int i) { return mix[block][i] * mix[block][i]; });
      const float root = square_root(float(kHeads));
      float inverse_rms[2] = {fast_inverse_sqrt(squares.x) * root, fast_inverse_sqrt(squares.y) * root};
      if constexpr (kMasked && kRagged)  // where all is hidden, it would be infinity times zero
#pragma unroll
        for (int lower = 0; lower < 2; lower++)
          if (inverse_rms[lower] == kInfinity) inverse_rms[lower] = 0;
      for_each_element([&](int block, int i, int, int lower) { mix[block][i] *= inverse_rms[lower]; });
      if constexpr (kRagged)  // where nothing is mixed, it would be infinity times zero
        for_each_element([&](int block, int i, int, int lower) {
          if (8 * lower + lane() / 4 >= inside) mix[block][i] = 0;
        });
      // The weights sum to zero over the heads after mixing: what the gradients share reaches nothing, and would only
      // be rounded.
      float common[4] = {};
      if constexpr (kFloat) {
        const float2 shared = sums_over_heads(no_more_, [&](int block, int i) {
          return 8 * block + lane() % 4 * 2 + i % 2 < kHeads ? grad[block][i] * vectors_[kGamma][block][i % 2] : 0.0f;
        });
        common[0] = common[1] = shared.x * (1.0f / kHeads), common[2] = common[3] = shared.y * (1.0f / kHeads);
      } else {
#pragma unroll
        for (int step = 0; step < kHeadSteps; step++)
#pragma unroll
          for (int part = 0; part < 2; part++) multiply_add<Narrow>(common, packed.part[step], gamma_[part][step]);
      }
      HeadsTile scaled;
      for_each_element([&](int block, int i, int, int lower) {
        sums.gamma[block][i % 2] = fmaf(grad[block][i], mix[block][i], sums.gamma[block][i % 2]);
        scaled[block][i] = fmaf(grad[block][i], vectors_[kGamma][block][i % 2], -common[2 * lower]);
      });
      const float2 along =
          sums_over_heads(no_more_, [&](int block, int i) { return scaled[block][i] * mix[block][i]; });
#pragma unroll
      for (int lower = 0; lower < 2; lower++) {
        const float factor = kScaled ? inverse_rms[lower] * unit_ : inverse_rms[lower];
        const float of_mix = (lower ? along.y : along.x) * (-1.0f / kHeads) * factor;
#pragma unroll
        for (int block = 0; block < kHeadBlocks; block++)
#pragma unroll
          for (int i = 2 * lower; i < 2 * lower + 2; i++)
            grad[block][i] = fmaf(scaled[block][i], factor, mix[block][i] * of_mix);
      }
    } else if constexpr (kBatch) {
      for_each_element([&](int block, int i, int, int) {
        float& gradient = grad[block][i];
        sums.gamma[block][i % 2] = fmaf(gradient, mix[block][i], sums.gamma[block][i % 2]);
        gradient *= vectors_[kGamma][block][i % 2];
        // Running statistics have no gradient: NaN in the maps, and infinity, must not make one of it.
        if constexpr (kStatistics)
          gradient -= fmaf(mix[block][i], vectors_[kAlong][block][i % 2], vectors_[kCommon][block][i % 2]);
      });
    }
    if constexpr (kNorm)
      for_each_element([&](int block, int i, int, int) {
        mix[block][i] = fmaf(mix[block][i], normal_scale_[block][i % 2], vectors_[kBeta][block][i % 2]);
      });
    else if constexpr (kScaled)
      for_each_element([&](int block, int i, int, int) { mix[block][i] *= normal_scale_[block][i % 2]; });
  }

  // Through the box, so that what is written lies together.
  REATTN_DEVICE void write_mixed(const HeadsTile& mix, Element* mixed, int64_t head_stride) const {
    sync_warp();
    put(mix);
    sync_warp();
    constexpr int kAtOnce = kWarp / kBoxPieces;  // heads
#pragma unroll
    for (int first = 0; first < kHeads; first += kAtOnce)
      if (kHeads - first >= kAtOnce || lane() / kBoxPieces < kHeads - first)
        write(mixed + first * head_stride, load<uint4>(boxed_ + first * kBoxStride));
  }
  REATTN_DEVICE void put(const HeadsTile& tile) const {
    if constexpr (kFloat)
      for_each_element([&](int block, int i, int head, int lower) {
        reattn::store(boxed(head, 8 * lower + lane() / 4), tile[block][i]);
      });
    else
#pragma unroll
      for (int step = 0; step < kHeadSteps; step++) {
        const Shared<char> to = box_ + ((16 * step + lane() / 16 * 8 + lane() % 8) * kBoxStride + lane() / 8 % 2 * 16);
        if (2 * step + 1 < kHeadBlocks)
          store_matrices_transposed(to,
                                    Packed<Narrow>(tile[2 * step], tile[smaller(2 * step + 1, kHeadBlocks - 1)]).part);
        else
          store_two_matrices_transposed(to, {pack<Narrow>(tile[2 * step][0], tile[2 * step][1]),
                                             pack<Narrow>(tile[2 * step][2], tile[2 * step][3])});
      }
  }

  // The gradients of the maps from those of the mixed ones, and sums of these and of their products with maps.
  REATTN_DEVICE void unmix(HeadsTile& result, Sums& sums, const HeadsTile& grad, const RowHeads& maps, int row,
                           int key) const {
    for_each_element([&](int block, int i, int, int) { result[block][i] = 0; });
    if constexpr (kFloat) {
      sync_warp();
      put(grad);
      sync_warp();
      for (int head = 0; head < kHeads; head++) {
        float grads[2];
#pragma unroll
        for (int lower = 0; lower < 2; lower++) grads[lower] = load<float>(boxed(head, 8 * lower + lane() / 4));
        for_each_element([&](int block, int i, int to, int lower) {
          result[block][i] = fmaf(grads[lower], folded_.weight(to, head), result[block][i]);
        });
      }
      for (int position = 0; position < 16; position++) {
        float left[kHeadSteps][2], right[kHeadBlocks][2];
#pragma unroll
        for (int step = 0; step < kHeadSteps; step++)
#pragma unroll
          for (int i = 0; i < 2; i++)
            left[step][i] = kept_of(
                load<float>(number(kMaps, smaller(16 * step + 8 * i + lane() / 4, kHeads - 1), row, key + position)));
#pragma unroll
        for (int block = 0; block < kHeadBlocks; block++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            right[block][i] = load<float>(boxed(8 * block + lane() % 4 * 2 + i, position));
            sums.shift[block][i] += right[block][i];
#pragma unroll
            for (int step = 0; step < kHeadSteps; step++)
#pragma unroll
              for (int lower = 0; lower < 2; lower++)
                sums.products[step][block][2 * lower + i] =
                    fmaf(left[step][lower], right[block][i], sums.products[step][block][2 * lower + i]);
          }
      }
    } else {
      uint32_t packed[kHeadSteps][4];
#pragma unroll
      for (int step = 0; step < kHeadSteps; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int block = 2 * step + i / 2;
          packed[step][i] = block < kHeadBlocks ? pack<Narrow>(grad[smaller(block, kHeadBlocks - 1)][i % 2 * 2],
                                                               grad[smaller(block, kHeadBlocks - 1)][i % 2 * 2 + 1])
                                                : 0;
        }
#pragma unroll
      for (int step = 0; step < kHeadSteps; step++)
#pragma unroll
        for (int block = 0; block < kHeadBlocks; block++)
          multiply_add<Narrow>(result[block], packed[step], unmix_[step][block]);
      if constexpr (kScaled) {
        for_each_element([&](int block, int i, int, int) { result[block][i] *= from_scale_[block][i % 2]; });
      }
      const uint32_t ones = pack<Narrow>(1, 1);
#pragma unroll
      for (int block = 0; block < kHeadBlocks; block++) {
        const uint32_t across[2] = {transposed(packed[block / 2][block % 2 * 2]),
                                    transposed(packed[block / 2][block % 2 * 2 + 1])};
        if constexpr (!kSpareRow) multiply_add<Narrow>(sums.shift[block], {ones, ones, ones, ones}, across);
#pragma unroll
        for (int step = 0; step < kHeadSteps; step++) {
          uint32_t map[4];
          maps.load_across(map, step);
          if constexpr (kDropout) keep(map);
          multiply_add<Narrow>(sums.products[step][block], map, across);
        }
      }
    }
  }

  // What dropout makes of a map, less the centre: see kMaps.
  REATTN_DEVICE float kept_of(float map) const {
    return kDropout ? (map <= 0 ? 0.0f : map * p_.keep_scale) - p_.centre : map;  // NaN stays NaN
  }
  REATTN_DEVICE void keep(uint32_t (&maps)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 pair = unpack<Narrow>(maps[i]);
      maps[i] = pack<Narrow>(kept_of(pair.x), kept_of(pair.y));
    }
  }
  // What was dropped has no gradient; what was kept, that of what is scaled.
  REATTN_DEVICE void drop(HeadsTile& result, const HeadsOperand& map, int row, int key) const {
    for_each_element([&](int block, int i, int head, int lower) {
      float prob;
      if constexpr (kFloat) {
        prob = load<float>(number(kMaps, smaller(head, kHeads - 1), row, key + 8 * lower + lane() / 4));
      } else {
        const float2 pair = unpack<Narrow>(map.part[block / 2][block % 2 * 2 + lower]);
        prob = i % 2 ? pair.y : pair.x;
      }
      result[block][i] = prob <= 0 ? 0.0f : result[block][i] * p_.keep_scale;
    });
  }

  REATTN_DEVICE void store(const RowHeads& heads, const HeadsTile& result, int row, int key) const {
    sync_warp();
    if constexpr (kFloat)
      for_each_element([&](int block, int i, int head, int lower) {
        if (head < kHeads) reattn::store(number(kGrads, head, row, key + 8 * lower + lane() / 4), result[block][i]);
      });
    else
      heads.store(result, kGrads);
  }

  const Params& p_;
  const Place& place_;
  int first_key_;
  Folded folded_;
  Shared<char> box_, boxed_;
  float unit_;
  NeighbourSums squares_and_eps_, no_more_;
  float vectors_[kAlong + 1][kHeadBlocks][2];
  HeadsTile shift_;
  // From mixed maps to A, and to the normalised maps less beta; of gradients of maps by weights from a head.
  float hat_scale_[kHeadBlocks][2], normal_scale_[kHeadBlocks][2], from_scale_[kHeadBlocks][2];
  // For the mean over heads of gradients times gamma, and what rounding leaves of it.
  uint32_t gamma_[2][kHeadSteps][2];
  uint32_t mix_[kHeadSteps][kHeadBlocks][2], unmix_[kHeadSteps][kHeadBlocks][2];
};

// Rows of one head as second operands of products over head_dim, 16 at a time: so many of these 16 are on their way to
// registers. Instead of rows outside there is the last one: zeros would be copied once they have arrived.
template <int kStride>
class RowsAhead {
 public:
  static constexpr int kAhead = 2;
  using Operands = typename DirectRows<kStride>::Operands;

  // Rows first_row to last_row - 1, of which there are some. Nothing is on its way until it is started.
  REATTN_DEVICE RowsAhead(const Tensor& tensor, int sample, int head, int first_row, int last_row)
      : step_(row_stride<kStride>(tensor) * int(sizeof(Element))), left_(last_row - first_row - lane() / 4) {
    from_ = reinterpret_cast<const char*>(head_rows(tensor, sample, head)) + (first_row + lane() / 4) * step_;
  }
  REATTN_DEVICE void start() {
#pragma unroll
    for (int place = 0; place < kAhead; place++) fetch<false>(place);
  }
  REATTN_DEVICE const Operands& operator[](int place) const { return coming_[place]; }
  // The next that are not on their way, in the place of what is done with. kWhole: they are inside.
  template <bool kWhole>
  REATTN_DEVICE void fetch(int place) {
#pragma unroll
    for (int half = 0; half < 2; half++)
      read_columns(from_ + (kWhole ? 8 * half : smaller(8 * half, left_ - 1)) * step_, true,
                   [&](int step, int right, uint32_t both) { coming_[place].part[half][step][right] = both; });
    from_ += 16 * step_;
    left_ -= 16;
  }

 private:
  const char* from_;
  int64_t step_;
  int left_;
  Operands coming_[kAhead];
};

// The same as second operands of products over rows, in the order of columns of DirectColumns.
template <int kStride>
class ColumnsAhead {
 public:
  static constexpr int kAhead = 2, kColumns = kDims / 8;
  using Operands = uint32_t[kColumns][2];

  // Rows first_row to last_row - 1, of which there are some.
  REATTN_DEVICE ColumnsAhead(const Tensor& tensor, int sample, int head, int first_row, int last_row)
      : step_(row_stride<kStride>(tensor) * int(sizeof(Element))), left_(last_row - first_row - lane() % 4 * 2) {
    from_ = reinterpret_cast<const char*>(head_rows(tensor, sample, head) + lane() / 4 * kColumns) +
            (first_row + lane() % 4 * 2) * step_;
#pragma unroll
    for (int place = 0; place < kAhead; place++) fetch<false>(place);
  }
  REATTN_DEVICE void get(Operands& operands, int place) const {
#pragma unroll
    for (int i = 0; i < kColumns; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t upper = coming_[place][2 * half][i / 2], lower = coming_[place][2 * half + 1][i / 2];
        operands[i][half] = i % 2 ? seconds(upper, lower) : firsts(upper, lower);
      }
  }
  // As RowsAhead.
  template <bool kWhole>
  REATTN_DEVICE void fetch(int place) {
    const int room = kDepth == kDims ? kColumns : kDepth - lane() / 4 * kColumns;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = i / 2 * 8 + i % 2;
      const char* from = from_ + (kWhole ? row : smaller(row, left_ - 1)) * step_;
      uint32_t (&words)[kColumns / 2] = coming_[place][i];
      if constexpr (kColumns == 8) {
        const uint4 four = room > 0 ? read<uint4>(from) : uint4{};
        words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
      } else if constexpr (kColumns == 4) {
        const uint2 two = room > 0 ? read<uint2>(from) : uint2{};
        words[0] = two.x, words[1] = two.y;
      } else {
#pragma unroll
        for (int word = 0; word < kColumns / 2; word++)
          words[word] = room > 2 * word ? read<uint32_t>(from + 4 * word) : 0;
      }
    }
    from_ += 16 * step_;
    left_ -= 16;
  }

 private:
  const char* from_;
  int64_t step_;
  int left_;
  uint32_t coming_[kAhead][4][kColumns / 2];
};
// For the gradient of the query.
using QueryKeys = std::conditional_t<kDirect, ColumnsAhead<kKeyStride>, Stream<kDims, kKeyStride>>;

// What a warp does for one head.
class HeadGradients {
 public:
  REATTN_DEVICE HeadGradients(const Params& p, const Place& place, Shared<char> stages, int head)
      : p_(p),
        place_(place),
        stages_(stages),
        mask_(place.mask(p, head)),
        head_(head),
        lane_place_(kept(lane_row() * kRowStride + lane_column() * 2)) {
    for_each_row<1>([&](int, int lower, int row) {
      lse_[lower] =
          read<float>(p.lse + row_index(p, place.sample, head, place.first_row + smaller(row, place.rows - 1)));
      if (kMasked && lse_[lower] == -kInfinity) lse_[lower] = 0;  // no key is seen, all scores are -infinity
    });
  }

  // The maps of some keys, and the gradients of the normalised maps, grad value^T; returns the sum of these over rows
  // and keys.
  REATTN_DEVICE float fill(int first_key, int last_key) const {
    const OwnRows<kQueryStride, kDirect> query(p_.query, place_.sample, head_, place_.first_row);
    if constexpr (kDirect) {
      RowsAhead<kKeyStride> keys(p_.key, place_.sample, head_, first_key, last_key);
      RowsAhead<kValueStride> values(p_.value, place_.sample, head_, first_key, last_key);
      keys.start();
      const OwnRows<kOutStride, true> grad(p_.grad, place_.sample, head_, place_.first_row);
      fill_maps(query, keys, first_key, last_key, [&] { values.start(); });
      return fill_gradients(grad, values, first_key, last_key);
    } else {
      Stream<kDims, kKeyStride> keys(stages_, p_.key, place_.sample, head_, first_key, last_key, 0);
      fill_maps(query, keys, first_key, last_key, [] {});
      Stream<kDims, kValueStride> values(stages_, p_.value, place_.sample, head_, first_key, last_key, 0);
      const OwnRows<kOutStride> grad(p_.grad, place_.sample, head_, place_.first_row);
      return fill_gradients(grad, values, first_key, last_key);
    }
  }

  // The maps once more; where scores are mixed, the products of query and key that they are made of.
  REATTN_DEVICE void fill_again(int first_key, int last_key) const {
    const OwnRows<kQueryStride, kDirect> query(p_.query, place_.sample, head_, place_.first_row);
    if constexpr (kDirect) {
      RowsAhead<kKeyStride> keys(p_.key, place_.sample, head_, first_key, last_key);
      keys.start();
      fill_maps(query, keys, first_key, last_key, [] {});
    } else {
      Stream<kDims, kKeyStride> keys(stages_, p_.key, place_.sample, head_, first_key, last_key, 0);
      fill_maps(query, keys, first_key, last_key, [] {});
    }
  }

  // delta += a lane's part of the sums of P dP of the keys in shared memory, and mass += that of P. On tensor cores,
  // where of P dP^T the diagonals count.
  REATTN_DEVICE void add_delta(float (&delta)[2], float (&mass)[2], int keys) const {
    const Shared<char> maps = at(kMaps + head_ * kHeadStride), grads = at(kGrads + head_ * kHeadStride);
    if constexpr (kFloat) {
      for_each_row<1>([&](int, int lower, int row) {
        for (int key = lane() % 4; key < keys; key += 4) {
          const float prob = prob_of(load<float>(as<float>(maps + row * kRowStride) + key));
          delta[lower] = fmaf(prob, load<float>(as<float>(grads + row * kRowStride) + key), delta[lower]);
          mass[lower] += prob;
        }
      });
    } else {
      Shared<char> from = maps + lane_place_;
      // The upper 8 rows first, as a second operand has them.
      Shared<char> by_rows = {
          kept((grads + ((lane() % 8 + lane() / 16 * 8) * kRowStride + lane() / 8 % 2 * 16)).address)};
      float deltas[2][4] = {}, masses[4] = {};
#pragma unroll 4
      for (int key = 0; key < keys; key += 16, from = from + 32, by_rows = by_rows + 32) {
        uint32_t map[4], grad[4];
        load_matrices(map, from);
        load_matrices(grad, by_rows);
        probs_of(map);
        multiply_add<Narrow>(masses, map, {pack<Narrow>(1, 1), pack<Narrow>(1, 1)});
#pragma unroll
        for (int lower = 0; lower < 2; lower++)
          multiply_add<Narrow>(deltas[lower], map, {grad[2 * lower], grad[2 * lower + 1]});
      }
#pragma unroll
      for (int lower = 0; lower < 2; lower++) {
        delta[lower] += lane() / 4 % 2 ? deltas[lower][2 * lower + 1] : deltas[lower][2 * lower];
        mass[lower] += masses[2 * lower];
      }
    }
  }

  // Of what add_delta left of all keys, for a lane's rows. Large scores leave rows of P that sum to 1 only nearly: what
  // dP has in common would then not cancel.
  REATTN_DEVICE void finish_delta(float (&delta)[2], const float (&mass)[2]) const {
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
      const float all = kFloat ? quad_sum(mass[lower]) : mass[lower];
      delta[lower] = (kFloat ? quad_sum(delta[lower]) : shuffle(delta[lower], lane() / 4 * 4 + lane() / 8)) / all;
      if (kMasked && all == 0) delta[lower] = 0;  // the row sees nothing
    }
  }

  // Leaves the gradients of the maps in the workspace, for later.
  REATTN_DEVICE void save_gradients(Element* grad_scores, int first_key, int keys) const {
    const Shared<char> grads = at(kGrads + head_ * kHeadStride);
    for (int key = 0; key < keys; key += 16)
      copy_tiles(grad_scores + first_key + key, grads + key * int(sizeof(Element)));
    sync_warp();
  }

  // From the workspace, of the rows that exist.
  REATTN_DEVICE void load_gradients(const Element* grad_scores, int first_key, int keys) const {
    const Shared<char> grads = at(kGrads + head_ * kHeadStride);
    sync_warp();                                           // what lies there is done with, and what is read is there
    constexpr int kAtOnce = 4, kPieces = kTilePieces / 2;  // on their way: so many times 16 keys, of which a lane has
    for (int first = 0; first < keys; first += 16 * kAtOnce) {
      uint4 pieces[kAtOnce * kPieces];
      const auto for_each_piece = [&](auto function) {
#pragma unroll
        for (int i = 0; i < kAtOnce * kPieces; i++) {
          const int row = (i % kPieces * kWarp + lane()) / kTilePieces, key = first + 16 * (i / kPieces);
          if (row < place_.rows && key < keys) function(pieces[i], row, key + lane() % kTilePieces * kVector);
        }
      };
      for_each_piece([&](uint4& piece, int row, int key) {
        piece = read<uint4>(grad_scores + (int64_t(row) * place_.keys + first_key + key));
      });
      for_each_piece([&](const uint4& piece, int row, int key) {
        store(grads + (row * kRowStride + key * int(sizeof(Element))), piece);
      });
    }
    sync_warp();
  }

  // Of maps and the gradients of maps, packed, in their place the gradients of the scores.
  REATTN_DEVICE void to_grad_scores(Packed<Narrow>& map, Packed<Narrow>& grads, const float (&delta)[2]) const {
    probs_of(map.part);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 prob = unpack<Narrow>(map.part[i]);
      const float2 grad = unpack<Narrow>(grads.part[i]);
      grads.part[i] = pack<Narrow>(prob.x * (grad.x - delta[i % 2]), prob.y * (grad.y - delta[i % 2]));
    }
  }

  // The gradients of the scores, which go to the workspace, of the maps in shared memory and their gradients, which lie
  // there or, where keys are not resident, in the workspace. Delta as finish_delta leaves it.
  REATTN_DEVICE void leave_grad_scores(const float (&delta)[2], Element* grad_scores, int first_key, int keys) const {
    const Shared<char> maps = at(kMaps + head_ * kHeadStride), grads = at(kGrads + head_ * kHeadStride);
    if constexpr (!kResident) load_gradients(grad_scores, first_key, keys);
    sync_warp();  // all lanes have read what is summed
    for (int key = 0; key < keys; key += 16) {
      const Shared<char> tile = grads + key * int(sizeof(Element));
      if constexpr (kFloat) {
        float scores[2][4] = {};
        for_each_pair([&](int right, int lower, int row, int column) {
          if (row >= place_.rows) return;
          const float2 map = load<float2>(as<float>(maps + row * kRowStride) + (key + column));
          const float2 grad = load<float2>(as<float>(tile + row * kRowStride) + column);
          scores[right][2 * lower] = prob_of(map.x) * (grad.x - delta[lower]);
          scores[right][2 * lower + 1] = prob_of(map.y) * (grad.y - delta[lower]);
        });
        store_tile(as<float>(tile), kRowStride, scores);
      } else {
        Packed<Narrow> map, scores;
        load_matrices(map.part, maps + (lane_place_ + 2 * key));
        load_matrices(scores.part, tile + lane_place_);
        to_grad_scores(map, scores, delta);
        sync_warp();
        store_matrices(tile + lane_place_, scores.part);
      }
      sync_warp();
      copy_tiles(grad_scores + first_key + key, tile);
    }
    sync_warp();
  }

  // The gradients of the scores, which go to the workspace, and the gradient of the query. Delta and mass are those of
  // add_delta, where keys are not resident; of these, the last are still in shared memory. Where scores are mixed, the
  // gradient of the query alone, of what unmix left in the workspace.
  template <class Keys = QueryKeys>
  REATTN_DEVICE void run(float (&delta)[2], float (&mass)[2], Element* grad_scores) const {
    float grad_query[kDims / 8][4] = {};
    const int end = place_.range.end;
    if constexpr (kPreMixed) {
      multiply_again<false>(grad_query, grad_scores);
    } else if constexpr (kResident) {
      Keys keys = start<Keys>(0, end);
      add_delta(delta, mass, end);
      finish_delta(delta, mass);
      multiply_tile(grad_query, keys, delta, grad_scores, 0, end);
    } else {
      finish_delta(delta, mass);
#pragma unroll 1
      for (int tile = place_.tiles() - 1; tile >= 0; tile--) {
        const int first_key = place_.first_key(tile), last_key = place_.last_key(tile);
        if (last_key < end) {
          fill_again(first_key, last_key);
          load_gradients(grad_scores, first_key, last_key - first_key);
        }
        Keys keys = start<Keys>(first_key, last_key);
        multiply_tile(grad_query, keys, delta, grad_scores, first_key, last_key);
      }
    }
    if (kMasked && !finite(grad_query)) {
      if constexpr (!kPreMixed) forget_hidden(grad_scores);
      multiply_again<true>(grad_query, grad_scores);
    }
    // A lane has pairs of columns, or those of ColumnsAhead.
    const int first_column = lane() % 4 * (kDirect ? kDims / 4 : 2);
    Element* all = head_rows(p_.grad_query, place_.sample, head_) + first_column;
    for_each_row<1>([&](int, int lower, int row) {
      if (row >= place_.rows) return;
      Element* to = all + (place_.first_row + row) * p_.grad_query.row_stride;
      if constexpr (kDirect) {
        constexpr int kColumns = kDims / 8;
        const auto scaled = [&](int i) { return grad_query[i % kColumns][2 * lower + i / kColumns] * p_.scale; };
        const auto pair = [&](int i) { return pack<Narrow>(scaled(i), scaled(i + 1)); };
#pragma unroll
        for (int i = 0; i < 2 * kColumns; i += 2) {
          if constexpr (kHeadDim == kDims && kColumns % 4 == 0) {
            if (i % 8 == 0) write(to + i, uint4{pair(i), pair(i + 2), pair(i + 4), pair(i + 6)});
          } else {
            write_pair(to + i, first_column + i, scaled(i), scaled(i + 1));
          }
        }
        return;
      }
#pragma unroll
      for (int column = 0; column < kDims / 8; column++)
        write_pair(to + 8 * column, 8 * column + lane() % 4 * 2, grad_query[column][2 * lower] * p_.scale,
                   grad_query[column][2 * lower + 1] * p_.scale);
    });
  }

  // Of the maps of some keys in shared memory, and of their gradients, makes gradients of the scores, which go to the
  // workspace, and multiplies them by these keys.
  template <class Keys>
  REATTN_DEVICE void multiply_tile(float (&grad_query)[kDims / 8][4], Keys& keys, const float (&delta)[2],
                                   Element* grad_scores, int first_key, int last_key) const {
    const Shared<char> maps = at(kMaps + head_ * kHeadStride), grads = at(kGrads + head_ * kHeadStride);
    const int end = last_key - first_key;
    grad_scores += first_key;
    if constexpr (kFloat) {
#pragma unroll 1
      for (int key = 0; key < end; key += 16) {
        const Shared<char> stage = keys.next(), tile = grads + key * int(sizeof(Element));
        float scores[2][4];
        for_each_pair([&](int right, int lower, int row, int column) {
          const float2 map = load<float2>(as<float>(maps + row * kRowStride) + (key + column));
          const float2 grad = load<float2>(as<float>(tile + row * kRowStride) + column);
          scores[right][2 * lower] = prob_of(map.x) * (grad.x - delta[lower]);
          scores[right][2 * lower + 1] = prob_of(map.y) * (grad.y - delta[lower]);
        });
        store_tile(as<float>(tile), kRowStride, scores);
        sync_warp();
        multiply(grad_query, tile, stage);
        copy_tiles(grad_scores + key, tile);
      }
      return;
    }
    const int offset = kept(lane_row() * kStageStride + lane_column() * 2);
    const int row = lane() / kTilePieces, piece = lane() % kTilePieces;
    Element* to = grad_scores + (int64_t(row) * place_.keys + piece * kVector);
    Shared<char> copied = {kept((grads + (row * kRowStride + piece * 16)).address)}, from = maps + lane_place_;
    const auto take = [&](auto multiply, int group) {
      Packed<Narrow> map, scores;
      load_matrices(map.part, from + 32 * group);
      load_matrices(scores.part, from + (kGrads - kMaps + 32 * group));
      to_grad_scores(map, scores, delta);
      sync_warp();
      store_matrices(from + (kGrads - kMaps + 32 * group), scores.part);
      multiply(scores);
      sync_warp();
      copy_tile(to + 16 * group, copied + 32 * group);
    };
    int key = 0;
    if constexpr (kDirect) {
      constexpr int kAhead = Keys::kAhead;
      const auto take_some = [&](auto whole, int place) {
        take(
            [&](const Packed<Narrow>& scores) {
              typename Keys::Operands operands;
              keys.get(operands, place);
#pragma unroll
              for (int column = 0; column < kDims / 8; column++)
                multiply_add<Narrow>(grad_query[column], scores.part, operands[column]);
              constexpr bool kWhole = decltype(whole)::value;
              if (kWhole || key + 16 * (place + kAhead) < end) keys.template fetch<kWhole>(place);
            },
            place);
      };
      const auto advance = [&] {
        key += 16 * kAhead, from = from + 32 * kAhead, copied = copied + 32 * kAhead, to += 16 * kAhead;
      };
#pragma unroll 1
      for (; key + 32 * kAhead <= end; advance())
#pragma unroll
        for (int place = 0; place < kAhead; place++) take_some(std::integral_constant<bool, true>(), place);
#pragma unroll 1
      for (; key < end; advance())
#pragma unroll
        for (int place = 0; place < kAhead; place++)
          if (key + 16 * place < end) take_some(std::integral_constant<bool, false>(), place);
    } else {
      const auto multiply_by = [&](Shared<char> stage) {
        return [&grad_query, row = stage + offset](const Packed<Narrow>& scores) { multiply(grad_query, scores, row); };
      };
#pragma unroll 1
      for (; key + 48 <= end; key += 32, from = from + 64, copied = copied + 64, to += 32)
#pragma unroll
        for (int group = 0; group < 2; group++) take(multiply_by(keys.template next<true>()), group);
#pragma unroll 1
      for (; key < end; key += 16, from = from + 32, copied = copied + 32, to += 16) take(multiply_by(keys.next()), 0);
    }
  }

  // The gradient of the query, from those of the scores in the workspace. Strictly: what is hidden in a key does not
  // reach it, where it is not finite. Where it is seen, those of the scores are not.
  template <bool kStrict, class Keys = QueryKeys>
  REATTN_DEVICE void multiply_again(float (&grad_query)[kDims / 8][4], const Element* grad_scores) const {
#pragma unroll
    for (int i = 0; i < kDims / 2; i++) grad_query[i / 4][i % 4] = 0;
    sync_warp();  // what other lanes have written is there
    const auto scores_at = [&](int key, float (&scores)[2][4]) {
      for_each_pair([&](int right, int lower, int row, int column) {
        if (row >= place_.rows) return;
        const float2 pair = read_pair(grad_scores + (int64_t(row) * place_.keys + key + column));
        scores[right][2 * lower] = pair.x, scores[right][2 * lower + 1] = pair.y;
      });
    };
    // In the order in which run adds them up.
#pragma unroll 1
    for (int tile = place_.tiles() - 1; tile >= 0; tile--) {
      const int first_key = place_.first_key(tile), last_key = place_.last_key(tile);
      Keys keys = start<Keys>(first_key, last_key);
      if constexpr (kDirect) {
#pragma unroll 1
        for (int key = first_key; key < last_key; key += 16 * Keys::kAhead)
#pragma unroll
          for (int place = 0; place < Keys::kAhead; place++) {
            if (key + 16 * place >= last_key) break;
            float scores[2][4] = {};
            scores_at(key + 16 * place, scores);
            const Packed<Narrow> packed(scores);
            typename Keys::Operands operands;
            keys.get(operands, place);
#pragma unroll
            for (int column = 0; column < kDims / 8; column++) {
              if constexpr (kStrict)
                multiply_add<Narrow>(grad_query[column], packed.part,
                                     {finite_or_zero(operands[column][0]), finite_or_zero(operands[column][1])});
              else
                multiply_add<Narrow>(grad_query[column], packed.part, operands[column]);
            }
            if (key + 16 * (place + Keys::kAhead) < last_key) keys.template fetch<false>(place);
          }
      } else {
        const Shared<char> grads = at(kGrads + head_ * kHeadStride);
        const int offset = kept(lane_row() * kStageStride + lane_column() * 2);
#pragma unroll 1
        for (int key = first_key; key < last_key; key += 16) {
          const Shared<char> stage = keys.next();
          if constexpr (kStrict) make_finite<kDims>(stage);
          float scores[2][4] = {};
          scores_at(key, scores);
          if constexpr (kFloat) {
            store_tile(as<float>(grads), kRowStride, scores);
            sync_warp();
            multiply(grad_query, grads, stage);
          } else {
            multiply(grad_query, Packed<Narrow>(scores), stage + offset);
          }
        }
      }
    }
  }
  // The delta of a row that sees what is not finite is NaN, and so is zero times that: in the workspace, zero for what
  // is hidden.
  REATTN_DEVICE void forget_hidden(Element* grad_scores) const {
    const int end = smaller(round_up(place_.range.end, 16), p_.key.rows);  // of what was written
    sync_warp();                                                           // what other lanes have written is there
    for (int row = 0; row < place_.rows; row++)
      for (int key = lane(); key < end; key += kWarp)
        if (!mask_.sees(place_.first_row + row, key))
          write(grad_scores + (int64_t(row) * place_.keys + key), Element());
  }
  static REATTN_DEVICE bool finite(const float (&sums)[kDims / 8][4]) {
    float zeros = 0;
#pragma unroll
    for (int i = 0; i < kDims / 2; i++) zeros = fmaf(sums[i / 4][i % 4], 0.0f, zeros);
    return all(zeros == 0);
  }

 private:
  // Some keys, for products over them.
  template <class Keys>
  REATTN_DEVICE Keys start(int first_key, int last_key) const {
    if constexpr (kDirect)
      return {p_.key, place_.sample, head_, first_key, last_key};
    else
      return {stages_, p_.key, place_.sample, head_, first_key, last_key, 0};
  }
  // Before_last: called before the last keys are multiplied.
  template <class Own, class Rows, class Function>
  REATTN_DEVICE void fill_maps(const Own& own, Rows& keys, int first_key, int last_key, Function before_last) const {
    const Shared<char> maps = at(kMaps + head_ * kHeadStride);
    const Dropout dropout(p_, place_.sample, head_);
    Shared<char> to = maps + lane_place_;
    for_each_product(
        own, keys, first_key, last_key, before_last, [&](auto ragged, int key, float (&products)[1][2][4]) {
          float (&probs)[2][4] = products[0];
          if constexpr (kPreMixed)
            scale_products(probs, p_);  // of which RowMaps makes maps
          else
            exponentiate<ragged.value>(products, first_key + key);
#pragma unroll
          for (int right = 0; right < (kPreMixed ? 0 : 2); right++) {
            float (&prob)[4] = probs[right];
            if constexpr (kDropout) {
              float kept[4] = {prob[0], prob[1], prob[2], prob[3]};
              dropout.drop(kept, place_.first_row + lane() / 4, first_key + key + 8 * right + lane() % 4 * 2);
#pragma unroll
              for (int i = 0; i < 4; i++) prob[i] = kept[i] == 0 ? -prob[i] : prob[i];
            } else {
#pragma unroll
              for (int i = 0; i < 4; i++) prob[i] -= p_.centre;
            }
          }
          if constexpr (kFloat)
            store_tile(as<float>(maps) + key, kRowStride, probs);
          else
            store_matrices(to, Packed<Narrow>(probs).part);
          to = to + 32;
        });
  }

  template <class Own, class Rows>
  REATTN_DEVICE float fill_gradients(const Own& own, Rows& values, int first_key, int last_key) const {
    const Shared<char> grads = at(kGrads + head_ * kHeadStride);
    float sums[4] = {};
    Shared<char> to = grads + lane_place_;
    for_each_product(
        own, values, first_key, last_key, [] {},
        [&](auto ragged, int key, float (&products)[1][2][4]) {
          if constexpr (kDirect && ragged.value) clear_outside(products[0], first_key + key);
          if constexpr (kMasked && ragged.value)
            mask_.for_each<1>(place_.first_row, first_key + key, [&](int, int right, int i, float added) {
              if (added == -kInfinity) products[0][right][i] = 0;
            });
          if constexpr (kFloat) {
#pragma unroll
            for (int i = 0; i < 8; i++) sums[i / 2 % 2 * 2] += products[0][i / 4][i % 4];
            store_tile(as<float>(grads) + key, kRowStride, products[0]);
          } else {
            const Packed<Narrow> packed(products[0]);
            if constexpr (kNorm) add_rows(sums, packed);
            store_matrices(to, packed.part);
            to = to + 32;
          }
        });
    float sum = 0;
    for_each_row<1>([&](int, int lower, int row) {
      const float of_row = kFloat ? quad_sum(sums[2 * lower]) : sums[2 * lower];
      if (row < place_.rows) sum += of_row;
    });
#pragma unroll
    for (int mask = 4; mask < kWarp; mask *= 2) sum += shuffle_xor(sum, mask);
    return sum;
  }

  // Visits the products of own rows with rows of another tensor, 16 at a time: function(whether some of them may lie
  // outside or be hidden, key in the tile, products).
  template <class Own, class Rows, class Before, class Function>
  REATTN_DEVICE void for_each_product(const Own& own, Rows& rows, int first_key, int last_key, Before before_last,
                                      Function function) const {
    const int keys = last_key - first_key, unhidden = place_.range.unhidden(first_key, keys);
    int key = 0;
    if constexpr (kDirect) {
      constexpr int kAhead = Rows::kAhead;
#pragma unroll 1
      for (; key + 16 * kAhead <= unhidden && key + 32 * kAhead <= keys; key += 16 * kAhead)
#pragma unroll
        for (int place = 0; place < kAhead; place++) {
          float products[1][2][4];
          own.multiply(products, rows[place]);
          rows.template fetch<true>(place);
          function(std::integral_constant<bool, false>(), key + 16 * place, products);
        }
      before_last();
#pragma unroll 1
      for (; key < keys; key += 16 * kAhead)
#pragma unroll
        for (int place = 0; place < kAhead; place++) {
          if (key + 16 * place >= keys) break;
          float products[1][2][4];
          own.multiply(products, rows[place]);
          if (key + 16 * (place + kAhead) < keys) rows.template fetch<false>(place);
          function(std::integral_constant<bool, true>(), key + 16 * place, products);
        }
    } else {
      const int in_pairs = smaller(keys, unhidden + 16);
#pragma unroll 1
      for (; key + 48 <= in_pairs; key += 32)
#pragma unroll
        for (int group = 0; group < 2; group++) {
          float products[1][2][4];
          own.multiply(products, rows.template next<true>());
          function(std::integral_constant<bool, false>(), key + 16 * group, products);
        }
#pragma unroll 1
      for (; key < keys; key += 16) {
        float products[1][2][4];
        own.multiply(products, rows.next());
        function(std::integral_constant<bool, true>(), key, products);
      }
    }
  }
  // Ragged: some of the keys may lie outside the sequence, or be hidden.
  template <bool kRagged>
  REATTN_DEVICE void exponentiate(float (&scores)[1][2][4], int first_key) const {
    if constexpr (kAdded || (kMasked && kRagged)) hide(scores, p_, mask_, place_.first_row, first_key);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float& score = scores[0][i / 4][i % 4];
      score = fast_exp2(rounded_product(score, score_factor(p_)) - lse_[i / 2 % 2]);  // as in the forward pass
    }
    if constexpr (kRagged) clear_outside(scores[0], first_key);
  }
  REATTN_DEVICE void clear_outside(float (&probs)[2][4], int first_key) const {
    if (first_key + 16 <= p_.key.rows) return;
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (first_key + i / 4 * 8 + lane() % 4 * 2 + i % 2 >= p_.key.rows) probs[i / 4][i % 4] = 0;
  }
  // What a number in shared memory holds.
  REATTN_DEVICE float prob_of(float map) const { return kDropout ? absolute(map) : map + p_.centre; }
  REATTN_DEVICE void probs_of(uint32_t (&maps)[4]) const {
    const uint32_t centre = pack<Narrow>(p_.centre, p_.centre);
#pragma unroll
    for (int i = 0; i < 4; i++) maps[i] = kDropout ? maps[i] & 0x7fff7fff : add_pairs<Narrow>(maps[i], centre);
  }
  static REATTN_DEVICE void add_rows(float (&sums)[4], const Packed<Narrow>& tile) {
    multiply_add<Narrow>(sums, tile.part, {pack<Narrow>(1, 1), pack<Narrow>(1, 1)});
  }
  // Pairs of a tile of 16 x 16: function(0 or 1 for the right 8 columns, upper or lower 8 rows, row, column).
  template <class Function>
  static REATTN_DEVICE void for_each_pair(Function function) {
#pragma unroll
    for (int right = 0; right < 2; right++)
#pragma unroll
      for (int lower = 0; lower < 2; lower++)
        function(right, lower, 8 * lower + lane() / 4, 8 * right + lane() % 4 * 2);
  }
  static REATTN_DEVICE float2 read_pair(const Element* from) {
    if constexpr (kFloat)
      return read<float2>(from);
    else
      return unpack<Narrow>(read<uint32_t>(from));
  }
  // Rows of tiles of 16 x 16 to the workspace, 16 bytes a lane: those that are in the sequence.
  static constexpr int kTilePieces = 16 / kVector;
  REATTN_DEVICE void copy_tile(Element* to, Shared<char> from) const {
    if (lane() / kTilePieces < place_.rows) write(to, load<uint4>(from));
  }
  REATTN_DEVICE void copy_tiles(Element* to, Shared<char> tile) const {
#pragma unroll
    for (int i = 0; i < kTilePieces / 2; i++) {
      const int row = (i * kWarp + lane()) / kTilePieces, piece = lane() % kTilePieces;
      if (row < place_.rows)
        write(to + (int64_t(row) * place_.keys + piece * kVector), load<uint4>(tile + row * kRowStride + piece * 16));
    }
  }
  // sums += a tile of 16 x 16 times the 16 rows in a stage, of which a lane gives the address of one.
  static REATTN_DEVICE void multiply(float (&sums)[kDims / 8][4], const Packed<Narrow>& tile, Shared<char> row) {
#pragma unroll
    for (int column = 0; column < kDims / 8; column += 2) {
      uint32_t other[4];
      load_matrices_transposed(other, row + 16 * column);
      multiply_add<Narrow>(sums[column], tile.part, {other[0], other[1]});
      multiply_add<Narrow>(sums[column + 1], tile.part, {other[2], other[3]});
    }
  }
  static REATTN_DEVICE void multiply(float (&sums)[kDims / 8][4], Shared<char> tile, Shared<char> stage) {
    for (int step = 0; step < 16; step++) {
      float own[2];
      for_each_row<1>(
          [&](int, int lower, int row) { own[lower] = load<float>(as<float>(tile + row * kRowStride) + step); });
#pragma unroll
      for (int column = 0; column < kDims / 8; column++) {
        const float2 other = load<float2>(as<float>(stage + step * kStageStride) + (8 * column + lane() % 4 * 2));
#pragma unroll
        for (int i = 0; i < 4; i++) sums[column][i] = fmaf(own[i / 2], i % 2 ? other.y : other.x, sums[column][i]);
      }
    }
  }

  const Params& p_;
  const Place& place_;
  Shared<char> stages_;
  HeadMask mask_;
  int head_, lane_place_;  // place: of a lane's row in a tile of a head's maps
  float lse_[2];
};

// Where scores are mixed: of the products of query and key of all heads of a row the maps, in their place, as kMaps has
// them.
class RowMaps {
 public:
  REATTN_DEVICE RowMaps(const Params& p, const Place& place) : p_(p), place_(place), scores_(p, place) {}

  REATTN_DEVICE void run(int warp, int first_key, int keys) const {
    const Dropout dropout(p_, place_.sample, 0);
    Heads<> first(at(kMaps), warp);
#pragma unroll 1
    for (int row = warp; row < place_.rows; row += kWarps, first.descend(kWarps)) {
      float lse[kHeadBlocks][2];
      const float* of_row = p_.lse + row_index(p_, place_.sample, 0, place_.first_row + row);
      for_each_head_of_lane([&](int block, int i, int head) {
        lse[block][i] = read<float>(of_row + int64_t(smaller(head, kHeads - 1)) * p_.query.rows);
        if (kMasked && lse[block][i] == -kInfinity) lse[block][i] = 0;  // no key is seen, all scores are -infinity
      });
      Heads<> heads = first;
#pragma unroll 1
      for (int key = 0; key < keys; key += 16, heads.advance()) {
        HeadsTile maps;
        scores_.get(maps, heads, row, first_key, key);
        for_each_element([&](int block, int i, int, int lower) {
          float& map = maps[block][i];
          map = fast_exp2(map - lse[block][i % 2]);
          if (first_key + key + 8 * lower + lane() / 4 >= p_.key.rows) map = 0;
        });
#pragma unroll
        for (int block = 0; block < kHeadBlocks; block++) {
          uint32_t kept = 0;
          if constexpr (kDropout) kept = dropout.kept_of_heads(8 * block, place_.first_row + row, first_key + key);
#pragma unroll
          for (int i = 0; i < 4; i++)
            maps[block][i] = !kDropout ? maps[block][i] - p_.centre : kept >> i & 1 ? maps[block][i] : -maps[block][i];
        }
        if constexpr (!kFloat) clear_absent(maps);
        sync_warp();  // all lanes have the products
        if constexpr (kFloat)
          for_each_element([&](int block, int i, int head, int lower) {
            if (head < kHeads)
              store(ScoreWeights<false>::number(kMaps, head, row, key + 8 * lower + lane() / 4), maps[block][i]);
          });
        else
          heads.store(maps);
      }
    }
  }

 private:
  const Params& p_;
  const Place& place_;
  MixedScores scores_;
};

// Sums over positions of products of R and dS of every two heads: laid out as products of Sums.
using ScoreSums = float[kHeadSteps][kHeadBlocks][4];

// The way back through the mixing of scores, of all heads of a row: with the products of query and key at kMaps, the
// gradients of the scores at kGrads become those of the products.
class RowUnmixing {
 public:
  REATTN_DEVICE RowUnmixing(const Params& p, const Place& place) : p_(p), place_(place), weights_(p) {}

  REATTN_DEVICE void run(ScoreSums& sums, int warp, int first_key, int keys) const {
    const float scale = 1.0f / weights_.unit();
    Heads<> first(at(kMaps), warp);
#pragma unroll 1
    for (int row = warp; row < place_.rows; row += kWarps, first.descend(kWarps)) {
      ScoreSums of_row = {};
      Heads<> heads = first;
#pragma unroll 1
      for (int key = 0; key < keys; key += 16, heads.advance()) {
        // What is hidden from all heads may be anything.
        const uint32_t seen = kMasked ? seen_by_any(p_, place_, place_.first_row + row, first_key + key) : 0xffff;
        HeadsTile grads;
        if constexpr (kFloat) {
          weights_.multiply(grads, heads, kGrads, row, key);
          add(of_row, row, key, seen);
        } else {
          const HeadsOperand of_scores = heads.load(kGrads);
          for_each_element([&](int block, int i, int, int) { grads[block][i] = 0; });
          weights_.multiply(grads, of_scores);
          for_each_element([&](int block, int i, int, int) { grads[block][i] *= scale; });
          add(of_row, heads, of_scores, seen);
        }
        if constexpr (!kFloat) clear_absent(grads);
        sync_warp();  // all lanes have the gradients
        if constexpr (kFloat)
          for_each_element([&](int block, int i, int head, int lower) {
            if (head < kHeads) store(number(kGrads, head, row, key + 8 * lower + lane() / 4), grads[block][i]);
          });
        else
          heads.store(grads, kGrads);
      }
      // Row by row: long sums of products on tensor cores lose digits.
#pragma unroll
      for (int i = 0; i < kHeadSteps * kHeadBlocks * 4; i++)
        sums[i / 4 / kHeadBlocks][i / 4 % kHeadBlocks][i % 4] +=
            of_row[i / 4 / kHeadBlocks][i / 4 % kHeadBlocks][i % 4];
    }
  }

 private:
  static REATTN_DEVICE Shared<float> number(int offset, int head, int row, int key) {
    return ScoreWeights<true>::number(offset, head, row, key);
  }

  static REATTN_DEVICE void add(ScoreSums& sums, int row, int key, uint32_t seen) {
    for (int position = 0; position < 16; position++) {
      float left[kHeadSteps][2];
#pragma unroll
      for (int step = 0; step < kHeadSteps; step++)
#pragma unroll
        for (int lower = 0; lower < 2; lower++) {
          const int head = smaller(16 * step + 8 * lower + lane() / 4, kHeads - 1);
          left[step][lower] = seen >> position & 1 ? load<float>(number(kMaps, head, row, key + position)) : 0.0f;
        }
      for_each_head_of_lane([&](int block, int i, int head) {
        const float right = load<float>(number(kGrads, smaller(head, kHeads - 1), row, key + position));
#pragma unroll
        for (int step = 0; step < kHeadSteps; step++)
#pragma unroll
          for (int lower = 0; lower < 2; lower++) {
            float& sum = sums[step][block][2 * lower + i];
            sum = fmaf(left[step][lower], right, sum);
          }
      });
    }
  }
  static REATTN_DEVICE void add(ScoreSums& sums, const Heads<>& heads, const HeadsOperand& of_scores, uint32_t seen) {
    uint32_t whole[2];  // of a lane's two pairs of positions: all bits of those that are seen
#pragma unroll
    for (int right = 0; right < 2; right++) {
      const uint32_t pair = seen >> (8 * right + lane() % 4 * 2) & 3;
      whole[right] = (pair & 1) * 0xffffu | (pair >> 1) * 0xffff0000u;
    }
#pragma unroll
    for (int step = 0; step < kHeadSteps; step++) {
      uint32_t products[4];
      heads.load_across(products, step);
      if constexpr (kMasked) {
#pragma unroll
        for (int i = 0; i < 4; i++) products[i] &= whole[i / 2];
      }
#pragma unroll
      for (int block = 0; block < kHeadBlocks; block++)
        multiply_add<Narrow>(sums[step][block], products,
                             {transposed(of_scores.part[block / 2][block % 2 * 2]),
                              transposed(of_scores.part[block / 2][block % 2 * 2 + 1])});
    }
  }

  const Params& p_;
  const Place& place_;
  ScoreWeights<true> weights_;
};

// Adds up the sums of all warps, in order, and writes them for this block; all threads have to come here.
REATTN_DEVICE void store_sums(const Params& p, Sums& sums, int warp, int64_t block_number) {
  sync_block();  // the maps are no longer needed
  const Shared<float> all = as<float>(at(0)), own = all + warp * kSumFloats;
#pragma unroll
  for (int block = 0; block < kHeadBlocks; block++) {
#pragma unroll
    for (int step = 0; step < kHeadSteps; step++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = 16 * step + i / 2 * 8 + lane() / 4, column = 8 * block + lane() % 4 * 2 + i % 2;
        if (16 * step + i / 2 * 8 < kPaddedHeads)
          store(own + (row * kPaddedHeads + column), sums.products[step][block][i]);
        if (kSpareRow && row == kHeads)
          store(own + (kPaddedHeads * kPaddedHeads + column), sums.products[step][block][i]);
      }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float& gamma = sums.gamma[block][i];
#pragma unroll
      for (int mask = 4; mask < kWarp; mask *= 2) gamma += shuffle_xor(gamma, mask);
      const int head = 8 * block + lane() % 4 * 2 + i;
      if (lane() < 4) {
        if (!kSpareRow) store(own + (kPaddedHeads * kPaddedHeads + head), sums.shift[block][i]);
        store(own + (kPaddedHeads * (kPaddedHeads + 1) + head), gamma);
      }
    }
  }
  sync_block();
  for (int i = thread(); i < kSumFloats; i += threads()) {
    float sum = 0;
    for (int from = 0; from < kWarps; from++) sum += load<float>(all + (from * kSumFloats + i));
    if (i < kPaddedHeads * kPaddedHeads)
      write(p.products + (block_number * (kPaddedHeads * kPaddedHeads) + i), sum);
    else
      write(p.vectors + (block_number * (3 * kPaddedHeads) + i - kPaddedHeads * kPaddedHeads), sum);
  }
}

// A block of 16 query rows, all heads. delta = sum_j P dP needs all keys before any dS is known: where they are not
// resident, the gradients of the maps wait in the workspace, and the maps are computed again. delta is not
// rowsum(dO * O), as in attention without mixing: the heads are coupled.
__global__ void __launch_bounds__(32 * kWarps, 1) backward(const __grid_constant__ Params p) {
  const Place place(p);
  const int warp = reattn::warp();
  const Shared<char> scratch = at(kScratch + warp * kScratchBytes);
  Element* const mixed = static_cast<Element*>(p.mixed) + place.workspace;
  Element* const grad_scores = static_cast<Element*>(p.grad_scores) + place.workspace;
  const auto for_each_head = [&](auto function) {
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++)
      if (const int head = warp + turn * kWarps; head < kHeads)
        function(turn, HeadGradients(p, place, scratch, head), grad_scores + head * place.head_stride);
  };

  prefetch_heads(p, place.sample, warp, place.first_row / kRows, (p.query.rows + kRows - 1) / kRows);
  if (warp == 0) Folded(kFolded).prepare<kScaled>(p);
  if (thread() < 8) store(as<uint32_t>(at(kOnes)) + thread(), pack<Narrow>(1, 1));
  Sums sums;
  float beta[kTurns] = {}, mass[kTurns][2] = {}, delta[kTurns][2] = {};
#pragma unroll 1
  for (int tile = 0; tile < place.tiles(); tile++) {
    const int first_key = place.first_key(tile), last_key = place.last_key(tile), keys = last_key - first_key;
    for_each_head([&](int turn, const HeadGradients& head, Element*) { beta[turn] += head.fill(first_key, last_key); });
    sync_block();
    if constexpr (kPreMixed) {
      RowMaps(p, place).run(warp, first_key, keys);
      sync_warp();
    }
    RowGradients gradients(p, place, first_key, scratch);
    gradients.run(sums, warp, keys, mixed + first_key);
    sync_block();
    if constexpr (!kResident)
      for_each_head([&](int turn, const HeadGradients& head, Element* to) {
        head.add_delta(delta[turn], mass[turn], keys);
        if (kPreMixed || last_key < place.range.end) head.save_gradients(to, first_key, keys);
      });
  }
  const int64_t block_number = place.number(p);
  if constexpr (kPreMixed) {
    for_each_head([&](int turn, const HeadGradients& head, Element*) {
      if constexpr (kResident) head.add_delta(delta[turn], mass[turn], place.range.end);
      head.finish_delta(delta[turn], mass[turn]);
    });
#pragma unroll 1
    for (int first_key = 0; first_key < place.range.end; first_key += kKeys) {
      const int keys = smaller(kKeys, place.range.end - first_key);
      if constexpr (!kResident) {
        sync_block();  // all have left the maps
        for_each_head([&](int, const HeadGradients& head, Element*) { head.fill_again(first_key, first_key + keys); });
        sync_block();
        RowMaps(p, place).run(warp, first_key, keys);
        sync_block();
      }
      for_each_head([&](int turn, const HeadGradients& head, Element* to) {
        head.leave_grad_scores(delta[turn], to, first_key, keys);
      });
    }
    if constexpr (kMasked)
      for_each_head([&](int turn, const HeadGradients& head, Element* to) {
        const bool finite = absolute(delta[turn][0]) < kInfinity && absolute(delta[turn][1]) < kInfinity;
        if (!all(finite)) head.forget_hidden(to);
      });
  }
  for_each_head([&](int turn, const HeadGradients& head, Element* to) {
    if constexpr (!kPreMixed) head.run(delta[turn], mass[turn], to);
    if (lane() == 0)
      write(p.vectors + (block_number * (3 * kPaddedHeads) + 2 * kPaddedHeads + warp + turn * kWarps), beta[turn]);
  });
  if (thread() < kPaddedHeads - kHeads)
    write(p.vectors + (block_number * (3 * kPaddedHeads) + 2 * kPaddedHeads + kHeads + thread()), 0.0f);
  store_sums(p, sums, warp, block_number);
}

#if REATTN_PRE_MIXED
// The same rows once more, where scores are mixed: the gradients of the scores that backward left in the workspace
// become those of the products of query and key, of which the gradient of the query is made; and partial sums of the
// gradient of pre_theta.
__global__ void __launch_bounds__(32 * kWarps, 1) unmix(const __grid_constant__ Params p) {
  const Place place(p);
  const int warp = reattn::warp();
  const Shared<char> scratch = at(kScratch + warp * kScratchBytes);
  Element* const grad_scores = static_cast<Element*>(p.grad_scores) + place.workspace;
  const auto for_each_head = [&](auto function) {
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++)
      if (const int head = warp + turn * kWarps; head < kHeads)
        function(HeadGradients(p, place, scratch, head), grad_scores + head * place.head_stride);
  };
  ScoreSums sums = {};
#pragma unroll 1
  for (int first_key = 0; first_key < place.range.end; first_key += kKeys) {
    const int keys = smaller(kKeys, place.range.end - first_key);
    for_each_head([&](const HeadGradients& head, const Element* of_head) {
      head.fill_again(first_key, first_key + keys);
      head.load_gradients(of_head, first_key, keys);
    });
    sync_block();
    RowUnmixing(p, place).run(sums, warp, first_key, keys);
    sync_block();
    for_each_head([&](const HeadGradients& head, Element* of_head) { head.save_gradients(of_head, first_key, keys); });
  }
  for_each_head([&](const HeadGradients& head, Element* of_head) {
    float nothing[2] = {};
    head.run(nothing, nothing, of_head);
  });

  constexpr int kNumbers = kPaddedHeads * kPaddedHeads;
  sync_block();  // the tiles are no longer needed
  const Shared<float> all = as<float>(at(0)), own = all + warp * kNumbers;
#pragma unroll
  for (int step = 0; step < kHeadSteps; step++)
#pragma unroll
    for (int block = 0; block < kHeadBlocks; block++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = 16 * step + i / 2 * 8 + lane() / 4, column = 8 * block + lane() % 4 * 2 + i % 2;
        if (16 * step + i / 2 * 8 < kPaddedHeads) store(own + (row * kPaddedHeads + column), sums[step][block][i]);
      }
  sync_block();
  for (int i = thread(); i < kNumbers; i += threads()) {
    float sum = 0;
    for (int from = 0; from < kWarps; from++) sum += load<float>(all + (from * kNumbers + i));
    write(p.pre_products + (place.number(p) * kNumbers + i), sum);
  }
}
#endif

}  // namespace reattn
