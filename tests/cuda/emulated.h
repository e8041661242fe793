// What csrc/cuda/instructions.cuh takes from the hardware, in plain C++ after NVIDIA's PTX ISA, so that the kernels run
// in tests on any CPU. Every access to memory is checked: faults.cpp has what is reported. Compiled with
// -DREATTN_EMULATED -ffp-contract=off; REATTN_EMULATED_ORDER=<number> shuffles the order of blocks, warps and lanes.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#if !(defined(__linux__) && defined(__x86_64__))
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace reattn {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr int kWarp = 32;

namespace emulated {

constexpr int kMostThreads = 1024, kMostShared = 232448, kStackBytes = 128 << 10, kPage = 4096;

// Switching stacks; swapcontext makes a system call each time.
#if defined(__linux__) && defined(__x86_64__)
struct Context {
  void** stack;
};
asm(R"(.pushsection .text
.weak reattn_switch_stack
.hidden reattn_switch_stack
.type reattn_switch_stack, @function
reattn_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size reattn_switch_stack, . - reattn_switch_stack
.popsection)");
extern "C" __attribute__((visibility("hidden"))) void reattn_switch_stack(Context* from, const Context* to);
inline void switch_context(Context& from, Context& to) { reattn_switch_stack(&from, &to); }
inline void prepare(Context& context, char* stack, int bytes, void (*entry)()) {
  context.stack = reinterpret_cast<void**>(stack + bytes) - 8;  // six registers, where to go, and from nowhere
  std::fill_n(context.stack, 8, nullptr);
  context.stack[6] = reinterpret_cast<void*>(entry);
}
#else
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void prepare(Context& context, char* stack, int bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size_t(bytes);
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

class Machine;
struct Thread;
struct Warp;

// A lane's own variables, for an operation of the whole warp.
struct Arguments {
  void* result;
  const void *a, *b;
  int number;  // a lane, or a place in shared memory
};
struct Operation {
  const char* name;
  void (*execute)(const Arguments* const (&)[kWarp]);
};

struct Copy {
  const char* from;
  int to;
  unsigned group;
};

struct Thread {
  Context context;
  int index;
  Warp* warp;
  Thread* next;  // of the warp, the last one before the first
  bool finished;
  unsigned closed_groups;
  std::vector<Copy> copies;  // that have not arrived
};

struct Warp {
  uint32_t synced_at;
  int arrived, finished;
  const Operation* operation;
  Thread *first, *first_arrived;
  const Arguments* arguments[kWarp];
};

// Two bytes of shared memory: who wrote and who read them last, at which tick. A tick ends with every sync.
struct Granule {
  uint32_t written_at, read_at;
  uint16_t writer, reader;
};
constexpr uint32_t kInFlight = ~0u;  // instead of the tick, until an asynchronous copy has arrived
// With the reader: others read since the last sync of the warp, or of the block.
constexpr uint16_t kSeveralLanes = 1 << 14, kSeveralWarps = 1 << 15;

struct Range {
  uintptr_t begin, bytes;
};

inline thread_local Machine* machine = nullptr;  // while it runs

// A multiprocessor that runs one block at a time, on the thread that launches.
class Machine {
 public:
  Thread* current = nullptr;
  int threads = 0, block_x = 0, block_y = 0;

  Machine() : threads_(kMostThreads), shadow_(kMostShared / 2) {}
  // Of the thread that calls: launches of several threads do not wait for each other.
  static Machine& own() {
    static thread_local const std::unique_ptr<Machine> own(new Machine);
    return *own;
  }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
  ~Machine() {
    for (char* stack : stacks_) munmap(stack, kStackBytes);
  }

  void declare(const void* begin, int64_t bytes) {
    if (bytes > 0) declared_.push_back({reinterpret_cast<uintptr_t>(begin), uintptr_t(bytes)});
  }
  void forget_declared() {
    declared_.clear();
    last_hit_ = {};
  }

  // Runs `body(call)` in every thread of every block; throws what a thread did wrong.
  void run(const char* name, int64_t blocks_x, int blocks_y, int thread_count, int shared_bytes,
           void (*body)(const void*), const void* call) {
    machine = this;
    name_ = name;
    body_ = body;
    call_ = call;
    threads = thread_count;
    shared_bytes_ = shared_bytes;
    error_.clear();
    const char* order = std::getenv("REATTN_EMULATED_ORDER");
    random_ = order ? uint32_t(std::strtoul(order, nullptr, 10)) * 2654435769u : 0;
    if (tick_ > kInFlight / 2) {
      std::fill(shadow_.begin(), shadow_.end(), Granule{});
      tick_ = 0;
    }
    while (int(stacks_.size()) < threads) add_stack();
    const bool backwards = random_ != 0;
    const int64_t blocks = blocks_x * blocks_y;
    for (int64_t i = 0; i < blocks && error_.empty(); i++) {
      const int64_t block = backwards ? blocks - 1 - i : i;
      block_x = int(block % blocks_x);
      block_y = int(block / blocks_x);
      run_block();
    }
    machine = nullptr;
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  // Ends the launch: the thread is never resumed.
  [[noreturn]] __attribute__((format(printf, 2, 3), noinline, cold)) void fail(const char* format, ...) {
    char what[400], all[800];
    va_list values;
    va_start(values, format);
    std::vsnprintf(what, sizeof what, format, values);
    va_end(values);
    std::snprintf(all, sizeof all, "emulated %s: block (%d, %d), warp %d, lane %d: %s", name_, block_x, block_y,
                  current->index / kWarp, current->index % kWarp, what);
    error_ = all;
    switch_context(current->context, scheduler_);
    std::abort();
  }

  // Waits for the other lanes; the last to arrive does it for all.
  __attribute__((noinline)) void together(const Operation& operation, const Arguments& arguments = {}) {
    Thread* const self = current;
    Warp& warp = *self->warp;
    const bool of_block = !operation.execute;
    if (warp.arrived == 0) {
      warp.operation = &operation;
      warp.first_arrived = self;
    }
    if (warp.operation != &operation || warp.finished || (of_block && finished_)) diverged(operation);
    warp.arguments[self->index % kWarp] = &arguments;
    if (++warp.arrived < kWarp || of_block) {
      const bool last = warp.arrived == kWarp;
      waiting_warps_ += last;
      current = self->next;
      switch_context(self->context, last ? scheduler_ : current->context);
      return;
    }
    warp.arrived = 0;
    operation.execute(warp.arguments);
  }
  void note_warp_sync() { current->warp->synced_at = ++tick_; }

  template <int kBytes>
  const char* reads(int at) {
    check_place<kBytes>(at, "read");
    note_read(at / 2, kBytes / 2);
    return shared_ + at;
  }
  template <int kBytes>
  char* writes(int at) {
    check_place<kBytes>(at, "write");
    note_write(at / 2, kBytes / 2, tick_);
    return shared_ + at;
  }

  void copy(int to, const void* from, bool inside) {
    if (inside) check_device(from, 16, "copy");
    check_place<16>(to, "copy");
    note_write(to / 2, 8, kInFlight);
    current->copies.push_back({inside ? static_cast<const char*>(from) : kZeros, to, current->closed_groups});
  }
  void await(unsigned pending) {
    std::vector<Copy>& copies = current->copies;
    size_t arrived = 0;
    for (; arrived < copies.size() && copies[arrived].group + pending < current->closed_groups; arrived++) {
      const Copy& copy = copies[arrived];
      std::memcpy(shared_ + copy.to, copy.from, 16);
      for (int i = copy.to / 2; i < copy.to / 2 + 8; i++) shadow_[i].written_at = tick_;
    }
    copies.erase(copies.begin(), copies.begin() + std::ptrdiff_t(arrived));
  }

  const char* shared(int at) const { return shared_ + at; }

  void check_device(const void* place, unsigned bytes, const char* access) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(place);
    if (address % bytes) fail("%s of device memory at %p: misaligned for %u bytes", access, place, bytes);
    if (last_hit_.bytes >= bytes && address - last_hit_.begin <= last_hit_.bytes - bytes) return;
    for (const Range& range : declared_)
      if (range.bytes >= bytes && address - range.begin <= range.bytes - bytes) {
        last_hit_ = range;
        return;
      }
    outside(address, bytes, access);
  }

  // Between the threads of a block, device memory knows the same races; those of a read before a write are not seen.
  void note_device(const void* place, unsigned bytes, bool write) {
    if (device_writes_.empty() && !write) return;
    const int self = current->index;
    const uintptr_t first = reinterpret_cast<uintptr_t>(place) / 2;
    for (uintptr_t at = first; at < first + bytes / 2; at++) {
      const auto found = device_writes_.find(at);
      if (found != device_writes_.end()) {
        const auto& [tick, writer] = found->second;
        const bool same_warp = writer / kWarp == self / kWarp;
        if (writer != self && tick >= (same_warp ? current->warp->synced_at : block_synced_at_))
          fail("%s of device memory races with the write by warp %d, lane %d: no sync between them",
               write ? "write" : "read", writer / kWarp, writer % kWarp);
      }
      if (write) device_writes_[at] = {tick_, self};
    }
  }

 private:
  std::vector<Thread> threads_;
  std::vector<Granule> shadow_;
  Warp warps_[kMostThreads / kWarp] = {};
  alignas(128) char shared_[kMostShared];
  static constexpr char kZeros[16] = {};
  std::vector<char*> stacks_;
  Context scheduler_ = {};
  std::vector<Range> declared_;
  std::unordered_map<uintptr_t, std::pair<uint32_t, int>> device_writes_;  // of this block: when, and by whom
  Range last_hit_ = {};
  uint32_t tick_ = 0, block_began_ = 0, block_synced_at_ = 0, random_ = 0;
  int shared_bytes_ = 0, finished_ = 0, waiting_warps_ = 0;
  const char* name_ = "";
  void (*body_)(const void*) = nullptr;
  const void* call_ = nullptr;
  std::string error_;

  void add_stack() {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack, kPage, PROT_NONE);  // too deep a stack faults
    stacks_.push_back(static_cast<char*>(stack));
  }

  unsigned random_below(unsigned bound) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 17;
    random_ ^= random_ << 5;
    return random_ % bound;
  }
  void order(int* numbers, int count) {
    for (int i = 0; i < count; i++) numbers[i] = i;
    if (random_)
      for (int i = count; i > 1; i--) std::swap(numbers[i - 1], numbers[random_below(unsigned(i))]);
  }

  static void enter() {
    Machine& self = *machine;
    self.body_(self.call_);
    self.finish();
  }
  [[noreturn]] void finish() {
    Thread& self = *current;
    Warp& warp = *self.warp;
    if (warp.arrived) fail("finished while others of its warp wait in %s", warp.operation->name);
    if (waiting_warps_) fail("finished while others of its block wait in sync_block");
    self.finished = true;
    finished_++;
    if (++warp.finished < kWarp) {
      current = self.next;
      switch_context(self.context, current->context);
    }
    switch_context(self.context, scheduler_);
    std::abort();
  }

  void run_block() {
    const int warps = threads / kWarp;
    std::memset(shared_, 0xff, size_t(shared_bytes_));
    block_began_ = block_synced_at_ = ++tick_;
    finished_ = 0;
    device_writes_.clear();
    for (int w = 0; w < warps; w++) {
      int lanes[kWarp];
      order(lanes, kWarp);
      Warp& warp = warps_[w];
      Thread* threads_of_warp = &threads_[size_t(w) * kWarp];
      warp.synced_at = tick_;
      warp.arrived = warp.finished = 0;
      warp.first = threads_of_warp + lanes[0];
      for (int l = 0; l < kWarp; l++) {
        Thread& thread = threads_of_warp[lanes[l]];
        thread.index = w * kWarp + lanes[l];
        thread.warp = &warp;
        thread.next = threads_of_warp + lanes[(l + 1) % kWarp];
        thread.finished = false;
        thread.closed_groups = 0;
        // Stacks at equal distances would meet in the same lines of the cache.
        const int size = kStackBytes - thread.index % 61 * 1088;
        prepare(thread.context, stacks_[size_t(thread.index)], size, &enter);
      }
    }
    while (finished_ < threads && error_.empty()) {
      int ordered[kMostThreads / kWarp];
      order(ordered, warps);
      waiting_warps_ = 0;
      for (int i = 0; i < warps && error_.empty(); i++) {
        current = warps_[ordered[i]].first;
        switch_context(scheduler_, current->context);
      }
      block_synced_at_ = ++tick_;
      for (int w = 0; w < warps; w++) {
        warps_[w].synced_at = tick_;
        warps_[w].arrived = 0;
      }
    }
    for (int i = 0; i < threads; i++) {
      for (const Copy& copy : threads_[size_t(i)].copies)
        for (int j = copy.to / 2; j < copy.to / 2 + 8; j++) shadow_[size_t(j)].written_at = 0;
      threads_[size_t(i)].copies.clear();
    }
    current = nullptr;
  }

  [[noreturn]] __attribute__((noinline, cold)) void diverged(const Operation& operation) {
    const Warp& warp = *current->warp;
    if (warp.operation != &operation)
      fail("diverged: %s, but lane %d waits in %s", operation.name, warp.first_arrived->index % kWarp,
           warp.operation->name);
    int other = warp.finished ? current->index / kWarp * kWarp : 0;
    while (!threads_[size_t(other)].finished) other++;
    fail("diverged: %s, but warp %d, lane %d has finished", operation.name, other / kWarp, other % kWarp);
  }

  [[noreturn]] __attribute__((noinline, cold)) void outside(uintptr_t address, unsigned bytes, const char* access) {
    Range nearest = {};
    for (const Range& range : declared_)
      if (range.begin <= address && range.begin > nearest.begin) nearest = range;
    fail("%s of device memory: %u bytes at byte %lld of a tensor of %lld bytes, outside every tensor declared", access,
         bytes, (long long)(address - nearest.begin), (long long)nearest.bytes);
  }

  template <int kBytes>
  void check_place(int at, const char* access) {
    static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16, "2, 4, 8 or 16 bytes at once");
    if (unsigned(at) > unsigned(shared_bytes_) || shared_bytes_ - at < kBytes)
      fail("%s of shared memory: %d bytes at byte %d, outside its %d bytes", access, kBytes, at, shared_bytes_);
    if (at % kBytes) fail("%s of shared memory: %d bytes at byte %d, misaligned", access, kBytes, at);
  }

  void note_read(int place, int count) {
    const int self = current->index;
    const uint32_t tick = tick_, began = block_began_, synced = block_synced_at_,
                   warp_synced = current->warp->synced_at;
    Granule* const shadow = shadow_.data();
    for (int i = place; i < place + count; i++) {
      Granule& granule = shadow[i];
      // Almost always it was written in this block, before its last barrier.
      if (granule.written_at - began >= synced - began) {
        if (granule.written_at == kInFlight) in_flight(i, "read");
        if (granule.written_at < began) fail("read of shared memory at byte %d, which nothing wrote", 2 * i);
        if (granule.writer != self && (granule.writer / kWarp != self / kWarp || granule.written_at >= warp_synced))
          race(i, "read", "write", granule.writer);
      }
      if (granule.read_at < synced)
        granule.reader = uint16_t(self);
      else if (granule.reader != self) {
        if (granule.reader % kMostThreads / kWarp != self / kWarp)
          granule.reader |= kSeveralWarps;
        else if (granule.reader & kSeveralWarps || granule.read_at >= warp_synced)
          granule.reader |= kSeveralLanes;
        else
          granule.reader = uint16_t(self);
      }
      granule.read_at = tick;
    }
  }

  void note_write(int place, int count, uint32_t tick) {
    const int self = current->index;
    const uint32_t synced = block_synced_at_, warp_synced = current->warp->synced_at;
    Granule* const shadow = shadow_.data();
    for (int i = place; i < place + count; i++) {
      Granule& granule = shadow[i];
      if (granule.written_at >= synced) {
        if (granule.written_at == kInFlight) in_flight(i, "write");
        if (granule.writer != self && (granule.writer / kWarp != self / kWarp || granule.written_at >= warp_synced))
          race(i, "write", "write", granule.writer);
      }
      if (granule.read_at >= synced && granule.reader != self) {
        const int reader = granule.reader % kMostThreads;
        if (granule.reader & kSeveralWarps || reader / kWarp != self / kWarp || granule.read_at >= warp_synced)
          race(i, "write", "read", reader);
      }
      granule.written_at = tick;
      granule.writer = uint16_t(self);
    }
  }

  [[noreturn]] __attribute__((noinline, cold)) void in_flight(int place, const char* access) {
    const int by = shadow_[size_t(place)].writer;
    fail("%s of shared memory at byte %d, where a copy by warp %d, lane %d is in flight", access, 2 * place, by / kWarp,
         by % kWarp);
  }
  [[noreturn]] __attribute__((noinline, cold)) void race(int place, const char* access, const char* before, int by) {
    fail("%s of shared memory at byte %d races with the %s by warp %d, lane %d: no sync between them", access,
         2 * place, before, by / kWarp, by % kWarp);
  }
};

template <class To, class From>
To bits_as(From value) {
  To bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Four numbers at once, each in the lower half of its word.
typedef uint32_t Words __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));
template <class T>
Floats widen(Words numbers);
template <>
inline Floats widen<BFloat16>(Words numbers) {
  return Floats(numbers << 16);
}
template <>
inline Floats widen<Half>(Words numbers) {
  const Words magnitude = numbers & 0x7fff, subnormal = Words(magnitude < 0x400);
  const Words normal_bits = Words(Floats((magnitude << 13) + 0x70000000) * 0x1p-112f);
  const Words subnormal_bits = Words(Floats(magnitude | 0x3f000000) - 0.5f);
  return Floats((numbers & 0x8000) << 16 | (subnormal & subnormal_bits) | (~subnormal & normal_bits));
}

template <class T>
T rounded(float value);
template <>
inline Half rounded(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x38800000)  // 0.5's last bit is a subnormal's
    return {uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000))};
  return {uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}
template <>
inline BFloat16 rounded(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  return {uint16_t(value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff)};
}

// The fragments of "Matrix Fragments for mma.m16n8k16 with floating point type" in the PTX ISA.
template <class T>
void multiply_add_all(const Arguments* const (&lanes)[kWarp]) {
  typedef double Two __attribute__((vector_size(16)));
  double a[16][16], sums[16][8];
  alignas(16) double b[16][8];
  for (int l = 0; l < kWarp; l++) {
    const int group = l >> 2, in_group = l % 4;
    Words from_a, from_b = {};
    std::memcpy(&from_a, lanes[l]->a, 16);
    std::memcpy(&from_b, lanes[l]->b, 8);
    const Floats even = widen<T>(from_a & 0xffff), odd = widen<T>(from_a >> 16);
    for (int i = 0; i < 4; i++) {
      double* const two = &a[i % 2 ? group + 8 : group][in_group * 2 + (i < 2 ? 0 : 8)];
      two[0] = even[i];
      two[1] = odd[i];
    }
    const Floats four = widen<T>(Words{from_b[0] & 0xffff, from_b[0] >> 16, from_b[1] & 0xffff, from_b[1] >> 16});
    for (int i = 0; i < 4; i++) b[in_group * 2 + i % 2 + (i < 2 ? 0 : 8)][group] = four[i];
  }
  for (int m = 0; m < 16; m++) {
    Two sum[4] = {};
    for (int k = 0; k < 16; k++) {
      const Two left = {a[m][k], a[m][k]};
      const Two* right = reinterpret_cast<const Two*>(b[k]);
      sum[0] += left * right[0];
      sum[1] += left * right[1];
      sum[2] += left * right[2];
      sum[3] += left * right[3];
    }
    std::memcpy(sums[m], sum, sizeof sum);
  }
  for (int l = 0; l < kWarp; l++) {
    float* c = static_cast<float*>(lanes[l]->result);
    for (int i = 0; i < 4; i++) c[i] = float(double(c[i]) + sums[i < 2 ? l >> 2 : (l >> 2) + 8][l % 4 * 2 + (i & 1)]);
  }
}

