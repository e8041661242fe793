// What a warp does for all heads at some positions of a tile: mixing, norm, and the way back.
#pragma once

#include "maps.cuh"

namespace reattn {

// 16 positions, streamed rows of one own row, of all heads: a lane holds heads (16 tile + lane / 4) and 8 further down.
template <int kPadded>
using HeadsTile = float[kPadded / 16][2][4];

// Calls function(which 16 heads, 0 or 1 for the right 8 positions, index in a lane's four numbers, which of the lane's
// heads).
template <int kPadded, class Function>
REATTN_DEVICE void for_each_element(Function function) {
#pragma unroll
  for (int tile = 0; tile < kPadded / 16; tile++)
#pragma unroll
    for (int right = 0; right < 2; right++)
#pragma unroll
      for (int i = 0; i < 4; i++) function(tile, right, i, 2 * tile + i / 2);
}

// The sum over the heads at a lane's four positions, sent through a function. Each step halves what a lane is left to
// sum, so that the function is called once.
template <class Function>
REATTN_DEVICE void over_heads(float (&sums)[4], Function function) {
  const bool upper = lane() & 16, middle = lane() & 8;
  float two[2], one;
#pragma unroll
  for (int i = 0; i < 2; i++) two[i] = (upper ? sums[i + 2] : sums[i]) + shuffle_xor(upper ? sums[i] : sums[i + 2], 16);
  one = (middle ? two[1] : two[0]) + shuffle_xor(middle ? two[0] : two[1], 8);
  one = function(one + shuffle_xor(one, 4));
  const float other = shuffle_xor(one, 8);
  two[0] = middle ? other : one;
  two[1] = middle ? one : other;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float rest = shuffle_xor(two[i], 16);
    sums[i] = upper ? rest : two[i];
    sums[i + 2] = upper ? two[i] : rest;
  }
}

enum Matrix { kMix, kUnmix };                            // weight^T, weight
enum Vector { kShift, kGamma, kBeta, kCommon, kAlong };  // see csrc/fold.h

template <class T, int kPadded>
class Mixing {
  static constexpr int kGroups = kPadded / 16;  // of 16 heads
  static constexpr int kLaneHeads = kPadded / 8;
  static constexpr int kSteps = kPadded / Operand<T>::kDepth;
  // More heads would take too many registers.
  static constexpr bool kHeld = kPadded == 16;
  static constexpr int kHeldHeads = kHeld ? kLaneHeads : 0;
  static constexpr int kHeldMatrices = kHeld && Operand<T>::kHeld ? kMatrices : 0;
  static_assert(!kHeldMatrices || (kGroups == 1 && kSteps == 1), "a matrix that is held is one operand");
  using A = typename Operand<T>::A;

 public:
  using Tile = HeadsTile<kPadded>;

  // Sums over positions, in the backward pass: of dA, dN A and dN by a lane's heads, and of products of P and dA of
  // every two heads.
  struct Sums {
    float shift[kLaneHeads] = {}, gamma[kLaneHeads] = {}, beta[kLaneHeads] = {};
    float products[kGroups][kGroups][2][4] = {};
  };

  // Brings the parameters into shared memory; before sync_block and read_parameters.
  static REATTN_DEVICE void prepare(const Params& p) {
    for (int i = thread(); i < kMatrices * kPadded * kPadded; i += threads()) {
      const int which = i / (kPadded * kPadded), row = i / kPadded % kPadded, column = i % kPadded;
      const bool inside = row < p.heads && column < p.heads;
      const float weight = !inside ? 0.0f : which == kMix ? p.fold.weight(column, row) : p.fold.weight(row, column);
      Operand<T>::set(matrix_rows(p, Matrix(which)).at(row, column), weight);
    }
    for (int i = thread(); i < 16 / int(sizeof(T)); i += threads()) Operand<T>::set(zeros(p) + i, 0.0f);
    for (int head = thread(); head < kPadded; head += threads()) {
      const bool inside = head < p.heads, gamma = inside && p.fold.has_gamma();
      float column_sum = 0;
      for (int from = 0; inside && from < p.heads; from++) column_sum += p.fold.weight(from, head);
      set_vector(p, kShift, head, inside ? p.fold.shift(head, column_sum) : 0.0f);
      set_vector(p, kGamma, head, gamma ? p.fold.gamma(head) : 0.0f);
      set_vector(p, kBeta, head, gamma ? p.fold.beta(head) : 0.0f);
      set_vector(p, kCommon, head, gamma ? p.fold.common(head) : 0.0f);
      set_vector(p, kAlong, head, gamma ? p.fold.along(head) : 0.0f);
    }
  }

