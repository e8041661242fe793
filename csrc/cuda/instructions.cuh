// What a warp or a block does together, and memory: all that the kernels ask of the hardware.
#pragma once

#include <cstdint>
#include <type_traits>

namespace reattn {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr int kWarp = 32;

__device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
// The shuffle tells the compiler that all lanes have the same.
__device__ __forceinline__ int warp() { return __shfl_sync(~0u, threadIdx.x / kWarp, 0); }
__device__ __forceinline__ int thread() { return threadIdx.x; }
__device__ __forceinline__ int threads() { return blockDim.x; }
__device__ __forceinline__ int block_x() { return blockIdx.x; }
__device__ __forceinline__ int block_y() { return blockIdx.y; }
__device__ __forceinline__ int blocks_x() { return gridDim.x; }

__device__ __forceinline__ void sync_block() { __syncthreads(); }
// Orders what the lanes of a warp read and write in shared memory.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// The lane's own number, out of a shuffle: which the compiler can only keep, not make anew at every use.
__device__ __forceinline__ uint32_t kept(uint32_t number) { return __shfl_sync(~0u, number, threadIdx.x % kWarp); }

// A place in the block's shared memory: 32 bits of address, where a pointer would take 64 and its generic accesses more
// time.
template <class T>
struct Shared {
  uint32_t address;
  __device__ __forceinline__ Shared operator+(int elements) const {
    return {address + uint32_t(elements) * uint32_t(sizeof(T))};
  }
};

template <class To, class From>
__device__ __forceinline__ Shared<To> as(Shared<From> from) {
  return {from.address};
}

// V is what is read or written at once, at an address that is a multiple of its size.
template <class V, class T>
__device__ __forceinline__ V load(Shared<T> from) {
  V value;
  if constexpr (std::is_same_v<V, uint4>)
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(from.address)
                 : "memory");
  else if constexpr (sizeof(V) == 16)
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "r"(from.address)
                 : "memory");
  else if constexpr (sizeof(V) == 8)
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(from.address) : "memory");
  else if constexpr (std::is_same_v<V, float>)
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from.address) : "memory");
  else
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from.address) : "memory");
  return value;
}
// Into a register of its own: what the compiler knows to be the same it keeps once, and puts operands of products,
// which are registers in a row, together again every time.
__device__ __forceinline__ float load_apart(Shared<float> from) {
  float value;
  asm volatile("ld.volatile.shared.f32 %0, [%1];" : "=f"(value) : "r"(from.address) : "memory");
  return value;
}
template <class V, class T>
__device__ __forceinline__ void store(Shared<T> to, V value) {
  if constexpr (sizeof(V) == 16)
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to.address), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
  else if constexpr (sizeof(V) == 8)
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to.address), "f"(value.x), "f"(value.y) : "memory");
  else if constexpr (std::is_same_v<V, float>)
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to.address), "f"(value) : "memory");
  else if constexpr (sizeof(V) == 4)
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to.address), "r"(value) : "memory");
  else
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to.address), "h"(value) : "memory");
}

// All of the block's shared memory, as many bytes as the launch asked for; aligned to 128.
__device__ __forceinline__ Shared<char> shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return {static_cast<uint32_t>(__cvta_generic_to_shared(memory))};
}

// Device memory.
template <class V>
__device__ __forceinline__ V read(const void* from) {
  return *static_cast<const V*>(from);
}
// Asks the L2 cache for the 128 bytes around it.
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
}
// The same address, of which nothing is read before the number is there: loads then take the registers that it was made
// of, where they would else come first, and need others.
__device__ __forceinline__ const char* after(const char* from, float number) {
  size_t address = __cvta_generic_to_global(from);
  asm volatile("" : "+l"(address) : "f"(number));
  return static_cast<const char*>(__cvta_global_to_generic(address));
}
template <class V>
__device__ __forceinline__ void write(void* to, V value) {
  if constexpr (std::is_same_v<V, uint4>)  // which the compiler would write by words
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
  else
    *static_cast<V*>(to) = value;
}

// 16 bytes from device to shared memory, both at multiples of 16; zeros where outside, and then nothing is read. They
// are there after copies_arrived and a sync of the threads that read them.
__device__ __forceinline__ void copy_async(Shared<char> to, const void* from, bool inside) {
#if __CUDA_ARCH__ >= 800
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address), "l"(from), "r"(bytes) : "memory");
#else
  store(to, inside ? read<uint4>(from) : uint4{});
#endif
}
__device__ __forceinline__ void copy_async(Shared<char> to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to.address), "l"(from) : "memory");
#else
  copy_async(to, from, true);
