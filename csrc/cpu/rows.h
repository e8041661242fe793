// Rows of tensors in and out: conversion to float32 and back, transposition; sums over a row of maps.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace reattn {
namespace REATTN_ISA {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline size_t bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

inline char* row_of(const Tensor& t, Dtype dtype, int64_t sample, int64_t head, int64_t row) {
  return static_cast<char*>(t.data) + (sample * t.batch + head * t.head + row * t.row) * int64_t(bytes(dtype));
}

// Has the lines of a row of one head on their way when they are wanted. Rows lie far apart, so that the CPU does not
// see it coming; a head's neighbour is a good guess of what comes next even where it lies elsewhere.
template <bool kWrite>
inline void prefetch_row(const Tensor& t, Dtype dtype, int64_t sample, int64_t head, int64_t row, int64_t size) {
  const char* from = row_of(t, dtype, sample, head, row);
  for (int64_t at = 0; at < size * int64_t(bytes(dtype)); at += 64) __builtin_prefetch(from + at, kWrite, 3);
}

inline Vec widen(Dtype dtype, VecH half) {
  return dtype == Dtype::kBFloat16 ? from_bfloat16(half) : from_float16(half);
}
inline VecH narrow(Dtype dtype, Vec v) { return dtype == Dtype::kBFloat16 ? to_bfloat16(v) : to_float16(v); }

// size elements, stride apart, as float32; zeros up to padded.
inline void load_row(Dtype dtype, const char* from, int64_t stride, int64_t size, float* to, int64_t padded) {
  int64_t i = 0;
  if (dtype == Dtype::kFloat32) {
    const float* source = reinterpret_cast<const float*>(from);
    if (stride == 1)
      for (; i + kLanes <= size; i += kLanes) store(to + i, load(source + i));
    for (; i < size; i++) to[i] = source[i * stride];
  } else {
    const uint16_t* source = reinterpret_cast<const uint16_t*>(from);
    if (stride == 1)
      for (; i + kLanes <= size; i += kLanes) store(to + i, widen(dtype, load_as<VecH>(source + i)));
    VecH rest{};
    const int64_t first = i;
    for (; i < size; i++) {
      rest[(i - first) % kLanes] = source[i * stride];
      if ((i - first) % kLanes == kLanes - 1 || i == size - 1) {
        const Vec wide = widen(dtype, rest);
        const int64_t begin = i - (i - first) % kLanes;
        for (int64_t j = begin; j <= i; j++) to[j] = wide[j - begin];
      }
    }
  }
  for (; i < padded; i++) to[i] = 0;
}

inline void store_row(Dtype dtype, char* to, int64_t stride, int64_t size, const float* from) {
  int64_t i = 0;
  if (dtype == Dtype::kFloat32) {
    float* target = reinterpret_cast<float*>(to);
    if (stride == 1)
      for (; i + kLanes <= size; i += kLanes) store(target + i, load(from + i));
    for (; i < size; i++) target[i * stride] = from[i];
  } else {
    uint16_t* target = reinterpret_cast<uint16_t*>(to);
    for (; i < size; i += kLanes) {
      Vec wide{};
      const int64_t count = smaller(kLanes, size - i);
      if (count == kLanes)
        wide = load(from + i);
      else
        for (int64_t j = 0; j < count; j++) wide[j] = from[i + j];
      const VecH half = narrow(dtype, wide);
      if (stride == 1 && count == kLanes)
        store_as(target + i, half);
      else
        for (int64_t j = 0; j < count; j++) target[(i + j) * stride] = half[j];
    }
  }
}

// Of whole vectors.
inline bool is_finite(const float* row, int64_t size) {
  Vec zeros{};
  for (int64_t i = 0; i < size; i += kLanes) zeros += load(row + i) * 0.0f;
  return sum(zeros) == 0;
}

// Whether all of some rows is finite: without their signs, all numbers are below infinity.
template <class Words, class Word>
inline bool are_finite(const char* from, int64_t row_bytes, int64_t rows, int64_t stride, int64_t size, Word infinity) {
  const Word magnitude = Word(~Word(0)) >> 1;
  Words most{};
  Word most_of_rest = 0;
  for (int64_t r = 0; r < rows; r++) {
    const Word* row = reinterpret_cast<const Word*>(from + r * row_bytes);
    int64_t i = 0;
    for (; stride == 1 && i + kLanes <= size; i += kLanes) {
      const Words words = load_as<Words>(row + i) & magnitude;
      most = words > most ? words : most;
    }
    for (; i < size; i++) {
      const Word word = row[i * stride] & magnitude;
      most_of_rest = word > most_of_rest ? word : most_of_rest;
    }
  }
  const auto beyond = most >= infinity;
  uint64_t parts[sizeof beyond / sizeof(uint64_t)], any = most_of_rest >= infinity;
  std::memcpy(parts, &beyond, sizeof beyond);
  for (uint64_t part : parts) any |= part;
  return any == 0;
}

inline bool are_finite(Dtype dtype, const char* from, int64_t row_stride, int64_t rows, int64_t stride, int64_t size) {
  const int64_t row_bytes = row_stride * int64_t(bytes(dtype));
  if (dtype == Dtype::kFloat32) return are_finite<VecU, uint32_t>(from, row_bytes, rows, stride, size, 0x7f800000);
  const uint16_t exponent = dtype == Dtype::kBFloat16 ? 0x7f80 : 0x7c00;
  return are_finite<VecH, uint16_t>(from, row_bytes, rows, stride, size, exponent);
}

// to[c, r] = from[r, c]; rows and columns in fours, as their padding allows.
inline void transpose(const float* from, int64_t ld_from, int64_t rows, int64_t columns, float* to, int64_t ld_to) {
  for (int64_t r = 0; r < rows; r += 4)
    for (int64_t c = 0; c < columns; c += 4) {
      const float* source = from + r * ld_from + c;
      const Vec4 a = load_as<Vec4>(source), b = load_as<Vec4>(source + ld_from),
                 d = load_as<Vec4>(source + 2 * ld_from), e = load_as<Vec4>(source + 3 * ld_from);
      const Vec4 ab = shuffled<0, 4, 1, 5>(a, b), de = shuffled<0, 4, 1, 5>(d, e);
      const Vec4 ab2 = shuffled<2, 6, 3, 7>(a, b), de2 = shuffled<2, 6, 3, 7>(d, e);
      float* target = to + c * ld_to + r;
      store_as(target, shuffled<0, 1, 4, 5>(ab, de));
      store_as(target + ld_to, shuffled<2, 3, 6, 7>(ab, de));
      store_as(target + 2 * ld_to, shuffled<0, 1, 4, 5>(ab2, de2));
      store_as(target + 3 * ld_to, shuffled<2, 3, 6, 7>(ab2, de2));
    }
}

// The keys of a row in whole vectors; lanes of the last one that are no keys are masked out.
struct Span {
  int64_t vecs;
  VecI tail;

  explicit Span(int64_t keys) : vecs((keys + kLanes - 1) / kLanes) {
    tail = lane_numbers() < broadcast(int32_t(keys - (vecs - 1) * kLanes));
  }
};

inline float sum_row(const float* row, int64_t vecs) {
  Vec even{}, odd{};
  int64_t i = 0;
  for (; i + 1 < vecs; i += 2) {
    even += load(row + i * kLanes);
    odd += load(row + (i + 1) * kLanes);
  }
  if (i < vecs) even += load(row + i * kLanes);
  return sum(even + odd);
}

inline float dot_row(const float* a, const float* b, int64_t vecs) {
  Vec even{}, odd{};
  int64_t i = 0;
  for (; i + 1 < vecs; i += 2) {
    even += load(a + i * kLanes) * load(b + i * kLanes);
    odd += load(a + (i + 1) * kLanes) * load(b + (i + 1) * kLanes);
  }
  if (i < vecs) even += load(a + i * kLanes) * load(b + i * kLanes);
  return sum(even + odd);
}

}  // namespace REATTN_ISA
}  // namespace reattn
