// The only place where a product of query and key becomes a probability: scale, maximum, exponential, dropout. What a
// warp does for one head, and writes to a tile of maps.
#pragma once

#include <limits>
#include <type_traits>

#include "stream.cuh"

namespace reattn {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

template <class Function>
REATTN_DEVICE float over_quad(float value, Function function) {
  value = function(value, shuffle_xor(value, 1));
  return function(value, shuffle_xor(value, 2));
}
REATTN_DEVICE float quad_sum(float value) {
  return over_quad(value, [](float a, float b) { return a + b; });
}

// The heads that this warp works on: function(which of them, head). Unrolled, so that each may have registers.
template <int kHeads, class Function>
REATTN_DEVICE void for_each_head(const Params& p, const Place& place, Function function) {
#pragma unroll
  for (int i = 0; i < kHeads; i++) {
    const int head = place.warp + i * p.plan.warps;
    if (head < p.heads) function(i, head);
  }
}

// Offset of (batch, head, row) in a contiguous (batch, heads, seqlen).
REATTN_DEVICE int64_t row_index(const Params& p, int sample, int head, int row) {
  return (int64_t(sample) * p.heads + head) * p.query.rows + row;
}

// A head's maps, gradients or the like in the block's tile.
template <class T>
REATTN_DEVICE Rows<T> head_tile(const Params& p, int offset, int head) {
  return rows_at<T>(at(offset + head * p.plan.head_stride), p.plan.row_stride);
}

// Philox4x32-10 (Salmon et al., 2011), four numbers for four keys: which are kept depends on their position alone.
class Dropout {
 public:
  REATTN_DEVICE explicit Dropout(const Params& p)
      : seed_(read<uint64_t>(p.seed)), below_(p.drop_below), scale_(p.keep_scale) {}

  // prob where it is kept, scaled, else zero.
  REATTN_DEVICE float kept(float prob, int sample, int head, int row, int key) const {
    uint32_t words[4] = {uint32_t(key) / 4, uint32_t(row), uint32_t(head), uint32_t(sample)};
    uint32_t key0 = uint32_t(seed_), key1 = uint32_t(seed_ >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
      const uint32_t a = words[0], b = words[2];
      words[0] = multiply_high(b, 0xCD9E8D57u) ^ words[1] ^ key0;
      words[1] = b * 0xCD9E8D57u;
      words[2] = multiply_high(a, 0xD2511F53u) ^ words[3] ^ key1;
      words[3] = a * 0xD2511F53u;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    const uint32_t word = key & 2 ? (key & 1 ? words[3] : words[2]) : (key & 1 ? words[1] : words[0]);
    return word >= below_ ? prob * scale_ : 0.0f;
  }

 private:
  uint64_t seed_;
  uint32_t below_;
  float scale_;
};

// Drops out a head's tile of centred maps, where that is asked for; before that the maps themselves are kept where
// there is room for them. kOwnKeys: own rows are keys, streamed ones
// queries, else the other way round.
template <class T, bool kOwnKeys>
REATTN_DEVICE void drop_out(const Params& p, const Place& place, int head, int first_streamed) {
  if (!p.seed) return;
  const Dropout dropout(p);
  const Rows<T> maps = head_tile<T>(p, p.plan.maps, head), probs = head_tile<T>(p, p.plan.probs, head);
  for (int own = lane() / 4; own < p.plan.own; own += 8)
    for (int streamed = lane() % 4 * 2; streamed < p.plan.tile; streamed += 8) {
      const float2 pair = Operand<T>::pair(maps.at(own, streamed));
      float prob[2] = {pair.x + p.centre, pair.y + p.centre}, centred[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = kOwnKeys ? first_streamed + streamed + i : place.first_row + own;
        const int key = kOwnKeys ? place.first_row + own : first_streamed + streamed + i;
        const bool inside = row < p.query.rows && key < p.key.rows;
        if (!inside) prob[i] = 0;
        centred[i] = inside ? dropout.kept(prob[i], place.sample, head, row, key) - p.centre : 0.0f;
      }
      if (p.plan.probs) Operand<T>::set_pair(probs.at(own, streamed), prob[0], prob[1]);
      Operand<T>::set_pair(maps.at(own, streamed), centred[0], centred[1]);
    }
}

// Own rows of a lane: lane / 4 and 8 further down of every 16. Calls function(which 16, upper or lower 8, the row in
// the block).
template <int kTiles, class Function>
REATTN_DEVICE void for_each_row(Function function) {
#pragma unroll
  for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
    for (int lower = 0; lower < 2; lower++) function(tile, lower, 16 * tile + 8 * lower + lane() / 4);
}

// The score of a product of query and key as an exponent to base 2. Rounded on its own, wherever it is taken: the
// largest of scores in the millions shall have the exponent zero once the LSE or the maximum is taken away.
REATTN_DEVICE float exponent(const Params& p, float product) { return rounded_product(product, p.scale_log2); }

// The softmax of a head's own rows over the keys, in one sweep; the LSE, to base 2, goes to device memory.
template <class T, int kTiles>
class Softmax {
  using Raw = std::conditional_t<sizeof(T) == 2, Half, T>;