#endif
}
// Closes this thread's group of copies: all since the last group.
__device__ __forceinline__ void close_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for this thread's copies, except those of the kPending groups closed last.
template <int kPending>
__device__ __forceinline__ void copies_arrived() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ldmatrix: 8x8 matrices of 16-bit elements, two or four. Lane 8 m + r gives the address of row r of matrix m, 16
// bytes; it gets of every matrix elements 2 (lane % 4) and the next of row lane / 4; transposed, of column lane / 4
// instead.
template <class T>
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row.address)
               : "memory");
}
template <class T>
__device__ __forceinline__ void load_two_matrices(uint32_t (&matrices)[2], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(matrices[0]), "=r"(matrices[1])
               : "r"(row.address)
               : "memory");
}
template <class T>
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&matrices)[4], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row.address)
               : "memory");
}
template <class T>
__device__ __forceinline__ void load_two_matrices_transposed(uint32_t (&matrices)[2], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(matrices[0]), "=r"(matrices[1])
               : "r"(row.address)
               : "memory");
}

// movmatrix: an 8x8 matrix as load_matrices gives it, transposed.
__device__ __forceinline__ uint32_t transposed(uint32_t matrix) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
}

// The other way: matrices as load_matrices and load_matrices_transposed give them. Before compute capability 9.0 a lane
// stores its own two elements, of which row says whose row it is: every lane passes what it would pass to stmatrix.
template <class T, int kCount>
__device__ __forceinline__ void store_by_lanes(Shared<T> row, const uint32_t (&matrices)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    const uint32_t address = __shfl_sync(~0u, row.address, 8 * i + threadIdx.x % kWarp / 4);
    store(Shared<uint32_t>{address + threadIdx.x % 4 * 4}, matrices[i]);
  }
}
template <class T>
__device__ __forceinline__ void store_matrices(Shared<T> row, const uint32_t (&matrices)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row.address), "r"(matrices[0]),
               "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
#else
  store_by_lanes(row, matrices);
#endif
}
template <class T>
__device__ __forceinline__ void store_two_matrices(Shared<T> row, const uint32_t (&matrices)[2]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row.address), "r"(matrices[0]),
               "r"(matrices[1])
               : "memory");
#else
  store_by_lanes(row, matrices);
#endif
}
template <class T>
__device__ __forceinline__ void store_two_matrices_transposed(Shared<T> row, const uint32_t (&matrices)[2]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row.address), "r"(matrices[0]),
               "r"(matrices[1])
               : "memory");
#else
  store_two_matrices(row, {transposed(matrices[0]), transposed(matrices[1])});
#endif
}
template <class T>
__device__ __forceinline__ void store_matrices_transposed(Shared<T> row, const uint32_t (&matrices)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row.address),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
#else
  store_matrices(row,
                 {transposed(matrices[0]), transposed(matrices[1]), transposed(matrices[2]), transposed(matrices[3])});
#endif
}

__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
__device__ __forceinline__ double shuffle_xor(double value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
__device__ __forceinline__ float shuffle(float value, int from_lane) { return __shfl_sync(~0u, value, from_lane); }
__device__ __forceinline__ uint32_t shuffle(uint32_t value, int from_lane) {
  return __shfl_sync(~0u, value, from_lane);
}

// The product rounded, whatever is added to it.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float log2(float x) { return log2f(x); }
// Of what is not subnormal, some instructions less.
__device__ __forceinline__ float fast_inverse_sqrt(float x) {
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float fast_inverse(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float fast_log2(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
// Of all lanes, which the compiler then knows to have the same.
__device__ __forceinline__ int smallest(int number) {
#if __CUDA_ARCH__ >= 800
  return __shfl_sync(~0u, __reduce_min_sync(~0u, number), 0);
#else
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) number = min(number, __shfl_xor_sync(~0u, number, mask));
  return __shfl_sync(~0u, number, 0);
#endif
}
__device__ __forceinline__ bool any(bool condition) { return __any_sync(~0u, condition); }
__device__ __forceinline__ bool all(bool condition) { return __all_sync(~0u, condition); }
// A bit for each lane, and how many of them are set.
__device__ __forceinline__ uint32_t ballot(bool condition) { return __ballot_sync(~0u, condition); }
__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }
__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ float absolute(float x) { return fabsf(x); }
// 2^exponent, within what float holds.
__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float(127 + exponent << 23); }
// The least n for which |x| < 2^n, as far as float holds it.
__device__ __forceinline__ int exponent_above(float x) { return (__float_as_int(x) >> 23 & 255) - 126; }
// The upper half of a 64-bit product.
__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// Of two pairs of 16-bit elements the first of both, or the second. Where it stands: loads into the registers of a pair
// that come behind it would else come first, and need others.
template <uint32_t kBytes>
__device__ __forceinline__ uint32_t permuted(uint32_t a, uint32_t b) {
  uint32_t result;
  asm volatile("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "n"(kBytes));
  return result;
}
__device__ __forceinline__ uint32_t firsts(uint32_t a, uint32_t b) { return permuted<0x5410>(a, b); }
__device__ __forceinline__ uint32_t seconds(uint32_t a, uint32_t b) { return permuted<0x7632>(a, b); }

// Two numbers rounded to nearest even, the first in the lower half; and back.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t both);

template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t both;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  asm("{.reg .b16 lo, hi; cvt.rn.f16.f32 lo, %1; cvt.rn.f16.f32 hi, %2; mov.b32 %0, {lo, hi};}"
      : "=r"(both)
      : "f"(low), "f"(high));
#endif
  return both;
}
template <>
__device__ __forceinline__ float2 unpack<Half>(uint32_t both) {
  float2 result;
  asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
      : "=f"(result.x), "=f"(result.y)
      : "r"(both));
  return result;
}
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t both;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  const auto round = [](float x) {
    const uint32_t bits = __float_as_uint(x);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fffu;
  };
  both = round(low) | round(high) << 16;
