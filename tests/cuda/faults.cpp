// Kernels that are wrong, each in one way that emulated.h has to report, and kernels that are right. Prints what the
// kernel named by the argument did. The conversions are of what stands in standard input.
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <string>

#include "instructions.cuh"
#include "launch.h"

using namespace reattn;

namespace {

struct Operands {
  const uint16_t *a, *b;  // matrices
  float* out;
  const char* in;
  bool transposed;
};

__device__ Shared<float> floats() { return as<float>(shared_memory()); }

__global__ void outside(const Operands) { load<float>(floats() + 1024); }
__global__ void negative(const Operands) { store<float>(floats() + -1, 0); }
__global__ void straddling(const Operands) { store<uint4>(shared_memory() + 4088, {}); }
__global__ void misaligned(const Operands) { load<float2>(floats() + 1); }
__global__ void misaligned_row(const Operands) {
  uint32_t matrices[4];
  load_matrices(matrices, floats() + 2);
}
__global__ void misaligned_copy(const Operands p) { copy_async(shared_memory() + 8, p.in, true); }
__global__ void nothing_wrote(const Operands) {
  store<float>(floats() + thread(), 1);
  sync_block();
  if (block_x() == 1) load<float>(floats() + threads());
}
__global__ void read_after_write(const Operands) {
  store<float>(floats() + thread(), 1);
  shuffle_xor(1, 1);  // orders nothing
  load<float>(floats() + (thread() ^ 1));
}
__global__ void row_after_write(const Operands) {
  store<uint4>(shared_memory() + thread() * 16, {});
  shuffle(0, 0);
  uint32_t matrices[4];
  load_matrices(matrices, shared_memory() + (thread() ^ 8) * 16);
}
__global__ void write_after_read(const Operands) {
  store<float>(floats() + thread(), 1);
  sync_warp();
  load<float>(floats() + (thread() ^ 1));
  store<float>(floats() + thread(), 2);
}
__global__ void write_after_many_reads(const Operands) {
  if (thread() == 0) store<float>(floats(), 1);
  sync_block();
  load<float>(floats());
  sync_warp();
  if (thread() == threads() - 1) store<float>(floats(), 2);
}
__global__ void write_after_write(const Operands) { store<float>(floats(), float(lane())); }
__global__ void other_warp(const Operands) {
  store<float>(floats() + thread(), 1);
  sync_warp();
  if (warp() == 1) load<float>(floats() + lane());
}
__global__ void early_copy(const Operands p) {
  copy_async(shared_memory() + thread() * 16, p.in, true);
  close_copies();
  load<uint4>(shared_memory() + thread() * 16);
}
__global__ void early_group(const Operands p) {
  for (int i = 0; i < 2; i++) {
    copy_async(shared_memory() + (2 * thread() + i) * 16, p.in, i == 0);
    close_copies();
  }
  copies_arrived<1>();
  load<uint4>(shared_memory() + 2 * thread() * 16);
  load<uint4>(shared_memory() + (2 * thread() + 1) * 16);
}
__global__ void open_group(const Operands p) {
  copy_async(shared_memory() + thread() * 16, p.in, true);
  copies_arrived<0>();
  load<uint4>(shared_memory() + thread() * 16);
}
__global__ void overwritten_copy(const Operands p) {
  copy_async(shared_memory() + thread() * 16, p.in, true);
  close_copies();
  sync_block();
  store<float>(floats() + (thread() ^ 1) * 4, 1);
}
__global__ void synced_too_early(const Operands p) {
  copy_async(shared_memory() + thread() * 16, p.in, true);
  close_copies();
  sync_block();
  copies_arrived<0>();
  load<uint4>(shared_memory() + (thread() ^ kWarp) * 16);
}
__global__ void copy_of_other_warp(const Operands p) {
  copy_async(shared_memory() + thread() * 16, p.in, true);
  close_copies();
  copies_arrived<0>();
  sync_warp();
  load<uint4>(shared_memory() + (thread() ^ 1) * 16);
  if (warp() == 1) load<uint4>(shared_memory() + lane() * 16);
}
__global__ void copy_over_read(const Operands p) {
  store<uint4>(shared_memory() + thread() * 16, {});
  sync_block();
  if (warp() == 0) load<float>(floats() + (thread() ^ kWarp) * 4);
  if (warp() == 1) copy_async(shared_memory() + thread() * 16, p.in, true);
}
__global__ void missed_barrier(const Operands) {
  if (warp() == 0) sync_block();
}
__global__ void missed_by_lane(const Operands) {
  sync_block();
  if (lane() != 7) sync_block();
}
__global__ void exited_lane(const Operands) {
  if (lane() == 3) return;
  shuffle(1, 0);
}
__global__ void diverged(const Operands) {
  if (lane() < 16)
    shuffle(1, 0);
  else
    sync_warp();
}
__global__ void diverged_barrier(const Operands) {
  if (lane() < 16)
    sync_block();
  else
    sync_warp();
}
__global__ void device_outside(const Operands p) { read<float>(p.in + 65536); }
__global__ void device_before(const Operands p) { write<float>(const_cast<char*>(p.in) - 4, 0); }
__global__ void device_race(const Operands p) {
  char* const place = const_cast<char*>(p.in);
  if (thread() == 5) write<float>(place, 1);
  sync_warp();
  if (thread() == 40) write<float>(place, 2);
}
__global__ void device_misaligned(const Operands p) { read<uint4>(p.in + 8); }
__global__ void copied_from_outside(const Operands p) {
  copy_async(shared_memory() + 16 * thread(), p.in + 65536, true);
}

// c (16 x 16) = a b, of what rows hold or of what columns hold.
template <class T>
__global__ void product(const Operands p) {
  constexpr int kPitch = 24;
  const Shared<T> a = as<T>(shared_memory()), b = a + 16 * kPitch;
  for (int i = lane(); i < 256; i += kWarp) {
    store<uint16_t>(a + (i / 16 * kPitch + i % 16), read<uint16_t>(p.a + i));
    store<uint16_t>(b + (i / 16 * kPitch + i % 16), read<uint16_t>(p.b + i));
  }
  sync_warp();
  uint32_t of_a[4], of_b[4];
  const int first = lane() % 16, second = lane() / 16 * 8;
  const int third = lane() / 16 * 8 + lane() % 8, fourth = lane() / 8 % 2 * 8;
  if (p.transposed) {
    load_matrices_transposed(of_a, a + (third * kPitch + fourth));
    load_matrices(of_b, b + (third * kPitch + fourth));
  } else {
    load_matrices(of_a, a + (first * kPitch + second));
    load_matrices_transposed(of_b, b + (first * kPitch + second));
  }
  for (int half = 0; half < 2; half++) {
    float c[4] = {1, 1, 1, 1};
    const uint32_t right[2] = {of_b[2 * half], of_b[2 * half + 1]};
    multiply_add<T>(c, of_a, right);
    for (int i = 0; i < 4; i++)
      write<float>(p.out + (lane() / 4 + i / 2 * 8) * 16 + half * 8 + lane() % 4 * 2 + i % 2, c[i]);
  }
}

// out[thread] = the sum of what eight steps bring, of which one is on its way while another is summed.
__global__ void pipeline(const Operands p) {
  constexpr int kSteps = 8;
  const auto buffer = [](int step) { return shared_memory() + step % 2 * threads() * 16; };
  const auto start = [&](int step) {
    if (step < kSteps) copy_async(buffer(step) + thread() * 16, p.in + (step * threads() + thread()) * 16, step != 5);
    close_copies();
  };
  float sum = 0;
  start(0);
  for (int step = 0; step < kSteps; step++) {
    start(step + 1);
    copies_arrived<1>();
    sync_block();
    for (int i = 0; i < 4; i++)
      sum += load<float>(as<float>(buffer(step)) + (i * threads() + (thread() ^ kWarp) * 7 % threads()));
    sync_block();
  }
  write<float>(p.out + thread(), sum);
}
__global__ void reduction(const Operands p) {
  float sum = float(lane() * lane());
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  write<float>(p.out + thread(), sum + shuffle(float(lane()), lane() + 1));
}
__global__ void exchange(const Operands p) {
  float value = float(thread());
  for (int i = 0; i < 3; i++) {
    store<float>(floats() + thread(), value);
    sync_block();
    value = 2 * load<float>(floats() + (thread() ^ kWarp)) + load<float>(floats());
    sync_block();
  }
  // A warp's own part needs its own sync only.
  store<float>(floats() + thread(), value);
  sync_warp();
  value += load<float>(floats() + (thread() ^ 1));
  sync_warp();
  store<float>(floats() + (thread() ^ 1), value);
  sync_block();
  write<float>(p.out + thread(), load<float>(floats() + thread()));
}

constexpr int kThreads = 64;
alignas(16) float out[256];
alignas(16) char memory[65536 + 128], * const in = memory + 64;
constexpr int kInBytes = 65536;

void run(void (*kernel)(Operands), const char* name, Operands p = {}) {
  p.in = in;
  p.out = out;
  declare(in, kInBytes);
  declare(out, sizeof out);
  launch(kernel, name, 2, 1, kThreads, 4096, 0, p);
}

bool close(float a, double b) { return std::fabs(a - b) <= 1e-6 * std::fmax(1, std::fabs(b)); }

template <class T>
bool product_is_right(bool transposed) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  uint16_t a[256], b[256];
  float of_a[256], of_b[256];
  for (int i = 0; i < 256; i++) {
    a[i] = uint16_t(pack<T>(normal(random), 0));
    b[i] = uint16_t(pack<T>(normal(random), 0));
    of_a[i] = unpack<T>(a[i]).x;
    of_b[i] = unpack<T>(b[i]).x;
  }
  Operands p{a, b, out, in, transposed};
  for (const void* matrix : {a, b}) declare(matrix, sizeof a);
  declare(out, sizeof out);
  launch(product<T>, "product", 1, 1, kWarp, 2 * 16 * 24 * 2, 0, p);
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      double sum = 1;
      for (int k = 0; k < 16; k++)
        sum += double(of_a[transposed ? k * 16 + m : m * 16 + k]) * of_b[transposed ? n * 16 + k : k * 16 + n];
      if (!close(out[m * 16 + n], sum)) return false;
    }
  return true;
}

bool pipeline_is_right() {
  float numbers[kInBytes / 4];
  for (size_t i = 0; i < kInBytes / 4; i++) numbers[i] = float(i % 251);
  std::memcpy(in, numbers, kInBytes);
  declare(in, 8 * kThreads * 16);
  declare(out, kThreads * 4);
  launch(pipeline, "pipeline", 3, 2, kThreads, 2 * kThreads * 16, 0, Operands{nullptr, nullptr, out, in, false});
  for (int t = 0; t < kThreads; t++) {
    double sum = 0;
    for (int step = 0; step < 8; step++)
      for (int i = 0; i < 4 && step != 5; i++)
        sum += numbers[step * kThreads * 4 + i * kThreads + (t ^ kWarp) * 7 % kThreads];
    if (!close(out[t], sum)) return false;
  }
  return true;
}

bool reduction_is_right() {
  run(reduction, "reduction");
  for (int t = 0; t < kThreads; t++)
    if (out[t] != 31 * 32 * 63 / 6 + (t + 1) % kWarp) return false;
  return true;
}

bool exchange_is_right() {
  run(exchange, "exchange");
  float values[kThreads], next[kThreads];
  for (int t = 0; t < kThreads; t++) values[t] = float(t);
  for (int i = 0; i < 3; i++) {
    for (int t = 0; t < kThreads; t++) next[t] = 2 * values[t ^ kWarp] + values[0];
    std::memcpy(values, next, sizeof next);
  }
  for (int t = 0; t < kThreads; t++)
    if (out[t] != values[t] + values[t ^ 1]) return false;
  return true;
}

