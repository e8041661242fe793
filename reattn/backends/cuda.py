"""The CUDA C++ backend: hands canonical tensors to the extension of csrc/cuda, as addresses and strides."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reattn.backends.tensors import address, empty_heads_last

if TYPE_CHECKING:
    from reattn.backends import Request

try:
    import reattn._cuda as _cuda

    # Compiled for the host, where tests run the kernels without a GPU.
    EMULATED = _cuda.EMULATED
    _import_error = ""
except ImportError as error:
    EMULATED = False
    _import_error = str(error)

# In the extension's order.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = "cuda"
MAX_HEADS = 32
MAX_HEAD_DIM = 128
MIN_CAPABILITY = (7, 5)


def not_supported(request: Request) -> list[str]:
    """Every reason why the kernels cannot serve the request; empty when they can."""
    reasons = []
    emulated = EMULATED and request.device.type == "cpu"
    on_device = request.device.type == "cuda"
    if _import_error:
        reasons.append(f"the CUDA extension was not built or cannot be imported ({_import_error})")
    elif on_device or (request.dtype is None and not emulated):
        # A call on other tensors leaves the driver alone.
        reasons += _card_faults(_index(request.device) if on_device else 0)
    if not (on_device or emulated):
        reasons.append(f"needs a CUDA tensor, got {request.device.type}")
    if request.dtype is not None and request.dtype not in DTYPES:
        reasons.append(f"dtype must be float32, float16 or bfloat16, got {request.dtype}")
    if request.heads is not None and request.heads > MAX_HEADS:
        reasons.append(f"takes at most {MAX_HEADS} heads, got {request.heads}")
    if request.head_dim is not None and request.head_dim > MAX_HEAD_DIM:
        reasons.append(f"takes head_dim up to {MAX_HEAD_DIM}, got {request.head_dim}")
    if request.masked:
        reasons.append("does not take attn_mask or is_causal")
    if not reasons and request.dtype is not None and request.heads is not None and request.head_dim is not None:
        reasons += _too_large(_index(request.device), request.dtype.itemsize, request.heads, request.head_dim)
    return reasons


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
        return [str(error)]
    try:
        capability = torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError) as error:
        return [f"torch sees no CUDA device ({error})"]
    version = ".".join(map(str, capability))
    if capability < MIN_CAPABILITY:
        return [f"needs compute capability 7.5 or higher, got {version}"]
    try:
        _cuda.check_device(device)
    except RuntimeError as error:
        return [f"was built without kernels for compute capability {version}: {error}"]
    return []


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
    sizes = (itemsize, heads, depth, 1, 1 << 20, 1 << 20, True)
    kernels = _cuda.Kernel.__members__.values()
    return all(_cuda.make_plan(kernel, *sizes, shared_bytes, multiprocessors).bytes for kernel in kernels)


def statistics(
    query: Tensor, key: Tensor, seed: Tensor | None, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`reattn.backends.FusedBackend`."""
    heads = query.shape[1]
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if not query.numel():
        return query.new_zeros(heads, dtype=torch.float64), query.new_zeros(heads, heads, dtype=torch.float64), lse
    query, scale, _ = _positive_scale(query, scale)
    query, key = _aligned(query), _aligned(key)
    call, plan = _call(query, key), _plan("statistics", query, key, dropout_p)
    vectors, products = _partial_sums(query, plan)
    centre = _centre(key)
    _cuda.statistics(
        plan,
        call,
        _argument(query),
        _argument(key),
        address(seed),
        scale,
        dropout_p,
        centre,
        address(lse),
        address(vectors),
        address(products),
    )
    sums, products = vectors[:, 0, :heads].sum(0, dtype=torch.float64), _summed(products, heads)
    # The kernel took away the centre.
    offset, count = centre - 1 / key.shape[2], query.shape[0] * query.shape[2] * key.shape[2]
    products = products + offset * (sums[:, None] + sums) + count * offset**2
    return sums + count * offset, products, lse


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
    out = empty_heads_last(query)
    known = lse is not None
    lse = (
        query.new_empty(query.shape[:3], dtype=torch.float32)
        if lse is None
        else lse.clone(memory_format=torch.contiguous_format)
    )
    if query.numel():
        head_dim = query.shape[3]
        query, scale, _ = _positive_scale(query, scale)
        query, key, value = _aligned(query), _aligned(key), _aligned(value)
        parameters = [None if tensor is None else tensor.contiguous() for tensor in (weight, shift, gamma, beta)]
        _cuda.forward(
            _plan("forward", query, key, dropout_p),
            _call(query, key, head_dim),
            *map(_argument, (query, key, value, out)),
            [*map(address, parameters), 0, 0],
            address(seed),
            scale,
            eps,
            dropout_p,
            _centre(key),
            address(lse),
            known,
        )
    return out, lse


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
    heads, head_dim, seqlen_k = query.shape[1], query.shape[3], key.shape[2]
    grad_query, grad_key, grad_value = (empty_heads_last(tensor) for tensor in (query, key, value))
    if not query.numel():
        for tensor in (grad_query, grad_key, grad_value):
            tensor.zero_()
        # Of the last two, there are as many elements as gamma has.
        rows = shift if gamma is not None else shift[:0]
        parameters = (torch.zeros_like(tensor) for tensor in (weight, shift, rows, rows))
        grad_weight, grad_shift, grad_gamma, grad_beta = parameters
        return grad_query, grad_key, grad_value, grad_weight, grad_shift, grad_gamma, grad_beta
    query, scale, sign = _positive_scale(query, scale)
    grad, query, key, value = (_aligned(tensor) for tensor in (grad, query, key, value))
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    centre = _centre(key)
    if coupled is not None:
        # The kernels add coupled (P - centre), and take coupled over seqlen_k: as it is, it may not fit float16.
        if constant is not None:
            constant = constant + coupled.sum(1) * (centre - 1 / seqlen_k)
        coupled = coupled / seqlen_k
    mixing = [
        None if tensor is None else tensor.contiguous() for tensor in (weight, shift, gamma, beta, coupled, constant)
    ]
    inputs = [_argument(tensor) for tensor in (grad, query, key, value)]
    rest = (
        list(map(address, mixing)),
        *(address(seed), scale, eps, dropout_p, centre),
        *(address(lse), address(delta)),
    )
    call = _call(query, key, head_dim)
    plan = _plan("backward_query", query, key, dropout_p)
    vectors, products = _partial_sums(query, plan)
    _cuda.backward_query(plan, call, inputs, *rest, _argument(grad_query), address(vectors), address(products))
    plan = _plan("backward_key", query, key, dropout_p)
    _cuda.backward_key(plan, call, inputs, *rest, _argument(grad_key), _argument(grad_value))
    grad_shift, grad_gamma, grad_beta = vectors.sum(0, dtype=torch.float64)[:, :heads].unbind()
    # The kernel sums products of the centred maps.
    grad_weight = (_summed(products, heads) + grad_shift * centre).float()
    if gamma is None:
        grad_gamma, grad_beta = shift.new_empty(0), shift.new_empty(0)
    if sign != 1:
        grad_query = grad_query * sign
    return grad_query, grad_key, grad_value, grad_weight, grad_shift.float(), grad_gamma.float(), grad_beta.float()


