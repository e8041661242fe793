"""What a block's attention writes, with and without re-attention, and what a token attends to, on the image's grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reattn.analysis.attentions import MapKind, check_kind
from reattn.analysis.collect import AttentionBlock, visit_blocks
from reattn.analysis.grid import TokenGrid, token_grid


@dataclass(frozen=True)
class FeatureMaps:
    """A block's maps times its values, heads merged, on the image's grid.

    Attributes:
        re_attention: with the maps that the block uses, ``(batch, heads * head_dim, height, width)``.
        softmax: with its maps before mixing; the same in plain attention.
    """

    re_attention: Tensor
    softmax: Tensor


def feature_maps(
    model: nn.Module,
    images: Tensor,
    blocks: Iterable[int] | None = None,
    grid_size: Sequence[int] | None = None,
    num_prefix_tokens: int | None = None,
) -> dict[int, FeatureMaps]:
    """Feature maps with and without re-attention: attention maps times values, before the output projection.

    "Without" is the same block with the same weights and inputs, its maps left unmixed; the model was trained with
    mixing, so this shows what mixing does to the features, not what a model trained without it would have.

    Args:
        model: as in :func:`visit_blocks`, which leaves it as it was.
        images: the model's input, on its device.
        blocks: indices of the blocks to keep, None for all.
        grid_size, num_prefix_tokens: see :func:`token_grid`.

    Returns:
        index -> :class:`FeatureMaps`, in the order of the blocks.

    Raises:
        ValueError: a block is not there, the grid or the values are not known, mixing changes the number of heads, or
            as :func:`visit_blocks`.
    """
    wanted = None if blocks is None else set(blocks)
    features: dict[int, FeatureMaps] = {}

    def visit(block: AttentionBlock) -> None:
        if wanted is not None and block.index not in wanted:
            return
        grid = token_grid(model, block.maps().shape[-2], grid_size, num_prefix_tokens, images.shape[-2:])
        features[block.index] = FeatureMaps(
            *(grid.to_image(block_features(block, kind).mT) for kind in ("re_attention", "softmax"))
        )

    visit_blocks(model, images, visit)
    _check_blocks(wanted, features)
    return features


def block_features(block: AttentionBlock, kind: MapKind) -> Tensor:
    """Maps times values with the heads merged: ``(batch, seqlen, heads * head_dim)``."""
    maps, values = block.maps(kind), block.values()
    if maps.shape[1] != values.shape[1]:
        raise ValueError(
            f"{kind} maps of {block.name} must have a head for each of the values' {values.shape[1]}, "
            f"got {maps.shape[1]}"
        )
    return (maps @ values).transpose(1, 2).flatten(2)


def token_similarity(features: Tensor) -> Tensor:
    """How alike the tokens of an image are: the mean cosine of every two of them.

    1 where all tokens point the same way, as features do whose maps have collapsed to an average.

    Args:
        features: ``(..., seqlen, channels)``, at least two tokens.

    Returns:
        ``(...,)`` in [-1, 1], float32 (float64 for float64 features); tokens that are zero count with 0.

    Raises:
        ValueError: there are fewer than two tokens.
    """
    if features.ndim < 2 or features.shape[-2] < 2:
        raise ValueError(
            f"features must have shape (..., seqlen, channels) with two tokens or more, got {tuple(features.shape)}"
        )
    dtype = torch.promote_types(features.dtype, torch.float32)
    units = F.normalize(features.to(dtype), dim=-1, eps=torch.finfo(dtype).tiny ** 0.5)
    seqlen = units.shape[-2]
    # The square of the sum holds every pair twice, and each token with itself.
    pairs = units.sum(dim=-2).square().sum(dim=-1) - units.square().sum(dim=(-2, -1))
    return pairs / (seqlen * (seqlen - 1))


def query_maps(
    model: nn.Module,
    images: Tensor,
    query: int = 0,
    blocks: Iterable[int] | None = None,
    kind: MapKind = "re_attention",
    grid_size: Sequence[int] | None = None,
    num_prefix_tokens: int | None = None,
) -> dict[int, Tensor]:
    """What one token attends to, for each head: a row of the maps, its patches on the image's grid.

    Args:
        model, images, blocks, grid_size, num_prefix_tokens: as in :func:`feature_maps`.
        query: the token, counted with the prefix tokens, so that 0 is the class token where there is one.
        kind: as in :func:`visit_attention_maps`; mixed, normalised maps have entries below 0.

    Returns:
        index -> ``(batch, heads, height, width)``, in the order of the blocks.

    Raises:
        ValueError: ``query`` is not a token, or as :func:`feature_maps` and :func:`visit_attention_maps`.
    """
    check_kind(kind)
    wanted = None if blocks is None else set(blocks)
    rows: dict[int, Tensor] = {}

    def visit(block: AttentionBlock) -> None:
        if wanted is not None and block.index not in wanted:
            return
        maps = block.maps(kind)
        if not 0 <= query < maps.shape[-2]:
            raise ValueError(f"query must be a token, at least 0 and below {maps.shape[-2]}, got {query}")
        grid: TokenGrid = token_grid(model, maps.shape[-1], grid_size, num_prefix_tokens, images.shape[-2:])
        # A copy: a view would keep the whole maps.
        rows[block.index] = grid.to_image(maps[:, :, query].clone())

    visit_blocks(model, images, visit)
    _check_blocks(wanted, rows)
    return rows


def _check_blocks(wanted: set[int] | None, visited: Iterable[int]) -> None:
    missing = sorted((wanted or set()) - set(visited))
    if missing:
        raise ValueError(f"blocks must be indices of attention blocks that run, got {missing}")
