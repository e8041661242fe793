// How a sweep is cut, where things lie in shared memory, and what a warp does with 16 rows at a time.
//
// A block owns some rows of one sequence, all heads of them, and streams the keys past them. The maps of all heads lie
// in shared memory, [head][own row][key]. A warp works by head, on products with query, key and value, or by row, on
// all heads at 16 positions: then positions are the rows of what it holds, and heads the columns.
#pragma once

#include "mask.cuh"

namespace reattn {

constexpr bool kDropout = REATTN_DROPOUT;
constexpr bool kLayer = Norm(REATTN_NORM) == Norm::kLayer, kBatch = Norm(REATTN_NORM) == Norm::kBatch;
constexpr bool kStatistics = kBatch && REATTN_TRAINING;

// How a block cuts the problem.
constexpr int kRows = REATTN_ROWS;           // that a block owns, a multiple of 8
constexpr int kKeys = REATTN_KEYS;           // whose maps lie in shared memory at a time, a multiple of 16
constexpr bool kResident = REATTN_RESIDENT;  // these are all there are
constexpr int kWarps = REATTN_WARPS;         // a warp works on heads warp, warp + kWarps, ...

constexpr int kTiles = (kRows + 15) / 16;
constexpr bool kHalfTile = kRows % 16 != 0;  // the last tile has 8 rows, the upper ones
constexpr int kTurns = (kHeads + kWarps - 1) / kWarps;
constexpr int kHeadSteps = (kHeadBlocks + 1) / 2;  // of 16 heads, in a product over heads

// Bytes. Rows are odd multiples of 16 apart, so that 8 of them, and 8 heads, lie in different banks.
constexpr int kRowStride = kKeys * int(sizeof(Element)) + 16;
constexpr int kHeadStride = kRows * kRowStride + 16;
constexpr int kMapBytes = round_up(kHeads * kHeadStride, 128);
constexpr int kStageStride = kDims * int(sizeof(Element)) + 16;
constexpr int kStageBytes = 16 * kStageStride;

// Where of 8x8 matrices, four in a row, load_matrices and store_matrices want a lane's row: [2 x 8 rows][2 x 8
// columns], the rows first (own rows and keys) or the columns first (heads and positions, transposed).
REATTN_DEVICE int lane_row() { return lane() % 16; }
REATTN_DEVICE int lane_column() { return lane() / 16 * 8; }

// Offset of (batch, head, row) in a contiguous (batch, heads, seqlen).
REATTN_DEVICE int64_t row_index(const Params& p, int sample, int head, int row) {
  return (int64_t(sample) * kHeads + head) * p.query.rows + row;
}

REATTN_DEVICE float quad_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}
REATTN_DEVICE float quad_largest(float value) {
  value = larger(value, shuffle_xor(value, 1));
  return larger(value, shuffle_xor(value, 2));
}

// Own rows of a lane: lane / 4 and 8 further down of every 16, as far as there are so many. Calls function(which 16,
// upper or lower 8, the row in the block).
template <int kCount, class Function>
REATTN_DEVICE void for_each_row(Function function) {
#pragma unroll
  for (int tile = 0; tile < kCount; tile++)
#pragma unroll
    for (int lower = 0; lower < 2; lower++)
      if (16 * tile + 8 * lower < kRows) function(tile, lower, 16 * tile + 8 * lower + lane() / 4);
}

// A tile of 16 x 16, of two 8 columns what mma.m16n8k16 gives a lane: as 16-bit elements, the first operand of a
// product.
template <class T>
struct Packed {
  uint32_t part[4];
  REATTN_DEVICE Packed() {}
  REATTN_DEVICE Packed(const float (&left)[4], const float (&right)[4])
      : part{pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
             pack<T>(right[2], right[3])} {}
  REATTN_DEVICE explicit Packed(const float (&tile)[2][4]) : Packed(tile[0], tile[1]) {}
};
// Where a lane's part of a head's own rows lies, of 16 keys at a time: 16-bit elements.
class OwnTiles {
 public:
  REATTN_DEVICE explicit OwnTiles(Shared<char> maps)
      : tiles_(maps + (lane_row() * kRowStride + lane_column() * 2)),
        half_(maps + ((kRows - 8 + lane() % 8) * kRowStride + lane() / 8 % 2 * 16)) {}
  REATTN_DEVICE void advance(int keys) { tiles_ = tiles_ + 2 * keys, half_ = half_ + 2 * keys; }