template <bool kTransposed>
void load_matrices_all(const Arguments* const (&lanes)[kWarp]) {
  uint16_t rows[kWarp][8];
  for (int l = 0; l < kWarp; l++) std::memcpy(rows[l], machine->shared(lanes[l]->number), 16);
  for (int l = 0; l < kWarp; l++)
    for (int m = 0; m < 4; m++) {
      const int at = l / 4, two = l % 4 * 2;
      const uint16_t low = kTransposed ? rows[8 * m + two][at] : rows[8 * m + at][two];
      const uint16_t high = kTransposed ? rows[8 * m + two + 1][at] : rows[8 * m + at][two + 1];
      static_cast<uint32_t*>(lanes[l]->result)[m] = low | uint32_t(high) << 16;
    }
}

// Lane l gets what lane `number` has, or lane `l ^ number`.
template <bool kXor>
void shuffle_all(const Arguments* const (&lanes)[kWarp]) {
  float values[kWarp];
  for (int l = 0; l < kWarp; l++) values[l] = *static_cast<const float*>(lanes[l]->a);
  for (int l = 0; l < kWarp; l++)
    *static_cast<float*>(lanes[l]->result) = values[((kXor ? l : 0) ^ lanes[l]->number) & (kWarp - 1)];
}

inline void sync_all(const Arguments* const (&)[kWarp]) { machine->note_warp_sync(); }

