#include "machine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <unordered_map>

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAll = ~0u;
// More instructions than any launch takes here: it would not end.
constexpr uint64_t kMostInstructions = 4'000'000'000;

using Lanes32 = uint32_t[kWarp];
using Lanes64 = uint64_t[kWarp];

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float half_to_float(uint32_t bits) { return float(bits_as<_Float16>(uint16_t(bits))); }
inline uint32_t float_to_half(float x) { return bits_as<uint16_t>(_Float16(x)); }
inline float bfloat_to_float(uint32_t bits) { return bits_as<float>(bits << 16); }
inline uint32_t float_to_bfloat(float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  return x == x ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : 0x7fffu;
}
inline float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

// What an approximate instruction may be off, as a part of its result, and at least: drawn from the argument, so that
// equal arguments give equal results. Powers of two stay exact, as they do on the device.
inline float approximate(double exact, float argument, double most, double least = 0) {
  const float rounded = float(exact);
  if ((bits_as<uint32_t>(rounded) & 0x7fffff) == 0 || !std::isfinite(rounded)) return rounded;
  const uint32_t drawn = bits_as<uint32_t>(argument) * 2654435761u;
  return float(exact + std::max(most * std::fabs(exact), least) * (double(drawn >> 8) / (1 << 23) - 1));
}
// PTX ISA, "Floating Point Instructions": the largest errors that it names.
const double kExp2Error = std::exp2(-22.5), kLog2Error = std::exp2(-22.6), kRsqrtError = std::exp2(-22.9);
const double kReciprocalError = std::exp2(-23.0), kDivisionError = std::exp2(-22.0);

// Rounded toward zero, as tensor cores leave their sums.
inline float truncated(double x) {
  float rounded = float(x);
  if (std::fabs(double(rounded)) > std::fabs(x) && std::isfinite(rounded))
    rounded = bits_as<float>(bits_as<uint32_t>(rounded) - 1);
  return rounded;
}

constexpr int32_t kNobody = -1, kMany = -2, kManyOfWarp = -16;

// Who touched a piece of memory last. Times count up over a launch: of the block, its barriers; of the warp, its own.
struct Touched {
  uint32_t write_time = 0, write_warp_time = 0, read_time = 0, read_warp_time = 0;
  int32_t writer = kNobody, reader = kNobody;  // threads, or several: kMany, or kManyOfWarp - warp
  uint32_t write_issue = 0;                    // which of the launch's warp instructions wrote
  bool mixed = false;                          // not the same number was written all that time
};
// Bytes that are watched as one. Words of shared memory of which parts were written are watched by the byte; in device
// memory nothing smaller is written.
constexpr int kWord = 4, kDeviceGranule = 2;

// In device memory the blocks count too: none knows when another one runs.
struct TouchedOnDevice {
  Touched by;
  int32_t writer = kNobody, reader = kNobody;  // blocks, or kMany
  int32_t early_reader = kNobody;              // that read what the launch had not written yet
  bool changed = false;                        // a block wrote one number after another
  bool several = false;                        // blocks wrote, all the same
};

// Pieces of a range of device memory, made as they are touched: tensors may be sparse views of much.
class Pieces {
 public:
  TouchedOnDevice& operator[](uint64_t piece) {
    const uint64_t page = piece / kPage;
    if (page != last_) page_ = pages_.try_emplace(page, kPage).first->second.data(), last_ = page;
    return page_[piece % kPage];
  }

 private:
  static constexpr uint64_t kPage = 4096;
  std::unordered_map<uint64_t, std::vector<TouchedOnDevice>> pages_;
  uint64_t last_ = ~uint64_t(0);
  TouchedOnDevice* page_ = nullptr;
};

struct Range {
  uint64_t begin, end;
  Pieces touched;
};

struct Copy {
  int lane, group, bytes;
  uint32_t to;
  std::array<uint8_t, 16> data;
};

// Lanes that are at the same instruction.
struct Group {
  int at;
  uint32_t lanes;
};

struct Warp {
  int number;
  uint32_t alive = 0;
  bool waiting = false;
  uint32_t time = 1;  // counts what synchronises the warp
  std::vector<Group> groups;
  std::unique_ptr<Lanes32[]> narrow;
  std::unique_ptr<Lanes64[]> wide;
  std::unique_ptr<uint32_t[]> predicates;
  std::vector<Copy> copies;
  int closed[kWarp] = {};
};

class Machine {
 public:
  Machine(const Program& program, const Launch& launch) : p_(program), l_(launch) {
    report_.counts.resize(program.instructions.size());
    if (launch.threads < 1 || launch.threads > 1024 || launch.threads % kWarp)
      throw Fault(p_.name + ": " + std::to_string(launch.threads) + " threads in a block, not whole warps up to 1024");
    if (p_.threads && launch.threads > p_.threads)
      throw Fault(p_.name + ": " + std::to_string(launch.threads) + " threads in a block of a kernel for " +
                  std::to_string(p_.threads));
    if (int(launch.arguments.size()) < p_.parameter_bytes)
      throw Fault(p_.name + ": " + std::to_string(launch.arguments.size()) + " bytes of arguments, not " +
                  std::to_string(p_.parameter_bytes));
    for (const Memory& memory : launch.memory)
      if (memory.bytes) ranges_.push_back({memory.address, memory.address + memory.bytes, {}});
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    std::vector<Range> merged;
    for (Range& range : ranges_) {
      if (!merged.empty() && range.begin <= merged.back().end)
        merged.back().end = std::max(merged.back().end, range.end);
      else
        merged.push_back(std::move(range));
    }
    ranges_ = std::move(merged);
    const int dynamic_from = (p_.static_shared + 127) / 128 * 128;
    shared_bytes_ = uint32_t(launch.shared_bytes ? dynamic_from + launch.shared_bytes : p_.static_shared);
    shared_.resize(shared_bytes_);
    touched_.resize(shared_bytes_ / kWord + 1);
    parts_.resize(touched_.size());
    in_flight_.resize(touched_.size());
    for (int w = 0; w < launch.threads / kWarp; w++) {
      Warp warp;
      warp.number = w;
      warp.narrow = std::make_unique<Lanes32[]>(size_t(p_.narrow) + 1);
      warp.wide = std::make_unique<Lanes64[]>(size_t(p_.wide) + 1);
      warp.predicates = std::make_unique<uint32_t[]>(size_t(p_.predicates) + 1);
      warps_.push_back(std::move(warp));
    }
  }

  Report run() {
    const int64_t all = int64_t(l_.grid[0]) * l_.grid[1] * l_.grid[2];
    if (l_.blocks.empty())
      for (int64_t block = 0; block < all; block++) run_block(block);
    else
      for (const int64_t block : l_.blocks) run_block(block);
    return std::move(report_);
  }

 private:
  [[noreturn]] void fail(const std::string& what, int lane = -1) const {
    std::string where = p_.name + ": block " + std::to_string(block_);
    if (warp_) where += ", warp " + std::to_string(warp_->number);
    if (lane >= 0) where += ", lane " + std::to_string(lane);
    if (at_) {
      where += ", line " + std::to_string(at_->line) + " (" + at_->text + ")";
      if (at_->source >= 0) {
        const auto& [file, line] = p_.sources[size_t(at_->source)];
        where += " from " + file + ":" + std::to_string(line);
      }
    }
    throw Fault(where + ": " + what);
  }

  void run_block(int64_t block) {
    block_ = block;
    time_++;
    block_began_ = time_;
    std::memset(shared_.data(), 0xff, shared_.size());
    std::fill(in_flight_.begin(), in_flight_.end(), int16_t(-1));
    for (Warp& warp : warps_) start(warp);
    for (bool any = true; any;) {
      any = false;
      for (Warp& warp : warps_) {
        if (warp.groups.empty()) continue;
        warp_ = &warp;
        advance(warp);
        any = true;
      }
      warp_ = nullptr, at_ = nullptr;
      // Every warp that is left waits at the barrier: it is for all.
      time_++;
      int waiting = 0;
      for (Warp& warp : warps_) {
        if (warp.waiting) waiting++, warp_ = &warp, at_ = &p_.instructions[size_t(warp.groups[0].at) - 1];
        warp.waiting = false, warp.time++;
      }
      if (waiting && waiting < int(warps_.size()))
        fail("a barrier that only " + std::to_string(waiting) + " of " + std::to_string(warps_.size()) +
             " warps reach, the others having ended");
    }
  }

