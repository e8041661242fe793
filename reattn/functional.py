"""``re_attention``: checks the arguments, folds the norm, chooses a backend."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from reattn import autograd, folding, reference
from reattn.backends import Request, choose

NORMS = ("batch", "layer", None)


def re_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    theta: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    output_scale: float = 1.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention whose softmax maps are mixed across heads by theta and normalised before they weigh the values.

    Equivalent to (DeepViT, arXiv 2103.11886, section 4)::

        attn = dropout((query * scale @ key.mT).softmax(-1), dropout_p)
        mixed = einsum("bhij,hg->bgij", attn, theta) + bias[:, None, None]
        return (Norm(mixed) * output_scale) @ value

    Args:
        query: ``(batch, heads, seqlen, head_dim)``, floating, any strides. Likewise the others.
        key, value: ``(batch, heads, seqlen_k, head_dim)``, dtype and device of ``query``.
        theta: ``(heads, heads)``; rows are heads before mixing, columns heads after it. Any floating dtype, like all
            below.
        bias: ``(heads,)``, added after mixing.
        norm: ``"batch"``: BatchNorm2d over the heads as channels; ``"layer"``: LayerNorm over the heads; ``None``.
        norm_weight, norm_bias: ``(heads,)``, the norm's affine part.
        running_mean, running_var: ``(heads,)``; batch norm updates them in place in training and uses them otherwise.
        training: batch statistics (batch norm) instead of running ones. Dropout acts whenever ``dropout_p > 0``.
        momentum, eps: of the norm, as in ``torch.nn.BatchNorm2d`` (the running variance takes the unbiased estimate).
        output_scale: factor of the normalised maps (``head_dim**-0.5`` in the official deepvit_S).
        scale: factor of the scores; ``head_dim**-0.5`` when None.
        dropout_p: share of the softmax probabilities dropped, before mixing; drawn from torch's generator.
        attn_mask: boolean (True takes part) or added to the scores, broadcastable to ``(batch, heads, seqlen,
            seqlen_k)``.
        is_causal: query i sees keys up to i. Masks are computed by the reference backend.
        process_group: batch statistics are those of all its ranks together (one all-reduce of about heads^2 numbers).
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpu"`` or ``"reference"``; an explicit one raises where it
            cannot run.

    Returns:
        ``(batch, heads, seqlen, head_dim)`` in the dtype of ``query``, laid out as ``(batch, seqlen, heads,
        head_dim)``, so that ``out.transpose(1, 2).flatten(2)`` copies nothing.

    Raises:
        TypeError: an argument is no tensor or has the wrong kind of dtype.
        ValueError: shapes, devices or options do not fit; the message names the argument, what was expected and what
            came.
        RuntimeError: an explicit ``backend`` cannot run these inputs; the message gives every reason.
    """
    query, key, value = _autocast(query, key, value)
    parameters = {"theta": theta, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    statistics = {"running_mean": running_mean, "running_var": running_var}
    _check_tensors(query, key, value, parameters | statistics)
    _check_options(query, key, norm, running_mean, running_var, training, dropout_p, process_group)

    batch, heads, seqlen, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    name = choose(
        backend,
        Request(query.device, query.dtype, heads, head_dim, masked=is_causal or attn_mask is not None),
        f"query {tuple(query.shape)}, key {tuple(key.shape)}, {query.dtype} on {query.device}",
    )
    with autograd.without_autocast(query.device):
        if name == "reference":
            return reference.re_attention(
                query,
                key,
                value,
                theta,
                bias,
                norm=norm,
                norm_weight=norm_weight,
                norm_bias=norm_bias,
                running_mean=running_mean,
                running_var=running_var,
                training=training,
                momentum=momentum,
                eps=eps,
                output_scale=output_scale,
                scale=scale,
                dropout_p=dropout_p,
                attn_mask=attn_mask,
                is_causal=is_causal,
                process_group=process_group,
            )

        # Once, here: theta enters the statistics and the fold, and what it gets back from both must meet in float32.
        theta = theta.float()
        bias = None if bias is None else bias.float()
        seed = autograd.draw_seed(query.device) if dropout_p > 0.0 else None
        lse = coupling = None
        if norm == "layer":
            canonical = folding.fold_layer(theta, bias, norm_weight, norm_bias, output_scale)
        elif norm is None:
            canonical = folding.fold_plain(theta, bias, output_scale)
        else:
            mean, var = running_mean, running_var
            if training:
                map_mean, map_cov, count, lse = autograd.map_statistics(
                    name, query, key, seed, scale, dropout_p, process_group
                )
                mean, var = folding.mixed_moments(theta, bias, map_mean, map_cov)
                if running_mean is not None and running_var is not None:
                    _update_running(running_mean, running_var, mean, var, count, momentum)
            assert mean is not None and var is not None
            canonical = folding.fold_batch(theta, bias, mean, var, norm_weight, norm_bias, eps, output_scale)
            if training:
                coupling = folding.couple(canonical, theta, var, norm_bias, map_mean, count, eps, output_scale)
        return autograd.fused_attention(
            name, query, key, value, canonical, lse, coupling, seed, scale, eps, dropout_p, process_group
        )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, query, key and value take its dtype; theta and the norm's parameters stay as they are."""
    device = getattr(tensors[0], "device", torch.device("cpu"))
    if not autograd.autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(tensor.to(dtype) if _may_be_cast(tensor) else tensor for tensor in tensors)


def _may_be_cast(tensor: Tensor) -> bool:
    """As torch's own autocast: floating tensors but float64; what is none is left for the checks to name."""
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64


def _update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: Tensor, momentum: float
) -> None:
    with torch.no_grad():
        unbiased = var * (count / (count - 1))
        for running, batch in ((running_mean, mean), (running_var, unbiased)):
            # A batch of no positions (count 0) leaves the statistics as they are.
            updated = torch.lerp(running.to(batch.dtype), batch, momentum)
            running.copy_(torch.where(count > 0, updated, running.to(batch.dtype)))


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, per_head: dict[str, Tensor | None]) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have shape (batch, heads, seqlen, head_dim), got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must be {query.dtype} on {query.device}, as query is, got {tensor.dtype} on {tensor.device}"
            )
    batch, heads, _, head_dim = query.shape
    if heads < 1 or head_dim < 1:
        raise ValueError(f"query must have at least one head and head_dim 1, got {tuple(query.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        like_key = (batch, heads, key.shape[2], head_dim)
        if tuple(tensor.shape) != like_key:
            raise ValueError(f"{name} must have shape {like_key} to match query and key, got {tuple(tensor.shape)}")
    if key.shape[2] < 1:
        raise ValueError(f"key must hold at least one position, got {tuple(key.shape)}")

    for name, parameter in per_head.items():
        expected = (heads, heads) if name == "theta" else (heads,)
        if parameter is None and name != "theta":
            continue
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(parameter).__name__}")
        if tuple(parameter.shape) != expected:
            raise ValueError(
                f"{name} must have shape {expected} to match query's {heads} heads, got {tuple(parameter.shape)}"
            )
        if not parameter.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {parameter.dtype}")
        if parameter.device != query.device:
            raise ValueError(f"{name} must be on {query.device}, as query is, got {parameter.device}")


def _check_options(
    query: Tensor,
    key: Tensor,
    norm: str | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    dropout_p: float,
    process_group: dist.ProcessGroup | None,
) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together, got one of them")
    if norm != "batch":
        return
    if not training and running_mean is None:
        raise ValueError("running_mean and running_var must be given for norm='batch' with training=False, got None")
    positions = query.shape[0] * query.shape[2] * key.shape[2]
    if training and positions == 1 and process_group is None:
        raise ValueError(
            "query and key must span more than one position for norm='batch' with training=True, got "
            f"batch {query.shape[0]}, seqlen {query.shape[2]}, seqlen_k {key.shape[2]}"
        )