  template <class T>
  REATTN_DEVICE void store(int tile, const Packed<T>& packed) const {
    if (kHalfTile && tile == kTiles - 1)
      store_two_matrices(half_, {packed.part[0], packed.part[2]});
    else
      store_matrices(tiles_ + 16 * tile * kRowStride, packed.part);
  }
  // A tile of 16 rows, and the rows of the one that has 8, of keys further on.
  REATTN_DEVICE void load(uint32_t (&parts)[4], int tile, int key) const {
    load_matrices(parts, tiles_ + (16 * tile * kRowStride + 2 * key));
  }
  REATTN_DEVICE void load_half(uint32_t (&parts)[2], int key) const { load_two_matrices(parts, half_ + 2 * key); }

 private:
  Shared<char> tiles_, half_;
};
REATTN_DEVICE void store_tile(Shared<float> rows, int row_stride_bytes, const float (&tile)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    store(as<float>(as<char>(rows) + (i % 2 * 8 + lane() / 4) * row_stride_bytes) + (i / 2 * 8 + lane() % 4 * 2),
          float2{tile[i / 2][i % 2 * 2], tile[i / 2][i % 2 * 2 + 1]});
}

// Distances of rows in elements, where they are known when the kernel is compiled, or 0. Out: of the output or its
// gradient.
constexpr int kQueryStride = REATTN_QUERY_ROW_STRIDE, kKeyStride = REATTN_KEY_ROW_STRIDE;
constexpr int kValueStride = REATTN_VALUE_ROW_STRIDE, kOutStride = REATTN_OUT_ROW_STRIDE;
template <int kStride>
REATTN_DEVICE int64_t row_stride(const Tensor& tensor) {
  return kStride ? kStride : tensor.row_stride;
}

// Rows of one head on their way through the warp's two stages in shared memory, 16 at a time, the last filled up with
// zeros: columns first_dim to first_dim + kColumns - 1.
template <int kColumns, int kStride = 0>
class Stream {
  static constexpr int kPieces = kColumns * int(sizeof(Element)) / 16;  // of 16 bytes, in a row
  static constexpr int kRowsAtOnce = kPieces > 16 ? 1 : kPieces > 8 ? 2 : kPieces > 4 ? 4 : kPieces > 2 ? 8 : 16;
  static constexpr int kCopies = 16 / kRowsAtOnce;  // of a lane
  static constexpr bool kAllLanes = kPieces * kRowsAtOnce == kWarp;
  static constexpr bool kFilled = kDepth == kDims && kDims % kColumns == 0;  // there is something in every column

 public:
  // Rows first_row to last_row - 1, or to the tensor's last.
  REATTN_DEVICE Stream(Shared<char> stages, const Tensor& tensor, int sample, int head, int first_row, int last_row,
                       int first_dim)
      : stages_(stages), left_(smaller(last_row, tensor.rows) - first_row) {
    step_ = row_stride<kStride>(tensor) * int(sizeof(Element));
    // Neighbouring rows: one address and offsets, if rows are not too long for them.
    // Of two times 4 lanes, the second copy a row 4 further down, which lies in other banks.
    const int group = kPieces == 4 ? lane() / 16 * 4 + lane() / 4 % 2 * 2 + lane() / 8 % 2 : lane() / kPieces;
    const int row = group * kCopies, dim = first_dim + lane() % kPieces * kVector;
    active_ = kAllLanes || row < 16;
    row_ = row < 16 && dim < kDepth ? row : 1 << 30;
    from_ = reinterpret_cast<const char*>(head_rows(tensor, sample, head) + dim) + (first_row + row) * step_;
    to_ = {kept(stages.address + (row * kStageStride + lane() % kPieces * 16))};
    copies_arrived<0>();  // of the stream before
    sync_warp();
    fetch();
  }
  // The next 16 rows; those before them are gone. kWhole: 16 more come behind them.
  template <bool kWhole = false>
  REATTN_DEVICE Shared<char> next() {
    copies_arrived<0>();
    sync_warp();  // they are here for all lanes, and all have left those before
    const Shared<char> stage = stages_ + slot_;
    slot_ = kStageBytes - slot_;
    fetch<kWhole>();
    return stage;
  }