  void start(Warp& warp) {
    warp.alive = kAll;
    warp.groups.assign(1, {0, kAll});
    warp.copies.clear();
    warp.waiting = false;
    std::fill(std::begin(warp.closed), std::end(warp.closed), 0);
    warp.time++;
    // Nothing is right by chance because a register holds zero.
    std::memset(warp.narrow.get(), 0xff, sizeof(Lanes32) * size_t(p_.narrow));
    std::memset(warp.wide.get(), 0xff, sizeof(Lanes64) * size_t(p_.wide));
    std::memset(warp.predicates.get(), 0, sizeof(uint32_t) * size_t(p_.predicates));
    for (const auto& constant : p_.constants)
      for (int lane = 0; lane < kWarp; lane++) {
        if (constant.wide)
          warp.wide[size_t(constant.at)][lane] = constant.value;
        else
          warp.narrow[size_t(constant.at)][lane] = uint32_t(constant.value);
      }
    for (const auto& [at, value] : p_.constant_predicates) warp.predicates[size_t(at)] = value ? kAll : 0;
    const uint32_t x = uint32_t(block_ % l_.grid[0]), y = uint32_t(block_ / l_.grid[0] % l_.grid[1]);
    const uint32_t z = uint32_t(block_ / l_.grid[0] / l_.grid[1]);
    for (const auto& [name, at] : p_.specials)
      for (int lane = 0; lane < kWarp; lane++) {
        uint32_t value = 0;
        if (name == "%tid.x")
          value = uint32_t(warp.number * kWarp + lane);
        else if (name == "%laneid")
          value = uint32_t(lane);
        else if (name == "%ntid.x")
          value = uint32_t(l_.threads);
        else if (name == "%ctaid.x")
          value = x;
        else if (name == "%ctaid.y")
          value = y;
        else if (name == "%ctaid.z")
          value = z;
        else if (name.rfind("%nctaid.", 0) == 0)
          value = uint32_t(l_.grid[size_t(name.back() - 'x')]);
        else if (name.rfind("%ntid.", 0) == 0)
          value = 1;
        warp.narrow[size_t(at)][lane] = value;
      }
  }

  // Runs the warp until it has ended or waits at a barrier. Of several groups the one that is farthest behind goes on,
  // so that lanes meet again where their paths do.
  void advance(Warp& warp) {
    narrow_ = warp.narrow.get(), wide_ = warp.wide.get(), predicates_ = warp.predicates.get();
    while (!warp.groups.empty()) {
      size_t least = 0;
      for (size_t g = 1; g < warp.groups.size(); g++)
        if (warp.groups[g].at < warp.groups[least].at) least = g;
      Group group = warp.groups[least];
      warp.groups.erase(warp.groups.begin() + long(least));
      int next = std::numeric_limits<int>::max();
      for (const Group& other : warp.groups) next = std::min(next, other.at);
      while (group.at < next) {
        const Instruction& i = p_.instructions[size_t(group.at)];
        at_ = &i;
        report_.counts[size_t(group.at)].executed++;
        if (++executed_ > kMostInstructions) fail("the launch does not end");
        uint32_t lanes = group.lanes;
        if (i.guard != kNone) lanes &= i.negated_guard ? ~predicates_[i.guard] : predicates_[i.guard];
        if (i.op == Op::bra) {
          if (lanes == group.lanes) {
            group.at = i.target;
            continue_from(warp, group, next);
            if (!group.lanes) break;
            continue;
          }
          if (lanes) {
            warp.groups.push_back({i.target, lanes});
            merge_last(warp);
            next = std::min(next, i.target);
            group.lanes &= ~lanes;
          }
        } else if (i.op == Op::ret) {
          warp.alive &= ~lanes;
          group.lanes &= ~lanes;
          if (!group.lanes) break;
        } else if (i.op == Op::bar) {
          if (lanes) {
            if (lanes != warp.alive) fail("a barrier that not all lanes of the warp reach", first(warp.alive & ~lanes));
            group.at++;
            warp.groups.push_back(group);
            warp.waiting = true;
            return;
          }
        } else if (lanes) {
          execute(i, lanes);
        }
        group.at++;
      }
      if (group.lanes) {
        warp.groups.push_back(group);
        merge_last(warp);
      }
    }
  }

  // After a jump: behind all others still, or else put back among them.
  void continue_from(Warp& warp, Group& group, int next) {
    if (group.at < next) return;
    warp.groups.push_back(group);
    merge_last(warp);
    group.lanes = 0;
  }

  static void merge_last(Warp& warp) {
    const Group last = warp.groups.back();
    for (size_t g = 0; g + 1 < warp.groups.size(); g++)
      if (warp.groups[g].at == last.at) {
        warp.groups[g].lanes |= last.lanes;
        warp.groups.pop_back();
        return;
      }
  }

  static int first(uint32_t lanes) { return lanes ? __builtin_ctz(lanes) : -1; }

  template <class F>
  static void each(uint32_t lanes, const F& f) {
    if (lanes == kAll)
      for (int lane = 0; lane < kWarp; lane++) f(lane);
    else
      for (uint32_t left = lanes; left; left &= left - 1) f(__builtin_ctz(left));
  }

  // A register's lanes as T. Types of 16 and 8 bits lie in 32.
  template <class T>
  T get(Register r, int lane) const {
    if constexpr (sizeof(T) == 8)
      return bits_as<T>(wide_[r][lane]);
    else if constexpr (sizeof(T) == 4)
      return bits_as<T>(narrow_[r][lane]);
    else
      return static_cast<T>(narrow_[r][lane]);
  }
  // A NaN that arithmetic gives has no payload.
  template <class T>
  void set(Register r, int lane, T value) {
    if constexpr (std::is_floating_point_v<T>)
      if (value != value)
        value = sizeof(T) == 8 ? T(bits_as<double>(0x7fffffffffffffffull)) : T(bits_as<float>(0x7fffffffu));
    if constexpr (sizeof(T) == 8)
      wide_[r][lane] = bits_as<uint64_t>(value);
    else if constexpr (sizeof(T) == 4)
      narrow_[r][lane] = bits_as<uint32_t>(value);
    else
      narrow_[r][lane] = uint32_t(std::make_unsigned_t<T>(value));
  }

  template <class T, class F>
  void unary(const Instruction& i, uint32_t lanes, const F& f) {
    const Register a = i.of[0], d = i.to[0];
    each(lanes, [&](int lane) { set<T>(d, lane, T(f(get<T>(a, lane)))); });
  }
  template <class T, class F>
  void binary(const Instruction& i, uint32_t lanes, const F& f) {
    const Register a = i.of[0], b = i.of[1], d = i.to[0];
    each(lanes, [&](int lane) { set<T>(d, lane, T(f(get<T>(a, lane), get<T>(b, lane)))); });
  }
  template <class T, class F>
  void ternary(const Instruction& i, uint32_t lanes, const F& f) {
    const Register a = i.of[0], b = i.of[1], c = i.of[2], d = i.to[0];
    each(lanes, [&](int lane) { set<T>(d, lane, T(f(get<T>(a, lane), get<T>(b, lane), get<T>(c, lane)))); });
  }

  [[noreturn]] void unknown(const Instruction& i) const { fail("unknown to the emulator: " + i.name); }

