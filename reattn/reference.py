"""The operator in plain PyTorch, as it reads in the definition: what every other backend is held to.

Runs on any device and in any floating dtype, differentiates twice, and materialises every map. Source: DeepViT
(Zhou et al., 2021, arXiv 2103.11886), section 4; the norm's forms are those of the official code ("batch") and of the
second form in wide use ("layer").
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def re_attention(
    query: Tensor, key: Tensor, value: Tensor, theta: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """Equivalent to ``re_attention_maps(...)[1] @ value``; arguments as in :func:`reattn.re_attention`."""
    _, mixed = re_attention_maps(query, key, theta, bias, **options)
    # Written in (batch, seqlen, heads, head_dim) order, so that merging the heads needs no copy.
    return (mixed @ value).transpose(1, 2).contiguous().transpose(1, 2)


def re_attention_maps(
    query: Tensor,
    key: Tensor,
    theta: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    output_scale: float = 1.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    process_group: dist.ProcessGroup | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The softmax maps and the mixed, normalised maps, each ``(batch, heads, seqlen, seqlen_k)``.

    ``keep`` is a dropout mask given from outside, boolean, of the maps' shape: the same computation can then be
    repeated with the mask another backend drew.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attn = masked_softmax((query * scale) @ key.mT, attn_mask, is_causal)
    dropped = attn
    if keep is not None:
        dropped = attn * keep / (1.0 - dropout_p)
    elif dropout_p > 0.0:
        dropped = F.dropout(attn, dropout_p)

    # theta^T @ P over the head axis: A[g] = sum_h theta[h, g] P[h] + bias[g]
    mixed = (theta.to(attn.dtype).mT @ dropped.flatten(2)).view_as(attn)
    if bias is not None:
        mixed = mixed + bias.to(attn.dtype)[:, None, None]

    norm_dtype = torch.promote_types(attn.dtype, torch.float32)
    weight, shift = (None if p is None else p.to(norm_dtype) for p in (norm_weight, norm_bias))
    if norm == "batch":
        factor: float | Tensor = 0.0 if momentum is None else momentum
        if training and num_batches_tracked is not None:
            with torch.no_grad():
                num_batches_tracked.add_(1)
            if momentum is None:
                factor = 1.0 / num_batches_tracked.to(norm_dtype)
        mixed = batch_norm(
            mixed.to(norm_dtype),
            (running_mean, running_var),
            (weight, shift),
            training=training,
            momentum=factor,
            eps=eps,
            group=process_group,
        )
    elif norm == "layer":
        over_heads = F.layer_norm(mixed.to(norm_dtype).movedim(1, -1), theta.shape[1:], weight, shift, eps)
        mixed = over_heads.movedim(-1, 1)
    if output_scale != 1.0:
        mixed = mixed * output_scale
    return attn, mixed.to(attn.dtype)


def masked_softmax(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Softmax over the keys that a mask allows (True or an added term, as in SDPA); a row that may see none is all
    zero."""
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is None:
        return scores.softmax(-1)
    if attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    else:
        scores = scores + attn_mask
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def batch_norm(
    mixed: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    affine: tuple[Tensor | None, Tensor | None],
    *,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Batch norm over ``(batch, heads, seqlen, seqlen_k)``, its heads as channels; in training over the batch of all of
    ``group``, if given. ``momentum``: the share of this batch in the running statistics."""
    running_mean, running_var = running
    if not training:
        assert running_mean is not None and running_var is not None
        return F.batch_norm(mixed, running_mean.to(mixed.dtype), running_var.to(mixed.dtype), *affine, eps=eps)
    if group is None and not isinstance(momentum, Tensor):
        kept = [None if tensor is None else tensor.to(mixed.dtype) for tensor in running]
        normed = F.batch_norm(mixed, kept[0], kept[1], *affine, training=True, momentum=momentum, eps=eps)
        for tensor, updated in zip(running, kept, strict=True):
            if tensor is not None and updated is not None and tensor is not updated:
                tensor.copy_(updated)
        return normed
    over = (0, 2, 3)
    count = torch.tensor([mixed.numel() // mixed.shape[1]], dtype=mixed.dtype, device=mixed.device)
    count = _all_reduce(count, group)
    mean = _all_reduce(mixed.sum(over), group) / count
    centred = mixed - mean[:, None, None]
    var = _all_reduce(centred.square().sum(over), group) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            for tensor, batch in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
                tensor.copy_(torch.lerp(tensor.to(mixed.dtype), batch, momentum))
    normed = centred * (var + eps).rsqrt()[:, None, None]
    weight, shift = affine
    if weight is not None:
        normed = normed * weight[:, None, None]
    if shift is not None:
        normed = normed + shift[:, None, None]
    return normed


def _all_reduce(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return local if group is None else _AllReduceSum.apply(local, group)


class _AllReduceSum(torch.autograd.Function):
    """A sum over ranks; every rank's gradient flows back into every rank's summand."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = local.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
