"""The CUDA C++ backend: hands a call to the extension of csrc/cuda, tensors as addresses and strides."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from reattn.backends import common
from reattn.backends.common import as_float32, on_its_device
from reattn.backends.contract import Gradients, Inputs, Maps, Outputs
from reattn.problem import Problem

try:
    import reattn._cuda as _cuda

    # The host part alone, whose launches tests execute without a GPU.
    EMULATED = _cuda.EMULATED
    _import_error = ""
except ImportError as error:
    EMULATED = False
    _import_error = common.why_not_imported("reattn._cuda", error)

DEVICE = "cuda"
MIN_CAPABILITY = (7, 5)


def unavailable(device: torch.device) -> list[str]:
    """See :class:`reattn.backends.contract.Backend`."""
    if _import_error:
        return [_import_error]
    if device.type == "cuda":
        return _card_faults(_index(device))
    if EMULATED and device.type == "cpu":
        return []
    return [f"needs a CUDA tensor, got {device.type}"]


def not_supported(problem: Problem) -> list[str]:
    """See :class:`reattn.backends.contract.Backend`."""
    reasons = unavailable(problem.device) + common.beyond_limits(problem)
    return reasons or _too_large(_index(problem.device), problem.dtype.itemsize, problem.heads, problem.head_dim)


def _index(device: torch.device) -> int:
    if device.index is None and device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.current_device()
    return device.index or 0


# torch.compile traces neither the extension nor what is cached, and what a card can do does not change.
@torch.compiler.assume_constant_result
def _card_faults(device: int) -> list[str]:
    """Why the extension has nothing to run there; whatever the problem."""
    return _find_card_faults(device)


@functools.cache
def _find_card_faults(device: int) -> list[str]:
    if torch.version.hip:
        return ["AMD GPUs are not supported"]
    try:
        if not _cuda.count_devices():
            return ["no CUDA device"]
    except RuntimeError as error:
        return [_no_driver(error)]
    try:
        capability = torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError) as error:
        return [f"torch sees no CUDA device ({error})"]
    version = ".".join(map(str, capability))
    if capability < MIN_CAPABILITY:
        return [f"needs compute capability 7.5 or higher, got {version}"]
    try:
        with torch.cuda.device(device):
            _cuda.check_device()
    except RuntimeError as error:
        return [f"was built without kernels for compute capability {version}: {error}"]
    return []


def _no_driver(error: RuntimeError) -> str:
    """What is missing where the runtime in the extension finds no driver that is new enough, else the error."""
    if "cudaErrorInsufficientDriver" not in str(error):
        return str(error)
    driver, runtime = _cuda.cuda_versions()
    has = f"the one installed is for CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "none is installed"
    # Drivers serve all of a major version.
    return f"no CUDA device: the extension needs an NVIDIA driver for CUDA {runtime // 1000} or newer, {has}"


@functools.cache
def _describe(device: int) -> tuple[int, int]:
    """Bytes of shared memory that a block may have; multiprocessors."""
    return _cuda.describe(device)


@torch.compiler.assume_constant_result
def _too_large(device: int, itemsize: int, heads: int, head_dim: int) -> list[str]:
    """A reason where some kernel's least tile does not fit the card's shared memory."""
    shared_bytes, multiprocessors = _describe(device)
    if _all_fit(itemsize, heads, _depth(head_dim, itemsize), shared_bytes, multiprocessors):
        return []
    return [
        f"needs more shared memory than the {shared_bytes // 1024} KB that a block has on this card, for {heads} heads"
        f" of head_dim {head_dim} and {itemsize} bytes an element"
    ]


@functools.lru_cache(4096)
def _all_fit(itemsize: int, heads: int, depth: int, shared_bytes: int, multiprocessors: int) -> bool:
    sizes = (itemsize, heads, depth, 1, 1 << 20, 1 << 20)
    kernels = _cuda.Kernel.__members__.values()
    return all(_cuda.make_plan(kernel, sizes, True, True, shared_bytes, multiprocessors).bytes for kernel in kernels)


@on_its_device
def forward(problem: Problem, inputs: Inputs) -> Outputs:
    """See :class:`reattn.backends.contract.FusedBackend`."""
    outputs = common.empty_outputs(problem, inputs.query)
    finishes = problem.batch_statistics and not problem.synchronised
    if not inputs.query.numel():
        outputs.statistics.zero_(), outputs.value_sum.zero_()
        return outputs._replace(statistics=finish(problem, inputs, outputs)) if finishes else outputs
    query, scale, _ = _positive_scale(inputs.query, problem.scale)
    inputs = inputs._replace(query=_aligned(query), key=_aligned(inputs.key), value=_aligned(inputs.value))
    call, kept = _call(problem, inputs, outputs)
    call.scale, call.out = scale, _strided(outputs.out)
    plan = _plan("forward", problem, inputs)
    if not problem.batch_statistics:
        _cuda.forward(call, plan)
        return outputs
    blocks = inputs.query.shape[0] * plan.blocks
    vectors = query.new_empty(2 * problem.heads, blocks, dtype=torch.float32)
    call.vectors = _memory(vectors)
    _cuda.forward(call, plan)
    if problem.synchronised:
        call.statistics = _memory(outputs.statistics)
        _cuda.add_up(call, False, blocks)
    else:
        _finish(problem, call, inputs, outputs, outputs.statistics, blocks)
    return outputs


@on_its_device
def finish(problem: Problem, inputs: Inputs, unfinished: Outputs) -> Tensor:
    """See :class:`reattn.backends.contract.FusedBackend`."""
    inputs = inputs._replace(value=_aligned(inputs.value))
    final = torch.empty_like(unfinished.statistics)
    call, kept = _call(problem, inputs, unfinished, depth=inputs.value.shape[3])
    call.out, call.synchronised, call.statistics = _strided(unfinished.out), True, _memory(unfinished.statistics)
    _finish(problem, call, inputs, unfinished, final, 0)
    return final


def _finish(problem: Problem, call: Any, inputs: Inputs, outputs: Outputs, final: Tensor, blocks: int) -> None:
    """The output from what the sweep left, and the running statistics; ``blocks`` blocks left sums."""
    running = (as_float32(inputs.running_mean), as_float32(inputs.running_var))
    call.running_mean, call.running_var = map(_memory, running)
    call.num_batches_tracked = _memory(inputs.num_batches_tracked)
    call.momentum = -1.0 if problem.momentum is None else problem.momentum
    call.final_statistics, call.value_sum = _memory(final), _memory(outputs.value_sum)
    _cuda.finish(call, blocks, _splits(inputs.query))
    common.store_running(inputs, running)


@on_its_device
def grad_sums(problem: Problem, grad: Tensor, outputs: Outputs) -> Tensor:
    """See :class:`reattn.backends.contract.FusedBackend`."""
    batch, heads, seqlen, _ = grad.shape
    sums = grad.new_zeros(2, heads, dtype=torch.float64)
    if not grad.numel():
        return sums
    grad, splits = _aligned(grad), _splits(grad)
    sizes = (batch, heads, seqlen, 1, problem.head_dim, grad.shape[3])
    call = _sized_call(problem, grad, sizes)
    vectors = grad.new_empty(2 * heads, batch * splits, dtype=torch.float32)
    call.grad, call.out, call.value_sum = _strided(grad), _strided(outputs.out), _memory(outputs.value_sum)
    call.vectors, call.grad_sums = _memory(vectors), _memory(sums)
    _cuda.grad_sums(call, splits)
    _cuda.add_up(call, True, batch * splits)
    return sums


@on_its_device
def backward(
    problem: Problem,
    grad: Tensor,
    inputs: Inputs,
    outputs: Outputs,
    sums: Tensor | None,
    into: Maps | None = None,
) -> Gradients:
    """See :class:`reattn.backends.contract.FusedBackend`."""
    given, gradients = inputs, common.empty_gradients(inputs, into)
    if not inputs.query.numel():
        return common.as_inputs(common.zeroed(gradients), given)
    grad = _aligned(grad)
    if problem.batch_statistics and sums is None:
        sums = grad_sums(problem, grad, outputs)
    query, scale, sign = _positive_scale(inputs.query, problem.scale)
    inputs = inputs._replace(query=_aligned(query), key=_aligned(inputs.key), value=_aligned(inputs.value))
    lse = outputs.lse.contiguous()
    delta = torch.empty_like(lse)
    call, kept = _call(problem, inputs, outputs._replace(lse=lse))
    call.scale, call.grad, call.delta = scale, _strided(grad), _memory(delta)
    if problem.batch_statistics:
        call.statistics, call.grad_sums = _memory(outputs.statistics), _memory(sums)
    call.grad_query, call.grad_key, call.grad_value = map(_strided, gradients[:3])
    call.grad_theta = _memory(gradients.theta)
    for name in ("bias", "norm_weight", "norm_bias"):
        if getattr(inputs, name) is not None:
            setattr(call, f"grad_{name}", _memory(getattr(gradients, name)))
    plan = _plan("backward_query", problem, inputs)
    blocks, padded = query.shape[0] * plan.blocks, _cuda.padded_heads(problem.heads)
    vectors = query.new_empty(blocks, 3, padded, dtype=torch.float32)
    products = query.new_empty(blocks, padded, padded, dtype=torch.float32)
    call.vectors, call.products = _memory(vectors), _memory(products)
    _cuda.backward_query(call, plan)
    _cuda.backward_key(call, _plan("backward_key", problem, inputs))
    _cuda.unfold(call, blocks)
    if sign != 1:
        gradients.query.mul_(sign)
    return common.as_inputs(gradients, given)


def _positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """The same scores from a scale above zero, where the largest product gives the largest score; and what the gradient
    of the query is to be multiplied by."""
    if abs(scale) < _SMALLEST_SCALE:
        return query * 0, 1.0, 0.0
    return (-query, -scale, -1.0) if scale < 0 else (query, scale, 1.0)


# Below it, float32 holds no number with its digits.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@functools.lru_cache(4096)
def _rounded(number: float, dtype: torch.dtype) -> float:
    return torch.tensor(number, dtype=dtype, device="cpu").item()


def _centre(key: Tensor) -> float:
    """What is taken from the maps before they are rounded: as the maps' dtype holds it, so that of a P that is zero
    exactly zero is left when it is added again."""
    return _rounded(1 / key.shape[2], key.dtype)


def _depth(head_dim: int, itemsize: int) -> int:
    """head_dim, or with zeros up to a multiple of 16 bytes."""
    vector = 16 // itemsize
    return -(-head_dim // vector) * vector


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where its rows can be read 16 bytes at a time; else a copy, with zeros up to a multiple of 16 bytes.

    Rows are read many times: one copy costs less than reading head_dim 33 element by element.
    """
    batch, heads, seqlen, head_dim = tensor.shape
    *strides, dim_stride = tensor.stride()
    vector = 16 // tensor.element_size()
    rows_fit = head_dim % vector == 0 and dim_stride == 1 and not any(s % vector for s in strides)
    if rows_fit and tensor.data_ptr() % 16 == 0:
        return tensor
    padded = tensor.new_zeros(batch, seqlen, heads, _depth(head_dim, tensor.element_size())).transpose(1, 2)
    padded[..., :head_dim] = tensor
    return padded