  void execute(const Instruction& i, uint32_t lanes) {
    switch (i.op) {
      case Op::ld:
      case Op::st:
        return access(i, lanes);
      case Op::cp_async:
        return copy_async(i, lanes);
      case Op::cp_commit:
        return each(lanes, [&](int lane) { warp_->closed[lane]++; });
      case Op::cp_wait:
        return wait_copies(i, lanes);
      case Op::ldmatrix:
      case Op::stmatrix:
        return matrices(i, lanes);
      case Op::movmatrix:
        return move_matrix(i, lanes);
      case Op::mma:
        return multiply(i, lanes);
      case Op::shfl:
        return shuffle(i, lanes);
      case Op::vote:
        return vote(i, lanes);
      case Op::redux:
        return reduce(i, lanes);
      case Op::activemask:
        return each(lanes, [&](int lane) { set<uint32_t>(i.to[0], lane, lanes); });
      case Op::bar_warp:
        each(lanes,
             [&](int lane) { whole(lanes, get<uint32_t>(i.of[0], lane) & warp_->alive, "a barrier of the warp"); });
        if (lanes == warp_->alive) warp_->time++;
        return;
      case Op::fence:
        return;
      case Op::prefetch:
        return each(lanes, [&](int lane) { find(get<uint64_t>(i.of[0], lane) + uint64_t(i.offset), 1, lane); });
      case Op::pack:
        return pack(i, lanes);
      case Op::unpack:
        return unpack(i, lanes);
      case Op::setp:
        return compare(i, lanes);
      case Op::selp:
        return select(i, lanes);
      case Op::cvt:
        return convert(i, lanes);
      case Op::mov:
        if (i.type == Type::pred) return blend(i.to[0], predicates_[i.of[0]], lanes);
        if (is_wide(i.type)) return unary<uint64_t>(i, lanes, [](uint64_t a) { return a; });
        return unary<uint32_t>(i, lanes, [](uint32_t a) { return a; });
      case Op::and_:
      case Op::or_:
      case Op::xor_:
      case Op::not_:
        return logic(i, lanes);
      case Op::bfe:
      case Op::bfi:
      case Op::prmt:
      case Op::lop3:
      case Op::shf:
      case Op::popc:
      case Op::clz:
      case Op::brev:
        return bit_fields(i, lanes);
      default:
        break;
    }
    if (i.type == Type::f32) return arithmetic32(i, lanes);
    if (i.type == Type::f64) return arithmetic64(i, lanes);
    if (i.type == Type::f16x2 || i.type == Type::bf16x2) return float_pairs(i, lanes);
    switch (i.type) {
      case Type::s32:
        return integers<int32_t>(i, lanes);
      case Type::u32:
      case Type::b32:
        return integers<uint32_t>(i, lanes);
      case Type::s64:
        return integers<int64_t>(i, lanes);
      case Type::u64:
      case Type::b64:
        return integers<uint64_t>(i, lanes);
      case Type::s16x2:
      case Type::u16x2:
        return pairs(i, lanes);
      case Type::s16:
        return integers<int16_t>(i, lanes);
      case Type::u16:
      case Type::b16:
        return integers<uint16_t>(i, lanes);
      default:
        unknown(i);
    }
  }

  // Arithmetic.

  // Two 16-bit floats in a register, each rounded once.
  void float_pairs(const Instruction& i, uint32_t lanes) {
    if ((i.op != Op::add && i.op != Op::mul && i.op != Op::fma) || i.flush || i.saturate) unknown(i);
    const bool half = i.type == Type::f16x2;
    each(lanes, [&](int lane) {
      uint32_t result = 0;
      for (int shift = 0; shift < 32; shift += 16) {
        const auto element = [&](int n) {
          const uint32_t bits = get<uint32_t>(i.of[n], lane) >> shift & 0xffff;
          return double(half ? half_to_float(bits) : bfloat_to_float(bits));
        };
        const double a = element(0), b = element(1);  // their product is exact
        const double x = i.op == Op::add ? a + b : i.op == Op::mul ? a * b : a * b + element(2);
        result |= (half ? bits_as<uint16_t>(_Float16(x)) : float_to_bfloat(to_odd(x))) << shift;
      }
      set(i.to[0], lane, result);
    });
  }
  // So that a second rounding, to fewer digits, gives what one would have given.
  static float to_odd(double x) {
    const float nearest = float(x);
    if (double(nearest) == x || !std::isfinite(nearest)) return nearest;
    const uint32_t bits = bits_as<uint32_t>(nearest) - (std::fabs(double(nearest)) > std::fabs(x));
    return bits_as<float>(bits | 1);
  }

  void arithmetic32(const Instruction& i, uint32_t lanes) {
    if (i.flush) {
      with_flush([](float x) { return flushed(x); }, i, lanes);
    } else {
      with_flush([](float x) { return x; }, i, lanes);
    }
  }

  template <class Flush>
  void with_flush(const Flush& z, const Instruction& i, uint32_t lanes) {
    const auto one = [&](auto f) { unary<float>(i, lanes, [&](float a) { return z(f(z(a))); }); };
    const auto two = [&](auto f) { binary<float>(i, lanes, [&](float a, float b) { return z(f(z(a), z(b))); }); };
    if (i.saturate || i.truncate) unknown(i);
    switch (i.op) {
      case Op::add:
        return two([](float a, float b) { return a + b; });
      case Op::sub:
        return two([](float a, float b) { return a - b; });
      case Op::mul:
        return two([](float a, float b) { return a * b; });
      case Op::fma: {
        const float product = i.combine == Op::sub && i.mode == Mode::right ? -1.0f : 1.0f;
        const float addend = i.combine == Op::sub && i.mode == Mode::left ? -1.0f : 1.0f;
        return ternary<float>(i, lanes, [&](float a, float b, float c) {
          return z(__builtin_fmaf(product * z(a), z(b), addend * z(c)));
        });
      }
      case Op::div:
        if (i.approximate)
          return two([](float a, float b) {
            const bool exact = (bits_as<uint32_t>(b) & 0x7fffff) == 0;
            return exact ? a / b : approximate(double(a) / b, a + b, kDivisionError);
          });
        return two([](float a, float b) { return a / b; });
      case Op::min:
        if (i.nan) return two([](float a, float b) { return a != a || b != b ? NAN : std::fmin(a, b); });
        return two([](float a, float b) { return std::fmin(a, b); });
      case Op::max:
        if (i.nan) return two([](float a, float b) { return a != a || b != b ? NAN : std::fmax(a, b); });
        return two([](float a, float b) { return std::fmax(a, b); });
      case Op::neg:
        return one([](float a) { return -a; });
      case Op::abs:
        return one([](float a) { return std::fabs(a); });
      case Op::sqrt:
        if (i.approximate) return one([](float a) { return approximate(std::sqrt(double(a)), a, kReciprocalError); });
        return one([](float a) { return std::sqrt(a); });
      case Op::rcp:
        if (i.approximate) return one([](float a) { return approximate(1 / double(a), a, kReciprocalError); });
        return one([](float a) { return 1 / a; });
      case Op::rsqrt:
        return one([](float a) { return approximate(1 / std::sqrt(double(a)), a, kRsqrtError); });
      case Op::ex2:
        return one([](float a) { return approximate(std::exp2(double(a)), a, kExp2Error); });
      case Op::lg2:
        return one([](float a) { return approximate(std::log2(double(a)), a, kLog2Error, kLog2Error); });
      default:
        unknown(i);
    }
  }

  void arithmetic64(const Instruction& i, uint32_t lanes) {
    if (i.truncate || i.approximate || i.saturate) unknown(i);
    const auto one = [&](auto f) { unary<double>(i, lanes, f); };
    const auto two = [&](auto f) { binary<double>(i, lanes, f); };
    switch (i.op) {
      case Op::add:
        return two([](double a, double b) { return a + b; });
      case Op::sub:
        return two([](double a, double b) { return a - b; });
      case Op::mul:
        return two([](double a, double b) { return a * b; });
      case Op::fma: {
        const double product = i.combine == Op::sub && i.mode == Mode::right ? -1.0 : 1.0;
        const double addend = i.combine == Op::sub && i.mode == Mode::left ? -1.0 : 1.0;
        return ternary<double>(i, lanes,
                               [=](double a, double b, double c) { return __builtin_fma(product * a, b, addend * c); });
      }
      case Op::div:
        return two([](double a, double b) { return a / b; });
      case Op::min:
        return two([](double a, double b) { return std::fmin(a, b); });
      case Op::max:
        return two([](double a, double b) { return std::fmax(a, b); });
      case Op::neg:
        return one([](double a) { return -a; });
      case Op::abs:
        return one([](double a) { return std::fabs(a); });
      case Op::sqrt:
        return one([](double a) { return std::sqrt(a); });
      case Op::rcp:
        return one([](double a) { return 1 / a; });
      default:
        unknown(i);
    }
  }