def grad_dot_out(grad: Tensor, out: Tensor) -> Tensor:
    """See :class:`reattn.backends.FusedBackend`."""
    batch, heads, seqlen, head_dim = out.shape
    if not out.numel():
        return out.new_zeros(heads, dtype=torch.float32)
    grad, out = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (grad, out))
    partial = out.new_empty(batch * -(-seqlen // _cuda.SLICE), heads, dtype=torch.float32)
    _cuda.grad_dot_out(_call(out, out, head_dim), _argument(grad), _argument(out), address(partial))
    return partial.sum(0, dtype=torch.float64).float()


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


def _plan(kernel: str, query: Tensor, key: Tensor, dropout_p: float) -> Any:
    batch, heads, seqlen, depth = query.shape
    sizes = (query.element_size(), heads, depth, batch, seqlen, key.shape[2], dropout_p > 0)
    return _make_plan(kernel, sizes, *_describe(_index(query.device)))


@functools.lru_cache(4096)
def _make_plan(kernel: str, sizes: tuple[Any, ...], shared_bytes: int, multiprocessors: int) -> Any:
    return _cuda.make_plan(getattr(_cuda.Kernel, kernel), *sizes, shared_bytes, multiprocessors)


def _call(query: Tensor, key: Tensor, head_dim: int | None = None) -> Any:
    """Device, stream, dtype and sizes; query's own columns are those that may be read."""
    batch, heads, seqlen, depth = query.shape
    sizes = (batch, heads, seqlen, key.shape[2], head_dim or depth, depth)
    stream = torch.cuda.current_stream(query.device).cuda_stream if query.is_cuda else 0
    return _cuda.Call(_index(query.device), stream, DTYPES.index(query.dtype), sizes)


def _partial_sums(query: Tensor, plan: Any) -> tuple[Tensor, Tensor]:
    """Of each block: vectors (3, padded heads) and products (padded heads, padded heads)."""
    blocks, padded = query.shape[0] * plan.blocks, _cuda.padded_heads(query.shape[1])
    return (
        query.new_empty(blocks, 3, padded, dtype=torch.float32),
        query.new_empty(blocks, padded, padded, dtype=torch.float32),
    )


def _summed(products: Tensor, heads: int) -> Tensor:
    return products.sum(0, dtype=torch.float64)[:heads, :heads].contiguous()


def _argument(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()[:3]
