"""Attention rollout (Abnar & Zuidema, 2020, arXiv 2005.00928, section 4): attention followed through the blocks."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from reattn.analysis.attentions import MapKind, check_kind
from reattn.analysis.collect import AttentionBlock, find_attentions, unknown_attentions, visit_blocks

Negative = Literal["abs", "clamp", "raise"]


@torch.no_grad()
def attention_rollout(
    model: nn.Module,
    images: Tensor,
    kind: MapKind = "re_attention",
    negative: Negative = "abs",
    residual: float = 0.5,
) -> Tensor:
    """How much of each input token reaches each output token, by the maps of all blocks multiplied.

    For each block the heads are averaged, rows are scaled to sum 1, and the residual branch is added:
    ``rollout = (residual * I + (1 - residual) * A) @ rollout``. With softmax maps that is the published method.

    Re-attention is outside of it: its mixed, normalised maps have entries below 0 and rows of any sum, where the method
    takes weights of an average. ``negative`` says what becomes of them, before heads are averaged, and scaling the rows
    discards what the norm did to their sum. With ``"abs"`` an entry counts by its size, whether it adds or takes away;
    with ``"clamp"`` what takes away counts for nothing. Neither is in the paper, both are heuristics.
    ``kind="softmax"`` follows the maps before mixing: as published, but these are not what the values are multiplied
    with.

    Args:
        model: as in :func:`visit_blocks`, which leaves it as it was; every block attends from all tokens to all, and
            the maps of all are known.
        images: the model's input, on its device.
        kind: as in :func:`visit_attention_maps`.
        negative: ``"abs"``, ``"clamp"``, or ``"raise"`` to refuse maps with entries below 0.
        residual: share of the residual branch, in [0, 1]; 0.5 in the paper.

    Returns:
        ``(batch, seqlen, seqlen)``, rows the outputs, each sums to 1; float32 (float64 for float64 maps). A row of a
        block that is all 0 passes its own token on.

    Raises:
        ValueError: an argument is none of these, maps are not square, of different sizes or of windows of the images,
            an attention layer is not known, there are entries below 0 with ``"raise"``, or as :func:`visit_blocks`.
    """
    check_kind(kind)
    if negative not in get_args(Negative):
        raise ValueError(f"negative must be one of {get_args(Negative)}, got {negative!r}")
    if not 0.0 <= residual <= 1.0:
        raise ValueError(f"residual must be in [0, 1], got {residual}")
    if unknown := unknown_attentions(model, find_attentions(model)):
        raise ValueError(f"model must hold no attention that the rollout would leave out, got {unknown}")
    rollout: Tensor | None = None

    def follow(block: AttentionBlock) -> None:
        nonlocal rollout
        step = rollout_step(block.maps(kind), negative, residual, f"block {block.index}")
        if len(step) != len(images):
            raise ValueError(
                f"a block must have one map for each of {len(images)} images, got {len(step)} in block {block.index}: "
                "there is no rollout of windows"
            )
        if rollout is not None and step.shape != rollout.shape:
            raise ValueError(
                f"every block must have as many tokens, got {rollout.shape[-1]}, "
                f"and {step.shape[-1]} in block {block.index}"
            )
        rollout = step if rollout is None else step @ rollout

    visit_blocks(model, images, follow)
    assert rollout is not None
    return rollout


def rollout_step(maps: Tensor, negative: Negative, residual: float, name: str) -> Tensor:
    """One block's factor: ``(batch, heads, seqlen, seqlen)`` to ``(batch, seqlen, seqlen)``."""
    if maps.shape[-1] != maps.shape[-2]:
        raise ValueError(f"maps must be square for a rollout, got {tuple(maps.shape)} in {name}")
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if negative == "raise" and bool((maps < 0).any()):
        raise ValueError(f"maps must not be negative with negative='raise', got {float(maps.min())} in {name}")
    weights = (maps.abs() if negative == "abs" else maps.clamp(min=0)).mean(dim=1)
    sums = weights.sum(dim=-1, keepdim=True)
    identity = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)
    weights = torch.where(sums > 0, weights / sums, identity)
    return residual * identity + (1 - residual) * weights
