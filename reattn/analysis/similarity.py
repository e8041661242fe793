"""How alike attention maps are, between blocks and between heads (DeepViT, arXiv 2103.11886, section 3)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reattn.analysis.attentions import MapKind, check_kind
from reattn.analysis.collect import AttentionBlock, Batches, visit_attention_maps, visit_blocks
from reattn.foreign import iterate_batches

HELD_BLOCKS = 8


class RunningMean:
    """The weighted mean of tensors of one shape that come one after the other."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.weight = 0

    def add(self, value: Tensor, weight: int) -> None:
        self.weight += weight
        self.mean = value if self.mean is None else self.mean + (value - self.mean) * (weight / self.weight)

    def result(self) -> Tensor:
        if self.mean is None:
            raise ValueError("batches must hold at least one batch, got none")
        return self.mean


def column_similarity(maps_p: Tensor, maps_q: Tensor) -> Tensor:
    """Cosine between the columns of two blocks' maps: a token's contribution to every output, compared.

    Equivalent to ``cosine_similarity(maps_p, maps_q, dim=-2)``, computed in float32 or better.

    Args:
        maps_p, maps_q: ``(..., seqlen, seqlen_k)``, floating, of one shape.

    Returns:
        ``(..., seqlen_k)``, the paper's M, in [-1, 1], float32 (float64 for float64 maps); 0 where a column is zero.

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


def unit_columns(maps: Tensor) -> Tensor:
    """``maps (..., seqlen, seqlen_k)`` with columns of length 1, or 0 where they are zero, in float32 or better."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return F.normalize(maps, dim=-2, eps=torch.finfo(maps.dtype).tiny ** 0.5)


def block_similarity(
    model: nn.Module, images: Batches, distances: Iterable[int] = (1,), kind: MapKind = "re_attention"
) -> dict[int, Tensor]:
    """Similarity of the attention maps of blocks p and p + k, for every block p and each distance k.

    Equivalent to ``column_similarity(maps[p], maps[p + k]).mean()``: the paper's M, averaged over images, heads and
    tokens. As many blocks' maps are held at a time as the largest distance needs, of one batch.

    Softmax maps are positive, so that their cosine is near 1 wherever attention is spread evenly; a norm that centres
    the maps lowers it by that alone. ``kind="softmax"`` compares re-attention with plain attention like with like.

    Args:
        model, kind: as in :func:`visit_attention_maps`, which leaves the model as it was.
        images: the model's input, or an iterable of batches, such as a DataLoader, each a tensor, a tuple or list that
            begins with one, or, as transformers has it, a mapping with one under ``"pixel_values"``.
        distances: positive ints, smaller than the number of blocks.

    Returns:
        distance k -> ``(blocks - k,)``, entry p for blocks p and p + k; float32 (float64 for float64 maps), on the
        device of the maps.

    Raises:
        ValueError: ``distances`` does not fit, ``images`` holds no batch, two blocks' maps differ in shape, or as
            :func:`visit_attention_maps`.
    """
    distances = tuple(distances)
    if not distances or min(distances) < 1:
        raise ValueError(f"distances must be positive ints, at least one, got {distances}")
    means = {distance: RunningMean() for distance in distances}
    for batch in iterate_batches(images, model):
        similarities: dict[int, list[Tensor]] = {distance: [] for distance in distances}
        visit_attention_maps(model, batch, _neighbours(similarities), kind)
        if not all(similarities.values()):
            raise ValueError(f"distances must be smaller than the number of attention blocks, got {distances}")
        for distance, similarity in similarities.items():
            means[distance].add(torch.stack(similarity), len(batch))
    return {distance: mean.result() for distance, mean in means.items()}


def _neighbours(similarities: Mapping[int, list[Tensor]]) -> Callable[[Tensor], None]:
    """A visitor that compares each block's maps with those of earlier blocks, and appends to their distance's list."""
    previous: deque[Tensor] = deque(maxlen=max(similarities))

    def compare(maps: Tensor) -> None:
        for distance, similarity in similarities.items():
            if distance <= len(previous):
                similarity.append(column_similarity(previous[-distance], maps).mean())
        previous.append(maps)

    return compare


def similarity_matrix(
    model: nn.Module, images: Batches, kind: MapKind = "re_attention", held_blocks: int = HELD_BLOCKS
) -> Tensor:
    """Similarity of the attention maps of every two blocks: the paper's M, averaged over images, heads and tokens.

    Its k-th diagonal is :func:`block_similarity` at distance k. At most ``held_blocks + 1`` blocks' maps are held at a
    time, of one batch; a deeper model runs again for the next ``held_blocks``.

    Args:
        model, images, kind: as in :func:`block_similarity`.
        held_blocks: positive; more take memory and save time.

    Returns:
        ``(blocks, blocks)``, symmetric, the diagonal 1 but for columns that are zero; float32 (float64 for float64
        maps), on the device of the maps.

    Raises:
        ValueError: as :func:`block_similarity`, or ``held_blocks`` is not positive.
    """
    mean = RunningMean()
    for batch in iterate_batches(images, model):
        mean.add(batch_matrices(model, batch, (kind,), held_blocks)[kind], len(batch))
    return mean.result()


