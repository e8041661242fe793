"""The canonical computation as torch ops and an autograd Function.

The ops are opaque to ``torch.compile`` and ``torch.export``; the Function outside them gives their gradients. It saves
query, key, value, the output where batch statistics need it, and the LSE: never a map.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from reattn import folding
from reattn.backends import fused
from reattn.backends.tensors import empty_heads_last

_library = torch.library.Library("reattn", "DEF")

_library.define(
    "statistics(Tensor query, Tensor key, Tensor? seed, float scale, float dropout_p, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "forward(Tensor query, Tensor key, Tensor value, Tensor weight, Tensor shift, Tensor? gamma, Tensor? beta, "
    "Tensor? lse, Tensor? seed, float scale, float eps, float dropout_p, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor weight, Tensor shift, Tensor? gamma, "
    "Tensor? beta, Tensor? coupled, Tensor? constant, Tensor lse, Tensor? seed, float scale, float eps, "
    "float dropout_p, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define("grad_dot_out(Tensor grad, Tensor out, str backend) -> Tensor")


@torch.library.impl(_library, "statistics", "CompositeExplicitAutograd")
def _statistics(query: Tensor, key: Tensor, seed: Tensor | None, scale: float, dropout_p: float, backend: str) -> Any:
    return fused(backend).statistics(query, key, seed, scale, dropout_p)


@torch.library.impl(_library, "forward", "CompositeExplicitAutograd")
def _forward(*args: Any) -> Any:
    *arguments, backend = args
    return fused(backend).forward(*arguments)


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def _backward(*args: Any) -> Any:
    *arguments, backend = args
    return fused(backend).backward(*arguments)


@torch.library.impl(_library, "grad_dot_out", "CompositeExplicitAutograd")
def _grad_dot_out(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    return fused(backend).grad_dot_out(grad, out)


@torch.library.register_fake("reattn::statistics", lib=_library)
def _(query: Tensor, key: Tensor, seed: Tensor | None, scale: float, dropout_p: float, backend: str) -> Any:
    heads = query.shape[1]
    sums = query.new_empty(heads, dtype=torch.float64), query.new_empty(heads, heads, dtype=torch.float64)
    return *sums, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("reattn::forward", lib=_library)
def _(query: Tensor, *args: Any) -> Any:
    return empty_heads_last(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("reattn::backward", lib=_library)
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    shift: Tensor,
    gamma: Tensor | None,
    *args: Any,
) -> Any:
    rows = weight.new_empty(0 if gamma is None else weight.shape[0])
    maps = empty_heads_last(query), empty_heads_last(key), empty_heads_last(value)
    return *maps, weight.new_empty(weight.shape), shift.new_empty(shift.shape), rows, torch.empty_like(rows)


@torch.library.register_fake("reattn::grad_dot_out", lib=_library)
def _(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    return grad.new_empty(grad.shape[1], dtype=torch.float32)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for a device, which need not know of it."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Heads x heads arithmetic stays in the dtype of its tensors; a context only where autocast is on."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else nullcontext()


def draw_seed(device: torch.device) -> Tensor:
    """One int64 from torch's generator, on the device: no synchronisation, and replayed with the RNG state."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


@torch.no_grad()
def map_statistics(
    backend: str,
    query: Tensor,
    key: Tensor,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean ``(heads,)`` and covariance ``(heads, heads)`` of the softmax maps over the batch of every rank, the count,
    the LSE.

    float64, so that one all-reduce of plain moments loses nothing, whatever each rank's batch and seqlen_k.
    """
    centre = 1.0 / key.shape[2]
    total, products, lse = torch.ops.reattn.statistics(query, key, seed, scale, dropout_p, backend)
    count = total.new_full((1,), query.shape[0] * query.shape[2] * key.shape[2])
    if group is None:
        offset = total / count.clamp(min=1)
        covariance = products / count.clamp(min=1) - torch.outer(offset, offset)
        return offset + centre, covariance, count, lse
    heads = query.shape[1]
    products = products + centre * (total[:, None] + total) + count * centre**2
    moments = torch.cat((count, total + count * centre, products.flatten()))
    dist.all_reduce(moments, group=group)
    count, total, products = moments.split((1, heads, heads * heads))
    mean = total / count.clamp(min=1)
    return mean, products.view(heads, heads) / count.clamp(min=1) - torch.outer(mean, mean), count, lse


def fused_attention(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    canonical: folding.Canonical,
    lse: Tensor | None,
    coupling: folding.BatchCoupling | None,
    seed: Tensor | None,
    scale: float,
    eps: float,
    dropout_p: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """The canonical form on a fused backend, differentiable in query, key, value and the canonical tensors."""
    options = (scale, eps, dropout_p, backend)
    inputs = (query, key, value, *canonical)
    if not (torch.compiler.is_compiling() or any(_differentiated(tensor) for tensor in inputs)):
        # The Function would cost as much as a small problem.
        return torch.ops.reattn.forward(*inputs, lse, seed, *options)[0]
    return ReAttentionFunction.apply(query, key, value, *canonical, lse, seed, options, group, *(coupling or ()))


def _differentiated(tensor: Tensor | None) -> bool:
    """Whether a gradient or, in forward mode, a tangent is asked of what this tensor enters."""
    if tensor is None:
        return False
    return (torch.is_grad_enabled() and tensor.requires_grad) or forward_ad.unpack_dual(tensor).tangent is not None


class ReAttentionFunction(torch.autograd.Function):
    """``forward`` and ``backward`` ops as one differentiable function; not twice differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor,
        shift: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        lse: Tensor | None,
        seed: Tensor | None,
        options: tuple[float, float, float, str],
        group: dist.ProcessGroup | None,
        *coupling: Tensor,
    ) -> Tensor:
        out, lse = torch.ops.reattn.forward(query, key, value, weight, shift, gamma, beta, lse, seed, *options)
        ctx.save_for_backward(
            query, key, value, weight, shift, gamma, beta, lse, seed, *((out, *coupling) if coupling else ())
        )
        ctx.options, ctx.group = options, group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        query, key, value, weight, shift, gamma, beta, lse, seed, *rest = ctx.saved_tensors
        coupled = constant = None
        if rest:
            out, *coupling = rest
            grad_dot_out = torch.ops.reattn.grad_dot_out(grad, out, ctx.options[-1])
            grad_shift = (grad.sum(2, dtype=torch.float32) * value.sum(2, dtype=torch.float32)).sum((0, 2))
            if ctx.group is not None:
                sums = torch.stack((grad_dot_out, grad_shift))
                dist.all_reduce(sums, group=ctx.group)
                grad_dot_out, grad_shift = sums
            coupled, constant = folding.coupling_gradient(
                folding.BatchCoupling(*coupling), grad_dot_out, grad_shift, key.shape[2]
            )
        *differentiated, grad_gamma, grad_beta = torch.ops.reattn.backward(
            grad, query, key, value, weight, shift, gamma, beta, coupled, constant, lse, seed, *ctx.options
        )
        if gamma is None:
            grad_gamma = grad_beta = None
        return *differentiated, grad_gamma, grad_beta, *(None,) * (4 + max(len(rest) - 1, 0))
