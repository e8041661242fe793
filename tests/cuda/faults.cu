// Kernels that are wrong, each in one way that the emulator has to report, and kernels that are right. In blocks of 64
// threads with 4096 bytes of shared memory, and 65536 bytes at `in`.
#include "instructions.cuh"

using namespace reattn;

struct Operands {
  const uint16_t *a, *b;  // matrices
  float* out;
  char* in;
  int number;
};

#define KERNEL(name) extern "C" __global__ void name(const Operands p)

__device__ Shared<float> floats() { return as<float>(shared_memory()); }
// Uses what was read, or the compiler would not read it.
__device__ void use(const Operands& p, uint4 value) { write(p.out, float(value.x ^ value.y ^ value.z ^ value.w)); }

KERNEL(outside) { load<float>(floats() + 1024); }
KERNEL(negative) { store<float>(floats() + -1, 0); }
KERNEL(straddling) { load<float4>(shared_memory() + 4080); }  // in 4088 bytes
KERNEL(misaligned) { load<float2>(floats() + 1); }
KERNEL(misaligned_row) {
  uint32_t matrices[4];
  load_matrices(matrices, floats() + 2);
}
KERNEL(misaligned_copy) { copy_async(shared_memory() + 8, p.in, true); }
KERNEL(nothing_wrote) {
  store<float>(floats() + thread(), 1);
  sync_block();
  if (block_x() == 1) load<float>(floats() + threads());
}
KERNEL(read_after_write) {
  store<float>(floats() + thread(), 1);
  sync_block();
  store<float>(floats() + thread(), 2);
  sync_warp();
  load<float>(floats() + (thread() ^ kWarp));
}
KERNEL(row_after_write) {
  for (int turn = 0; turn < 2; turn++) {
    for (int i = 0; i < 4; i++) store<float>(floats() + (thread() * 4 + i), 1);
    if (turn == 0) sync_block();
  }
  sync_warp();
  uint32_t matrices[4];
  load_matrices(matrices, shared_memory() + (thread() ^ kWarp) * 16);
}
KERNEL(write_after_read) {
  store<float>(floats() + thread(), 1);
  sync_block();
  load<float>(floats() + (thread() ^ kWarp));
  store<float>(floats() + thread(), 2);
}
KERNEL(write_after_many_reads) {
  if (thread() == 0) store<float>(floats(), 1);
  sync_block();
  load<float>(floats());
  sync_warp();
  if (thread() == threads() - 1) store<float>(floats(), 2);
}
// Half the warps alone.
KERNEL(missed_by_warp) {
  if (warp() == 0) sync_block();
}
KERNEL(write_after_write) {
  if (lane() == 0) store<float>(floats(), float(thread()));
}
// Of different warps in different parts of a word.
KERNEL(write_of_half_a_word) {
  if (lane() == 0) store<float>(floats(), 1);
  sync_warp();
  if (thread() == kWarp) store<uint16_t>(as<uint16_t>(shared_memory()) + 1, 1);
}
// The lanes of a warp need a sync too: nothing but the hardware's habits has them keep step.
KERNEL(other_lane) {
  if (lane() < 16) store<float>(floats() + thread(), 1);
  if (lane() >= 16) load<float>(floats() + (thread() ^ 16));
}
KERNEL(early_copy) {
  copy_async(shared_memory() + thread() * 16, p.in, true);
  close_copies();
  load<float>(floats() + thread() * 4);
}
KERNEL(early_group) {
  for (int i = 0; i < 2; i++) {
    copy_async(shared_memory() + (2 * thread() + i) * 16, p.in, i == 0);
    close_copies();
  }
  copies_arrived<1>();
  load<float>(floats() + 2 * thread() * 4);
  load<float>(floats() + (2 * thread() + 1) * 4);
}
KERNEL(open_group) {
  copy_async(shared_memory() + thread() * 16, p.in, true);
  copies_arrived<0>();
  load<float>(floats() + thread() * 4);
}
KERNEL(overwritten_copy) {
  copy_async(shared_memory() + thread() * 16, p.in, true);
  close_copies();
  sync_block();
  store<float>(floats() + (thread() ^ 1) * 4, 1);
}
KERNEL(synced_too_early) {
  copy_async(shared_memory() + thread() * 16, p.in, true);
  close_copies();
  sync_block();
  copies_arrived<0>();
  load<float>(floats() + (thread() ^ kWarp) * 4);
}
KERNEL(copy_of_other_warp) {
  copy_async(shared_memory() + thread() * 16, p.in, true);
  close_copies();
  copies_arrived<0>();
  sync_warp();
  load<float>(floats() + (thread() ^ 1) * 4);
  if (warp() == 1) load<float>(floats() + lane() * 4);
}
KERNEL(copy_over_read) {
  store<float>(floats() + thread() * 4, 1);
  sync_block();
  if (warp() == 0) load<float>(floats() + (thread() ^ kWarp) * 4);
  if (warp() == 1) copy_async(shared_memory() + thread() * 16, p.in, true);
}
KERNEL(missed_by_lane) {
  if (lane() != 7) sync_block();
}
KERNEL(exited_lane) {
  if (lane() == 3) return;
  write(p.out + thread(), shuffle(1.0f, 0));
}
KERNEL(lone_lane) {
  if (lane() == 0) write(p.out + thread() / kWarp, float(warp()));
}
KERNEL(diverged) {
  if (lane() < 16)
    write(p.out + thread(), shuffle(1.0f, 0));
  else
    sync_warp();
}
KERNEL(diverged_rows) {
  store<float>(floats() + thread(), 1);
  sync_block();
  uint32_t matrices[4];
  if (lane() < 16) load_matrices(matrices, shared_memory() + lane() % 8 * 16);
}
KERNEL(diverged_product) {
  float c[4] = {};
  const uint32_t words[4] = {};
  if (lane() < 16) multiply_add<Half>(c, words, {words[0], words[1]});
  write(p.out + thread(), c[0]);
}
KERNEL(diverged_barrier) {
  if (lane() < 16)
    sync_block();
  else
    sync_warp();
}
KERNEL(device_outside) { use(p, {read<uint32_t>(p.in + 65536), 0, 0, 0}); }
KERNEL(device_before) { write<float>(p.in - 4, 0); }
KERNEL(device_race) {
  if (thread() == 5) write<float>(p.in, 1);
  sync_warp();
  if (thread() == 40) write<float>(p.in, 2);
}
KERNEL(race_of_blocks) { write<float>(p.in, float(block_x())); }
KERNEL(read_of_other_block) {
  if (block_x() == 0)
    write<float>(p.in, 1);
  else
    write<float>(p.out, read<float>(p.in));
}
KERNEL(device_misaligned) { use(p, read<uint4>(p.in + 8)); }
KERNEL(prefetched_outside) { prefetch(p.in + 65536); }
KERNEL(copied_from_outside) { copy_async(shared_memory() + 16 * thread(), p.in + 65536, true); }
KERNEL(no_pointer) { use(p, {read<uint16_t>(p.a), 0, 0, 0}); }

