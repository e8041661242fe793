// What a warp does for one head: scores, softmax, dropout; maps and the gradients of maps written to a tile.
#pragma once

#include <limits>

#include "stream.cuh"

namespace reattn {

// Which rows a block owns, of which sample, and which columns of the output.
struct Place {
  int sample, first_row, first_dim;

  REATTN_DEVICE Place(const Params& p, int padded_heads)
      : sample(block_x() / p.plan.blocks),
        first_row(block_x() % p.plan.blocks * p.plan.own),
        first_dim(block_y() * out_dims(padded_heads)) {}
};

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

template <class Function>
REATTN_DEVICE float over_quad(float value, Function function) {
  value = function(value, shuffle_xor(value, 1));
  return function(value, shuffle_xor(value, 2));
}
REATTN_DEVICE float quad_sum(float value) {
  return over_quad(value, [](float a, float b) { return a + b; });
}
REATTN_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 1; mask < kWarp; mask *= 2) value += shuffle_xor(value, mask);
  return value;
}

// The heads that this warp works on: function(which of them, head).
template <int kHeads, class Function>
REATTN_DEVICE void for_each_head(const Params& p, Function function) {
#pragma unroll
  for (int i = 0; i < kHeads; i++) {
    const int head = warp() + i * warps();
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
      : on(p.seed != nullptr), seed_(on ? read<uint64_t>(p.seed) : 0), below_(p.drop_below), scale_(p.keep_scale) {}

  // prob where it is kept, scaled, else zero.
  REATTN_DEVICE float kept(float prob, int sample, int head, int row, int key) const {
    if (!on) return prob;
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

  const bool on;

 private:
  uint64_t seed_;
  uint32_t below_;
  float scale_;
};

// The softmax of a head's own rows over the keys, in one sweep. Rows of a lane: (tile, upper or lower).
template <class T, int kTiles>
struct Softmax {
  float lse[kTiles][2];  // to base 2

  // Keeps exp2(score - largest so far) of every key in the tile of maps, if there is one to be filled, and which
  // maximum that was, for every kChunk keys; finish() puts it right.
  template <bool kFill>
  REATTN_DEVICE void sweep(const Params& p, const Place& place, int head) {
    OwnRows<T, kTiles> own(p, p.query, place.sample, head, place.first_row);
    Stream<T> keys(p, p.key, place.sample, head, 0, p.key.rows, 0, round_up(p.depth, 16));
    const Rows<T> maps = head_tile<T>(p, p.plan.maps, head);
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
      for (int lower = 0; lower < 2; lower++) {
        largest_[tile][lower] = kMinusInfinity;
        sum_[tile][lower] = 0;
      }
    for (int chunk = 0; chunk < p.key.rows; chunk += kChunk) {
      float scores[kTiles][kChunk / 8][4] = {};
#pragma unroll
      for (int group = 0; group < kChunk; group += 16)
        if (chunk + group < p.key.rows) {
          float products[kTiles][2][4] = {};
          own.multiply(products, keys);
#pragma unroll
          for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
            for (int i = 0; i < 8; i++) scores[tile][group / 8 + i / 4][i % 4] = products[tile][i / 4][i % 4];
        }
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
        for (int lower = 0; lower < 2; lower++) {
          add_chunk(p, chunk, tile, lower, scores[tile]);
          if constexpr (kFill) {
            if (lane() % 4 == 0) store(maximum(p, tile, lower, chunk), largest_[tile][lower]);
#pragma unroll
            for (int column = 0; column < kChunk / 8; column++) {
              const int key = chunk + 8 * column + lane() % 4 * 2;
              if (chunk + 8 * column < p.plan.tile)
                Operand<T>::set_pair(maps.at(16 * tile + 8 * lower + lane() / 4, key),
                                     scores[tile][column][2 * lower], scores[tile][column][2 * lower + 1]);
            }
          }
        }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
      for (int lower = 0; lower < 2; lower++) {
        sum_[tile][lower] = quad_sum(sum_[tile][lower]);
        lse[tile][lower] = largest_[tile][lower] + log2(sum_[tile][lower]);
        const int row = place.first_row + 16 * tile + 8 * lower + lane() / 4;
        if (lane() % 4 == 0 && row < p.query.rows && place.first_dim == 0)
          write(p.lse + row_index(p, place.sample, head, row), lse[tile][lower]);
      }
  }

  // After sweep<true>: the maps themselves, dropped out and centred; their sum, less that of centre.
  REATTN_DEVICE float finish(const Params& p, const Place& place, int head, const Dropout& dropout) {
    const Rows<T> maps = head_tile<T>(p, p.plan.maps, head);
    float total = 0;
    sync_warp();
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
      for (int lower = 0; lower < 2; lower++) {
        const int own = 16 * tile + 8 * lower + lane() / 4, row = place.first_row + own;
        const float share = 1 / sum_[tile][lower];
        for (int chunk = 0; chunk < p.plan.tile; chunk += kChunk) {
          const float largest = load<float>(maximum(p, tile, lower, chunk));
          const float factor = fast_exp2(largest - largest_[tile][lower]) * share;
#pragma unroll
          for (int column = 0; column < kChunk / 8; column++) {
            const int key = chunk + 8 * column + lane() % 4 * 2;
            if (chunk + 8 * column >= p.plan.tile) continue;
            const float2 unscaled = Operand<T>::pair(maps.at(own, key));
            float2 centred;
            centred.x = dropout.kept(unscaled.x * factor, place.sample, head, row, key) - p.centre;
            centred.y = dropout.kept(unscaled.y * factor, place.sample, head, row, key + 1) - p.centre;
            if (row >= p.query.rows || key >= p.key.rows) centred.x = 0;
            if (row >= p.query.rows || key + 1 >= p.key.rows) centred.y = 0;
            Operand<T>::set_pair(maps.at(own, key), centred.x, centred.y);
            total += centred.x + centred.y;
          }
        }
      }
    return total;
  }

  REATTN_DEVICE void read_lse(const Params& p, const Place& place, int head) {
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
      for (int lower = 0; lower < 2; lower++) {
        const int row = place.first_row + 16 * tile + 8 * lower + lane() / 4;
        lse[tile][lower] = row < p.query.rows ? read<float>(p.lse + row_index(p, place.sample, head, row)) : 0.0f;
      }
  }

 private:
  // Takes a row's scores of a chunk into its sum, and makes them exp2(scaled - largest so far).
  REATTN_DEVICE void add_chunk(const Params& p, int chunk, int tile, int lower, float (&scores)[kChunk / 8][4]) {
    float largest = kMinusInfinity;
#pragma unroll
    for (int i = 0; i < kChunk / 4; i++) {
      float& score = scores[i / 2][2 * lower + i % 2];
      const int key = chunk + i / 2 * 8 + lane() % 4 * 2 + i % 2;
      score = key < p.key.rows ? rounded_product(score, p.scale_log2) : kMinusInfinity;
      largest = larger(largest, score);
    }
    largest = larger(largest_[tile][lower], over_quad(largest, [](float a, float b) { return larger(a, b); }));
    // A row of -inf so far would give inf - inf.
    const float shift = largest == kMinusInfinity ? 0.0f : largest;
    float sum = sum_[tile][lower] * fast_exp2(largest_[tile][lower] - shift);
#pragma unroll
    for (int i = 0; i < kChunk / 4; i++) {
      float& score = scores[i / 2][2 * lower + i % 2];
      score = fast_exp2(score - shift);
      sum += score;
    }
    largest_[tile][lower] = largest;
    sum_[tile][lower] = sum;
  }

  REATTN_DEVICE Shared<float> maximum(const Params& p, int tile, int lower, int chunk) const {
    const int chunks = (p.plan.tile + kChunk - 1) / kChunk;
    const int row = warp() * p.plan.own + 16 * tile + 8 * lower + lane() / 4;
    return as<float>(at(p.plan.maxima)) + (row * chunks + chunk / kChunk);
  }

  float largest_[kTiles][2], sum_[kTiles][2];
};

// Visits a tile of products of own rows (queries, or keys) with streamed rows, from first_streamed on, of one head:
// function(own row in the tile, streamed row in the tile, two products).
template <class T, int kTiles, class Function>
REATTN_DEVICE void for_each_product(const Params& p, const Tensor& own_tensor, const Tensor& streamed_tensor,
                                    const Place& place, int head, int first_streamed, Function function) {
  OwnRows<T, kTiles> own(p, own_tensor, place.sample, head, place.first_row);
  Stream<T> stream(p, streamed_tensor, place.sample, head, first_streamed, p.plan.tile, 0, round_up(p.depth, 16));
  for (int group = 0; group < p.plan.tile; group += 16) {
    float products[kTiles][2][4] = {};
    own.multiply(products, stream);
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
      for (int lower = 0; lower < 2; lower++)
#pragma unroll
        for (int right = 0; right < 2; right++)
          function(tile, lower, group + 8 * right + lane() % 4 * 2, products[tile][right][2 * lower],
                   products[tile][right][2 * lower + 1]);
  }
}

// A tile of maps from scores whose LSE is known, dropped out and centred; kOwnKeys: own rows are keys, streamed ones
// queries, else the other way round. Where dropout is on and there is room for them, the maps before it as well.
// Returns this lane's sum of what is centred.
template <class T, int kTiles, bool kOwnKeys>
REATTN_DEVICE float fill_maps(const Params& p, const Place& place, int head, int first_streamed,
                              const Softmax<T, kTiles>& softmax, const Dropout& dropout) {
  const Rows<T> maps = head_tile<T>(p, p.plan.maps, head), probs = head_tile<T>(p, p.plan.probs, head);
  float total = 0;
  for_each_product<T, kTiles>(
      p, kOwnKeys ? p.key : p.query, kOwnKeys ? p.query : p.key, place, head, first_streamed,
      [&](int tile, int lower, int streamed, float first, float second) {
        const int own = 16 * tile + 8 * lower + lane() / 4;
        float prob[2], centred[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int row = kOwnKeys ? first_streamed + streamed + i : place.first_row + own;
          const int key = kOwnKeys ? place.first_row + own : first_streamed + streamed + i;
          const bool inside = row < p.query.rows && key < p.key.rows;
          float lse = softmax.lse[tile][lower];
          if (kOwnKeys) lse = inside ? read<float>(p.lse + row_index(p, place.sample, head, row)) : 0.0f;
          prob[i] = inside ? fast_exp2(rounded_product(i ? second : first, p.scale_log2) - lse) : 0.0f;
          centred[i] = inside ? dropout.kept(prob[i], place.sample, head, row, key) - p.centre : 0.0f;
        }
        Operand<T>::set_pair(maps.at(own, streamed), centred[0], centred[1]);
        if (p.plan.probs) Operand<T>::set_pair(probs.at(own, streamed), prob[0], prob[1]);
        total += centred[0] + centred[1];
      });
  return total;
}

// A tile of the normalised maps' gradients, grad value^T, of one head.
template <class T, bool kOwnKeys>
REATTN_DEVICE void fill_gradients(const Params& p, const Place& place, int head, int first_streamed) {
  const Rows<T> grads = head_tile<T>(p, p.plan.grads, head);
  for_each_product<T, 1>(p, kOwnKeys ? p.value : p.grad, kOwnKeys ? p.grad : p.value, place, head, first_streamed,
                         [&](int, int lower, int streamed, float first, float second) {
                           Operand<T>::set_pair(grads.at(8 * lower + lane() / 4, streamed), first, second);
                         });
}

}  // namespace reattn