  REATTN_DEVICE Mixing(const Params& p, const Place& place) : p_(p), warp_(place.warp), first_row_(place.first_row) {}

  // Maps become mixed and normalised maps, in place. kSum: they are only mixed, and sums of them and of their squares
  // by head go to shared memory, for the first tile or added; maps of keys outside the sequence are zero, and so are
  // these.
  template <bool kSum>
  REATTN_DEVICE void forward(bool first_tile) {
    read_parameters();
    float sums[kLaneHeads] = {}, squares[kLaneHeads] = {};
    for_each_position([&](int row, int group) {
      const Rows<T> maps = heads_at(p_.plan.maps, row, group);
      Tile mixed;
      float inverse_rms[4];
      mix<!kSum>(mixed, inverse_rms, maps);
      if (kSum && first_row_ + row < p_.query.rows) {
        add_positions(sums, [&](int g, int right, int i) { return mixed[g][right][i]; });
        add_positions(squares, [&](int g, int right, int i) { return mixed[g][right][i] * mixed[g][right][i]; });
      }
      if (!kSum && p_.fold.over_heads()) scale_and_shift(mixed);
      sync_warp();
      set(maps, mixed);
    });
    if constexpr (kSum) {
#pragma unroll
      for (int i = 0; i < kLaneHeads; i++) {
        const float both[2] = {quad_sum(sums[i]), quad_sum(squares[i])};
#pragma unroll
        for (int which = 0; which < 2; which++)
          if (lane() % 4 == 0)
            add(as<float>(at(p_.plan.sums)) + ((warp_ * 2 + which) * kPadded + 8 * i + lane() / 4), both[which],
                !first_tile);
      }
    }
  }

  // Gradients of the normalised maps become those of the softmax maps after dropout, in place. kMixed: writes the
  // normalised maps as well. kSum: adds to the sums.
  template <bool kMixed, bool kSum>
  REATTN_DEVICE void backward(Sums& sums, int first_streamed) {
    read_parameters();
    for_each_position([&](int row, int group) {
      const Rows<T> maps = heads_at(p_.plan.maps, row, group), grads = heads_at(p_.plan.grads, row, group);
      Tile grad;
      get(grads, grad);
      if (p_.fold.has_norm()) {
        Tile unit;
        float inverse_rms[4];
        mix(unit, inverse_rms, maps);
        if constexpr (kSum) {
          add_positions(sums.gamma, [&](int g, int right, int i) { return grad[g][right][i] * unit[g][right][i]; });
          add_positions(sums.beta, [&](int g, int right, int i) { return grad[g][right][i]; });
        }
        undo_norm(grad, unit, inverse_rms);
        if constexpr (kSum) zero_outside(grad, row, first_streamed + group);
        set(grads, grad);
        sync_warp();
        if constexpr (kMixed) {
          scale_and_shift(unit);
          set(heads_at(p_.plan.mixed, row, group), unit);
        }
      } else if constexpr (kMixed) {
        Tile mixed;
        float unused[4];
        mix<false>(mixed, unused, maps);
        set(heads_at(p_.plan.mixed, row, group), mixed);
      }
      if constexpr (kSum) {
        add_positions(sums.shift, [&](int g, int right, int i) { return grad[g][right][i]; });
        add_products(sums, maps, grads);
      }
      Tile result = {};
      multiply(result, kUnmix, grads);
      sync_warp();
      set(grads, result);
    });
  }