inline constexpr Operation kSyncBlock{"sync_block", nullptr}, kSyncWarp{"sync_warp", sync_all};
inline constexpr Operation kShuffle{"shuffle", shuffle_all<false>}, kShuffleXor{"shuffle_xor", shuffle_all<true>};
inline constexpr Operation kLoadMatrices{"load_matrices", load_matrices_all<false>};
inline constexpr Operation kLoadMatricesTransposed{"load_matrices_transposed", load_matrices_all<true>};
template <class T>
inline constexpr Operation kMultiplyAdd{"multiply_add", multiply_add_all<T>};

}  // namespace emulated

inline int thread() { return emulated::machine->current->index; }
inline int threads() { return emulated::machine->threads; }
inline int lane() { return thread() % kWarp; }

inline int warps() { return threads() / kWarp; }
inline int block_x() { return emulated::machine->block_x; }
inline int block_y() { return emulated::machine->block_y; }

inline void sync_block() { emulated::machine->together(emulated::kSyncBlock); }
inline void sync_warp() { emulated::machine->together(emulated::kSyncWarp); }

template <class T>
struct Shared {
  int at;  // in bytes, from where the block's shared memory begins
  Shared operator+(int elements) const { return {at + elements * int(sizeof(T))}; }
};

template <class V, class T>
V load(Shared<T> from) {
  V value;
  std::memcpy(&value, emulated::machine->reads<sizeof(V)>(from.at), sizeof(V));
  return value;
}
template <class V, class T>
void store(Shared<T> to, V value) {
  std::memcpy(emulated::machine->writes<sizeof(V)>(to.at), &value, sizeof(V));
}
template <class To, class From>
Shared<To> as(Shared<From> from) {
  return {from.at};
}
inline Shared<char> shared_memory() { return {0}; }

