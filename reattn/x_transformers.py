"""Attention layers of x-transformers (1.39 and later) as re-attention: for :func:`reattn.convert.to_re_attention`.

The package is known by its parts, and need not be installed.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from reattn.checks import CONVERT_FIRST, has_hooks, unlike_linear
from reattn.foreign import merged_linear
from reattn.module import ReAttention

_PARTS = ("to_q", "to_k", "to_v", "to_out", "attend")
_TALKING_HEADS = ("pre_softmax_talking_heads", "post_softmax_talking_heads")


class XTransformersAttention(nn.Module):
    """``attention`` in the place of a layer of x-transformers: called as that is; its state dict is loaded too.

    Takes ``mask``, ``context_mask``, ``attn_mask``, ``rel_pos``, ``attn_bias``, ``causal``, ``return_intermediates``;
    the intermediates hold nothing. ``ValueError`` for any other argument that is given, such as a context, rotary
    embeddings or a cache, and for an ``attn_mask`` that hides from some heads: x-transformers would give what is hidden
    the weight that other heads leave it in mixing.
    """

    def __init__(self, attention: ReAttention, causal: bool, intermediates: type | None) -> None:
        super().__init__()
        self.attention = attention
        self.causal = causal
        self._intermediates = intermediates

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        rel_pos: Any = None,
        attn_bias: Tensor | None = None,
        *,
        causal: bool | None = None,
        return_intermediates: bool = False,
        **others: Any,
    ) -> Any:
        """``x (batch, seqlen, dim)``; ``mask (batch, seqlen)`` and ``attn_mask`` are True where a key takes part."""
        arguments = {"context": context, "mask": mask, "context_mask": context_mask, "attn_mask": attn_mask} | others
        arguments |= {"rel_pos": rel_pos, "attn_bias": attn_bias, "causal": causal}
        out = self.attention(*tokens_and_mask(self, {"x": x} | arguments))
        if not return_intermediates:
            return out
        return out, None if self._intermediates is None else self._intermediates()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(tuple(f"{prefix}{part}." for part in _PARTS))]:
            state_dict[f"{prefix}attention.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def tokens_and_mask(layer: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None, bool]:
    """The arguments of a layer's forward pass, by name, as ReAttention takes them; ``ValueError`` for what it does not
    take."""
    arguments = dict(arguments)
    known = ("x", "mask", "context_mask", "attn_mask", "rel_pos", "attn_bias", "causal", "return_intermediates")
    x, mask, context_mask, attn_mask, rel_pos, bias, causal, _ = (arguments.pop(name, None) for name in known)
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(f"an attention layer that was converted takes masks alone, got {', '.join(given)}")
    if attn_mask is not None and attn_mask.ndim > 2 and attn_mask.shape[-3] > 1:
        raise ValueError(f"attn_mask must be alike for all heads, got {tuple(attn_mask.shape)}")
    seen = mask if context_mask is None else context_mask
    seen = None if seen is None else seen[:, None, None]
    if attn_mask is not None:
        seen = attn_mask if seen is None else seen & attn_mask
    bias = rel_pos(x.shape[1], x.shape[1]) if rel_pos is not None else bias
    if bias is not None:
        seen = bias if seen is None else bias.masked_fill(~seen, float("-inf"))
    return x, seen, layer.causal if causal is None else causal


def is_attention(module: nn.Module) -> bool:
    """Whether a module has the parts of x-transformers' attention."""
    has_parts = all(isinstance(getattr(module, name, None), nn.Module) for name in _PARTS)
    return has_parts and all(hasattr(module.attend, name) for name in ("attn_dropout", *_TALKING_HEADS))


def not_convertible(layer: Any) -> str | None:
    """Why a layer cannot be :class:`ReAttention`: whatever it has beside plain attention with talking heads."""
    heads = layer.heads
    for name in _PARTS[:4]:
        if unlike := unlike_linear(getattr(layer, name)):
            return f"{name} must be a plain torch.nn.Linear, got {unlike}: {CONVERT_FIRST}"
    if any(has_hooks(part) for part in layer.attend.modules()):
        return "attend has hooks, which would be lost"
    pre, post = (getattr(layer.attend, name, None) is not None for name in _TALKING_HEADS)
    with torch.device("meta"):
        plain = type(layer)(
            layer.to_q.in_features,
            dim_head=layer.to_q.out_features // heads,
            heads=heads,
            causal=layer.causal,
            pre_talking_heads=pre,
            post_talking_heads=post,
            dropout=layer.attend.attn_dropout.p,
        )
    foreign = _differences(layer, plain) + _differences(layer.attend, plain.attend)
    return f"it is no plain attention with talking heads by its {', '.join(foreign)}" if foreign else None


def _differences(module: nn.Module, plain: nn.Module) -> list[str]:
    """Settings, shapes of parameters and children by which two modules of one class differ."""
    found, expected = ({**_settings(m), **_shapes(m)} for m in (module, plain))
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def _settings(module: nn.Module) -> dict[str, Any]:
    settings = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    # How the scores become maps is a function, with or without some of its arguments.
    function = getattr(module, "attn_fn", None)
    # Fused kernels are another way to the same.
    for name in ("training", "flash"):
        settings.pop(name, None)
    return settings | {"attn_fn": getattr(function, "func", function)}


def _shapes(module: nn.Module) -> dict[str, Any]:
    tensors = {name: tuple(t.shape) for name, t in (*module.named_parameters(), *module.named_buffers())}
    return tensors | {name: type(child) for name, child in module.named_children()}


def parts(layer: Any, copy: bool) -> nn.Module:
    """The layer's weights in modules under the names that CaiT has for them; copies, whatever ``copy`` says."""
    named: Any = nn.Module()
    named.num_heads = layer.heads
    named.qkv = merged_linear([layer.to_q, layer.to_k, layer.to_v])
    named.proj = layer.to_out
    named.attn_drop = layer.attend.attn_dropout
    pre, post = (getattr(layer.attend, name, None) for name in _TALKING_HEADS)
    if pre is not None:
        named.proj_l = _over_heads(pre)
        # They are added to the scores.
        named.proj_l.weight.data += torch.eye(layer.heads).to(pre.weight)
    if post is not None:
        named.proj_w = _over_heads(post)
    return named.train(layer.training)


def _over_heads(convolution: Any) -> nn.Linear:
    weight = convolution.weight.detach().flatten(1).clone()
    linear = nn.Linear(len(weight), len(weight), bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=convolution.weight.requires_grad)
    return linear


def output(layer: Any, x: Tensor) -> Tensor:
    """What a layer makes of ``x``."""
    return layer.forward(x)


def in_its_place(layer: Any, converted: ReAttention) -> XTransformersAttention:
    """``converted``, to be called as ``layer`` is."""
    module = sys.modules.get(type(layer.attend).__module__)
    return XTransformersAttention(converted, layer.causal, getattr(module, "Intermediates", None))


def prepare(model: nn.Module) -> None:
    """Nothing of a model stands in the way of another module in a layer's place."""
