// The only place where a product of query and key becomes a probability: scale, mask, maximum, exponential, dropout.
#pragma once

#include "tiles.cuh"

namespace reattn {

// Philox4x32-10 (Salmon et al., 2011), four numbers for four keys: which are kept depends on their position alone.
class Dropout {
 public:
  REATTN_DEVICE Dropout(const Params& p, int sample, int head)
      : seed_(kDropout ? read<uint64_t>(p.seed) : 0), below_(p.drop_below), sample_(sample), head_(head) {}

  // Makes zero of what is dropped of 16 rows and 8 keys, (row or row + 8, key or key + 1) in a lane's four numbers, and
  // zero or not what is kept: key is even.
  REATTN_DEVICE void drop(float (&maps)[4], int row, int key) const {
    // Of two neighbours, who hold four keys of two rows, each draws for one row.
    const bool odd = lane() & 1;
    const uint32_t drawn = kept_of(odd ? row + 8 : row, key / 4, head_);
    const uint32_t other = shuffle_xor(drawn, 1);
    const uint32_t upper = (odd ? other : drawn) >> key % 4, lower = (odd ? drawn : other) >> key % 4;
    if (!(upper & 1)) maps[0] = 0;
    if (!(upper & 2)) maps[1] = 0;
    if (!(lower & 1)) maps[2] = 0;
    if (!(lower & 2)) maps[3] = 0;
  }

  // What of one row and 16 keys is kept, of 8 heads from the first on: a bit for each of a lane's four numbers, which
  // are laid out as in heads.cuh.
  REATTN_DEVICE uint32_t kept_of_heads(int first_head, int row, int key) const {
    // Of four lanes that have neighbouring keys of the same heads, each draws for one of the numbers.
    const int number = lane() / 4 % 4, neighbours = lane() / 16 * 16 + lane() % 4;
    const int first_key = key + number / 2 * 8 + lane() / 16 * 4;
    const uint32_t drawn = kept_of(row, first_key / 4, first_head + lane() % 4 * 2 + number % 2);
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) kept |= (shuffle(drawn, neighbours + 4 * i) >> lane() / 4 % 4 & 1) << i;
    return kept;
  }

 private:
  // A bit for each of four keys.
  REATTN_DEVICE uint32_t kept_of(int row, int four_keys, int head) const {
    uint32_t words[4] = {uint32_t(four_keys), uint32_t(row), uint32_t(head), uint32_t(sample_)};
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
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) kept |= uint32_t(words[i] >= below_) << i;
    return kept;
  }

  uint64_t seed_;
  uint32_t below_;
  int sample_, head_;
};

// What mixing over heads takes of products of query and key, in both directions.
REATTN_DEVICE void scale_products(float (&products)[2][4], const Params& p) {
#pragma unroll
  for (int i = 0; i < 8; i++) products[i / 4][i % 4] = rounded_product(products[i / 4][i % 4], p.scale);
}

// The softmax of a head's own rows over the keys, not yet divided by its sum: exp2(score - reference), of a reference
// that is larger than most scores of the row. The first keys say what that is; where later scores are larger by far, so
// that the sum does not stay near what float16 holds, the sweep is repeated with the maximum. In float16, whatever
// 16-bit elements there are: of numbers that are at most a few times seqlen_k it holds most digits.
class Softmax {
 public:
  REATTN_DEVICE Softmax(const Params& p, Shared<char> stages, const Block& block, int head)
      : p_(p),
        block_(block),
        own_(p.query, block.sample, head, block.first_row),
        stages_(stages),
        sample_(block.sample),
        head_(head),
        row_(block.first_row) {}

  // Finds reference and sum of all keys. kFill: the maps, after dropout, are left in a head's tile of all keys.
  template <bool kFill>
  REATTN_DEVICE void sweep(Shared<char> maps) {
    const int end = block_.range.end;
    exponentiate<kFill, true>(maps, 0, end, true);
    bool beyond = false;
    for_each_row<kTiles>([&](int tile, int lower, int) {
      // No more than zero where products of the first keys overflow to -inf.
      beyond = beyond || sum_[tile][lower] > 64.0f * float(p_.key.rows) || sum_[tile][lower] < 0.5f;
    });
    if (end <= 16 || !any(beyond)) return;
    find_reference();
    exponentiate<kFill, true, true>(maps, 0, end, false);
  }

