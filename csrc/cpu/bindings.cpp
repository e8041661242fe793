// The extension module reattn._cpu: addresses, sizes and strides in, nothing of torch's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>

#include "dispatch.h"
#include "driver.h"
#include "parallel.h"

namespace py = pybind11;
using namespace reattn;

namespace {

// (address, (stride of batch, head, row, head_dim))
using TensorArgument = std::tuple<uintptr_t, std::array<int64_t, 4>>;
using Address = uintptr_t;
// dtype (0 float32, 1 bfloat16, 2 float16), batch, heads, seqlen, seqlen_k, head_dim
using Shape = std::array<int64_t, 6>;

Tensor tensor(const TensorArgument& argument) {
  const auto& [address, strides] = argument;
  return {reinterpret_cast<void*>(address), strides[0], strides[1], strides[2], strides[3]};
}

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Problem problem(const Shape& shape) {
  Problem p{};
  p.dtype = Dtype(shape[0]);
  std::tie(p.batch, p.heads, p.seqlen, p.seqlen_k, p.head_dim) =
      std::tie(shape[1], shape[2], shape[3], shape[4], shape[5]);
  return p;
}

const Kernels& kernels(size_t isa, const Problem& p) {
  const InstructionSet& set = instruction_sets().at(isa);
  if (!set.runs_here) throw std::runtime_error("this CPU cannot run " + set.name);
  return p.dtype == Dtype::kBFloat16 && set.bfloat16 ? *set.bfloat16 : *set.float32;
}

void statistics(size_t isa, int threads, const Shape& shape, const TensorArgument& query, const TensorArgument& key,
                Address seed, float scale, double dropout_p, Address lse, Address sums, Address products) {
  Problem p = problem(shape);
  p.query = tensor(query), p.key = tensor(key);
  p.seed = pointer<int64_t>(seed), p.scale = scale, p.dropout_p = dropout_p;
  p.lse = pointer<float>(lse), p.sums = pointer<double>(sums), p.products = pointer<double>(products);
  run_statistics(kernels(isa, p), p, threads);
}

void forward(size_t isa, int threads, const Shape& shape, const TensorArgument& query, const TensorArgument& key,
             const TensorArgument& value, const TensorArgument& out, const std::array<Address, 4>& parameters,
             Address seed, float scale, float eps, double dropout_p, Address lse, bool lse_known) {
  Problem p = problem(shape);
  p.query = tensor(query), p.key = tensor(key), p.value = tensor(value), p.out = tensor(out);
  p.weight = pointer<float>(parameters[0]), p.shift = pointer<float>(parameters[1]);
  p.gamma = pointer<float>(parameters[2]), p.beta = pointer<float>(parameters[3]);
  p.seed = pointer<int64_t>(seed), p.scale = scale, p.eps = eps, p.dropout_p = dropout_p;
  p.lse = pointer<float>(lse);
  run_forward(kernels(isa, p), p, lse_known, threads);
}

void backward(size_t isa, int threads, const Shape& shape, const TensorArgument& grad, const TensorArgument& query,
              const TensorArgument& key, const TensorArgument& value, const std::array<TensorArgument, 3>& grads,
              const std::array<Address, 6>& parameters, Address seed, float scale, float eps, double dropout_p,
              Address lse, const std::array<Address, 4>& grad_parameters) {
  Problem p = problem(shape);
  p.grad = tensor(grad), p.query = tensor(query), p.key = tensor(key), p.value = tensor(value);
  p.grad_query = tensor(grads[0]), p.grad_key = tensor(grads[1]), p.grad_value = tensor(grads[2]);
  p.weight = pointer<float>(parameters[0]), p.shift = pointer<float>(parameters[1]);
  p.gamma = pointer<float>(parameters[2]), p.beta = pointer<float>(parameters[3]);
  p.coupled = pointer<float>(parameters[4]), p.constant = pointer<float>(parameters[5]);
  p.seed = pointer<int64_t>(seed), p.scale = scale, p.eps = eps, p.dropout_p = dropout_p;
  p.lse = pointer<float>(lse);
  p.grad_weight = pointer<double>(grad_parameters[0]), p.grad_shift = pointer<double>(grad_parameters[1]);
  p.grad_gamma = pointer<double>(grad_parameters[2]), p.grad_beta = pointer<double>(grad_parameters[3]);
  run_backward(kernels(isa, p), p, threads);
}

void grad_dot_out(size_t isa, int threads, const Shape& shape, const TensorArgument& grad, const TensorArgument& out,
                  Address sums) {
  Problem p = problem(shape);
  p.grad = tensor(grad), p.out = tensor(out), p.sums = pointer<double>(sums);
  run_grad_dot_out(kernels(isa, p), p, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Re-attention on a CPU. A tensor is (address, strides in elements); an absent one has address 0.";
  watch_forks();
  const py::call_guard<py::gil_scoped_release> without_gil;
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::pair<std::string, bool>> sets;
        for (const InstructionSet& set : instruction_sets()) sets.emplace_back(set.name, set.runs_here);
        return sets;
      },
      "(name, whether this CPU runs it) of every instruction set that was built, from the plainest to the best.");
  m.def("use_openmp_of", &use_openmp_of, "Takes threads from the OpenMP runtime of a loaded library; whether it can.");
  m.def("uses_openmp", &uses_openmp);
  m.def("empty_cache", &empty_cache, "Frees the memory that calls leave for each other.");
  m.def("statistics", &statistics, without_gil);
  m.def("forward", &forward, without_gil);
  m.def("backward", &backward, without_gil);
  m.def("grad_dot_out", &grad_dot_out, without_gil);
}
