"""The attention classes whose maps can be computed beside their forward pass, and the register for others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reattn import convert
from reattn.models import SelfAttention
from reattn.module import ReAttention
from reattn.reference import masked_softmax

MapKind = Literal["re_attention", "softmax"]
Maps = tuple[Tensor, Tensor]

# Recognised by name, so that timm need not be there; the class has lived in both modules.
_TIMM_ATTENTIONS = {("timm.layers.attention", "Attention"), ("timm.models.vision_transformer", "Attention")}


@dataclass(frozen=True)
class AttentionFunctions:
    """How to compute what an attention class does inside its forward pass; see :func:`register_attention`."""

    maps: Callable[..., Any]
    values: Callable[..., Tensor] | None = None


_registered: dict[type[nn.Module], AttentionFunctions] = {}


def register_attention(
    attention_class: type[nn.Module],
    maps: Callable[..., Tensor | Maps],
    values: Callable[..., Tensor] | None = None,
) -> None:
    """Makes a class known to :mod:`reattn.analysis`, with its subclasses; replaces what was known of it.

    Both functions are called with the module and the arguments of its forward pass, before that runs, without
    gradients. For a copy of timm's ``Attention``: ``register_attention(Attention, timm_maps, timm_values)``.

    Args:
        attention_class: a subclass of ``nn.Module``.
        maps: ``maps(module, *args, **kwargs)`` -> the softmax maps ``(batch, heads, seqlen, seqlen_k)`` without
            dropout, or a pair: the softmax maps, and those that the values are multiplied with.
        values: ``values(module, *args, **kwargs)`` -> ``(batch, heads, seqlen_k, head_dim)``; needed for feature maps
            alone.

    Raises:
        ValueError: ``attention_class`` is not a subclass of ``nn.Module``.
    """
    if not (isinstance(attention_class, type) and issubclass(attention_class, nn.Module)):
        raise ValueError(f"attention_class must be a subclass of torch.nn.Module, got {attention_class!r}")
    _registered[attention_class] = AttentionFunctions(maps, values)


def attention_functions(module: nn.Module) -> AttentionFunctions | None:
    """How to compute the maps of ``module``; None where it is of no known class.

    In this order: what was registered for its class or the nearest base; a method ``attention_maps``;
    ``torch.nn.MultiheadAttention`` and timm's ``Attention``, but for subclasses with a forward pass of their own; what
    has the parts of softmax attention as timm, copies of it, transformers or x-transformers lay them out, and computes
    on a probe what these parts say. So must the former two where ``forward`` was replaced on the instance.
    """
    if functions := registered_functions(module):
        return functions
    if callable(getattr(module, "attention_maps", None)):
        return AttentionFunctions(_method_maps, _own_values(module))
    # The class that the forward pass comes from.
    owner = next((base for base in type(module).__mro__ if "forward" in vars(base)), nn.Module)
    if owner is nn.MultiheadAttention:
        functions = AttentionFunctions(multihead_maps, multihead_values)
    elif (owner.__module__, owner.__name__) in _TIMM_ATTENTIONS:
        functions = AttentionFunctions(timm_maps, timm_values)
    if functions and "forward" not in vars(module):
        return functions
    if convert.is_attention(module) and convert.unlike_attention(module) is None:
        return functions or AttentionFunctions(maps_by_parts, values_by_parts)
    return None


def registered_functions(module: nn.Module) -> AttentionFunctions | None:
    """What :func:`register_attention` was given for the module's class or its nearest base."""
    return next((_registered[base] for base in type(module).__mro__ if base in _registered), None)


def check_kind(kind: str) -> None:
    """``ValueError`` unless ``kind`` is a :data:`MapKind`."""
    if kind not in get_args(MapKind):
        raise ValueError(f"kind must be one of {get_args(MapKind)}, got {kind!r}")


def _method_maps(module: Any, *args: Any, **kwargs: Any) -> Tensor | Maps:
    return module.attention_maps(*args, **kwargs)


def _own_values(module: nn.Module) -> Callable[..., Tensor] | None:
    if isinstance(module, ReAttention):
        return lambda attention, x, *args, **kwargs: attention.project(attention.pre_norm(x))[2]
    if isinstance(module, SelfAttention):
        return lambda attention, x, *args, **kwargs: attention._split_heads(x)[2]
    return None


def maps_by_parts(attention: nn.Module, *args: Any, **kwargs: Any) -> Tensor | Maps:
    """The maps of any layer that :func:`reattn.convert.to_re_attention` knows by its parts, and of the official
    DeepViT code's: ``(batch, heads, seqlen, seqlen)``; a pair where heads are mixed."""
    same = convert.stand_in(attention)
    maps = same.attention_maps(*convert.tokens_and_mask(attention, args, kwargs))
    return maps[0] if same.theta is None else maps


def values_by_parts(attention: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The values beside :func:`maps_by_parts`: ``(batch, heads, seqlen, head_dim)``."""
    x, _, _ = convert.tokens_and_mask(attention, args, kwargs)
    return convert.stand_in(attention).project(x)[2]


def timm_maps(attention: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """The softmax maps of timm's ViT ``Attention``, whatever its ``fused_attn``: ``(batch, heads, seqlen, seqlen)``.

    Also of what is like it, with ``q_norm``, ``k_norm`` and ``scale`` or without."""
    query, key, _ = _timm_project(attention, x)
    norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    query, key = (t if norm is None else norm(t) for t, norm in zip((query, key), norms, strict=True))
    scale = getattr(attention, "scale", None) or query.shape[-1] ** -0.5
    return masked_softmax(query * scale, key, attn_mask, is_causal)


def timm_values(attention: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The values of timm's ViT ``Attention``: ``(batch, heads, seqlen, head_dim)``."""
    return _timm_project(attention, x)[2]


def _timm_project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def multihead_maps(attention: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Tensor:
    """The softmax maps of ``torch.nn.MultiheadAttention``, with its masks and its extra keys: ``(batch, heads, seqlen,
    seqlen_k)``; batch 1 for unbatched inputs."""
    names = (
        "query",
        "key",
        "value",
        "key_padding_mask",
        "need_weights",
        "attn_mask",
        "average_attn_weights",
        "is_causal",
    )
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    training = attention.training
    # In training it returns the maps after dropout.
    attention.training = False
    try:
        arguments |= {"need_weights": True, "average_attn_weights": False}
        # Not by a call: that would run this very hook again.
        _, maps = nn.MultiheadAttention.forward(attention, **arguments)
    finally:
        attention.training = training
    maps = cast(Tensor, maps)
    return maps if maps.ndim == 4 else maps.unsqueeze(0)


def multihead_values(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """The values of ``torch.nn.MultiheadAttention``, its extra ones at the end: ``(batch, heads, seqlen_k,
    head_dim)``."""
    if value.ndim == 2:
        value = value.unsqueeze(0)
    elif not attention.batch_first:
        value = value.transpose(0, 1)
    in_proj_weight: Tensor | None = attention.in_proj_weight
    weight = attention.v_proj_weight if in_proj_weight is None else in_proj_weight.chunk(3)[2]
    in_proj_bias: Tensor | None = attention.in_proj_bias
    projected = F.linear(value, weight, None if in_proj_bias is None else in_proj_bias.chunk(3)[2])
    if attention.bias_v is not None:
        projected = torch.cat([projected, attention.bias_v.expand(len(projected), -1, -1)], dim=1)
    if attention.add_zero_attn:
        projected = F.pad(projected, (0, 0, 0, 1))
    return projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
