// The entries of csrc/cuda/kernels.h without kernels: each says which instantiation is launched, and with what.
#include "cuda_host.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "launch.h"

namespace py = pybind11;

namespace reattn {
namespace {

// Never destroyed: it may outlive the interpreter.
py::function& launcher() {
  static auto* const launcher = new py::function;
  return *launcher;
}

// By each thread for its own next launch.
thread_local std::vector<std::pair<uintptr_t, int64_t>> declared;

}  // namespace

void set_launcher(py::function function) { launcher() = std::move(function); }

void declare(const void* begin, int64_t bytes) {
  if (bytes > 0) declared.emplace_back(reinterpret_cast<uintptr_t>(begin), bytes);
}

void launch(const Instantiation& kernel, const char* name, int64_t blocks_x, int blocks_y, int threads,
            int shared_bytes, uint64_t, const Params& params) {
  const auto memory = std::exchange(declared, {});
  if (shared_bytes > describe(0).shared_bytes || blocks_x < 1 || blocks_x > INT32_MAX || blocks_y < 1 ||
      blocks_y > 65535)
    throw std::runtime_error(std::string(name) + ": cudaErrorInvalidValue (emulated)");
  const py::gil_scoped_acquire gil;
  launcher()(kernel.source, kernel.name, std::make_pair(blocks_x, blocks_y), threads, shared_bytes,
             py::bytes(reinterpret_cast<const char*>(&params), sizeof params), memory);
}

// As instructions.cuh has them.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

namespace {

template <class T>
constexpr const char* kElement = nullptr;
template <>
constexpr const char* kElement<Half> = "reattn::Half";
template <>
constexpr const char* kElement<BFloat16> = "reattn::BFloat16";
template <>
constexpr const char* kElement<float> = "float";

std::string in_source(bool value) { return value ? "true" : "false"; }
std::string in_source(int value) { return std::to_string(value); }

template <class T, class... Chosen>
void start_kernel(const char* source, const char* name, const Params& p, const Launch& how, Chosen... chosen) {
  std::string arguments = kElement<T>;
  ((arguments += ", " + in_source(chosen)), ...);
  start(Instantiation{source, "reattn::" + std::string(name) + "_kernel<" + arguments + ">"}, name, p, how);
}

}  // namespace

template <class T>
void forward(const Params& p, const Launch& how) {
  choose_forward<T>(p, [&](auto... chosen) { start_kernel<T>("forward", "forward", p, how, chosen...); });
}
template <class T>
void backward_query(const Params& p, const Launch& how) {
  choose_backward(p, [&](auto padded) { start_kernel<T>("backward_query", "backward_query", p, how, padded); });
}
template <class T>
void backward_key(const Params& p, const Launch& how) {
  choose_backward(p, [&](auto padded) { start_kernel<T>("backward_key", "backward_key", p, how, padded); });
}
template <class T>
void add_up(const Params& p, const Launch& how) {
  start_kernel<T>("sums", "add_up", p, how);
}
template <class T>
void finish(const Params& p, const Launch& how) {
  start_kernel<T>("sums", "finish", p, how);
}
template <class T>
void grad_sums(const Params& p, const Launch& how) {
  start_kernel<T>("sums", "grad_sums", p, how);
}
template <class T>
void unfold(const Params& p, const Launch& how) {
  start_kernel<T>("sums", "unfold", p, how);
}
template <class T>
void check_device() {}

#define REATTN_ENTRIES(T)                                              \
  template void forward<T>(const Params& p, const Launch& how);        \
  template void backward_query<T>(const Params& p, const Launch& how); \
  template void backward_key<T>(const Params& p, const Launch& how);   \
  template void add_up<T>(const Params& p, const Launch& how);         \
  template void finish<T>(const Params& p, const Launch& how);         \
  template void grad_sums<T>(const Params& p, const Launch& how);      \
  template void unfold<T>(const Params& p, const Launch& how);         \
  template void check_device<T>();

REATTN_ENTRIES(Half)
REATTN_ENTRIES(BFloat16)
REATTN_ENTRIES(float)

}  // namespace reattn
