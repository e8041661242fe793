// AVX-512's bfloat16 instructions and AMX's tiles in plain C++, after Intel's Software Developer's Manual, so that the
// kernels for them run in tests on any CPU. Compiled with -DREATTN_EMULATED, or -DREATTN_EMULATED
// -DREATTN_EMULATED_AMX. compare_intrinsics.cpp holds those of AVX-512 to the CPU's own, bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// A number below the normal ones is zero of the same sign, as an operand and as a result.
inline float flush(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float widen(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return flush(value);
}

// Rounded once, to nearest, whatever the control register says.
inline float add_product(float sum, uint16_t a, uint16_t b) { return flush(std::fma(widen(a), widen(b), flush(sum))); }

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "AMX would fault: %s\n", what);
  std::abort();
}

// The tile registers of one thread, and their configuration.
struct Tiles {
  bool configured = false;
  uint16_t row_bytes[8];
  uint8_t rows[8];
  uint8_t data[8][16][64];
};
inline thread_local Tiles tiles;

}  // namespace emulated

typedef emulated::Floats __m512;
typedef emulated::Words __m512bh;
typedef emulated::Halves __m256bh;

inline __m512 _mm512_sqrt_ps(__m512 v) {
  for (int i = 0; i < 16; i++) v[i] = __builtin_sqrtf(v[i]);
  return v;
}

inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  for (int i = 0; i < 16; i++) {
    const float first = emulated::add_product(sum[i], uint16_t(a[i] >> 16), uint16_t(b[i] >> 16));
    sum[i] = emulated::add_product(first, uint16_t(a[i]), uint16_t(b[i]));
  }
  return sum;
}

inline __m256bh _mm512_cvtneps_pbh(__m512 v) {
  __m256bh halves;
  for (int i = 0; i < 16; i++) {
    const float value = emulated::flush(v[i]);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    halves[i] = uint16_t(value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40);
  }
  return halves;
}

inline void _tile_loadconfig(const void* from) {
  const uint8_t* bytes = static_cast<const uint8_t*>(from);
  emulated::require(bytes[0] == 1, "palette 1 is the only one");
  for (int i = 1; i < 16; i++) emulated::require(bytes[i] == 0, "start row and reserved bytes are zero");
  for (int i = 0; i < 8; i++) {
    std::memcpy(&emulated::tiles.row_bytes[i], bytes + 16 + 2 * i, 2);
    emulated::tiles.rows[i] = bytes[48 + i];
    emulated::require(emulated::tiles.row_bytes[i] <= 64 && emulated::tiles.rows[i] <= 16,
                      "at most 16 rows of 64 bytes");
  }
  for (int i = 8; i < 16; i++)
    emulated::require(bytes[16 + 2 * i] == 0 && bytes[17 + 2 * i] == 0 && bytes[48 + i] == 0, "eight tiles");
  std::memset(emulated::tiles.data, 0, sizeof emulated::tiles.data);
  emulated::tiles.configured = true;
}

inline void _tile_release() { emulated::tiles.configured = false; }

inline void _tile_zero(int tile) {
  emulated::require(emulated::tiles.configured, "no configuration");
  std::memset(emulated::tiles.data[tile], 0, sizeof emulated::tiles.data[tile]);
}

inline void _tile_loadd(int tile, const void* from, int64_t stride) {
  _tile_zero(tile);
  for (int r = 0; r < emulated::tiles.rows[tile]; r++)
    std::memcpy(emulated::tiles.data[tile][r], static_cast<const char*>(from) + r * stride,
                emulated::tiles.row_bytes[tile]);
}

inline void _tile_stored(int tile, void* to, int64_t stride) {
  emulated::require(emulated::tiles.configured, "no configuration");
  for (int r = 0; r < emulated::tiles.rows[tile]; r++)
    std::memcpy(static_cast<char*>(to) + r * stride, emulated::tiles.data[tile][r], emulated::tiles.row_bytes[tile]);
}

inline void _tile_dpbf16ps(int sum, int a, int b) {
  const emulated::Tiles& tiles = emulated::tiles;
  emulated::require(tiles.configured, "no configuration");
  emulated::require(tiles.rows[sum] == tiles.rows[a] && tiles.row_bytes[sum] == tiles.row_bytes[b] &&
                        tiles.row_bytes[a] == 4 * tiles.rows[b],
                    "tiles fit together");
  // The first of each pair and the second are summed apart, from zero, and together before they are added.
  for (int m = 0; m < tiles.rows[a]; m++)
    for (int n = 0; n < tiles.row_bytes[b] / 4; n++) {
      float totals[2] = {0, 0}, total;
      for (int k = 0; k < tiles.rows[b]; k++) {
        uint16_t left[2], right[2];
        std::memcpy(left, tiles.data[a][m] + 4 * k, 4);
        std::memcpy(right, tiles.data[b][k] + 4 * n, 4);
        for (int i = 0; i < 2; i++) totals[i] = emulated::add_product(totals[i], left[i], right[i]);
      }
      std::memcpy(&total, tiles.data[sum][m] + 4 * n, 4);
      total = emulated::flush(emulated::flush(total) + emulated::flush(totals[0] + totals[1]));
      std::memcpy(emulated::tiles.data[sum][m] + 4 * n, &total, 4);
    }
}
