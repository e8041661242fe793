"""The Triton backend: launches the kernels of ``reattn.kernels`` on canonical tensors."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reattn.backends.tensors import empty_heads_last

if TYPE_CHECKING:
    from reattn.backends import Request

try:
    import triton

    from reattn.kernels import backward as backward_kernels
    from reattn.kernels import configs
    from reattn.kernels import forward as forward_kernels
    from reattn.kernels.tiles import Mixing, View

    INTERPRETED = triton.knobs.runtime.interpret
    _import_error = ""
except ImportError as error:
    INTERPRETED = False
    _import_error = str(error)

logger = logging.getLogger("reattn")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = "cuda"
MAX_HEADS = 32
MAX_HEAD_DIM = 128
MIN_CAPABILITY = (8, 0)


def not_supported(request: Request) -> list[str]:
    """Every reason why the kernels cannot serve the request; empty when they can."""
    reasons = []
    if _import_error:
        reasons.append(f"triton or reattn.kernels cannot be imported ({_import_error})")
    elif request.device.type == "cuda":
        if torch.version.hip:
            reasons.append("AMD GPUs are not supported")
        elif (capability := torch.cuda.get_device_capability(request.device)) < MIN_CAPABILITY:
            reasons.append(f"needs compute capability 8.0 or higher, got {'.'.join(map(str, capability))}")
    elif not (INTERPRETED and request.device.type == "cpu"):
        reasons.append(f"needs a CUDA device, got {request.device.type}")
    if request.dtype is not None and request.dtype not in DTYPES:
        reasons.append(f"dtype must be float32, float16 or bfloat16, got {request.dtype}")
    if request.heads is not None and request.heads > MAX_HEADS:
        reasons.append(f"takes at most {MAX_HEADS} heads, got {request.heads}")
    if request.head_dim is not None and request.head_dim > MAX_HEAD_DIM:
        reasons.append(f"takes head_dim up to {MAX_HEAD_DIM}, got {request.head_dim}")
    if request.masked:
        reasons.append("does not take attn_mask or is_causal")
    return reasons


def statistics(
    query: Tensor, key: Tensor, seed: Tensor | None, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`reattn.backends.FusedBackend`."""
    batch, heads, seqlen, head_dim = query.shape
    query, key = _aligned(query), _aligned(key)
    lse = query.new_empty(batch, heads, seqlen, dtype=torch.float32)

    def launch(tile: configs.Tile) -> tuple[Tensor, Tensor]:
        shape = _shape(tile, head_dim, query, key)
        packed = shape.PACK * shape.HEADS_PADDED
        blocks = triton.cdiv(seqlen, tile.BLOCK_M)
        sums = query.new_empty(batch * blocks, packed, dtype=torch.float32)
        products = query.new_empty(batch * blocks, packed, packed, dtype=torch.float32)
        _run(
            forward_kernels.statistics_kernel,
            (blocks * batch,),
            tile,
            _view(query),
            _view(key),
            lse,
            seed,
            sums,
            products,
            scale * _LOG2E,
            dropout_p,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            SHAPE=shape,
        )
        return _unpack_vector(sums, shape), _unpack_matrix(products, shape)

    return *_tiled("statistics", query, launch), lse


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    shift: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    lse: Tensor | None,
    seed: Tensor | None,
    scale: float,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """See :class:`reattn.backends.FusedBackend`."""
    dtype = query.dtype
    batch, heads, seqlen, head_dim = query.shape
    out = _empty_heads_last(query)
    query, key, value = _aligned(query), _aligned(key), _aligned(value)
    known = lse is not None
    lse = (
        query.new_empty(batch, heads, seqlen, dtype=torch.float32)
        if lse is None
        else lse.clone(memory_format=torch.contiguous_format)
    )

    def launch(tile: configs.Tile) -> None:
        shape = _shape(tile, head_dim, query, key, value, out)
        _run(
            forward_kernels.forward_kernel,
            (triton.cdiv(seqlen, tile.BLOCK_M) * batch, shape.CHUNKS),
            tile,
            _view(query),
            _view(key),
            _view(value),
            _view(out),
            _mixing(weight, shift, gamma, beta),
            lse,
            seed,
            scale * _LOG2E,
            eps,
            dropout_p,
            LSE_KNOWN=known,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            SHAPE=shape,
        )

    _tiled("forward", query, launch)
    return out.to(dtype), lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    shift: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    coupled: Tensor | None,
    constant: Tensor | None,
    lse: Tensor,
    seed: Tensor | None,
    scale: float,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :class:`reattn.backends.FusedBackend`."""
    dtype = query.dtype
    batch, heads, seqlen, head_dim = query.shape
    seqlen_k = key.shape[2]
    grad_query, grad_key, grad_value = (_empty_heads_last(tensor) for tensor in (query, key, value))
    grad, query, key, value = (_aligned(tensor) for tensor in (grad, query, key, value))
    delta = torch.empty_like(lse)
    # The kernels multiply by seqlen_k again, after the dot: as it is, the coupling may not fit float16.
    mixing = _mixing(weight, shift, gamma, beta, None if coupled is None else coupled / seqlen_k, constant)
    views = tuple(_view(tensor) for tensor in (query, key, value, grad))
    scalars = (scale, scale * _LOG2E, eps, dropout_p)

    def launch_query(tile: configs.Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape = _shape(tile, head_dim, query, key, value, grad, grad_query)
        packed = shape.PACK * shape.HEADS_PADDED
        blocks = triton.cdiv(seqlen, tile.BLOCK_M)
        vectors = query.new_empty(3 if gamma is not None else 1, batch * blocks, packed, dtype=torch.float32)
        products = query.new_empty(batch * blocks, packed, packed, dtype=torch.float32)
        _run(
            backward_kernels.backward_query_kernel,
            (blocks * batch, shape.CHUNKS),
            tile,
            *views,
            _view(grad_query),
            mixing,
            lse,
            delta,
            seed,
            vectors[0],
            None if gamma is None else vectors[1],
            None if gamma is None else vectors[2],
            products,
            *scalars,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            SHAPE=shape,
        )
        grad_shift, *grad_norm = (_unpack_vector(vector, shape).float() for vector in vectors)
        # The kernel sums products of the centred maps.
        grad_weight = _unpack_matrix(products, shape).float() + grad_shift / seqlen_k
        grad_gamma, grad_beta = grad_norm or (shift.new_empty(0), shift.new_empty(0))
        return grad_weight, grad_shift, grad_gamma, grad_beta

    def launch_key(tile: configs.Tile) -> None:
        shape = _shape(tile, head_dim, query, key, value, grad, grad_key, grad_value)
        _run(
            backward_kernels.backward_key_kernel,
            (triton.cdiv(seqlen_k, tile.BLOCK_N) * batch, shape.CHUNKS),
            tile,
            *views,
            _view(grad_key),
            _view(grad_value),
            mixing,
            lse,
            delta,
            seed,
            *scalars,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            SHAPE=shape,
        )

    grad_parameters = _tiled("backward_query", query, launch_query)
    _tiled("backward_key", query, launch_key)
    return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype), *grad_parameters


def grad_dot_out(grad: Tensor, out: Tensor) -> Tensor:
    """See :class:`reattn.backends.FusedBackend`."""
    batch, heads, seqlen, head_dim = out.shape
    grad, out = _aligned(grad), _aligned(out)

    def launch(tile: configs.Tile) -> Tensor:
        shape = _shape(tile, head_dim, grad, out)
        blocks = triton.cdiv(seqlen, tile.BLOCK_M)
        partial = out.new_empty(shape.CHUNKS * batch * blocks, shape.HEADS_PADDED, dtype=torch.float32)
        _run(
            backward_kernels.grad_dot_out_kernel,
            (blocks * batch, shape.CHUNKS),
            tile,
            _view(grad),
            _view(out),
            partial,
            BLOCK_M=tile.BLOCK_M,
            SHAPE=shape,
        )
        return partial.sum(0, dtype=torch.float64)[:heads].float()

    return _tiled("grad_dot_out", out, launch)


_LOG2E = math.log2(math.e)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where its rows can be read 16 bytes at a time; else a copy, head_dim padded with zeros to a multiple
    of 16.

    Strides that are multiples of 16 are what the JIT specialises on. Rows are read many times, so that one copy costs
    less than reading head_dim 33 element by element.
    """
    tensor = _interpretable(tensor)
    batch, heads, seqlen, head_dim = tensor.shape
    *strides, dim_stride = tensor.stride()
    if head_dim % 16 == 0 and dim_stride == 1 and not any(s % 16 for s in strides) and tensor.data_ptr() % 16 == 0:
        return tensor
    padded = tensor.new_zeros(batch, seqlen, heads, -(-head_dim // 16) * 16).transpose(1, 2)
    padded[..., :head_dim] = tensor
    return padded


def _interpretable(tensor: Tensor) -> Tensor:
    """float32 for bfloat16 under the interpreter, whose bfloat16 arithmetic is wrong; else the tensor as it is."""
    return tensor.float() if INTERPRETED and tensor.dtype == torch.bfloat16 else tensor


def _empty_heads_last(like: Tensor) -> Tensor:
    return empty_heads_last(like, torch.float32 if INTERPRETED and like.dtype == torch.bfloat16 else like.dtype)


def _view(tensor: Tensor) -> View:
    return View(tensor, *tensor.stride()[:3], tensor.shape[2])


def _mixing(*parameters: Tensor | None) -> Mixing:
    return Mixing(*(None if tensor is None else tensor.contiguous() for tensor in parameters))


def _shape(tile: configs.Tile, head_dim: int, *tensors: Tensor) -> Any:
    """The compile-time constants for a launch on these tensors, (batch, heads, *, *) each."""
    heads = tensors[0].shape[1]
    tf32 = tensors[0].dtype == torch.float32 and tensors[0].is_cuda and _tf32_allowed()
    # The farthest offset within a tile; rows and heads outside are computed, though not touched.
    extents = (configs.padded(heads), max(tile.BLOCK_M, tile.BLOCK_N))
    reach = max(sum(e * s for e, s in zip(extents, tensor.stride()[1:3], strict=True)) for tensor in tensors)
    reach = max(reach, *(configs.padded(heads) * tensor.shape[2] for tensor in tensors))
    return configs.shape(
        heads, head_dim, tensors[0].shape[3], tile.dim, "tf32" if tf32 else "ieee", wide=reach >= 2**31
    )


def _tf32_allowed() -> bool:
    """torch's own switch, by whichever of its two interfaces it was set: reading the old one after the new one
    raises."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def _unpack_vector(partial: Tensor, shape: Any) -> Tensor:
    """(programs, PACK * HEADS_PADDED) -> (heads,), float64, summed in a fixed order."""
    total = partial.sum(0, dtype=torch.float64).view(shape.PACK, shape.HEADS_PADDED)
    return total.sum(0)[: shape.HEADS]


def _unpack_matrix(partial: Tensor, shape: Any) -> Tensor:
    """(programs, PACK * HEADS_PADDED, PACK * HEADS_PADDED) -> (heads, heads): the blocks on the diagonal, float64."""
    total = partial.sum(0, dtype=torch.float64)
    total = total.view(shape.PACK, shape.HEADS_PADDED, shape.PACK, shape.HEADS_PADDED)
    return total.diagonal(dim1=0, dim2=2).sum(-1)[: shape.HEADS, : shape.HEADS].contiguous()


@functools.cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else MIN_CAPABILITY
    return 10 * major + minor


def _tiled(kernel: str, query: Tensor, launch: Callable[[configs.Tile], Any]) -> Any:
    """Launches with the tile the table gives for these heads and head_dim, or that tuning finds."""
    if INTERPRETED:
        return launch(configs.INTERPRETER_TILE)
    key = (kernel, _arch(query.device), query.element_size(), query.shape[1], query.shape[3])
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        tile = _tuned(key, launch) if os.environ.get("REATTN_AUTOTUNE") == "1" else configs.tile(*key)
        return launch(tile)


_tuned_tiles: dict[tuple[Any, ...], configs.Tile] = {}


def _tuned(key: tuple[Any, ...], launch: Callable[[configs.Tile], Any]) -> configs.Tile:
    """The fastest of the candidates on the first problem met with this key; logged once, remembered for this
    process."""
    if key not in _tuned_tiles:
        kernel, _, itemsize, heads, _ = key
        times = {}
        for tile in configs.candidates(kernel, itemsize, heads):
            try:
                times[tile] = triton.testing.do_bench(
                    lambda tile=tile: launch(tile), warmup=5, rep=20, return_mode="median"
                )
            except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
                continue
        _tuned_tiles[key] = best = min(times, key=times.__getitem__)
        default = times.get(configs.tile(*key))
        logger.warning("tuned %s: %s takes %.3f ms, the table's tile %s", key, best, times[best], default)
    return _tuned_tiles[key]


def _run(kernel: Any, grid: tuple[int, ...], tile: configs.Tile, *args: Any, **constants: Any) -> None:
    if 0 not in grid:
        kernel[grid](*args, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages)
