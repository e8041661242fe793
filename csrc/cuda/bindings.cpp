// The extension module reattn._cuda: addresses, sizes and strides in, nothing of torch's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "kernels.h"
#include "launch.h"
#include "plan.h"

namespace py = pybind11;
using namespace reattn;

namespace {

using Address = uintptr_t;
// (address, (stride of batch, head, row))
using TensorArgument = std::tuple<Address, std::array<int64_t, 3>>;
// device, stream, dtype (0 float32, 1 bfloat16, 2 float16); batch, heads, seqlen, seqlen_k, head_dim, depth
struct Call {
  int device;
  uint64_t stream;
  int dtype;
  int batch, heads, seqlen, seqlen_k, head_dim, depth;

  int element_bytes() const { return dtype == 0 ? 4 : 2; }
};

template <class T>
T* pointer(Address address, int64_t count) {
  declare(reinterpret_cast<void*>(address), address ? count * int64_t(sizeof(T)) : 0);
  return reinterpret_cast<T*>(address);
}

// A tensor of which the first `columns` of every row may be touched.
Tensor tensor(const Call& call, const TensorArgument& argument, int rows, int columns) {
  const auto& [address, strides] = argument;
  void* data = reinterpret_cast<void*>(address);
  const int64_t last = (call.batch - 1) * strides[0] + (call.heads - 1) * strides[1] + (rows - 1) * strides[2];
  declare(data, (last + columns) * call.element_bytes());
  return {data, strides[0], strides[1], strides[2], rows};
}

Params params(const Call& call, const Plan& plan, Address seed, float scale, double dropout_p) {
  Params p{};
  p.seed = pointer<const int64_t>(seed, 1);
  p.scale = scale;
  p.scale_log2 = float(scale * 1.4426950408889634);
  p.keep_scale = float(1 / (1 - dropout_p));
  p.drop_below = uint32_t(dropout_p * 4294967295.0);
  p.heads = call.heads, p.head_dim = call.head_dim, p.depth = call.depth;
  p.inverse_heads = 1.0f / float(call.heads);
  p.plan = plan;
  return p;
}

// The kernel for the call's dtype, on its device, for as many blocks as the plan has; or that many.
void run(void (*const (&kernels)[3])(const Params&, const Launch&), const Call& call, const Params& p,
         int columns_of_a_block, int64_t blocks = 0) {
  const OnDevice device(call.device);
  const int chunks = (call.head_dim + columns_of_a_block - 1) / columns_of_a_block;
  kernels[call.dtype](p, {blocks ? blocks : int64_t(call.batch) * p.plan.blocks, chunks, call.stream});
}

#define REATTN_KERNELS(name) {name<float>, name<BFloat16>, name<Half>}

void set_mixing(Params& p, const std::array<Address, 6>& addresses) {
  const int64_t heads = p.heads;
  p.weight = pointer<const float>(addresses[0], heads * heads), p.shift = pointer<const float>(addresses[1], heads);
  p.gamma = pointer<const float>(addresses[2], heads), p.beta = pointer<const float>(addresses[3], heads);
  p.coupled = pointer<const float>(addresses[4], heads * heads);
  p.constant = pointer<const float>(addresses[5], heads);
}

void set_sums(Params& p, const Call& call, Address vectors, Address products) {
  const int64_t padded = padded_heads(p.heads), blocks = int64_t(call.batch) * p.plan.blocks;
  p.vectors = pointer<float>(vectors, blocks * 3 * padded);
  p.products = pointer<float>(products, blocks * padded * padded);
}

int64_t rows(const Call& call) { return int64_t(call.batch) * call.heads * call.seqlen; }

void run_statistics(const Plan& plan, const Call& call, const TensorArgument& query, const TensorArgument& key,
                    Address seed, float scale, double dropout_p, float centre, Address lse, Address vectors,
                    Address products) {
  Params p = params(call, plan, seed, scale, dropout_p);
  p.query = tensor(call, query, call.seqlen, call.depth), p.key = tensor(call, key, call.seqlen_k, call.depth);
  p.lse = pointer<float>(lse, rows(call)), p.centre = centre;
  set_sums(p, call, vectors, products);
  run(REATTN_KERNELS(statistics), call, p, call.head_dim);
}

void run_forward(const Plan& plan, const Call& call, const TensorArgument& query, const TensorArgument& key,
                 const TensorArgument& value, const TensorArgument& out, const std::array<Address, 6>& mixing,
                 Address seed, float scale, float eps, double dropout_p, float centre, Address lse, bool lse_known) {
  Params p = params(call, plan, seed, scale, dropout_p);
  p.query = tensor(call, query, call.seqlen, call.depth), p.key = tensor(call, key, call.seqlen_k, call.depth);
  p.value = tensor(call, value, call.seqlen_k, call.depth), p.out = tensor(call, out, call.seqlen, call.head_dim);
  p.lse = pointer<float>(lse, rows(call)), p.lse_known = lse_known, p.eps = eps, p.centre = centre;
  set_mixing(p, mixing);
  run(REATTN_KERNELS(forward), call, p, out_dims(padded_heads(call.heads)));
}

Params backward_params(const Plan& plan, const Call& call, const std::array<TensorArgument, 4>& inputs,
                       const std::array<Address, 6>& mixing, Address seed, float scale, float eps, double dropout_p,
                       float centre, Address lse, Address delta) {
  Params p = params(call, plan, seed, scale, dropout_p);
  p.grad = tensor(call, inputs[0], call.seqlen, call.depth), p.query = tensor(call, inputs[1], call.seqlen, call.depth);
  p.key = tensor(call, inputs[2], call.seqlen_k, call.depth);
  p.value = tensor(call, inputs[3], call.seqlen_k, call.depth);
  p.lse = pointer<float>(lse, rows(call)), p.delta = pointer<float>(delta, rows(call));
  p.eps = eps, p.centre = centre;
  set_mixing(p, mixing);
  return p;
}

void run_backward_query(const Plan& plan, const Call& call, const std::array<TensorArgument, 4>& inputs,
                        const std::array<Address, 6>& mixing, Address seed, float scale, float eps, double dropout_p,
                        float centre, Address lse, Address delta, const TensorArgument& grad_query, Address vectors,
                        Address products) {
  Params p = backward_params(plan, call, inputs, mixing, seed, scale, eps, dropout_p, centre, lse, delta);
  p.grad_query = tensor(call, grad_query, call.seqlen, call.head_dim);
  set_sums(p, call, vectors, products);
  run(REATTN_KERNELS(backward_query), call, p, out_dims(padded_heads(call.heads)));
}

void run_backward_key(const Plan& plan, const Call& call, const std::array<TensorArgument, 4>& inputs,
                      const std::array<Address, 6>& mixing, Address seed, float scale, float eps, double dropout_p,
                      float centre, Address lse, Address delta, const TensorArgument& grad_key,
                      const TensorArgument& grad_value) {
  Params p = backward_params(plan, call, inputs, mixing, seed, scale, eps, dropout_p, centre, lse, delta);
  p.grad_key = tensor(call, grad_key, call.seqlen_k, call.head_dim);
  p.grad_value = tensor(call, grad_value, call.seqlen_k, call.head_dim);
  run(REATTN_KERNELS(backward_key), call, p, key_dims(padded_heads(call.heads)));
}

// Partial sums go to (batch, slices, heads).
void run_grad_dot_out(const Call& call, const TensorArgument& grad, const TensorArgument& out, Address partial) {
  Plan plan{};
  plan.warps = 8, plan.bytes = plan.warps * 4;
  Params p = params(call, plan, 0, 1, 0);
  p.grad = tensor(call, grad, call.seqlen, call.head_dim), p.out = tensor(call, out, call.seqlen, call.head_dim);
  const int64_t blocks = int64_t(call.batch) * call.heads * ((call.seqlen + kSlice - 1) / kSlice);
  p.vectors = pointer<float>(partial, blocks);
  run(REATTN_KERNELS(grad_dot_out), call, p, call.head_dim, blocks);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "Re-attention on NVIDIA GPUs. A tensor is (address, strides in elements of batch, head and row), its columns"
      " contiguous; what is absent has address 0.";
#ifdef REATTN_EMULATED
  m.attr("EMULATED") = true;
#else
  m.attr("EMULATED") = false;
#endif
  m.attr("SLICE") = kSlice;
  py::class_<Plan>(m, "Plan", "How a kernel cuts a problem; see csrc/cuda/params.h.")
      .def_readonly("own", &Plan::own)
      .def_readonly("blocks", &Plan::blocks)
      .def_readonly("tile", &Plan::tile)
      .def_readonly("resident", &Plan::resident)
      .def_readonly("warps", &Plan::warps)
      .def_readonly("stages", &Plan::stages)
      .def_readonly("bytes", &Plan::bytes);
  py::class_<Call>(m, "Call").def(py::init([](int device, uint64_t stream, int dtype, const std::array<int, 6>& sizes) {
    return Call{device, stream, dtype, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  }));
  py::enum_<Kernel>(m, "Kernel")
      .value("statistics", Kernel::kStatistics)
      .value("forward", Kernel::kForward)
      .value("backward_query", Kernel::kBackwardQuery)
      .value("backward_key", Kernel::kBackwardKey);
  m.def(
      "make_plan",
      [](Kernel kernel, int element_bytes, int heads, int depth, int batch, int seqlen, int seqlen_k, bool dropout,
         int shared_bytes, int multiprocessors) {
        const Size size{element_bytes, heads, depth, batch, seqlen, seqlen_k, dropout};
        return make_plan(kernel, size, shared_bytes, multiprocessors);
      },
      "The plan for a card with that much shared memory for a block; its bytes are 0 if none fits.");
  m.def(
      "describe",
      [](int device) {
        const Device found = describe(device);
        return std::make_tuple(found.shared_bytes, found.multiprocessors);
      },
      "(bytes of shared memory that a block may have, multiprocessors)");
  m.def("padded_heads", &padded_heads);
  m.def("count_devices", &count_devices);
  m.def("check_device", &check_device<Half>, "Raises where the extension holds nothing that this device can run.");
  const py::call_guard<py::gil_scoped_release> without_gil;
  m.def("statistics", &run_statistics, without_gil);
  m.def("forward", &run_forward, without_gil);
  m.def("backward_query", &run_backward_query, without_gil);
  m.def("backward_key", &run_backward_key, without_gil);
  m.def("grad_dot_out", &run_grad_dot_out, without_gil);
}