  // The maps of some keys, once reference and sum are known.
  REATTN_DEVICE void fill(Shared<char> maps, int first_key) {
    exponentiate<true, false>(maps, first_key, smaller(block_.range.end, first_key + kKeys), false);
  }

  // Leaves the scaled products of query and key, for a mixing over heads, in a head's tile.
  REATTN_DEVICE void leave_products(Shared<char> maps, int first_key, int last_key) const {
    sync_warp();  // what lies in the maps is done with
    Keys keys(stages_, p_.key, sample_, head_, first_key, last_key, 0);
    OwnTiles to(maps);
    const auto take = [&](Scores& scores, int key) {
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++) {
        scale_products(scores[tile], p_);
        if constexpr (kFloat)
          store_tile(as<float>(maps + 16 * tile * kRowStride) + (key - first_key), kRowStride, scores[tile]);
        else
          to.store(tile, Packed<Narrow>(scores[tile]));
      }
      to.advance(16);
    };
    int key = first_key;
#pragma unroll 1
    for (; key + 64 <= last_key; key += 32)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        Scores scores;
        multiply<true>(scores, keys, i);
        take(scores, key + 16 * i);
      }
#pragma unroll 1
    for (; key < last_key; key += 32)
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (key + 16 * i < last_key) {
          Scores scores;
          multiply(scores, keys, i);
          take(scores, key + 16 * i);
        }
  }

  // Log-sum-exp, to base 2; -infinity where no key is seen.
  REATTN_DEVICE float lse(int tile, int lower) const {
    return reference_[tile][lower] + (kFloat ? log2(sum_[tile][lower]) : fast_log2(sum_[tile][lower]));
  }

  float reference_[kTiles][2], sum_[kTiles][2];  // of a lane's rows

 private:
  using Scores = float[kTiles][2][4];
  using Keys = std::conditional_t<kDirect, DirectRows<kKeyStride, 2>, Stream<kDims, kKeyStride>>;

  // Of the next 16 keys, whose slots take turns. kWhole: 32 more behind them exist.
  template <bool kWhole = false, class Rows>
  REATTN_DEVICE void multiply(Scores& scores, Rows& keys, int slot) const {
    if constexpr (kDirect) {
      own_.multiply(scores, keys.in(slot));
      keys.template replace<kWhole>(slot, scores);
    } else {
      own_.multiply(scores, keys.template next<kWhole>());
    }
  }

  // The largest score of all keys.
  REATTN_DEVICE void find_reference() {
    for_each_row<kTiles>([&](int tile, int lower, int) { reference_[tile][lower] = -kInfinity; });
    const int end = block_.range.end;
    Keys keys(stages_, p_.key, sample_, head_, 0, end, 0);
#pragma unroll 1
    for (int key = 0; key < end; key += 32)
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (key + 16 * i < end) {
          Scores scores;
          multiply(scores, keys, i);
          mask(scores, key + 16 * i);
          add_to_reference(scores);
        }
    close_reference();
  }
  REATTN_DEVICE void add_to_reference(const Scores& scores) {
    for_each_row<kTiles>([&](int tile, int lower, int) {
      float& largest = reference_[tile][lower];
#pragma unroll
      for (int i = 0; i < 4; i++) largest = larger(largest, scores[tile][i / 2][2 * lower + i % 2]);
    });
  }
  REATTN_DEVICE void close_reference() {
    for_each_row<kTiles>([&](int tile, int lower, int) {
      const float largest = quad_largest(reference_[tile][lower]) * score_factor(p_);
      reference_[tile][lower] = largest == -kInfinity ? 0.0f : largest;  // else -inf - -inf
    });
  }

  // Refer: the first keys say what the reference is. kSeldom: fewer loops, each a little slower; less to compile.
  template <bool kFill, bool kSum, bool kSeldom = false>
  REATTN_DEVICE void exponentiate(Shared<char> maps, int first_key, int last_key, bool refer) {
    sync_warp();  // what lies in the maps is done with
    const Dropout dropout(p_, sample_, head_);
    Keys keys(stages_, p_.key, sample_, head_, first_key, last_key, 0);
    OwnTiles to(maps);
    [[maybe_unused]] float sums[kTiles][4] = {};
    const auto take = [&](Scores& scores, int key) {
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
          if (16 * tile + i / 2 % 2 * 8 >= kRows) continue;
          float& score = scores[tile][i / 4][i % 4];
          // Rounded on its own: the largest of scores in the millions shall be exactly the reference.
          score = fast_exp2(rounded_product(score, score_factor(p_)) - reference_[tile][i / 2 % 2]);
          if constexpr (kSum && kFloat) sums[tile][i / 2 % 2 * 2] += score;
        }
        // A product with a column of ones adds up the rows, of what is held.
        if constexpr (kSum && !kFloat)
          multiply_add<Half>(sums[tile], Packed<Half>(scores[tile]).part, {pack<Half>(1, 1), pack<Half>(1, 1)});
        if constexpr (kFill) {
          if constexpr (kDropout) {
#pragma unroll
            for (int right = 0; right < 2; right++)
              dropout.drop(scores[tile][right], row_ + 16 * tile + lane() / 4, key + 8 * right + lane() % 4 * 2);
          }
          if constexpr (kFloat)
            store_tile(as<float>(maps + 16 * tile * kRowStride) + (key - first_key), kRowStride, scores[tile]);
          else
            to.store(tile, Packed<Half>(scores[tile]));
        }
      }
      to.advance(16);
    };

    int key = first_key;
    if constexpr (!kSeldom) {
      Scores scores;
      multiply(scores, keys, 0);
      mask(scores, key);
      if (kSum && refer) {
        for_each_row<kTiles>([&](int tile, int lower, int) { reference_[tile][lower] = -kInfinity; });
        add_to_reference(scores);
        close_reference();
      }
      take(scores, key);
      key += 16;
    }
    // In pairs those that have 32 more behind them, and of which nothing is hidden.
    const int in_pairs = kSeldom ? key : key + block_.range.unhidden(key, greater(last_key - 32 - key, 0)) / 32 * 32;
    constexpr int kSlot = kSeldom ? 0 : 1;  // which comes next
