"""All numbers of a model's attention collapse in one go through the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from reattn.analysis.attentions import MapKind
from reattn.analysis.collect import AttentionBlock, Batches, visit_blocks
from reattn.analysis.features import block_features, token_similarity
from reattn.analysis.similarity import HELD_BLOCKS, RunningMean, batch_head_similarity, batch_matrices
from reattn.foreign import iterate_batches


@dataclass(frozen=True)
class BlockInfo:
    """An attention as it ran: its path in the model, class, heads, tokens, and whether its maps are mixed."""

    name: str
    attention: str
    heads: int
    seqlen: int
    mixes: bool


@dataclass(frozen=True)
class Measurements:
    """What :func:`measure_attention` found, averaged over images.

    Attributes:
        images: how many.
        blocks: kind of maps -> ``(blocks, blocks)``, see :func:`similarity_matrix`.
        heads: kind of maps -> for each block ``(heads, heads)``, see :func:`head_similarity`.
        tokens: kind of maps -> for each block, without dimensions, :func:`token_similarity` of maps times values.
    """

    images: int
    blocks: dict[MapKind, Tensor]
    heads: dict[MapKind, list[Tensor]]
    tokens: dict[MapKind, list[Tensor]]


def describe_blocks(model: nn.Module, images: Tensor) -> list[BlockInfo]:
    """The attentions of ``model`` in the order they run on ``images``; errors as in :func:`visit_blocks`."""
    blocks: list[BlockInfo] = []

    def describe(block: AttentionBlock) -> None:
        _, heads, seqlen, _ = block.maps().shape
        blocks.append(BlockInfo(block.name, type(block.module).__name__, heads, seqlen, block.mixes))

    visit_blocks(model, images, describe)
    return blocks


@dataclass
class _Means:
    blocks: RunningMean = field(default_factory=RunningMean)
    heads: dict[int, RunningMean] = field(default_factory=dict)
    tokens: dict[int, RunningMean] = field(default_factory=dict)


def measure_attention(
    model: nn.Module,
    images: Batches,
    kinds: tuple[MapKind, ...] = ("re_attention", "softmax"),
    held_blocks: int = HELD_BLOCKS,
    progress: Callable[[int], None] | None = None,
) -> Measurements:
    """Similarity of blocks, of heads and of tokens, for several kinds of maps, in one go through ``images``.

    Args:
        model, images, held_blocks: as in :func:`similarity_matrix`.
        kinds: of maps, as in :func:`visit_attention_maps`.
        progress: called after each batch with its number of images.

    Raises:
        ValueError: as :func:`similarity_matrix`, or the values of a block are not known.
    """
    means = {kind: _Means() for kind in kinds}
    count = 0

    def visit(block: AttentionBlock) -> None:
        for kind, mean in means.items():
            maps = block.maps(kind)
            tokens = token_similarity(block_features(block, kind)).mean()
            mean.heads.setdefault(block.index, RunningMean()).add(batch_head_similarity(maps), len(maps))
            mean.tokens.setdefault(block.index, RunningMean()).add(tokens, len(maps))

    for batch in iterate_batches(images, model):
        for kind, matrix in batch_matrices(model, batch, kinds, held_blocks, visit).items():
            means[kind].blocks.add(matrix, len(batch))
        count += len(batch)
        if progress is not None:
            progress(len(batch))
    return Measurements(
        images=count,
        blocks={kind: mean.blocks.result() for kind, mean in means.items()},
        heads={kind: [entry.result() for entry in mean.heads.values()] for kind, mean in means.items()},
        tokens={kind: [entry.result() for entry in mean.tokens.values()] for kind, mean in means.items()},
    )
