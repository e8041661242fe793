#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace reattn {

#define REATTN_DECLARE(ISA)       \
  namespace ISA {                 \
  extern const Kernels kFloat32;  \
  extern const Kernels kBFloat16; \
  }
REATTN_DECLARE(portable)
REATTN_DECLARE(avx2)
REATTN_DECLARE(avx512)
REATTN_DECLARE(avx512_bf16)
REATTN_DECLARE(amx)
#undef REATTN_DECLARE

namespace {

#if defined(__x86_64__)
// Clang's __builtin_cpu_supports did not always know this name.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Intel's CPUs take two clocks for a dot product of bfloat16 pairs, in which float32 does twice as much.
bool has_fast_dots() { return !__builtin_cpu_is("intel"); }

// The CPU has tiles, and the kernel lets this process use their registers.
bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const unsigned tile = 1u << 24, bf16 = 1u << 22;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & (tile | bf16)) != (tile | bf16)) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<InstructionSet> find_instruction_sets() {
  std::vector<InstructionSet> found{{"portable", &portable::kFloat32, nullptr, true}};
#ifdef REATTN_BUILT_AVX2
  found.push_back({"avx2", &avx2::kFloat32, nullptr, has_avx2()});
#endif
#ifdef REATTN_BUILT_AVX512
  found.push_back({"avx512", &avx512::kFloat32, nullptr, has_avx512()});
#endif
#ifdef REATTN_BUILT_AVX512_BF16
  found.push_back({"avx512_bf16", &avx512_bf16::kFloat32, &avx512_bf16::kBFloat16, has_avx512_bf16(), has_fast_dots()});
#endif
#ifdef REATTN_BUILT_AMX
  found.push_back({"amx", &amx::kFloat32, &amx::kBFloat16, has_amx()});
#endif
  return found;
}

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = find_instruction_sets();
  return sets;
}

}  // namespace reattn