 private:
  template <bool kWhole = false>
  REATTN_DEVICE void fetch() {
    if (kFilled && kAllLanes && (kWhole || left_ >= 16)) {
#pragma unroll
      for (int i = 0; i < kCopies; i++) copy_async(to_ + (slot_ + i * kStageStride), from_ + i * step_);
    } else if (active_ && (kWhole || left_ > 0)) {
#pragma unroll
      for (int i = 0; i < kCopies; i++)
        copy_async(to_ + (slot_ + i * kStageStride), from_ + i * step_, row_ < left_ - i);
    }
    close_copies();
    from_ += 16 * step_;
    left_ -= 16;
  }

  Shared<char> stages_, to_;
  const char* from_;
  int64_t step_;
  int left_, row_, slot_ = 0;  // slot: of what is on its way
  bool active_;
};

// Rows of 16-bit elements for products over head_dim, straight from device memory to registers: in which order columns
// are summed over is free, so that a lane has 16 neighbouring bytes (8 of the last columns, if they are 16) for two
// steps of 16 columns (one), of columns in bytes 64 c + 16 t and on. Calls function(step, which pair of columns, two
// columns).
template <class Function>
REATTN_DEVICE void read_columns(const char* row, bool inside, Function function) {
  constexpr int kWide = kDims / 32;
#pragma unroll
  for (int i = 0; i < kWide; i++) {
    const int byte = 64 * i + lane() % 4 * 16;
    const uint4 four = inside && (64 * (i + 1) <= 2 * kDepth || byte < 2 * kDepth) ? read<uint4>(row + byte) : uint4{};
    function(2 * i, 0, four.x), function(2 * i, 1, four.y), function(2 * i + 1, 0, four.z),
        function(2 * i + 1, 1, four.w);
  }
  if constexpr (kDims % 32 > 0) {
    const int byte = 64 * kWide + lane() % 4 * 8;
    const uint2 two = inside && byte < 2 * kDepth ? read<uint2>(row + byte) : uint2{};
    function(2 * kWide, 0, two.x), function(2 * kWide, 1, two.y);
  }
}

// Rows of one head as second operands of such products, 16 at a time, the last filled up with zeros. As many times 16
// are on their way as there are slots, which take turns.
template <int kStride = 0, int kSlots = 1>
class DirectRows {
 public:
  struct Operands {
    uint32_t part[2][kDims / 16][2];  // of the upper and lower 8 rows
  };
  // As a Stream, whose stages it has no use for, of all columns.
  REATTN_DEVICE DirectRows(Shared<char>, const Tensor& tensor, int sample, int head, int first_row, int last_row, int)
      : step_(row_stride<kStride>(tensor) * int(sizeof(Element))),
        left_(smaller(last_row, tensor.rows) - first_row - lane() / 4) {
    from_ = reinterpret_cast<const char*>(head_rows(tensor, sample, head)) + (first_row + lane() / 4) * step_;
#pragma unroll
    for (Operands& coming : coming_) fetch<false>(coming);
  }
  // The next 16 rows. kWhole: 16 more come behind them.
  template <bool kWhole = false>
  REATTN_DEVICE Operands next() {
    static_assert(kSlots == 1, "the next are in the only slot");
    const Operands here = coming_[0];
    fetch<kWhole>(coming_[0]);
    return here;
  }
  // The 16 rows in a slot, and others in their place once there are products with them. kWhole: all of these exist.
  REATTN_DEVICE const Operands& in(int slot) const { return coming_[slot]; }
  template <bool kWhole>
  REATTN_DEVICE void replace(int slot, const float (&products)[kTiles][2][4]) {
#pragma unroll
    for (int i = 0; i < kTiles * 2; i++) from_ = after(from_, products[i / 2][i % 2][0]);
    fetch<kWhole>(coming_[slot]);
  }

 private:
  template <bool kWhole>
  REATTN_DEVICE void fetch(Operands& coming) {
#pragma unroll
    for (int half = 0; half < 2; half++)
      read_columns(from_ + 8 * half * step_, kWhole || left_ > 8 * half,
                   [&](int step, int right, uint32_t both) { coming.part[half][step][right] = both; });
    from_ += 16 * step_;
    left_ -= 16;
  }

