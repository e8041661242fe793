"""Attention layers of transformers: for :func:`reattn.convert.to_re_attention` and :mod:`reattn.analysis`.

ViT, DeiT, DINOv2 with and without registers, CLIP, SigLIP, BEiT and others share one form: linear layers for query,
key and value, a number of heads, and ``forward(hidden_states, attention_mask)``, which returns the output and the maps.
They are known by these parts; transformers need not be installed. Rotary position embeddings are no part of it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from reattn.checks import CONVERT_FIRST, class_name
from reattn.foreign import JoinedLinear, argument_names, is_linear, joined, merged, refuse_others
from reattn.module import ReAttention

_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
# The second kind leaves the projection of the output to a module behind it.
_OUT = ("o_proj", "out_proj")
_HEADS = ("num_attention_heads", "num_heads")
_SCALES = ("scaling", "scale")
_DROPOUTS = ("attention_dropout", "dropout", "dropout_prob")
_ARGUMENTS = ("hidden_states", "attention_mask", "head_mask", "output_attentions")
# What changes nothing in a map, or is seen to.
_WITHOUT_EFFECT = (
    "is_causal",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
)


class TransformersAttention(nn.Module):
    """``attention`` in the place of a layer of transformers: called as that is; its state dict is loaded too.

    Returns the output and, as that does with ``attn_implementation="eager"``, the maps that the values are multiplied
    with, without dropout and differentiable, else None: with ``"sdpa"``, the default, none are stored. ``ValueError``
    for an argument that plain attention with an ``attention_mask`` does not know, such as a ``head_mask`` or a cache,
    and for masks of other implementations than these two.
    """

    def __init__(self, attention: ReAttention, layer: Any) -> None:
        super().__init__()
        self.attention = attention
        self.config = getattr(layer, "config", None)
        self.is_causal = getattr(layer, "is_causal", False)
        self._argument_names = argument_names(type(layer).forward)
        self._projections = _projections(layer)
        self._out = _out(layer)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As in the layer that was here."""
        if len(args) > len(self._argument_names):
            raise TypeError(f"forward takes {len(self._argument_names)} arguments by position, got {len(args)}")
        arguments = dict(zip(self._argument_names, args, strict=False)) | kwargs
        x, mask, is_causal = tokens_and_mask(self, arguments)
        eager = getattr(self.config, "_attn_implementation", None) == "eager"
        maps = self.attention.attention_maps(x, mask, is_causal)[1] if eager else None
        return self.attention(x, mask, is_causal), maps

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        old = [f"{prefix}{name}." for name in self._projections]
        moved = {f"{prefix}{self._out}.": f"{prefix}attention.proj."} if self._out else {}
        if isinstance(self.attention.qkv, JoinedLinear):
            moved |= {name: f"{prefix}attention.qkv.layers.{index}." for index, name in enumerate(old)}
        elif all(f"{name}weight" in state_dict for name in old):
            weight, bias = merged(*([state_dict.pop(name + of, None) for name in old] for of in ("weight", "bias")))
            state_dict |= {f"{prefix}attention.qkv.weight": weight} | (
                {} if bias is None else {f"{prefix}attention.qkv.bias": bias}
            )
        for before, after in moved.items():
            for key in [key for key in state_dict if key.startswith(before)]:
                state_dict[after + key.removeprefix(before)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def is_attention(module: nn.Module) -> bool:
    """Whether a module has the parts of an attention layer of transformers."""
    has_heads = any(isinstance(getattr(module, name, None), int) for name in _HEADS)
    has_parts = has_heads and bool(_projections(module))
    return has_parts and argument_names(type(module).forward)[:1] == ["hidden_states"]


def not_convertible(layer: Any) -> str | None:
    """Why a layer cannot be :class:`ReAttention`, by its parts and arguments; None if it can."""
    foreign = [name for name in argument_names(type(layer).forward) if name not in _ARGUMENTS]
    if foreign:
        return f"its forward takes {', '.join(foreign)}"
    projections, out = _projections(layer), _out(layer)
    own = {name for name, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))}
    own |= {name for name, child in layer.named_children() if not isinstance(child, nn.Identity)}
    foreign = sorted(own - {*projections, out, "dropout"})
    if foreign:
        return f"it holds {', '.join(foreign)}"
    for name in (*projections, *([out] if out else [])):
        if not is_linear(getattr(layer, name)):
            return (
                f"{name} must be a torch.nn.Linear, or have in_features and out_features like one, "
                f"got {class_name(getattr(layer, name))}: {CONVERT_FIRST}"
            )
    widths = [getattr(layer, name).out_features for name in projections]
    if len(set(widths)) > 1 or widths[0] % _first(layer, _HEADS):
        return f"{', '.join(projections)} must put out as much each, for {_first(layer, _HEADS)} heads, got {widths}"
    if _first(layer, _DROPOUTS) is None:
        return f"how it drops maps must be told by one of {', '.join(_DROPOUTS)}, got none"
    return None