template <class T>
void convert(bool to_float) {
  uint32_t word;
  while (std::fread(&word, 4, 1, stdin) == 1) {
    float2 two = unpack<T>(word);
    if (!to_float) {
      std::memcpy(&two.x, &word, 4);
      word = pack<T>(two.x, two.x);
    }
    std::fwrite(to_float ? static_cast<const void*>(&two) : &word, to_float ? 8 : 4, 1, stdout);
  }
}

#define KERNEL(name) {#name, [] { run(name, #name); }}
const std::map<std::string, void (*)()> kWrong = {
    KERNEL(outside),
    KERNEL(negative),
    KERNEL(straddling),
    KERNEL(misaligned),
    KERNEL(misaligned_row),
    KERNEL(misaligned_copy),
    KERNEL(nothing_wrote),
    KERNEL(read_after_write),
    KERNEL(row_after_write),
    KERNEL(write_after_read),
    KERNEL(write_after_many_reads),
    KERNEL(write_after_write),
    KERNEL(other_warp),
    KERNEL(early_copy),
    KERNEL(early_group),
    KERNEL(open_group),
    KERNEL(overwritten_copy),
    KERNEL(synced_too_early),
    KERNEL(copy_of_other_warp),
    KERNEL(copy_over_read),
    KERNEL(missed_barrier),
    KERNEL(missed_by_lane),
    KERNEL(exited_lane),
    KERNEL(diverged),
    KERNEL(diverged_barrier),
    KERNEL(device_outside),
    KERNEL(device_before),
    KERNEL(device_race),
    KERNEL(device_misaligned),
    KERNEL(copied_from_outside),
    {"undeclared",
     [] { launch(reduction, "undeclared", 1, 1, kThreads, 0, 0, Operands{nullptr, nullptr, out, in, false}); }},
    {"too_much", [] { launch(reduction, "too_much", 1, 1, kThreads, 232449, 0, Operands{}); }},
};
const std::map<std::string, bool (*)()> kRight = {
    {"half_product", [] { return product_is_right<Half>(false); }},
    {"half_product_of_columns", [] { return product_is_right<Half>(true); }},
    {"bfloat16_product", [] { return product_is_right<BFloat16>(false); }},
    {"bfloat16_product_of_columns", [] { return product_is_right<BFloat16>(true); }},
    {"pipeline", pipeline_is_right},
    {"reduction", reduction_is_right},
    {"exchange", exchange_is_right},
};
const std::map<std::string, void (*)()> kConversions = {
    {"half_to_float", [] { convert<Half>(true); }},
    {"float_to_half", [] { convert<Half>(false); }},
    {"bfloat16_to_float", [] { convert<BFloat16>(true); }},
    {"float_to_bfloat16", [] { convert<BFloat16>(false); }},
};

}  // namespace

int main(int count, char** arguments) {
  const std::string name = count == 2 ? arguments[1] : "";
  if (kConversions.count(name)) {
    kConversions.at(name)();
  } else if (kRight.count(name)) {
    std::puts(kRight.at(name)() ? "right" : "wrong");
  } else if (kWrong.count(name)) {
    try {
      kWrong.at(name)();
      std::puts("nothing reported");
    } catch (const std::exception& error) {
      std::puts(error.what());
    }
    // What a kernel left behind does not hinder the next one.
    if (!exchange_is_right()) std::puts("and the kernel after it is wrong");
  } else {
    for (const auto& [wrong, unused] : kWrong) std::puts(wrong.c_str());
    return 2;
  }
}