  const char* from_;
  int64_t step_;
  int left_;
  Operands coming_[kSlots];
};

// Rows of one head as second operands of products over rows, 16 at a time, the last filled up with zeros: for head_dim
// up to 64. Which columns are side by side in a product is free: its column n of the j-th 8 is column n * kColumns + j,
// so that a lane has neighbours. Two times 16 are on their way, in slots that take turns.
template <int kStride = 0>
class DirectColumns {
 public:
  static constexpr int kColumns = kOutDims / 8;  // of a lane
  using Operands = uint32_t[kColumns][2];

  // As a Stream, whose stages it has no use for, of all columns.
  REATTN_DEVICE DirectColumns(Shared<char>, const Tensor& tensor, int sample, int head, int first_row, int last_row,
                              int)
      : step_(row_stride<kStride>(tensor) * int(sizeof(Element))),
        left_(smaller(last_row, tensor.rows) - first_row - lane() % 4 * 2) {
    from_ = reinterpret_cast<const char*>(head_rows(tensor, sample, head) + lane() / 4 * kColumns) +
            (first_row + lane() % 4 * 2) * step_;
    fetch<false>(coming_[0]);
    fetch<false>(coming_[1]);
  }
  // The next 16 rows, from slot 0 first. kWhole: of those that then take the slot, all are there.
  template <bool kWhole>
  REATTN_DEVICE void next(Operands& operands, int slot) {
#pragma unroll
    for (int i = 0; i < kColumns; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t upper = coming_[slot][2 * half][i / 2], lower = coming_[slot][2 * half + 1][i / 2];
        operands[i][half] = i % 2 ? seconds(upper, lower) : firsts(upper, lower);
      }
    fetch<kWhole>(coming_[slot]);
  }

 private:
  template <bool kWhole>
  REATTN_DEVICE void fetch(uint32_t (&coming)[4][kColumns / 2]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = i / 2 * 8 + i % 2;
      const char* from = from_ + row * step_;
      const bool inside = kWhole || left_ > row;
      const int room = kDepth == kOutDims ? kColumns : kDepth - lane() / 4 * kColumns;
      uint32_t (&words)[kColumns / 2] = coming[i];
      if constexpr (kColumns == 8) {
        const uint4 four = inside && room > 0 ? read<uint4>(from) : uint4{};
        words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
      } else if constexpr (kColumns == 4) {
        const uint2 two = inside && room > 0 ? read<uint2>(from) : uint2{};
        words[0] = two.x, words[1] = two.y;
      } else {
#pragma unroll
        for (int word = 0; word < kColumns / 2; word++)
          words[word] = inside && room > 2 * word ? read<uint32_t>(from + 4 * word) : 0;
      }
    }
    from_ += 16 * step_;
    left_ -= 16;
  }

  const char* from_;
  int64_t step_;
  int left_;
  uint32_t coming_[2][4][kColumns / 2];
};

// Makes zero of what is not finite of the columns in a stage.
template <int kColumns>
REATTN_DEVICE void make_finite(Shared<char> stage) {
  constexpr int kWords = kColumns * int(sizeof(Element)) / 4;  // of a row
  for (int i = lane(); i < 16 * kWords; i += kWarp) {
    const Shared<uint32_t> word = as<uint32_t>(stage + i / kWords * kStageStride) + i % kWords;
    store(word, finite_or_zero(load<uint32_t>(word)));
  }
  sync_warp();
}

// Where there are registers for it, and head_dim is in one piece.
constexpr bool kDirect = !kFloat && kDims <= 64 && kWarps <= 12;