  template <class T>
  void integers(const Instruction& i, uint32_t lanes) {
    using U = std::make_unsigned_t<T>;
    constexpr int kBits = 8 * int(sizeof(T));
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    const auto two = [&](auto f) { binary<T>(i, lanes, f); };
    if (i.saturate) unknown(i);
    switch (i.op) {
      case Op::add:
        return two([](T a, T b) { return T(U(a) + U(b)); });
      case Op::sub:
        return two([](T a, T b) { return T(U(a) - U(b)); });
      case Op::mul:
      case Op::mad:
        if (i.mode == Mode::wide) return multiply_wide<T>(i, lanes);
        if (i.mode == Mode::hi) {
          const auto high = [](T a, T b) { return T(Wide(a) * Wide(b) >> kBits); };
          if (i.op == Op::mul) return two(high);
          return ternary<T>(i, lanes, [&](T a, T b, T c) { return T(U(high(a, b)) + U(c)); });
        }
        if (i.op == Op::mul) return two([](T a, T b) { return T(uint64_t(a) * uint64_t(b)); });
        return ternary<T>(i, lanes, [](T a, T b, T c) { return T(uint64_t(a) * uint64_t(b) + uint64_t(c)); });
      case Op::div:
      case Op::rem: {
        const bool remainder = i.op == Op::rem;
        each(lanes, [&](int lane) {
          if (get<T>(i.of[1], lane) == 0) fail("a division by zero", lane);
        });
        return two([=](T a, T b) -> T {
          if (std::is_signed_v<T> && b == T(-1)) return remainder ? T(0) : T(U(0) - U(a));
          return remainder ? T(a % b) : T(a / b);
        });
      }
      case Op::min:
        return two([](T a, T b) { return std::min(a, b); });
      case Op::max:
        return two([](T a, T b) { return std::max(a, b); });
      case Op::neg:
        return unary<T>(i, lanes, [](T a) { return T(U(0) - U(a)); });
      case Op::abs:
        return unary<T>(i, lanes, [](T a) { return a < 0 ? T(U(0) - U(a)) : a; });
      case Op::shl:
        return shift<T>(i, lanes, [](T a, uint32_t n) { return n < kBits ? T(U(a) << n) : T(0); });
      case Op::shr:
        return shift<T>(i, lanes, [](T a, uint32_t n) { return n < kBits ? T(a >> n) : a < 0 ? T(-1) : T(0); });
      default:
        unknown(i);
    }
  }

  // Two numbers of 16 bits in a register.
  void pairs(const Instruction& i, uint32_t lanes) {
    if ((i.op != Op::add && i.op != Op::sub) || i.saturate) unknown(i);
    binary<uint32_t>(i, lanes, [&](uint32_t a, uint32_t b) {
      const auto half = [&](int bits) {
        const uint32_t x = a >> bits, y = b >> bits;
        return (i.op == Op::add ? x + y : x - y) & 0xffff;
      };
      return half(0) | half(16) << 16;
    });
  }

  template <class T, class F>
  void shift(const Instruction& i, uint32_t lanes, const F& f) {
    const Register a = i.of[0], by = i.of[1], d = i.to[0];
    each(lanes, [&](int lane) { set<T>(d, lane, f(get<T>(a, lane), get<uint32_t>(by, lane))); });
  }

  template <class T>
  void multiply_wide(const Instruction& i, uint32_t lanes) {
    if constexpr (sizeof(T) == 8) {
      unknown(i);
    } else {
      using W = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                                   std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
      each(lanes, [&](int lane) {
        const W product = W(get<T>(i.of[0], lane)) * W(get<T>(i.of[1], lane));
        set<W>(i.to[0], lane,
               i.op == Op::mad ? W(std::make_unsigned_t<W>(product) + std::make_unsigned_t<W>(get<W>(i.of[2], lane)))
                               : product);
      });
    }
  }

  void logic(const Instruction& i, uint32_t lanes) {
    const auto apply = [&](auto a, auto b) {
      using T = decltype(a);
      return i.op == Op::and_ ? T(a & b) : i.op == Op::or_ ? T(a | b) : i.op == Op::xor_ ? T(a ^ b) : T(~a);
    };
    if (i.type == Type::pred) {
      const uint32_t a = predicates_[i.of[0]], b = i.of[1] == kNone ? 0 : predicates_[i.of[1]];
      return blend(i.to[0], apply(a, b), lanes);
    }
    const Register other = i.op == Op::not_ ? i.of[0] : i.of[1];
    if (is_wide(i.type))
      return each(lanes, [&](int lane) {
        set(i.to[0], lane, apply(get<uint64_t>(i.of[0], lane), get<uint64_t>(other, lane)));
      });
    if (size_of(i.type) == 2)
      return each(lanes, [&](int lane) {
        set<uint16_t>(i.to[0], lane, uint16_t(apply(get<uint32_t>(i.of[0], lane), get<uint32_t>(other, lane))));
      });
    each(lanes, [&](int lane) { set(i.to[0], lane, apply(get<uint32_t>(i.of[0], lane), get<uint32_t>(other, lane))); });
  }

  template <class Word>
  void extract(const Instruction& i, uint32_t lanes) {
    constexpr uint32_t kBits = 8 * sizeof(Word);
    each(lanes, [&](int lane) {
      const uint32_t from = get<uint32_t>(i.of[1], lane) & 0xff, count = get<uint32_t>(i.of[2], lane) & 0xff;
      const Word a = get<Word>(i.of[0], lane);
      const Word sign = !is_signed(i.type) || count == 0 ? 0 : a >> std::min(from + count - 1, kBits - 1) & 1;
      Word value = 0;
      for (uint32_t bit = 0; bit < kBits; bit++)
        value |= (bit < count && from + bit < kBits ? a >> (from + bit) & 1 : sign) << bit;
      set(i.to[0], lane, value);
    });
  }
  void bit_fields(const Instruction& i, uint32_t lanes) {
    const auto of = [&](int n, int lane) { return get<uint32_t>(i.of[size_t(n)], lane); };
    switch (i.op) {
      case Op::bfe:
        return is_wide(i.type) ? extract<uint64_t>(i, lanes) : extract<uint32_t>(i, lanes);
      case Op::bfi:
        if (is_wide(i.type)) unknown(i);
        return each(lanes, [&](int lane) {
          const uint32_t from = of(2, lane) & 0xff, count = of(3, lane) & 0xff;
          uint32_t value = of(1, lane);
          for (uint32_t bit = 0; bit < count && from + bit < 32; bit++)
            value = (value & ~(1u << (from + bit))) | (of(0, lane) >> bit & 1) << (from + bit);
          set(i.to[0], lane, value);
        });
      case Op::prmt:
        if (i.mode != Mode::none) unknown(i);
        return each(lanes, [&](int lane) {
          const uint64_t both = uint64_t(of(1, lane)) << 32 | of(0, lane);
          uint32_t value = 0;
          for (int byte = 0; byte < 4; byte++) {
            const uint32_t selector = of(2, lane) >> 4 * byte & 0xf;
            uint32_t chosen = uint32_t(both >> 8 * (selector & 7) & 0xff);
            if (selector & 8) chosen = chosen & 0x80 ? 0xff : 0;
            value |= chosen << 8 * byte;
          }
          set(i.to[0], lane, value);
        });
      case Op::lop3:
        return each(lanes, [&](int lane) {
          const uint32_t table = of(3, lane);
          uint32_t value = 0;
          for (uint32_t row = 0; row < 8; row++)
            if (table >> row & 1)
              value |= (row & 4 ? of(0, lane) : ~of(0, lane)) & (row & 2 ? of(1, lane) : ~of(1, lane)) &
                       (row & 1 ? of(2, lane) : ~of(2, lane));
          set(i.to[0], lane, value);
        });
      case Op::shf:
        return each(lanes, [&](int lane) {
          const uint64_t both = uint64_t(of(1, lane)) << 32 | of(0, lane);
          const uint32_t n = i.wrap ? of(2, lane) & 31 : std::min(of(2, lane), 32u);
          set(i.to[0], lane, uint32_t(i.mode == Mode::left ? both << n >> 32 : both >> n));
        });
      case Op::popc:
      case Op::clz:
      case Op::brev:
        return each(lanes, [&](int lane) {
          const uint64_t a = is_wide(i.type) ? get<uint64_t>(i.of[0], lane) : of(0, lane);
          const uint32_t bits = is_wide(i.type) ? 64 : 32;
          uint32_t value = 0;
          if (i.op == Op::popc)
            value = uint32_t(__builtin_popcountll(a));
          else if (i.op == Op::clz)
            value = a ? uint32_t(__builtin_clzll(a)) - (64 - bits) : bits;
          else if (bits == 64)
            unknown(i);
          else
            for (uint32_t bit = 0; bit < 32; bit++) value |= uint32_t(a >> bit & 1) << (31 - bit);
          set(i.to[0], lane, value);
        });
      default:
        unknown(i);
    }
  }

