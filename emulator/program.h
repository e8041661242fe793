// A kernel's PTX as a list of instructions: what the machine executes.
//
// Every operand is a number of a register. What is no register in the text becomes one that holds it: an immediate, the
// address of a symbol, tid and the like.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

// Wrong in the kernel, or unknown to the emulator.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Type : uint8_t {
  none,
  b8,
  u8,
  s8,
  b16,
  u16,
  s16,
  f16,
  bf16,
  b32,
  u32,
  s32,
  f32,
  tf32,
  f16x2,
  bf16x2,
  s16x2,
  u16x2,
  b64,
  u64,
  s64,
  f64,
  b128,
  pred
};
int size_of(Type type);
inline bool is_float(Type t) { return t == Type::f32 || t == Type::f64 || t == Type::f16 || t == Type::bf16; }
inline bool is_signed(Type t) { return t == Type::s8 || t == Type::s16 || t == Type::s32 || t == Type::s64; }
inline bool is_wide(Type t) { return size_of(t) == 8; }

enum class Op : uint8_t {
  // Arithmetic on what is in registers.
  mov,
  pack,
  unpack,
  add,
  sub,
  mul,
  mad,
  fma,
  div,
  rem,
  min,
  max,
  neg,
  abs,
  sqrt,
  rcp,
  rsqrt,
  ex2,
  lg2,
  and_,
  or_,
  xor_,
  not_,
  shl,
  shr,
  bfe,
  bfi,
  prmt,
  lop3,
  shf,
  popc,
  clz,
  brev,
  setp,
  selp,
  cvt,
  // Memory.
  ld,
  st,
  cp_async,
  cp_commit,
  cp_wait,
  ldmatrix,
  stmatrix,
  // Warps and blocks.
  shfl,
  vote,
  redux,
  activemask,
  movmatrix,
  mma,
  bar,
  bar_warp,
  fence,
  prefetch,
  bra,
  ret,
};

enum class Space : uint8_t { none, param, shared, global };
enum class Compare : uint8_t { eq, ne, lt, le, gt, ge, num, nan };
// Which half of a product; how lanes are paired; what a warp's votes or numbers become.
enum class Mode : uint8_t { none, lo, hi, wide, bfly, idx, up, down, ballot, all, any, uni, left, right, wait_all };

// A number of a register: of 32 bits (or fewer), of 64, or a predicate. The type that an instruction names says which.
using Register = int;
constexpr Register kNone = -1;

struct Instruction {
  Op op;
  Type type = Type::none, from = Type::none;  // from: of cvt, and of mma's operands a and b
  Space space = Space::none;
  Compare compare = Compare::eq;
  Mode mode = Mode::none;
  Op combine = Op::mov;  // setp's and, or, xor with a predicate; redux's operation
  bool unordered = false, flush = false, approximate = false, truncate = false, to_integer = false, transposed = false;
  bool nan = false, saturate = false, wrap = true, contractable = false;
  bool narrow_shared = false;  // the address is a 32-bit register
  bool widens = false;         // a load of fewer bits into a register of 64
  uint8_t vector = 1;          // registers that are loaded or stored; matrices; the k of mma
  Register guard = kNone;
  bool negated_guard = false;
  std::array<Register, 8> to{};  // unused ones are kNone
  std::array<Register, 12> of{};
  int64_t offset = 0;  // of an address
  int target = -1;     // of a branch
  int line = 0;        // in the PTX
  int source = -1;     // in sources
  std::string text;
  std::string name;  // the opcode with its modifiers
};

struct Parameter {
  std::string name;
  int offset, bytes;
};

class Program {
 public:
  // Throws Fault where the text holds no such kernel, or an instruction that the emulator does not know.
  Program(const std::string& ptx, const std::string& entry, bool contract);

  std::string ptx, name;
  int threads = 0;  // that .reqntid or .maxntid gives, 0 for neither
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  int static_shared = 0;
  std::vector<Instruction> instructions;
  std::vector<std::pair<std::string, int>> sources;  // (file, line) by number

  // Registers by kind, and those that hold what the text says.
  int narrow = 0, wide = 0, predicates = 0;
  struct Constant {
    Register at;
    uint64_t value;
    bool wide;
  };
  std::vector<Constant> constants;
  std::vector<std::pair<Register, bool>> constant_predicates;
  // tid.x and the like, by name.
  std::map<std::string, Register> specials;

  // Where parameters begin in the space of parameters: no valid address of another.
  static constexpr uint64_t kParameters = 0x1000;

 private:
  friend class Parser;
  void contract_products();
  static std::vector<std::pair<bool, Register>> targets_of(const Instruction& instruction);
};

}  // namespace emulator
