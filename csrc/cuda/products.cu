// The gradients of key and value: products over rows of the maps that the backward sweep left. A block owns some keys
// of one sample and head and streams the rows past them: of the maps, and of what these are multiplied by.
#include "mask.cuh"

namespace reattn {

constexpr int kWarps = REATTN_WARPS;
constexpr int kKeys = REATTN_KEYS;  // that a block owns at most, a multiple of 16
constexpr int kTiles = 2;  // of 16 keys, that a warp owns at most; of float, a lane's sums are laid out for both
constexpr int kRows = kFloat ? 16 : 32;  // in a stage
constexpr int kStages = kFloat ? 3 : 4;
static_assert(kKeys <= 16 * kTiles * kWarps && (!kFloat || kKeys == 16 * kTiles * kWarps), "a warp owns all its keys");

// Bytes. Rows are odd multiples of 16 apart, so that 8 of them lie in different banks.
constexpr int kMapBytes = kKeys * int(sizeof(Element)), kMapStride = kMapBytes + 16;
constexpr int kOtherBytes = kOutDims * int(sizeof(Element)), kOtherStride = kOtherBytes + 16;
constexpr int kStageBytes = kRows * (kMapStride + kOtherStride);
static_assert(kStages * kStageBytes == REATTN_SHARED_BYTES, "the plan knows how much shared memory a block takes");

// Gradients are written 16 bytes a lane: by way of the stages, behind the maps of the first.
constexpr bool kWholePieces = !kFloat && kHeadDim % kVector == 0;
static_assert(!kWholePieces || kKeys * kOtherStride <= (kStages - 1) * kStageBytes + kRows * kOtherStride,
              "the stages have room for it");

// The row of so many times 4 lanes that have 16 bytes each: of two times 4, the second a row 4 further down, which lies
// in other banks.
REATTN_DEVICE int row_of_4_lanes(int group) { return group / 8 * 8 + group % 2 * 4 + group % 8 / 2; }

// A thread's share of the copies into a stage: some 16 bytes of one row, of which kBytes lie there. What does not exist
// becomes zero; kWhole: all columns do.
template <int kBytes, bool kWhole>
class Copies {
  static constexpr int kLanes = 32 * kWarps / kRows;  // that copy a row: 4 or 8
  static constexpr int kPieces = kBytes / 16;

 public:
  REATTN_DEVICE Copies(int to, const Element* rows, int64_t stride, int columns) {
    const unsigned group = thread() / unsigned(kLanes), lane = thread() % unsigned(kLanes);
    row_ = kLanes == 4 ? row_of_4_lanes(group) : group;
    step_ = kRows * stride * int(sizeof(Element));
    from_ = reinterpret_cast<const char*>(rows + (row_ * stride + lane * kVector)) - step_;
    to_ = kept(to + row_ * (kBytes + 16) + lane * 16);
    columns_ = columns - int(lane) * kVector;
  }

  // Leaves out the first rows, a multiple of kRows.
  REATTN_DEVICE void skip(int rows) { from_ += rows / kRows * step_; }
  // The next rows, of which there are that many. columns_of(row in the stage, the thread's columns of a row): how many
  // of them are to be read.
  template <class Columns>
  REATTN_DEVICE void fetch(Shared<char> stage, int rows, Columns columns_of) {
    from_ += step_;  // not behind the copies, which have to have taken their addresses first
    const Shared<char> to = stage + to_;
    const int columns = row_ < rows ? columns_of(row_, columns_) : 0;
#pragma unroll
    for (int i = 0; i < kPieces; i += kLanes)
      if (kPieces % kLanes == 0 || thread() % kLanes < kPieces - i)
        copy_async(to + 16 * i, from_ + 16 * i, kWhole ? columns > 0 : i * kVector < columns);
  }

 private:
  const char* from_;
  int64_t step_;
  int to_, row_, columns_;
};

// Sums for a warp's keys. With g = lane / 4 and t = lane % 4 a lane has, of tensor cores' products, keys g, g + 8, ...
// and columns 2t, 2t + 1, 2t + 8, ...; of others four keys and four columns at a time.
class Sums {
 public:
  // Where, in a stage, a lane finds what it multiplies: maps of the warp's keys, which begin there in the block's.
  REATTN_DEVICE explicit Sums(int own_key) {
    const int first_map = own_key * int(sizeof(Element)), first_other = kRows * kMapStride;
    map_ = kept(first_map +
                (kFloat ? lane() / 4 * 16 : (lane() % 8 + lane() / 16 * 8) * kMapStride + lane() / 8 % 2 * 16));
    other_ = kept(first_other + (kFloat ? lane() % 4 * 16 : lane() % 16 * kOtherStride + lane() / 16 * 16));
  }