  // Adds up what forward left of all warps, in order, and writes it for this block; all threads have to come here.
  REATTN_DEVICE void store_moments() const {
    const Shared<float> total = as<float>(at(p_.plan.sums));
    sync_block();
    if (block_y() > 0) return;  // blocks for other columns of an output have the same
    for (int i = thread(); i < 2 * p_.heads; i += threads()) {
      const int which = i / p_.heads, head = i % p_.heads;
      float sum = 0;
      for (int warp = 0; warp < p_.plan.warps; warp++)
        sum += load<float>(total + ((warp * 2 + which) * kPadded + head));
      write(p_.vectors + (i * p_.blocks + block_x()), sum);
    }
  }

  // Adds up the sums of all warps, in order, and writes them for this block; all threads have to come here.
  REATTN_DEVICE void store_sums(const Sums& sums) const {
    const Shared<float> total = as<float>(at(p_.plan.sums));
    for (int turn = 0; turn < p_.plan.warps; turn++) {
      sync_block();
      if (warp_ != turn) continue;
#pragma unroll
      for (int i = 0; i < kLaneHeads; i++) {
        const float vectors[3] = {quad_sum(sums.shift[i]), quad_sum(sums.gamma[i]), quad_sum(sums.beta[i])};
#pragma unroll
        for (int which = 0; which < 3; which++)
          if (lane() % 4 == 0) add(total + (which * kPadded + 8 * i + lane() / 4), vectors[which], turn);
      }
#pragma unroll
      for (int rows = 0; rows < kGroups; rows++)
#pragma unroll
        for (int columns = 0; columns < kGroups; columns++)
#pragma unroll
          for (int i = 0; i < 8; i++) {
            const int row = 16 * rows + i % 4 / 2 * 8 + lane() / 4;
            const int column = 16 * columns + i / 4 * 8 + lane() % 4 * 2 + i % 2;
            add(total + ((3 + row) * kPadded + column), sums.products[rows][columns][i / 4][i % 4], turn);
          }
    }
    sync_block();
    if (block_y() > 0) return;  // blocks for other columns of an output have the same sums
    const int64_t block = block_x();
    for (int i = thread(); i < 3 * kPadded; i += threads())
      write(p_.vectors + block * (3 * kPadded) + i, load<float>(total + i));
    for (int i = thread(); i < kPadded * kPadded; i += threads())
      write(p_.products + block * (kPadded * kPadded) + i, load<float>(total + 3 * kPadded + i));
  }

 private:
  REATTN_DEVICE void read_parameters() {
#pragma unroll
    for (int i = 0; i < kHeldHeads; i++) {
#pragma unroll
      for (int which = 0; which < kVectors; which++) vectors_[i][which] = vector(which, i);
    }
    if constexpr (kHeld && Operand<T>::kHeld)
#pragma unroll
      for (int which = 0; which < kMatrices; which++)
        held_[which] = Operand<T>::a(matrix_rows(p_, Matrix(which)), 0, 0);
  }

  static REATTN_DEVICE Rows<T> matrix_rows(const Params& p, Matrix which) {
    const int stride = kPadded * int(sizeof(T)) + 16;
    return rows_at<T>(at(p.plan.matrices + which * kPadded * stride), stride);
  }
  static REATTN_DEVICE Shared<T> zeros(const Params& p) {
    return as<T>(at(p.plan.matrices + kMatrices * kPadded * (kPadded * int(sizeof(T)) + 16)));
  }
  static REATTN_DEVICE void set_vector(const Params& p, int which, int head, float value) {
    store(as<float>(at(p.plan.vectors)) + (which * kPadded + head), value);
  }
  REATTN_DEVICE float vector(int which, int lane_head) const {
    return load<float>(as<float>(at(p_.plan.vectors)) + (which * kPadded + 8 * lane_head + lane() / 4));
  }
  REATTN_DEVICE float parameter(Vector which, int lane_head) const {
    if constexpr (kHeld)
      return vectors_[lane_head][which];
    else
      return vector(which, lane_head);
  }
  static REATTN_DEVICE void add(Shared<float> place, float value, int turn) {
    store(place, turn ? load<float>(place) + value : value);
  }

  template <class Function>
  REATTN_DEVICE void for_each_position(Function function) const {
    const int log2_own = p_.plan.own == 32 ? 5 : 4, units = p_.plan.tile / 16 << log2_own;
#pragma unroll 1
    for (int unit = warp_; unit < units; unit += p_.plan.warps)
      function(unit & (p_.plan.own - 1), unit >> log2_own << 4);
  }

