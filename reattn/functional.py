"""``re_attention``: checks the arguments, chooses a backend."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reattn import checks, ops, reference
from reattn.backends import choose, exporting_onnx
from reattn.backends.contract import Inputs, lowest
from reattn.problem import Problem

_CPU = torch.device("cpu")


def re_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
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
    output_scale: float | Tensor = 1.0,
    scale: float | Tensor | None = None,
    dropout_p: float = 0.0,
    attn_drop: Callable[[Tensor], Tensor] | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention whose softmax maps are mixed across heads by theta and normalised before they weigh the values.

    Equivalent to (DeepViT, arXiv 2103.11886, section 4)::

        scores = einsum("bhij,hg->bgij", query * scale @ key.mT, pre_theta) + pre_bias[:, None, None]
        attn = dropout(scores.softmax(-1), dropout_p)
        mixed = einsum("bhij,hg->bgij", attn, theta) + bias[:, None, None]
        return (Norm(mixed) * output_scale) @ value

    Mixing before the softmax, as well as after it, is talking-heads attention (arXiv 2003.02436), CaiT's.

    Args:
        query: ``(batch, heads, seqlen, head_dim)``, floating, any strides. Likewise the others.
        key, value: ``(batch, heads, seqlen_k, head_dim)``, dtype and device of ``query``. Both None where ``query`` is
            all three packed, ``(batch, seqlen, 3, heads, head_dim)``: their gradients are then written in one piece.
        theta: ``(heads, heads)``; rows are heads before mixing, columns heads after it. Any floating dtype, like all
            below. None: nothing is mixed after the softmax. With ``(heads, heads_out)``, value, output, and what is
            by head below but for ``pre_theta`` and ``pre_bias`` have ``heads_out`` heads.
        bias: ``(heads,)``, added after mixing.
        pre_theta: ``(heads, heads)``, laid out as theta: mixes the scores, before masks and softmax.
        pre_bias: ``(heads,)``, added to the mixed scores. The softmax takes away what is added to a whole row: it
            changes nothing, and is there for checkpoints that hold it.
        norm: ``"batch"``: BatchNorm2d over the heads as channels; ``"layer"``: LayerNorm over the heads; ``None``. Or a
            function, or module, of the mixed maps ``(batch, heads, seqlen, seqlen_k)``, float32 where ``query`` has 16
            bits, to others of that shape: it is called, which only the reference backend can do. Hidden keys have
            weight 0 after it, but it sees them.
        norm_weight, norm_bias: ``(heads,)``, the norm's affine part.
        running_mean, running_var: ``(heads,)``; batch norm updates them in place in training and uses them otherwise.
        num_batches_tracked: one int64; batch norm adds 1 to it in training, as ``torch.nn.BatchNorm2d`` does.
        training: batch statistics (batch norm) instead of running ones. Dropout acts whenever ``dropout_p > 0``.
        momentum, eps: of the norm, as in ``torch.nn.BatchNorm2d``: the running variance takes the unbiased estimate;
            with momentum None the running statistics are the mean over ``num_batches_tracked`` batches.
        output_scale: factor of the normalised maps (``head_dim**-0.5`` in the official deepvit_S). A tensor of one
            element is differentiated.
        scale: factor of the scores; ``head_dim**-0.5`` when None. A tensor of one element, as a learned temperature
            is, is differentiated.
        dropout_p: share of the softmax probabilities dropped, before mixing; drawn from torch's generator.
        attn_drop: a function, or module, of the softmax maps, called in place of that dropout; by the reference backend
            alone.
        attn_mask: boolean (True takes part) or floating (added to the scores, in the dtype of ``query``, and
            differentiated), broadcastable to ``(batch, heads, seqlen, seqlen_k)``. A key is hidden where it is False,
            -infinity, or the lowest number of its dtype, ``torch.finfo(dtype).min``: its weight is then 0, after mixing
            and norm, and it is no part of batch statistics. A query that sees no key gives 0. It is added to, and hides
            from, the heads of the softmax, and hides from the same heads after mixing; all alike where theta changes
            their number.
        is_causal: query i sees keys up to i, as in ``scaled_dot_product_attention``, and beside that what
            ``attn_mask`` lets it see.
        process_group: batch statistics are those of all its ranks together (one all-reduce of 3 heads numbers).
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpu"`` or ``"reference"``; an explicit one raises where it
            cannot run.

    Returns:
        ``(batch, heads, seqlen, head_dim)`` in the dtype of ``query``, laid out as ``(batch, seqlen, heads,
        head_dim)``, so that ``out.transpose(1, 2).flatten(2)`` copies nothing.

    Raises:
        TypeError: an argument is no tensor or number, or has the wrong kind of dtype.
        ValueError: shapes, devices or options do not fit; the message names the argument, what was expected and what
            came.
        RuntimeError: an explicit ``backend`` cannot run these inputs; the message gives every reason. Also from
            differentiating twice, or forward, through a fused backend: ``backend="reference"`` does both.
    """
    device = query.device if isinstance(query, Tensor) else _CPU  # the checks report what is none
    autocast = ops.autocast_enabled(device)
    if autocast:
        query, key, value = _autocast(device, query, key, value)
    if isinstance(is_causal, Tensor) and torch.jit.is_tracing():
        # torch.onnx.export(dynamo=False) makes tensors of all arguments.
        is_causal = bool(is_causal)
    packed = None
    if key is None and value is None and isinstance(query, Tensor):
        checks.check_packed(query)
        packed = query
        query, key, value = ops.unpack(query)
    # Three that are packed have as many heads.
    checks.check_maps(query, key, value, theta if packed is None else None)
    assert key is not None and value is not None
    per_head = {"theta": theta, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    per_head |= {"running_mean": running_mean, "running_var": running_var}
    checks.check_heads(query, value, per_head | {"pre_theta": pre_theta, "pre_bias": pre_bias})
    checks.check_numbers(eps=eps, dropout_p=dropout_p, momentum=0 if momentum is None else momentum)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if attn_drop is not None:
        checks.check_called("attn_drop", attn_drop, dropout_p=dropout_p or None)
    if callable(norm):
        affine = {"norm_weight": norm_weight, "norm_bias": norm_bias}
        affine |= {"running_mean": running_mean, "running_var": running_var, "num_batches_tracked": num_batches_tracked}
        checks.check_called("norm", norm, **affine)
    checks.check_mask(query, key, value, attn_mask, is_causal)
    attn_mask = None if attn_mask is None else _in_four_dimensions(attn_mask, query.dtype)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    checks.check_factor("scale", scale)
    checks.check_factor("output_scale", output_scale)
    checks.check_norm(
        query,
        key,
        None if callable(norm) else norm,
        statistics=(running_mean, running_var),
        num_batches_tracked=num_batches_tracked,
        training=training,
        momentum=momentum,
        process_group=process_group,
    )

    factor = None
    if isinstance(scale, Tensor):
        query, scale, packed = query * scale.reshape(()), 1.0, None
    if isinstance(output_scale, Tensor):
        factor, output_scale = output_scale.reshape(()), 1.0
    problem = Problem(
        device,
        query.dtype,
        query.shape[1],
        query.shape[3],
        norm=None if callable(norm) else norm,
        training=training,
        synchronised=process_group is not None,
        mask=None if attn_mask is None else "bool" if attn_mask.dtype == torch.bool else "float",
        mask_gradient=attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled(),
        is_causal=is_causal,
        scale=scale,
        output_scale=output_scale,
        eps=eps,
        dropout_p=dropout_p,
        momentum=momentum,
        pre_mixed=pre_theta is not None,
        heads_out=value.shape[1],
        called=_called(norm=norm, attn_drop=attn_drop),
    )
    shapes = query.shape, key.shape
    name = choose(backend, problem, lambda: f"query {tuple(shapes[0])}, key {tuple(shapes[1])}")
    dtype = query.dtype
    if problem.called is not None:
        # What only looks on, as hooks do, changes no more than rounding in float32 does.
        query, key, value = (maps.to(torch.promote_types(dtype, torch.float32)) for maps in (query, key, value))
        norm, attn_drop = (_under_autocast(function, query.device) for function in (norm, attn_drop))
    statistics = {"running_mean": running_mean, "running_var": running_var, "num_batches_tracked": num_batches_tracked}
    # Parameters stay in the dtype they have.
    with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
        if name == "reference":
            if problem.batch_statistics and not torch.compiler.is_compiling() and ops.recomputes():
                statistics = dict(zip(statistics, ops.throw_away(statistics.values()), strict=True))
            out = reference.re_attention(
                query,
                key,
                value,
                theta,
                bias,
                pre_theta=pre_theta,
                pre_bias=pre_bias,
                norm=norm,
                norm_weight=norm_weight,
                norm_bias=norm_bias,
                **statistics,
                training=training,
                momentum=momentum,
                eps=eps,
                output_scale=output_scale,
                scale=scale,
                dropout_p=dropout_p,
                attn_drop=attn_drop,
                attn_mask=attn_mask,
                is_causal=is_causal,
                process_group=process_group,
            )
        else:
            if theta is None:
                theta = ops.identity(query)
            if pre_theta is not None and pre_bias is not None:
                # It adds the same to all keys, which the softmax takes away: its gradient is zero, and NaN stays NaN.
                pre_theta = pre_theta.add(pre_bias, alpha=0)
            masks = {"attn_mask": attn_mask, "pre_theta": pre_theta}
            inputs = Inputs(query, key, value, theta, bias, norm_weight, norm_bias, **statistics, **masks)
            out = ops.re_attention(name, problem, inputs, process_group, packed)
    out = out if out.dtype == dtype else out.to(dtype)
    return out if factor is None else out * factor


def _called(**options: object) -> str | None:
    """Which options are called on the maps, and what they are: "norm (GroupNorm)" as an example."""
    called = {name: function for name, function in options.items() if callable(function)}
    if not called:
        return None
    if exporting_onnx():
        for function in called.values():
            module = getattr(function, "module", function)
            if isinstance(module, nn.Module) and any(part.training for part in module.modules()):
                raise RuntimeError(
                    f"an ONNX file holds no training mode, got {name_of(function)} in it: call eval() on the model "
                    "before the export"
                )
    return " and ".join(f"{name} ({name_of(function)})" for name, function in called.items())


def _under_autocast(function: Any, device: torch.device) -> Any:
    """A function that is called under the autocast that is on now, as any module of the model is."""
    if not callable(function) or not ops.autocast_enabled(device):
        return function
    dtype = torch.get_autocast_dtype(device.type)

    def call(maps: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return function(maps)

    return call


def name_of(function: Any) -> str:
    """Of a function or module, for messages."""
    hooks = isinstance(function, nn.Module) and checks.has_hooks(function)
    return getattr(function, "__name__", type(function).__name__) + (" with hooks" if hooks else "")


def _in_four_dimensions(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask, its dimensions of size 1 where it was expanded; one that is added in the given dtype, and what hides in
    its own still hides."""
    mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + tuple(attn_mask.shape))
    # An exported or traced program takes other masks, too.
    traced = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if not mask.requires_grad and not traced:
        for dim in range(4):
            if mask.shape[dim] > 1 and mask.stride(dim) == 0:
                mask = mask.narrow(dim, 0, 1)
    if mask.dtype == torch.bool or mask.dtype == dtype:
        return mask
    cast = mask.to(dtype)
    if lowest(mask.dtype) > lowest(dtype):
        cast = cast.masked_fill(mask.detach() <= lowest(mask.dtype), float("-inf"))
    return cast


def _autocast(device: torch.device, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Under autocast, query, key and value take its dtype; theta and the norm's parameters stay as they are."""
    dtype = torch.get_autocast_dtype(device.type)
    # As torch's own autocast: floating tensors but float64. Non-tensors pass through; the checks report them.
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )
