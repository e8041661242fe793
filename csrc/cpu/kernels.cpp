// Re-attention for one instruction set: compiled once for each, with that set's flags and its name as REATTN_ISA.
//
// A unit of work holds the maps of some query rows and all heads in the L2 cache, and goes over them row by row:
// softmax, mixing and norm of a row stay in the L1 cache. Derivations: docs/operator.md. Nothing of the C++ library
// is used that the linker could share with code for another instruction set.

#include "kernels.h"

#include "bfloat16.h"
#include "mixing.h"
#include "products.h"
#include "rows.h"
#include "scores.h"

namespace reattn {
namespace REATTN_ISA {

// Keys that are packed and reduced as a unit: whole panels of any instruction set.
constexpr int64_t kStretch = 48;
static_assert(kStretch % kPanel == 0 && kStretch % 16 == 0);
// Of these, keys whose gradients are summed at a time.
constexpr int64_t kColumns = 16;
static_assert(kColumns % kLanes == 0);

// The sum of the values that a query sees.
inline float* value_sum(const Problem& p, int64_t sample, int64_t head, int64_t row) {
  return p.value_sum + ((sample * p.heads_out + head) * p.value_rows + (p.value_rows > 1 ? row : 0)) * p.head_dim;
}

// Rows that are fetched before they are read or written.
constexpr int64_t kAhead = 2;

// Hands out parts of a buffer, each on cache lines of its own; without a buffer, only counts.
class Layout {
 public:
  explicit Layout(char* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    T* part = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return part;
  }
  size_t used() const { return size_t(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

// A thread's memory. A name in the plural has a part for each head: before mixing, or after it where this says so.
template <class E>
struct Scratch {
  using Operand = typename E::Operand;

  Operand *queries, *grads;      // [block_rows, depth]; grads after mixing
  Operand *queries_t, *grads_t;  // the same transposed, where products need it
  float* maps;                   // [block_rows, ld_block], heads ld_head apart: scores, then mixed maps, after mixing
  float* grad_maps;              // gradients of the mixed maps, after mixing, then of the scores
  float* unmixed;                // a row of scores before they are mixed, then of their gradients [heads, ld_block]
  float* probs;                  // a row of softmax maps [heads, ld_block], of ones, and before dropout again [heads]
  float* grad_probs;             // gradients of a row of softmax maps [heads, ld_block]
  float* terms;                  // of the mask, for a row [heads, ld_block]; of one head where all have the same
  float* weight;                 // of this row, [heads, heads_out]
  float* outs;                   // [block_rows, ld_dim]
  float *shifts, *row_sums;      // of a row: what is taken from its exponents, and the sum of its exponentials [heads]
  float *largest, *sums;         // [heads, block_rows]; in the backward pass, mass and delta
  float *products, *norm_sums;   // a vector each: [heads + 1, heads_out]; [2, heads_out], forward of A and A^2
  float* score_products;         // a vector each: [heads, heads]
  Operand* paired;               // a head's maps, rows in the order that products need
  size_t size;

  Scratch(const Job& job, bool backward, char* base) {
    const Plan& plan = job.plan;
    const int64_t heads = job.problem.heads, heads_out = job.problem.heads_out, rows = plan.block_rows;
    const int64_t most_heads = heads > heads_out ? heads : heads_out;
    const bool mixes_scores = job.mixing.of_scores;
    Layout layout(base);
    queries = layout.take<Operand>(heads * rows * plan.depth);
    maps = layout.take<float>(most_heads * plan.ld_head);
    probs = layout.take<float>((2 * heads + 1) * plan.ld_block);
    const int64_t heads_of_mask = !job.problem.mask.any() ? 0 : Mask(job.problem).by_head() ? heads : 1;
    terms = layout.take<float>(heads_of_mask * plan.ld_block);
    unmixed = layout.take<float>(mixes_scores ? heads * plan.ld_block : 0);
    weight = layout.take<float>(heads * heads_out);
    outs = layout.take<float>(most_heads * rows * plan.ld_dim);
    shifts = layout.take<float>(heads);
    row_sums = layout.take<float>(heads);
    largest = layout.take<float>(heads * rows);
    sums = layout.take<float>(heads * rows);
    norm_sums = layout.take<float>(2 * heads_out * kLanes);
    grads = queries_t = grads_t = paired = nullptr;
    grad_maps = grad_probs = products = score_products = nullptr;
    if (backward) {
      products = layout.take<float>((heads + 1) * heads_out * kLanes);
      score_products = layout.take<float>(mixes_scores ? heads * heads * kLanes : 0);
      grads = layout.take<Operand>(heads_out * rows * plan.depth);
      grad_maps = layout.take<float>(most_heads * plan.ld_head);
      grad_probs = layout.take<float>(heads * plan.ld_block);
      if (E::kGroup > 1) {
        queries_t = layout.take<Operand>(heads * E::transposed_size(rows, plan.depth));
        grads_t = layout.take<Operand>(heads_out * E::transposed_size(rows, plan.depth));
        paired = layout.take<Operand>(E::paired_size(rows, plan.ld_block));
      }
    }
    size = layout.used();
  }
};

template <class E>
size_t scratch_bytes(const Job& job, bool backward) {
  return Scratch<E>(job, backward, nullptr).size;
}

// Some query rows of one sample, all heads, and what is computed for them.
template <class E>
class Block {
 public:
  using Operand = typename E::Operand;

  Block(const Job& job, Scratch<E>& scratch, int64_t sample, int64_t first_row, int64_t rows)
      : job_(job),
        p_(job.problem),
        m_(job.mixing),
        plan_(job.plan),
        s_(scratch),
        sample_(sample),
        first_row_(first_row),
        rows_(rows),
        heads_(p_.heads),
        heads_out_(p_.heads_out),
        products_(p_.scale * kLog2e),
        exponents_(1.0f),
        mask_(p_),
        ld_terms_(mask_.by_head() ? plan_.ld_block : 0),
        dropout_(p_),
        kept_(float(1.0 / (1.0 - p_.dropout_p))) {
    if (!p_.mask.any()) return;
    const int64_t last = mask_.last_key(p_, sample, first_row + rows);
    end_key_ = smaller(round_up(last > 0 ? last : 1, kLanes), p_.seqlen_k);
  }

  // No query of the block sees a key from here on.
  int64_t end_key() const { return end_key_; }

  void load_queries(bool backward) {
    load(p_.query, s_.queries, heads_);
    // What is NaN in a query that sees no key may reach no gradient. Where scores are mixed, every head is made of all.
    if (backward && p_.mask.any())
      for (int64_t h = 0; h < heads_; h++)
        for (int64_t r = 0; r < rows_; r++)
          if (m_.of_scores ? sees_nothing(r) : lse(h, r) == -kInfinity)
            std::memset(s_.queries + (h * plan_.block_rows + r) * plan_.depth, 0, plan_.depth * sizeof(Operand));
    if (!backward) return;
    load(p_.grad, s_.grads, heads_out_);
    transpose_rows(s_.queries, s_.queries_t, heads_);
    transpose_rows(s_.grads, s_.grads_t, heads_out_);
  }

  // To where the gradient of the mask goes that the groups and parts sum on their own: see make_plan.
  void set_grad_mask(int64_t part, int64_t group) {
    if (!job_.work.grad_mask) return;
    const int64_t* sizes = p_.mask.sizes;
    const int64_t slot = (sizes[0] < p_.batch ? part : 0) * (sizes[2] < p_.seqlen ? plan_.groups : 1) +
                         (sizes[2] < p_.seqlen ? group : 0);
    grad_mask_ = job_.work.grad_mask + slot * sizes[0] * sizes[1] * sizes[2] * sizes[3];
  }

  void set_keys(int64_t first_key) {
    first_key_ = first_key;
    keys_ = smaller(plan_.block_keys, end_key_ - first_key);
    span_ = Span(keys_);
    if (p_.mask.any()) {
      by_row_ = mask_.by_row(first_row_, first_key + keys_ - 1);
      if (!by_row_) load_terms(0);
      masked_ = by_row_ || p_.mask.grad || hides_or_adds();
      spoilt_ = job_.work.spoilt && std::memchr(spoilt(0), 1, size_t(heads_out_ * plan_.keys));
    }
    float* ones = s_.probs + heads_ * plan_.ld_block;
    for (int64_t i = 0; i < span_.vecs; i++) {
      const Vec one = broadcast(1.0f);
      store(ones + i * kLanes, i == span_.vecs - 1 ? (span_.tail ? one : Vec{}) : one);
    }
  }

  void compute_scores() { product_with_columns(s_.queries, job_.work.key_columns, s_.maps, heads_); }
  void compute_grad_maps() { product_with_columns(s_.grads, job_.work.value_columns, s_.grad_maps, heads_out_); }

  // Continues each row's maximum and sum over this stretch of keys.
  void continue_lse(bool first) {
    for (int64_t r = 0; r < rows_; r++) {
      if (by_row_) load_terms(r);
      mix_scores(r);
      for (int64_t h = 0; h < heads_; h++) {
        float &largest = s_.largest[h * plan_.block_rows + r], &sum = s_.sums[h * plan_.block_rows + r];
        float* scores = row(s_.maps, h, r);
        const float most = largest_exponent(h, scores);
        const float next = first || most > largest ? most : largest;
        // While all scores are -infinity the sum is zero; where they stay so, the LSE is -infinity and all maps are
        // NaN.
        const float shift = next == -kInfinity ? 0.0f : next;
        const float share = exponents().exponentiate(scores, s_.probs, span_, shift);
        sum = (first ? 0.0f : sum * __builtin_exp2f(largest - shift)) + share;
        largest = next;
      }
    }
  }
  void store_lse() {
    for (int64_t r = 0; r < rows_; r++) {
      for (int64_t h = 0; h < heads_; h++) {
        s_.shifts[h] = s_.largest[h * plan_.block_rows + r];
        s_.row_sums[h] = s_.sums[h * plan_.block_rows + r];
      }
      store_row_of_lse(r, s_.shifts, s_.row_sums);
    }
  }

  // A row's softmax maps, from its scores; not yet divided by their sums, which are in row_sums, unless the LSE is
  // known.
  void softmax(int64_t r, bool lse_known, bool keep_undropped) {
    if (by_row_) load_terms(r);
    mix_scores(r);
    const int64_t ld = plan_.ld_block;
    for (int64_t h = 0; h < heads_; h++) {
      float* scores = row(s_.maps, h, r);
      if (lse_known && masked_) products_.apply(terms(h), scores, span_);
      const float shift = lse_known ? lse(h, r) : largest_exponent(h, scores);
      // Where a query sees no key all maps are zero.
      const bool may_see_nothing = lse_known ? p_.mask.any() : masked_;
      s_.shifts[h] = may_see_nothing && shift == -kInfinity ? 0.0f : shift;
    }
    for (int64_t h = 0; h < heads_; h++)
      s_.row_sums[h] = exponents().exponentiate(row(s_.maps, h, r), s_.probs + h * ld, span_, s_.shifts[h]);
    if (!lse_known) {
      store_row_of_lse(r, s_.shifts, s_.row_sums);
      for (int64_t h = 0; h < heads_ && masked_; h++)
        if (lse(h, r) == -kInfinity) s_.row_sums[h] = 1;
    }
    for (int64_t h = 0; h < heads_ && p_.dropout_p > 0; h++) {
      float *probs = s_.probs + h * ld, *undropped = probs + (heads_ + 1) * ld;
      if (keep_undropped) std::memcpy(undropped, probs, span_.vecs * sizeof(Vec));
      dropout_.apply(probs, probs, span_.vecs * kLanes, sample_, h, first_row_ + r, first_key_);
    }
  }

  // The weights for maps as softmax left them.
  const float* weights(bool lse_known) {
    if (lse_known && p_.dropout_p == 0) return m_.weight;
    const int64_t heads = heads_, heads_out = heads_out_;
    const float *weight = m_.weight, kept = kept_;
    float* scaled = s_.weight;
    for (int64_t h = 0; h < heads; h++) {
      const float factor = kept * (lse_known ? 1.0f : 1.0f / s_.row_sums[h]);
      for (int64_t g = 0; g < heads_out; g++) scaled[h * heads_out + g] = weight[h * heads_out + g] * factor;
    }
    return scaled;
  }

  // The row's mixed and normalised maps, over its scores.
  void mix(int64_t r, const float* weight) {
    if (m_.over_heads) {
      if (masked_)
        mix_and_normalise<true>(r, weight);
      else
        mix_and_normalise<false>(r, weight);
    } else {
      for (int64_t vec = 0; vec < span_.vecs; vec += plan_.tile_keys / kLanes)
        mix_tile(r, vec * kLanes, smaller(plan_.tile_keys / kLanes, span_.vecs - vec), weight, true);
    }
    if (spoilt_) spoil_maps(r);
    pad_maps(s_.maps, r);
  }

  // The keys of the row that are not hidden, by head.
  void add_counts(double* counts) const {
    int64_t seen = keys_;
    for (int64_t g = 0; g < heads_out_; g++) {
      if (masked_ && (g == 0 || ld_terms_ > 0)) {
        VecI count{};
        for (int64_t i = 0; i < span_.vecs * kLanes; i += kLanes) count -= is_visible(vec(terms(g) + i));
        seen = 0;
        for (int lane = 0; lane < kLanes; lane++) seen += count[lane];
      }
      counts[g] += double(seen);
    }
  }

  // Adds the row's mixed maps, and their squares, to the sums by head; some of its keys, from vec on, ld apart by head.
  void add_moments(const float* mixed, int64_t ld, int64_t vec, int64_t vecs) {
    const bool ends = vec + vecs == span_.vecs;
    for (int64_t g = 0; g < heads_out_; g++, mixed += ld) {
      float *sums = s_.norm_sums + g * kLanes, *squares = sums + heads_out_ * kLanes;
      Vec even{}, odd{}, even_squares{}, odd_squares{};
      int64_t i = 0;
      for (; i + 1 < vecs - ends; i += 2) {
        const Vec a = this->vec(mixed + i * kLanes), b = this->vec(mixed + (i + 1) * kLanes);
        even += a, odd += b;
        even_squares += a * a, odd_squares += b * b;
      }
      for (; i < vecs; i++) {
        Vec a = this->vec(mixed + i * kLanes);
        if (ends && i == vecs - 1) a = span_.tail ? a : Vec{};
        even += a;
        even_squares += a * a;
      }
      put(sums, this->vec(sums) + (even + odd));
      put(squares, this->vec(squares) + (even_squares + odd_squares));
    }
  }

  // The output of these rows, or what these keys add to it.
  void multiply_values() {
    for (int64_t g = 0; g < heads_out_; g++) multiply_rows(s_.maps, g, packed(0, heads_out_), job_.work.value_rows);
  }
  void multiply_keys() {
    for (int64_t h = 0; h < heads_; h++) multiply_rows(s_.grad_maps, h, packed(0, heads_), job_.work.key_rows);
  }
  void store_outs(const Tensor& to, int64_t heads) {
    for (int64_t r = 0; r < rows_; r++)
      for (int64_t h = 0; h < heads; h++) {
        if (r + kAhead < rows_) prefetch_row<true>(to, p_.dtype, sample_, h, first_row_ + r + kAhead, p_.head_dim);
        store_row(p_.dtype, row_of(to, p_.dtype, sample_, h, first_row_ + r), to.dim, p_.head_dim,
                  s_.outs + (h * plan_.block_rows + r) * plan_.ld_dim);
      }
  }

  // One row of the backward pass: delta and the sums for the parameters' gradients in the first sweep, the mixed maps
  // and the gradient of the scores, over maps and grad_maps, in the second; one sweep does both where all keys fit.
  void backward_row(int64_t r, bool first_sweep, bool second_sweep) {
    const bool dropped = p_.dropout_p > 0;
    softmax(r, true, true);
    const float kept = kept_;
    const int64_t ld = plan_.ld_block, stride = plan_.ld_head;
    if (masked_) hide(row(s_.grad_maps, 0, r), stride, 0, span_.vecs);
    if (dropped)
      for (int64_t h = 0; h < heads_; h++)
        for (int64_t i = h * ld, end = i + span_.vecs * kLanes; i < end; i += kLanes)
          put(s_.probs + i, vec(s_.probs + i) * kept);
    for (int64_t v = 0; v < span_.vecs; v += plan_.tile_keys / kLanes) {
      const int64_t vecs = smaller(plan_.tile_keys / kLanes, span_.vecs - v), key = v * kLanes;
      float* grad_mixed = row(s_.grad_maps, 0, r) + key;
      const bool last = v + vecs == span_.vecs;
      if (m_.gamma) {
        mix_tile(r, key, vecs, m_.weight, false);
        // Beyond the keys: for batch norm nothing, that is not summed; for layer norm ones, since without eps the norm
        // of zeros would be NaN.
        for (int64_t g = 0; g < heads_out_ && last; g++) {
          float* end = row(s_.maps, g, r) + key + (vecs - 1) * kLanes;
          put(end, span_.tail ? vec(end) : broadcast(m_.over_heads ? 1.0f : 0.0f));
        }
        if (masked_)
          norm_backward<true>(r, key, vecs, first_sweep, second_sweep);
        else
          norm_backward<false>(r, key, vecs, first_sweep, second_sweep);
      } else if (second_sweep) {
        mix_tile(r, key, vecs, m_.weight, true);
      }
      if (first_sweep)
        dot_rows(heads_ + 1, heads_out_, vecs, s_.probs + key, ld, grad_mixed, stride, s_.products, heads_out_);
      // dP = W dA
      mix_to<Order::kRows>(heads_, {m_.weight, heads_out_, heads_out_, nullptr}, grad_mixed, stride, vecs * kLanes,
                           s_.grad_probs + key, ld);
    }
    for (int64_t h = 0; h < heads_; h++) {
      const float *probs = s_.probs + h * ld, *undropped = probs + (heads_ + 1) * ld;
      float* grad_probs = s_.grad_probs + h * ld;
      float &delta = s_.sums[h * plan_.block_rows + r], &mass = s_.largest[h * plan_.block_rows + r];
      if (first_sweep) {
        const float sum = dot_row(probs, grad_probs, span_.vecs), share = s_.row_sums[h];
        delta = first_key_ == 0 ? sum : delta + sum;
        mass = first_key_ == 0 ? share : mass + share;
      }
      if (!second_sweep) continue;
      Operand* grad_scores = operands(s_.grad_maps, r) + h * operand_stride();
      // Maps from a rounded LSE do not quite sum to one, but to mass, by which they are divided here. Of a query that
      // sees no key they are zero.
      const float inverse = mass == 0 ? 0 : 1 / mass, along = delta * inverse, scale = p_.scale * inverse;
      const int64_t end = span_.vecs * kLanes;
      if (masked_)
        for (int64_t i = 0; i < end; i += kLanes) {
          const Vec prob = vec(probs + i), grad_prob = vec(grad_probs + i);
          const Vec grad = dropped ? prob * grad_prob - vec(undropped + i) * along : prob * (grad_prob - along);
          // What is hidden has none, whatever mass is.
          put(grad_probs + i, is_visible(vec(terms(h) + i)) ? grad * inverse : Vec{});
          E::store(grad_scores + i, vec(grad_probs + i) * p_.scale);
        }
      else if (m_.of_scores)
        for (int64_t i = 0; i < end; i += kLanes) {
          const Vec prob = vec(probs + i), grad_prob = vec(grad_probs + i);
          const Vec grad = dropped ? prob * grad_prob - vec(undropped + i) * along : prob * (grad_prob - along);
          put(grad_probs + i, grad * inverse);
        }
      else if (dropped)
        for (int64_t i = 0; i < end; i += kLanes)
          E::store(grad_scores + i, (vec(probs + i) * vec(grad_probs + i) - vec(undropped + i) * along) * scale);
      else
        for (int64_t i = 0; i < end; i += kLanes)
          E::store(grad_scores + i, vec(probs + i) * (vec(grad_probs + i) - along) * scale);
    }
    if (second_sweep) {
      if (m_.of_scores) unmix_grad_scores(r);
      if (p_.mask.grad) add_grad_mask(r);
      pad_maps(s_.maps, r);
      pad_maps(s_.grad_maps, r);
    }
  }

  // Adds these rows' part to the gradients of keys and values, [head_dim, keys] each.
  void add_grad_columns(float* grad_key, float* grad_value, bool first) {
    const int64_t size = p_.head_dim * plan_.ld_keys;
    for (int64_t h = 0; h < heads_; h++)
      add_columns(s_.queries, s_.queries_t, s_.grad_maps, h, grad_key + h * size + first_key_, first);
    for (int64_t g = 0; g < heads_out_; g++)
      add_columns(s_.grads, s_.grads_t, s_.maps, g, grad_value + g * size + first_key_, first);
  }
  // To these rows, the first, the keys from end_key on are hidden; later ones may see those before end.
  void clear_grad_columns(float* grad_key, float* grad_value, int64_t end) {
    const int64_t begin = round_up(end_key_, kLanes), size = (end - begin) * int64_t(sizeof(float));
    const auto clear = [&](float* columns, int64_t heads) {
      for (int64_t i = 0; size > 0 && i < heads * p_.head_dim; i++)
        std::memset(columns + i * plan_.ld_keys + begin, 0, size_t(size));
    };
    clear(grad_key, heads_);
    clear(grad_value, heads_out_);
  }

 private:
  // Names of the class hide those of the namespace.
  static Vec vec(const float* from) { return reattn::REATTN_ISA::load(from); }
  static void put(float* to, Vec v) { reattn::REATTN_ISA::store(to, v); }

  float* row(float* maps, int64_t head, int64_t r) { return maps + head * plan_.ld_head + r * plan_.ld_block; }
  float& lse(int64_t head, int64_t r) { return p_.lse[(sample_ * heads_ + head) * p_.seqlen + first_row_ + r]; }
  // Of the maps: a query that sees no key in any head.
  bool sees_nothing(int64_t r) {
    for (int64_t h = 0; h < heads_; h++)
      if (lse(h, r) != -kInfinity) return false;
    return true;
  }
  // Where a head of this sample lies among those of the wave; heads before mixing, or after it.
  int64_t packed(int64_t head, int64_t heads) const { return (sample_ - job_.first) * heads + head; }
  const uint8_t* spoilt(int64_t head) const { return job_.work.spoilt + packed(head, heads_out_) * plan_.keys; }

  // The mask's, for this row or all.
  const float* terms(int64_t head) const { return s_.terms + head * ld_terms_; }
  void load_terms(int64_t r) {
    for (int64_t h = 0; h < (ld_terms_ > 0 ? heads_ : 1); h++)
      mask_.load_terms(sample_, h, first_row_ + r, first_key_, keys_, s_.terms + h * ld_terms_);
  }
  bool hides_or_adds() const {
    for (int64_t h = 0; h < (ld_terms_ > 0 ? heads_ : 1); h++)
      for (int64_t i = 0; i < keys_; i++)
        if (terms(h)[i] != 0) return true;
    return false;
  }

  // What makes probabilities of the scores: products, or exponents once a mask was applied.
  const Scores& exponents() const { return masked_ ? exponents_ : products_; }
  // Applies the mask.
  float largest_exponent(int64_t h, float* scores) const {
    return masked_ ? products_.apply(terms(h), scores, span_) : products_.largest(scores, span_);
  }
  // Zero where keys are hidden; maps of some keys of the row, ld apart by head.
  void hide(float* maps, int64_t ld, int64_t key, int64_t vecs) const {
    for (int64_t g = 0; g < heads_out_; g++) {
      const float* of_mask = terms(g) + key;
      float* map = maps + g * ld;
      for (int64_t i = 0; i < vecs * kLanes; i += kLanes)
        put(map + i, is_visible(vec(of_mask + i)) ? vec(map + i) : Vec{});
    }
  }
  // Where a vector of keys is visible to any head.
  VecI visible_to_any(int64_t key) const {
    VecI any = is_visible(vec(terms(0) + key));
    for (int64_t h = 1; h < heads_ && ld_terms_ > 0; h++) any |= is_visible(vec(terms(h) + key));
    return any;
  }
  // The LSE of a row whose exponentials, less shifts, sum up to sums. -infinity if the query sees no key; NaN if of
  // those that it sees none has a finite score.
  void store_row_of_lse(int64_t r, const float* shifts, const float* sums) {
    for (int64_t first = 0; first < heads_; first += kLanes) {
      const Vec all = vec(shifts + first) + log2(vec(sums + first));
      for (int64_t h = first; h < smaller(first + kLanes, heads_); h++) {
        const bool none = sums[h] == 0 && p_.mask.any();
        lse(h, r) = none && mask_.sees(sample_, h, h + 1, first_row_ + r, 0, p_.seqlen_k) ? kNaN : all[h - first];
      }
    }
  }
  // NaN for the keys that the row sees and whose values, taken for zeros, are not finite.
  void spoil_maps(int64_t r) {
    for (int64_t g = 0; g < heads_out_; g++)
      for (int64_t i = 0; i < keys_; i++)
        if (spoilt(g)[first_key_ + i] && !(masked_ && terms(g)[i] == -kInfinity))
          operands(s_.maps, r)[g * operand_stride() + i] = E::kNaN;
  }

  // Adds the gradients of the row's scores, which are in grad_probs, to the mask's.
  void add_grad_mask(int64_t r) {
    const int64_t *sizes = p_.mask.sizes, heads = sizes[1], ld = plan_.ld_block;
    for (int64_t h = heads; h < heads_; h++)
      for (int64_t i = 0; i < span_.vecs * kLanes; i += kLanes)
        put(s_.grad_probs + i, vec(s_.grad_probs + i) + vec(s_.grad_probs + h * ld + i));
    const int64_t sample = sizes[0] > 1 ? sample_ : 0, line = sizes[2] > 1 ? first_row_ + r : 0;
    for (int64_t h = 0; h < heads; h++) {
      const float* from = s_.grad_probs + h * ld;
      const int64_t at = ((sample * heads + h) * sizes[2] + line) * sizes[3] + (sizes[3] > 1 ? first_key_ : 0);
      if (!grad_mask_) {
        std::memcpy(p_.mask.grad + at, from, size_t(keys_) * sizeof(float));
      } else if (sizes[3] > 1) {
        for (int64_t i = 0; i < keys_; i++) grad_mask_[at + i] += double(from[i]);
      } else {
        grad_mask_[at] += double(sum_row(from, span_.vecs));
      }
    }
  }

  void load(const Tensor& from, Operand* rows, int64_t heads) {
    const int64_t size = plan_.block_rows * plan_.depth;
    // Heads lie side by side in memory, as a rule: rows of all of them are read in one go.
    for (int64_t r = 0; r < rows_; r++)
      for (int64_t h = 0; h < heads; h++) {
        if (r + kAhead < rows_) prefetch_row<false>(from, p_.dtype, sample_, h, first_row_ + r + kAhead, p_.head_dim);
        E::load_row(p_.dtype, row_of(from, p_.dtype, sample_, h, first_row_ + r), from.dim, p_.head_dim,
                    rows + h * size + r * plan_.depth, plan_.depth);
      }
  }
  void transpose_rows(const Operand* rows, Operand* transposed, int64_t heads) {
    for (int64_t h = 0; h < heads; h++)
      E::transpose_rows(rows + h * plan_.block_rows * plan_.depth, rows_, plan_.depth,
                        transposed + h * E::transposed_size(plan_.block_rows, plan_.depth));
  }

  // maps[h] = rows[h] columns[h] for these keys.
  void product_with_columns(const Operand* rows, const char* columns, float* maps, int64_t heads) {
    const int64_t size = plan_.packed_keys * plan_.depth;
    for (int64_t h = 0; h < heads; h++)
      E::product_with_panels(
          rows_, span_.vecs * kLanes, plan_.depth, rows + h * plan_.block_rows * plan_.depth, plan_.depth,
          reinterpret_cast<const Operand*>(columns) + packed(h, heads) * size + first_key_ * plan_.depth,
          row(maps, h, 0), plan_.ld_block);
  }

  // outs[head] (+)= maps[head] rows[head]; those of the first head lie at first.
  void multiply_rows(float* maps, int64_t head, int64_t first, const char* rows) {
    const int64_t size = plan_.keys * plan_.ld_dim;
    const Operand* b = reinterpret_cast<const Operand*>(rows) + (first + head) * size + first_key_ * plan_.ld_dim;
    float* outs = s_.outs + head * plan_.block_rows * plan_.ld_dim;
    const Operand* a = reinterpret_cast<const Operand*>(row(maps, head, 0));
    const int64_t lda = plan_.ld_block * int64_t(sizeof(float) / sizeof(Operand)), depth = round_up(keys_, E::kGroup);
    if (first_key_ == 0)
      E::template product<Start::kZero>(rows_, plan_.ld_dim, depth, a, lda, b, plan_.ld_dim, outs, plan_.ld_dim);
    else
      E::template product<Start::kAccumulate>(rows_, plan_.ld_dim, depth, a, lda, b, plan_.ld_dim, outs, plan_.ld_dim);
  }

  // columns (+)= rows^T maps[head].
  void add_columns(const Operand* rows, const Operand* transposed, float* maps, int64_t head, float* columns,
                   bool first) {
    const int64_t size = plan_.block_rows * plan_.depth;
    E::add_transposed(p_.head_dim, span_.vecs * kLanes, rows_, rows + head * size, plan_.depth,
                      transposed + head * E::transposed_size(plan_.block_rows, plan_.depth), row(maps, head, 0),
                      plan_.ld_block, s_.paired, columns, plan_.ld_keys, first);
  }

  // S = of_scores^T R over the row's products of query and key, which are kept in unmixed.
  void mix_scores(int64_t r) {
    if (!m_.of_scores) return;
    const int64_t ld = plan_.ld_block;
    for (int64_t h = 0; h < heads_; h++) std::memcpy(s_.unmixed + h * ld, row(s_.maps, h, r), span_.vecs * sizeof(Vec));
    mix_to<Order::kColumns>(heads_, {m_.of_scores, heads_, heads_, nullptr}, s_.unmixed, ld, span_.vecs * kLanes,
                            row(s_.maps, 0, r), plan_.ld_head);
  }
  // From the gradients of the row's mixed scores, in grad_probs, to those of the products of query and key; and the
  // sums for the gradient of of_scores.
  void unmix_grad_scores(int64_t r) {
    const int64_t ld = plan_.ld_block;
    // What is NaN in a key may reach no gradient from where no head sees it.
    for (int64_t i = 0; masked_ && i < span_.vecs * kLanes; i += kLanes) {
      const VecI visible = visible_to_any(i);
      for (int64_t h = 0; h < heads_; h++) put(s_.unmixed + h * ld + i, visible ? vec(s_.unmixed + h * ld + i) : Vec{});
    }
    dot_rows(heads_, heads_, span_.vecs, s_.unmixed, ld, s_.grad_probs, ld, s_.score_products, heads_);
    mix_to<Order::kRows>(heads_, {m_.of_scores, heads_, heads_, nullptr}, s_.grad_probs, ld, span_.vecs * kLanes,
                         s_.unmixed, ld);
    const float scale = p_.scale;
    for (int64_t h = 0; h < heads_; h++) {
      Operand* grad_scores = operands(s_.grad_maps, r) + h * operand_stride();
      for (int64_t i = 0; i < span_.vecs * kLanes; i += kLanes)
        E::store(grad_scores + i, vec(s_.unmixed + h * ld + i) * scale);
    }
  }

  // A = W^T P + c for some keys of the row, over their scores. final: as operands, hidden where the mask hides, summed.
  void mix_tile(int64_t r, int64_t key, int64_t vecs, const float* weight, bool final) {
    float* mixed = row(s_.maps, 0, r) + key;
    const int64_t ld = plan_.ld_head;
    mix_to<Order::kColumns>(heads_out_, {weight, heads_out_, heads_, m_.shift}, s_.probs + key, plan_.ld_block,
                            vecs * kLanes, mixed, ld);
    if (!final) return;
    if (masked_) hide(mixed, ld, key, vecs);
    if (m_.sum_maps) add_moments(mixed, ld, key / kLanes, vecs);
    if constexpr (E::kGroup > 1) {
      Operand* maps = operands(s_.maps, r) + key;
      for (int64_t g = 0; g < heads_out_; g++)
        for (int64_t i = 0; i < vecs * kLanes; i += kLanes)
          E::store(maps + g * operand_stride() + i, vec(mixed + g * ld + i));
    }
  }

  // A row of maps as an operand of products, in the place of its float32 values; heads are operand_stride apart.
  Operand* operands(float* maps, int64_t r) { return reinterpret_cast<Operand*>(row(maps, 0, r)); }
  int64_t operand_stride() const { return plan_.ld_head * int64_t(sizeof(float) / sizeof(Operand)); }

  // Sums over keys run on to a whole group: nothing may stand there.
  void pad_maps(float* maps, int64_t r) {
    if (E::kGroup == 1) return;
    for (int64_t h = 0; h < (heads_ > heads_out_ ? heads_ : heads_out_); h++) {
      Operand* operand = reinterpret_cast<Operand*>(row(maps, h, r));
      for (int64_t i = keys_; i < round_up(keys_, E::kGroup); i++) operand[i] = Operand{};
    }
  }

  // N = gamma A / sqrt(mean over heads of A^2 + eps) + beta for the row, where A = W^T P + c.
  // What is stored may lie anywhere, for all the compiler knows: hot loops keep pointers and sizes in locals.
  template <bool kMasked>
  void mix_and_normalise(int64_t r, const float* weight) {
    const int64_t stride = operand_stride(), heads = heads_out_, ld_terms = ld_terms_, ld_mixed = plan_.ld_head,
                  size = span_.vecs * kLanes;
    const float *gamma = m_.gamma, *beta = m_.beta, *of_mask = s_.terms, eps = m_.eps, share = 1.0f / float(heads);
    Operand* maps = operands(s_.maps, r);
    const auto put_normalised = [=](int64_t at, int64_t g, Vec mixed, Vec inverse) {
      const Vec map = mixed * inverse * gamma[g] + beta[g];
      E::store(maps + g * stride + at, !kMasked || is_visible(vec(of_mask + g * ld_terms + at)) ? map : Vec{});
    };
    const auto normalise = [=](int64_t at, const auto& mixed) {
      constexpr int kHeads = sizeof mixed / sizeof mixed[0], kVecs = sizeof mixed[0] / sizeof(Vec);
      Vec even[kVecs] = {}, odd[kVecs] = {}, inverse[kVecs];
#pragma GCC unroll 16
      for (int g = 0; g < kHeads; g++)
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; v++) (g % 2 == 0 ? even : odd)[v] += mixed[g][v] * mixed[g][v];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; v++) inverse[v] = 1.0f / square_root((even[v] + odd[v]) * share + eps);
#pragma GCC unroll 16
      for (int g = 0; g < kHeads; g++)
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; v++) put_normalised(at + v * kLanes, g, mixed[g][v], inverse[v]);
    };
    const Weights weights{weight, heads_out_, heads_, m_.shift};
    if (reattn::REATTN_ISA::mix<Order::kColumns>(heads, weights, s_.probs, plan_.ld_block, size, normalise)) return;
    float* mixed = row(s_.maps, 0, r);
    mix_to<Order::kColumns>(heads, weights, s_.probs, plan_.ld_block, size, mixed, ld_mixed);
    for (int64_t at = 0; at < size; at += kLanes) {
      Vec even{}, odd{};
      for (int64_t g = 0; g < heads; g++) {
        const Vec map = vec(mixed + g * ld_mixed + at);
        (g % 2 == 0 ? even : odd) += map * map;
      }
      const Vec inverse = 1.0f / square_root((even + odd) * share + eps);
      for (int64_t g = 0; g < heads; g++) put_normalised(at, g, vec(mixed + g * ld_mixed + at), inverse);
    }
  }