template <class V>
V read(const void* from) {
  emulated::machine->check_device(from, sizeof(V), "read");
  emulated::machine->note_device(from, sizeof(V), false);
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
template <class V>
void write(void* to, V value) {
  emulated::machine->check_device(to, sizeof(V), "write");
  emulated::machine->note_device(to, sizeof(V), true);
  std::memcpy(to, &value, sizeof(V));
}

inline void copy_async(Shared<char> to, const void* from, bool inside) { emulated::machine->copy(to.at, from, inside); }
inline void close_copies() { emulated::machine->current->closed_groups++; }
template <int kPending>
void copies_arrived() {
  emulated::machine->await(kPending);
}

template <class T>
void load_matrices(uint32_t (&matrices)[4], Shared<T> row) {
  emulated::machine->reads<16>(row.at);
  emulated::machine->together(emulated::kLoadMatrices, {matrices, nullptr, nullptr, row.at});
}
template <class T>
void load_matrices_transposed(uint32_t (&matrices)[4], Shared<T> row) {
  emulated::machine->reads<16>(row.at);
  emulated::machine->together(emulated::kLoadMatricesTransposed, {matrices, nullptr, nullptr, row.at});
}

inline float shuffle_xor(float value, int mask) {
  float result;
  emulated::machine->together(emulated::kShuffleXor, {&result, &value, nullptr, mask});
  return result;
}
inline float shuffle(float value, int from_lane) {
  float result;
  emulated::machine->together(emulated::kShuffle, {&result, &value, nullptr, from_lane});
  return result;
}
// A shuffle on the device too: all lanes have to come here.
inline int warp() { return int(shuffle(float(thread() / kWarp), 0)); }

inline float rounded_product(float a, float b) { return a * b; }
inline float fast_exp2(float x) {
  const float result = exp2f(x);
  return result < FLT_MIN ? 0.0f : result;  // .ftz
}
inline float log2(float x) { return log2f(x); }
inline float inverse_sqrt(float x) { return 1.0f / sqrtf(x); }
inline float larger(float a, float b) { return fmaxf(a, b); }
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

template <class T>
uint32_t pack(float low, float high) {
  return emulated::rounded<T>(low).bits | uint32_t(emulated::rounded<T>(high).bits) << 16;
}
template <class T>
float2 unpack(uint32_t both) {
  const emulated::Floats values = emulated::widen<T>(emulated::Words{both & 0xffff, both >> 16});
  return {values[0], values[1]};
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::machine->together(emulated::kMultiplyAdd<T>, {c, a, b, 0});
}

}  // namespace reattn
