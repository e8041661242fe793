"""The native CPU backend: hands canonical tensors to the extension of csrc/cpu, as addresses and strides."""

from __future__ import annotations

import functools
import os
import pathlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reattn.backends.tensors import address, empty_heads_last

if TYPE_CHECKING:
    from reattn.backends import Request

try:
    import reattn._cpu as _cpu

    # (name, whether this CPU runs it), the best last; here, where no graph is being traced.
    INSTRUCTION_SETS = _cpu.instruction_sets()
    _import_error = ""
except ImportError as error:
    _import_error = str(error)

# In the extension's order.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = "cpu"
MAX_HEADS = 32
MAX_HEAD_DIM = 128


def not_supported(request: Request) -> list[str]:
    """Every reason why the extension cannot serve the request; empty when it can."""
    reasons = []
    if _import_error:
        reasons.append(f"the CPU extension was not built or cannot be imported ({_import_error})")
    else:
        try:
            instruction_set()
        except ValueError as error:
            reasons.append(str(error))
    if request.device.type != "cpu":
        reasons.append(f"needs a CPU tensor, got {request.device.type}")
    if request.dtype is not None and request.dtype not in DTYPES:
        reasons.append(f"dtype must be float32, float16 or bfloat16, got {request.dtype}")
    if request.heads is not None and request.heads > MAX_HEADS:
        reasons.append(f"takes at most {MAX_HEADS} heads, got {request.heads}")
    if request.head_dim is not None and request.head_dim > MAX_HEAD_DIM:
        reasons.append(f"takes head_dim up to {MAX_HEAD_DIM}, got {request.head_dim}")
    if request.masked:
        reasons.append("does not take attn_mask or is_causal")
    return reasons


def instruction_set() -> str:
    """The one in use: the best that was built and this CPU runs, or the one that ``REATTN_CPU_ISA`` names.

    Raises ``ValueError`` where that one is unknown, was not built, or does not run here.
    """
    return INSTRUCTION_SETS[_choose_isa()][0]


def _choose_isa() -> int:
    """Position among the extension's instruction sets."""
    forced = os.environ.get("REATTN_CPU_ISA") or None
    candidates = [i for i, (name, runs) in enumerate(INSTRUCTION_SETS) if runs and forced in (None, name)]
    if not candidates:
        usable = [name for name, runs in INSTRUCTION_SETS if runs]
        raise ValueError(f"REATTN_CPU_ISA must be one of {usable} on this machine, got {forced!r}")
    return candidates[-1]


def empty_cache() -> None:
    """Gives back the memory, up to 64 MB, that calls leave for the next ones."""
    _cpu.empty_cache()


def threads_from() -> str:
    """Whose threads the work is done on."""
    return "torch's OpenMP threads" if _use_torch_threads() else "own threads"


@functools.cache
def _use_torch_threads() -> bool:
    libraries = (pathlib.Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")
    return any(_cpu.use_openmp_of(str(library)) for library in libraries)


def statistics(
    query: Tensor, key: Tensor, seed: Tensor | None, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`reattn.backends.FusedBackend`."""
    heads = query.shape[1]
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    sums = query.new_zeros(heads, dtype=torch.float64)
    products = query.new_zeros(heads, heads, dtype=torch.float64)
    if query.numel():
        _cpu.statistics(
            *_call(query, key),
            _argument(query),
            _argument(key),
            address(seed),
            scale,
            dropout_p,
            address(lse),
            address(sums),
            address(products),
        )
    return sums, products, lse


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
    parameters = [None if tensor is None else tensor.contiguous() for tensor in (weight, shift, gamma, beta)]
    if query.numel():
        _cpu.forward(
            *_call(query, key),
            *map(_argument, (query, key, value, out)),
            [address(tensor) for tensor in parameters],
            address(seed),
            scale,
            eps,
            dropout_p,
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
    heads = query.shape[1]
    if coupled is not None and constant is not None:
        # The kernels add E P + constant.
        constant = constant - coupled.sum(1) / key.shape[2]
    grads = [empty_heads_last(tensor) for tensor in (query, key, value)]
    sums = query.new_zeros(heads + 3, heads, dtype=torch.float64)
    parameters = [
        None if tensor is None else tensor.contiguous() for tensor in (weight, shift, gamma, beta, coupled, constant)
    ]
    lse = lse.contiguous()
    if query.numel():
        grad_weight, *grad_vectors = sums[:heads], *sums[heads:]
        _cpu.backward(
            *_call(query, key),
            *map(_argument, (grad, query, key, value)),
            [_argument(tensor) for tensor in grads],
            [address(tensor) for tensor in parameters],
            address(seed),
            scale,
            eps,
            dropout_p,
            address(lse),
            [address(tensor) for tensor in (grad_weight, *grad_vectors)],
        )
    else:
        for tensor in grads:
            tensor.zero_()
    # Copies: of one tensor, an op may not return several views.
    grad_weight, (grad_shift, grad_gamma, grad_beta) = sums[:heads].float(), sums[heads:].float().unbind()
    if gamma is None:
        grad_gamma, grad_beta = shift.new_empty(0), shift.new_empty(0)
    grad_query, grad_key, grad_value = grads
    return grad_query, grad_key, grad_value, grad_weight, grad_shift.clone(), grad_gamma.clone(), grad_beta.clone()


def grad_dot_out(grad: Tensor, out: Tensor) -> Tensor:
    """See :class:`reattn.backends.FusedBackend`."""
    sums = out.new_zeros(out.shape[1], dtype=torch.float64)
    if out.numel():
        _cpu.grad_dot_out(*_call(out, out), _argument(grad), _argument(out), address(sums))
    return sums.float()


def _call(query: Tensor, key: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Instruction set, threads and sizes."""
    _use_torch_threads()
    batch, heads, seqlen, head_dim = query.shape
    return (
        _choose_isa(),
        torch.get_num_threads(),
        (DTYPES.index(query.dtype), batch, heads, seqlen, key.shape[2], head_dim),
    )


def _argument(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()
