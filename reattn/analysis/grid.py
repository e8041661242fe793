"""Which tokens of a model are patches of the image, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class TokenGrid:
    """``num_prefix_tokens`` tokens without a place, then ``height * width`` patches, row by row."""

    num_prefix_tokens: int
    height: int
    width: int

    def to_image(self, tokens: Tensor) -> Tensor:
        """The patches of ``tokens (..., seqlen)`` as ``(..., height, width)``."""
        return tokens[..., self.num_prefix_tokens :].unflatten(-1, (self.height, self.width))


def token_grid(
    model: nn.Module, seqlen: int, grid_size: Sequence[int] | None = None, num_prefix_tokens: int | None = None
) -> TokenGrid:
    """Where the tokens of ``model`` lie on the image.

    What is not given is taken from ``model.num_prefix_tokens`` and ``model.grid_size`` or
    ``model.patch_embed.grid_size``, as DeepViT and timm's models have them. Where these do not fit ``seqlen``, as with
    images of another size, the patches are taken to be a square behind the prefix; without a known prefix, behind none
    or one token.

    Args:
        seqlen: tokens of a sequence.
        grid_size: ``(height, width)`` in patches.
        num_prefix_tokens: leading tokens that are no patches, such as the class token.

    Raises:
        ValueError: no such grid has ``seqlen`` tokens; what was given is never replaced.
    """
    prefix = getattr(model, "num_prefix_tokens", None) if num_prefix_tokens is None else num_prefix_tokens
    prefixes = [prefix] if isinstance(prefix, int) else [0, 1]
    own = getattr(model, "grid_size", None) or getattr(getattr(model, "patch_embed", None), "grid_size", None)
    for size in (grid_size,) if grid_size is not None else (own, None):
        for count in prefixes:
            side = round(max(seqlen - count, 0) ** 0.5)
            height, width = (side, side) if size is None else size
            if height * width and count + height * width == seqlen:
                return TokenGrid(count, height, width)
    raise ValueError(
        f"grid_size and num_prefix_tokens must make {seqlen} tokens, got {grid_size or own} and {prefix}; "
        "where the model does not know them they have to be given"
    )
