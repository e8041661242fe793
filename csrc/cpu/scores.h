// The only place where a product of query and key becomes a probability: scale, mask, maximum, exponential, dropout.
#pragma once

#include "rows.h"

namespace reattn {
namespace REATTN_ISA {

constexpr float kInfinity = __builtin_inff(), kNaN = __builtin_nanf("");
constexpr float kLargestFloat = 0x1.fffffep127f;
constexpr float kLog2e = 1.44269504088896340736f;

// Where the terms of a mask do not hide.
inline VecI is_visible(Vec terms) { return terms != broadcast(-kInfinity); }

inline float largest_lane(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return maximum(a, b); });
}

// The largest of scores, or with kLargest false the smallest, to which padding does not count.
template <bool kLargest>
inline float extreme(const float* scores, Span span) {
  const Vec none = broadcast(kLargest ? -kInfinity : kInfinity);
  const auto pick = [](Vec a, Vec b) { return kLargest ? (a > b ? a : b) : (a < b ? a : b); };
  Vec even = none, odd = none;
  int64_t i = 0;
  for (; i + 1 < span.vecs - 1; i += 2) {
    even = pick(load(scores + i * kLanes), even);
    odd = pick(load(scores + (i + 1) * kLanes), odd);
  }
  if (i < span.vecs - 1) even = pick(load(scores + i * kLanes), even);
  const Vec last = load(scores + (span.vecs - 1) * kLanes);
  const Vec all = pick(pick(span.tail ? last : none, even), odd);
  return kLargest ? largest_lane(all) : -largest_lane(-all);
}

// What a mask adds to the exponents of one query with some keys: its terms, -infinity for a key that it hides.
class Mask {
 public:
  explicit Mask(const Problem& p) : mask_(p.mask), dtype_(p.dtype) {}

  bool by_head() const { return mask_.kind != MaskKind::kNone && mask_.tensor.head != 0; }
  bool given_by_row() const { return mask_.kind != MaskKind::kNone && mask_.tensor.row != 0; }
  // Whether the terms of these keys differ between queries from first_row on.
  bool by_row(int64_t first_row, int64_t last_key) const {
    return given_by_row() || (mask_.causal && last_key > first_row);
  }

  // To whole vectors: what stands beyond the keys is hidden.
  void load_terms(int64_t sample, int64_t head, int64_t row, int64_t first_key, int64_t keys, float* terms) const {
    const Tensor& t = mask_.tensor;
    const int64_t behind = row + 1 - first_key, seen = !mask_.causal || behind > keys ? keys : behind < 0 ? 0 : behind;
    const int64_t at = sample * t.batch + head * t.head + row * t.row + first_key * t.dim;
    if (mask_.kind == MaskKind::kNone) {
      for (int64_t i = 0; i < seen; i++) terms[i] = 0;
    } else if (mask_.kind == MaskKind::kBool) {
      const uint8_t* from = static_cast<const uint8_t*>(t.data) + at;
      int64_t i = 0;
      if (t.dim == 1)
        for (; i + kLanes <= seen; i += kLanes) {
          const VecI shown = __builtin_convertvector(load_as<VecB>(from + i), VecI);
          store(terms + i, shown != 0 ? Vec{} : broadcast(-kInfinity));
        }
      for (; i < seen; i++) terms[i] = from[i * t.dim] ? 0.0f : -kInfinity;
    } else {
      const Vec none = broadcast(-kInfinity), least = broadcast(-kLargestFloat), lowest = broadcast(lowest_number());
      load_row(dtype_, static_cast<const char*>(t.data) + at * int64_t(bytes(dtype_)), t.dim, seen, terms, seen);
      for (int64_t i = 0; i < seen; i += kLanes) {
        const Vec given = load(terms + i), term = given * kLog2e;
        // What is not hidden stays so, should its exponent overflow.
        store(terms + i, given <= lowest ? none : (term < least ? least : term));
      }
    }
    for (int64_t i = seen; i < round_up(keys, kLanes); i++) terms[i] = -kInfinity;
  }

  // The keys up to the last one that any of the queries before end_row sees, or some more.
  int64_t last_key(const Problem& p, int64_t sample, int64_t end_row) const {
    int64_t end = mask_.causal ? smaller(end_row, p.seqlen_k) : p.seqlen_k;
    if (mask_.kind == MaskKind::kNone || given_by_row()) return end;
    while (end > 0 && !sees(sample, 0, by_head() ? p.heads : 1, end_row - 1, (end - 1) / kPiece * kPiece, end))
      end = (end - 1) / kPiece * kPiece;
    return end;
  }

  // Whether a query sees any of the keys, in any of the heads.
  bool sees(int64_t sample, int64_t head, int64_t end_head, int64_t row, int64_t key, int64_t end_key) const {
    float terms[kPiece];
    for (; head < end_head; head++)
      for (int64_t first = key; first < end_key; first += kPiece) {
        const int64_t keys = smaller(kPiece, end_key - first);
        load_terms(sample, head, row, first, keys, terms);
        for (int64_t i = 0; i < keys; i++)
          if (terms[i] != -kInfinity) return true;
      }
    return false;
  }

