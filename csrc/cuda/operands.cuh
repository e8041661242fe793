// Small products for a warp, c (16 x 16) += a (16 x depth) b (depth x 16), with operands from shared memory: tensor
// cores for 16-bit elements, plain fused multiply-adds for float. A lane holds of c, or of a tile of maps, what
// mma.m16n8k16 gives it of either half: with g = lane / 4 and t = lane % 4, elements (g, 2t), (g, 2t + 1), (g + 8, 2t),
// (g + 8, 2t + 1) of the left 8 columns, and the same of the right.
#pragma once

#include "instructions.cuh"

#define REATTN_DEVICE __device__ __forceinline__

namespace reattn {

// Rows in shared memory, those from count on as 16 bytes of zeros.
template <class T>
struct Rows {
  Shared<T> first;
  int stride;
  int count;
  Shared<T> zeros;

  REATTN_DEVICE Shared<T> at(int row, int column) const { return row < count ? inside(row, column) : zeros; }
  REATTN_DEVICE Shared<T> inside(int row, int column) const { return first + (row * stride + column); }
};

template <class T>
REATTN_DEVICE Rows<T> rows_at(Shared<char> first, int stride_bytes) {
  return {as<T>(first), stride_bytes / int(sizeof(T)), 1 << 30, as<T>(first)};
}

// 16-bit elements.
template <class T>
struct Operand {
  static constexpr int kDepth = 16;
  static constexpr bool kHeld = true;  // registers hold an operand that is used again
  struct A {
    uint32_t part[4];
  };
  struct B {
    uint32_t part[4];
  };

  // From rows of a.
  static REATTN_DEVICE A a(const Rows<T>& rows, int row, int depth) {
    A a;
    load_matrices(a.part, rows.at(row + lane() % 16, depth + lane() / 16 * 8));
    return a;
  }
  // From rows of b's transpose.
  static REATTN_DEVICE B b(const Rows<T>& rows, int column, int depth) {
    B b;
    load_matrices(b.part, rows.at(column + lane() % 8 + lane() / 16 * 8, depth + lane() / 8 % 2 * 8));
    return b;
  }
  // From rows of b.
  static REATTN_DEVICE B b_by_depth(const Rows<T>& rows, int depth, int column) {
    B b;
    load_matrices_transposed(b.part, rows.at(depth + lane() % 16, column + lane() / 16 * 8));
    return b;
  }
  // From device memory: rows lane / 4 and lane / 4 + 8 of a, null where outside; columns from limit on are zero.
  static REATTN_DEVICE A a_from_device(const T* upper, const T* lower, int depth, int limit) {
    A a;
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const int column = depth + lane() % 4 * 2 + side * 8;
      a.part[2 * side] = upper && column < limit ? read<uint32_t>(upper + column) : 0;
      a.part[2 * side + 1] = lower && column < limit ? read<uint32_t>(lower + column) : 0;
    }
    return a;
  }
  static REATTN_DEVICE void multiply(float (&left)[4], float (&right)[4], const A& a, const B& b) {
    multiply_add<T>(left, a.part, {b.part[0], b.part[1]});
    multiply_add<T>(right, a.part, {b.part[2], b.part[3]});
  }
  // The same from upper in rows g and lower in rows g + 8.
  static REATTN_DEVICE void multiply_from(float (&left)[4], float (&right)[4], const A& a, const B& b, float upper,
                                          float lower) {
    reattn::multiply_from<T>(left, a.part, {b.part[0], b.part[1]}, upper, lower);
    reattn::multiply_from<T>(right, a.part, {b.part[2], b.part[3]}, upper, lower);
  }

  // Two neighbours, the first at an even column.
  static REATTN_DEVICE float2 pair(Shared<T> place) { return unpack<T>(load<uint32_t>(place)); }
  static REATTN_DEVICE void set_pair(Shared<T> place, float first, float second) {
    store(place, pack<T>(first, second));
  }
  static REATTN_DEVICE void set(Shared<T> place, float value) { store(place, uint16_t(pack<T>(value, 0))); }
  static REATTN_DEVICE float get(const T* place) { return unpack<T>(read<uint16_t>(place)).x; }
  static REATTN_DEVICE float2 get_pair(const T* place) { return unpack<T>(read<uint32_t>(place)); }
  static REATTN_DEVICE void put(T* place, float value) { write(place, uint16_t(pack<T>(value, 0))); }
  static REATTN_DEVICE void put_pair(T* place, float first, float second) { write(place, pack<T>(first, second)); }
};

template <>
struct Operand<float> {
  static constexpr int kDepth = 4;
  static constexpr bool kHeld = false;
  struct A {
    float4 row[2];
  };
  struct B {
    float4 column[4];
  };

  static REATTN_DEVICE A a(const Rows<float>& rows, int row, int depth) {
    const int g = lane() / 4;
    return {{load<float4>(rows.at(row + g, depth)), load<float4>(rows.at(row + g + 8, depth))}};
  }
  static REATTN_DEVICE B b(const Rows<float>& rows, int column, int depth) {
    const int t = lane() % 4 * 2;
    return {{load<float4>(rows.at(column + t, depth)), load<float4>(rows.at(column + t + 1, depth)),
             load<float4>(rows.at(column + t + 8, depth)), load<float4>(rows.at(column + t + 9, depth))}};
  }
  static REATTN_DEVICE B b_by_depth(const Rows<float>& rows, int depth, int column) {
    float2 left[4], right[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      left[i] = load<float2>(rows.at(depth + i, column + lane() % 4 * 2));
      right[i] = load<float2>(rows.at(depth + i, column + lane() % 4 * 2 + 8));
    }
    return {{{left[0].x, left[1].x, left[2].x, left[3].x},
             {left[0].y, left[1].y, left[2].y, left[3].y},
             {right[0].x, right[1].x, right[2].x, right[3].x},
             {right[0].y, right[1].y, right[2].y, right[3].y}}};
  }
  static REATTN_DEVICE A a_from_device(const float* upper, const float* lower, int depth, int limit) {
    const bool inside = depth < limit;
    return {{upper && inside ? read<float4>(upper + depth) : float4{},
             lower && inside ? read<float4>(lower + depth) : float4{}}};
  }
  static REATTN_DEVICE float dot(float sum, const float4& a, const float4& b) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
  }
  static REATTN_DEVICE void multiply(float (&left)[4], float (&right)[4], const A& a, const B& b) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      left[i] = dot(left[i], a.row[i / 2], b.column[i % 2]);
      right[i] = dot(right[i], a.row[i / 2], b.column[2 + i % 2]);
    }
  }

  static REATTN_DEVICE float2 pair(Shared<float> place) { return load<float2>(place); }
  static REATTN_DEVICE void set_pair(Shared<float> place, float first, float second) {
    store(place, float2{first, second});
  }
  static REATTN_DEVICE void set(Shared<float> place, float value) { store(place, value); }
  static REATTN_DEVICE float get(const float* place) { return read<float>(place); }
  static REATTN_DEVICE float2 get_pair(const float* place) { return read<float2>(place); }
  static REATTN_DEVICE void put(float* place, float value) { write(place, value); }
  static REATTN_DEVICE void put_pair(float* place, float first, float second) { write(place, float2{first, second}); }
};

}  // namespace reattn