// c (16 x 16) = a b + 1, of what rows hold or, where there is a number, of what columns hold.
template <class T, bool kSwapped = false>
__device__ void product(const Operands& p) {
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
  if (p.number) {
    load_matrices_transposed(of_a, a + (third * kPitch + fourth));
    load_matrices(of_b, b + (third * kPitch + fourth));
  } else {
    load_matrices(of_a, a + (first * kPitch + second));
    load_matrices_transposed(of_b, b + (first * kPitch + second));
  }
  if (kSwapped) {
    const uint32_t other = of_a[1];
    of_a[1] = of_a[2];
    of_a[2] = other;
  }
  for (int half = 0; half < 2; half++) {
    float c[4] = {1, 1, 1, 1};
    multiply_add<T>(c, of_a, {of_b[2 * half], of_b[2 * half + 1]});
    for (int i = 0; i < 4; i++)
      write<float>(p.out + (lane() / 4 + i / 2 * 8) * 16 + half * 8 + lane() % 4 * 2 + i % 2, c[i]);
  }
}
KERNEL(half_product) { product<Half>(p); }
KERNEL(bfloat16_product) { product<BFloat16>(p); }
KERNEL(half_product_swapped) { product<Half, true>(p); }
KERNEL(bfloat16_product_swapped) { product<BFloat16, true>(p); }

// out[thread] = the sum of what eight steps bring, of which one is on its way while another is summed.
KERNEL(pipeline) {
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
  write<float>(p.out + block_x() * threads() + thread(), sum);
}
KERNEL(reduction) {
  float sum = float(lane() * lane());
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  write<float>(p.out + block_x() * threads() + thread(), sum + shuffle(float(lane()), lane() + 1));
}
KERNEL(exchange) {
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
  write<float>(p.out + block_x() * threads() + thread(), load<float>(floats() + thread()));
}
// What several blocks write alike each of them may read.
KERNEL(alike) {
  if (thread() == 0) write<float>(p.in, 3);
  sync_block();
  write<float>(p.out + block_x() * threads() + thread(), read<float>(p.in));
}
// Lanes that go different ways come together again.
KERNEL(branches) {
  int value = 0;
  for (int i = 0; i < lane() % 5; i++) value += lane() % 2 ? 3 : i;
  switch (lane() % 3) {
    case 0:
      if (lane() > 10) value += 100;
      break;
    case 1:
      value += 200;
  }
  write<float>(p.out + block_x() * threads() + thread(), shuffle_xor(float(value), 1));
}

// Words to floats, or floats to words of the same number twice.
template <class T>
__device__ void widen(const Operands& p) {
  const int i = block_x() * threads() + thread();
  if (i < p.number) write(p.out + 2 * i, unpack<T>(read<uint32_t>(p.in + 4 * i)));
}
template <class T>
__device__ void round(const Operands& p) {
  const int i = block_x() * threads() + thread();
  const float value = i < p.number ? read<float>(p.in + 4 * i) : 0;
  if (i < p.number) write(p.out + i, pack<T>(value, value));
}
KERNEL(half_to_float) { widen<Half>(p); }
KERNEL(float_to_half) { round<Half>(p); }
KERNEL(bfloat16_to_float) { widen<BFloat16>(p); }
KERNEL(float_to_bfloat16) { round<BFloat16>(p); }
