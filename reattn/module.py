"""``ReAttention``: the operator with its projections, a drop-in for a ViT's ``Attention``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reattn import layouts, reference
from reattn.checks import NORMS
from reattn.functional import re_attention


class ReAttention(nn.Module):
    """Multi-head self-attention with re-attention (DeepViT, arXiv 2103.11886, section 4): ``(batch, seqlen, dim)`` in
    and out.

    Equivalent to ``proj(re_attention(*qkv(x), theta, theta_bias, norm=..., ...))``; see :func:`reattn.re_attention`.
    Takes the constructor keywords and the forward arguments of timm's ViT ``Attention``.

    Args:
        dim: width of the input, and of the output unless ``dim_out`` says otherwise.
        num_heads: heads; ``dim`` must divide by it unless ``attn_head_dim`` is given.
        qkv_bias, proj_bias: biases of the projections.
        norm: the norm of the mixed maps: ``"batch"`` (official), ``"layer"`` (second form) or ``None``.
        qk_norm, norm_layer: ``norm_layer(head_dim)`` on query and key.
        attn_drop, proj_drop: dropout of the softmax maps (before mixing) and of the output.
        output_scale: factor of the normalised maps.
        attn_head_dim, dim_out: head_dim and output width where they do not follow from ``dim``.
        scale_norm, gated: timm's norm of the merged heads, and its sigmoid gate on them.
        norm_eps, norm_momentum: of the head norm; momentum ``None`` is the cumulative average, as in BatchNorm2d.
        theta_bias: whether mixing adds a bias; ``None``: as upstream, except with ``norm="layer"``.
        theta_init: ``"conv"``: the official uniform(-1/sqrt(heads), 1/sqrt(heads)); ``"identity"``: identity plus 0.01
            normal noise; ``"normal"``: standard normal, as in the second form. The bias is uniform for ``"conv"``,
            else zero. Of ``pre_theta`` and ``pre_bias`` likewise.
        pre_mix: mix the scores before the softmax too, by ``pre_theta`` and, with ``pre_bias``, a bias: talking heads
            in full, as in CaiT with ``norm=None``.
        post_mix: False leaves out the mixing after the softmax, and its bias unless ``theta_bias=True``.
        num_heads_out: heads after mixing, and of the value; ``None``: as many as before.
        pre_norm: a LayerNorm of the input inside the module, where the second form keeps it.
        backend: as in :func:`reattn.re_attention`.

    Parameters: ``theta (num_heads, num_heads_out)``, rows the heads before mixing; ``theta_bias (num_heads_out,)``;
    ``pre_theta (num_heads, num_heads)``; ``pre_bias (num_heads,)``; ``head_norm``: BatchNorm2d or LayerNorm over the
    heads. ``load_state_dict`` also takes the official layout, the second form's (``reattn_weights``), and those of
    CaiT's talking heads and of x-transformers', see :mod:`reattn.layouts`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        *,
        norm: str | None = "batch",
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        output_scale: float = 1.0,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        scale_norm: bool = False,
        gated: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.1,
        theta_bias: bool | None = None,
        theta_init: str = "conv",
        pre_mix: bool = False,
        pre_bias: bool = True,
        post_mix: bool = True,
        num_heads_out: int | None = None,
        pre_norm: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
        if theta_init not in _THETA_INIT:
            raise ValueError(f"theta_init must be one of {tuple(_THETA_INIT)}, got {theta_init!r}")
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(
                f"dim must be a multiple of num_heads={num_heads} unless attn_head_dim is given, got {dim}"
            )
        if not post_mix and num_heads_out not in (None, num_heads):
            raise ValueError(f"num_heads_out must be num_heads={num_heads} with post_mix=False, got {num_heads_out}")
        for name, rate in (("attn_drop", attn_drop), ("proj_drop", proj_drop)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {rate}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        norm_layer = norm_layer or nn.LayerNorm
        self.num_heads = num_heads
        self.num_heads_out = num_heads_out or num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.attn_dim = self.num_heads_out * self.head_dim
        self.scale = self.head_dim**-0.5
        self.output_scale = output_scale
        self.norm_type = norm
        self.theta_init = theta_init
        self.backend = backend

        self.pre_norm = nn.LayerNorm(dim, **factory) if pre_norm else nn.Identity()
        self.qkv = nn.Linear(dim, 2 * num_heads * self.head_dim + self.attn_dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, **factory)) if wanted else None

        has_bias = post_mix and norm != "layer" if theta_bias is None else theta_bias
        self.pre_theta = parameter(pre_mix, num_heads, num_heads)
        self.pre_bias = parameter(pre_mix and pre_bias, num_heads)
        self.theta = parameter(post_mix, num_heads, self.num_heads_out)
        self.theta_bias = parameter(has_bias, self.num_heads_out)
        self.head_norm: nn.Module = nn.Identity()
        if norm == "batch":
            self.head_norm = nn.BatchNorm2d(self.num_heads_out, eps=norm_eps, momentum=norm_momentum, **factory)
        elif norm == "layer":
            self.head_norm = nn.LayerNorm(self.num_heads_out, eps=norm_eps, **factory)
        self.norm = norm_layer(self.attn_dim, **factory) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **factory) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_theta()

    def reset_theta(self) -> None:
        """Draws theta and its bias anew, as ``theta_init`` says, and those before the softmax."""
        bound = 1 / math.sqrt(self.num_heads) if self.theta_init == "conv" else 0.0
        with torch.no_grad():
            for theta, bias in ((self.theta, self.theta_bias), (self.pre_theta, self.pre_bias)):
                if theta is not None:
                    _THETA_INIT[self.theta_init](theta)
                if bias is not None:
                    bias.uniform_(-bound, bound)

    def reset_parameters(self) -> None:
        """Draws every parameter anew and clears the running statistics."""
        self.reset_theta()
        for child in self.children():
            if callable(reset := getattr(child, "reset_parameters", None)):
                reset()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``(batch, seqlen, dim)`` to ``(batch, seqlen, dim_out)``; masks as in
        :func:`reattn.re_attention`."""
        x = self.pre_norm(x)
        query: Tensor
        key: Tensor | None = None
        value: Tensor | None = None
        if self.num_heads == self.num_heads_out and _idle(self.q_norm) and _idle(self.k_norm):
            # In one piece, so that the gradients need not be put together again.
            qkv = self.qkv(x)
            query = qkv.view(qkv.shape[0], qkv.shape[1], 3, self.num_heads, self.head_dim)
        else:
            query, key, value = self.project(x)
        out = re_attention(
            query,
            key,
            value,
            **self.mixing(),
            dropout_p=self.attn_drop.p if self.training else 0.0,
            attn_mask=attn_mask,
            is_causal=is_causal,
            backend=self.backend,
            scale=self.scale,
            **self._norm_arguments(),
        )
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    @torch.no_grad()
    def attention_maps(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The softmax maps and the mixed, normalised maps for ``x``, each ``(batch, heads, seqlen, seqlen)``, with
        ``num_heads`` and ``num_heads_out`` heads.

        For analysis: both are materialised, without dropout, and running statistics stay as they are (in training mode
        the statistics are those of ``x``).
        """
        query, key, _ = self.project(self.pre_norm(x))
        norm = self._norm_arguments()
        if norm.get("training"):
            norm.update(running_mean=None, running_var=None, num_batches_tracked=None)
        return reference.re_attention_maps(
            query,
            key,
            **self.mixing(),
            scale=self.scale,
            attn_mask=attn_mask,
            is_causal=is_causal,
            **norm,
        )

    def extra_repr(self) -> str:
        mixing = ", pre_mix=True" if self.pre_theta is not None else ""
        mixing += ", post_mix=False" if self.theta is None else ""
        mixing += f", num_heads_out={self.num_heads_out}" if self.num_heads_out != self.num_heads else ""
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, norm={self.norm_type!r}, "
            f"output_scale={self.output_scale:g}{mixing}, backend={self.backend!r}"
        )

    def mixing(self) -> dict[str, Any]:
        """What mixes the heads, as arguments of :func:`reattn.re_attention`."""
        return {
            "theta": self.theta,
            "bias": self.theta_bias,
            "pre_theta": self.pre_theta,
            "pre_bias": self.pre_bias,
        }

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value ``(batch, heads, seqlen, head_dim)`` of ``pre_norm``'s output: strided views of the
        projection, not copies, but for what ``q_norm`` and ``k_norm`` make of them."""
        counts = (self.num_heads, self.num_heads, self.num_heads_out)
        qkv = self.qkv(x)
        maps = qkv.view(qkv.shape[0], qkv.shape[1], sum(counts), self.head_dim).transpose(1, 2)
        query, key, value = maps.split(counts, 1)
        return self.q_norm(query), self.k_norm(key), value

    def _norm_arguments(self) -> dict[str, Any]:
        """The norm as arguments of :func:`reattn.re_attention`."""
        norm = self.head_norm
        arguments: dict[str, Any] = {"norm": self.norm_type, "output_scale": self.output_scale}
        if isinstance(norm, nn.Identity):
            return arguments
        arguments |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
        if self.norm_type == "layer":
            return arguments
        # As in BatchNorm2d: its own mode decides, so that a frozen norm stays frozen; without running statistics, the
        # batch's.
        return arguments | {
            "running_mean": norm.running_mean,
            "running_var": norm.running_var,
            "momentum": norm.momentum,
            "num_batches_tracked": norm.num_batches_tracked if norm.training else None,
            "training": norm.training or norm.running_mean is None,
            "process_group": _process_group(norm) if norm.training else None,
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        layouts.translate(state_dict, prefix, second_form=prefix + "reattn_weights" in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _idle(module: nn.Module) -> bool:
    """Whether calling a module would do nothing at all."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is nn.Identity and not any(hooks) and not nn.modules.module._has_any_global_hook()


def _process_group(norm: nn.Module) -> dist.ProcessGroup | None:
    """The ranks a SyncBatchNorm takes its statistics over; None where there is only one."""
    if not isinstance(norm, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


_THETA_INIT: dict[str, Callable[[Tensor], Any]] = {
    "conv": lambda theta: theta.uniform_(-1 / math.sqrt(len(theta)), 1 / math.sqrt(len(theta))),
    "identity": lambda theta: nn.init.eye_(theta).add_(torch.randn_like(theta), alpha=0.01),
    "normal": lambda theta: theta.normal_(),
}