#endif
  return both;
}
template <>
__device__ __forceinline__ float2 unpack<BFloat16>(uint32_t both) {
  return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
}

// Pairs added, each rounded.
template <class T>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 800
  uint32_t sum;
  if constexpr (std::is_same_v<T, Half>)
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return sum;
#else
  const float2 first = unpack<T>(a), second = unpack<T>(b);
  return pack<T>(first.x + second.x, first.y + second.y);
#endif
}

// mma.m16n8k16: c += a b for a warp, accumulated in float32. With g = lane / 4 and t = lane % 4 a lane holds
//   of a (16 x 16): (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with the element to the right;
//   of b (16 x 8):  (2t, g), (2t + 8, g), each with the element below;
//   of c (16 x 8):  (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void multiply_add<Half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int half = 0; half < 2; half++)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}
template <>
__device__ __forceinline__ void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  // Turing has no instruction for it: every lane gathers its two rows of a and two columns of b.
  const int group = lane() / 4 * 4, column = lane() % 4 * 8;
#pragma unroll
  for (int pair = 0; pair < 8; pair++) {
    const int from = pair % 4, side = pair / 4;
    const float2 upper = unpack<BFloat16>(__shfl_sync(~0u, a[2 * side], group + from));
    const float2 lower = unpack<BFloat16>(__shfl_sync(~0u, a[2 * side + 1], group + from));
    const float2 left = unpack<BFloat16>(__shfl_sync(~0u, b[side], column + from));
    const float2 right = unpack<BFloat16>(__shfl_sync(~0u, b[side], column + 4 + from));
    c[0] += upper.x * left.x + upper.y * left.y;
    c[1] += upper.x * right.x + upper.y * right.y;
    c[2] += lower.x * left.x + lower.y * left.y;
    c[3] += lower.x * right.x + lower.y * right.y;
  }
#endif
}

// mma.m16n8k8: the left half of a with the upper half of b.
template <class T>
__device__ __forceinline__ void multiply_add_half(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
    return;
  }
#endif
  if constexpr (std::is_same_v<T, Half>)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  else
    multiply_add<T>(c, {a[0], a[1], 0, 0}, {b, 0});
}

// The same as multiply_add into d.
template <class T>
__device__ __forceinline__ void multiply_from(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                              const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
#pragma unroll
  for (int i = 0; i < 4; i++) d[i] = c[i];
  multiply_add<T>(d, a, b);
#endif
}

// Sums over the four neighbours of a lane, plus a number: as products with ones, of two parts of each number, as TF32
// holds 11 bits.
class NeighbourSums {
 public:
  // Plus: four times the same.
  template <class Function>
  __device__ __forceinline__ explicit NeighbourSums(Function plus) : plus_{plus(), plus(), plus(), plus()} {}
  __device__ __forceinline__ float2 operator()(float first, float second) const {
#if __CUDA_ARCH__ >= 800
    const uint32_t a[2] = {__float_as_uint(first) & 0xffffe000u, __float_as_uint(second) & 0xffffe000u};
    const float rest[2] = {first - __uint_as_float(a[0]), second - __uint_as_float(a[1])};
    float sums[4];
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(__float_as_uint(rest[0])), "r"(__float_as_uint(rest[1])),
          "r"(__float_as_uint(1.0f)), "r"(__float_as_uint(1.0f)), "f"(plus_[0]), "f"(plus_[1]), "f"(plus_[2]),
          "f"(plus_[3]));
    return {sums[0], sums[2]};
#else
    first += shuffle_xor(first, 1), second += shuffle_xor(second, 1);
    return {plus_[0] + first + shuffle_xor(first, 2), plus_[0] + second + shuffle_xor(second, 2)};
#endif
  }

 private:
  float plus_[4];
};

}  // namespace reattn
