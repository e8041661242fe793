"""The operator in plain PyTorch, as it reads in the definition: what every other backend is held to.

Runs on any device and in any floating dtype, differentiates twice, and materialises every map. Source: DeepViT
(Zhou et al., 2021, arXiv 2103.11886), section 4; the norm's forms are those of the official code ("batch") and of the
second form in wide use ("layer").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from reattn.backends.contract import lowest


def re_attention(
    query: Tensor, key: Tensor, value: Tensor, theta: Tensor | None = None, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """Equivalent to ``re_attention_maps(...)[1] @ value``; arguments as in :func:`reattn.re_attention`."""
    _, mixed = re_attention_maps(query, key, theta, bias, **options)
    visible = visible_keys(options.get("attn_mask"), options.get("is_causal", False), query, key)
    if visible is not None:
        # Zero times what is not finite would be NaN in rows that do not see it.
        finite = value.isfinite()
        reached = visible.to(value.dtype) @ (~finite).to(value.dtype) > 0
        out = torch.where(reached, mixed @ value, mixed @ value.where(finite, 0.0))
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    # Written in (batch, seqlen, heads, head_dim) order, so that merging the heads needs no copy.
    return (mixed @ value).transpose(1, 2).contiguous().transpose(1, 2)


def re_attention_maps(
    query: Tensor,
    key: Tensor,
    theta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    pre_theta: Tensor | None = None,
    pre_bias: Tensor | None = None,
    norm: str | Callable[[Tensor], Tensor] | None = None,
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
    attn_drop: Callable[[Tensor], Tensor] | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    process_group: dist.ProcessGroup | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The softmax maps and the mixed, normalised maps, each ``(batch, heads, seqlen, seqlen_k)``, with the heads before
    theta and after it.

    ``keep`` is a dropout mask given from outside, boolean, of the maps' shape: the same computation can then be
    repeated with the mask another backend drew.

    Without masks, and with a ``norm`` that is called, ``torch.fx`` traces it.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attn = masked_softmax(query * scale, key, attn_mask, is_causal, pre_theta, pre_bias)
    visible = visible_keys(attn_mask, is_causal, query, key)
    dropped = attn
    if attn_drop is not None:
        dropped = _called("attn_drop", attn_drop, attn)
    elif keep is not None:
        dropped = attn * keep / (1.0 - dropout_p)
    elif dropout_p > 0.0:
        dropped = F.dropout(attn, dropout_p)

    mixed = mix_heads(dropped, theta, bias)
    if callable(norm):
        mixed = _called("norm", norm, mixed)
    elif norm is not None:
        norm_dtype = torch.promote_types(attn.dtype, torch.float32)
        mixed = mixed.to(norm_dtype)
        weight, shift = (None if p is None else p.to(norm_dtype) for p in (norm_weight, norm_bias))
    if norm == "batch":
        factor: float | Tensor = 0.0 if momentum is None else momentum
        if training and num_batches_tracked is not None:
            with torch.no_grad():
                num_batches_tracked.add_(1)
            if momentum is None:
                factor = 1.0 / num_batches_tracked.to(norm_dtype)
        mixed = batch_norm(
            mixed,
            (running_mean, running_var),
            (weight, shift),
            training=training,
            momentum=factor,
            eps=eps,
            group=process_group,
            visible=visible,
        )
    elif norm == "layer":
        heads: Sequence[int] = mixed.shape[1:2]
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            # torch.onnx.export(dynamo=False) needs it as a constant.
            heads = [int(mixed.shape[1])]
        over_heads = F.layer_norm(mixed.movedim(1, 3), heads, weight, shift, eps)
        mixed = over_heads.movedim(3, 1)
    if output_scale != 1.0:
        mixed = mixed * output_scale
    if visible is not None:
        mixed = mixed.where(visible, 0.0)
    return attn, mixed.to(attn.dtype)


def _called(name: str, function: Callable[[Tensor], Tensor], maps: Tensor) -> Tensor:
    result = function(maps)
    # In a graph that torch.fx traces, shapes are not known.
    if isinstance(maps, Tensor) and getattr(result, "shape", None) != maps.shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"{name} must return maps of shape {tuple(maps.shape)}, as it is given, got {got}")
    return result.to(maps.dtype)


def mix_heads(maps: Tensor, theta: Tensor | None, bias: Tensor | None) -> Tensor:
    """``sum_h theta[h, g] maps[h] + bias[g]``, in the dtype of ``maps``; with no theta the maps, plus bias."""
    if theta is not None:
        # theta^T @ maps over the head axis.
        mixed = theta.to(maps.dtype).transpose(-2, -1) @ maps.flatten(2)
        maps = mixed.view(mixed.shape[0], mixed.shape[1], maps.shape[2], maps.shape[3])
    return maps if bias is None else maps + bias.to(maps.dtype)[:, None, None]


def visible_keys(attn_mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """Which keys a query sees: boolean, ``(batch or 1, heads or 1, seqlen or 1, seqlen_k)``; None: all of them.

    Hidden is what a boolean mask has as False, an additive one as -infinity or the lowest number of its dtype, and with
    ``is_causal`` every key behind the query's own position.
    """
    if attn_mask is None and not is_causal:
        return None
    visible = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=query.device)
    if is_causal:
        visible = visible.expand(-1, -1, query.shape[2], -1).tril()
    if attn_mask is not None:
        is_boolean = attn_mask.dtype == torch.bool
        visible = visible & (attn_mask if is_boolean else ~(attn_mask.detach() <= lowest(attn_mask.dtype)))
    return visible


def masked_softmax(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    pre_theta: Tensor | None = None,
    pre_bias: Tensor | None = None,
) -> Tensor:
    """Softmax of ``query @ key^T``, mixed by ``pre_theta``, plus an additive mask, over the keys that a query sees;
    zero where it sees none.

    Nothing of what is hidden reaches result or gradients, should it be NaN: a row is NaN where it sees a key that is
    not finite.
    """
    visible = visible_keys(attn_mask, is_causal, query, key)
    if visible is None:
        return mix_heads(query @ key.transpose(-2, -1), pre_theta, pre_bias).softmax(-1)
    blind = unused = ~visible.any(-1, keepdim=True)
    finite = key.isfinite().all(-1, keepdim=True)
    if pre_theta is not None:
        # Every head is made of the queries and keys of all.
        unused, finite = blind.all(1, keepdim=True), finite.all(1, keepdim=True)
    scores = query.masked_fill(unused, 0.0) @ key.where(finite, 0.0).transpose(-2, -1)
    scores = mix_heads(scores, pre_theta, pre_bias).masked_fill(~finite.transpose(-2, -1), float("nan"))
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.where(visible, 0.0)
    scores = scores.masked_fill(~visible, float("-inf"))
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
    visible: Tensor | None = None,
) -> Tensor:
    """Batch norm over ``(batch, heads, seqlen, seqlen_k)``, its heads as channels; in training over the batch of all of
    ``group``, if given, and of its positions over those that are ``visible``. ``momentum``: the share of this batch in
    the running statistics."""
    running_mean, running_var = running
    if visible is not None:
        mixed = mixed.where(visible, 0.0)  # what other heads see may be NaN
    if not training:
        assert running_mean is not None and running_var is not None
        return F.batch_norm(mixed, running_mean.to(mixed.dtype), running_var.to(mixed.dtype), *affine, eps=eps)
    if group is None and visible is None and not isinstance(momentum, Tensor):
        kept = [None if tensor is None else tensor.to(mixed.dtype) for tensor in running]
        normed = F.batch_norm(mixed, kept[0], kept[1], *affine, training=True, momentum=momentum, eps=eps)
        for tensor, updated in zip(running, kept, strict=True):
            if tensor is not None and updated is not None and tensor is not updated:
                tensor.copy_(updated)
        return normed
    over = (0, 2, 3)
    taken = torch.ones_like(mixed) if visible is None else visible.to(mixed.dtype).expand(mixed.shape)
    count = _all_reduce(taken.sum(over), group)
    mean = _all_reduce(mixed.sum(over), group) / count.clamp(min=1)
    centred = (mixed - mean[:, None, None]) * taken
    var = _all_reduce(centred.square().sum(over), group) / count.clamp(min=1)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            # Too few positions for an estimate leave it as it is.
            for tensor, batch, known in (
                (running_mean, mean, count > 0),
                (running_var, var * (count / (count - 1)), count > 1),
            ):
                updated = torch.lerp(tensor.to(mixed.dtype), batch, momentum)
                tensor.copy_(torch.where(known, updated, tensor))
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
