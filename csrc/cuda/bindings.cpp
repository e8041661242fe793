// The extension module reattn._cuda: a struct of addresses, sizes and strides in, nothing of torch's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "launch.h"
#include "plan.h"

namespace py = pybind11;
using namespace reattn;

namespace {

using Address = uintptr_t;
// (address, (stride of batch, head, row))
using TensorArgument = std::tuple<Address, std::array<int64_t, 3>>;

// A call by its parts, of which each launch uses some: see reattn.backends.contract and params.h.
struct Call {
  int dtype, batch;
  uint64_t stream;
  Params p;
  std::vector<std::pair<const void*, int64_t>> memory;  // that the kernels may touch
};

constexpr int kElementBytes[] = {4, 2, 2};  // float32, bfloat16, float16

// sizes: batch, heads, seqlen, seqlen_k, head_dim, and the columns of inputs that may be read.
Call make_call(uint64_t stream, int dtype, int norm, const std::array<int, 6>& sizes) {
  Call call{};
  call.stream = stream, call.dtype = dtype, call.batch = sizes[0];
  Params& p = call.p;
  p.heads = sizes[1], p.query.rows = sizes[2], p.key.rows = sizes[3], p.head_dim = sizes[4], p.depth = sizes[5];
  p.keep_scale = 1;
  p.inverse_heads = 1.0f / float(p.heads);
  p.splits = 1;
  p.positions = double(sizes[0]) * sizes[2] * sizes[3];
  p.fold.p.norm = Norm(norm);
  p.fold.p.heads = p.heads;
  p.fold.p.unit_scale = 1;
  return call;
}

template <class Class>
void tensor(Class& type, const char* name, Tensor Params::* field, bool of_queries, bool padded) {
  type.def_property(name, nullptr, [=](Call& call, const TensorArgument& argument) {
    const auto& [address, strides] = argument;
    const int rows = of_queries ? call.p.query.rows : call.p.key.rows;
    void* data = reinterpret_cast<void*>(address);
    call.p.*field = {data, strides[0], strides[1], strides[2], rows};
    const int64_t last = (call.batch - 1) * strides[0] + (call.p.heads - 1) * strides[1] + (rows - 1) * strides[2];
    call.memory.emplace_back(data, (last + (padded ? call.p.depth : call.p.head_dim)) * kElementBytes[call.dtype]);
  });
}

// A field that is set from an address, 0 for none, and how many elements lie there.
template <class Class, class Get>
void address(Class& type, const char* name, Get get) {
  type.def_property(name, nullptr, [get](Call& call, const std::tuple<Address, int64_t>& argument) {
    auto& field = get(call);
    field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(std::get<0>(argument));
    if (field) call.memory.emplace_back(field, std::get<1>(argument) * int64_t(sizeof *field));
  });
}

// A kernel for the call's dtype, on the current device.
void run(void (*const (&kernels)[3])(const Params&, const Launch&), const Call& call, const Params& p, int64_t blocks,
         int chunks = 1) {
  for (const auto& [begin, bytes] : call.memory) declare(begin, bytes);
  kernels[call.dtype](p, {blocks, chunks, call.stream});
}

#define REATTN_KERNELS(name) {name<float>, name<BFloat16>, name<Half>}

// A sweep: a block for each block of rows of the plan, and for each of the output's chunks of columns.
void run_sweep(void (*const (&kernels)[3])(const Params&, const Launch&), const Call& call, const Plan& plan,
               bool backward, int columns) {
  Params p = call.p;
  p.plan = plan;
  p.fold.backward = backward;
  p.blocks = int64_t(call.batch) * plan.blocks;
  run(kernels, call, p, p.blocks, (p.head_dim + columns - 1) / columns);
}

void run_forward(const Call& call, const Plan& plan) {
  run_sweep(REATTN_KERNELS(forward), call, plan, false, out_dims(padded_heads(call.p.heads)));
}
void run_backward_query(const Call& call, const Plan& plan) {
  run_sweep(REATTN_KERNELS(backward_query), call, plan, true, out_dims(padded_heads(call.p.heads)));
}
void run_backward_key(const Call& call, const Plan& plan) {
  run_sweep(REATTN_KERNELS(backward_key), call, plan, true, key_dims(padded_heads(call.p.heads)));
}

// Kernels over sums that `blocks` blocks left. splits: blocks that share the rows of a sample and head.
Params sums_params(const Call& call, bool backward, int64_t blocks, int splits = 1) {
  Params p = call.p;
  p.plan.warps = kSumThreads / 32;
  p.plan.bytes = 2 * kSumThreads * 8;
  p.fold.backward = backward;
  p.blocks = blocks;
  p.splits = splits;
  p.rescaling_blocks = int64_t(call.batch) * p.heads * splits;
  return p;
}

void run_add_up(const Call& call, bool backward, int64_t blocks) {
  run(REATTN_KERNELS(add_up), call, sums_params(call, backward, blocks), call.p.heads);
}
void run_finish(const Call& call, int64_t blocks, int splits) {
  const Params p = sums_params(call, false, blocks, splits);
  run(REATTN_KERNELS(finish), call, p, p.rescaling_blocks + 1);
}
void run_grad_sums(const Call& call, int splits) {
  const Params p = sums_params(call, true, int64_t(call.batch) * splits, splits);
  run(REATTN_KERNELS(grad_sums), call, p, p.rescaling_blocks);
}
void run_unfold(const Call& call, int64_t blocks) {
  run(REATTN_KERNELS(unfold), call, sums_params(call, true, blocks), call.p.heads + 1);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "Re-attention on NVIDIA GPUs. A tensor is (address, strides in elements of batch, head and row), its columns"
      " contiguous; other memory is (address, elements); what is absent has address 0.";
#ifdef REATTN_EMULATED
  m.attr("EMULATED") = true;
  m.def("set_launcher", &set_launcher);
#else
  m.attr("EMULATED") = false;
  m.def("cuda_versions", &cuda_versions, "(of the driver, 0 without one; of the runtime within), 13000 for CUDA 13.0");
#endif
  py::class_<Plan>(m, "Plan", "How a kernel cuts a problem; see csrc/cuda/params.h.")
      .def_readonly("own", &Plan::own)
      .def_readonly("blocks", &Plan::blocks)
      .def_readonly("tile", &Plan::tile)
      .def_readonly("resident", &Plan::resident)
      .def_readonly("warps", &Plan::warps)
      .def_readonly("stages", &Plan::stages)
      .def_readonly("bytes", &Plan::bytes);

  py::class_<Call> call(m, "Call", "A call by its parts: see reattn.backends.contract and csrc/cuda/params.h.");
  call.def(py::init(&make_call), py::arg("stream"), py::arg("dtype"), py::arg("norm"), py::arg("sizes"));
  tensor(call, "query", &Params::query, true, true);
  tensor(call, "key", &Params::key, false, true);
  tensor(call, "value", &Params::value, false, true);
  tensor(call, "grad", &Params::grad, true, true);
  tensor(call, "out", &Params::out, true, false);
  tensor(call, "grad_query", &Params::grad_query, true, false);
  tensor(call, "grad_key", &Params::grad_key, false, false);
  tensor(call, "grad_value", &Params::grad_value, false, false);
#define REATTN_NUMBER(name, field) \
  call.def_property(name, nullptr, [](Call& call, decltype(std::declval<Call>().field) value) { call.field = value; })
  REATTN_NUMBER("training", p.fold.p.training);
  REATTN_NUMBER("output_scale", p.fold.p.output_scale);
  REATTN_NUMBER("eps", p.fold.p.eps);
  REATTN_NUMBER("momentum", p.fold.p.momentum);
  REATTN_NUMBER("unit_scale", p.fold.p.unit_scale);
  REATTN_NUMBER("synchronised", p.synchronised);
#undef REATTN_NUMBER
  call.def_property("scale", nullptr, [](Call& call, double scale) {
    call.p.scale = float(scale);
    call.p.scale_log2 = float(scale * 1.4426950408889634);
  });
  call.def_property("dropout_p", nullptr, [](Call& call, double dropout_p) {
    call.p.keep_scale = float(1 / (1 - dropout_p));
    call.p.drop_below = uint32_t(dropout_p * 4294967295.0);
  });
  call.def_property("centre", nullptr, [](Call& call, float centre) {
    call.p.centre = call.p.fold.p.centre = call.p.fold.p.taken = centre;
  });
#define REATTN_ADDRESS(name, field) address(call, name, [](Call& call) -> auto& { return call.field; })
  REATTN_ADDRESS("seed", p.seed);
  REATTN_ADDRESS("lse", p.lse);
  REATTN_ADDRESS("delta", p.delta);
  REATTN_ADDRESS("value_sum", p.value_sum);
  REATTN_ADDRESS("vectors", p.vectors);
  REATTN_ADDRESS("products", p.products);
  REATTN_ADDRESS("theta", p.fold.p.theta);
  REATTN_ADDRESS("bias", p.fold.p.bias);
  REATTN_ADDRESS("norm_weight", p.fold.p.norm_weight);
  REATTN_ADDRESS("norm_bias", p.fold.p.norm_bias);
  REATTN_ADDRESS("running_mean", p.fold.p.running_mean);
  REATTN_ADDRESS("running_var", p.fold.p.running_var);
  REATTN_ADDRESS("num_batches_tracked", p.fold.p.num_batches_tracked);
  REATTN_ADDRESS("statistics", p.fold.p.statistics);
  REATTN_ADDRESS("final_statistics", p.final_statistics);
  REATTN_ADDRESS("grad_sums", p.fold.p.grad_sums);
  REATTN_ADDRESS("grad_theta", p.grad_theta);
  REATTN_ADDRESS("grad_bias", p.grad_bias);
  REATTN_ADDRESS("grad_norm_weight", p.grad_norm_weight);
  REATTN_ADDRESS("grad_norm_bias", p.grad_norm_bias);
#undef REATTN_ADDRESS

  py::enum_<Kernel>(m, "Kernel")
      .value("forward", Kernel::kForward)
      .value("backward_query", Kernel::kBackwardQuery)
      .value("backward_key", Kernel::kBackwardKey);
  m.def(
      "make_plan",
      [](Kernel kernel, const std::array<int, 6>& sizes, bool dropout, bool statistics, int shared_bytes,
         int multiprocessors) {
        const Size size{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], dropout, statistics};
        return make_plan(kernel, size, shared_bytes, multiprocessors);
      },
      "The plan for a card with that much shared memory for a block; its bytes are 0 if none fits. Sizes: bytes of an"
      " element, heads, columns, batch, seqlen, seqlen_k.");
  m.def(
      "describe",
      [](int device) {
        const Device found = describe(device);
        return std::make_tuple(found.shared_bytes, found.multiprocessors);
      },
      "(bytes of shared memory that a block may have, multiprocessors)");
  m.def("padded_heads", &padded_heads);
  m.def("count_devices", &count_devices);
  m.def("check_device", &check_device<Half>,
        "Raises where the extension holds nothing that the current device can run.");
  const py::call_guard<py::gil_scoped_release> without_gil;
  m.def("forward", &run_forward, without_gil);
  m.def("add_up", &run_add_up, without_gil);
  m.def("finish", &run_finish, without_gil);
  m.def("grad_sums", &run_grad_sums, without_gil);
  m.def("backward_query", &run_backward_query, without_gil);
  m.def("backward_key", &run_backward_key, without_gil);
  m.def("unfold", &run_unfold, without_gil);
}