  // From mixed maps to the normalised ones, with store, and from the gradients of these to those of the mixed ones,
  // both in place; with sum, sums for the parameters.
  template <bool kMasked>
  void norm_backward(int64_t r, int64_t key, int64_t vecs, bool sum, bool store) {
    if (!m_.over_heads) return scale_backward<kMasked>(r, key, vecs, sum, store);
    int64_t at = key;
    for (; at + kLanes < key + vecs * kLanes; at += 2 * kLanes) normalise_backward<kMasked, 2>(r, at, sum, store);
    if (at < key + vecs * kLanes) normalise_backward<kMasked, 1>(r, at, sum, store);
  }

  // Layer norm, kVecs vectors of keys at once so that none waits for the other's sums over heads. What all heads share
  // is taken away: weight sums to zero over them.
  template <bool kMasked, int kVecs>
  void normalise_backward(int64_t r, int64_t at, bool sum, bool store) {
    const int64_t ld = plan_.ld_head, maps_stride = operand_stride(), heads = heads_out_, ld_terms = ld_terms_;
    const float *mixed = row(s_.maps, 0, r) + at, *gamma = m_.gamma, *beta = m_.beta, *of_mask = s_.terms + at,
                share = 1.0f / float(heads);
    float *grads = row(s_.grad_maps, 0, r) + at, *gamma_sums = s_.norm_sums, *beta_sums = gamma_sums + heads * kLanes;
    Operand* maps = operands(s_.maps, r) + at;
    Vec squares[kVecs] = {}, mean[kVecs] = {}, along[kVecs] = {}, inverse[kVecs];
    for (int64_t g = 0; g < heads; g++)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; v++) {
        const Vec map = vec(mixed + g * ld + v * kLanes), scaled = vec(grads + g * ld + v * kLanes) * gamma[g];
        squares[v] += map * map;
        mean[v] += scaled;
        along[v] += scaled * map;
      }
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; v++) {
      inverse[v] = 1.0f / square_root(squares[v] * share + m_.eps);
      // Without eps it may be infinite there.
      if (kMasked) inverse[v] = visible_to_any(at + v * kLanes) ? inverse[v] : Vec{};
      mean[v] *= share;
      along[v] *= share * inverse[v];
    }
    for (int64_t g = 0; g < heads; g++) {
      Vec gamma_sum{}, beta_sum{};
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; v++) {
        const Vec unit = vec(mixed + g * ld + v * kLanes) * inverse[v], grad = vec(grads + g * ld + v * kLanes);
        put(grads + g * ld + v * kLanes, (grad * gamma[g] - mean[v] - unit * along[v]) * inverse[v]);
        gamma_sum += grad * unit;
        beta_sum += grad;
        if (!store) continue;
        const Vec map = unit * gamma[g] + beta[g];
        E::store(maps + g * maps_stride + v * kLanes,
                 !kMasked || is_visible(vec(of_mask + g * ld_terms + v * kLanes)) ? map : Vec{});
      }
      if (!sum) continue;
      put(gamma_sums + g * kLanes, vec(gamma_sums + g * kLanes) + gamma_sum);
      put(beta_sums + g * kLanes, vec(beta_sums + g * kLanes) + beta_sum);
    }
  }

  // Batch norm left an affine map of every head: A has unit variance, and the statistics' part in its gradient is
  // known.
  template <bool kMasked>
  void scale_backward(int64_t r, int64_t key, int64_t vecs, bool sum, bool store) {
    const bool statistics = m_.common;
    for (int64_t g = 0; g < heads_out_; g++) {
      const float *mixed = row(s_.maps, g, r) + key, *of_mask = terms(g) + key;
      float* grads = row(s_.grad_maps, g, r) + key;
      Operand* maps = operands(s_.maps, r) + g * operand_stride() + key;
      const float gamma = m_.gamma[g], beta = m_.beta[g], common = statistics ? m_.common[g] : 0,
                  along = statistics ? m_.along[g] : 0;
      Vec gamma_sum{}, beta_sum{};
      // Running statistics have no gradient, which NaN in the maps must not make one of.
      for (int64_t i = 0; i < vecs * kLanes; i += kLanes) {
        Vec unit = vec(mixed + i);
        const Vec grad = vec(grads + i);
        const VecI visible = kMasked ? is_visible(vec(of_mask + i)) : VecI{};
        if (kMasked) unit = visible ? unit : Vec{};  // may be NaN, if another head sees the key
        gamma_sum += grad * unit;
        beta_sum += grad;
        Vec of_mixed = statistics ? grad * gamma - common - unit * along : grad * gamma, map = unit * gamma + beta;
        if (kMasked) {
          of_mixed = visible ? of_mixed : Vec{};
          map = visible ? map : Vec{};
        }
        put(grads + i, of_mixed);
        if (store) E::store(maps + i, map);
      }
      if (!sum) continue;
      float *gamma_sums = s_.norm_sums + g * kLanes, *beta_sums = gamma_sums + heads_out_ * kLanes;
      put(gamma_sums, vec(gamma_sums) + gamma_sum);
      put(beta_sums, vec(beta_sums) + beta_sum);
    }
  }

  const Job& job_;
  const Problem& p_;
  const Mixing& m_;
  const Plan& plan_;
  Scratch<E>& s_;
  int64_t sample_, first_row_, rows_, heads_, heads_out_;
  int64_t first_key_ = 0, keys_ = 0;
  Span span_{1};
  Scores products_, exponents_;
  Mask mask_;
  int64_t ld_terms_, end_key_ = p_.seqlen_k;
  // Of these keys: whether the mask differs between rows; whether it does anything; whether values are not finite.
  bool by_row_ = false, masked_ = false, spoilt_ = false;
  double* grad_mask_ = nullptr;
  Dropout dropout_;
  float kept_;
};