def _plan(kernel: str, problem: Problem, inputs: Inputs) -> Any:
    batch, heads, seqlen, depth = inputs.query.shape
    sizes = (inputs.query.element_size(), heads, depth, batch, seqlen, inputs.key.shape[2])
    flags = (problem.dropout_p > 0, problem.batch_statistics)
    return _make_plan(kernel, sizes, flags, *_describe(_index(inputs.query.device)))


@functools.lru_cache(4096)
def _make_plan(
    kernel: str, sizes: tuple[int, ...], flags: tuple[bool, bool], shared_bytes: int, multiprocessors: int
) -> Any:
    return _cuda.make_plan(getattr(_cuda.Kernel, kernel), sizes, *flags, shared_bytes, multiprocessors)


def _splits(query: Tensor) -> int:
    return common.splits(query, _describe(_index(query.device))[1])


def _sized_call(problem: Problem, query: Tensor, sizes: tuple[int, ...]) -> Any:
    """A call with nothing but stream, dtype, norm and sizes."""
    stream = torch.cuda.current_stream(query.device).cuda_stream if query.is_cuda else 0
    dtype, norm = common.DTYPES.index(query.dtype), common.NORMS.index(problem.norm)
    return _cuda.Call(stream, dtype, norm, sizes)


def _call(
    problem: Problem, inputs: Inputs, outputs: Outputs, depth: int | None = None
) -> tuple[Any, tuple[Tensor | None, ...]]:
    """A call with what both directions need, and what has to live until it is launched."""
    batch, heads, seqlen, _ = inputs.query.shape
    sizes = (batch, heads, seqlen, inputs.key.shape[2], problem.head_dim, depth or inputs.query.shape[3])
    call = _sized_call(problem, inputs.query, sizes)
    call.query, call.key, call.value = map(_strided, inputs[:3])
    call.eps, call.output_scale, call.centre = problem.eps, problem.output_scale, _centre(inputs.key)
    kept = [as_float32(tensor) for tensor in inputs[3:7]]
    call.theta, call.bias, call.norm_weight, call.norm_bias = map(_memory, kept)
    call.lse = _memory(outputs.lse)
    if inputs.seed is not None:
        call.dropout_p, call.seed = problem.dropout_p, _memory(inputs.seed)
    if problem.batch_statistics:
        call.training, call.unit_scale = True, common.unit_scale(problem, inputs.key)
    elif problem.norm == "batch":
        running = [as_float32(inputs.running_mean), as_float32(inputs.running_var)]
        call.running_mean, call.running_var = map(_memory, running)
        kept += running
    return call, tuple(kept)


def _strided(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()[:3]


def _memory(tensor: Tensor | None) -> tuple[int, int]:
    """Address and elements of a contiguous tensor; 0 for none."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.numel())