  // All heads at 16 positions of a tile, a row a head.
  REATTN_DEVICE Rows<T> heads_at(int offset, int row, int group) const {
    const Shared<char> first = at(offset + row * p_.plan.row_stride + group * int(sizeof(T)));
    return {as<T>(first), p_.plan.head_stride / int(sizeof(T)), p_.heads, zeros(p_)};
  }
  REATTN_DEVICE void get(const Rows<T>& heads, Tile& tile) const {
    for_each_pair(heads, [&](int t, int right, int lower, bool inside, Shared<T> place) {
      const float2 pair = inside ? Operand<T>::pair(place) : float2{0, 0};
      tile[t][right][2 * lower] = pair.x;
      tile[t][right][2 * lower + 1] = pair.y;
    });
  }
  REATTN_DEVICE void set(const Rows<T>& heads, const Tile& tile) const {
    for_each_pair(heads, [&](int t, int right, int lower, bool inside, Shared<T> place) {
      if (inside) Operand<T>::set_pair(place, tile[t][right][2 * lower], tile[t][right][2 * lower + 1]);
    });
  }
  template <class Function>
  REATTN_DEVICE void for_each_pair(const Rows<T>& heads, Function function) const {
#pragma unroll
    for (int group = 0; group < kGroups; group++)
#pragma unroll
      for (int lower = 0; lower < 2; lower++) {
        const int head = 16 * group + 8 * lower + lane() / 4;
        const Shared<T> place = heads.inside(head, lane() % 4 * 2);
#pragma unroll
        for (int right = 0; right < 2; right++) function(group, right, lower, head < p_.heads, place + 8 * right);
      }
  }

  // tile += matrix times the heads.
  REATTN_DEVICE void multiply(Tile& tile, Matrix which, const Rows<T>& heads) const {
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const auto b = Operand<T>::b_by_depth(heads, step * Operand<T>::kDepth, 0);
#pragma unroll
      for (int t = 0; t < kGroups; t++) {
        A a;
        if constexpr (kHeldMatrices > 0)
          a = held_[which];
        else
          a = Operand<T>::a(matrix_rows(p_, which), 16 * t, step * Operand<T>::kDepth);
        Operand<T>::multiply(tile[t][0], tile[t][1], a, b);
      }
    }
  }

  // The heads that are mixed, divided by their root mean square where there is a norm: docs/operator.md, section 2.
  template <bool kNorm = true>
  REATTN_DEVICE void mix(Tile& mixed, float (&inverse_rms)[4], const Rows<T>& maps) const {
    if constexpr (kHeldMatrices == kMatrices) {
      const auto b = Operand<T>::b_by_depth(maps, 0, 0);
      Operand<T>::multiply_from(mixed[0][0], mixed[0][1], held_[kMix], b, parameter(kShift, 0), parameter(kShift, 1));
    } else {
      for_each_element<kPadded>(
          [&](int tile, int right, int i, int head) { mixed[tile][right][i] = parameter(kShift, head); });
      multiply(mixed, kMix, maps);
    }
    if (!kNorm || !p_.fold.over_heads()) return;
    sum_heads(inverse_rms, [&](int tile, int right, int i) { return mixed[tile][right][i] * mixed[tile][right][i]; });
    over_heads(inverse_rms, [&](float sum) { return inverse_sqrt(sum * p_.inverse_heads + p_.fold.p.eps); });
    for_each_element<kPadded>(
        [&](int tile, int right, int i, int) { mixed[tile][right][i] *= inverse_rms[2 * right + i % 2]; });
  }
  REATTN_DEVICE void scale_and_shift(Tile& unit) const {
    for_each_element<kPadded>([&](int tile, int right, int i, int head) {
      unit[tile][right][i] = fmaf(unit[tile][right][i], parameter(kGamma, head), parameter(kBeta, head));
    });
  }

  // The gradient of the normalised maps becomes that of the mixed ones: docs/operator.md, section 4.
  REATTN_DEVICE void undo_norm(Tile& grad, const Tile& unit, const float (&inverse_rms)[4]) const {
    if (!p_.fold.over_heads()) {
      for_each_element<kPadded>([&](int tile, int right, int i, int head) {
        // Running statistics have no gradient, kAlong is 0: NaN in the maps, and infinity, must not make one of it.
        const float finite = fminf(fmaxf(unit[tile][right][i], -3e38f), 3e38f);
        grad[tile][right][i] = fmaf(grad[tile][right][i], parameter(kGamma, head),
                                    -fmaf(finite, parameter(kAlong, head), parameter(kCommon, head)));
      });
      return;
    }
    float means[4];
    for_each_element<kPadded>(
        [&](int tile, int right, int i, int head) { grad[tile][right][i] *= parameter(kGamma, head); });
    // The weights sum to zero over the heads after mixing: what these share reaches nothing, and would only be rounded.
    sum_heads(means, [&](int tile, int right, int i) { return grad[tile][right][i]; });
    over_heads(means, [&](float sum) { return sum * p_.inverse_heads; });
    for_each_element<kPadded>([&](int tile, int right, int i, int head) {
      const bool inside = 8 * head + lane() / 4 < p_.heads;
      grad[tile][right][i] = inside ? grad[tile][right][i] - means[2 * right + i % 2] : 0.0f;
    });
    sum_heads(means, [&](int tile, int right, int i) { return grad[tile][right][i] * unit[tile][right][i]; });
    over_heads(means, [&](float sum) { return sum * p_.inverse_heads; });
    for_each_element<kPadded>([&](int tile, int right, int i, int) {
      const int position = 2 * right + i % 2;
      grad[tile][right][i] = inverse_rms[position] * (grad[tile][right][i] - unit[tile][right][i] * means[position]);
    });
  }

  // Batch statistics give positions outside the sequences a gradient, which must not be summed.
  REATTN_DEVICE void zero_outside(Tile& grad, int row, int first_key) const {
    if (p_.fold.over_heads() || (first_row_ + row < p_.query.rows && first_key + 16 <= p_.key.rows)) return;
    for_each_element<kPadded>([&](int tile, int right, int i, int) {
      const int key = first_key + 8 * right + lane() % 4 * 2 + i % 2;
      if (first_row_ + row >= p_.query.rows || key >= p_.key.rows) grad[tile][right][i] = 0;
    });
  }

  // A lane's own heads, summed at its four positions.
  template <class Function>
  static REATTN_DEVICE void sum_heads(float (&sums)[4], Function function) {
#pragma unroll
    for (int position = 0; position < 4; position++) {
      sums[position] = 0;
#pragma unroll
      for (int tile = 0; tile < kGroups; tile++)
#pragma unroll
        for (int lower = 0; lower < 2; lower++)
          sums[position] += function(tile, position / 2, 2 * lower + position % 2);
    }
  }

  // sums += the four positions of a lane's heads. Summed among themselves first, as the products below: long float32
  // sums of numbers that are nearly alike lose digits that eager PyTorch keeps.
  template <class Function>
  static REATTN_DEVICE void add_positions(float (&sums)[kLaneHeads], Function function) {
#pragma unroll
    for (int head = 0; head < kLaneHeads; head++) {
      const int g = head / 2, i = head % 2 * 2;
      sums[head] += (function(g, 0, i) + function(g, 0, i + 1)) + (function(g, 1, i) + function(g, 1, i + 1));
    }
  }
  static REATTN_DEVICE void add_products(Sums& sums, const Rows<T>& left, const Rows<T>& right) {
#pragma unroll
    for (int rows = 0; rows < kGroups; rows++)
#pragma unroll
      for (int columns = 0; columns < kGroups; columns++) {
        float products[2][4] = {};
#pragma unroll
        for (int step = 0; step < 16; step += Operand<T>::kDepth)
          Operand<T>::multiply(products[0], products[1], Operand<T>::a(left, 16 * rows, step),
                               Operand<T>::b(right, 16 * columns, step));
#pragma unroll
        for (int i = 0; i < 8; i++) sums.products[rows][columns][i / 4][i % 4] += products[i / 4][i % 4];
      }
  }

  const Params& p_;
  int warp_, first_row_;
  float vectors_[kHeldHeads + !kHeld][kVectors];
  A held_[kHeldMatrices + !kHeldMatrices];
};

}  // namespace reattn