// What the products need around them.
template <class E>
struct Session {
  Session() { E::begin(); }
  ~Session() { E::end(); }
};

// The unit'th block of rows of the wave.
struct Unit {
  int64_t sample, first_row, rows;

  Unit(const Job& job, int64_t unit) {
    const int64_t blocks = job.plan.blocks, block = unit % blocks;
    sample = job.first + unit / blocks;
    // Those that see the most keys come first, so that threads end at one time.
    first_row = (job.problem.mask.causal ? blocks - 1 - block : block) * job.plan.block_rows;
    rows = smaller(job.plan.block_rows, job.problem.seqlen - first_row);
  }
};

template <class E>
bool whole_rows(const Job& job, const Block<E>& block) {
  return job.plan.block_keys >= block.end_key();
}

template <class E>
void find_lse(const Job& job, Block<E>& block) {
  for (int64_t key = 0; key < block.end_key(); key += job.plan.block_keys) {
    block.set_keys(key);
    block.compute_scores();
    block.continue_lse(key == 0);
  }
  block.store_lse();
}

// Rows whose sums are kept in float32 at most: rounding errors grow with their number.
constexpr int64_t kFlushRows = 8;

// Moves such sums, a vector each, to the unit's in float64.
void flush(float* sums, int64_t count, double* to) {
  for (int64_t i = 0; i < count; i++) to[i] += wide_sum(load(sums + i * kLanes));
  std::memset(sums, 0, count * sizeof(Vec));
}

