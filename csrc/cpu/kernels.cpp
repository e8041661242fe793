// Re-attention for one instruction set: compiled once for each, with that set's flags and its name as REATTN_ISA.
//
// A unit of work holds the maps of some query rows and all heads in the L2 cache, and goes over them row by row:
// softmax, mixing and norm of a row stay in the L1 cache. Derivations: docs/operator.md. Nothing of the C++ library
// is used that the linker could share with code for another instruction set.

#include "kernels.h"

#include "bfloat16.h"
#include "products.h"
#include "rows.h"
#include "scores.h"

namespace reattn {
namespace REATTN_ISA {

// Keys that are packed and reduced as a unit: whole panels of any instruction set.
constexpr int64_t kStretch = 48;
static_assert(kStretch % kPanel == 0 && kStretch % 16 == 0);

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

// A thread's memory. A name in the plural has a part for each head.
template <class E>
struct Scratch {
  using Operand = typename E::Operand;

  Operand *queries, *grads;      // [block_rows, depth]
  Operand *queries_t, *grads_t;  // the same transposed, where products need it
  float* maps;                   // [block_rows, ld_block]: scores, then mixed maps
  float* grad_maps;              // gradients of the mixed maps, then of the scores
  float* probs;                  // a row of softmax maps [heads, ld_block], of ones, and before dropout again [heads]
  float* grad_probs;             // gradients of a row of softmax maps [heads, ld_block]
  float *mixed, *grad_mixed;     // [heads, tile_keys]
  float* weight;                 // of this row, [heads, heads]
  float* outs;                   // [block_rows, ld_dim]
  float *largest, *sums;         // [heads, block_rows]; in the backward pass, delta
  float *products, *norm_sums;   // a vector each: [heads + 1, heads]; [2, heads], in the forward pass of A and A^2
  Operand* paired;               // a head's maps, rows in the order that products need
  size_t size;