def parts(layer: Any, copy: bool) -> nn.Module:
    """The layer's weights in modules under the names that timm's Attention has for them; ``copy``: query, key and
    value may be computed by copies of their weights."""
    named: Any = nn.Module()
    named.num_heads = _first(layer, _HEADS)
    named.qkv = joined([getattr(layer, name) for name in _projections(layer)], copy)
    named.proj = getattr(layer, _out(layer) or "", None) or nn.Identity()
    named.scale = _first(layer, _SCALES)
    dropout = _first(layer, _DROPOUTS)
    named.attn_drop = dropout if isinstance(dropout, nn.Module) else nn.Dropout(dropout).train(layer.training)
    named.training = layer.training
    return named


def in_its_place(layer: Any, converted: ReAttention) -> TransformersAttention:
    """``converted``, to be called as ``layer`` is."""
    replacement = TransformersAttention(converted, layer)
    replacement.training = layer.training
    return replacement


def output(layer: Any, x: Tensor) -> Tensor:
    """What a layer makes of ``x``, without its hooks."""
    return layer.forward(x)[0]


def tokens_and_mask(layer: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None, bool]:
    """The arguments of a layer's forward pass, by name, as ReAttention takes them.

    Raises:
        ValueError: one has no meaning to plain attention, or the mask is none for maps.
    """
    arguments = dict(arguments)
    x, mask, causal = (arguments.pop(name, None) for name in ("hidden_states", "attention_mask", "is_causal"))
    refuse_others(
        {name: value for name, value in arguments.items() if name not in _WITHOUT_EFFECT},
        "an attention of transformers whose maps are mixed or measured",
    )
    implementation = getattr(layer.config, "_attn_implementation", None)
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 4):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else class_name(mask)
        raise ValueError(
            f"attention_mask must have shape (batch, heads, seqlen, seqlen_k), got {got} of attn_implementation="
            f"{implementation!r}: load the model with 'eager' or 'sdpa'"
        )
    if implementation in (None, "eager"):
        # Its masks say it all.
        return x, mask, False
    return x, mask, mask is None and bool(getattr(layer, "is_causal", False) if causal is None else causal)


def prepare(model: nn.Module) -> None:
    """Has transformers install the hooks that record maps and hidden states, which it else does by class, at the first
    call that asks for them. Once alone: twice would record everything twice."""
    install: Any = getattr(
        sys.modules.get("transformers.utils.output_capturing"), "maybe_install_capturing_hooks", None
    )
    base: Any = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    for part in model.modules() if install else ():
        done = any(getattr(inner, "_output_capturing_hooks_installed", False) for inner in part.modules())
        if isinstance(part, base) and not done:
            install(part)


def _projections(module: Any) -> tuple[str, ...]:
    for names in _PROJECTIONS:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            return names
    return ()


def _out(layer: Any) -> str | None:
    return next((name for name in _OUT if isinstance(getattr(layer, name, None), nn.Module)), None)


def _first(layer: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(layer, name) for name in names if getattr(layer, name, None) is not None), None)