  // Adds the rows of a stage, for all tiles or those of the first keys.
  template <bool kAll>
  REATTN_DEVICE void add(Shared<char> stage, int keys) {
    const Shared<char> map = stage + map_, other = stage + other_;
    if constexpr (kFloat) {
#pragma unroll 2
      for (int row = 0; row < kRows; row++) {
        const float4 four = load<float4>(map + row * kMapStride);
        const float maps[2][2] = {{four.x, four.y}, {four.z, four.w}};
#pragma unroll
        for (int column = 0; column < kOutDims / 8; column += 2) {
          const float4 others = load<float4>(other + (row * kOtherStride + 32 * column));
          const float pairs[2][2] = {{others.x, others.y}, {others.z, others.w}};
#pragma unroll
          for (int i = 0; i < 16; i++) {
            float& sum = sums_[i / 8][column + i / 4 % 2][i % 4];
            sum = fmaf(maps[i / 8][i / 2 % 2], pairs[i / 4 % 2][i % 2], sum);
          }
        }
      }
    } else {
#pragma unroll
      for (int row = 0; row < kRows; row += 16) {
        uint32_t others[kOutDims / 16][4];
#pragma unroll
        for (int i = 0; i < kOutDims / 16; i++)
          load_matrices_transposed(others[i], other + (row * kOtherStride + 32 * i));
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
          if (!kAll && 16 * tile >= keys) break;
          uint32_t maps[4];
          load_matrices_transposed(maps, map + (row * kMapStride + 32 * tile));
#pragma unroll
          for (int i = 0; i < kOutDims / 8; i++)
            multiply_add<Narrow>(sums_[tile][i], maps, {others[i / 2][i % 2 * 2], others[i / 2][i % 2 * 2 + 1]});
        }
      }
    }
  }

  REATTN_DEVICE void scale(float factor) {
#pragma unroll
    for (int i = 0; i < kTiles * kOutDims / 2; i++) sums_[i / (kOutDims / 2)][i / 4 % (kOutDims / 8)][i % 4] *= factor;
  }
  // As elements, for the warp's first keys: with so many keys of the block before them, to where stages have what maps
  // are multiplied by. Rows of as many bytes as there.
  REATTN_DEVICE void store(Shared<char> stage, int own_key, int keys) const {
    const Shared<char> to = stage + (other_ + own_key * kOtherStride);
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
      if (16 * tile >= keys) break;
#pragma unroll
      for (int column = 0; column < kOutDims / 8; column += 2) {
        uint32_t parts[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float* pair = sums_[tile][column + i / 2] + i % 2 * 2;
          parts[i] = pack<Narrow>(pair[0], pair[1]);
        }
        store_matrices(to + (16 * tile * kOtherStride + 16 * column), parts);
      }
    }
  }
  // Calls function(key of the warp, column, two sums), for the warp's first keys.
  template <class Function>
  REATTN_DEVICE void for_each_pair(int keys, Function function) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; i++) {
      const int key = kFloat ? lane() / 4 * 4 + i : 8 * i + lane() / 4;
      if (key >= keys) break;
#pragma unroll
      for (int column = 0; column < kOutDims / 8; column++)
        function(key, kFloat ? column / 2 * 16 + lane() % 4 * 4 + column % 2 * 2 : 8 * column + lane() % 4 * 2,
                 sums_[i / 2][column] + i % 2 * 2);
    }
  }

 private:
  float sums_[kTiles][kOutDims / 8][4] = {};
  int map_, other_;
};

// Of so many tiles the first of a part, of as many parts as there are.
REATTN_DEVICE int first_of_part(int tiles, int part, int parts) {
  return unsigned(tiles) * unsigned(part) / unsigned(parts);
}

// Whether all is hidden from a row, in all heads.
REATTN_DEVICE bool sees_nothing(const Params& p, int sample, int row) {
  bool nothing = true;
  for (int head = 0; head < kHeads; head++)
    nothing = nothing && read<float>(p.lse + ((int64_t(sample) * kHeads + head) * p.query.rows + row)) == -kInfinity;
  return nothing;
}