  void blend(Register to, uint32_t value, uint32_t lanes) {
    predicates_[to] = (predicates_[to] & ~lanes) | (value & lanes);
  }

  template <class T>
  uint32_t compare_as(const Instruction& i, uint32_t lanes) const {
    uint32_t result = 0;
    const auto with = [&](auto f) {
      each(lanes, [&](int lane) { result |= uint32_t(bool(f(get<T>(i.of[0], lane), get<T>(i.of[1], lane)))) << lane; });
      return result;
    };
    const bool unordered = i.unordered;
    const auto numbers = [](T a, T b) { return a == a && b == b; };
    switch (i.compare) {
      case Compare::eq:
        return with([=](T a, T b) { return a == b || (unordered && !numbers(a, b)); });
      case Compare::ne:
        return with([=](T a, T b) { return a != b && (unordered || numbers(a, b)); });
      case Compare::lt:
        return with([=](T a, T b) { return a < b || (unordered && !numbers(a, b)); });
      case Compare::le:
        return with([=](T a, T b) { return a <= b || (unordered && !numbers(a, b)); });
      case Compare::gt:
        return with([=](T a, T b) { return a > b || (unordered && !numbers(a, b)); });
      case Compare::ge:
        return with([=](T a, T b) { return a >= b || (unordered && !numbers(a, b)); });
      case Compare::num:
        return with([=](T a, T b) { return numbers(a, b); });
      case Compare::nan:
        return with([=](T a, T b) { return !numbers(a, b); });
    }
    return 0;
  }

  void compare(const Instruction& i, uint32_t lanes) {
    if (i.flush) unknown(i);
    uint32_t result = 0;
    switch (i.type) {
      case Type::f32:
        result = compare_as<float>(i, lanes);
        break;
      case Type::f64:
        result = compare_as<double>(i, lanes);
        break;
      case Type::s32:
        result = compare_as<int32_t>(i, lanes);
        break;
      case Type::u32:
      case Type::b32:
        result = compare_as<uint32_t>(i, lanes);
        break;
      case Type::s64:
        result = compare_as<int64_t>(i, lanes);
        break;
      case Type::u64:
      case Type::b64:
        result = compare_as<uint64_t>(i, lanes);
        break;
      case Type::s16:
        result = compare_as<int16_t>(i, lanes);
        break;
      case Type::u16:
      case Type::b16:
        result = compare_as<uint16_t>(i, lanes);
        break;
      default:
        unknown(i);
    }
    uint32_t other = kAll;
    if (i.combine != Op::mov) other = predicates_[i.of[2]];
    const auto joined = [&](uint32_t a) {
      return i.combine == Op::mov    ? a
             : i.combine == Op::and_ ? a & other
             : i.combine == Op::or_  ? a | other
                                     : a ^ other;
    };
    if (i.to[0] != kNone) blend(i.to[0], joined(result), lanes);
    if (i.to[1] != kNone) blend(i.to[1], joined(~result), lanes);
  }

  void select(const Instruction& i, uint32_t lanes) {
    const uint32_t which = predicates_[i.of[2]];
    if (is_wide(i.type))
      return each(lanes, [&](int lane) { wide_[i.to[0]][lane] = wide_[which >> lane & 1 ? i.of[0] : i.of[1]][lane]; });
    each(lanes, [&](int lane) {
      const uint32_t a = narrow_[i.of[0]][lane], b = narrow_[i.of[1]][lane];
      narrow_[i.to[0]][lane] = which >> lane & 1 ? a : b;
    });
  }

  void pack(const Instruction& i, uint32_t lanes) {
    const int bits = 8 * size_of(i.from);
    each(lanes, [&](int lane) {
      uint64_t value = 0;
      for (int n = 0; n < i.vector; n++)
        value |= (uint64_t(narrow_[i.of[size_t(n)]][lane]) & (bits == 16 ? 0xffffu : kAll)) << bits * n;
      if (is_wide(i.type))
        set(i.to[0], lane, value);
      else
        set(i.to[0], lane, uint32_t(value));
    });
  }
  void unpack(const Instruction& i, uint32_t lanes) {
    const int bits = 8 * size_of(i.from);
    each(lanes, [&](int lane) {
      const uint64_t value = is_wide(i.type) ? get<uint64_t>(i.of[0], lane) : get<uint32_t>(i.of[0], lane);
      for (int n = 0; n < i.vector; n++)
        if (i.to[size_t(n)] != kNone)
          set(i.to[size_t(n)], lane, uint32_t(value >> bits * n) & (bits == 16 ? 0xffffu : kAll));
    });
  }

  // A number of type `from` as double or, of integers, as they are.
  double as_double(Type from, Register r, int lane) const {
    switch (from) {
      case Type::f32:
        return get<float>(r, lane);
      case Type::f64:
        return get<double>(r, lane);
      case Type::f16:
        return half_to_float(get<uint32_t>(r, lane));
      case Type::bf16:
        return bfloat_to_float(get<uint32_t>(r, lane));
      default:
        return from == Type::u64 ? double(uint64_t(as_integer(from, r, lane))) : double(as_integer(from, r, lane));
    }
  }
  int64_t as_integer(Type from, Register r, int lane) const {
    switch (from) {
      case Type::s8:
        return int8_t(get<uint32_t>(r, lane));
      case Type::u8:
      case Type::b8:
        return uint8_t(get<uint32_t>(r, lane));
      case Type::s16:
        return int16_t(get<uint32_t>(r, lane));
      case Type::u16:
      case Type::b16:
        return uint16_t(get<uint32_t>(r, lane));
      case Type::s32:
        return get<int32_t>(r, lane);
      case Type::u32:
      case Type::b32:
        return get<uint32_t>(r, lane);
      default:
        return get<int64_t>(r, lane);
    }
  }

  void convert(const Instruction& i, uint32_t lanes) {
    if (i.saturate) unknown(i);
    if (i.type == Type::f16x2 || i.type == Type::bf16x2) {
      if (i.from != Type::f32 || i.truncate) unknown(i);
      const bool half = i.type == Type::f16x2;
      return each(lanes, [&](int lane) {
        const float high = get<float>(i.of[0], lane), low = get<float>(i.of[1], lane);
        set(i.to[0], lane,
            half ? float_to_half(high) << 16 | float_to_half(low) : float_to_bfloat(high) << 16 | float_to_bfloat(low));
      });
    }
    if (is_float(i.type) || i.type == Type::tf32) return convert_to_float(i, lanes);
    if (is_float(i.from) && !i.to_integer) unknown(i);
    switch (i.type) {
      case Type::s8:
        return convert_to_integer<int8_t>(i, lanes);
      case Type::s16:
        return convert_to_integer<int16_t>(i, lanes);
      case Type::s32:
        return convert_to_integer<int32_t>(i, lanes);
      case Type::s64:
        return convert_to_integer<int64_t>(i, lanes);
      case Type::u8:
      case Type::b8:
        return convert_to_integer<uint8_t>(i, lanes);
      case Type::u16:
      case Type::b16:
        return convert_to_integer<uint16_t>(i, lanes);
      case Type::u32:
      case Type::b32:
        return convert_to_integer<uint32_t>(i, lanes);
      case Type::u64:
      case Type::b64:
        return convert_to_integer<uint64_t>(i, lanes);
      default:
        unknown(i);
    }
  }

  // To 16 bits in one rounding only from what float holds.
  void convert_to_float(const Instruction& i, uint32_t lanes) {
    const bool small = i.from == Type::f32 || i.from == Type::f16 || i.from == Type::bf16;
    if ((i.truncate && !i.to_integer) || (size_of(i.type) == 2 && !small)) unknown(i);
    if (i.type == Type::tf32 && (i.from != Type::f32 || i.name.find(".rna.") == std::string::npos)) unknown(i);
    each(lanes, [&](int lane) {
      double value = as_double(i.from, i.of[0], lane);
      if (i.flush && i.from == Type::f32) value = flushed(float(value));
      if (i.to_integer) value = i.truncate ? std::trunc(value) : std::nearbyint(value);
      float rounded = float(value);
      // From an integer of 64 bits one rounding, not two.
      if (!is_float(i.from) && is_wide(i.from))
        rounded = i.from == Type::u64 ? float(get<uint64_t>(i.of[0], lane)) : float(get<int64_t>(i.of[0], lane));
      switch (i.type) {
        case Type::f64:
          return set(i.to[0], lane, value);
        case Type::f32:
          return set(i.to[0], lane, i.flush ? flushed(rounded) : rounded);
        case Type::f16:
          return set(i.to[0], lane, float_to_half(rounded));
        case Type::bf16:
          return set(i.to[0], lane, float_to_bfloat(rounded));
        default:
          return set(i.to[0], lane,
                     rounded != rounded ? 0x7fffffffu : (bits_as<uint32_t>(rounded) + 0x1000) & ~0x1fffu);
      }
    });
  }