// Does the stages of a unit; benchmarks/cpu_stages.cpp has one that times them.
struct Untimed {
  template <class Work>
  void operator()(const char*, Work work) const {
    work();
  }
};

template <class E, class Stage = Untimed>
void forward(const Job& job, int64_t index, char* memory) {
  const Stage stage;
  const Session<E> session;
  const Unit unit(job, index);
  Scratch<E> scratch(job, false, memory);
  Block<E> block(job, scratch, unit.sample, unit.first_row, unit.rows);
  const int64_t heads_out = job.problem.heads_out;
  std::memset(scratch.norm_sums, 0, 2 * heads_out * sizeof(Vec));
  stage("load queries", [&] { block.load_queries(false); });
  const bool lse_known = !whole_rows(job, block);
  if (lse_known) stage("sweep for the LSE", [&] { find_lse(job, block); });
  double* partial = job.work.partial + index * job.partial_size;
  for (int64_t key = 0; key < block.end_key(); key += job.plan.block_keys) {
    block.set_keys(key);
    stage("scores", [&] { block.compute_scores(); });
    for (int64_t r = 0; r < unit.rows; r++) {
      stage("softmax", [&] { block.softmax(r, lse_known, false); });
      stage("mixing and norm", [&] { block.mix(r, block.weights(lse_known)); });
      if (!job.mixing.sum_maps) continue;
      block.add_counts(partial + 2 * heads_out);
      if (r % kFlushRows == kFlushRows - 1 || r == unit.rows - 1) flush(scratch.norm_sums, 2 * heads_out, partial);
    }
    stage("product with values", [&] { block.multiply_values(); });
  }
  stage("store the output", [&] { block.store_outs(job.problem.out, heads_out); });
}