 private:
  static constexpr int64_t kPiece = 16;
  static_assert(kPiece % kLanes == 0);

  // An additive mask hides with -infinity, or the lowest number of its dtype.
  float lowest_number() const {
    if (dtype_ == Dtype::kFloat16) return -65504.0f;
    return dtype_ == Dtype::kBFloat16 ? -0x1.fep127f : -kLargestFloat;
  }

  const MaskTensor& mask_;
  Dtype dtype_;
};

// What becomes of a row of products of one query with some keys. Exponents are to base 2.
class Scores {
 public:
  explicit Scores(float scale) : scale_(scale) {}

  // Makes exponents of products, in place, with the terms of a mask; returns the largest.
  float apply(const float* terms, float* products, Span span) const {
    const float scale = scale_;
    const auto at = [=](int64_t i) {
      const Vec term = load(terms + i * kLanes), exponent = load(products + i * kLanes) * scale + term;
      return is_visible(term) ? exponent : term;
    };
    Vec even = broadcast(-kInfinity), odd = even;
    int64_t i = 0;
    for (; i + 1 < span.vecs; i += 2) {
      const Vec a = at(i), b = at(i + 1);
      store(products + i * kLanes, a);
      store(products + (i + 1) * kLanes, b);
      even = a > even ? a : even;
      odd = b > odd ? b : odd;
    }
    if (i < span.vecs) {
      const Vec a = at(i);
      store(products + i * kLanes, a);
      even = a > even ? a : even;
    }
    return largest_lane(even > odd ? even : odd);
  }

  // The largest exponent of the row.
  float largest(const float* products, Span span) const {
    return scale_ >= 0 ? extreme<true>(products, span) * scale_ : extreme<false>(products, span) * scale_;
  }

  // probs = 2^(products * scale - shift), zero in the padding; returns their sum. The product is rounded before shift
  // is taken away, as it was when shift was made of it: the largest of scores in the millions shall have the exponent
  // zero.
  float exponentiate(const float* products, float* probs, Span span, float shift) const {
    const float scale = scale_;
    const auto at = [=](int64_t i) { return exp2(rounded(load(products + i * kLanes) * scale) - shift); };
    Vec even{}, odd{};
    int64_t i = 0;
    for (; i + 1 < span.vecs - 1; i += 2) {
      const Vec a = at(i), b = at(i + 1);
      store(probs + i * kLanes, a);
      store(probs + (i + 1) * kLanes, b);
      even += a;
      odd += b;
    }
    for (; i < span.vecs; i++) {
      const Vec all = at(i), p = i < span.vecs - 1 ? all : (span.tail ? all : Vec{});
      store(probs + i * kLanes, p);
      even += p;
    }
    return sum(even + odd);
  }

 private:
  float scale_;
};

// Philox4x32-10 (Salmon et al., 2011), a number for each key: which are kept depends on their position alone.
class Dropout {
 public:
  Dropout(const Problem& p) : key_(p.seed ? uint64_t(*p.seed) : 0), threshold_(uint32_t(p.dropout_p * 4294967295.0)) {}

  // kept = probs where they are kept, zero elsewhere, for keys first_key ..., a multiple of 32.
  void apply(const float* probs, float* kept, int64_t padded, int64_t sample, int64_t head, int64_t row,
             int64_t first_key) const {
    for (int64_t j = 0; j < padded; j += 32) {
      uint32_t words[4][8];
      for (int lane = 0; lane < 8; lane++) {
        words[0][lane] = uint32_t((first_key + j) / 4 + lane);
        words[1][lane] = uint32_t(row);
        words[2][lane] = uint32_t(head);
        words[3][lane] = uint32_t(sample);
      }
      uint32_t key0 = uint32_t(key_), key1 = uint32_t(key_ >> 32);
      for (int round = 0; round < 10; round++) {
        for (int lane = 0; lane < 8; lane++) {
          const uint64_t a = uint64_t(words[0][lane]) * 0xD2511F53u, b = uint64_t(words[2][lane]) * 0xCD9E8D57u;
          const uint32_t w1 = words[1][lane], w3 = words[3][lane];
          words[0][lane] = uint32_t(b >> 32) ^ w1 ^ key0;
          words[1][lane] = uint32_t(b);
          words[2][lane] = uint32_t(a >> 32) ^ w3 ^ key1;
          words[3][lane] = uint32_t(a);
        }
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
      }
      const uint32_t* word = &words[0][0];
      const int64_t count = smaller(32, padded - j);
      for (int64_t i = 0; i < count; i++) kept[j + i] = word[i] >= threshold_ ? probs[j + i] : 0.0f;
    }
  }

 private:
  uint64_t key_;
  uint32_t threshold_;
};

}  // namespace REATTN_ISA
}  // namespace reattn
