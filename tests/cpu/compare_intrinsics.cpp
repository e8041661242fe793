// The emulated bfloat16 instructions of AVX-512 against those of this CPU. Compiled twice: with -DREATTN_EMULATED, and
// for a CPU that has them. Prints what differs; exits with 1 if anything does.
#include <cstdint>
#include <cstring>

#if defined(REATTN_EMULATED)
#include <random>

#include "emulated_intrinsics.h"
#define SIDE emulated_side
#else
#include <immintrin.h>
#define SIDE hardware_side
#endif

namespace SIDE {

// 16 sums of two products each.
void dots(const uint32_t* sum, const uint32_t* a, const uint32_t* b, uint32_t* result) {
  __m512 sums;
  __m512bh left, right;
  std::memcpy(&sums, sum, sizeof sums);
  std::memcpy(&left, a, sizeof left);
  std::memcpy(&right, b, sizeof right);
  const __m512 found = _mm512_dpbf16_ps(sums, left, right);
  std::memcpy(result, &found, sizeof found);
}

// 16 numbers rounded to bfloat16.
void round(const uint32_t* from, uint16_t* result) {
  __m512 numbers;
  std::memcpy(&numbers, from, sizeof numbers);
  const __m256bh found = _mm512_cvtneps_pbh(numbers);
  std::memcpy(result, &found, sizeof found);
}

}  // namespace SIDE

#if defined(REATTN_EMULATED)
namespace hardware_side {
void dots(const uint32_t*, const uint32_t*, const uint32_t*, uint32_t*);
void round(const uint32_t*, uint16_t*);
}  // namespace hardware_side

namespace {

// Exponents of an operand and of a sum: from, and how many. Zero is that of numbers below the normal ones.
struct Range {
  const char* name;
  uint32_t operand, operands, sum, sums;
};

bool is_nan(uint32_t bits) { return (bits & 0x7fffffff) > 0x7f800000; }
bool same(uint32_t a, uint32_t b) { return a == b || (is_nan(a) && is_nan(b)); }

}  // namespace

int main() {
  const Range ranges[] = {{"around 1", 120, 14, 115, 24},
                          {"any", 0, 256, 0, 256},
                          {"products below the normal numbers", 30, 60, 0, 40},
                          {"operands below the normal numbers", 0, 3, 0, 3},
                          {"sums below the normal numbers", 60, 8, 0, 8},
                          {"above the largest", 185, 10, 245, 11}};
  std::mt19937 generator(1);
  const auto draw = [&](uint32_t sign_and_fraction, int shift, uint32_t from, uint32_t exponents) {
    return (uint32_t(generator()) & sign_and_fraction) | (from + uint32_t(generator()) % exponents) << shift;
  };
  long compared = 0, wrong = 0;
  for (const Range& range : ranges)
    for (int turn = 0; turn < 25000; turn++) {
      uint32_t a[16], b[16], sum[16], found[16], right[16];
      uint16_t found_rounded[16], right_rounded[16];
      for (int i = 0; i < 16; i++) {
        const auto operand = [&] { return draw(0x807f, 7, range.operand, range.operands); };
        a[i] = operand() << 16 | operand();
        b[i] = operand() << 16 | operand();
        sum[i] = draw(0x807fffff, 23, range.sum, range.sums);
      }
      emulated_side::dots(sum, a, b, found);
      hardware_side::dots(sum, a, b, right);
      emulated_side::round(sum, found_rounded);
      hardware_side::round(sum, right_rounded);
      for (int i = 0; i < 16; i++) {
        const bool product = same(found[i], right[i]);
        const bool rounding = same(uint32_t(found_rounded[i]) << 16, uint32_t(right_rounded[i]) << 16);
        compared += 2;
        wrong += !product + !rounding;
        if ((!product || !rounding) && wrong <= 20)
          std::printf("%s: %08x + %08x . %08x: %08x, not %08x; rounded %04x, not %04x\n", range.name, sum[i], a[i],
                      b[i], found[i], right[i], found_rounded[i], right_rounded[i]);
      }
    }
  std::printf("%ld numbers, %ld wrong\n", compared, wrong);
  return wrong > 0;
}
#endif