// Some queries of one sample and head.
struct Queries {
  int64_t sample, head, first, end;

  Queries(const Problem& p, int64_t index) {
    const int64_t stretches = stretches_of_queries(p, kStretch), stretch = index % stretches;
    sample = index / stretches / p.heads_out;
    head = index / stretches % p.heads_out;
    first = stretch * kStretch;
    end = stretch == stretches - 1 ? p.seqlen : first + kStretch;
  }
};

// Sums of the values up to each query's own position, or of all, where the mask has one row for all queries.
void sum_values_so_far(const Problem& p, const Mask& mask, const Queries& queries) {
  const int64_t padded = round_up(p.head_dim, kLanes);
  float terms[kStretch], row[128 + kLanes], so_far[128 + kLanes] = {}, sums[128 + kLanes] = {};
  for (int64_t key = 0; key < p.seqlen_k; key++) {
    const int64_t at = key % kStretch;
    if (at == 0) {
      mask.load_terms(queries.sample, queries.head, p.seqlen_k, key, smaller(kStretch, p.seqlen_k - key), terms);
      for (int64_t d = 0; d < padded; d += kLanes) store(so_far + d, load(so_far + d) + load(sums + d));
      std::memset(sums, 0, sizeof sums);
    }
    if (terms[at] != -kInfinity) {
      const char* value = row_of(p.value, p.dtype, queries.sample, queries.head, key);
      load_row(p.dtype, value, p.value.dim, p.head_dim, row, padded);
      for (int64_t d = 0; d < padded; d += kLanes) store(sums + d, load(sums + d) + load(row + d));
    }
    // All queries that see the last key see the same.
    const int64_t first = p.mask.causal ? key : 0, end = key == p.seqlen_k - 1 ? p.seqlen : p.mask.causal ? key + 1 : 0;
    for (int64_t r = first; r < smaller(end, p.seqlen); r++) {
      float* to = value_sum(p, queries.sample, queries.head, r);
      for (int64_t d = 0; d < p.head_dim; d++) to[d] = so_far[d] + sums[d];
    }
  }
}

