"""The Triton backend: launches the kernels of ``reattn.kernels``."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reattn.backends import common
from reattn.backends.common import as_float32, on_its_device
from reattn.backends.contract import Gradients, Inputs, Maps, Outputs, lowest
from reattn.problem import Problem

try:
    import triton
    from triton.errors import TritonError

    from reattn.kernels import backward as backward_kernels
    from reattn.kernels import configs
    from reattn.kernels import forward as forward_kernels
    from reattn.kernels import masks as mask_kernels
    from reattn.kernels import scores as scores_kernels
    from reattn.kernels import sums as sums_kernels
    from reattn.kernels.tiles import Mask, Norm, View

    # Read once, as Triton does when a kernel is defined; torch.compile could not trace it.
    _interpreted = triton.knobs.runtime.interpret
    _import_error = ""
except ImportError as error:
    _interpreted = False
    _import_error = str(error)

logger = logging.getLogger("reattn")

DEVICE = "cuda"
MIN_CAPABILITY = (8, 0)
# Where tests execute the compiled kernels without a GPU, they take CPU tensors.
EMULATED = False


def unavailable(device: torch.device) -> list[str]:
    """See :class:`reattn.backends.contract.Backend`."""
    if _import_error:
        return [f"triton or reattn.kernels cannot be imported ({_import_error})"]
    if device.type == "cuda":
        if torch.version.hip:
            return ["AMD GPUs are not supported"]
        if (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
            return [f"needs compute capability 8.0 or higher, got {'.'.join(map(str, capability))}"]
    elif not (EMULATED and device.type == "cpu"):
        return [f"needs a CUDA device, got {device.type}"]
    if _interpreted:
        return ["TRITON_INTERPRET is set, and Triton's interpreter computes in bfloat16 wrongly"]
    return []


def not_supported(problem: Problem) -> list[str]:
    """See :class:`reattn.backends.contract.Backend`."""
    return unavailable(problem.device) + common.beyond_limits(problem)


@on_its_device
def forward(problem: Problem, inputs: Inputs) -> Outputs:
    """See :class:`reattn.backends.contract.FusedBackend`."""
    batch, _, seqlen, _ = inputs.query.shape
    heads = inputs.value.shape[1]
    outputs = common.empty_outputs(problem, inputs)
    query, key, value = map(_aligned, inputs[:3])
    norm = _norm(problem, inputs)

    def launch(tile: configs.Tile, shape: Any) -> Tensor | None:
        programs = triton.cdiv(seqlen, tile.BLOCK_M) * batch
        numbers = (3 if problem.masked else 2) * heads
        sums = query.new_empty(numbers, programs, dtype=torch.float32) if problem.batch_statistics else None
        _run(
            forward_kernels.forward_kernel,
            (programs, shape.CHUNKS),
            tile,
            *map(_view, (query, key, value, outputs.out)),
            norm,
            as_float32(inputs.pre_theta),
            _mask(inputs),
            outputs.lse,
            inputs.seed,
            sums,
            problem.scale * _LOG2E,
            problem.dropout_p,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            SHAPE=shape,
        )
        return sums

    def left(sums: Tensor | None) -> dict[str, Tensor]:
        if sums is None:
            return {}
        # Counts would hide what is wrong with the others.
        totals = sums.sum(1, dtype=torch.float64)
        return {"sums": totals[: 2 * heads], "counts": totals[2 * heads :]}

    written = {"out": outputs.out, "lse": outputs.lse}
    tensors = query, key, value, outputs.out
    sums = launch(*_chosen("forward", problem, inputs, tensors, outputs.lse, launch, written, left))
    if sums is not None and problem.synchronised:
        _add_up(problem, norm, sums, outputs.statistics, query, key)
    elif sums is not None:
        _finish(problem, inputs._replace(value=value), outputs, outputs.statistics, sums)
    return outputs


def _sum_values(problem: Problem, inputs: Inputs, outputs: Outputs) -> None:
    """The sums of the values that each query sees."""
    batch, heads, seqlen, head_dim = outputs.out.shape
    blocks = configs.sums_blocks(head_dim)
    cut = {"ROWS": 32, "KEYS": 32, "DIM": blocks["DIM"]}
    _run(
        sums_kernels.value_sum_kernel,
        (triton.cdiv(seqlen, cut["ROWS"]) * batch, heads),
        configs.SUMS_TILE,
        _view(inputs.value),
        _mask(inputs),
        outputs.value_sum,
        seqlen,
        **cut,
        SHAPE=_shape(problem, configs.SUMS_TILE, inputs.attn_mask, inputs.value),
    )


@on_its_device
def finish(problem: Problem, inputs: Inputs, unfinished: Outputs) -> Tensor:
    """See :class:`reattn.backends.contract.FusedBackend`."""
    final = torch.empty_like(unfinished.statistics)
    _finish(problem, inputs._replace(value=_aligned(inputs.value)), unfinished, final, None)
    return final


def _finish(problem: Problem, inputs: Inputs, outputs: Outputs, final: Tensor, sums: Tensor | None) -> None:
    """The output from what the sweep left, and the running statistics. ``sums``: of its programs; without them
    ``outputs.statistics`` holds those of all ranks."""
    running = (as_float32(inputs.running_mean), as_float32(inputs.running_var))
    norm = _norm(problem, inputs, outputs, running=running)
    batch, heads, seqlen, head_dim = outputs.out.shape
    splits, by_row = _splits(outputs.out), common.hides_by_row(problem, inputs.attn_mask)
    if by_row:
        _sum_values(problem, inputs, outputs)
    _run(
        sums_kernels.finish_kernel,
        (batch * heads * splits + 1,),
        configs.SUMS_TILE,
        _view(inputs.value),
        _view(outputs.out),
        norm,
        _mask(inputs),
        sums,
        final,
        outputs.value_sum,
        inputs.num_batches_tracked,
        0 if sums is None else sums.shape[1],
        float(batch * seqlen * inputs.value.shape[2]),
        splits,
        -1.0 if problem.momentum is None else problem.momentum,
        SYNCHRONISED=sums is None,
        BY_ROW=by_row,
        **configs.sums_blocks(head_dim),
        SHAPE=_shape(problem, configs.SUMS_TILE, inputs.attn_mask, inputs.value, outputs.out),
    )
    common.store_running(inputs, running)


def _add_up(
    problem: Problem, norm: Norm, sums: Tensor, totals: Tensor, query: Tensor, key: Tensor, backward: bool = False
) -> None:
    """What programs left, (2 heads_out, programs), in float64."""
    _run(
        sums_kernels.add_up_kernel,
        (totals.shape[1],),
        configs.SUMS_TILE,
        norm,
        sums,
        totals,
        sums.shape[1],
        float(query.shape[0] * query.shape[2] * key.shape[2]),
        1.0 / key.shape[2],
        BACKWARD=backward,
        BLOCK=configs.sums_blocks(problem.head_dim)["BLOCK"],
        SHAPE=_shape(problem, configs.SUMS_TILE, None, query),
    )


@on_its_device
def grad_sums(problem: Problem, grad: Tensor, outputs: Outputs) -> Tensor:
    """See :class:`reattn.backends.contract.FusedBackend`."""
    batch, heads = grad.shape[:2]
    grad, out = _with_rows(grad), _with_rows(outputs.out)
    totals, splits = grad.new_zeros(2, heads, dtype=torch.float64), _splits(out)
    if not grad.numel():
        return totals
    sums = grad.new_empty(2 * heads, batch * splits, dtype=torch.float32)
    blocks = configs.sums_blocks(problem.head_dim)
    _run(
        sums_kernels.grad_sums_kernel,
        (batch * heads * splits,),
        configs.SUMS_TILE,
        _view(grad),
        _view(out),
        outputs.value_sum,
        sums,
        splits,
        BY_ROW=outputs.value_sum.shape[2] > 1,
        ROWS=blocks["ROWS"],
        DIM=blocks["DIM"],
        SHAPE=_shape(problem, configs.SUMS_TILE, None, grad, out),
    )
    _add_up(problem, _no_norm(problem), sums, totals, grad, grad, backward=True)
    return totals


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
    grad, query, key, value = map(_aligned, (grad, *inputs[:3]))
    if problem.batch_statistics and sums is None:
        sums = grad_sums(problem, grad, outputs)
    norm, lse = _norm(problem, inputs, outputs, sums), outputs.lse.contiguous()
    call = _BackwardCall(problem, inputs, norm, query, key, value, grad, lse, gradients)
    (tile, shape), of_scores, of_query, of_key = call.tiles()
    vectors, products = call.empty_vectors(tile, shape), call.empty_products(tile, shape)
    score_sums = (call.empty_products(*of_scores),) if of_scores else ()
    of_mask = call.maps if call.grad_scores_of_mask is None else call.grad_scores_of_mask
    for part in call.parts:
        if problem.mask_gradient:
            of_mask.zero_()  # of what is hidden nothing is written
        call.grad_maps(part, tile, shape, vectors, products)
        if of_scores:
            call.grad_scores(part, *of_scores, *score_sums)
        call.grad_query(part, *of_query)
        call.grad_key(part, *of_key)
        if problem.mask_gradient:
            common.add_mask_gradient(gradients.attn_mask, of_mask, part, problem.heads, key.shape[2])
    call.unfold(shape, vectors, products)
    if of_scores:
        call.unfold_scores(of_scores[1], *score_sums)
    return common.as_inputs(gradients, given)


class _BackwardCall:
    """A backward pass on aligned tensors: its parts, what the kernels leave each other, and their launches, named after
    the kernels."""

    def __init__(
        self,
        problem: Problem,
        inputs: Inputs,
        norm: Norm,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grad: Tensor,
        lse: Tensor,
        gradients: Gradients,
    ) -> None:
        self.problem, self.inputs, self.norm, self.gradients = problem, inputs, norm, gradients
        self.mask, self.lse, self.delta = _mask(inputs), lse, torch.empty_like(lse)
        self.tensors = query, key, value, grad, *gradients[:3]
        self.views = tuple(map(_view, self.tensors))
        self.batch, self.heads, self.seqlen, head_dim = query.shape
        self.seqlen_k = key.shape[2]
        self.keys = -(-self.seqlen_k // 16) * 16  # of a row of the maps
        rows = _table_tile("grad_maps", problem).BLOCK_M
        row_bytes = (self.heads + value.shape[1]) * self.keys * query.element_size()
        multiple = max(row.tile.BLOCK_M for row in configs.TABLE["grad_maps"])
        self.parts = common.cut_workspace(row_bytes, self.batch, self.seqlen, rows, _processors(query), multiple)
        first = self.parts[0]  # the largest

        def workspace(heads: int) -> Tensor:
            return query.new_empty(first.samples, heads, first.rows, self.keys)

        def sums(heads: int) -> Tensor:
            """Gradients of key or value, where the rows of a sample come in several parts; as wide as columns are
            loaded."""
            samples = first.samples if first.rows < self.seqlen else 0
            return lse.new_empty(samples, self.seqlen_k, heads, head_dim).transpose(1, 2)

        self.heads_out, matrices = value.shape[1], first.samples * first.rows * self.keys  # of a head
        both = workspace(self.heads_out + self.heads).flatten().tensor_split([self.heads_out * matrices])
        self.mixed, self.maps = (maps.view(first.samples, -1, first.rows, self.keys) for maps in both)
        # Of the scores, where those in ``maps`` are unmixed when they are complete.
        self.grad_scores_of_mask = workspace(self.heads) if problem.pre_mixed and problem.mask_gradient else None
        self.sums = sums(self.heads), sums(self.heads_out)
        self.pre_theta = as_float32(inputs.pre_theta)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def grad_maps(self, part: common.Part, tile: configs.Tile, shape: Any, vectors: Tensor, products: Tensor) -> None:
        maps = self.mixed, self.maps, *vectors, products
        scalars = self.problem.scale * _LOG2E, self.problem.dropout_p
        given = self.norm, self.pre_theta, self.mask, self.lse, self.delta, self.inputs.seed
        arguments = *self.views[:4], *given, *maps, *scalars
        blocks = triton.cdiv(part.rows, tile.BLOCK_M)
        self._launch(backward_kernels.grad_maps_kernel, part, blocks, tile, shape, *arguments)

    def grad_scores(self, part: common.Part, tile: configs.Tile, shape: Any, products: Tensor) -> None:
        maps = self.maps, self.grad_scores_of_mask, products
        scalars = self.problem.scale * _LOG2E, self.problem.dropout_p
        given = self.pre_theta, self.mask, self.lse, self.delta, self.inputs.seed
        arguments = *self.views[:2], *given, *maps, *scalars
        blocks = triton.cdiv(part.rows, tile.BLOCK_M)
        self._launch(backward_kernels.grad_scores_kernel, part, blocks, tile, shape, *arguments)

    def grad_query(self, part: common.Part, tile: configs.Tile, shape: Any) -> None:
        query, key, _, _, grad_query, _, _ = self.views
        scalars = self.problem.scale, self.problem.scale * _LOG2E, self.problem.dropout_p
        arguments = query, key, grad_query, self.mask, self.lse, self.delta, self.inputs.seed, self.maps, *scalars
        blocks = triton.cdiv(part.rows, tile.BLOCK_M)
        self._launch(backward_kernels.grad_query_kernel, part, blocks, tile, shape, *arguments)

    def grad_key(self, part: common.Part, tile: configs.Tile, shape: Any) -> None:
        query, _, _, grad, _, *grads = self.views
        arguments = query, grad, self.mask, *grads, *map(_view, self.sums), self.mixed, self.maps, self.problem.scale
        ends = {"FIRST": part.first_row == 0, "LAST": part.first_row + part.rows == self.seqlen}
        blocks = triton.cdiv(self.seqlen_k, tile.BLOCK_N)
        self._launch(backward_kernels.grad_key_kernel, part, blocks, tile, shape, *arguments, **ends)

    def _launch(
        self, kernel: Any, part: common.Part, blocks: int, tile: configs.Tile, shape: Any, *args: Any, **ends: bool
    ) -> None:
        """``blocks``: of the rows or keys of a sample."""
        grid = part.samples * blocks, triton.cdiv(max(self.heads, self.heads_out), shape.HEADS_PADDED)
        rows = backward_kernels.Rows(part.first_row, part.rows, self.keys)
        constants = {**ends, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "SHAPE": shape}
        # Parts of whole samples differ in the first one alone, which no kernel is specialised on.
        compiled = self._compiled.get((kernel, rows, tile, shape))
        again = {} if compiled is None else {"compiled": compiled}
        launched = _run(kernel, grid, tile, *args, part.first_sample, rows, **constants, **again)
        self._compiled[kernel, rows, tile, shape] = launched

    def unfold(self, shape: Any, vectors: Tensor, products: Tensor) -> None:
        given, gradients = self.inputs[4:7], self.gradients
        _run(
            sums_kernels.unfold_kernel,
            (self.heads + 1,),
            configs.SUMS_TILE,
            self.norm,
            vectors,
            products,
            gradients.theta,
            *(None if tensor is None else to for tensor, to in zip(given, gradients[4:7], strict=True)),
            products.shape[0] * products.shape[1],
            1.0 / self.seqlen_k,
            BLOCK=configs.UNFOLD_BLOCK,
            SHAPE=shape,
        )

    def unfold_scores(self, shape: Any, products: Tensor) -> None:
        """The gradient of ``pre_theta``, which is a theta without a norm."""
        _run(
            sums_kernels.unfold_kernel,
            (self.heads,),
            configs.SUMS_TILE,
            _no_norm(self.problem)._replace(output_scale=1.0),
            None,
            products,
            self.gradients.pre_theta,
            *(None,) * 3,
            products.shape[0] * products.shape[1],
            0.0,
            BLOCK=configs.UNFOLD_BLOCK,
            SHAPE=shape._replace(HEADS_OUT=shape.HEADS, NORM="none", TRAINING=False),
        )

    def empty_vectors(self, tile: configs.Tile, shape: Any) -> Tensor:
        """For the sums of ``grad_maps``: three vectors, by sample and block of rows."""
        blocks = triton.cdiv(self.seqlen, tile.BLOCK_M)
        return self.lse.new_empty(3, self.batch, blocks, shape.PACK * shape.HEADS_PADDED)

    def empty_products(self, tile: configs.Tile, shape: Any) -> Tensor:
        """For the sums of ``grad_maps`` or ``grad_scores``: heads x heads matrices, by sample and block of rows."""
        packed, blocks = shape.PACK * shape.HEADS_PADDED, triton.cdiv(self.seqlen, tile.BLOCK_M)
        return self.lse.new_empty(self.batch, blocks, packed, packed)

    def tiles(self) -> tuple[Any, ...]:
        """Of ``grad_maps``, ``grad_scores`` (or None), ``grad_query`` and ``grad_key``, with the shapes that go with
        them."""
        first = self.parts[0]

        def choose(kernel: str, *how: Any) -> tuple[configs.Tile, Any]:
            return _chosen(kernel, self.problem, self.inputs, self.tensors, self.lse, *how)

        def try_maps(tile: configs.Tile, shape: Any) -> tuple[Any, ...]:
            sums = self.empty_vectors(tile, shape), self.empty_products(tile, shape)
            self.grad_maps(first, tile, shape, *sums)
            return tile, shape, *sums

        written = {"delta": self.delta, "mixed": self.mixed, "grad_maps": self.maps}
        of_maps = choose("grad_maps", try_maps, written, self._sums_of_first)

        def try_scores(tile: configs.Tile, shape: Any) -> tuple[Any, ...]:
            try_maps(*of_maps)  # which grad_scores overwrites, and grad_query
            products = self.empty_products(tile, shape)
            self.grad_scores(first, tile, shape, products)
            return tile, shape, products

        def sums_of_scores(tried: tuple[Any, ...]) -> dict[str, Tensor]:
            return {"sums": self._products_of_first(*tried)}

        of_scores = None
        if self.problem.pre_mixed:
            of_scores = choose("grad_scores", try_scores, {"grad_scores": self.maps}, sums_of_scores)

        def try_query(tile: configs.Tile, shape: Any) -> None:
            if of_scores is None:
                try_maps(*of_maps)
            else:
                try_scores(*of_scores)
            self.grad_query(first, tile, shape)

        written = {"grad_query": self.gradients.query, "grad_scores": self.maps}
        of_query = choose("grad_query", try_query, written)

        def try_key(tile: configs.Tile, shape: Any) -> None:
            try_query(*of_query)
            self.grad_key(first, tile, shape)

        written = {"grad_key": self.gradients.key, "grad_value": self.gradients.value}
        if first.rows < self.seqlen:
            of_key, of_value = (columns[..., : self.problem.head_dim] for columns in self.sums)
            written = {"grad_key": of_key, "grad_value": of_value}
        return of_maps, of_scores, of_query, choose("grad_key", try_key, written)

    def _sums_of_first(self, tried: tuple[Any, ...]) -> dict[str, Tensor]:
        """What ``grad_maps`` summed up in the first part, in one tensor, however the tile cut it."""
        tile, shape, vectors, products = tried
        first, pack = self.parts[0], shape.PACK
        samples, blocks = slice(first.samples), slice(triton.cdiv(first.rows, tile.BLOCK_M))
        # Without a norm only the first vector is written.
        vectors = vectors[: 1 if self.problem.norm is None else 3, samples, blocks].sum((1, 2), dtype=torch.float64)
        # Which row of a dot a query has depends on the tile.
        vectors = vectors.unflatten(1, (pack, -1)).sum(1)[:, : self.heads_out]
        products = self._products_of_first(tile, shape, products)[:, : self.heads_out]
        return {"sums": torch.cat([vectors.flatten(), products.flatten()])}

    def _products_of_first(self, tile: configs.Tile, shape: Any, products: Tensor) -> Tensor:
        """Sums by pairs of heads, in the first part."""
        samples, blocks = slice(self.parts[0].samples), slice(triton.cdiv(self.parts[0].rows, tile.BLOCK_M))
        products = products[samples, blocks].sum((0, 1), dtype=torch.float64)
        apart = products.unflatten(1, (shape.PACK, -1)).unflatten(0, (shape.PACK, -1))
        return apart.diagonal(dim1=0, dim2=2).sum(2)[: self.heads]


_LOG2E = math.log2(math.e)


def _mask(inputs: Inputs) -> Mask:
    """The mask as the kernels take it."""
    mask = inputs.attn_mask
    if mask is None:
        return Mask(None, 0, 0, 0, 0, 0.0)
    strides = (stride if size > 1 else 0 for size, stride in zip(mask.shape, mask.stride(), strict=True))
    if mask.is_floating_point():
        return Mask(mask, *strides, lowest(mask.dtype))
    return Mask(mask.view(torch.uint8), *strides, 0.0)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where its rows can be read 16 bytes at a time; else a copy, head_dim padded with zeros to a multiple
    of 16.

    Strides that are multiples of 16 are what the JIT specialises on. Rows are read many times, so that one copy costs
    less than reading head_dim 33 element by element.
    """
    batch, heads, seqlen, head_dim = tensor.shape
    *strides, dim_stride = tensor.stride()
    if head_dim % 16 == 0 and dim_stride == 1 and not any(s % 16 for s in strides) and tensor.data_ptr() % 16 == 0:
        return tensor
    padded = tensor.new_zeros(batch, seqlen, heads, -(-head_dim // 16) * 16).transpose(1, 2)
    padded[..., :head_dim] = tensor
    return padded


def _with_rows(tensor: Tensor) -> Tensor:
    """The tensor with contiguous rows."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _view(tensor: Tensor) -> View:
    return View(tensor, *tensor.stride()[:3], tensor.shape[2])


def _norm(
    problem: Problem,
    inputs: Inputs,
    outputs: Outputs | None = None,
    sums: Tensor | None = None,
    running: tuple[Tensor | None, Tensor | None] | None = None,
) -> Norm:
    """What the kernels take beside query, key and value."""
    parameters = [as_float32(tensor) for tensor in inputs[3:7]]
    if running is None:
        used = problem.norm == "batch" and not problem.training
        running = (as_float32(inputs.running_mean), as_float32(inputs.running_var)) if used else (None, None)
    statistics = outputs.statistics if outputs is not None and problem.batch_statistics else None
    tensors = (*parameters, *running, statistics, sums)
    numbers = problem.output_scale, problem.eps, common.unit_scale(problem, inputs.key)
    return Norm(*tensors, *numbers)


def _no_norm(problem: Problem) -> Norm:
    return Norm(*(None,) * 8, problem.output_scale, problem.eps, 1.0)


def _splits(out: Tensor) -> int:
    return common.splits(out.shape, _processors(out))


def _processors(tensor: Tensor) -> int:
    """Multiprocessors of its device."""
    return _properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def _shape(problem: Problem, tile: configs.Tile, attn_mask: Tensor | None, *tensors: Tensor) -> Any:
    """The compile-time constants for a launch on these tensors, (batch, heads, *, *) each."""
    tf32 = problem.dtype == torch.float32 and _tf32_allowed()
    layouts = tuple((tensor.shape, tensor.stride()) for tensor in tensors)
    mask = None if attn_mask is None else (attn_mask.shape, attn_mask.stride())
    return configs.shape(
        problem.heads,
        problem.head_dim,
        tensors[0].shape[3],
        tile.dim,
        "tf32" if tf32 else "ieee",
        wide=_reach(problem.most_heads, tile, mask, layouts) >= 2**31,
        norm=problem.norm or "none",
        training=problem.batch_statistics,
        heads_out=problem.heads_out,
        pre_mixed=problem.pre_mixed,
        mask=problem.mask or "none",
        mask_heads=attn_mask is not None and attn_mask.shape[1] > 1,
        mask_rows=attn_mask is not None and attn_mask.shape[2] > 1,
        causal=problem.is_causal,
    )


# Shape and strides.
Layout = tuple[tuple[int, ...], tuple[int, ...]]


@functools.lru_cache(4096)
def _reach(heads: int, tile: configs.Tile, mask: Layout | None, layouts: tuple[Layout, ...]) -> int:
    """The farthest offset within a tile; rows and heads outside are computed, though not touched."""
    rows = max(tile.BLOCK_M, tile.BLOCK_N, scores_kernels.LSE_KEYS.value)
    extents = (configs.padded(heads), rows)
    reach = max(sum(e * s for e, s in zip(extents, strides[1:3], strict=True)) for _, strides in layouts)
    reach = max(reach, *(max(extents) * shape[2] for shape, _ in layouts))
    if mask is not None:
        of_mask = (*extents, max(rows, mask_kernels.SPAN_KEYS.value))
        reach = max(reach, sum(e * s for e, s in zip(of_mask, mask[1][1:], strict=True)))
    return reach


def _tf32_allowed() -> bool:
    """torch's own switch, by whichever of its two interfaces it was set: reading the old one after the new one
    raises."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return triton.runtime.driver.active.get_current_target().arch
    major, minor = _capability(device)
    return 10 * major + minor


_capability = functools.cache(torch.cuda.get_device_capability)
_properties = functools.cache(torch.cuda.get_device_properties)


def _table_tile(kernel: str, problem: Problem) -> configs.Tile:
    sizes = problem.dtype.itemsize, problem.most_heads, problem.head_dim
    return configs.tile(kernel, _arch(problem.device), *sizes, problem.dropout_p > 0 or problem.pre_mixed)


def _chosen(
    kernel: str,
    problem: Problem,
    inputs: Inputs,
    tensors: tuple[Tensor, ...],
    lse: Tensor,
    launch: Callable[[configs.Tile, Any], Any],
    written: dict[str, Tensor],
    left: Callable[[Any], dict[str, Tensor]] = lambda _: {},
) -> tuple[configs.Tile, Any]:
    """The tile that the table gives for this problem, or that tuning finds, and the shape that goes with it.

    ``tensors``: queries first and keys second, what the kernel reads and writes row by row. For tuning: ``launch``
    launches with a tile; ``written``: what that writes, which does not change what it reads; ``left``: what is to be
    compared of what it returns.
    """

    def with_shape(tile: configs.Tile) -> tuple[configs.Tile, Any]:
        if kernel not in configs.BY_HEAD:
            return tile, _shape(problem, tile, inputs.attn_mask, *tensors)
        shape = _shape(problem, tile._replace(dim=common.MAX_HEAD_DIM), inputs.attn_mask, *tensors)
        return tile, shape._replace(HEADS_PADDED=min(tile.num_warps, shape.HEADS_PADDED))

    tile, shape = with_shape(_table_tile(kernel, problem))
    if os.environ.get("REATTN_AUTOTUNE") != "1" or not all(tensor.numel() for tensor in tensors):
        return tile, shape
    absent = tuple(tensor is None for tensor in inputs)
    key = kernel, _arch(problem.device), problem.dtype, absent, shape
    if key not in _tuned_tiles:
        lengths = tensors[0].shape[2] + tensors[1].shape[2] + problem.head_dim

        def run(tile: configs.Tile) -> Any:
            return launch(*with_shape(tile))

        def allowed() -> float:
            return _allowance(problem.dtype, shape.PRECISION, lengths, lse)

        candidates = configs.candidates(kernel, problem.dtype.itemsize, problem.most_heads)
        _tuned_tiles[key] = _tuned(key, [tile, *candidates], run, written, left, allowed)
    return with_shape(_tuned_tiles[key])


# By what compiles another kernel, or chooses among the table's rows.
_tuned_tiles: dict[tuple[Any, ...], configs.Tile] = {}


def _tuned(
    key: tuple[Any, ...],
    tiles: Sequence[configs.Tile],
    run: Callable[[configs.Tile], Any],
    written: dict[str, Tensor],
    left: Callable[[Any], dict[str, Tensor]],
    allowed: Callable[[], float],
) -> configs.Tile:
    """The fastest of the tiles on this problem whose results are those of the first, the table's; logged."""

    def results(tile: configs.Tile) -> dict[str, Tensor]:
        for tensor in written.values():
            tensor.fill_(math.nan)  # or what is left out would be as the tile before left it
        return written | left(run(tile))

    expected = {name: tensor.clone() for name, tensor in results(tiles[0]).items()}
    most, times, refused = allowed(), {}, {}
    for tile in dict.fromkeys(tiles):
        try:
            found = results(tile)
            differences = {name: _difference(name, found[name], expected[name]) for name in expected}
            if wrong := {name: number for name, number in differences.items() if not number <= most}:
                refused[tile] = ", ".join(f"{name} differs by {number:.2g}" for name, number in wrong.items())
                continue
            times[tile] = triton.testing.do_bench(functools.partial(run, tile), warmup=5, rep=20, return_mode="median")
        # Of a device that a launch has left broken, the next launch of the table's tile tells.
        except (TritonError, RuntimeError) as error:
            refused[tile] = f"{type(error).__name__} {error}".partition("\n")[0]
    if tiles[0] not in times:
        raise RuntimeError(f"REATTN_AUTOTUNE: the table's own {tiles[0]} for {key}: {refused[tiles[0]]}")
    best = min(times, key=times.__getitem__)
    logger.warning(
        "tuned %s: %s takes %.3f ms, the table's %s %.3f ms", key, best, times[best], tiles[0], times[tiles[0]]
    )
    if refused:
        why = "; ".join(f"{tile}: {reason}" for tile, reason in refused.items())
        logger.warning("tuning %s refused, with %.2g allowed: %s", key, most, why)
    return best


def _allowance(dtype: torch.dtype, precision: str, terms: int, lse: Tensor) -> float:
    """How far results of two tiles may be apart, relative to a row.

    Tiles sum in another order, which float32 shows by as much as there are terms; it rounds a score by as much as it
    is large, and its probability with it. What is rounded further is so at the same places, whatever the tile: where
    that tips over, a row changes by less than one rounding of all of it.
    """
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 2.0**-10 if precision == "tf32" else 0.0
    finite = lse[lse.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    return rounding + torch.finfo(torch.float32).eps * (terms + largest)


def _difference(name: str, found: Tensor, expected: Tensor) -> float:
    """Of the row that differs most, relative to its norm, or to that of an average row where that is larger; of the
    LSE, whose error is one of the probabilities, and of delta each element is a row. Infinite where numbers stand
    instead of what is none."""
    if name in ("lse", "delta"):
        found, expected = found[..., None], expected[..., None]
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return math.inf
    difference = (found.double() - expected.double()).nan_to_num(0.0, 0.0, 0.0).norm(dim=-1)
    sizes = expected.double().nan_to_num(0.0, 0.0, 0.0).norm(dim=-1)
    sizes = sizes.clamp(min=1.0 if name == "lse" else sizes.square().mean().sqrt().item())
    return (difference / sizes).nan_to_num(0.0, math.inf).max().item()


def _run(
    kernel: Any, grid: tuple[int, ...], tile: configs.Tile, *args: Any, compiled: Any = None, **constants: Any
) -> Any:
    """Launches a kernel, and returns what Triton compiled. Given that again, for arguments that it is specialised on
    alike, most of what a launch costs the host is saved; ``constants`` are in the kernel's order then."""
    if 0 in grid:
        return None
    if compiled is None:
        return kernel[grid](*args, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages)
    compiled[(*grid, 1)](*args, *constants.values())
    return compiled