// A grid of blocks of keys times chunks of columns times gradients (first that of the value, then of the key), by
// samples of the launch times heads. A launch has rows.
__global__ void __launch_bounds__(32 * kWarps, kWarps > 4 ? 2 : 4) products(const __grid_constant__ Params p) {
  constexpr int kChunks = (kHeadDim + kOutDims - 1) / kOutDims;
  const int head = block_y() % unsigned(kHeads), sample = p.first_sample + block_y() / unsigned(kHeads);
  const bool of_key = block_x() % 2u;
  const int first_dim = block_x() / 2u % kChunks * kOutDims, block = block_x() / (2u * kChunks);
  const int keys = round_up(p.key.rows, 16), blocks = (p.key.rows + kKeys - 1) / kKeys;
  // Blocks have tiles of keys, and warps those of their block, as nearly alike many as may be; of float, warps have
  // all.
  const int first_tile = kFloat ? block * kKeys / 16 : first_of_part(keys / 16, block, blocks);
  const int tiles = kFloat ? kKeys / 16 : first_of_part(keys / 16, block + 1, blocks) - first_tile;
  const int first_key = 16 * first_tile, own = 16 * first_of_part(tiles, warp(), kWarps);
  const int own_key = first_key + own;
  const int own_keys = smaller(16 * first_of_part(tiles, warp() + 1, kWarps) - own, p.key.rows - own_key);
  const int rows = smaller(p.rows_of_launch, p.query.rows - p.first_row);

  const Tensor& other = of_key ? p.query : p.grad;
  const Element* maps = static_cast<const Element*>(of_key ? p.grad_scores : p.mixed);
  // Of 16 rows, maps were left of the keys that some of them see.
  const int end = smaller(round_up(KeyRange(p, sample, p.query.rows, 0).end, 16), keys);
  const int end_column = smaller(end - first_key, 16 * tiles);
  Copies<kMapBytes, false> map_copies(0, maps + (int64_t(block_y()) * p.rows_of_launch * keys + first_key), keys,
                                      end_column);
  Copies<kOtherBytes, kDepth % kOutDims == 0> other_copies(
      kRows * kMapStride, head_rows(other, sample, head) + (p.first_row * other.row_stride + first_dim),
      other.row_stride, kDepth - first_dim);
  const Shared<char> memory{uint32_t(kept(shared_memory().address))};
  const int hidden = kMasked && first_key >= end ? rows : kCausal ? first_key - p.first_row : 0;  // first rows
  const int skipped = greater(smaller(hidden, rows), 0) / kRows * kRows;
  if constexpr (kMasked) map_copies.skip(skipped), other_copies.skip(skipped);
  const float* lse = p.lse + (int64_t(sample) * kHeads + head) * p.query.rows;
  int left = rows - skipped;
  const auto fetch = [&](int stage) {
    if (left > 0) {
      const int first_row = p.first_row + rows - left;
      map_copies.fetch(memory + stage, left, [&](int row, int columns) {
        return kCausal ? smaller(columns, columns - end_column - first_key + (first_row + row) / 16 * 16 + 16)
                       : columns;
      });
      // The query of a row that sees nothing may be anything.
      other_copies.fetch(memory + stage, left, [&](int row, int columns) {
        if constexpr (kPreMixed && kMaskByHead)  // it is in the scores of all heads
          return of_key && sees_nothing(p, sample, first_row + row) ? 0 : columns;
        else
          return kMasked && of_key && read<float>(lse + first_row + row) == -kInfinity ? 0 : columns;
      });
    }
    close_copies();
    left -= kRows;
  };

  for (int i = 0; i < kStages - 1; i++) fetch(i * kStageBytes);
  Sums sums(own);
  int stage = 0, released = (kStages - 1) * kStageBytes;
  const auto step = [&] {
    copies_arrived<kStages - 2>();
    sync_block();
    fetch(released);
    if (kCausal && p.first_row + rows - left - (kStages - 1) * kRows <= own_key) {
      // Rows that see none of the warp's keys.
    } else if (own_keys > 16 * (kTiles - 1)) {
      sums.add<true>(memory + stage, own_keys);
    } else if (own_keys > 0) {
      sums.add<false>(memory + stage, own_keys);
    }
    released = stage;
    stage = stage == (kStages - 1) * kStageBytes ? 0 : stage + kStageBytes;
  };
  if constexpr (!kFloat && !kMasked) step();  // with sums that are known to be zero
#pragma unroll 1
  while (left > -(kStages - 1) * kRows) step();

  if (!p.first_rows || !p.last_rows) {
    float* all = (of_key ? p.grad_key_sum : p.grad_value_sum) + (int64_t(block_y()) * p.key.rows + own_key) * kHeadDim;
    sums.for_each_pair(own_keys, [&](int key, int column, float* pair) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (first_dim + column + i >= kHeadDim) continue;
        float* sum = all + (key * kHeadDim + first_dim + column + i);
        if (!p.first_rows) pair[i] += read<float>(sum);
        if (!p.last_rows) write(sum, pair[i]);
      }
    });
    if (!p.last_rows) return;
  }
  if (of_key) sums.scale(p.scale);
  const Tensor& grad = of_key ? p.grad_key : p.grad_value;
  Element* to = head_rows(grad, sample, head) + (own_key * grad.row_stride + first_dim);
  if constexpr (kWholePieces) {
    constexpr int kPieces = kOutDims / kVector, kAtOnce = kWarp / kPieces;  // of a row; rows
    const int group = lane() / kPieces, dim = lane() % kPieces * kVector;
    const int row = kPieces == 4 ? row_of_4_lanes(group) : group;
    const bool inside = group < kAtOnce && (kHeadDim % kOutDims == 0 || first_dim + dim < kHeadDim);
    const int left = inside ? own_keys - row : 0;
    const Shared<char> from{kept((memory + (kRows * kMapStride + (own + row) * kOtherStride + 2 * dim)).address)};
    sync_block();  // all have left the stages
    sums.store(memory, own, own_keys);
    sync_warp();
    to += row * grad.row_stride + dim;
#pragma unroll
    for (int i = 0; i < 16 * kTiles; i += kAtOnce, to += kAtOnce * grad.row_stride)
      if (i < left) write(to, load<uint4>(from + i * kOtherStride));
  } else {
    sums.for_each_pair(own_keys, [&](int key, int column, const float* pair) {
      write_pair(to + (key * grad.row_stride + column), first_dim + column, pair[0], pair[1]);
    });
  }
}

}  // namespace reattn