// Sums of the values that each query sees.
void sum_values(const Job& job, int64_t index) {
  const Problem& p = job.problem;
  const Mask mask(p);
  const Queries queries(p, index);
  if (!mask.given_by_row()) return sum_values_so_far(p, mask, queries);
  const int64_t rows = queries.end - queries.first, padded = round_up(p.head_dim, kLanes),
                end = p.mask.causal ? smaller(queries.end, p.seqlen_k) : p.seqlen_k;
  float seen[kStretch * kStretch], values[kStretch * (128 + kLanes)], sums[kStretch * (128 + kLanes)];
  for (int64_t key = 0; key < end; key += kStretch) {
    const int64_t keys = smaller(kStretch, end - key);
    float ones[kStretch];
    for (int64_t j = 0; j < keys; j++) {
      const char* value = row_of(p.value, p.dtype, queries.sample, queries.head, key + j);
      load_row(p.dtype, value, p.value.dim, p.head_dim, values + j * padded, padded);
      ones[j] = 1;
    }
    // What is not finite is taken for zeros, and is NaN where it is seen.
    for (int64_t j = 0; !is_finite(values, keys * padded) && j < keys; j++)
      if (!is_finite(values + j * padded, padded)) {
        std::memset(values + j * padded, 0, size_t(padded) * sizeof(float));
        ones[j] = kNaN;
      }
    for (int64_t r = 0; r < rows; r++) {
      float* row = seen + r * kStretch;
      mask.load_terms(queries.sample, queries.head, queries.first + r, key, keys, row);
      for (int64_t j = 0; j < keys; j += kLanes) store(row + j, is_visible(load(row + j)) ? load(ones + j) : Vec{});
    }
    if (key == 0)
      product<Order::kRows, Start::kZero>(rows, padded, keys, seen, kStretch, values, padded, sums, padded);
    else
      product<Order::kRows, Start::kAccumulate>(rows, padded, keys, seen, kStretch, values, padded, sums, padded);
  }
  for (int64_t r = 0; r < rows; r++)
    std::memcpy(value_sum(p, queries.sample, queries.head, queries.first + r), sums + r * padded,
                size_t(p.head_dim) * sizeof(float));
}

// Some rows of one sample, of all heads.
struct Rows {
  int64_t sample, first, end;

  Rows(const Problem& p, int64_t index) {
    const int64_t stretches = (p.seqlen + kStretch - 1) / kStretch;
    sample = index / stretches;
    first = index % stretches * kStretch;
    end = smaller(first + kStretch, p.seqlen);
  }
};