// Own rows of one head as the first operand of products over head_dim: 16-bit elements in registers. kForDirect:
// for products with DirectRows, else with rows in a stage.
template <int kStride = 0, bool kForDirect = false>
class OwnRows {
 public:
  REATTN_DEVICE OwnRows(const Tensor& tensor, int sample, int head, int first_row) {
    const char* from = reinterpret_cast<const char*>(head_rows(tensor, sample, head) + lane() % 4 * 2);
    offset_ = kept((lane() % 8 + lane() / 16 * 8) * kStageStride + lane() / 8 % 2 * 16);
    if constexpr (kHalfTile)
      for (auto& step : held_[kTiles - 1]) step[1] = step[3] = 0;
    for_each_row<kTiles>([&](int tile, int lower, int row) {
      // Rows outside get what the last one has, and are not stored.
      const char* own =
          from + smaller(first_row + row, tensor.rows - 1) * (row_stride<kStride>(tensor) * int(sizeof(Element)));
      rows_[tile][lower] = reinterpret_cast<const Element*>(own) - lane() % 4 * 2;
      if constexpr (kForDirect) {
        // Kept where products take them: else each of these would move them there again.
        read_columns(own - lane() % 4 * 4, true,
                     [&](int step, int right, uint32_t both) { held_[tile][step][2 * right + lower] = kept(both); });
      } else if constexpr (!kFloat) {
#pragma unroll
        for (int step = 0; step < kDims / 16; step++)
#pragma unroll
          for (int right = 0; right < 2; right++) {
            const int column = 16 * step + 8 * right;
            held_[tile][step][2 * right + lower] =
                column + 8 <= kDepth || column + lane() % 4 * 2 < kDepth ? read<uint32_t>(own + 2 * column) : 0;
          }
      }
    });
  }

  // Products with the 16 rows in a stage: of which 16, of the left or right 8, as mma.m16n8k16 lays them out.
  REATTN_DEVICE void multiply(float (&products)[kTiles][2][4], Shared<char> stage) const {
#pragma unroll
    for (int i = 0; i < kTiles * 8; i++) products[i / 8][i / 4 % 2][i % 4] = 0;
    if constexpr (kFloat) {
#pragma unroll 1
      for (int dim = 0; dim < kDepth; dim += 4) {
        float4 other[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
          other[i] = load<float4>(as<float>(stage + (i / 2 * 8 + lane() % 4 * 2 + i % 2) * kStageStride) + dim);
        for_each_row<kTiles>([&](int tile, int lower, int) {
          const float4 own = read<float4>(rows_[tile][lower] + dim);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float& sum = products[tile][i / 2][2 * lower + i % 2];
            sum =
                fmaf(own.w, other[i].w, fmaf(own.z, other[i].z, fmaf(own.y, other[i].y, fmaf(own.x, other[i].x, sum))));
          }
        });
      }
    } else {
      const Shared<char> row = stage + offset_;
#pragma unroll
      for (int step = 0; step < kDims / 16; step++) {
        uint32_t other[4];
        load_matrices(other, row + 32 * step);
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
          multiply_add<Narrow>(products[tile][0], held_[tile][step], {other[0], other[1]});
          multiply_add<Narrow>(products[tile][1], held_[tile][step], {other[2], other[3]});
        }
      }
    }
  }

  template <class Operands>
  REATTN_DEVICE void multiply(float (&products)[kTiles][2][4], const Operands& other) const {
#pragma unroll
    for (int i = 0; i < kTiles * 8; i++) products[i / 8][i / 4 % 2][i % 4] = 0;
#pragma unroll
    for (int step = 0; step < kDims / 16; step++)
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          multiply_add<Narrow>(products[tile][half], held_[tile][step], other.part[half][step]);
  }

 private:
  int offset_;  // of the row that a lane gives the address of, in a stage
  const Element* rows_[kTiles][2];
  uint32_t held_[kFloat ? 1 : kTiles][kDims / 16][4];
};

constexpr int kMostAskedFor = 1024;  // keys, by a block
// Has a warp ask for the keys and values of its heads, before they are waited for: the blocks of a sample share them
// out, and take them at about the same time.
REATTN_DEVICE void prefetch_heads(const Params& p, int sample, int warp, int block, int blocks) {
  const int share = (p.key.rows + blocks - 1) / blocks;
  if (share > kMostAskedFor) return;  // the cache would forget them
#pragma unroll 1
  for (int head = warp; head < kHeads; head += kWarps)
#pragma unroll 1
    for (int key = block * share + lane(); key < smaller((block + 1) * share, p.key.rows); key += kWarp)
#pragma unroll
      for (int dim = 0; dim < kHeadDim; dim += 128 / int(sizeof(Element))) {
        prefetch(head_rows(p.key, sample, head) + (key * row_stride<kKeyStride>(p.key) + dim));
        prefetch(head_rows(p.value, sample, head) + (key * row_stride<kValueStride>(p.value) + dim));
      }
}

}  // namespace reattn
