"""DeepViT: vision transformers whose blocks re-mix their attention maps over the heads.

Source: "DeepViT: Towards Deeper Vision Transformer" (Zhou et al., 2021, arXiv 2103.11886) and its official code.
State dict keys are the official ones, except inside ``attn``, where :class:`reattn.ReAttention` names its own.
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from reattn.backends import exporting_onnx, same_backend
from reattn.checks import check_tokens, class_name
from reattn.module import ReAttention, discard_running_statistics, dropout_arguments, scriptable, without_masks
from reattn.reference import masked_softmax

STEM_CHANNELS = 64
Pooling = Literal["token", "avg", "max", "avgmax", ""]
# torch.fx makes a node of it where it is defined, and where this says so.
fx.wrap("without_masks")


def to_pair(size: int | Sequence[int], name: str) -> tuple[int, int]:
    """``size`` or ``(height, width)`` as ``(height, width)``; ``ValueError`` for anything else."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be a positive int or a pair (height, width) of them, got {size!r}")
    return pair


def select_blocks(indices: int | Sequence[int] | None, depth: int, name: str) -> list[int]:
    """Block indices in ascending order: None selects all, an int the last so many, a sequence those it names
    (negative ones count from the end). ``ValueError`` names the argument when it does not fit ``depth``."""
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        if not 0 <= indices <= depth:
            raise ValueError(f"{name} must be between 0 and the depth of {depth} blocks, got {indices}")
        return list(range(depth - indices, depth))
    if not isinstance(indices, Iterable) or not all(isinstance(index, int) for index in indices):
        raise ValueError(f"{name} must be None, an int, or a sequence of ints, got {indices!r}")
    outside = [index for index in indices if not -depth <= index < depth]
    if outside:
        raise ValueError(f"{name} must lie in [{-depth}, {depth}) for {depth} blocks, got {outside}")
    return sorted({index % depth for index in indices})


def _may_vary(grid: Sequence[int]) -> bool:
    """Whether this is the grid of an example alone, and what is exported or traced takes others."""
    if torch.compiler.is_exporting():
        # With strict=True all sizes look like numbers.
        return torch.compiler.is_dynamo_compiling() or any(isinstance(size, torch.SymInt) for size in grid)
    # The older ONNX exporter cannot resample.
    return torch.jit.is_tracing() and not exporting_onnx()  # type: ignore[attr-defined]


@fx.wrap
def resample_pos_embed(
    pos_embed: Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
) -> Tensor:
    """Resample learned positions to another grid of patches (bicubic, antialiased, computed in float32).

    Args:
        pos_embed: ``(1, num_prefix_tokens + old_height * old_width, dim)``, any float dtype.
        new_grid: ``(height, width)`` in patches.
        old_grid: the grid ``pos_embed`` was learned on; None takes it to be square.
        num_prefix_tokens: leading tokens without a place on the grid, kept as they are.

    Returns:
        ``(1, num_prefix_tokens + new_height * new_width, dim)`` in the dtype of ``pos_embed``.

    Raises:
        ValueError: the number of positions is not that of ``old_grid``, or is no square when that is None.
    """
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    num_patches = patches.shape[1]
    if old_grid is None:
        height = width = int(round(num_patches**0.5))
    else:
        height, width = old_grid[0], old_grid[1]
    if height * width != num_patches:
        raise ValueError(
            f"pos_embed holds {num_patches} patch positions, which do not fill a grid of {height} x {width}"
        )
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        same = False
    else:
        same = not _may_vary(new_grid) and (height, width) == tuple(new_grid)
    if same:
        return pos_embed
    grid = patches.reshape(1, height, width, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=[new_grid[0], new_grid[1]], mode="bicubic", antialias=True)
    patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([prefix, patches], dim=1)


@contextmanager
def _recomputation(block: nn.Module, backend: AbstractContextManager[None]) -> Iterator[None]:
    with backend, discard_running_statistics(block):
        yield


def checkpointed(block: nn.Module, *inputs: Any) -> Tensor:
    """``block(*inputs)``, recomputed in the backward pass instead of keeping its activations.

    The recomputation runs on copies of the running statistics, otherwise every training step would update them twice,
    and on the backend that :func:`reattn.use_backend` says now, in whichever thread it runs. A compiled graph has its
    mutations in the forward pass only, and needs no such care.
    """
    if torch.compiler.is_compiling():
        return checkpoint(block, *inputs, use_reentrant=False)
    return checkpoint(
        block,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _recomputation(block, same_backend())),
    )


def _refuse_onnx(what: str) -> None:
    if exporting_onnx():
        raise RuntimeError(f"an ONNX file holds no {what}: call eval() on the model before the export")


@fx.wrap
def _drop_samples(x: Tensor, drop_prob: float) -> Tensor:
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        _refuse_onnx("stochastic depth")
    keep_prob = 1.0 - drop_prob
    mask = x.new_empty([x.shape[0]] + [1] * (x.ndim - 1)).bernoulli_(keep_prob)
    return x * (mask / keep_prob)


class DropPath(nn.Module):
    """Stochastic depth: in training, each sample's input is zeroed with probability ``drop_prob``, and scaled by
    ``1 / (1 - drop_prob)`` otherwise; the identity in eval (Huang et al., 2016, arXiv 1603.09382)."""

    script_as_is = True

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_prob must lie in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x if self.drop_prob == 0.0 or not self.training else _drop_samples(x, self.drop_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


def _softmax_maps(query: Tensor, key: Tensor, attn_mask: Tensor | None) -> Tensor:
    """The maps of scaled_dot_product_attention: its masks mean what they do there."""
    scores = query @ key.transpose(-2, -1)
    if attn_mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0).to(query.dtype)


class SelfAttention(nn.Module):
    """Multi-head softmax attention, with the shapes, keywords and ``qkv``/``proj`` keys of :class:`reattn.ReAttention`.

    Equivalent to ``proj(scaled_dot_product_attention(*qkv(x)))``, heads split and merged in between. Another module
    than Dropout in the place of ``attn_drop``, or one with hooks, is called on the softmax maps ``(batch, num_heads,
    seqlen, seqlen)``, which are stored then.

    Args:
        dim: channels of the input and the output.
        num_heads, attn_head_dim: heads, and channels of each; None means ``dim // num_heads``.
        qkv_bias, proj_bias: whether the two projections add a bias.
        qk_norm: normalise queries and keys over ``head_dim`` with ``norm_layer``.
        attn_drop, proj_drop: dropout of the softmax and of the output.

    Raises:
        ValueError: ``dim`` is not divisible by ``num_heads`` and ``attn_head_dim`` is None.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        *,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_head_dim: int | None = None,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got dim={dim} and num_heads={num_heads}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        inner_dim = self.num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner_dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(inner_dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def _split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        check_tokens(x, getattr(self.qkv, "in_features", None))
        qkv = self.qkv(x)
        qkv = qkv.view(qkv.shape[0], qkv.shape[1], 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        return self.q_norm(query), self.k_norm(key), value

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``(batch, seqlen, dim) -> (batch, seqlen, dim)``; masks as in scaled_dot_product_attention, but both may be
        given."""
        if isinstance(attn_mask, fx.Proxy) or isinstance(is_causal, fx.Proxy):
            x, attn_mask, is_causal = without_masks(x, attn_mask, is_causal), None, False
        query, key, value = self._split_heads(x)
        dropout = dropout_arguments(self.attn_drop)
        called = "attn_drop" in dropout or isinstance(x, fx.Proxy)
        if is_causal and (called or attn_mask is not None):
            # SDPA takes one of them.
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            if attn_mask is None or attn_mask.dtype == torch.bool:
                attn_mask = seen if attn_mask is None else attn_mask & seen
            else:
                attn_mask = attn_mask.masked_fill(~seen, float("-inf"))
            is_causal = False
        if called:
            maps = _softmax_maps(query * self.head_dim**-0.5, key, attn_mask)
            out = dropout.get("attn_drop", self.attn_drop)(maps).to(value.dtype) @ value
        else:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, **dropout)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def attention_maps(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The softmax maps of ``x (batch, seqlen, dim)`` without dropout, ``(batch, heads, seqlen, seqlen)``.

        Returned twice, so that the answer has the form of :meth:`reattn.ReAttention.attention_maps`.
        """
        query, key, _ = self._split_heads(x)
        maps = masked_softmax(query * self.head_dim**-0.5, key, attn_mask, is_causal)
        return maps, maps

    def __prepare_scriptable__(self) -> nn.Module:
        """What :func:`torch.jit.script` compiles in the place of this module."""
        return scriptable(self)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"


@fx.wrap
def _drop_patches(x: Tensor, drop_prob: float, num_prefix_tokens: int) -> Tensor:
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        _refuse_onnx("dropout of patches")
    prefix, patches = x[:, :num_prefix_tokens], x[:, num_prefix_tokens:]
    kept = max(1, int(patches.shape[1] * (1.0 - drop_prob)))
    chosen = torch.rand(patches.shape[0], patches.shape[1], device=x.device).argsort(1)[:, :kept].sort(1)[0]
    patches = patches.gather(1, chosen.unsqueeze(2).expand(-1, -1, patches.shape[2]))
    return torch.cat([prefix, patches], dim=1)


class PatchDropout(nn.Module):
    """In training, keep a random share ``1 - drop_prob`` of each sample's patch tokens, at least one, in their order;
    the ``num_prefix_tokens`` before them always stay. The identity in eval (FLIP, Li et al., 2022, arXiv 2212.00794).
    """

    script_as_is = True

    def __init__(self, drop_prob: float, num_prefix_tokens: int) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"patch_drop_rate must lie in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob
        self.num_prefix_tokens = num_prefix_tokens

    @property
    def drops(self) -> bool:
        """Whether patches are dropped in the present mode."""
        return self.drop_prob > 0.0 and self.training

    def forward(self, x: Tensor) -> Tensor:
        return _drop_patches(x, self.drop_prob, self.num_prefix_tokens) if self.drops else x

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


class LayerScale(nn.Module):
    """``x * gamma``, one factor a channel, all ``init_values`` at first (Touvron et al., 2021, arXiv 2103.17239)."""

    def __init__(
        self,
        dim: int,
        init_values: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    """``drop(fc2(drop(act(fc1(x)))))``."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block with a residual scale ``s``.

    ``x + drop_path(ls1(attn(norm1(x * s))) / s)``, then ``x + drop_path(ls2(mlp(norm2(x * s)))) / s``. The norms are
    ``norm_layer(dim, device=..., dtype=...)``; ``ls1`` and ``ls2`` are a :class:`LayerScale` each, or nothing with
    ``init_values=None``.
    """

    def __init__(
        self,
        attn: nn.Module,
        dim: int,
        mlp_hidden_dim: int,
        *,
        residual_scale: float = 1.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def layer_scale() -> nn.Module:
            return nn.Identity() if init_values is None else LayerScale(dim, init_values, **factory)

        self.norm1 = norm_layer(dim, **factory)
        self.attn = attn
        self.ls1 = layer_scale()
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = Mlp(dim, mlp_hidden_dim, drop=proj_drop, act_layer=act_layer, **factory)
        self.ls2 = layer_scale()
        self.drop_path = DropPath(drop_path)
        self.residual_scale = residual_scale

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``(batch, seqlen, dim)`` in and out; the masks go to the attention."""
        check_tokens(x, getattr(self.norm1, "normalized_shape", (None,))[-1])
        # Whatever stands in the place of the attention may take no mask.
        masks = {} if attn_mask is None and not is_causal else {"attn_mask": attn_mask, "is_causal": is_causal}
        scale = self.residual_scale
        if scale == 1.0:
            x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), **masks)))
            return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x * scale), **masks)) / scale)
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x * scale)))) / scale

    def extra_repr(self) -> str:
        return f"residual_scale={self.residual_scale}"