// out = slope out + level value_sum.
void finish(const Job& job, int64_t index) {
  const Problem& p = job.problem;
  const Rows rows(p, index);
  const int64_t padded = round_up(p.head_dim, kLanes);
  float row[128 + kLanes];
  for (int64_t r = rows.first; r < rows.end; r++)
    for (int64_t g = 0; g < p.heads_out; g++) {
      if (r + kAhead < rows.end) prefetch_row<true>(p.out, p.dtype, rows.sample, g, r + kAhead, p.head_dim);
      const float *sums = value_sum(p, rows.sample, g, r), slope = job.mixing.slope[g], level = job.mixing.level[g];
      char* out = row_of(p.out, p.dtype, rows.sample, g, r);
      load_row(p.dtype, out, p.out.dim, p.head_dim, row, padded);
      int64_t d = 0;
      for (; d + kLanes <= p.head_dim; d += kLanes) store(row + d, load(row + d) * slope + load(sums + d) * level);
      for (; d < p.head_dim; d++) row[d] = row[d] * slope + sums[d] * level;
      store_row(p.dtype, out, p.out.dim, p.head_dim, row);
    }
}

// The keys, to whole vectors, to which blocks up to end have gradients: with a causal mask a query sees none behind it.
int64_t end_of_columns(const Job& job, int64_t end_block) {
  const int64_t end_row = smaller(end_block * job.plan.block_rows, job.problem.seqlen);
  return job.problem.mask.causal ? smaller(round_up(end_row, kColumns), job.plan.keys) : job.plan.keys;
}

// What a thread does of the backward pass of some samples: the blocks of a group, or one of them.
struct BackwardUnit {
  int64_t part, number, group, first, end;

  BackwardUnit(const Job& job, int64_t index) : part(index / job.units()), number(index % job.units()) {
    group = job.first_group;
    first = job.first_block(group) + number, end = first + 1;
    if (job.plan.by_block) {
      while (job.end_block(group) <= first) group++;
    } else {
      group += number;
      first = job.first_block(group), end = job.end_block(group);
    }
  }
};

template <class E, class Stage = Untimed>
void backward(const Job& job, int64_t index, char* memory) {
  const Stage stage;
  const Session<E> session;
  const Problem& p = job.problem;
  const Plan& plan = job.plan;
  const BackwardUnit unit(job, index);
  Scratch<E> scratch(job, true, memory);
  const int64_t products = (p.heads + 1) * p.heads_out, score_products = job.mixing.of_scores ? p.heads * p.heads : 0;
  std::memset(scratch.products, 0, products * sizeof(Vec));
  std::memset(scratch.norm_sums, 0, 2 * p.heads_out * sizeof(Vec));
  std::memset(scratch.score_products, 0, score_products * sizeof(Vec));
  const int64_t column = p.head_dim * plan.ld_keys;
  for (int64_t sample = unit.part; sample < job.samples; sample += plan.parts) {
    const int64_t at = (sample * plan.slots + job.slot(unit.number)) * column;
    float *grad_key = job.work.grad_key + at * p.heads, *grad_value = job.work.grad_value + at * p.heads_out;
    for (int64_t b = unit.first; b < unit.end; b++) {
      const int64_t row = b * plan.block_rows, rows = smaller(plan.block_rows, p.seqlen - row);
      double* partial = job.work.partial + (sample * plan.blocks + b) * job.partial_size;
      Block<E> block(job, scratch, job.first + sample, row, rows);
      stage("load queries and gradients", [&] { block.load_queries(true); });
      block.set_grad_mask(unit.part, unit.group);
      const bool whole = whole_rows(job, block);
      for (int sweep = whole ? 1 : 0; sweep < 2; sweep++) {
        for (int64_t key = 0; key < block.end_key(); key += plan.block_keys) {
          block.set_keys(key);
          stage("scores", [&] { block.compute_scores(); });
          stage("gradients of the maps", [&] { block.compute_grad_maps(); });
          stage("softmax, mixing, norm and back", [&] {
            for (int64_t r = 0; r < rows; r++) {
              block.backward_row(r, whole || sweep == 0, sweep == 1);
              if (r % kFlushRows == kFlushRows - 1 || r == rows - 1) {
                flush(scratch.products, products, partial);
                flush(scratch.norm_sums, 2 * p.heads_out, partial + products);
                flush(scratch.score_products, score_products, partial + products + 2 * p.heads_out);
              }
            }
          });
          if (sweep == 0) continue;
          stage("gradients of keys and values", [&] { block.add_grad_columns(grad_key, grad_value, b == unit.first); });
          stage("gradient of queries", [&] { block.multiply_keys(); });
        }
      }
      if (b == unit.first) block.clear_grad_columns(grad_key, grad_value, end_of_columns(job, unit.end));
      stage("store the gradient of queries", [&] { block.store_outs(p.grad_query, p.heads); });
    }
  }
}

// Which sample of the wave, and which stretch of its keys, a unit of packing and reducing is.
struct Stretch {
  int64_t sample, first, end;

  Stretch(const Job& job, int64_t index) {
    const int64_t stretches = (job.plan.keys + kStretch - 1) / kStretch;
    sample = index / stretches;
    first = index % stretches * kStretch;
    end = smaller(first + kStretch, job.plan.keys);
  }
};

// Packs four rows of keys or values some of which are not finite: NaN for these among the columns, so that what is made
// of them is NaN; zeros among the rows, where sums also meet them for queries that do not see them. Notes which.
template <class E>
void pack_spoilt(const Problem& p, const Tensor& t, const char* from, int64_t first, const Plan& plan,
                 typename E::Operand* columns, typename E::Operand* rows, uint8_t* spoilt) {
  const int64_t size = int64_t(bytes(p.dtype)), row_bytes = p.head_dim * size;
  const int64_t inside = smaller(4, p.seqlen_k - first);
  alignas(64) char four[4 * 128 * 4];
  const Tensor copy{four, 0, 0, p.head_dim, 1};
  const auto pack = [&](int fill, typename E::Operand* to_columns, typename E::Operand* to_rows) {
    for (int64_t r = 0; r < inside; r++) {
      const char* row = from + r * t.row * size;
      char* target = four + r * row_bytes;
      for (int64_t d = 0; d < p.head_dim; d++) std::memcpy(target + d * size, row + d * t.dim * size, size_t(size));
      const bool is_spoilt = !are_finite(p.dtype, row, t.row, 1, t.dim, p.head_dim);
      if (is_spoilt) std::memset(target, fill, size_t(row_bytes));
      if (spoilt) spoilt[r] = is_spoilt;
    }
    E::pack_four(p.dtype, four, copy, first, p.seqlen_k, p.head_dim, plan, to_columns, to_rows);
  };
  pack(0xff, columns, nullptr);  // in every dtype NaN
  pack(0, nullptr, rows);
}

