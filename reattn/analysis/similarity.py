"""How alike the attention maps of a model's blocks are (DeepViT, arXiv 2103.11886, section 3)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MapKind = Literal["re_attention", "softmax"]


def column_similarity(maps_p: Tensor, maps_q: Tensor) -> Tensor:
    """Cosine between the columns of two blocks' maps: a token's contribution to every output, compared.

    Equivalent to ``cosine_similarity(maps_p, maps_q, dim=-2)``, computed in float32 or better.

    Args:
        maps_p, maps_q: ``(..., seqlen, seqlen_k)``, floating, of one shape.

    Returns:
        The paper's M: ``(..., seqlen_k)`` in [-1, 1], float32 (float64 for float64 maps); 0 where a column is zero.

    Raises:
        ValueError: the shapes differ, or are no maps.
    """
    if maps_p.ndim < 2 or maps_p.shape != maps_q.shape:
        raise ValueError(
            "maps_p and maps_q must have one shape (..., seqlen, seqlen_k), "
            f"got {tuple(maps_p.shape)} and {tuple(maps_q.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(maps_p.dtype, maps_q.dtype), torch.float32)
    # Columns that no output attends to are tiny, far below the default eps; at this one the squares are still exact.
    eps = torch.finfo(dtype).tiny ** 0.5
    return F.cosine_similarity(maps_p.to(dtype), maps_q.to(dtype), dim=-2, eps=eps)


def visit_attention_maps(
    model: nn.Module, images: Tensor, visit: Callable[[Tensor], None], kind: MapKind = "re_attention"
) -> None:
    """Runs ``model(images)`` in eval mode, without gradients, and hands each block's maps to ``visit`` on the way.

    Maps are computed when their block runs and not kept, so memory does not grow with depth. Parameters, running
    statistics, hooks and the train/eval mode of every submodule are afterwards what they were.

    Args:
        model: any module whose attentions have ``attention_maps(x) -> (softmax_maps, re_attention_maps)``, as
            :class:`reattn.ReAttention` and the plain attention of :class:`reattn.models.DeepViT` do.
        images: the model's input, on its device.
        visit: called once for each block, in the order they run, with ``(batch, heads, seqlen, seqlen)``.
        kind: ``"re_attention"``: the maps that the values are multiplied with, which is what the paper compares: mixed
            and normalised in re-attention, the softmax in plain attention. ``"softmax"``: the maps before mixing.

    Raises:
        ValueError: ``kind`` is unknown, or ``model`` holds no such attention.
    """
    if kind not in get_args(MapKind):
        raise ValueError(f"kind must be one of {get_args(MapKind)}, got {kind!r}")
    attentions = [module for module in model.modules() if callable(getattr(module, "attention_maps", None))]
    if not attentions:
        raise ValueError(f"model must hold modules with a method attention_maps, got none in {type(model).__name__}")

    def visit_block(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        softmax_maps, re_attention_maps = attention.attention_maps(*args, **kwargs)
        visit(softmax_maps if kind == "softmax" else re_attention_maps)

    modes = [(module, module.training) for module in model.modules()]
    hooks = [attention.register_forward_pre_hook(visit_block, with_kwargs=True) for attention in attentions]
    try:
        # A graph compiled before the hooks were there would run without them.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        # One by one, because parts of a model may be frozen in eval mode.
        for module, training in modes:
            module.training = training


def block_similarity(
    model: nn.Module, images: Tensor, distances: Iterable[int] = (1,), kind: MapKind = "re_attention"
) -> dict[int, Tensor]:
    """Similarity of the attention maps of blocks p and p + k, for every block p and each distance k.

    Equivalent to ``column_similarity(maps[p], maps[p + k]).mean()``: the paper's M, averaged over batch, heads and
    tokens. As many blocks' maps are held at a time as the largest distance needs.

    Softmax maps are positive, so that their cosine is near 1 wherever attention is spread evenly; a norm that centres
    the maps lowers it by that alone. ``kind="softmax"`` compares re-attention with plain attention like with like.

    Args:
        model, images, kind: as in :func:`visit_attention_maps`, which leaves the model as it was.
        distances: positive ints, smaller than the number of blocks.

    Returns:
        distance k -> ``(blocks - k,)``, entry p for blocks p and p + k; float32 (float64 for float64 maps), on the
        device of the maps.

    Raises:
        ValueError: ``distances`` does not fit, two blocks' maps differ in shape, or as :func:`visit_attention_maps`.
    """
    distances = tuple(distances)
    if not distances or min(distances) < 1:
        raise ValueError(f"distances must be positive ints, at least one, got {distances}")
    similarities: dict[int, list[Tensor]] = {distance: [] for distance in distances}
    previous: deque[Tensor] = deque(maxlen=max(distances))

    def compare(maps: Tensor) -> None:
        for distance, similarity in similarities.items():
            if distance <= len(previous):
                similarity.append(column_similarity(previous[-distance], maps).mean())
        previous.append(maps)

    visit_attention_maps(model, images, compare, kind)
    if not all(similarities.values()):
        raise ValueError(f"distances must be smaller than the number of attention blocks, got {distances}")
    return {distance: torch.stack(similarity) for distance, similarity in similarities.items()}


def similar_blocks(similarities: Mapping[int, Tensor], threshold: float = 0.8) -> dict[int, tuple[int, float]]:
    """For each distance, how many blocks are similar to the one that far on, and their share of all blocks.

    A block counts when its similarity exceeds ``threshold`` (the paper's 0.8). The share is of all the model's blocks,
    as in the paper: the last ones, which have no partner, count as not similar.

    Args:
        similarities: what :func:`block_similarity` returns: distance k -> ``(blocks - k,)``.
        threshold: a cosine.

    Returns:
        distance k -> (number, share).
    """
    counts = {distance: int((similarity > threshold).sum()) for distance, similarity in similarities.items()}
    return {distance: (count, count / (len(similarities[distance]) + distance)) for distance, count in counts.items()}