class PatchEmbed(nn.Module):
    """``(batch, in_chans, height, width) -> (batch, embed_dim, height // patch_size, width // patch_size)``.

    One convolution of stride ``patch_size``. With ``patch_norm``, the pixels of each patch and then its embedding
    pass through a LayerNorm, as in vit_pytorch.
    """

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        patch_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.pre_norm = nn.LayerNorm(in_chans * patch_size**2, **factory) if patch_norm else None
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, **factory)
        self.norm = nn.LayerNorm(embed_dim, **factory) if patch_norm else None

    def forward(self, images: Tensor) -> Tensor:
        if self.pre_norm is None or self.norm is None:
            return self.proj(images)
        patches = F.pixel_unshuffle(images, self.patch_size).permute(0, 2, 3, 1)
        normed = F.pixel_shuffle(self.pre_norm(patches).permute(0, 3, 1, 2), self.patch_size)
        return self.norm(self.proj(normed).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvStem(nn.Module):
    """The official convolutional patch embedding, with the shapes of :class:`PatchEmbed`.

    7x7 convolution of stride 2, batch norm, ReLU; 3x3, batch norm, ReLU; then patches of the half-size maps.

    Raises:
        ValueError: ``patch_size`` is odd.
    """

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if patch_size % 2:
            raise ValueError(f"patch_size must be even with a conv stem, which starts with stride 2, got {patch_size}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.conv1 = nn.Conv2d(in_chans, STEM_CHANNELS, 7, stride=2, padding=3, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS, **factory)
        self.conv2 = nn.Conv2d(STEM_CHANNELS, STEM_CHANNELS, 3, padding=1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(STEM_CHANNELS, **factory)
        self.proj = nn.Conv2d(STEM_CHANNELS, embed_dim, patch_size // 2, stride=patch_size // 2, **factory)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.bn1(self.conv1(images)))
        maps = F.relu(self.bn2(self.conv2(maps)))
        return self.proj(maps)


@fx.wrap
def _checked_images(x: Tensor, in_chans: int, patch_size: int, img_size: tuple[int, int] | None) -> Tensor:
    """The images, ``(batch, in_chans, *img_size)``; None: of any size that patches fill."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        # TorchScript formats no tuples.
        fits = x.ndim == 4 and x.shape[1] == in_chans
        if fits and img_size is not None:
            fits = x.shape[2] == img_size[0] and x.shape[3] == img_size[1]
        elif fits:
            fits = x.shape[2] % patch_size == 0 and x.shape[3] % patch_size == 0
        assert fits, "x must be images (batch, in_chans, height, width) of the model's channels and size"
    else:
        _refuse_other_images(x, in_chans, patch_size, img_size)
    return x


def _refuse_other_images(x: Any, in_chans: int, patch_size: int, img_size: tuple[int, int] | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor of images (batch, {in_chans}, height, width), got {class_name(x)}")
    channels_fit = x.ndim == 4 and x.shape[1] == in_chans
    if img_size is not None:
        if not channels_fit or (x.shape[2], x.shape[3]) != img_size:
            expected = (in_chans, *img_size)
            raise ValueError(
                f"x must be images of shape (batch, {', '.join(map(str, expected))}), got {tuple(x.shape)}; "
                "dynamic_img_size=True or set_input_size() admits other sizes"
            )
    elif not channels_fit or x.shape[2] % patch_size or x.shape[3] % patch_size:
        raise ValueError(
            f"x must be images of shape (batch, {in_chans}, height, width) with height and width divisible by "
            f"patch_size={patch_size}, got {tuple(x.shape)}"
        )


class DeepViT(nn.Module):
    """Vision transformer with re-attention: images ``(batch, in_chans, height, width)`` to logits
    ``(batch, num_classes)``. Paper: arXiv 2103.11886, sections 3 and 4.

    Args:
        img_size: height and width of the images, an int or a pair; multiples of ``patch_size``.
        patch_size: side of a patch in pixels.
        in_chans: channels of the images.
        num_classes: classes of the head; 0 leaves the head out, and the model returns pooled features.
        global_pool: what the head reads: "token", the class token; "avg", "max" or "avgmax" (half their sum) of the
            patch tokens; or "", every token.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias, qk_norm: as in any ViT.
        class_token: whether a learned token comes first; ``global_pool="token"`` needs it.
        reg_tokens: learned tokens without meaning of their own, after the class token (registers, arXiv 2309.16588).
        fc_norm: norm after pooling, instead of before it. Off unless it is asked for, as of the official models.
        pool_include_prefix: class token and registers are pooled with the patches.
        init_values: factors of a layer scale of each branch at first; None leaves it out.
        attn_head_dim: channels of a head; None means ``embed_dim // num_heads``.
        attention: "re", or "self" for plain softmax attention in every block: the ViT of the same shape.
        re_attention_blocks: the blocks that use re-attention, the others attending plainly: None for all, an int for
            the last so many, or a sequence of indices. Without meaning when ``attention="self"``.
        norm: the norm of the mixed maps, "batch", "layer" or None.
        output_scale: factor of the normalised maps.
        theta_init: initialisation of theta, see :class:`reattn.ReAttention`.
        pre_mix, post_mix, num_heads_out: which mixings there are, and to how many heads, see
            :class:`reattn.ReAttention`.
        residual_scale: the ``s`` of ``x + attn(LN(x * s)) / s``, in plain blocks too.
        conv_stem: embed patches by the official three-layer stem.
        patch_norm: LayerNorm before and after the patch embedding, as in vit_pytorch.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the positions are added.
        proj_drop_rate: dropout of the attention's output and inside the MLP.
        attn_drop_rate: dropout of the softmax.
        patch_drop_rate: share of the patches that a training step leaves out, drawn anew for each image.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        layer_norm_eps: eps of the LayerNorms of blocks, of ``qk_norm`` and of the final one.
        norm_layer: another class for these: ``norm_layer(channels, device=..., dtype=...)``, such as ``nn.RMSNorm``.
        act_layer: class of the MLP's activation.
        dynamic_img_size: take images of any size that ``patch_size`` divides, resampling the positions as needed.
        backend: backend of the re-attention operator, see :func:`reattn.re_attention`.
        device, dtype: of all parameters and buffers.

    Attributes:
        blocks: the blocks; the attention of block i is ``blocks[i].attn``.
        embed_dim: channels of a token; ``num_features`` and ``head_hidden_size`` are the same.
        num_prefix_tokens: tokens before the patches: the class token and the registers.
        default_cfg: what data pipelines ask of a model: input size, mean, std, crop, names of first and last layer.

    Raises:
        ValueError: an argument is out of range, named with what was expected and what came.
    """

    _registered_cfg: dict[str, Any]
    _model_args: dict[str, Any]

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pooling = "token",
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 12,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        *,
        qk_norm: bool = False,
        class_token: bool = True,
        reg_tokens: int = 0,
        fc_norm: bool = False,
        pool_include_prefix: bool = False,
        init_values: float | None = None,
        attn_head_dim: int | None = None,
        attention: Literal["re", "self"] = "re",
        re_attention_blocks: int | Sequence[int] | None = None,
        norm: Literal["batch", "layer"] | None = "batch",
        output_scale: float = 1.0,
        theta_init: Literal["conv", "identity", "normal"] = "conv",
        pre_mix: bool = False,
        post_mix: bool = True,
        num_heads_out: int | None = None,
        residual_scale: float = 1.0,
        conv_stem: bool = False,
        patch_norm: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_norm_eps: float = 1e-6,
        norm_layer: Callable[..., nn.Module] | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        dynamic_img_size: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if attention not in ("re", "self"):
            raise ValueError(f'attention must be "re" or "self", got {attention!r}')
        if residual_scale == 0.0:
            raise ValueError("residual_scale must not be 0: the residual branches are divided by it")
        if conv_stem and patch_norm:
            raise ValueError("patch_norm must be False with conv_stem=True, whose batch norms take its place, got True")
        if reg_tokens < 0:
            raise ValueError(f"reg_tokens must be 0 or more, got {reg_tokens}")
        for name, layer in (("norm_layer", norm_layer), ("act_layer", act_layer)):
            if layer is not None and not callable(layer):
                raise ValueError(f"{name} must be a class or function that makes a module, got {layer!r}")
        if norm_layer is not None and layer_norm_eps != 1e-6:
            raise ValueError(
                f"layer_norm_eps must be left out with norm_layer, which brings its own: partial(norm_layer, "
                f"eps={layer_norm_eps:g})"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.img_size = self._checked_img_size(img_size)
        self.num_classes = num_classes
        self.has_class_token = class_token
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.global_pool = self._checked_global_pool(global_pool)
        self.pool_include_prefix = pool_include_prefix
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self._registered_cfg = {}

        self.patch_embed: PatchEmbed | ConvStem
        if conv_stem:
            self.patch_embed = ConvStem(patch_size, in_chans, embed_dim, **factory)
        else:
            self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, patch_norm=patch_norm, **factory)

        def tokens(count: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(1, count, embed_dim, **factory)) if count else None

        grid_height, grid_width = self.grid_size
        self.cls_token = tokens(int(class_token))
        self.reg_token = tokens(reg_tokens)
        num_tokens = self.num_prefix_tokens + grid_height * grid_width
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, embed_dim, **factory))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.patch_drop = PatchDropout(patch_drop_rate, self.num_prefix_tokens)

        norm_layer = norm_layer or partial(nn.LayerNorm, eps=layer_norm_eps)
        re_attention = set(select_blocks(re_attention_blocks, depth, "re_attention_blocks"))
        if attention == "self":
            re_attention.clear()
        shared: dict[str, Any] = {
            "dim": embed_dim,
            "num_heads": num_heads,
            "qkv_bias": qkv_bias,
            "qk_norm": qk_norm,
            "attn_drop": attn_drop_rate,
            "proj_drop": proj_drop_rate,
            "attn_head_dim": attn_head_dim,
            "norm_layer": norm_layer,
            **factory,
        }

        def build_attention(index: int) -> nn.Module:
            if index not in re_attention:
                return SelfAttention(**shared)
            return ReAttention(
                norm=norm,
                output_scale=output_scale,
                theta_init=theta_init,
                pre_mix=pre_mix,
                post_mix=post_mix,
                num_heads_out=num_heads_out,
                backend=backend,
                **shared,
            )

        self.blocks = nn.ModuleList(
            Block(
                build_attention(index),
                embed_dim,
                int(embed_dim * mlp_ratio),
                residual_scale=residual_scale,
                proj_drop=proj_drop_rate,
                drop_path=drop_path_rate * index / max(depth - 1, 1),
                init_values=init_values,
                norm_layer=norm_layer,
                act_layer=act_layer,
                **factory,
            )
            for index in range(depth)
        )
        self.norm: nn.Module = nn.Identity() if fc_norm else norm_layer(embed_dim, **factory)
        self.fc_norm: nn.Module = norm_layer(embed_dim, **factory) if fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._build_head(num_classes)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{index}"} for index in range(depth)
        ]
        self._init_weights()

    def _checked_img_size(self, img_size: int | Sequence[int]) -> tuple[int, int]:
        height, width = to_pair(img_size, "img_size")
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"img_size must be divisible by patch_size={self.patch_size}, got {(height, width)}")
        return height, width

    def _checked_global_pool(self, global_pool: Pooling) -> Pooling:
        if global_pool not in get_args(Pooling):
            raise ValueError(f"global_pool must be one of {get_args(Pooling)}, got {global_pool!r}")
        if global_pool == "token" and not self.has_class_token:
            raise ValueError('global_pool must not be "token" with class_token=False, which leaves out that token')
        return global_pool

    def _build_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        return nn.Linear(self.embed_dim, num_classes, device=self.pos_embed.device, dtype=self.pos_embed.dtype)

    def _init_weights(self) -> None:
        for tokens in (self.pos_embed, self.cls_token, self.reg_token):
            if tokens is not None:
                nn.init.trunc_normal_(tokens, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                self._init_linear(module)

    @staticmethod
    def _init_linear(linear: nn.Linear) -> None:
        nn.init.trunc_normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)

    def reset_parameters(self) -> None:
        """Initialise every parameter and buffer afresh, as the constructor does (needed after ``to_empty``)."""
        for name, module in self.named_modules():
            if name and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self._init_weights()

    @property
    def grid_size(self) -> tuple[int, int]:
        """``(height, width)`` of the image in patches."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def default_cfg(self) -> dict[str, Any]:
        """The model as timm's data pipelines read it; ``input_size`` and ``num_classes`` are always the present ones,
        whatever it is set to."""
        present = {
            "num_classes": self.num_classes,
            "input_size": (self.in_chans, *self.img_size),
            "fixed_input_size": not self.dynamic_img_size,
        }
        defaults = {
            "pool_size": None,
            "crop_pct": 1.0 if min(self.img_size) >= 384 else 0.9,
            "interpolation": "bicubic",
            "mean": (0.5,) * self.in_chans,
            "std": (0.5,) * self.in_chans,
            "first_conv": "patch_embed.conv1" if isinstance(self.patch_embed, ConvStem) else "patch_embed.proj",
            "classifier": "head",
        }
        return defaults | self._registered_cfg | present

    @default_cfg.setter
    def default_cfg(self, cfg: dict[str, Any]) -> None:
        self._registered_cfg = dict(cfg)

    pretrained_cfg = default_cfg

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that optimizers should not decay, besides biases and norms."""
        return {"pos_embed", "cls_token"} | ({"reg_token"} if self.num_reg_tokens else set())

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for layer-wise learning rates.

        ``coarse`` changes nothing: a block is the unit either way.
        """
        return {
            "stem": r"^cls_token|^reg_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations.

        Gradients and running statistics are those of a step without it.
        """
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head: ``nn.Linear(embed_dim, num_classes)``, or ``nn.Identity`` without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Pooling | None = None) -> None:
        """Replace the head by a freshly initialised one; None keeps the pooling as it is."""
        if global_pool is not None:
            self.global_pool = self._checked_global_pool(global_pool)
        self.num_classes = num_classes
        self.head = self._build_head(num_classes)
        self.head.train(self.training)
        if isinstance(self.head, nn.Linear):
            self._init_linear(self.head)

    def set_input_size(self, img_size: int | Sequence[int] | None = None, patch_size: int | None = None) -> None:
        """Make the model take images of another size, resampling its positions; None leaves the size as it is.

        ``pos_embed`` becomes a new parameter when the grid changes: build the optimizer afterwards. Raises
        ``ValueError`` for another ``patch_size``.
        """
        if patch_size not in (None, self.patch_size):
            raise ValueError(f"patch_size must be None or the model's {self.patch_size}, got {patch_size}")
        old_grid = self.grid_size
        self.img_size = self._checked_img_size(self.img_size if img_size is None else img_size)
        if self.grid_size != old_grid:
            resampled = resample_pos_embed(self.pos_embed.detach(), self.grid_size, old_grid, self.num_prefix_tokens)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        # What timm notes down of a model that it builds.
        for note in ("_traits", "_model_args"):
            if hasattr(self, note):
                setattr(self, note, {**getattr(self, note), "img_size": self.img_size})

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens of the first block, ``(batch, num_prefix_tokens + grid_height * grid_width, embed_dim)``, fewer while
        patches are dropped, and the grid."""
        img_size = None if self.dynamic_img_size else self.img_size
        maps = self.patch_embed(_checked_images(x, self.in_chans, self.patch_size, img_size))
        grid = (maps.shape[2], maps.shape[3])
        pos_embed: Tensor = self.pos_embed
        if self.dynamic_img_size:
            pos_embed = resample_pos_embed(pos_embed, grid, self.grid_size, self.num_prefix_tokens)
        learned = [tokens for tokens in (self.cls_token, self.reg_token) if tokens is not None]
        prefix = [tokens.expand(maps.shape[0], -1, -1) for tokens in learned]
        tokens = torch.cat([*prefix, maps.flatten(2).transpose(1, 2)], dim=1)
        return self.patch_drop(self.pos_drop(tokens + pos_embed)), grid

    def _run_block(self, block: nn.Module, tokens: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        masks = () if attn_mask is None and not is_causal else (attn_mask, is_causal)
        if isinstance(attn_mask, Tensor) and self.patch_drop.drops:
            raise ValueError(
                f"attn_mask must be None while patch_drop_rate={self.patch_drop.drop_prob:g} drops patches in training"
            )
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpointed(block, tokens, *masks)
        return block(tokens, *masks)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images ``(batch, in_chans, height, width)`` to the tokens after the final norm, ``(batch, seqlen,
        embed_dim)``, the class token first. The masks, of ``seqlen`` tokens with it, go to every block: see
        :func:`reattn.re_attention`."""
        tokens, _ = self._embed(x)
        for block in self.blocks:
            tokens = self._run_block(block, tokens, attn_mask, is_causal)
        return self.norm(tokens)

    def pool(self, x: Tensor) -> Tensor:
        """What the head reads of the tokens ``(batch, seqlen, embed_dim)``: ``(batch, embed_dim)``, or all of them with
        ``global_pool=""``."""
        if self.global_pool == "":
            return x
        if self.global_pool == "token":
            return x[:, 0]
        if not self.pool_include_prefix:
            x = x[:, self.num_prefix_tokens :]
        if self.global_pool == "avg":
            return x.mean(dim=1)
        return x.amax(dim=1) if self.global_pool == "max" else 0.5 * (x.amax(dim=1) + x.mean(dim=1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the tokens of :meth:`forward_features` and classify: ``(batch, num_classes)``, or with ``pre_logits``
        the pooled features ``(batch, embed_dim)``; ``(batch, seqlen, ...)`` with ``global_pool=""``."""
        pooled = self.head_drop(self.fc_norm(self.pool(x)))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images ``(batch, in_chans, height, width)`` to logits ``(batch, num_classes)``; masks as in
        :meth:`forward_features`."""
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))

    def __prepare_scriptable__(self) -> nn.Module:
        """What :func:`torch.jit.script` compiles in the place of this module."""
        return scriptable(self)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Features of several blocks at once.

        Args:
            x: images ``(batch, in_chans, height, width)``.
            indices: whose outputs to return: None for all, an int for the last so many, or block indices.
            return_prefix_tokens: return pairs (patches, class token and registers ``(batch, num_prefix_tokens,
                embed_dim)``), if there are any.
            norm: apply the final norm to them.
            stop_early: run no block after the last index; the final tokens are then that block's.
            output_fmt: patch tokens as "NCHW", ``(batch, embed_dim, grid_height, grid_width)``, or "NLC",
                ``(batch, grid_height * grid_width, embed_dim)``.
            intermediates_only: leave out the final tokens.
            output_dict: return a dictionary with ``image_intermediates``, and what was asked for of
                ``image_intermediates_prefix`` and ``image_features``.
            attn_mask, is_causal: as in :meth:`forward_features`.

        Returns:
            ``(tokens, intermediates)``, the tokens as :meth:`forward_features` gives them, intermediates in the order
            of the blocks; or the intermediates alone; or the dictionary.

        Raises:
            ValueError: an index outside the model, an unknown ``output_fmt``, or "NCHW" while patches are dropped.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f'output_fmt must be "NCHW" or "NLC", got {output_fmt!r}')
        if output_fmt == "NCHW" and self.patch_drop.drops:
            raise ValueError(
                f'output_fmt must be "NLC" while patch_drop_rate={self.patch_drop.drop_prob:g} drops patches in '
                'training, got "NCHW"'
            )
        selected = select_blocks(indices, len(self.blocks), "indices")
        tokens, grid = self._embed(x)
        last = max(selected, default=-1) if stop_early else len(self.blocks) - 1
        intermediates: list[Any] = []
        prefixes: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index > last:
                break
            tokens = self._run_block(block, tokens, attn_mask, is_causal)
            if index in selected:
                features = self.norm(tokens) if norm else tokens
                patches = features[:, self.num_prefix_tokens :]
                intermediates.append(patches.transpose(1, 2).unflatten(2, grid) if output_fmt == "NCHW" else patches)
                prefixes.append(features[:, : self.num_prefix_tokens])
        has_prefixes = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": intermediates}
            if has_prefixes:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else result | {"image_features": self.norm(tokens)}
        if has_prefixes:
            intermediates = list(zip(intermediates, prefixes, strict=True))
        return intermediates if intermediates_only else (self.norm(tokens), intermediates)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list[Any]:
        """The intermediates of :meth:`forward_intermediates`, by the names that DINO gives its arguments: ``n`` are the
        indices, ``reshape`` says "NCHW" instead of "NLC"."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take away what :meth:`forward_intermediates` does not need for these blocks: those after the last of them,
        and with ``prune_norm`` the final norm, with ``prune_head`` pooling and head.

        Returns:
            The indices as ascending numbers from 0.

        Raises:
            ValueError: no index, or one outside the model.
        """
        selected = select_blocks(indices, len(self.blocks), "indices")
        if not selected:
            raise ValueError(f"indices must name a block at least, got {indices!r}")
        self.blocks = self.blocks[: selected[-1] + 1]
        self.feature_info = self.feature_info[: selected[-1] + 1]
        if prune_norm:
            self.norm = nn.Identity().train(self.training)
        if prune_head:
            self.fc_norm = nn.Identity().train(self.training)
            self.reset_classifier(0, "")
        return selected


def _named(build: Callable[..., DeepViT]) -> Callable[..., DeepViT]:
    """Has a model know what timm's ``save_for_hf`` writes: its architecture, and the arguments it was built with."""

    @wraps(build)
    def build_named(**overrides: Any) -> DeepViT:
        model = build(**overrides)
        model.default_cfg = {"architecture": build.__name__}
        model._model_args = {name: value for name, value in overrides.items() if name not in ("device", "dtype")}
        return model

    return build_named


@_named
def deepvit_16b(**overrides: Any) -> DeepViT:
    """DeepViT-16B: 24.43 M parameters, re-attention in all 16 blocks, 79.10 % top-1 as published."""
    return DeepViT(**{"embed_dim": 384, "depth": 16, **overrides})


@_named
def deepvit_24b(**overrides: Any) -> DeepViT:
    """DeepViT-24B: 36.26 M parameters, re-attention in all 24 blocks, 79.99 % top-1 as published."""
    return DeepViT(**{"embed_dim": 384, "depth": 24, **overrides})


@_named
def deepvit_32b(**overrides: Any) -> DeepViT:
    """DeepViT-32B: 48.10 M parameters, re-attention in all 32 blocks, 80.90 % top-1 as published."""
    return DeepViT(**{"embed_dim": 384, "depth": 32, **overrides})


@_named
def deepvit_s(**overrides: Any) -> DeepViT:
    """DeepViT-S: 27.31 M parameters, conv stem, re-attention in the last 5 of 16 blocks, 82.3 % top-1 as published."""
    config = {
        "embed_dim": 396,
        "depth": 16,
        "re_attention_blocks": min(5, overrides.get("depth", 16)),
        "output_scale": 33**-0.5,
        "residual_scale": 0.5,
        "conv_stem": True,
    }
    return DeepViT(**{**config, **overrides})


@_named
def deepvit_l(**overrides: Any) -> DeepViT:
    """DeepViT-L: 58.88 M parameters, conv stem, re-attention in the last 12 of 32 blocks, 83.1 % top-1 as published."""
    config = {
        "embed_dim": 420,
        "depth": 32,
        "re_attention_blocks": min(12, overrides.get("depth", 32)),
        "residual_scale": 0.5,
        "conv_stem": True,
    }
    return DeepViT(**{**config, **overrides})


@_named
def deepvit_l_384(**overrides: Any) -> DeepViT:
    """DeepViT-L for images of 384 pixels: 59.04 M parameters, 84.25 % top-1 as published."""
    return deepvit_l(**{"img_size": 384, **overrides})


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: DeepViT) -> dict[str, Tensor]:
    """A state dict whose positions were learned for another square image, resampled to those of ``model``; timm looks
    for it by this name. :func:`reattn.checkpoints.load_checkpoint` does more."""
    fitted = dict(state_dict)
    pos_embed = fitted.get("pos_embed")
    if pos_embed is not None and pos_embed.shape[1] != model.pos_embed.shape[1]:
        prefix = model.num_prefix_tokens
        fitted["pos_embed"] = resample_pos_embed(pos_embed, model.grid_size, num_prefix_tokens=prefix)
    return fitted


_MODELS: dict[str, Callable[..., DeepViT]] = {
    build.__name__: build for build in (deepvit_16b, deepvit_24b, deepvit_32b, deepvit_s, deepvit_l, deepvit_l_384)
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that :func:`create_model` knows, those matching a shell-style pattern."""
    return fnmatch.filter(sorted(_MODELS), pattern)


def create_model(name: str, **overrides: Any) -> DeepViT:
    """Build an official configuration by name.

    Args:
        name: one of :func:`list_models`.
        overrides: arguments of :class:`DeepViT` that replace those of the configuration.

    Raises:
        ValueError: no configuration has that name.
    """
    if name not in _MODELS:
        raise ValueError(f"name must be one of {', '.join(list_models())}, got {name!r}")
    return _MODELS[name](**overrides)
