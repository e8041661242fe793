"""``torch.nn.MultiheadAttention`` as re-attention: for :func:`reattn.convert.to_re_attention`.

torchvision's ViTs and PyTorch's own transformer layers are made of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reattn.checks import CONVERT_FIRST, class_name
from reattn.module import ReAttention


class MultiheadReAttention(nn.Module):
    """``attention`` in the place of a ``torch.nn.MultiheadAttention`` that attends to itself: called as that is; its
    state dict is loaded too.

    ``ValueError`` where query, key and value are not one tensor, and where it is not ``(batch, seqlen, dim)`` or, with
    ``batch_first=False``, ``(seqlen, batch, dim)``. With ``need_weights``, which is slow, the maps that the values are
    multiplied with are returned, without dropout.
    """

    # What PyTorch's transformer layers look at before they take a kernel of their own: there is none for this.
    in_proj_bias = None
    _qkv_same_embed_dim = True

    def __init__(self, attention: ReAttention, batch_first: bool) -> None:
        super().__init__()
        self.attention = attention
        self.batch_first = batch_first
        self.num_heads = attention.num_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in ``torch.nn.MultiheadAttention``: in boolean masks True hides."""
        if query is not key or key is not value:
            raise ValueError(
                "query, key and value must be one tensor for re-attention, got several: convert the other layers "
                "alone, by to_re_attention(model, blocks=...)"
            )
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with is_causal=True, got None")
        x = query if self.batch_first else query.transpose(0, 1)
        mask = None if attn_mask is None else _visible(attn_mask)
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _visible(key_padding_mask)[:, None, None]
            mask = padding if mask is None else _both(mask, padding)
        out = self.attention(x, mask)
        maps = self.attention.attention_maps(x, mask)[1] if need_weights else None
        if maps is not None and average_attn_weights:
            maps = maps.mean(dim=1)
        return out if self.batch_first else out.transpose(0, 1), maps

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for before, after in (("in_proj_", "qkv."), ("out_proj.", "proj.")):
            for key in [key for key in state_dict if key.startswith(prefix + before)]:
                state_dict[f"{prefix}attention.{after}{key.removeprefix(prefix + before)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _visible(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask


def _both(first: Tensor, second: Tensor) -> Tensor:
    if first.dtype == second.dtype == torch.bool:
        return first & second
    if first.dtype == torch.bool:
        first, second = second, first
    return first + second if second.dtype != torch.bool else first.masked_fill(~second, float("-inf"))


def is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


def not_convertible(layer: Any) -> str | None:
    """Why a layer cannot be :class:`ReAttention`; None if it can."""
    if type(layer).forward is not nn.MultiheadAttention.forward:
        return "it has a forward pass of its own"
    if layer.in_proj_weight is None:
        return "key and value must be as wide as query, got kdim or vdim"
    for name in ("bias_k", "bias_v"):
        if getattr(layer, name) is not None:
            return "it was made with add_bias_kv=True, which adds a key that is no token"
    if layer.add_zero_attn:
        return "it was made with add_zero_attn=True, which adds a key that is no token"
    for name, parameter in layer.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"{name} must be a plain torch.nn.Parameter, got {class_name(parameter)}: {CONVERT_FIRST}"
    if set(dict(layer.named_parameters())) - {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}:
        return f"its weights must be its own alone, got {', '.join(dict(layer.named_parameters()))}: {CONVERT_FIRST}"
    return None


def parts(layer: Any, copy: bool) -> nn.Module:
    """The layer's own weights under the names that timm's Attention has for them."""
    named: Any = nn.Module()
    named.num_heads = layer.num_heads
    named.qkv = nn.Linear(layer.embed_dim, 3 * layer.embed_dim, bias=False, device="meta")
    named.qkv.weight, named.qkv.bias = layer.in_proj_weight, layer.in_proj_bias
    named.proj, named.attn_drop = layer.out_proj, nn.Dropout(layer.dropout).train(layer.training)
    named.training = layer.training
    return named


def in_its_place(layer: Any, converted: ReAttention) -> MultiheadReAttention:
    """``converted``, to be called as ``layer`` is."""
    replacement = MultiheadReAttention(converted, layer.batch_first)
    replacement.training = layer.training
    return replacement


def output(layer: Any, x: Tensor) -> Tensor:
    """What a layer makes of ``x (batch, seqlen, dim)``, without its hooks."""
    x = x if layer.batch_first else x.transpose(0, 1)
    out = layer.forward(x, x, x, need_weights=False)[0]
    return out if layer.batch_first else out.transpose(0, 1)


def tokens_and_mask(layer: Any, arguments: dict[str, Any]) -> tuple[Tensor, None, bool]:
    """The argument ``query`` of a layer that attends to itself without a mask, as ReAttention takes it."""
    return arguments["query"], None, False


def prepare(model: nn.Module) -> None:
    """Has PyTorch's encoders pass padding masks on, where they else make nested tensors for kernels of their own."""
    for part in model.modules():
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False