  // A float is held to what the integer holds. NaN becomes zero; of 64 bits, the largest power of two.
  template <class T>
  void convert_to_integer(const Instruction& i, uint32_t lanes) {
    const double least = double(std::numeric_limits<T>::min());
    const double beyond = std::ldexp(1.0, std::numeric_limits<T>::digits);
    each(lanes, [&](int lane) {
      T value;
      if (is_float(i.from)) {
        const double x = as_double(i.from, i.of[0], lane), whole = i.truncate ? std::trunc(x) : std::nearbyint(x);
        if (x != x)
          value = sizeof(T) == 8 || i.from == Type::f64 ? T(std::make_unsigned_t<T>(1) << (8 * sizeof(T) - 1)) : T(0);
        else
          value = whole >= beyond ? std::numeric_limits<T>::max()
                  : whole < least ? std::numeric_limits<T>::min()
                                  : T(whole);
      } else {
        value = T(as_integer(i.from, i.of[0], lane));
      }
      // What is narrower than its register fills it.
      if constexpr (sizeof(T) == 8)
        set(i.to[0], lane, value);
      else if constexpr (sizeof(T) == 4 || std::is_signed_v<T>)
        set(i.to[0], lane, uint32_t(int32_t(value)));
      else
        set(i.to[0], lane, uint32_t(value));
    });
  }

  // Warps.

  // A collective wants every lane that its mask names, and no other.
  void whole(uint32_t lanes, uint32_t members, const char* what) const {
    if (lanes != members)
      fail(std::string(what) + " that not all of its lanes reach together",
           first(members & ~lanes ? members & ~lanes : lanes & ~members));
  }
  void members_meet(Register mask, uint32_t lanes, const char* what) const {
    each(lanes, [&](int lane) { whole(lanes, get<uint32_t>(mask, lane), what); });
  }

  void shuffle(const Instruction& i, uint32_t lanes) {
    members_meet(i.of[3], lanes, "a shuffle");
    Lanes32 values;
    std::memcpy(values, narrow_[i.of[0]], sizeof values);
    each(lanes, [&](int lane) {
      const uint32_t by = get<uint32_t>(i.of[1], lane) & 31, c = get<uint32_t>(i.of[2], lane);
      const int clamp = int(c & 31), segment = int(c >> 8 & 31);
      const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
      int from = lane;
      bool inside = false;
      switch (i.mode) {
        case Mode::up:
          from = lane - int(by), inside = from >= most;
          break;
        case Mode::down:
          from = lane + int(by), inside = from <= most;
          break;
        case Mode::bfly:
          from = lane ^ int(by), inside = from <= most;
          break;
        case Mode::idx:
          from = least | (int(by) & ~segment), inside = from <= most;
          break;
        default:
          unknown(i);
      }
      if (!inside) from = lane;
      if (!(lanes >> from & 1)) fail("a shuffle from a lane that does not take part", lane);
      if (i.to[0] != kNone) narrow_[i.to[0]][lane] = values[from];
      if (i.to[1] != kNone) blend(i.to[1], inside ? kAll : 0, 1u << lane);
    });
  }

  void vote(const Instruction& i, uint32_t lanes) {
    members_meet(i.of[1], lanes, "a vote");
    const uint32_t votes = predicates_[i.of[0]] & lanes;
    switch (i.mode) {
      case Mode::ballot:
        return each(lanes, [&](int lane) { set(i.to[0], lane, votes); });
      case Mode::all:
        return blend(i.to[0], votes == lanes ? kAll : 0, lanes);
      case Mode::any:
        return blend(i.to[0], votes ? kAll : 0, lanes);
      case Mode::uni:
        return blend(i.to[0], votes == lanes || !votes ? kAll : 0, lanes);
      default:
        unknown(i);
    }
  }

  void reduce(const Instruction& i, uint32_t lanes) {
    members_meet(i.of[1], lanes, "a reduction");
    if (i.type == Type::f32) unknown(i);
    bool any = false;
    uint32_t result = 0;
    each(lanes, [&](int lane) {
      const uint32_t value = get<uint32_t>(i.of[0], lane);
      const bool smaller = i.type == Type::s32 ? int32_t(value) < int32_t(result) : value < result;
      if (!any)
        result = value;
      else
        switch (i.combine) {
          case Op::add:
            result += value;
            break;
          case Op::min:
            result = smaller ? value : result;
            break;
          case Op::max:
            result = smaller ? result : value;
            break;
          case Op::and_:
            result &= value;
            break;
          case Op::or_:
            result |= value;
            break;
          case Op::xor_:
            result ^= value;
            break;
          default:
            unknown(i);
        }
      any = true;
    });
    each(lanes, [&](int lane) { set(i.to[0], lane, result); });
  }

