"""``ReAttention``: the operator with its projections, a drop-in for a ViT's ``Attention``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from reattn import layouts, reference
from reattn.checks import NORMS, check_tokens, has_hooks
from reattn.functional import name_of, re_attention
from reattn.ops import recomputes
from reattn.sharded import with_all_heads

logger = logging.getLogger("reattn")


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

    ``head_norm`` and ``attn_drop`` are part of the fused kernels where the first is a BatchNorm2d, SyncBatchNorm,
    LayerNorm over the heads or Identity, the second a Dropout or Identity; the mode of each is its own. Any other
    module in their place, a subclass with a ``forward`` of its own, or one with hooks is called, as in any model:
    ``attn_drop`` on the softmax maps ``(batch, num_heads, seqlen, seqlen)``, ``head_norm`` on the mixed ones
    ``(batch, num_heads_out, seqlen, seqlen)``; with ``norm="layer"``, and a LayerNorm or RMSNorm of the heads, on
    ``(batch, seqlen, seqlen, num_heads_out)``. So hooks get maps that the output depends on. It stores the maps: the
    reference backend does it, with one line in the log, and an explicit fused ``backend`` raises. :mod:`torch.fx`
    traces that form, unless the module is a leaf.

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
        :func:`reattn.re_attention`.

        Raises:
            TypeError, ValueError: ``x`` is no batch of tokens; or, with a mask, ``head_norm`` is called and takes
                statistics of its own over what is hidden.
            RuntimeError: ``backend`` names a fused one, and a module is called on the maps.
        """
        check_tokens(x, getattr(self.qkv, "in_features", None))
        x = self.pre_norm(x)
        if isinstance(x, fx.Proxy):
            if isinstance(attn_mask, fx.Proxy) or isinstance(is_causal, fx.Proxy):
                x, attn_mask, is_causal = without_masks(x, attn_mask, is_causal), None, False
            return self._merge(x, self._traced(*self.project(x), attn_mask=attn_mask, is_causal=is_causal))
        query: Tensor
        key: Tensor | None = None
        value: Tensor | None = None
        one_piece = self.num_heads == self.num_heads_out and not nn.modules.module._has_any_global_hook()
        if one_piece and is_plain(self.q_norm) and is_plain(self.k_norm):
            # In one piece, so that the gradients need not be put together again.
            qkv = with_all_heads(self.qkv(x), 3 * self.attn_dim)
            query = qkv.view(qkv.shape[0], qkv.shape[1], 3, self.num_heads, self.head_dim)
        else:
            query, key, value = self.project(x)
        out = re_attention(
            query,
            key,
            value,
            **self.mixing(),
            **dropout_arguments(self.attn_drop),
            attn_mask=attn_mask,
            is_causal=is_causal,
            backend=self.backend,
            scale=self.scale,
            **self._norm_arguments(masked=attn_mask is not None or is_causal),
        )
        return self._merge(x, out)

    def _traced(self, query: Tensor, key: Tensor, value: Tensor, **masks: Any) -> Tensor:
        """The operator as :mod:`torch.fx` can look into it."""
        if self.backend not in ("auto", "reference"):
            raise RuntimeError(
                f"backend {self.backend!r} cannot run what torch.fx traced into: trace with ReAttention as a leaf, or "
                'with backend="auto"'
            )
        if masks["attn_mask"] is not None or masks["is_causal"]:
            # A graph may change its mode.
            self._refuse_to_see_hidden(traced=True)
        return reference.re_attention(
            query,
            key,
            value,
            **self.mixing(),
            norm=None if is_plain(self.head_norm) else self._called_norm(),
            attn_drop=self.attn_drop,
            output_scale=self.output_scale,
            scale=self.scale,
            **masks,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """What :func:`torch.jit.script` compiles in the place of this module."""
        return scriptable(self)

    def _merge(self, x: Tensor, out: Tensor) -> Tensor:
        """What follows the operator; ``x`` is its normalised input."""
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def attention_maps(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, synchronised: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The softmax maps and the mixed, normalised maps for ``x``, each ``(batch, heads, seqlen, seqlen)``, with
        ``num_heads`` and ``num_heads_out`` heads.

        For analysis: both are materialised, without dropout, and running statistics stay as they are. In training mode
        the statistics are those of ``x`` alone, on this rank: a SyncBatchNorm waits for no other rank, so that one may
        look at its maps by itself; with ``synchronised`` it takes those of all its ranks, each of which has to make
        this call. Differentiable in ``x`` and the parameters; maps that the module's own
        output depends on are what hooks on ``attn_drop`` and ``head_norm`` get. Call it under ``torch.no_grad()`` where
        gradients are not wanted.
        """
        check_tokens(x, getattr(self.qkv, "in_features", None))
        query, key, _ = self.project(self.pre_norm(x))
        norm = self._norm_arguments(masked=attn_mask is not None or is_causal)
        if norm.get("training"):
            norm.update(running_mean=None, running_var=None, num_batches_tracked=None)
            if not synchronised:
                norm.update(process_group=None)
        with ExitStack() as stack:
            if self.head_norm is not None:
                stack.enter_context(discard_running_statistics(self.head_norm))
                if not synchronised:
                    stack.enter_context(_of_this_rank(self.head_norm))
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
        qkv = with_all_heads(self.qkv(x), sum(counts) * self.head_dim)
        maps = qkv.view(qkv.shape[0], qkv.shape[1], sum(counts), self.head_dim).transpose(1, 2)
        query, key, value = maps.split(counts, 1)
        return self.q_norm(query), self.k_norm(key), value

    def _norm_arguments(self, masked: bool) -> dict[str, Any]:
        """The norm as arguments of :func:`reattn.re_attention`."""
        norm: Any = self.head_norm
        arguments: dict[str, Any] = {"norm": None, "output_scale": self.output_scale}
        if norm is None or is_plain(norm):
            return arguments
        is_batch = is_plain(norm, nn.BatchNorm2d, nn.SyncBatchNorm)
        if not is_batch and not (is_plain(norm, nn.LayerNorm) and norm.normalized_shape == (self.num_heads_out,)):
            if masked:
                self._refuse_to_see_hidden()
            return arguments | {"norm": self._called_norm()}
        arguments |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
        if not is_batch:
            return arguments | {"norm": "layer"}
        # As in BatchNorm2d: its own mode decides, so that a frozen norm stays frozen; without running statistics, the
        # batch's.
        tracks = norm.track_running_stats or not norm.training
        return arguments | {
            "norm": "batch",
            "running_mean": norm.running_mean if tracks else None,
            "running_var": norm.running_var if tracks else None,
            "momentum": norm.momentum,
            "num_batches_tracked": norm.num_batches_tracked if norm.training and tracks else None,
            "training": norm.training or norm.running_mean is None,
            "process_group": _process_group(norm) if norm.training else None,
        }

    def _called_norm(self) -> CalledModule:
        # What wraps a norm, as FSDP and peft do, does not tell its kind; what it holds does.
        leaves = [module for module in self.head_norm.modules() if not any(module.children())]
        over_heads = all(_shape_of(leaf) == (self.num_heads_out,) for leaf in leaves)
        channels = all(isinstance(leaf, _NormBase | nn.GroupNorm) for leaf in leaves)
        heads_last = over_heads or (self.norm_type == "layer" and not channels)
        return CalledModule(self.head_norm, heads_last, "head_norm of ReAttention: ")

    def _refuse_to_see_hidden(self, traced: bool = False) -> None:
        """``ValueError`` where torch's own norms in ``head_norm`` would take mean and variance over positions."""
        for norm in self.head_norm.modules():
            takes = isinstance(norm, nn.GroupNorm) or _shape_of(norm) not in (None, (self.num_heads_out,))
            if isinstance(norm, _NormBase):
                takes = traced or norm.training or norm.running_mean is None
            if takes:
                raise ValueError(
                    "attn_mask must be None, and is_causal False, where head_norm is called on the maps and would take "
                    f"statistics of hidden positions too, got {name_of(self.head_norm)}"
                    + (" in what torch.fx traced into: trace with ReAttention as a leaf" if traced else "")
                    + ": BatchNorm2d, SyncBatchNorm and LayerNorm take masks where they are neither wrapped nor hooked"
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        layouts.translate(state_dict, prefix, second_form=prefix + "reattn_weights" in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)


@cache
def _log_scripting(name: str) -> None:
    logger.warning(
        "torch.jit.script compiles the definition of %s, without fused kernels, and leaves it in the place of those in "
        "the model that it was given",
        name,
    )


class _ScriptTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # TorchScript compiles them as they are: their mode may change.
        return getattr(m, "script_as_is", False) or super().is_leaf_module(m, module_qualified_name)


@fx.wrap
def without_masks(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """``x``, in a graph of :mod:`torch.fx`, whose arguments are not known when it is traced."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            "attn_mask must be None, and is_causal False, in what torch.fx traced: trace with ReAttention and "
            "SelfAttention as leaves to give masks"
        )
    return x


def scriptable(module: nn.Module) -> nn.Module:
    """The definition, as :mod:`torch.fx` traces it, for :func:`torch.jit.script`, which puts it in its place in the
    model that it compiles, too."""
    _log_scripting(type(module).__name__)
    traced = fx.GraphModule(module, _ScriptTracer().trace(module))
    # TorchScript reads no annotations that are strings.
    types = {"attn_mask": Tensor | None, "is_causal": bool}
    for node in traced.graph.nodes:
        node.type = types.get(node.target) if node.op == "placeholder" else None
    traced.recompile()
    return traced


class CalledModule:
    """A module in the place of ``head_norm`` or ``attn_drop`` as a function of the maps, which it gets in the dtype of
    its parameters if it has any."""

    def __init__(self, module: nn.Module, heads_last: bool = False, name: str = "") -> None:
        self.module, self.heads_last = module, heads_last
        self.__name__ = name + name_of(module)

    def __call__(self, maps: Tensor) -> Tensor:
        dtypes = (tensor.dtype for tensor in self.module.parameters() if tensor.is_floating_point())
        maps = maps.to(next(dtypes, maps.dtype))
        if self.heads_last:
            maps = maps.movedim(1, -1)
        # Activation checkpointing calls it once more for the same batch.
        again = not torch.compiler.is_compiling() and recomputes()
        with discard_running_statistics(self.module) if again else nullcontext():
            maps = self.module(maps)
        return maps.movedim(-1, 1) if self.heads_last else maps


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether calling a module does what one of these classes does, and nothing besides: no hooks, no ``forward`` of a
    subclass or of its own. By default: nothing at all, as an Identity does."""
    return any(_runs(module, kind) for kind in classes or (nn.Identity,)) and not has_hooks(module)


def _runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module's ``forward`` is that of a class."""
    return isinstance(module, kind) and type(module).forward is kind.forward and "forward" not in module.__dict__


def _shape_of(norm: nn.Module) -> tuple[int, ...] | None:
    """What a LayerNorm or RMSNorm, of whichever library, takes its statistics over; None for other modules, and for
    those that take channels, as timm's LayerNorm2d does."""
    shape = getattr(norm, "normalized_shape", None)
    return None if shape is None or type(norm).__name__.endswith("2d") else tuple(shape)


def dropout_arguments(attn_drop: nn.Module) -> dict[str, Any]:
    """A module in ``attn_drop``'s place as arguments of :func:`reattn.re_attention`; its own mode decides."""
    if attn_drop is None or is_plain(attn_drop):
        return {}
    # With p=1 there is nothing left to be divided by 1 - p.
    if is_plain(attn_drop, nn.Dropout) and isinstance(attn_drop, nn.Dropout) and attn_drop.p < 1.0:
        return {"dropout_p": attn_drop.p if attn_drop.training else 0.0}
    return {"attn_drop": CalledModule(attn_drop)}


@contextmanager
def discard_running_statistics(module: nn.Module) -> Iterator[None]:
    """Let ``module`` update throw-away copies of its buffers, running statistics among them."""
    parts = [part for part in module.modules() if part._buffers]
    kept = [dict(part._buffers) for part in parts]
    try:
        for part, buffers in zip(parts, kept, strict=True):
            part._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
        yield
    finally:
        for part, buffers in zip(parts, kept, strict=True):
            part._buffers.update(buffers)


@contextmanager
def _of_this_rank(module: nn.Module) -> Iterator[None]:
    """Let every SyncBatchNorm in ``module`` take the statistics of what it is given, as BatchNorm2d does."""
    norms = [part for part in module.modules() if _runs(part, nn.SyncBatchNorm)]
    try:
        for norm in norms:
            norm.forward = partial(_BatchNorm.forward, norm)  # type: ignore[arg-type]
        yield
    finally:
        for norm in norms:
            del norm.forward


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