#pragma unroll 1
    for (; !kSeldom && key < in_pairs; key += 32)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        Scores scores;
        multiply<true>(scores, keys, 1 - i);
        if constexpr (kAdded) mask(scores, key + 16 * i);
        take(scores, key + 16 * i);
      }
#pragma unroll 1
    for (; key < last_key; key += 32)
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (key + 16 * i < last_key) {
          Scores scores;
          multiply(scores, keys, (kSlot + i) % 2);
          mask(scores, key + 16 * i);
          take(scores, key + 16 * i);
        }
    if constexpr (kSum)
      for_each_row<kTiles>([&](int tile, int lower, int) {
        sum_[tile][lower] = kFloat ? quad_sum(sums[tile][2 * lower]) : sums[tile][2 * lower];
      });
  }

  // Keys outside the sequence have no score, nor those that are hidden.
  REATTN_DEVICE void mask(float (&scores)[kTiles][2][4], int first_key) const {
    if constexpr (kMasked) hide(scores, p_, block_.mask(p_, head_), row_, first_key);
    if (first_key + 16 <= p_.key.rows) return;
#pragma unroll
    for (int i = 0; i < kTiles * 8; i++)
      if (first_key + i / 4 % 2 * 8 + lane() % 4 * 2 + i % 2 >= p_.key.rows)
        scores[i / 8][i / 4 % 2][i % 4] = -kInfinity;
  }

  const Params& p_;
  const Block& block_;
  OwnRows<kQueryStride, kDirect> own_;
  Shared<char> stages_;
  int sample_, head_, row_;
};

}  // namespace reattn
