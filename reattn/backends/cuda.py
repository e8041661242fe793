"""The CUDA C++ backend: launches the kernels of csrc/cuda, tensors as addresses and strides."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reattn.backends import common, cuda_driver, cuda_plan
from reattn.backends.common import address, as_float32, on_its_device
from reattn.backends.contract import Gradients, Inputs, Maps, Outputs
from reattn.backends.cuda_compile import Constants, Kernel
from reattn.backends.cuda_driver import Loaded
from reattn.backends.cuda_plan import BackwardCut, MaskTensor, Params, Plan, ProductPlan, Size
from reattn.problem import Problem

# Set where the emulator executes launches, on CPU tensors: tests do without a GPU.
EMULATED = False

DEVICE = "cuda"
MIN_CAPABILITY = (7, 5)
_ELEMENTS = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Half"}


def unavailable(device: torch.device) -> list[str]:
    """See :class:`reattn.backends.contract.Backend`."""
    if device.type == "cuda":
        return _card_faults(_index(device))
    if EMULATED and device.type == "cpu":
        return []
    return [f"needs a CUDA tensor, got {device.type}"]


def not_supported(problem: Problem) -> list[str]:
    """See :class:`reattn.backends.contract.Backend`."""
    reasons = unavailable(problem.device) + common.beyond_limits(problem)
    if problem.heads_out not in (None, problem.heads):
        reasons.append(f"takes as many heads after mixing as before, got {problem.heads} and {problem.heads_out}")
    return reasons or _too_large(_index(problem.device), problem.dtype.itemsize, problem.heads, problem.head_dim)


def _index(device: torch.device) -> int:
    if device.index is None and device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.current_device()
    return device.index or 0


# torch.compile traces neither the driver nor what is cached, and what a card can do does not change.
@torch.compiler.assume_constant_result
def _card_faults(device: int) -> list[str]:
    """Why no kernel runs there; whatever the problem."""
    return _find_card_faults(device)


@functools.cache
def _find_card_faults(device: int) -> list[str]:
    if torch.version.hip:
        return ["AMD GPUs are not supported"]
    if faults := cuda_driver.find_faults(device):
        return faults
    if (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        return [f"needs compute capability 7.5 or higher, got {'.'.join(map(str, capability))}"]
    return []


def _describe(device: int) -> tuple[int, int]:
    """Bytes of shared memory that a block may have; multiprocessors."""
    return cuda_driver.describe(device)


@torch.compiler.assume_constant_result
def _too_large(device: int, itemsize: int, heads: int, head_dim: int) -> list[str]:
    """A reason where some kernel's least tile does not fit the card's shared memory."""
    return _find_too_large(device, itemsize, heads, head_dim)


@cuda_driver.remembered
def _find_too_large(device: int, itemsize: int, heads: int, head_dim: int) -> list[str]:
    shared_bytes, multiprocessors = _describe(device)
    size = Size(itemsize, heads, head_dim, 1, 1 << 20, 1 << 20, True, True, True)
    if all(cuda_plan.make_plan(kernel, size, shared_bytes, multiprocessors) for kernel in ("forward", "backward")):
        return []
    return [
        f"needs more shared memory than the {shared_bytes // 1024} KB that a block has on this card, for {heads} heads"
        f" of head_dim {head_dim} and {itemsize} bytes an element"
    ]


@on_its_device
def forward(problem: Problem, inputs: Inputs) -> Outputs:
    """See :class:`reattn.backends.contract.FusedBackend`."""
    outputs = common.empty_outputs(problem, inputs)
    finishes = problem.batch_statistics and not problem.synchronised
    if not inputs.query.numel():
        outputs.statistics.zero_(), outputs.value_sum.zero_()
        return outputs._replace(statistics=finish(problem, inputs, outputs)) if finishes else outputs
    given, inputs = inputs, _readable(problem, inputs)
    query = inputs.query
    mask = _mask_of(problem, inputs.attn_mask, outputs.value_sum) if problem.mask or problem.is_causal else _NO_MASK
    work = _forward_work(problem, query.shape, inputs.key.shape, tuple(map(Tensor.stride, inputs[:3])), mask)
    vectors, final = None, outputs.statistics
    params = _params(work.params, problem, inputs, outputs)
    params.out.data = outputs.out.data_ptr()
    if problem.batch_statistics:
        vectors = query.new_empty((2 + (mask is not _NO_MASK)) * problem.heads, params.blocks, dtype=torch.float32)
        params.vectors = vectors.data_ptr()
        if finishes and params.added_up:
            final = torch.empty_like(final)
        params.final_statistics = final.data_ptr()
    _launch(work.launches, query, params, (*inputs, *outputs, vectors, final))
    if not finishes:
        return outputs
    common.store_running(given, inputs[7:9])
    return outputs._replace(statistics=final)


@on_its_device
def finish(problem: Problem, inputs: Inputs, unfinished: Outputs) -> Tensor:
    """See :class:`reattn.backends.contract.FusedBackend`."""
    given, inputs = inputs, _readable(problem, inputs)
    final = torch.empty_like(unfinished.statistics)
    strides = tuple(map(Tensor.stride, (*inputs[:3], unfinished.out)))
    mask = _mask_of(problem, inputs.attn_mask, unfinished.value_sum) if problem.mask or problem.is_causal else _NO_MASK
    work = _finish_work(problem, inputs.query.shape, inputs.key.shape, strides, mask)
    params = _params(work.params, problem, inputs, unfinished)
    params.out.data, params.final_statistics = unfinished.out.data_ptr(), final.data_ptr()
    _launch(work.launches, inputs.query, params, (*inputs, *unfinished, final))
    common.store_running(given, inputs[7:9])
    return final


@on_its_device
def grad_sums(problem: Problem, grad: Tensor, outputs: Outputs) -> Tensor:
    """See :class:`reattn.backends.contract.FusedBackend`."""
    if not grad.numel():
        return grad.new_zeros(2, problem.heads, dtype=torch.float64)
    grad, out, value_sum = _aligned(grad), _aligned(outputs.out), outputs.value_sum
    mask = _mask_of(problem, None, value_sum) if problem.mask or problem.is_causal else _NO_MASK
    work = _grad_sums_work(problem, grad.shape, (grad.stride(), out.stride()), mask)
    params = Params.from_buffer_copy(work.params)
    sums = grad.new_empty(2, problem.heads, dtype=torch.float64)
    vectors = grad.new_empty(2 * problem.heads, params.blocks, dtype=torch.float32)
    params.grad.data, params.out.data, params.value_sum = grad.data_ptr(), out.data_ptr(), value_sum.data_ptr()
    params.vectors, params.fold.p.grad_sums = vectors.data_ptr(), sums.data_ptr()
    _launch(work.launches, grad, params, (grad, out, value_sum, vectors, sums))
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
    given, gradients = inputs, common.empty_gradients(problem, inputs, into)
    if not inputs.query.numel():
        return common.as_inputs(common.zeroed(gradients), given)
    grad, inputs = _aligned(grad), _readable(problem, inputs)
    if not outputs.lse.is_contiguous():
        outputs = outputs._replace(lse=outputs.lse.contiguous())
    query, strided, out = inputs.query, [*inputs[:3], grad, *gradients[:3]], None
    if problem.batch_statistics and sums is None:
        out = _aligned(outputs.out)
        strided.append(out)
    mask = _mask_of(problem, inputs.attn_mask, outputs.value_sum) if problem.mask or problem.is_causal else _NO_MASK
    work = _backward_work(problem, query.shape, inputs.key.shape, tuple(map(Tensor.stride, strided)), mask)
    params = _params(work.params, problem, inputs, outputs)
    params.grad.data = grad.data_ptr()
    params.grad_query.data, params.grad_key.data, params.grad_value.data = map(Tensor.data_ptr, gradients[:3])
    params.grad_theta = gradients.theta.data_ptr()
    # Of what is None there is no gradient.
    if inputs.bias is not None:
        params.grad_bias = gradients.bias.data_ptr()
    if inputs.norm_weight is not None:
        params.grad_norm_weight = gradients.norm_weight.data_ptr()
    if inputs.norm_bias is not None:
        params.grad_norm_bias = gradients.norm_bias.data_ptr()
    maps, numbers = query.new_empty(2 * work.cut.maps), query.new_empty(work.numbers, dtype=torch.float32)
    params.mixed, params.vectors = mixed, vectors = maps.data_ptr(), numbers.data_ptr()
    params.grad_scores = mixed + work.cut.maps * problem.dtype.itemsize
    if problem.mask_gradient:
        grad_scores = maps[work.cut.maps :]
    matrices, pre_matrices, key_sum, value_sum, grad_sums = work.offsets
    params.products, params.grad_key_sum = vectors + matrices, vectors + key_sum
    params.grad_value_sum = vectors + value_sum
    if problem.pre_mixed:
        params.pre_products, params.grad_pre_theta = vectors + pre_matrices, gradients.pre_theta.data_ptr()
    tensors = (grad, *inputs, *outputs, out, sums, *gradients, maps, numbers)
    stream = _stream(query)
    if sums is not None:
        params.fold.p.grad_sums = sums.data_ptr()
    elif out is not None:
        params.fold.p.grad_sums, params.out.data = vectors + grad_sums, out.data_ptr()
        # What these blocks leave lies in the same place as the sweep's, and is less.
        params.blocks, blocks = work.sum_blocks, params.blocks
        for launch in work.sums:
            cuda_driver.launch(*launch, stream, params, tensors)
        params.blocks = blocks
    for part, which, (sweep, *others) in work.parts:
        params.first_sample, _, params.first_row, params.rows_of_launch = part
        params.row_blocks_of_launch, params.first_rows, params.last_rows = which
        if problem.mask_gradient:
            grad_scores.zero_()  # where all is hidden from a block, nothing is written
        cuda_driver.launch(*sweep, stream, params, tensors)
        if problem.mask_gradient:
            common.add_mask_gradient(gradients.attn_mask, grad_scores, part, problem.heads, inputs.key.shape[2])
        for launch in others:
            cuda_driver.launch(*launch, stream, params, tensors)
    cuda_driver.launch(*work.unfold, stream, params, tensors)
    _, sign = _positive(problem.scale)
    if sign != 1:
        gradients.query.mul_(sign)
    return common.as_inputs(gradients, given)


class Mask(NamedTuple):
    """How keys are hidden, as kernels are compiled and launched for it. ``kind``: 1 of a boolean mask, 2 of one that is
    added; ``strides`` are 0 where it is broadcast; ``seen_by_row``: of the values that are seen there is a sum for each
    query."""

    kind: int = 0
    is_causal: bool = False
    strides: tuple[int, ...] = (0, 0, 0, 0)
    seen_by_row: bool = False

    @property
    def constants(self) -> Constants:
        """As csrc/cuda takes them; none where nothing is hidden."""
        if self == _NO_MASK:
            return ()
        _, by_head, by_row, by_key = self.strides
        flags = (by_head != 0, by_row != 0, by_key == 1, self.is_causal, self.seen_by_row)
        values = map(int, (self.kind, *flags))
        return tuple(zip(_MASK_MACROS, values, strict=True))


_MASK_MACROS = tuple(
    f"REATTN_{name}" for name in ("MASK", "MASK_BY_HEAD", "MASK_BY_ROW", "MASK_KEY_STRIDE", "CAUSAL", "SEEN_BY_ROW")
)
_NO_MASK = Mask()


def _mask_of(problem: Problem, attn_mask: Tensor | None, value_sum: Tensor) -> Mask:
    by_row = problem.batch_statistics and (problem.is_causal or value_sum.shape[2] > 1)
    if attn_mask is None:
        return Mask(0, problem.is_causal, seen_by_row=by_row)
    strides = (stride if size > 1 else 0 for size, stride in zip(attn_mask.shape, attn_mask.stride(), strict=True))
    return Mask(1 if problem.mask == "bool" else 2, problem.is_causal, tuple(strides), by_row)


# A kernel, its grid, and the threads and bytes of shared memory of a block.
Launch = tuple[Loaded, tuple[int, int], int, int]
Strides = tuple[tuple[int, ...], ...]


class Work(NamedTuple):
    """What is launched for all problems of one kind, shape and strides, one kernel after the other. ``params`` lack
    addresses alone, and are copied."""

    params: Params
    launches: tuple[Launch, ...]


class BackwardWork(NamedTuple):
    """``sums``: what is launched first, for those of this batch, which so many blocks take. ``parts``: each of
    ``cut.parts``, its blocks of rows of a sample, whether its rows are the first and the last of a sequence, and what
    is launched for it: the sweep, which leaves the gradients of the scores, and what makes others of them. A call has
    a workspace of so many ``numbers`` in float32: vectors, and ``offsets`` bytes after them matrices, those of the
    mixing before the softmax, two sums and, in float64, those of the batch."""

    params: Params
    cut: BackwardCut
    sums: tuple[Launch, ...]
    sum_blocks: int
    parts: tuple[tuple[common.Part, tuple[int, bool, bool], tuple[Launch, ...]], ...]
    unfold: Launch
    numbers: int
    offsets: tuple[int, int, int, int, int]


@cuda_driver.remembered
def _forward_work(problem: Problem, shape: torch.Size, key_shape: torch.Size, strides: Strides, mask: Mask) -> Work:
    batch, heads, seqlen, _ = shape
    size, device = _size(problem, shape, key_shape), _index(problem.device)
    out_row = heads * problem.head_dim
    out_stride = (seqlen * out_row, problem.head_dim, out_row, 1)
    params = _template(problem, shape, key_shape, strides, mask)
    params.out = _strided(out_stride, seqlen)
    plan = _plan("forward", size, *_describe(device))
    params.row_blocks_of_launch = batch * -(-seqlen // plan.rows)
    chunks = -(-problem.head_dim // cuda_plan.OUT_DIMS)
    params.blocks = params.row_blocks_of_launch
    # Of causal attention, whose groups of rows differ, whichever block is free takes the next.
    if plan.resident and not problem.is_causal:
        params.blocks = min(params.blocks, -(-cuda_plan.blocks_at_once(plan, *_describe(device)) // chunks))
    # Every block of finish adds up what the sweep's blocks left: many are added up once before.
    adds_up = problem.synchronised or params.blocks > _MANY_BLOCKS
    names = ["forward"]
    if problem.batch_statistics:
        names += ["add_up"] * adds_up + ["finish"] * (not problem.synchronised)
        params.added_up = adds_up
        params.splits = common.splits(shape, _describe(device)[1])
    specs = _specs(tuple(names), problem, mask, plan, _row_strides(*strides, out_stride))
    sweep, *sums = cuda_driver.kernels(specs, device)
    blocks = {"add_up": heads, "finish": _finish_blocks(shape, params)}
    grid = (params.blocks, chunks)
    launches = (_sum_launch(kernel, blocks[name]) for kernel, name in zip(sums, names[1:], strict=True))
    return Work(params, ((sweep, grid, 32 * plan.warps, plan.shared_bytes), *launches))


_MANY_BLOCKS = 2048


@cuda_driver.remembered
def _finish_work(problem: Problem, shape: torch.Size, key_shape: torch.Size, strides: Strides, mask: Mask) -> Work:
    device = _index(problem.device)
    params = _template(problem, shape, key_shape, strides[:3], mask)
    params.out, params.added_up = _strided(strides[3], shape[2]), True
    params.splits = common.splits(shape, _describe(device)[1])
    (kernel,) = cuda_driver.kernels(_specs(("finish",), problem, mask), device)
    return Work(params, (_sum_launch(kernel, _finish_blocks(shape, params)),))


@cuda_driver.remembered
def _grad_sums_work(problem: Problem, shape: torch.Size, strides: Strides, mask: Mask) -> Work:
    batch, heads, seqlen, _ = shape
    device = _index(problem.device)
    splits = common.splits(shape, _describe(device)[1])
    params = Params(blocks=batch * splits, splits=splits)
    params.grad, params.out = (_strided(stride, seqlen) for stride in strides)
    params.fold.backward = True
    by_block, add_up = cuda_driver.kernels(_specs(("grad_sums", "add_up"), problem, mask), device)
    return Work(params, (_sum_launch(by_block, batch * heads * splits), _sum_launch(add_up, heads)))


@cuda_driver.remembered
def _backward_work(
    problem: Problem, shape: torch.Size, key_shape: torch.Size, strides: Strides, mask: Mask
) -> BackwardWork:
    """``strides``: of query, key, value, grad and the gradients; and of the output, for sums of this batch."""
    batch, heads, seqlen, _ = shape
    size, device = _size(problem, shape, key_shape), _index(problem.device)
    shared_bytes, multiprocessors = _describe(device)
    plan, cut = _plan("backward", size, shared_bytes, multiprocessors), _cut(size, shared_bytes, multiprocessors)
    # All at once, should they not be compiled yet.
    names = ("backward", "products", "unfold", *(("unmix",) if problem.pre_mixed else ()))
    names += ("grad_sums", "add_up") if problem.batch_statistics else ()
    specs = _specs(names, problem, mask, plan, _row_strides(*strides[:4]), cut.products)
    sweep, products, unfold, *more = cuda_driver.kernels(specs, device)
    unmix = more[: problem.pre_mixed]
    params = _template(problem, shape, key_shape, strides[:3], mask)
    params.fold.backward, params.grad = True, _strided(strides[3], seqlen)
    rows = (seqlen, key_shape[2], key_shape[2])
    params.grad_query, params.grad_key, params.grad_value = map(_strided, strides[4:7], rows)
    sums: tuple[Launch, ...] = ()
    sum_blocks = 0
    if strides[7:]:
        of_sums, sums = _grad_sums_work(problem, shape, (strides[3], strides[7]), mask)
        params.out, params.splits, sum_blocks = of_sums.out, of_sums.splits, of_sums.blocks
    params.blocks = blocks = batch * -(-seqlen // plan.rows)
    row_block = 32 * plan.warps, plan.shared_bytes
    product_block = 32 * cut.products.warps, cut.products.shared_bytes
    parts = tuple(
        (
            part,
            (row_blocks := -(-part.rows // 16), part.first_row == 0, part.first_row + part.rows == seqlen),
            (
                *((kernel, (part.samples * row_blocks, 1), *row_block) for kernel in (sweep, *unmix)),
                (products, (cut.products.blocks, part.samples * heads), *product_block),
            ),
        )
        for part in cut.parts
    )
    padded = cuda_plan.padded_heads(heads)
    matrices = 3 * padded * blocks
    pre_matrices = matrices + padded * padded * blocks
    key_sum = pre_matrices + problem.pre_mixed * padded * padded * blocks
    value_sum = key_sum + cut.sums
    end = value_sum + cut.sums  # a multiple of 8 bytes
    offsets = (4 * matrices, 4 * pre_matrices, 4 * key_sum, 4 * value_sum, 4 * end)
    unfolds = _sum_launch(unfold, heads + 1 + problem.pre_mixed * heads)
    return BackwardWork(params, cut, sums, sum_blocks, parts, unfolds, end + 4 * heads, offsets)


def _finish_blocks(shape: torch.Size, params: Params) -> int:
    """One for the statistics, and those that share the rows of each sample and head."""
    return 1 + shape[0] * shape[1] * params.splits


def _sum_launch(kernel: Loaded, blocks: int) -> Launch:
    """Over what blocks left."""
    return kernel, (blocks, 1), cuda_plan.SUM_THREADS, cuda_plan.SUM_BYTES


def _launch(launches: tuple[Launch, ...], query: Tensor, params: Params, tensors: Sequence[Tensor | None]) -> None:
    stream = _stream(query)
    for launch in launches:
        cuda_driver.launch(*launch, stream, params, tensors)


def _positive(scale: float) -> tuple[float, float]:
    """A scale above zero, where the largest product gives the largest score; and what the query, and its gradient, are
    to be multiplied by for it."""
    if abs(scale) < _SMALLEST_SCALE:
        return 1.0, 0.0
    return (-scale, -1.0) if scale < 0 else (scale, 1.0)


# Below it, float32 holds no number with its digits.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@functools.lru_cache(4096)
def _rounded(number: float, dtype: torch.dtype) -> float:
    return torch.tensor(number, dtype=dtype, device="cpu").item()


def _depth(head_dim: int, itemsize: int) -> int:
    """head_dim, or with zeros up to a multiple of 16 bytes."""
    vector = 16 // itemsize
    return -(-head_dim // vector) * vector


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where its rows can be read 16 bytes at a time; else a copy, with zeros up to a multiple of 16 bytes.

    Rows are read many times: one copy costs less than reading head_dim 33 element by element.
    """
    batch, heads, seqlen, head_dim = tensor.shape
    batch_stride, head_stride, row_stride, dim_stride = tensor.stride()
    vector = 16 // tensor.element_size()  # a power of two: one test serves for all of them
    rows_fit = dim_stride == 1 and not (head_dim | batch_stride | head_stride | row_stride) & (vector - 1)
    if rows_fit and tensor.data_ptr() % 16 == 0:
        return tensor
    padded = tensor.new_zeros(batch, seqlen, heads, _depth(head_dim, tensor.element_size())).transpose(1, 2)
    padded[..., :head_dim] = tensor
    return padded