 public:
  // Where a tile holds all keys, it is filled with exp2(score - largest so far), and which maximum that was is noted
  // for every kChunk keys; finish() puts it right. Numbers up to 1: float16 holds them best, whatever T is.
  REATTN_DEVICE void sweep(const Params& p, const Place& place, int head) {
    OwnRows<T, kTiles> own(p, p.query, place, head);
    Stream<T> keys(p, p.key, place, head, 0, p.key.rows, 0, round_up(p.depth, 16));
    const Rows<T> maps = head_tile<T>(p, p.plan.maps, head);
    for_each_row<kTiles>([&](int tile, int lower, int) {
      largest_[tile][lower] = kMinusInfinity;
      sum_[tile][lower] = 0;
    });
#pragma unroll 1
    for (int chunk = 0; chunk < p.key.rows; chunk += kChunk) {
      float scores[kTiles][kChunk / 8][4] = {};
#pragma unroll
      for (int group = 0; group < kChunk / 16; group++)
        if (chunk + 16 * group < p.key.rows) own.multiply(scores, 2 * group, keys);
      if (chunk + kChunk > p.key.rows)
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
          for (int i = 0; i < kChunk / 2; i++)
            if (chunk + i / 4 * 8 + lane() % 4 * 2 + i % 2 >= p.key.rows) scores[tile][i / 4][i % 4] = kMinusInfinity;
      for_each_row<kTiles>([&](int tile, int lower, int row) {
        add_chunk(p, tile, lower, scores[tile]);
        if (!p.plan.resident) return;
        if (lane() % 4 == 0) store(maximum(p, place, row, chunk), largest_[tile][lower]);
#pragma unroll
        for (int column = 0; column < kChunk / 8; column++)
          if (chunk + 8 * column < p.plan.tile)
            Operand<Raw>::set_pair(as<Raw>(maps.at(row, chunk + 8 * column + lane() % 4 * 2)),
                                   scores[tile][column][2 * lower], scores[tile][column][2 * lower + 1]);
      });
    }
    for_each_row<kTiles>([&](int tile, int lower, int row) {
      sum_[tile][lower] = quad_sum(sum_[tile][lower]);
      if (lane() % 4 == 0 && place.first_row + row < p.query.rows)
        write(p.lse + row_index(p, place.sample, head, place.first_row + row),
              largest_[tile][lower] + log2(sum_[tile][lower]));
    });
    sync_warp();
  }

  // The maps themselves, dropped out and centred.
  REATTN_DEVICE void finish(const Params& p, const Place& place, int head) {
    const Rows<T> maps = head_tile<T>(p, p.plan.maps, head);
    for_each_row<kTiles>([&](int tile, int lower, int own) {
      const bool inside = place.first_row + own < p.query.rows;
      const float share = 1 / sum_[tile][lower];
      for (int chunk = 0; chunk < p.plan.tile; chunk += kChunk) {
        const float factor = fast_exp2(load<float>(maximum(p, place, own, chunk)) - largest_[tile][lower]) * share;
        const int end = smaller(chunk + kChunk, p.plan.tile);
        for (int key = chunk + lane() % 4 * 2; key < end; key += 8) {
          const float2 unscaled = Operand<Raw>::pair(as<Raw>(maps.at(own, key)));
          float2 centred = {fmaf(unscaled.x, factor, -p.centre), fmaf(unscaled.y, factor, -p.centre)};
          if (!inside) centred = {0, 0};
          if (end > p.key.rows) {
            if (key >= p.key.rows) centred.x = 0;
            if (key + 1 >= p.key.rows) centred.y = 0;
          }
          Operand<T>::set_pair(maps.at(own, key), centred.x, centred.y);
        }
      }
    });
    drop_out<T, false>(p, place, head, 0);
  }