// Keys and values, all heads, in the orders that the products read.
template <class E>
void pack(const Job& job, int64_t index, bool backward) {
  using Operand = typename E::Operand;
  const Problem& p = job.problem;
  const Plan& plan = job.plan;
  const Stretch stretch(job, index);
  const int64_t column_size = plan.packed_keys * plan.depth, row_size = plan.keys * plan.ld_dim;
  const auto pack_panel = [&](const Tensor& t, int64_t heads, int64_t head, int64_t panel, char* columns, char* rows,
                              uint8_t* spoilt) {
    if (!columns && !rows) return;
    const auto part = [&](char* of, int64_t size) {
      return of ? reinterpret_cast<Operand*>(of) + (stretch.sample * heads + head) * size : nullptr;
    };
    const int64_t end = smaller(panel + kPanel, stretch.end), inside = smaller(end, p.seqlen_k) - panel;
    const auto row = [&](int64_t key) { return row_of(t, p.dtype, job.first + stretch.sample, head, key); };
    const bool finite = !p.mask.any() || are_finite(p.dtype, row(panel), t.row, inside, t.dim, p.head_dim);
    uint8_t* notes = spoilt ? spoilt + (stretch.sample * heads + head) * plan.keys : nullptr;
    if (notes) std::memset(notes + panel, 0, size_t(end - panel));
    for (int64_t key = panel; key < end; key += 4) {
      for (int64_t next = key; head + 1 < heads && next < smaller(key + 4, p.seqlen_k); next++)
        prefetch_row<false>(t, p.dtype, job.first + stretch.sample, head + 1, next, p.head_dim);
      if (finite)
        E::pack_four(p.dtype, row(key), t, key, p.seqlen_k, p.head_dim, plan, part(columns, column_size),
                     part(rows, row_size));
      else
        pack_spoilt<E>(p, t, row(key), key, plan, part(columns, column_size), part(rows, row_size),
                       notes ? notes + key : nullptr);
    }
  };
  for (int64_t panel = stretch.first; panel < stretch.end; panel += kPanel) {
    for (int64_t h = 0; h < p.heads; h++)
      pack_panel(p.key, p.heads, h, panel, job.work.key_columns, backward ? job.work.key_rows : nullptr, nullptr);
    for (int64_t g = 0; g < p.heads_out; g++)
      pack_panel(p.value, p.heads_out, g, panel, backward ? job.work.value_columns : nullptr, job.work.value_rows,
                 job.work.spoilt);
  }
  if (!job.work.value_sums) return;
  const int64_t padded = round_up(p.head_dim, kLanes), sample = job.first + stretch.sample;
  const Mask mask(p);
  float row[128 + kLanes], sums[128 + kLanes], terms[kStretch];
  for (int64_t h = 0; h < p.heads_out; h++) {
    std::memset(sums, 0, sizeof sums);
    // None where the last stretch is padding alone.
    const int64_t end = smaller(stretch.end, p.seqlen_k);
    if (p.mask.any() && end > stretch.first) mask.load_terms(sample, h, 0, stretch.first, end - stretch.first, terms);
    // In float32 they are packed as they are, but for those that a mask may hide.
    const bool packed = E::kGroup == 1 && !p.mask.any();
    const float* rows = reinterpret_cast<const float*>(job.work.value_rows) +
                        (stretch.sample * p.heads_out + h) * row_size + stretch.first * plan.ld_dim;
    for (int64_t key = stretch.first; key < end; key++, rows += plan.ld_dim) {
      if (p.mask.any() && terms[key - stretch.first] == -kInfinity) continue;
      if (!packed) load_row(p.dtype, row_of(p.value, p.dtype, sample, h, key), p.value.dim, p.head_dim, row, padded);
      const float* from = packed ? rows : row;
      for (int64_t d = 0; d < padded; d += kLanes) store(sums + d, load(sums + d) + load(from + d));
    }
    const int64_t stretches = (plan.keys + kStretch - 1) / kStretch;
    std::memcpy(job.work.value_sums + ((sample * stretches + stretch.first / kStretch) * p.heads_out + h) * p.head_dim,
                sums, size_t(p.head_dim) * sizeof(float));
  }
}

// Which slots are summed for some keys: those of a group first, then the groups.
struct Slots {
  int64_t groups = 0, begin[kMostGroups + 1], end[kMostGroups + 1];

  Slots(const Job& job, int64_t key) {
    if (job.first_group > 0) add(0, 1);
    int64_t unit = 0;
    for (int64_t group = job.first_group; group < job.end_group; group++) {
      const int64_t end = unit + (job.plan.by_block ? job.end_block(group) - job.first_block(group) : 1);
      // The first ones may not reach the keys.
      while (unit < end && end_of_columns(job, job.plan.by_block ? job.first_block(job.first_group) + unit + 1
                                                                 : job.end_block(group)) <= key)
        unit++;
      if (unit < end) add(job.slot(unit), job.slot(end));
      unit = end;
    }
  }

  Vec sum(const float* from, int64_t size) const {
    Vec total{};
    for (int64_t group = 0; group < groups; group++) {
      Vec part = load(from + begin[group] * size);
      for (int64_t slot = begin[group] + 1; slot < end[group]; slot++) part += load(from + slot * size);
      total = group == 0 ? part : total + part;
    }
    return total;
  }

 private:
  void add(int64_t first, int64_t last) { begin[groups] = first, end[groups++] = last; }
};

// Sums the units' gradients of keys and values and stores them: in slot 0 where more groups follow.
void reduce(const Job& job, int64_t index) {
  const Problem& p = job.problem;
  const Plan& plan = job.plan;
  const Stretch stretch(job, index);
  const bool more = job.end_group < plan.groups;
  const int64_t padded = round_up(p.head_dim, 4), heads[] = {p.heads, p.heads_out};
  float sums[128 * kColumns], rows[kColumns * 128];
  std::memset(sums, 0, sizeof sums);
  float* sources[] = {job.work.grad_key, job.work.grad_value};
  const Tensor targets[] = {p.grad_key, p.grad_value};
  for (int64_t key = stretch.first; key < smaller(stretch.end, p.seqlen_k); key += kColumns) {
    const Slots slots(job, key);
    for (int which = 0; which < 2; which++)
      for (int64_t h = 0; h < heads[which]; h++) {
        const int64_t size = heads[which] * p.head_dim * plan.ld_keys, sample = job.first + stretch.sample;
        float* source = sources[which] + stretch.sample * plan.slots * size + h * p.head_dim * plan.ld_keys + key;
        for (int64_t d = 0; d < p.head_dim; d++)
          for (int64_t i = 0; i < kColumns; i += kLanes) {
            float* from = source + d * plan.ld_keys + i;
            store(more ? from : sums + d * kColumns + i, slots.sum(from, size));
          }
        if (more) continue;
        transpose(sums, kColumns, padded, kColumns, rows, padded);
        for (int64_t i = 0; i < smaller(kColumns, p.seqlen_k - key); i++) {
          if (h + 1 < heads[which]) prefetch_row<true>(targets[which], p.dtype, sample, h + 1, key + i, p.head_dim);
          store_row(p.dtype, row_of(targets[which], p.dtype, sample, h, key + i), targets[which].dim, p.head_dim,
                    rows + i * padded);
        }
      }
  }
}

// Sums by head of grad * out and of grad * value_sum.
void grad_sums(const Job& job, int64_t index) {
  const Problem& p = job.problem;
  const Rows rows(p, index);
  const int64_t padded = round_up(p.head_dim, kLanes), heads = p.heads_out;
  float grad[128 + kLanes], out[128 + kLanes], values[128 + kLanes] = {}, sums[2 * kMostHeads * kLanes] = {};
  double* partial = job.work.partial + index * job.partial_size;
  for (int64_t r = rows.first; r < rows.end; r++) {
    for (int64_t g = 0; g < heads; g++) {
      if (r + kAhead < rows.end) {
        prefetch_row<false>(p.grad, p.dtype, rows.sample, g, r + kAhead, p.head_dim);
        prefetch_row<false>(p.out, p.dtype, rows.sample, g, r + kAhead, p.head_dim);
      }
      load_row(p.dtype, row_of(p.grad, p.dtype, rows.sample, g, r), p.grad.dim, p.head_dim, grad, padded);
      load_row(p.dtype, row_of(p.out, p.dtype, rows.sample, g, r), p.out.dim, p.head_dim, out, padded);
      std::memcpy(values, value_sum(p, rows.sample, g, r), size_t(p.head_dim) * sizeof(float));
      Vec of_out{}, of_values{};
      for (int64_t d = 0; d < padded; d += kLanes) {
        of_out += load(grad + d) * load(out + d);
        of_values += load(grad + d) * load(values + d);
      }
      float *to_out = sums + g * kLanes, *to_values = to_out + heads * kLanes;
      store(to_out, load(to_out) + of_out);
      store(to_values, load(to_values) + of_values);
    }
    if ((r - rows.first) % kFlushRows == kFlushRows - 1 || r == rows.end - 1) flush(sums, 2 * heads, partial);
  }
}

template <class E>
constexpr Kernels table(int64_t row_tile) {
  return {kLanes,    row_tile,         kPanel,      kStretch,   sizeof(typename E::Operand),
          E::kGroup, scratch_bytes<E>, pack<E>,     forward<E>, sum_values,
          finish,    grad_sums,        backward<E>, reduce};
}

// constexpr, so that nothing of this instruction set runs when the library is loaded.
extern const Kernels kFloat32;
constexpr Kernels kFloat32 = table<Float32>(kRowTile);
#if defined(REATTN_AMX)
extern const Kernels kBFloat16;
constexpr Kernels kBFloat16 = table<BFloat16Tiles>(BFloat16Tiles::kTile);
#elif defined(REATTN_BFLOAT16)
extern const Kernels kBFloat16;
constexpr Kernels kBFloat16 = table<BFloat16Dots>(kRowTile);
#endif

}  // namespace REATTN_ISA
}  // namespace reattn
