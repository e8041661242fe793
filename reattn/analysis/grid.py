"""Which tokens of a model are patches of the image, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

# Parameters of torchvision and transformers, each of a token or of several.
_PREFIX = ("class_token", "cls_token", "class_embedding", "distillation_token", "register_tokens")
_SUFFIX = ("detection_tokens",)


@dataclass(frozen=True)
class TokenGrid:
    """``num_prefix_tokens`` tokens without a place, then ``height * width`` patches, row by row; what follows, such as
    detection tokens, has no place either."""

    num_prefix_tokens: int
    height: int
    width: int

    def to_image(self, tokens: Tensor) -> Tensor:
        """The patches of ``tokens (..., seqlen)`` as ``(..., height, width)``."""
        patches = tokens.narrow(-1, self.num_prefix_tokens, self.height * self.width)
        return patches.unflatten(-1, (self.height, self.width))

    def place(self, token: int) -> tuple[int, int] | None:
        """Row and column of a token; None of one without a place."""
        patch = token - self.num_prefix_tokens
        return divmod(patch, self.width) if 0 <= patch < self.height * self.width else None


def token_grid(
    model: nn.Module,
    seqlen: int,
    grid_size: Sequence[int] | None = None,
    num_prefix_tokens: int | None = None,
    input_size: Sequence[int] | None = None,
) -> TokenGrid:
    """Where the tokens of ``model`` lie on the image.

    What is not given is taken from ``model.num_prefix_tokens`` and ``model.grid_size`` or
    ``model.patch_embed.grid_size``, as DeepViT and timm's models have them, from ``image_size`` and ``patch_size`` of
    the model or its ``config``, as torchvision and transformers have them, and from the class, distillation and
    register tokens among the parameters of such a model; detection tokens come last. Where the grid alone has
    ``seqlen`` patches there is no prefix, as where CaiT's class token joins later. Where these do not fit ``seqlen``,
    as with images of another size, the patches are taken to be a square behind the prefix; without a known prefix,
    behind none or one token.

    Args:
        seqlen: tokens of a sequence.
        grid_size: ``(height, width)`` in patches.
        num_prefix_tokens: leading tokens that are no patches, such as the class token.
        input_size: height and width of the images; where they are the model's own, no other grid is tried.

    Raises:
        ValueError: no such grid has ``seqlen`` tokens; what was given is never replaced.
    """
    embed = getattr(model, "patch_embed", None)
    own = getattr(model, "grid_size", None) or getattr(embed, "grid_size", None)
    prefix = getattr(model, "num_prefix_tokens", None) if num_prefix_tokens is None else num_prefix_tokens
    if own is None:
        own = _patches(model)
        prefix = _count_tokens(model, _PREFIX) if own and prefix is None else prefix
    prefixes = [prefix] if isinstance(prefix, int) else [0, 1]
    suffix = _count_tokens(model, _SUFFIX)
    own_size = image_size(model) or getattr(embed, "img_size", None) or getattr(model, "img_size", None)
    fed_its_own = own and input_size and tuple(input_size) == own_size
    for size in (grid_size,) if grid_size is not None else (own,) if fed_its_own else (own, None):
        for count in prefixes if size is None or num_prefix_tokens is not None else [*prefixes, 0]:
            side = round(max(seqlen - count - suffix, 0) ** 0.5)
            height, width = (side, side) if size is None else size
            if height * width and count + height * width + suffix == seqlen:
                return TokenGrid(count, height, width)
    raise ValueError(
        f"grid_size and num_prefix_tokens must make {seqlen} tokens, got {grid_size or own} and {prefix}; "
        "where the model does not know them they have to be given"
    )


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images of a model of torchvision or transformers."""
    return _sides(model, "image_size")


def _patches(model: nn.Module) -> tuple[int, int] | None:
    image, patch = image_size(model), _sides(model, "patch_size")
    return (image[0] // patch[0], image[1] // patch[1]) if image and patch else None


def _sides(model: nn.Module, name: str) -> tuple[int, int] | None:
    size = getattr(model, name, None) or getattr(getattr(model, "config", None), name, None)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, Sequence) and len(size) == 2 else None


def _count_tokens(model: nn.Module, names: tuple[str, ...]) -> int:
    """One of each kind: several of them, such as an encoder's and a decoder's, have the same names."""
    tokens = {path.split(".")[-1]: p for path, p in reversed([*model.named_parameters()]) if path.endswith(names)}
    return sum(p.numel() // p.shape[-1] for p in tokens.values())