 private:
  // Takes a row's scores of a chunk into its sum, and makes them exp2(scaled - largest so far).
  REATTN_DEVICE void add_chunk(const Params& p, int tile, int lower, float (&scores)[kChunk / 8][4]) {
    float largest = kMinusInfinity;
#pragma unroll
    for (int i = 0; i < kChunk / 4; i++) largest = larger(largest, scores[i / 2][2 * lower + i % 2]);
    largest = exponent(p, over_quad(largest, [](float a, float b) { return larger(a, b); }));
    largest = larger(largest_[tile][lower], largest);
    // A row of -inf so far would give inf - inf.
    const float shift = largest == kMinusInfinity ? 0.0f : largest;
    float sum = sum_[tile][lower] * fast_exp2(largest_[tile][lower] - shift);
#pragma unroll
    for (int i = 0; i < kChunk / 4; i++) {
      float& score = scores[i / 2][2 * lower + i % 2];
      score = fast_exp2(exponent(p, score) - shift);
      sum += score;
    }
    largest_[tile][lower] = largest;
    sum_[tile][lower] = sum;
  }

  REATTN_DEVICE Shared<float> maximum(const Params& p, const Place& place, int own, int key) const {
    const int chunks = (p.plan.tile + kChunk - 1) / kChunk;
    return as<float>(at(p.plan.maxima)) + ((place.warp * p.plan.own + own) * chunks + key / kChunk);
  }

  float largest_[kTiles][2], sum_[kTiles][2];
};

// Visits a tile of products of own rows with streamed rows, from first_streamed on, of one head: function(which 16,
// upper or lower 8, own row in the block, streamed row in the tile, two products).
template <class T, int kTiles, class Function>
REATTN_DEVICE void for_each_product(const Params& p, const Tensor& own_tensor, const Tensor& streamed_tensor,
                                    const Place& place, int head, int first_streamed, Function function) {
  OwnRows<T, kTiles> own(p, own_tensor, place, head);
  Stream<T> stream(p, streamed_tensor, place, head, first_streamed, p.plan.tile, 0, round_up(p.depth, 16));
#pragma unroll 1
  for (int group = 0; group < p.plan.tile; group += 16) {
    float products[kTiles][2][4] = {};
    own.multiply(products, 0, stream);
    for_each_row<kTiles>([&](int tile, int lower, int row) {
#pragma unroll
      for (int right = 0; right < 2; right++)
        function(tile, lower, row, group + 8 * right + lane() % 4 * 2, products[tile][right][2 * lower],
                 products[tile][right][2 * lower + 1]);
    });
  }
}

// A head's tile of maps from scores whose LSE is known, dropped out and centred. What is
// streamed from outside the sequence is zero, and own rows outside it where that is asked for: they may hold NaN, which
// matters to none but themselves unless all rows are summed.
template <class T, int kTiles, bool kOwnKeys, bool kZeroOwn>
REATTN_DEVICE void fill_maps(const Params& p, const Place& place, int head, int first_streamed) {
  const Rows<T> maps = head_tile<T>(p, p.plan.maps, head);
  const auto lse_of = [&](int row) {
    return row < p.query.rows ? read<float>(p.lse + row_index(p, place.sample, head, row)) : 0.0f;
  };
  float own_lse[kTiles][2];
  if constexpr (!kOwnKeys)
    for_each_row<kTiles>([&](int tile, int lower, int row) { own_lse[tile][lower] = lse_of(place.first_row + row); });
  for_each_product<T, kTiles>(p, kOwnKeys ? p.key : p.query, kOwnKeys ? p.query : p.key, place, head, first_streamed,
                              [&](int tile, int lower, int own, int streamed, float first, float second) {
                                float centred[2] = {first, second};
#pragma unroll
                                for (int i = 0; i < 2; i++) {
                                  const float lse =
                                      kOwnKeys ? lse_of(first_streamed + streamed + i) : own_lse[tile][lower];
                                  centred[i] = fast_exp2(exponent(p, centred[i]) - lse) - p.centre;
                                }
                                const int streamed_rows = kOwnKeys ? p.query.rows : p.key.rows;
                                if (first_streamed + (streamed | 7) >= streamed_rows)
#pragma unroll
                                  for (int i = 0; i < 2; i++)
                                    if (first_streamed + streamed + i >= streamed_rows) centred[i] = 0;
                                if (kZeroOwn && place.first_row + own >= (kOwnKeys ? p.key.rows : p.query.rows))
                                  centred[0] = centred[1] = 0;
                                Operand<T>::set_pair(maps.at(own, streamed), centred[0], centred[1]);
                              });
  drop_out<T, kOwnKeys>(p, place, head, first_streamed);
}

}  // namespace reattn