def batch_matrices(
    model: nn.Module,
    images: Tensor,
    kinds: Iterable[MapKind],
    held_blocks: int = HELD_BLOCKS,
    visit: Callable[[AttentionBlock], None] | None = None,
) -> dict[MapKind, Tensor]:
    """:func:`similarity_matrix` of one batch, for several kinds at once; ``visit`` sees each block once on the way."""
    if held_blocks < 1:
        raise ValueError(f"held_blocks must be positive, got {held_blocks}")
    kinds = tuple(kinds)
    for kind in kinds:
        check_kind(kind)
    cosines: dict[MapKind, dict[tuple[int, int], Tensor]] = {kind: {} for kind in kinds}
    first = 0
    blocks = _compare_from(first, model, images, cosines, held_blocks, visit)
    while (first := first + held_blocks) < blocks:
        _compare_from(first, model, images, cosines, held_blocks, None)
    return {kind: _symmetric(entries, blocks) for kind, entries in cosines.items()}


def _compare_from(
    first: int,
    model: nn.Module,
    images: Tensor,
    cosines: Mapping[MapKind, dict[tuple[int, int], Tensor]],
    held_blocks: int,
    visit: Callable[[AttentionBlock], None] | None,
) -> int:
    """Compares blocks ``first`` to ``first + held_blocks - 1`` with themselves and all later ones: a forward pass."""
    held: dict[MapKind, dict[int, Tensor]] = {kind: {} for kind in cosines}
    blocks = 0

    def compare(block: AttentionBlock) -> None:
        nonlocal blocks
        blocks = block.index + 1
        if visit is not None:
            visit(block)
        if block.index < first:
            return
        for kind, entries in cosines.items():
            units = unit_columns(block.maps(kind))
            if block.index < first + held_blocks:
                held[kind][block.index] = units
            for index, earlier in held[kind].items():
                if earlier.shape != units.shape:
                    raise ValueError(
                        "blocks must have maps of one shape to be compared, got "
                        f"{tuple(earlier.shape)} in block {index} and {tuple(units.shape)} in block {block.index}"
                    )
                entries[index, block.index] = torch.linalg.vecdot(earlier, units, dim=-2).mean()

    visit_blocks(model, images, compare)
    return blocks


def _symmetric(entries: Mapping[tuple[int, int], Tensor], blocks: int) -> Tensor:
    rows = [[entries[min(p, q), max(p, q)] for q in range(blocks)] for p in range(blocks)]
    return torch.stack([torch.stack(row) for row in rows])


def head_similarity(model: nn.Module, images: Batches, kind: MapKind = "re_attention") -> list[Tensor]:
    """Similarity of the maps of every two heads of a block, for each block: the paper's M between heads.

    Equivalent to ``column_similarity(maps[:, g], maps[:, h]).mean()``. One block's maps are held at a time.

    Args:
        model, images, kind: as in :func:`block_similarity`.

    Returns:
        For each block ``(heads, heads)``, symmetric; dtype and device as in :func:`similarity_matrix`.

    Raises:
        ValueError: as :func:`visit_attention_maps`, or ``images`` holds no batch.
    """
    means: list[RunningMean] = []
    for batch in iterate_batches(images, model):
        similarities = _each_block(model, batch, kind)
        means = means or [RunningMean() for _ in similarities]
        for mean, similarity in zip(means, similarities, strict=True):
            mean.add(similarity, len(batch))
    if not means:
        raise ValueError("images must hold at least one batch, got none")
    return [mean.result() for mean in means]


def _each_block(model: nn.Module, images: Tensor, kind: MapKind) -> list[Tensor]:
    similarities: list[Tensor] = []
    visit_attention_maps(model, images, lambda maps: similarities.append(batch_head_similarity(maps)), kind)
    return similarities


def batch_head_similarity(maps: Tensor) -> Tensor:
    """:func:`head_similarity` of one block's maps, ``(batch, heads, seqlen, seqlen_k)``: ``(heads, heads)``."""
    units = unit_columns(maps).flatten(2)
    return (units @ units.mT).mean(dim=0) / maps.shape[-1]


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


def similar_heads(similarity: Tensor, threshold: float = 0.5) -> tuple[int, float]:
    """How many pairs of a block's heads are similar, and their share of all its pairs.

    Args:
        similarity: one entry of what :func:`head_similarity` returns: ``(heads, heads)``.
        threshold: a cosine that a pair has to exceed (the paper's 0.5).

    Returns:
        (number, share); the share of a single head is 0.

    Raises:
        ValueError: ``similarity`` is not square.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity must have shape (heads, heads), got {tuple(similarity.shape)}")
    heads = len(similarity)
    count = int((similarity > threshold).triu(diagonal=1).sum())
    return count, count / max(heads * (heads - 1) // 2, 1)


def at_distances(matrix: Tensor, distances: Iterable[int] = (1, 2, 3)) -> dict[int, Tensor]:
    """The diagonals of :func:`similarity_matrix` in the form of :func:`block_similarity`.

    Args:
        matrix: ``(blocks, blocks)``.
        distances: positive ints, smaller than the number of blocks.

    Raises:
        ValueError: a distance does not fit.
    """
    distances = tuple(distances)
    outside = [distance for distance in distances if not 1 <= distance < len(matrix)]
    if outside:
        raise ValueError(f"distances must be positive and smaller than the {len(matrix)} blocks, got {outside}")
    return {distance: matrix.diagonal(distance) for distance in distances}