def _size(problem: Problem, shape: torch.Size, key_shape: torch.Size) -> Size:
    batch, heads, seqlen, _ = shape
    sizes = (problem.dtype.itemsize, heads, problem.head_dim, batch, seqlen, key_shape[2])
    return Size(*sizes, problem.batch_statistics, problem.dropout_p > 0, problem.masked)


@functools.lru_cache(4096)
def _plan(kernel: str, size: Size, shared_bytes: int, multiprocessors: int) -> Plan:
    plan = cuda_plan.make_plan(kernel, size, shared_bytes, multiprocessors)
    assert plan, "not_supported knows what does not fit"
    return plan


@functools.lru_cache(4096)
def _cut(size: Size, shared_bytes: int, multiprocessors: int) -> BackwardCut:
    return cuda_plan.cut_backward(size, shared_bytes, multiprocessors)


def _specs(
    names: tuple[str, ...],
    problem: Problem,
    mask: Mask,
    plan: Plan | None = None,
    row_strides: tuple[int, ...] = (),
    products: ProductPlan | None = None,
) -> tuple[Kernel, ...]:
    flags = (common.NORMS.index(problem.norm), problem.batch_statistics, problem.dropout_p > 0)
    shape = problem.dtype, problem.heads, problem.head_dim
    mixing: Constants = (("REATTN_PRE_MIXED", 1),) if problem.pre_mixed else ()
    return _kernels_of(names, *shape, flags, mask.constants + mixing, plan, row_strides, products)


@functools.lru_cache(4096)
def _kernels_of(
    names: tuple[str, ...],
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    flags: tuple[int, bool, bool],
    others: Constants,
    plan: Plan | None,
    row_strides: tuple[int, ...],
    products: ProductPlan | None,
) -> tuple[Kernel, ...]:
    """What is compiled for a problem of this shape."""
    shape: Constants = (
        ("REATTN_ELEMENT", _ELEMENTS[dtype]),
        ("REATTN_HEADS", heads),
        ("REATTN_HEAD_DIM", head_dim),
        *others,
    )
    of_norm = zip(("REATTN_NORM", "REATTN_TRAINING", "REATTN_DROPOUT"), map(int, flags), strict=True)
    # A stride that grows with the batch would be another kernel each time.
    known = (stride if stride <= 4 * heads * head_dim else 0 for stride in row_strides)
    strides = zip((f"REATTN_{name}_ROW_STRIDE" for name in ("QUERY", "KEY", "VALUE", "OUT")), known, strict=False)
    sweep: Constants = (*shape, *of_norm, *(plan.constants if plan else ()), *strides)
    constants: dict[str, Constants] = {"forward": sweep, "backward": sweep, "unmix": sweep}
    if products:
        constants["products"] = (*shape, *products.constants)
    # The others are in one source.
    files = {"forward": "forward", "backward": "backward", "unmix": "backward", "products": "products"}
    return tuple(Kernel(files.get(name, "sums"), f"reattn::{name}", constants.get(name, shape)) for name in names)


