"""A folder of images, prepared the way a model's configuration says (needs Pillow)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reattn.analysis.grid import image_size

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
_MODES = {1: "L", 3: "RGB"}


class UnreadableImageError(ValueError):
    """A file is not an image, a damaged one, or one whose pixels have no certain brightness."""


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to a model's input.

    Attributes:
        channels, height, width: of the input; 1 channel is greyscale, 3 are RGB.
        crop_pct: the share of the shorter side that the centre crop keeps.
        interpolation: of the resize: "nearest", "bilinear", "bicubic" or "lanczos".
        squash: resize both sides to fit, instead of keeping the aspect ratio.
        mean, std: of each channel, for pixels in [0, 1].

    Raises:
        ValueError: the channels or the interpolation are others than these.
    """

    channels: int
    height: int
    width: int
    crop_pct: float = 0.9
    interpolation: str = "bicubic"
    squash: bool = False
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.channels not in _MODES:
            raise ValueError(f"channels must be 1 or 3 to read image files, got {self.channels}")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {_INTERPOLATIONS}, got {self.interpolation!r}")

    @classmethod
    def of(cls, model: nn.Module) -> Preprocessing:
        """What ``model.pretrained_cfg`` or ``model.default_cfg`` says, as DeepViT and timm's models have it.

        Of a model that has neither, but an ``image_size`` of its own or in its ``config``, as in torchvision and
        transformers, the size alone is known: the rest is the defaults here.

        Raises:
            ValueError: nothing says how large the input is, or files cannot be read that way.
        """
        config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        size = image_size(model)
        if "input_size" not in config and size is not None:
            channels = getattr(getattr(model, "config", None), "num_channels", 3)
            return cls(channels, *size, crop_pct=1.0, mean=(0.5,) * channels, std=(0.5,) * channels)
        if "input_size" not in config:
            raise ValueError(
                "model must have a default_cfg or pretrained_cfg with an input_size, such as model.default_cfg = "
                f'{{"input_size": (3, 224, 224)}}, got {type(model).__name__} without'
            )
        channels, height, width = config["input_size"]
        # A timm model that was built for another size keeps the original's configuration.
        height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or (height, width)
        return cls(
            channels,
            height,
            width,
            crop_pct=config.get("crop_pct") or 0.9,
            interpolation=config.get("interpolation") or "bicubic",
            squash=config.get("crop_mode") == "squash",
            mean=tuple(config.get("mean") or (0.5,) * channels),
            std=tuple(config.get("std") or (0.5,) * channels),
        )

    def read(self, path: str | os.PathLike[str]) -> Tensor:
        """The image in a file as ``(channels, height, width)``, float32, turned upright as its EXIF says.

        Greyscale of 16 bits and of floating numbers in [0, 1] keeps its precision.

        Raises:
            ImportError: Pillow is missing.
            UnreadableImageError: the file cannot be read, is transparent somewhere, or has pixels of 32 bits that are
                not in [0, 1], so that none is known to be white.
        """
        image_module = import_pillow()
        with _opened(path) as opened:
            image, white = _with_white(opened, self.channels)
            if opened.format != "TIFF":  # which Pillow turns itself
                image = import_module("PIL.ImageOps").exif_transpose(image)
        wanted = math.floor(self.width / self.crop_pct), math.floor(self.height / self.crop_pct)
        if not self.squash:
            # The side that is relatively shorter gets exactly what is wanted.
            width, height = image.size
            if wanted[0] * height >= wanted[1] * width:
                wanted = wanted[0], wanted[0] * height // width
            else:
                wanted = wanted[1] * width // height, wanted[1]
        image = image.resize(wanted, image_module.Resampling[self.interpolation.upper()])
        left, top = round((wanted[0] - self.width) / 2), round((wanted[1] - self.height) / 2)
        image = image.crop((left, top, left + self.width, top + self.height))

        dtype = torch.float32 if image.mode == "F" else torch.uint8
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=dtype)
        pixels = pixels.view(self.height, self.width, -1).permute(2, 0, 1).expand(self.channels, -1, -1)
        # Bicubic and Lanczos resizing overshoots edges; in 8 bits that is cut off already.
        return ((pixels.float() / white).clamp(0, 1) - self._column(self.mean)) / self._column(self.std)

    def to_display(self, images: Tensor) -> Tensor:
        """Inputs ``(..., channels, height, width)`` as pixels in [0, 1] again."""
        mean, std = (self._column(numbers).to(images) for numbers in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)

    @staticmethod
    def _column(numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers)[:, None, None]