  // mma.m16n8k*: lane 4 g + t holds of c elements (g, 2t), (g, 2t + 1), and both of row g + 8.
  void multiply(const Instruction& i, uint32_t lanes) {
    whole(lanes, kAll, "a product");
    const int k = i.vector;
    float a[16][16], b[16][8];
    if (i.from == Type::tf32) {
      const auto number = [&](Register r, int lane) { return bits_as<float>(narrow_[r][lane] & ~0x1fffu); };
      for (int lane = 0; lane < kWarp; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int n = 0; n < k / 2; n++) a[g + 8 * (n % 2)][t + 4 * (n / 2)] = number(i.of[size_t(4 + n)], lane);
        for (int n = 0; n < k / 4; n++) b[t + 4 * n][g] = number(i.of[size_t(4 + k / 2 + n)], lane);
      }
    } else {
      const bool half = i.from == Type::f16;
      if (!half && i.from != Type::bf16) unknown(i);
      const auto number = [&](uint32_t bits) {
        return half ? half_to_float(bits & 0xffff) : bfloat_to_float(bits & 0xffff);
      };
      for (int lane = 0; lane < kWarp; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int n = 0; n < k / 4; n++) {
          const uint32_t both = narrow_[i.of[size_t(4 + n)]][lane];
          a[g + 8 * (n % 2)][2 * t + 8 * (n / 2)] = number(both);
          a[g + 8 * (n % 2)][2 * t + 8 * (n / 2) + 1] = number(both >> 16);
        }
        for (int n = 0; n < k / 8; n++) {
          const uint32_t both = narrow_[i.of[size_t(4 + k / 4 + n)]][lane];
          b[2 * t + 8 * n][g] = number(both);
          b[2 * t + 8 * n + 1][g] = number(both >> 16);
        }
      }
    }
    double sums[16][8] = {};
    for (int row = 0; row < 16; row++)
      for (int n = 0; n < k; n++)
        for (int column = 0; column < 8; column++) sums[row][column] += double(a[row][n]) * double(b[n][column]);
    for (int lane = 0; lane < kWarp; lane++) {
      const int g = lane / 4, t = lane % 4;
      float results[4];
      for (int n = 0; n < 4; n++)
        results[n] = truncated(sums[g + 8 * (n / 2)][2 * t + n % 2] + double(get<float>(i.of[size_t(n)], lane)));
      for (int n = 0; n < 4; n++)
        if (i.to[size_t(n)] != kNone) set(i.to[size_t(n)], lane, results[n]);
    }
  }

  // Lane 4 r + t holds elements 2 t and 2 t + 1 of row r.
  void move_matrix(const Instruction& i, uint32_t lanes) {
    whole(lanes, kAll, "movmatrix");
    if (!i.transposed) unknown(i);
    uint16_t matrix[8][8];
    for (int lane = 0; lane < kWarp; lane++) std::memcpy(&matrix[lane / 4][lane % 4 * 2], &narrow_[i.of[0]][lane], 4);
    for (int lane = 0; lane < kWarp; lane++)
      set(i.to[0], lane, uint32_t(matrix[lane % 4 * 2][lane / 4]) | uint32_t(matrix[lane % 4 * 2 + 1][lane / 4]) << 16);
  }

  // Memory.

  uint32_t shared_address(const Instruction& i, int lane) const {
    const uint64_t base = i.narrow_shared ? get<uint32_t>(i.of[0], lane) : get<uint64_t>(i.of[0], lane);
    const uint64_t address = base + uint64_t(i.offset);
    if (!i.narrow_shared && address >> 32) fail("no address of shared memory: " + std::to_string(address), lane);
    return uint32_t(address);
  }

  // The place in the block's shared memory; who reads or writes it there and when is compared with those before.
  // Of a matrix, lanes get or give other parts than those whose address they name: it is the whole warp's access.
  uint8_t* shared(uint32_t address, int bytes, int lane, bool writes, const uint8_t* data = nullptr,
                  bool by_warp = false) {
    if (uint64_t(address) + uint64_t(bytes) > shared_bytes_)
      fail("shared memory from " + std::to_string(address) + " to " +
               std::to_string(uint64_t(address) + uint64_t(bytes)) + ", of " + std::to_string(shared_bytes_) + " bytes",
           lane);
    if (address % uint32_t(bytes))
      fail("shared memory at " + std::to_string(address) + ", no multiple of " + std::to_string(bytes), lane);
    const bool same = data && std::memcmp(shared_.data() + address, data, size_t(bytes)) == 0;
    const int32_t who = by_warp ? kManyOfWarp - warp_->number : warp_->number * kWarp + lane;
    for (uint32_t w = address / kWord; w <= (address + uint32_t(bytes) - 1) / kWord; w++) {
      if (in_flight_[w] >= 0)
        fail("shared memory at " + std::to_string(w * kWord) + " that thread " + std::to_string(in_flight_[w]) +
                 " copies to and has not waited for",
             lane);
      if (bytes < kWord || parts_[w].began == block_began_) {
        const uint32_t first = bytes < kWord ? address % kWord : 0,
                       end = bytes < kWord ? first + uint32_t(bytes) : kWord;
        if (parts_[w].began != block_began_) parts_[w].bytes.fill(touched_[w]), parts_[w].began = block_began_;
        for (uint32_t byte = first; byte < end; byte++)
          touch_shared(parts_[w].bytes[byte], who, lane, writes, same, w * kWord + byte);
      } else {
        touch_shared(touched_[w], who, lane, writes, same, w * kWord);
      }
    }
    return shared_.data() + address;
  }

  void touch_shared(Touched& t, int32_t who, int lane, bool writes, bool same, uint32_t place) {
    if (!writes && t.write_time < block_began_)
      fail("shared memory at " + std::to_string(place) + " that nothing has written", lane);
    if (l_.check_races)
      touch(t, who, lane, writes, same, place);
    else if (writes)
      t.write_time = time_;
  }

  static int warp_of(int32_t who) { return who >= 0 ? who / kWarp : who <= kManyOfWarp ? kManyOfWarp - who : -1; }

  // Whether nothing stands between an access then and one of `me` now.
  bool unordered(uint32_t time, uint32_t warp_time, int32_t who, int32_t me) const {
    if (who == kNobody || time != time_) return false;
    if (warp_of(who) != warp_->number) return true;
    return warp_time == warp_->time && (who != me || me < 0);
  }

  // Two accesses of different threads, one of them a write, with nothing that orders them in between. Threads may write
  // the same number at the same time. Of lanes that write with one instruction one gets its way: Triton's do, what they
  // hold differing in the last bits, sums of a butterfly whose first products were contracted
  // (github.com/triton-lang/triton/issues/7264).
  void touch(Touched& t, int32_t me, int lane, bool writes, bool same, uint64_t place) {
    const bool together = writes && t.write_issue == uint32_t(executed_) && warp_of(t.writer) == warp_->number;
    const bool other = unordered(t.write_time, t.write_warp_time, t.writer, me);
    if (other && !together && !(writes && same && !t.mixed))
      race(place, t.writer, writes ? "writes what" : "reads what", "wrote", lane);
    if (writes) {
      if (unordered(t.read_time, t.read_warp_time, t.reader, me)) race(place, t.reader, "writes what", "reads", lane);
      const bool again = t.writer != kNobody && t.write_time == time_;
      t.mixed = again && (t.mixed || !same);
      t.writer = !again || !other ? me : warp_of(t.writer) == warp_->number ? kManyOfWarp - warp_->number : kMany;
      t.write_time = time_, t.write_warp_time = warp_->time, t.write_issue = uint32_t(executed_);
      return;
    }
    if (t.reader == kNobody || t.read_time != time_)
      t.reader = me;
    else if (warp_of(t.reader) != warp_->number)
      t.reader = kMany;
    else if (t.read_warp_time != warp_->time)
      t.reader = me;  // the warp's reads before are ordered
    else if (t.reader != me)
      t.reader = kManyOfWarp - warp_->number;
    t.read_time = time_, t.read_warp_time = warp_->time;
  }
  [[noreturn]] void race(uint64_t place, int32_t other, const char* does, const char* did, int lane) const {
    const std::string who = other >= 0 ? "thread " + std::to_string(other) : "another thread";
    fail("a race: it " + std::string(does) + " " + who + " " + did + " with nothing in between that orders them, at " +
             std::to_string(place),
         lane);
  }

  bool holds(size_t range, uint64_t address, int bytes) const {
    return range < ranges_.size() && address >= ranges_[range].begin && address < ranges_[range].end &&
           uint64_t(bytes) <= ranges_[range].end - address;
  }

  // The range that has them is the last one then.
  void find(uint64_t address, int bytes, int lane) {
    if (!holds(last_, address, bytes)) {
      const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), address,
                                          [](uint64_t a, const Range& r) { return a < r.begin; });
      last_ = after == ranges_.begin() ? ranges_.size() : size_t(after - ranges_.begin()) - 1;
      if (!holds(last_, address, bytes)) {
        std::string where = "outside all tensors";
        if (last_ < ranges_.size() && address >= ranges_[last_].end)
          where = std::to_string(address - ranges_[last_].end) + " bytes behind a tensor's end";
        else if (last_ < ranges_.size())
          where = "over a tensor's end";
        fail(std::to_string(bytes) + " bytes of device memory " + where, lane);
      }
    }
  }

  // `align`: what the address has to be a multiple of.
  uint8_t* device(uint64_t address, int bytes, int align, int lane, bool writes, const uint8_t* data) {
    find(address, bytes, lane);
    if (address % uint64_t(align))
      fail("device memory at an address that is no multiple of " + std::to_string(align), lane);
    report_.counts[size_t(at_ - p_.instructions.data())].device_bytes += uint64_t(bytes);
    uint8_t* place = reinterpret_cast<uint8_t*>(address);
    if (l_.check_races) {
      Range& range = ranges_[last_];
      const bool same = writes && std::memcmp(place, data, size_t(bytes)) == 0;
      for (uint64_t g = (address - range.begin) / kDeviceGranule;
           g <= (address - range.begin + uint64_t(bytes) - 1) / kDeviceGranule; g++)
        touch_on_device(range.touched[g], lane, writes, same, g * kDeviceGranule);
    }
    return place;
  }

  // Blocks may write the same number, and read it once they have, if the launch has written no other there.
  void touch_on_device(TouchedOnDevice& t, int lane, bool writes, bool same, uint64_t place) {
    const int32_t block = int32_t(block_);
    const auto other = [&](int32_t who) { return who != kNobody && who != block; };
    const bool shares = writes && same && !t.changed;
    if (writes && !same && t.several)
      fail("a race: other blocks write the same device memory, at " + std::to_string(place) + " of a tensor", lane);
    if (other(t.writer) && !shares)
      fail("a race: " + (t.writer >= 0 ? "block " + std::to_string(t.writer) : std::string("another block")) +
               " writes the same device memory, at " + std::to_string(place) + " of a tensor",
           lane);
    if (writes && (other(t.early_reader) || (other(t.reader) && !shares)))
      fail("a race: another block reads the same device memory, at " + std::to_string(place) + " of a tensor", lane);
    touch(t.by, warp_->number * kWarp + lane, lane, writes, same, place);
    if (writes) {
      t.changed |= t.writer != kNobody && !same;
      t.several |= other(t.writer);
      t.writer = block;
    } else {
      const auto joined = [&](int32_t who) { return other(who) ? kMany : block; };
      if (t.writer == kNobody) t.early_reader = joined(t.early_reader);
      t.reader = joined(t.reader);
    }
  }

  void access(const Instruction& i, uint32_t lanes) {
    const bool writes = i.op == Op::st;
    const int size = size_of(i.type), bytes = size * i.vector;
    if (i.space == Space::shared && l_.count_wavefronts) {
      uint32_t addresses[kWarp];
      each(lanes, [&](int lane) { addresses[lane] = shared_address(i, lane); });
      count_wavefronts(addresses, lanes, bytes);
    }
    each(lanes, [&](int lane) {
      uint8_t data[32];
      if (writes)
        for (int n = 0; n < i.vector; n++) {
          if (size == 8)
            std::memcpy(data + 8 * n, &wide_[i.of[size_t(n) + 1]][lane], 8);
          else
            std::memcpy(data + size * n, &narrow_[i.of[size_t(n) + 1]][lane], size_t(size));
        }
      uint8_t* place;
      if (i.space == Space::shared) {
        place = shared(shared_address(i, lane), bytes, lane, writes, writes ? data : nullptr);
      } else {
        const uint64_t address = get<uint64_t>(i.of[0], lane) + uint64_t(i.offset);
        if (i.space == Space::param) {
          const uint64_t offset = address - Program::kParameters;
          if (writes || offset + uint64_t(bytes) > l_.arguments.size()) fail("outside the parameters", lane);
          place = const_cast<uint8_t*>(l_.arguments.data()) + offset;
        } else {
          place = device(address, bytes, bytes, lane, writes, data);
        }
      }
      if (writes) {
        std::memcpy(place, data, size_t(bytes));
        return;
      }
      for (int n = 0; n < i.vector; n++) {
        const Register to = i.to[size_t(n)];
        if (to == kNone) continue;
        if (size == 8) {
          std::memcpy(&wide_[to][lane], place + 8 * n, 8);
        } else {
          uint32_t value = 0;
          std::memcpy(&value, place + size * n, size_t(size));
          if (i.type == Type::s16) value = uint32_t(int32_t(int16_t(value)));
          if (i.type == Type::s8) value = uint32_t(int32_t(int8_t(value)));
          if (i.widens)
            wide_[to][lane] = is_signed(i.type) ? uint64_t(int64_t(int32_t(value))) : value;
          else
            narrow_[to][lane] = value;
        }
      }
    });
  }

  void copy_async(const Instruction& i, uint32_t lanes) {
    const int bytes = i.vector;
    if (l_.count_wavefronts) {
      uint32_t addresses[kWarp];
      each(lanes, [&](int lane) { addresses[lane] = shared_address(i, lane); });
      count_wavefronts(addresses, lanes, bytes);
    }
    each(lanes, [&](int lane) {
      const uint32_t to = shared_address(i, lane);
      const int given = i.of[2] == kNone ? bytes : int(get<uint32_t>(i.of[2], lane));
      if (given < 0 || given > bytes)
        fail("a copy of " + std::to_string(given) + " bytes of " + std::to_string(bytes), lane);
      Copy copy{lane, warp_->closed[lane], bytes, to, {}};
      if (given)
        std::memcpy(copy.data.data(), device(get<uint64_t>(i.of[1], lane), given, bytes, lane, false, nullptr),
                    size_t(given));
      shared(to, bytes, lane, true);
      for (uint32_t w = to / kWord; w < (to + uint32_t(bytes)) / kWord; w++)
        in_flight_[w] = int16_t(warp_->number * kWarp + lane);
      warp_->copies.push_back(copy);
    });
  }

  void wait_copies(const Instruction& i, uint32_t lanes) {
    auto& copies = warp_->copies;
    const auto arrives = [&](const Copy& copy) {
      if (!(lanes >> copy.lane & 1)) return false;
      return i.mode == Mode::wait_all || copy.group < warp_->closed[copy.lane] - int(i.offset);
    };
    for (const Copy& copy : copies) {
      if (!arrives(copy)) continue;
      std::memcpy(shared_.data() + copy.to, copy.data.data(), size_t(copy.bytes));
      for (uint32_t w = copy.to / kWord; w < (copy.to + uint32_t(copy.bytes)) / kWord; w++) {
        in_flight_[w] = -1;
        parts_[w].began = 0;
        touched_[w].write_time = time_, touched_[w].write_warp_time = warp_->time;
        touched_[w].writer = warp_->number * kWarp + copy.lane, touched_[w].mixed = false;
      }
    }
    copies.erase(std::remove_if(copies.begin(), copies.end(), arrives), copies.end());
  }

  // Lane 8 m + r gives the address of row r of matrix m.
  void matrices(const Instruction& i, uint32_t lanes) {
    whole(lanes, kAll, i.op == Op::ldmatrix ? "ldmatrix" : "stmatrix");
    const bool loads = i.op == Op::ldmatrix;
    uint32_t addresses[kWarp];
    for (int lane = 0; lane < 8 * i.vector; lane++) addresses[lane] = shared_address(i, lane);
    if (l_.count_wavefronts) {
      for (int m = 0; m < i.vector; m++) {
        uint32_t rows[kWarp];
        std::copy(addresses + 8 * m, addresses + 8 * m + 8, rows);
        count_wavefronts(rows, 0xff, 16);
      }
    }
    for (int m = 0; m < i.vector; m++) {
      uint16_t matrix[8][8];
      if (loads)
        for (int row = 0; row < 8; row++)
          std::memcpy(matrix[row], shared(addresses[8 * m + row], 16, 8 * m + row, false, nullptr, true), 16);
      for (int lane = 0; lane < kWarp; lane++) {
        const int row = lane / 4, column = lane % 4 * 2;
        uint16_t& first = i.transposed ? matrix[column][row] : matrix[row][column];
        uint16_t& second = i.transposed ? matrix[column + 1][row] : matrix[row][column + 1];
        if (loads) {
          if (i.to[size_t(m)] != kNone) set(i.to[size_t(m)], lane, uint32_t(first) | uint32_t(second) << 16);
        } else {
          const uint32_t both = narrow_[i.of[size_t(m) + 1]][lane];
          first = uint16_t(both), second = uint16_t(both >> 16);
        }
      }
      if (!loads)
        for (int row = 0; row < 8; row++) {
          const auto data = reinterpret_cast<const uint8_t*>(matrix[row]);
          std::memcpy(shared(addresses[8 * m + row], 16, 8 * m + row, true, data, true), data, 16);
        }
    }
  }

  // An access goes out in parts of 128 bytes; of each, words that lie in the same bank take turns.
  void count_wavefronts(const uint32_t (&addresses)[kWarp], uint32_t lanes, int bytes) {
    Count& count = report_.counts[size_t(at_ - p_.instructions.data())];
    count.accesses++;
    const int per_lane = std::max(bytes, 4), lanes_of_part = 128 / per_lane;
    for (int begin = 0; begin < kWarp; begin += lanes_of_part) {
      uint32_t words[32 * 4];
      int found = 0;
      for (int lane = begin; lane < begin + lanes_of_part; lane++)
        if (lanes >> lane & 1)
          for (int byte = 0; byte < per_lane; byte += 4) words[found++] = (addresses[lane] + uint32_t(byte)) / 4;
      if (!found) continue;
      std::sort(words, words + found);
      found = int(std::unique(words, words + found) - words);
      int banks[32] = {}, most = 0;
      for (int n = 0; n < found; n++) most = std::max(most, ++banks[words[n] % 32]);
      count.wavefronts += uint64_t(most);
      count.without_conflicts++;
    }
  }

  const Program& p_;
  const Launch& l_;
  Report report_;
  std::vector<Range> ranges_;
  size_t last_ = 0;
  uint32_t shared_bytes_;
  std::vector<uint8_t> shared_;
  std::vector<Touched> touched_;  // by word
  // By byte, of words of which parts were written in the block that began then.
  struct Parts {
    uint32_t began = 0;
    std::array<Touched, kWord> bytes;
  };
  std::vector<Parts> parts_;
  std::vector<int16_t> in_flight_;  // the thread whose copy has not arrived, or -1
  std::vector<Warp> warps_;
  uint64_t executed_ = 0;
  uint32_t time_ = 1, block_began_ = 1;
  int64_t block_ = 0;
  Warp* warp_ = nullptr;
  const Instruction* at_ = nullptr;
  Lanes32* narrow_ = nullptr;
  Lanes64* wide_ = nullptr;
  uint32_t* predicates_ = nullptr;
};

}  // namespace

Report run(const Program& program, const Launch& launch) { return Machine(program, launch).run(); }

}  // namespace emulator
