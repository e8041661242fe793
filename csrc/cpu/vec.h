// One vector type for every instruction set, in the compiler's own vector extensions: the width follows the flags.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

// What the instruction set has; tests emulate what their CPU lacks.
#if defined(REATTN_EMULATED)
#include "emulated_intrinsics.h"
#elif defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(REATTN_EMULATED) || defined(__AVX512F__)
#define REATTN_AVX512
#endif
#if defined(REATTN_EMULATED) || defined(__AVX512BF16__)
#define REATTN_BFLOAT16
#endif
#if defined(REATTN_EMULATED_AMX) || defined(__AMX_BF16__)
#define REATTN_AMX
#endif
// GCC 11 has only its own __builtin_shuffle.
#if defined(__clang__) || __GNUC__ >= 12
#define REATTN_SHUFFLEVECTOR
#endif

namespace reattn {
namespace REATTN_ISA {

#if defined(REATTN_AVX512)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));
typedef uint8_t VecB __attribute__((vector_size(kLanes)));
typedef float Vec4 __attribute__((vector_size(16)));

template <class V, class T>
inline V load_as(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V, class T>
inline void store_as(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}
inline Vec load(const float* from) { return load_as<Vec>(from); }
inline void store(float* to, Vec v) { store_as(to, v); }

// x - 0 is x, signed zeros and NaN included, so that nothing but the broadcast is left.
inline Vec broadcast(float x) { return x - Vec{}; }
inline VecI broadcast(int32_t x) { return x - VecI{}; }

// The larger one; b where either is NaN.
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// v, rounded as it is: the compiler may not merge the product that made it into a sum.
inline Vec rounded(Vec v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__) && !defined(REATTN_EMULATED)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

inline VecI lane_numbers() {
  VecI v;
  for (int i = 0; i < kLanes; i++) v[i] = i;
  return v;
}

// Lanes of two vectors by number, b's counted on from a's.
template <int... kLane, class V>
inline V shuffled(V a, V b) {
#if defined(REATTN_SHUFFLEVECTOR)
  return __builtin_shufflevector(a, b, kLane...);
#else
  typedef int32_t Lanes __attribute__((vector_size(sizeof...(kLane) * sizeof(int32_t))));
  return __builtin_shuffle(a, b, Lanes{kLane...});
#endif
}

// Lane i of the result is lane i ^ step.
template <int kStep, int... kLane>
inline Vec exchanged(Vec v, std::integer_sequence<int, kLane...>) {
  return shuffled<(kLane ^ kStep)...>(v, v);
}

// All lanes taken together by an operation, in pairs: a chain of four steps instead of sixteen.
template <int kStep = kLanes / 2, class Operation>
inline float reduce(Vec v, Operation operation) {
  v = operation(v, exchanged<kStep>(v, std::make_integer_sequence<int, kLanes>()));
  if constexpr (kStep > 1)
    return reduce<kStep / 2>(v, operation);
  else
    return v[0];
}

inline float sum(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return a + b; });
}

// The same in float64.
template <int... kLane>
inline double wide_sum(Vec v, std::integer_sequence<int, kLane...>) {
  typedef float Half __attribute__((vector_size(2 * kLanes)));
  typedef double Wide __attribute__((vector_size(4 * kLanes)));
#if defined(REATTN_SHUFFLEVECTOR)
  const Half low = __builtin_shufflevector(v, v, kLane...), high = __builtin_shufflevector(v, v, kLanes / 2 + kLane...);
#else
  const Half low{v[kLane]...}, high{v[kLanes / 2 + kLane]...};
#endif
  Wide sums = __builtin_convertvector(low, Wide) + __builtin_convertvector(high, Wide);
  double total[kLanes / 2];
  std::memcpy(total, &sums, sizeof sums);
  for (int width = kLanes / 4; width > 0; width /= 2)
    for (int i = 0; i < width; i++) total[i] += total[i + width];
  return total[0];
}
inline double wide_sum(Vec v) { return wide_sum(v, std::make_integer_sequence<int, kLanes / 2>()); }

inline Vec square_root(Vec v) {
#if defined(REATTN_AVX512)
  return reinterpret_cast<Vec>(_mm512_sqrt_ps(reinterpret_cast<__m512>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_sqrt_ps(reinterpret_cast<__m256>(v)));
#else
  for (int i = 0; i < kLanes; i++) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// 2^x to one unit in the last place, for x below 128; 0 below the smallest normal number. NaN stays NaN.
inline Vec exp2(Vec x) {
  x = maximum(broadcast(-127.0f), x);
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const Vec magic = broadcast(12582912.0f);
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  // 2^integer; 0 for -127.
  const Vec power = reinterpret_cast<Vec>((reinterpret_cast<VecI>(shifted) << 23) + 0x3f800000);
  // Minimax in relative error on [-1/2, 1/2], 2e-9; exactly 1 at 0.
  Vec p = broadcast(1.534581242594868e-4f);
  p = p * f + 1.3399930903688073e-3f;
  p = p * f + 9.618489071726799e-3f;
  p = p * f + 5.550328642129898e-2f;
  p = p * f + 0.24022646248340607f;
  p = p * f + 0.6931471824645996f;
  p = p * f + 1.0f;
  return p * power;
}

// The logarithm to base 2 to two units in the last place; of 0 it is -infinity, of less NaN. Not for numbers below the
// normal ones.
inline Vec log2(Vec x) {
  // x = 2^exponent m, m between the roots of 1/2 and 2; s = (m - 1) / (m + 1) and log m = 2 (s + s^3 / 3 + s^5 / 5
  // ...).
  const VecU bits = reinterpret_cast<VecU>(x) - 0x3f3504f3u;
  const VecI exponent = reinterpret_cast<VecI>(bits) >> 23;
  const Vec m = reinterpret_cast<Vec>((bits & 0x7fffffu) + 0x3f3504f3u);
  const Vec s = (m - 1.0f) / (m + 1.0f), t = s * s;
  Vec p = broadcast(2.8853900817779268f / 9);
  p = p * t + 2.8853900817779268f / 7;
  p = p * t + 2.8853900817779268f / 5;
  p = p * t + 2.8853900817779268f / 3;
  p = p * t + 2.8853900817779268f;
  const Vec result = s * p + __builtin_convertvector(exponent, Vec);
  const float infinity = __builtin_inff();
  const Vec special =
      x == 0.0f ? broadcast(-infinity) : (x == infinity ? broadcast(infinity) : broadcast(__builtin_nanf("")));
  return ((x > 0.0f) & (x < infinity)) ? result : special;
}

inline Vec from_bfloat16(VecH h) { return reinterpret_cast<Vec>(__builtin_convertvector(h, VecU) << 16); }

// To nearest, ties to even.
inline VecH to_bfloat16(Vec v) {
  const VecU bits = reinterpret_cast<VecU>(v);
  const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecU quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(v == v ? rounded : quiet, VecH);
}

inline Vec from_float16(VecH h) {
  const VecU wide = __builtin_convertvector(h, VecU);
  const VecU sign = (wide & 0x8000) << 16;
  // The exponent's bias is mended by a product, which makes denormal numbers normal.
  const Vec magnitude = reinterpret_cast<Vec>((wide & 0x7fff) << 13) * 0x1p112f;
  const VecU infinite = reinterpret_cast<VecU>((wide & 0x7c00) == 0x7c00) & 0x7f800000;
  return reinterpret_cast<Vec>(reinterpret_cast<VecU>(magnitude) | infinite | sign);
}

// To nearest, ties to even; what is too large becomes infinity.
inline VecH to_float16(Vec v) {
  const VecU bits = reinterpret_cast<VecU>(v);
  const VecU sign = (bits >> 16) & 0x8000;
  const VecU magnitude = bits & 0x7fffffff;
  const Vec absolute = reinterpret_cast<Vec>(magnitude);
  // Below 2^-14 the result is denormal: the sum rounds where its last bit is.
  const VecU denormal = reinterpret_cast<VecU>(absolute + 0.5f) - 0x3f000000u;
  const VecU normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  VecU half = absolute < 0x1p-14f ? denormal : normal;
  half = magnitude >= 0x47800000u ? VecU{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? VecU{} + 0x7e00u : half;
  return __builtin_convertvector(half | sign, VecH);
}

}  // namespace REATTN_ISA
}  // namespace reattn