def import_pillow() -> Any:
    """``PIL.Image``; ``ImportError`` says how to install it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'reattn[analysis]'") from error
    return Image


def find_images(folder: str | os.PathLike[str], limit: int | None = None) -> list[Path]:
    """The image files below a folder, by their names' endings, sorted; ``limit`` takes so many evenly spread over them.

    Raises:
        ValueError: it is no folder, or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"images must be a folder, got {folder}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"images must be a folder with images ({', '.join(SUFFIXES)}), got none in {folder}")
    if limit is None or limit >= len(paths):
        return paths
    return [paths[index * len(paths) // limit] for index in range(limit)]


def check_images(paths: Sequence[Path]) -> None:
    """Opens every file; ``UnreadableImageError`` names the first that is no image, or none that can be read. Pixels are
    looked at in unusual modes alone."""
    for path in paths:
        with _opened(path) as opened:
            if opened.mode not in ("1", "L", "RGB", "CMYK") or "transparency" in opened.info:
                _with_white(opened, 3)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Pillow's image of a file; whatever goes wrong while it is read names the file."""
    image_module = import_pillow()
    try:
        # By its path some TIFF files would be mapped into memory, which Pillow forgets to turn.
        with open(path, "rb") as file, image_module.open(file) as opened:
            yield opened
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise UnreadableImageError(f"{os.fspath(path)} cannot be read as an image: {error}") from error


def _with_white(opened: Any, channels: int) -> tuple[Any, float]:
    """An image of ``channels`` channels of 8 bits, or of one of floats, and the number that is white in it."""
    mode, tags, transparent = opened.mode, getattr(opened, "tag_v2", {}), opened.info.get("transparency")
    if mode.startswith("I;16") or mode in ("I", "F"):
        image = (opened if mode in ("I", "F") else opened.convert("I")).convert("F")
        numbers = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32)
        low, high = (extreme.item() for extreme in numbers.aminmax())
        if mode == "F" and 0 <= low <= high <= 1:  # which NaN is not
            white = 1.0
        # 16 bits, which some releases of Pillow widen; TIFF has twelve, too.
        elif mode.startswith("I;16") or mode == "I" and opened.format in ("PNG", "PPM"):
            white = 2.0 ** tags.get(258, (16,))[0] - 1
        else:
            raise ValueError(
                f"which number is white must be known, got pixels from {low:g} to {high:g} in mode {mode}: save it "
                "with 8 or 16 bits, or as floating numbers in [0, 1]"
            )
        if transparent is not None and (numbers == transparent).any():
            raise _transparent(mode)
        # White is 0 in some TIFF files; of 8 bits Pillow turns them itself.
        return image.point(lambda pixel: pixel * -1 + white) if tags.get(262) == 0 else image, white
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or transparent is not None:
        opened = opened.convert("RGBA")
        if opened.getchannel("A").getextrema()[0] < 255:
            raise _transparent(mode)
    return opened.convert(_MODES[channels]), 255.0


def _transparent(mode: str) -> ValueError:
    return ValueError(
        f"what is transparent has no colour, got transparent pixels in mode {mode}: lay it on a background, "
        'such as Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))'
    )


def image_batches(paths: Sequence[Path], preprocessing: Preprocessing, batch_size: int) -> Iterator[Tensor]:
    """Batches ``(batch, channels, height, width)`` of at most ``batch_size`` images, read as they are asked for."""
    for start in range(0, len(paths), batch_size):
        yield torch.stack([preprocessing.read(path) for path in paths[start : start + batch_size]])