  Scratch(const Job& job, bool backward, char* base) {
    const Plan& plan = job.plan;
    const int64_t heads = job.problem.heads, rows = plan.block_rows;
    Layout layout(base);
    queries = layout.take<Operand>(heads * rows * plan.depth);
    maps = layout.take<float>(heads * rows * plan.ld_block);
    probs = layout.take<float>((2 * heads + 1) * plan.ld_block);
    mixed = layout.take<float>(heads * plan.tile_keys);
    weight = layout.take<float>(heads * heads);
    outs = layout.take<float>(heads * rows * plan.ld_dim);
    largest = layout.take<float>(heads * rows);
    sums = layout.take<float>(heads * rows);
    norm_sums = layout.take<float>(2 * heads * kLanes);
    grads = queries_t = grads_t = paired = nullptr;
    grad_maps = grad_mixed = grad_probs = products = nullptr;
    if (backward) {
      products = layout.take<float>((heads + 1) * heads * kLanes);
      grads = layout.take<Operand>(heads * rows * plan.depth);
      grad_maps = layout.take<float>(heads * rows * plan.ld_block);
      grad_mixed = layout.take<float>(heads * plan.tile_keys);
      grad_probs = layout.take<float>(heads * plan.ld_block);
      if (E::kGroup > 1) {
        queries_t = layout.take<Operand>(heads * E::transposed_size(rows, plan.depth));
        grads_t = layout.take<Operand>(heads * E::transposed_size(rows, plan.depth));
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
        scores_(p_),
        dropout_(p_),
        kept_(float(1.0 / (1.0 - p_.dropout_p))) {}

  void load_queries(bool backward) {
    load(p_.query, s_.queries, s_.queries_t, backward);
    if (backward) load(p_.grad, s_.grads, s_.grads_t, backward);
  }

  void set_keys(int64_t first_key) {
    first_key_ = first_key;
    keys_ = smaller(plan_.block_keys, p_.seqlen_k - first_key);
    span_ = Span(keys_);
    float* ones = s_.probs + heads_ * plan_.ld_block;
    for (int64_t i = 0; i < span_.vecs; i++) {
      const Vec one = broadcast(1.0f);
      store(ones + i * kLanes, i == span_.vecs - 1 ? (span_.tail ? one : Vec{}) : one);
    }
  }

  void compute_scores() { product_with_columns(s_.queries, job_.work.key_columns, s_.maps); }
  void compute_grad_maps() { product_with_columns(s_.grads, job_.work.value_columns, s_.grad_maps); }

  // Continues each row's maximum and sum over this stretch of keys.
  void continue_lse(bool first) {
    for (int64_t h = 0; h < heads_; h++)
      for (int64_t r = 0; r < rows_; r++) {
        float &largest = s_.largest[h * plan_.block_rows + r], &sum = s_.sums[h * plan_.block_rows + r];
        const float* scores = row(s_.maps, h, r);
        const float most = scores_.largest(scores, span_);
        const float next = first || most > largest ? most : largest;
        // While all scores are -infinity the sum is zero; where they stay so, the LSE is -infinity and all maps are
        // NaN.
        const float shift = next == -kInfinity ? 0.0f : next;
        scores_.exponentiate(scores, s_.probs, span_, shift);
        sum = (first ? 0.0f : sum * __builtin_exp2f(largest - shift)) + sum_row(s_.probs, span_.vecs);
        largest = next;
      }
  }
  void store_lse() {
    for (int64_t h = 0; h < heads_; h++)
      for (int64_t r = 0; r < rows_; r++)
        lse(h, r) = s_.largest[h * plan_.block_rows + r] + __builtin_log2f(s_.sums[h * plan_.block_rows + r]);
  }

  // A row's softmax maps, from its scores; not yet divided by their sums, which are in sums, unless the LSE is known.
  void softmax(int64_t r, bool lse_known, bool keep_undropped) {
    for (int64_t h = 0; h < heads_; h++) {
      const float* scores = row(s_.maps, h, r);
      float* probs = s_.probs + h * plan_.ld_block;
      if (lse_known) {
        scores_.exponentiate(scores, probs, span_, lse(h, r));
      } else {
        const float shift = scores_.largest(scores, span_);
        scores_.exponentiate(scores, probs, span_, shift);
        s_.sums[h] = sum_row(probs, span_.vecs);
        lse(h, r) = shift + __builtin_log2f(s_.sums[h]);
      }
      if (p_.dropout_p > 0) {
        float* undropped = probs + (heads_ + 1) * plan_.ld_block;
        if (keep_undropped) std::memcpy(undropped, probs, span_.vecs * sizeof(Vec));
        dropout_.apply(probs, probs, span_.vecs * kLanes, sample_, h, first_row_ + r, first_key_);
      }
    }
  }

  // The weights for maps as softmax left them.
  const float* weights(bool lse_known) {
    if (lse_known && p_.dropout_p == 0) return m_.weight;
    const int64_t heads = heads_;
    const float *weight = m_.weight, kept = kept_;
    float* scaled = s_.weight;
    for (int64_t h = 0; h < heads; h++) {
      const float factor = kept * (lse_known ? 1.0f : 1.0f / s_.sums[h]);
      for (int64_t g = 0; g < heads; g++) scaled[h * heads + g] = weight[h * heads + g] * factor;
    }
    return scaled;
  }

  // The row's mixed and normalised maps, over its scores.
  void mix(int64_t r, const float* weight) {
    for (int64_t vec = 0; vec < span_.vecs; vec += plan_.tile_keys / kLanes) {
      const int64_t vecs = smaller(plan_.tile_keys / kLanes, span_.vecs - vec), key = vec * kLanes;
      if (m_.over_heads) {
        mix_tile(key, vecs, weight, s_.mixed, plan_.tile_keys);
        normalise(vecs, operands(s_.maps, r) + key);
      } else {
        mix_tile_into_maps(r, key, vecs, weight);
      }
    }
    pad_maps(s_.maps, r);
  }

  // Adds the row's mixed maps, and their squares, to the sums by head; some of its keys, from vec on, ld apart by head.
  void add_moments(const float* mixed, int64_t ld, int64_t vec, int64_t vecs) {
    const bool ends = vec + vecs == span_.vecs;
    for (int64_t g = 0; g < heads_; g++, mixed += ld) {
      float *sums = s_.norm_sums + g * kLanes, *squares = sums + heads_ * kLanes;
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
    for (int64_t g = 0; g < heads_; g++) multiply_rows(s_.maps, g, job_.work.value_rows);
  }
  void multiply_keys() {
    for (int64_t h = 0; h < heads_; h++) multiply_rows(s_.grad_maps, h, job_.work.key_rows);
  }
  void store_outs(const Tensor& to) {
    for (int64_t r = 0; r < rows_; r++)
      for (int64_t h = 0; h < heads_; h++)
        store_row(p_.dtype, row_of(to, p_.dtype, sample_, h, first_row_ + r), to.dim, p_.head_dim,
                  s_.outs + (h * plan_.block_rows + r) * plan_.ld_dim);
  }

  // One row of the backward pass: delta and the sums for the parameters' gradients in the first sweep, the mixed maps
  // and the gradient of the scores, over maps and grad_maps, in the second; one sweep does both where all keys fit.
  void backward_row(int64_t r, bool first_sweep, bool second_sweep) {
    const bool dropped = p_.dropout_p > 0;
    softmax(r, true, true);
    const float kept = kept_;
    const int64_t ld = plan_.ld_block, stride = plan_.block_rows * ld;
    if (dropped)
      for (int64_t h = 0; h < heads_; h++)
        for (int64_t i = h * ld, end = i + span_.vecs * kLanes; i < end; i += kLanes)
          put(s_.probs + i, vec(s_.probs + i) * kept);
    for (int64_t v = 0; v < span_.vecs; v += plan_.tile_keys / kLanes) {
      const int64_t vecs = smaller(plan_.tile_keys / kLanes, span_.vecs - v), key = v * kLanes;
      const float* grad_mixed = row(s_.grad_maps, 0, r) + key;
      int64_t ld_mixed = stride;
      if (m_.gamma && !m_.over_heads) {
        mix_tile(key, vecs, m_.weight, s_.mixed, plan_.tile_keys);
        scale_backward(vecs, grad_mixed, first_sweep, second_sweep ? operands(s_.maps, r) + key : nullptr,
                       v + vecs == span_.vecs);
        grad_mixed = s_.grad_mixed;
        ld_mixed = plan_.tile_keys;
      } else if (m_.gamma) {
        mix_tile(key, vecs, m_.weight, s_.mixed, plan_.tile_keys);
        if (v + vecs == span_.vecs) {
          // Without eps the norm of padding, all zeros, would be NaN.
          float* last = s_.mixed + (vecs - 1) * kLanes;
          put(last, span_.tail ? vec(last) : broadcast(1.0f));
        }
        normalise_backward(vecs, grad_mixed, first_sweep, second_sweep ? operands(s_.maps, r) + key : nullptr);
        grad_mixed = s_.grad_mixed;
        ld_mixed = plan_.tile_keys;
      } else if (second_sweep) {
        mix_tile_into_maps(r, key, vecs, m_.weight);
      }
      if (first_sweep)
        dot_rows(heads_ + 1, heads_, vecs, s_.probs + key, ld, grad_mixed, ld_mixed, s_.products, heads_);
      // dP = W dA
      product<Order::kRows, Start::kZero>(heads_, vecs * kLanes, heads_, m_.weight, heads_, grad_mixed, ld_mixed,
                                          s_.grad_probs + key, ld);
    }
    for (int64_t h = 0; h < heads_; h++) {
      const float *probs = s_.probs + h * ld, *undropped = probs + (heads_ + 1) * ld,
                  *grad_probs = s_.grad_probs + h * ld;
      float &delta = s_.sums[h * plan_.block_rows + r], &mass = s_.largest[h * plan_.block_rows + r];
      if (first_sweep) {
        const float sum = dot_row(probs, grad_probs, span_.vecs),
                    share = sum_row(dropped ? undropped : probs, span_.vecs);
        delta = first_key_ == 0 ? sum : delta + sum;
        mass = first_key_ == 0 ? share : mass + share;
      }
      if (!second_sweep) continue;
      Operand* grad_scores = operands(s_.grad_maps, r) + h * operand_stride();
      // Maps from a rounded LSE do not quite sum to one; what all keys share in grad_probs would show it.
      const float along = delta / mass, scale = p_.scale;
      const int64_t end = span_.vecs * kLanes;
      if (dropped)
        for (int64_t i = 0; i < end; i += kLanes)
          E::store(grad_scores + i, (vec(probs + i) * vec(grad_probs + i) - vec(undropped + i) * along) * scale);
      else
        for (int64_t i = 0; i < end; i += kLanes)
          E::store(grad_scores + i, vec(probs + i) * (vec(grad_probs + i) - along) * scale);
    }
    if (second_sweep) {
      pad_maps(s_.maps, r);
      pad_maps(s_.grad_maps, r);
    }
  }

  // Adds these rows' part to the gradients of keys and values, [head_dim, keys] each.
  void add_grad_columns(float* grad_key, float* grad_value, bool first) {
    for (int64_t h = 0; h < heads_; h++) {
      const int64_t at = h * p_.head_dim * plan_.ld_keys + first_key_;
      add_columns(s_.queries, s_.queries_t, s_.grad_maps, h, grad_key + at, first);
      add_columns(s_.grads, s_.grads_t, s_.maps, h, grad_value + at, first);
    }
  }

 private:
  // Names of the class hide those of the namespace.
  static Vec vec(const float* from) { return reattn::REATTN_ISA::load(from); }
  static void put(float* to, Vec v) { reattn::REATTN_ISA::store(to, v); }

  float* row(float* maps, int64_t head, int64_t r) { return maps + (head * plan_.block_rows + r) * plan_.ld_block; }
  float& lse(int64_t head, int64_t r) { return p_.lse[(sample_ * heads_ + head) * p_.seqlen + first_row_ + r]; }
  int64_t packed(int64_t head) const { return (sample_ - job_.first) * heads_ + head; }

  void load(const Tensor& from, Operand* rows, Operand* transposed, bool backward) {
    const int64_t size = plan_.block_rows * plan_.depth;
    // Heads lie side by side in memory, as a rule: rows of all of them are read in one go.
    for (int64_t r = 0; r < rows_; r++)
      for (int64_t h = 0; h < heads_; h++)
        E::load_row(p_.dtype, row_of(from, p_.dtype, sample_, h, first_row_ + r), from.dim, p_.head_dim,
                    rows + h * size + r * plan_.depth, plan_.depth);
    if (backward)
      for (int64_t h = 0; h < heads_; h++)
        E::transpose_rows(rows + h * size, rows_, plan_.depth,
                          transposed + h * E::transposed_size(plan_.block_rows, plan_.depth));
  }

  // maps[h] = rows[h] columns[h] for these keys.
  void product_with_columns(const Operand* rows, const char* columns, float* maps) {
    const int64_t size = plan_.packed_keys * plan_.depth;
    for (int64_t h = 0; h < heads_; h++)
      E::product_with_panels(rows_, span_.vecs * kLanes, plan_.depth, rows + h * plan_.block_rows * plan_.depth,
                             plan_.depth,
                             reinterpret_cast<const Operand*>(columns) + packed(h) * size + first_key_ * plan_.depth,
                             row(maps, h, 0), plan_.ld_block);
  }

  // outs[head] (+)= maps[head] rows[head].
  void multiply_rows(float* maps, int64_t head, const char* rows) {
    const int64_t size = plan_.keys * plan_.ld_dim;
    const Operand* b = reinterpret_cast<const Operand*>(rows) + packed(head) * size + first_key_ * plan_.ld_dim;
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

  // A = W^T P + c for some keys of the row.
  void mix_tile(int64_t key, int64_t vecs, const float* weight, float* mixed, int64_t ld) {
    product<Order::kColumns, Start::kBias>(heads_, vecs * kLanes, heads_, weight, heads_, s_.probs + key,
                                           plan_.ld_block, mixed, ld, m_.shift);
  }

  void mix_tile_into_maps(int64_t r, int64_t key, int64_t vecs, const float* weight) {
    constexpr bool kInPlace = E::kGroup == 1;
    float* mixed = kInPlace ? row(s_.maps, 0, r) + key : s_.mixed;
    const int64_t ld = kInPlace ? plan_.block_rows * plan_.ld_block : plan_.tile_keys;
    mix_tile(key, vecs, weight, mixed, ld);
    if (m_.sum_maps) add_moments(mixed, ld, key / kLanes, vecs);
    if constexpr (!kInPlace) {
      for (int64_t g = 0; g < heads_; g++)
        for (int64_t i = 0; i < vecs * kLanes; i += kLanes)
          E::store(operands(s_.maps, r) + g * operand_stride() + key + i, vec(s_.mixed + g * plan_.tile_keys + i));
    }
  }

  // A row of maps as an operand of products, in the place of its float32 values; heads are operand_stride apart.
  Operand* operands(float* maps, int64_t r) { return reinterpret_cast<Operand*>(row(maps, 0, r)); }
  int64_t operand_stride() const {
    return plan_.block_rows * plan_.ld_block * int64_t(sizeof(float) / sizeof(Operand));
  }

  // Sums over keys run on to a whole group: nothing may stand there.
  void pad_maps(float* maps, int64_t r) {
    if (E::kGroup == 1) return;
    for (int64_t h = 0; h < heads_; h++) {
      Operand* operand = reinterpret_cast<Operand*>(row(maps, h, r));
      for (int64_t i = keys_; i < round_up(keys_, E::kGroup); i++) operand[i] = Operand{};
    }
  }

  // 1 / sqrt(mean over heads of A^2 + eps) for a vector of keys; heads are ld apart.
  static Vec inverse_root(const float* mixed, int64_t heads, int64_t ld, float eps) {
    Vec even{}, odd{};
    int64_t g = 0;
    for (; g + 1 < heads; g += 2) {
      const Vec a = vec(mixed + g * ld), b = vec(mixed + (g + 1) * ld);
      even += a * a;
      odd += b * b;
    }
    if (g < heads) even += vec(mixed + g * ld) * vec(mixed + g * ld);
    return 1.0f / square_root((even + odd) * (1.0f / float(heads)) + eps);
  }

  // What is stored may lie anywhere, for all the compiler knows: hot loops keep pointers and sizes in locals.
  void normalise(int64_t vecs, Operand* maps) {
    const int64_t stride = operand_stride(), tile = plan_.tile_keys, heads = heads_;
    const float *mixed = s_.mixed, *gamma = m_.gamma, *beta = m_.beta, eps = m_.eps;
    for (int64_t i = 0; i < vecs * kLanes; i += kLanes) {
      const Vec inverse = inverse_root(mixed + i, heads, tile, eps);
      for (int64_t g = 0; g < heads; g++)
        E::store(maps + g * stride + i, vec(mixed + g * tile + i) * inverse * gamma[g] + beta[g]);
    }
  }

  // From mixed maps and the gradient of the normalised ones to the gradient of the mixed ones and, unless null, to the
  // normalised maps. What all heads share is taken away: weight sums to zero over them.
  void normalise_backward(int64_t vecs, const float* grad_maps, bool sum_parameters, Operand* maps) {
    const int64_t stride = plan_.block_rows * plan_.ld_block, maps_stride = operand_stride(), tile = plan_.tile_keys,
                  heads = heads_;
    const float *mixed = s_.mixed, *gamma = m_.gamma, *beta = m_.beta, eps = m_.eps, share = 1.0f / float(heads);
    float *gamma_sums = s_.norm_sums, *beta_sums = s_.norm_sums + heads * kLanes, *grad_mixed = s_.grad_mixed;
    for (int64_t i = 0; i < vecs * kLanes; i += kLanes) {
      const Vec inverse = inverse_root(mixed + i, heads, tile, eps);
      Vec mean{}, along{};
      for (int64_t g = 0; g < heads; g++) {
        const Vec unit = vec(mixed + g * tile + i) * inverse, grad = vec(grad_maps + g * stride + i);
        const Vec scaled = grad * gamma[g];
        mean += scaled;
        along += scaled * unit;
        if (sum_parameters) {
          put(gamma_sums + g * kLanes, vec(gamma_sums + g * kLanes) + grad * unit);
          put(beta_sums + g * kLanes, vec(beta_sums + g * kLanes) + grad);
        }
      }
      mean *= share;
      along *= share;
      for (int64_t g = 0; g < heads; g++) {
        const Vec unit = vec(mixed + g * tile + i) * inverse, grad = vec(grad_maps + g * stride + i);
        put(grad_mixed + g * tile + i, (grad * gamma[g] - mean - unit * along) * inverse);
        if (maps) E::store(maps + g * maps_stride + i, unit * gamma[g] + beta[g]);
      }
    }
  }

  // The same where batch norm left an affine map of every head: A has unit variance, and the statistics' part in its
  // gradient is known. last: what stands beyond the keys is not summed.
  void scale_backward(int64_t vecs, const float* grad_maps, bool sum_parameters, Operand* maps, bool last) {
    const int64_t stride = plan_.block_rows * plan_.ld_block, maps_stride = operand_stride(), tile = plan_.tile_keys;
    if (last)
      for (int64_t g = 0; g < heads_; g++) {
        float* end = s_.mixed + g * tile + (vecs - 1) * kLanes;
        put(end, span_.tail ? vec(end) : Vec{});
      }
    for (int64_t g = 0; g < heads_; g++) {
      const float *mixed = s_.mixed + g * tile, *grads = grad_maps + g * stride;
      float* grad_mixed = s_.grad_mixed + g * tile;
      const bool statistics = m_.common;
      const float gamma = m_.gamma[g], beta = m_.beta[g], common = statistics ? m_.common[g] : 0,
                  along = statistics ? m_.along[g] : 0;
      Vec gamma_sum{}, beta_sum{};
      // Running statistics have no gradient, which NaN in the maps must not make one of.
      for (int64_t i = 0; i < vecs * kLanes; i += kLanes) {
        const Vec unit = vec(mixed + i), grad = vec(grads + i);
        gamma_sum += grad * unit;
        beta_sum += grad;
        put(grad_mixed + i, statistics ? grad * gamma - common - unit * along : grad * gamma);
        if (maps) E::store(maps + g * maps_stride + i, unit * gamma + beta);
      }
      if (sum_parameters) {
        float *gamma_sums = s_.norm_sums + g * kLanes, *beta_sums = gamma_sums + heads_ * kLanes;
        put(gamma_sums, vec(gamma_sums) + gamma_sum);
        put(beta_sums, vec(beta_sums) + beta_sum);
      }
    }
  }

  const Job& job_;
  const Problem& p_;
  const Mixing& m_;
  const Plan& plan_;
  Scratch<E>& s_;
  int64_t sample_, first_row_, rows_, heads_;
  int64_t first_key_ = 0, keys_ = 0;
  Span span_{1};
  Scores scores_;
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
    const int64_t blocks = (job.problem.seqlen + job.plan.block_rows - 1) / job.plan.block_rows;
    sample = job.first + unit / blocks;
    first_row = unit % blocks * job.plan.block_rows;
    rows = smaller(job.plan.block_rows, job.problem.seqlen - first_row);
  }
};

template <class E>
bool whole_rows(const Job& job) {
  return job.plan.block_keys >= job.problem.seqlen_k;
}

template <class E>
void find_lse(const Job& job, Block<E>& block) {
  for (int64_t key = 0; key < job.problem.seqlen_k; key += job.plan.block_keys) {
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
  for (int64_t i = 0; i < count; i++)
    for (int lane = 0; lane < kLanes; lane++) to[i] += double(sums[i * kLanes + lane]);
  std::memset(sums, 0, count * sizeof(Vec));
}

template <class E>
void forward(const Job& job, int64_t index, char* memory) {
  const Session<E> session;
  const Unit unit(job, index);
  Scratch<E> scratch(job, false, memory);
  Block<E> block(job, scratch, unit.sample, unit.first_row, unit.rows);
  std::memset(scratch.norm_sums, 0, 2 * job.problem.heads * sizeof(Vec));
  block.load_queries(false);
  const bool lse_known = !whole_rows<E>(job);
  if (lse_known) find_lse(job, block);
  for (int64_t key = 0; key < job.problem.seqlen_k; key += job.plan.block_keys) {
    block.set_keys(key);
    block.compute_scores();
    for (int64_t r = 0; r < unit.rows; r++) {
      block.softmax(r, lse_known, false);
      block.mix(r, block.weights(lse_known));
      if (job.mixing.sum_maps && (r % kFlushRows == kFlushRows - 1 || r == unit.rows - 1))
        flush(scratch.norm_sums, 2 * job.problem.heads, job.work.partial + index * job.partial_size);
    }
    block.multiply_values();
  }
  block.store_outs(job.problem.out);
}

// out = slope out + level value_sum, for some rows of one sample and all heads.
void finish(const Job& job, int64_t index) {
  const Problem& p = job.problem;
  const int64_t stretches = (p.seqlen + kStretch - 1) / kStretch, sample = index / stretches,
                first = index % stretches * kStretch, padded = round_up(p.head_dim, kLanes);
  float level[128 + kLanes] = {}, row[128 + kLanes];
  for (int64_t g = 0; g < p.heads; g++) {
    const float *sums = p.value_sum + (sample * p.heads + g) * p.head_dim, slope = job.mixing.slope[g];
    for (int64_t d = 0; d < p.head_dim; d++) level[d] = job.mixing.level[g] * sums[d];
    for (int64_t r = first; r < smaller(first + kStretch, p.seqlen); r++) {
      char* out = row_of(p.out, p.dtype, sample, g, r);
      load_row(p.dtype, out, p.out.dim, p.head_dim, row, padded);
      for (int64_t d = 0; d < padded; d += kLanes) store(row + d, load(row + d) * slope + load(level + d));
      store_row(p.dtype, out, p.out.dim, p.head_dim, row);
    }
  }
}

template <class E>
void backward(const Job& job, int64_t index, char* memory) {
  const Session<E> session;
  const Problem& p = job.problem;
  const Plan& plan = job.plan;
  const int64_t sample = index / plan.groups, group = index % plan.groups;
  Scratch<E> scratch(job, true, memory);
  std::memset(scratch.products, 0, (p.heads + 1) * p.heads * sizeof(Vec));
  std::memset(scratch.norm_sums, 0, 2 * p.heads * sizeof(Vec));
  double* partial = job.work.partial + index * job.partial_size;
  const int64_t columns = p.heads * p.head_dim * plan.ld_keys;
  float *grad_key = job.work.grad_key + index * columns, *grad_value = job.work.grad_value + index * columns;
  const int64_t first = group * plan.group_rows, end = smaller(first + plan.group_rows, p.seqlen);
  for (int64_t row = first; row < end; row += plan.block_rows) {
    const int64_t rows = smaller(plan.block_rows, end - row);
    Block<E> block(job, scratch, job.first + sample, row, rows);
    block.load_queries(true);
    const bool whole = whole_rows<E>(job);
    for (int sweep = whole ? 1 : 0; sweep < 2; sweep++) {
      for (int64_t key = 0; key < p.seqlen_k; key += plan.block_keys) {
        block.set_keys(key);
        block.compute_scores();
        block.compute_grad_maps();
        for (int64_t r = 0; r < rows; r++) {
          block.backward_row(r, whole || sweep == 0, sweep == 1);
          if (r % kFlushRows == kFlushRows - 1 || r == rows - 1) {
            flush(scratch.products, (p.heads + 1) * p.heads, partial);
            flush(scratch.norm_sums, 2 * p.heads, partial + (p.heads + 1) * p.heads);
          }
        }
        if (sweep == 0) continue;
        block.add_grad_columns(grad_key, grad_value, row == first);
        block.multiply_keys();
      }
    }
    block.store_outs(p.grad_query);
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

// Keys and values, all heads, in the orders that the products read.
template <class E>
void pack(const Job& job, int64_t index, bool backward) {
  using Operand = typename E::Operand;
  const Problem& p = job.problem;
  const Plan& plan = job.plan;
  const Stretch stretch(job, index);
  const int64_t column_size = plan.packed_keys * plan.depth, row_size = plan.keys * plan.ld_dim;
  const auto pack_panel = [&](const Tensor& t, int64_t head, int64_t panel, char* columns, char* rows) {
    if (!columns && !rows) return;
    const auto part = [&](char* of, int64_t size) {
      return of ? reinterpret_cast<Operand*>(of) + (stretch.sample * p.heads + head) * size : nullptr;
    };
    for (int64_t key = panel; key < smaller(panel + kPanel, stretch.end); key += 4)
      E::pack_four(p.dtype, row_of(t, p.dtype, job.first + stretch.sample, head, key), t, key, p.seqlen_k, p.head_dim,
                   plan, part(columns, column_size), part(rows, row_size));
  };
  for (int64_t panel = stretch.first; panel < stretch.end; panel += kPanel)
    for (int64_t h = 0; h < p.heads; h++) {
      pack_panel(p.key, h, panel, job.work.key_columns, backward ? job.work.key_rows : nullptr);
      pack_panel(p.value, h, panel, backward ? job.work.value_columns : nullptr, job.work.value_rows);
    }
  if (!job.work.value_sums) return;
  const int64_t padded = round_up(p.head_dim, kLanes), sample = job.first + stretch.sample;
  float row[128 + kLanes], sums[128 + kLanes];
  for (int64_t h = 0; h < p.heads; h++) {
    std::memset(sums, 0, sizeof sums);
    for (int64_t key = stretch.first; key < smaller(stretch.end, p.seqlen_k); key++) {
      load_row(p.dtype, row_of(p.value, p.dtype, sample, h, key), p.value.dim, p.head_dim, row, padded);
      for (int64_t d = 0; d < padded; d += kLanes) store(sums + d, load(sums + d) + load(row + d));
    }
    const int64_t stretches = (plan.keys + kStretch - 1) / kStretch;
    std::memcpy(job.work.value_sums + ((sample * stretches + stretch.first / kStretch) * p.heads + h) * p.head_dim,
                sums, size_t(p.head_dim) * sizeof(float));
  }
}

// Sums the groups' gradients of keys and values, in their order, and stores them.
void reduce(const Job& job, int64_t index) {
  const Problem& p = job.problem;
  const Plan& plan = job.plan;
  const Stretch stretch(job, index);
  const int64_t group_size = p.heads * p.head_dim * plan.ld_keys, padded = round_up(p.head_dim, 4);
  constexpr int64_t kColumns = 16;
  float sums[128 * kColumns], rows[kColumns * 128];
  std::memset(sums, 0, sizeof sums);
  const float* sources[] = {job.work.grad_key, job.work.grad_value};
  const Tensor targets[] = {p.grad_key, p.grad_value};
  for (int64_t key = stretch.first; key < smaller(stretch.end, p.seqlen_k); key += kColumns)
    for (int which = 0; which < 2; which++)
      for (int64_t h = 0; h < p.heads; h++) {
        const float* source =
            sources[which] + stretch.sample * plan.groups * group_size + h * p.head_dim * plan.ld_keys + key;
        for (int64_t d = 0; d < p.head_dim; d++)
          for (int64_t i = 0; i < kColumns; i += kLanes) {
            const float* from = source + d * plan.ld_keys + i;
            Vec total = load(from);
            for (int64_t group = 1; group < plan.groups; group++) total += load(from + group * group_size);
            store(sums + d * kColumns + i, total);
          }
        transpose(sums, kColumns, padded, kColumns, rows, padded);
        for (int64_t i = 0; i < smaller(kColumns, p.seqlen_k - key); i++)
          store_row(p.dtype, row_of(targets[which], p.dtype, job.first + stretch.sample, h, key + i),
                    targets[which].dim, p.head_dim, rows + i * padded);
      }
}

// Sums of grad * out and of grad * value_sum, for one head of one sample.
void grad_sums(const Job& job, int64_t index) {
  const Problem& p = job.problem;
  const int64_t sample = index / p.heads, head = index % p.heads, padded = round_up(p.head_dim, kLanes);
  float grad[128 + kLanes], out[128 + kLanes], values[128 + kLanes] = {}, sums[2 * kLanes] = {};
  std::memcpy(values, p.value_sum + index * p.head_dim, size_t(p.head_dim) * sizeof(float));
  double* partial = job.work.partial + index * job.partial_size;
  for (int64_t r = 0; r < p.seqlen; r++) {
    load_row(p.dtype, row_of(p.grad, p.dtype, sample, head, r), p.grad.dim, p.head_dim, grad, padded);
    load_row(p.dtype, row_of(p.out, p.dtype, sample, head, r), p.out.dim, p.head_dim, out, padded);
    Vec of_out{}, of_values{};
    for (int64_t d = 0; d < padded; d += kLanes) {
      of_out += load(grad + d) * load(out + d);
      of_values += load(grad + d) * load(values + d);
    }
    store(sums, load(sums) + of_out);
    store(sums + kLanes, load(sums + kLanes) + of_values);
    if (r % kFlushRows == kFlushRows - 1 || r == p.seqlen - 1) flush(sums, 2, partial);
  }
}

template <class E>
constexpr Kernels table(int64_t row_tile) {
  return {kLanes,    row_tile,         kPanel,  kStretch,   sizeof(typename E::Operand),
          E::kGroup, scratch_bytes<E>, pack<E>, forward<E>, finish,
          grad_sums, backward<E>,      reduce};
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