def _row_strides(*strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(row_stride for _, _, row_stride, _ in strides)


def _stream(query: Tensor) -> int:
    # As Triton and torch's compiler ask for it: an object that stands for it takes forty times as long.
    return torch._C._cuda_getCurrentRawStream(query.get_device()) if query.is_cuda else 0


def _readable(problem: Problem, inputs: Inputs) -> Inputs:
    """What kernels read, as they read it."""
    query, key, value, theta, bias, norm_weight, norm_bias, mean, var, count, seed, attn_mask, pre_theta = inputs
    _, sign = _positive(problem.scale)
    if sign != 1:
        query = query * sign
    if problem.norm == "batch":
        mean, var = as_float32(mean), as_float32(var)
    maps = _aligned(query), _aligned(key), _aligned(value)
    parameters = as_float32(theta), as_float32(bias), as_float32(norm_weight), as_float32(norm_bias)
    pre_theta = None if pre_theta is None else as_float32(pre_theta)
    return Inputs(*maps, *parameters, mean, var, count, seed, attn_mask, pre_theta)  # type: ignore[arg-type]


def _template(problem: Problem, shape: torch.Size, key_shape: torch.Size, strides: Strides, mask: Mask) -> Params:
    """What both directions need, but for addresses; ``strides``: of query, key and value."""
    batch, heads, seqlen, _ = shape
    seqlen_k = key_shape[2]
    scale, _ = _positive(problem.scale)
    params = Params(
        *map(_strided, strides, (seqlen, seqlen_k, seqlen_k)),
        scale=scale,
        scale_log2=scale * _LOG2E,
        keep_scale=1 / (1 - problem.dropout_p),
        drop_below=int(problem.dropout_p * 4294967295.0),
        positions=float(batch * seqlen * seqlen_k),
        splits=1,
        mask=MaskTensor(None, *mask.strides),
    )
    # What is taken from the maps before they are rounded: as the maps' dtype holds it, so that of a P that is zero
    # exactly zero is left when it is added again.
    params.centre = centre = _rounded(1 / seqlen_k, problem.dtype)
    parameters = params.fold.p
    parameters.norm, parameters.heads = common.NORMS.index(problem.norm), heads
    parameters.heads_out = heads
    parameters.training = problem.batch_statistics
    parameters.output_scale, parameters.eps, parameters.unit_scale = problem.output_scale, problem.eps, 1.0
    parameters.momentum = -1.0 if problem.momentum is None else problem.momentum
    parameters.centre = parameters.taken = centre
    return params


_LOG2E = math.log2(math.e)


def _strided(strides: tuple[int, ...], rows: int) -> cuda_plan.Tensor:
    batch, head, row, _ = strides
    return cuda_plan.Tensor(None, batch, head, row, rows)


def _params(template: Params, problem: Problem, inputs: Inputs, outputs: Outputs) -> Params:
    """A copy with the addresses of what both directions have."""
    query, key, value, theta, bias, norm_weight, norm_bias, mean, var, count, seed, attn_mask, pre_theta = inputs
    params = Params.from_buffer_copy(template)
    params.query.data, params.key.data, params.value.data = query.data_ptr(), key.data_ptr(), value.data_ptr()
    params.lse, params.seed = outputs.lse.data_ptr(), address(seed)
    if attn_mask is not None:
        params.mask.data = attn_mask.data_ptr()
    if pre_theta is not None:
        params.pre_theta = pre_theta.data_ptr()
    parameters = params.fold.p
    parameters.theta, parameters.bias = theta.data_ptr(), address(bias)
    parameters.norm_weight, parameters.norm_bias = address(norm_weight), address(norm_bias)
    if problem.norm == "batch":
        parameters.running_mean, parameters.running_var = address(mean), address(var)
        parameters.num_batches_tracked = address(count)
        parameters.statistics, params.value_sum = outputs.statistics.data_ptr(), outputs.value_sum.data_ptr()
    return params
