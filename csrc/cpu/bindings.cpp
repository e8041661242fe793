// The extension module reattn._cpu: a struct of addresses, sizes and strides in, nothing of torch's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "dispatch.h"
#include "driver.h"
#include "parallel.h"

namespace py = pybind11;
using namespace reattn;

namespace {

// (address, (stride of batch, head, row, head_dim))
using TensorArgument = std::tuple<uintptr_t, std::array<int64_t, 4>>;

// (whether it is added, address, sizes, strides)
using MaskArgument = std::tuple<bool, uintptr_t, std::array<int64_t, 4>, std::array<int64_t, 4>>;

// A field that is set from an address; 0 for none.
template <class Class, class Get>
void address(Class& type, const char* name, Get get) {
  type.def_property(
      name, [get](Call& call) { return reinterpret_cast<uintptr_t>(get(call)); },
      [get](Call& call, uintptr_t value) {
        auto& field = get(call);
        field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(value);
      });
}

template <class Class>
void tensor(Class& type, const char* name, Tensor Problem::* field) {
  type.def_property(name, nullptr, [field](Call& call, const TensorArgument& argument) {
    const auto& [address, strides] = argument;
    call.problem.*field = {reinterpret_cast<void*>(address), strides[0], strides[1], strides[2], strides[3]};
  });
}

// The sizes, and the kernels for one of the instruction sets.
Call make_call(size_t isa, int threads, int dtype, int norm, const std::array<int64_t, 5>& sizes) {
  const InstructionSet& set = instruction_sets().at(isa);
  if (!set.runs_here) throw std::runtime_error("this CPU cannot run " + set.name);
  Call call{};
  call.threads = threads;
  Problem& p = call.problem;
  p.dtype = Dtype(dtype);
  std::tie(p.batch, p.heads, p.seqlen, p.seqlen_k, p.head_dim) =
      std::tie(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]);
  call.kernels = p.dtype == Dtype::kBFloat16 && set.bfloat16 ? set.bfloat16 : set.float32;
  call.parameters.norm = Norm(norm);
  p.heads_out = p.heads;
  call.parameters.heads = call.parameters.heads_out = int(p.heads);
  call.parameters.centre = 1.0f / float(p.seqlen_k);
  call.parameters.unit_scale = 1.0f;
  return call;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Re-attention on CPUs. A tensor is (address, strides in elements); what is absent has address 0.";
  watch_forks();
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::tuple<std::string, bool, bool>> sets;
        for (const InstructionSet& set : instruction_sets()) sets.emplace_back(set.name, set.runs_here, set.pays);
        return sets;
      },
      "(name, whether this CPU runs it, whether it is taken unless named) of each that was built, the best last.");
  m.def("use_openmp_of", &use_openmp_of, "Takes threads from the OpenMP runtime of a loaded library; whether it can.");
  m.def("uses_openmp", &uses_openmp);
  m.def("set_whole_bytes", &set_whole_bytes,
        "What a block with all keys may take of the caches, for tests; returns what it was.");
  m.def("empty_cache", &empty_cache, "Frees the memory that calls leave for each other.");

  py::class_<Call> call(m, "Call", "A call by its parts: see reattn.backends.contract and csrc/cpu/driver.h.");
  call.def(py::init(&make_call), py::arg("isa"), py::arg("threads"), py::arg("dtype"), py::arg("norm"),
           py::arg("sizes"));
  tensor(call, "query", &Problem::query);
  tensor(call, "key", &Problem::key);
  tensor(call, "value", &Problem::value);
  tensor(call, "out", &Problem::out);
  tensor(call, "grad", &Problem::grad);
  tensor(call, "grad_query", &Problem::grad_query);
  tensor(call, "grad_key", &Problem::grad_key);
  tensor(call, "grad_value", &Problem::grad_value);
  call.def_property("attn_mask", nullptr, [](Call& call, const MaskArgument& argument) {
    const auto& [is_float, address, sizes, strides] = argument;
    MaskTensor& mask = call.problem.mask;
    mask.kind = is_float ? MaskKind::kFloat : MaskKind::kBool;
    mask.tensor.data = reinterpret_cast<void*>(address);
    int64_t* to[] = {&mask.tensor.batch, &mask.tensor.head, &mask.tensor.row, &mask.tensor.dim};
    for (size_t dim = 0; dim < 4; dim++) {
      mask.sizes[dim] = sizes[dim];
      *to[dim] = sizes[dim] > 1 ? strides[dim] : 0;
    }
  });
  call.def_property(
      "heads_out", [](const Call& call) { return call.problem.heads_out; },
      [](Call& call, int heads) { call.problem.heads_out = call.parameters.heads_out = heads; });
#define REATTN_NUMBER(name, field)                       \
  call.def_property(                                     \
      name, [](const Call& call) { return call.field; }, \
      [](Call& call, decltype(std::declval<Call>().field) value) { call.field = value; })
  REATTN_NUMBER("scale", problem.scale);
  REATTN_NUMBER("dropout_p", problem.dropout_p);
  REATTN_NUMBER("is_causal", problem.mask.causal);
  REATTN_NUMBER("value_rows", problem.value_rows);
  REATTN_NUMBER("eps", parameters.eps);
  REATTN_NUMBER("output_scale", parameters.output_scale);
  REATTN_NUMBER("training", parameters.training);
  REATTN_NUMBER("unit_scale", parameters.unit_scale);
  REATTN_NUMBER("synchronised", synchronised);
  REATTN_NUMBER("momentum", parameters.momentum);
#undef REATTN_NUMBER
#define REATTN_ADDRESS(name, field) address(call, name, [](Call& call) -> auto& { return call.field; })
  REATTN_ADDRESS("seed", problem.seed);
  REATTN_ADDRESS("lse", problem.lse);
  REATTN_ADDRESS("value_sum", problem.value_sum);
  REATTN_ADDRESS("grad_mask", problem.mask.grad);
  REATTN_ADDRESS("theta", parameters.theta);
  REATTN_ADDRESS("pre_theta", pre_theta);
  REATTN_ADDRESS("bias", parameters.bias);
  REATTN_ADDRESS("norm_weight", parameters.norm_weight);
  REATTN_ADDRESS("norm_bias", parameters.norm_bias);
  REATTN_ADDRESS("running_mean", parameters.running_mean);
  REATTN_ADDRESS("running_var", parameters.running_var);
  REATTN_ADDRESS("num_batches_tracked", parameters.num_batches_tracked);
  REATTN_ADDRESS("statistics", parameters.statistics);
  REATTN_ADDRESS("grad_sums", parameters.grad_sums);
  REATTN_ADDRESS("grad_theta", grad_theta);
  REATTN_ADDRESS("grad_pre_theta", grad_pre_theta);
  REATTN_ADDRESS("grad_bias", grad_bias);
  REATTN_ADDRESS("grad_norm_weight", grad_norm_weight);
  REATTN_ADDRESS("grad_norm_bias", grad_norm_bias);
#undef REATTN_ADDRESS
  const py::call_guard<py::gil_scoped_release> without_gil;
  m.def("forward", &run_forward, without_gil);
  m.def("finish", &run_finish, without_gil);
  m.def("grad_sums", &run_grad_sums, without_gil);
  m.def("backward", &run_backward, without_gil);
}
