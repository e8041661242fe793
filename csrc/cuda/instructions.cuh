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
__device__ __forceinline__ int warps() { return blockDim.x / kWarp; }
__device__ __forceinline__ int thread() { return threadIdx.x; }
__device__ __forceinline__ int threads() { return blockDim.x; }
__device__ __forceinline__ int block_x() { return blockIdx.x; }
__device__ __forceinline__ int block_y() { return blockIdx.y; }

__device__ __forceinline__ void sync_block() { __syncthreads(); }
// Orders what the lanes of a warp read and write in shared memory.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// The number; what is made of it is not kept in registers over a loop: they are dearer than arithmetic.
__device__ __forceinline__ int recomputed(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

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
  if constexpr (sizeof(V) == 16)
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
template <class V, class T>
__device__ __forceinline__ void store(Shared<T> to, V value) {
  if constexpr (sizeof(V) == 8)
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
template <class V>
__device__ __forceinline__ void write(void* to, V value) {
  *static_cast<V*>(to) = value;
}

// 16 bytes from device to shared memory, both at multiples of 16; zeros where outside, and then nothing is read. They
// are there after copies_arrived and a sync of the threads that read them.
__device__ __forceinline__ void copy_async(Shared<char> to, const void* from, bool inside) {
#if __CUDA_ARCH__ >= 800
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address), "l"(from), "r"(bytes) : "memory");
#else
  const uint4 value = inside ? read<uint4>(from) : uint4{};
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to.address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
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

// ldmatrix: four 8x8 matrices of 16-bit elements. Lane 8 m + r gives the address of row r of matrix m, 16 bytes; it
// gets of every matrix elements 2 (lane % 4) and the next of row lane / 4; transposed, of column lane / 4 instead.
template <class T>
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
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

__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
__device__ __forceinline__ float shuffle(float value, int from_lane) { return __shfl_sync(~0u, value, from_lane); }

// The product rounded, whatever is added to it.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float log2(float x) { return log2f(x); }
__device__ __forceinline__ float inverse_sqrt(float x) { return rsqrtf(x); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
// The upper half of a 64-bit product.
__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

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

// The same into d, from c = upper in rows g and lower in rows g + 8.
template <class T>
__device__ __forceinline__ void multiply_from(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                              float upper, float lower) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %11, %11};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(upper), "f"(lower));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %11, %11};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(upper), "f"(lower));
#else
  d[0] = d[1] = upper, d[2] = d[3] = lower;
  multiply_add<T>(d, a, b);
#endif
}

}  // namespace reattn
