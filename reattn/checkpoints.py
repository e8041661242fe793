"""Load whole DeepViT checkpoints, of whichever code base wrote them, into :class:`reattn.models.DeepViT`.

Layouts understood: ours, the official DeepViT code's, and vit_pytorch's (all its published revisions).
"""

import logging
import os
import pickle
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reattn.layouts import translate
from reattn.models.deepvit import DeepViT, resample_pos_embed

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]

_EMA_ENTRIES = ("state_dict_ema", "model_ema")
_ENTRIES = ("state_dict", "model")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")

_OFFICIAL_ATTENTION = {
    "theta": "reatten_matrix.weight",
    "theta_bias": "reatten_matrix.bias",
    "head_norm": "var_norm",
}
_SECOND_FORM_MODEL = {
    "cls_token": "cls_token",
    "pos_embedding": "pos_embed",
    "mlp_head.0": "norm",
    "mlp_head.1": "head",
}


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_checkpoint` did.

    Attributes:
        source: the entry of the file that was read, such as "state_dict_ema"; "" for a plain state dict.
        layout: "reattn", "official" or "vit_pytorch".
        missing: parameters and buffers of the model that the checkpoint does not hold.
        unexpected: keys of the checkpoint, as they stand there, that the model has no place for.
        mismatched: key of the model -> (shape in the checkpoint, shape in the model).
        resampled_pos_embed: (grid in the checkpoint, grid of the model) where the positions were resampled, else None.
        head_kept: the checkpoint counts other classes, so that the model's head was left as it was.
    """

    source: str
    layout: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    resampled_pos_embed: tuple[tuple[int, int], tuple[int, int]] | None = None
    head_kept: bool = False


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The contents of a checkpoint file on the CPU: safetensors by its ending, anything else by ``torch.load``.

    Nothing in the file is executed: ``torch.load`` runs with ``weights_only=True``, extended only by the plain
    ``argparse.Namespace`` in which training scripts keep their options.

    Raises:
        ImportError: a ``.safetensors`` file, and the safetensors package is not installed.
        ValueError: the file is damaged, asks for anything but tensors and plain containers, or holds no mapping.
    """
    path = os.fspath(path)
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"reading {path} needs the safetensors package: pip install safetensors") from error
        return load_file(path, device="cpu")
    try:
        with torch.serialization.safe_globals([Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} cannot be read with weights_only=True: {error}") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} must hold a mapping of names to tensors, got {type(checkpoint).__name__}")
    return checkpoint


def select_state_dict(checkpoint: Mapping[str, Any], prefer_ema: bool = True) -> tuple[str, dict[str, Tensor]]:
    """The weights inside a checkpoint, freed of the prefixes that DDP and ``torch.compile`` put before their names.

    Args:
        checkpoint: a plain state dict, or a mapping with one under "state_dict_ema", "model_ema", "state_dict" or
            "model".
        prefer_ema: take the exponential moving average first, where there is one; False takes it last.

    Returns:
        The name of the entry, "" for a plain state dict, and the state dict.

    Raises:
        ValueError: no state dict is found, or two names become one when their prefixes go.
    """
    entries = (*_EMA_ENTRIES, *_ENTRIES) if prefer_ema else (*_ENTRIES, *_EMA_ENTRIES)
    source = next((name for name in entries if _is_state_dict(checkpoint.get(name))), "")
    state_dict = checkpoint[source] if source else checkpoint
    if not _is_state_dict(state_dict):
        raise ValueError(
            f"checkpoint must be a state dict or hold one under {', '.join(entries)}, "
            f"got a mapping with the keys {list(checkpoint)[:10]}"
        )
    stripped: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name = _strip_prefixes(key)
        if name in stripped:
            raise ValueError(f"checkpoint holds {name!r} more than once, under different prefixes")
        stripped[name] = tensor
    return source, stripped


def _is_state_dict(entry: Any) -> bool:
    return isinstance(entry, Mapping) and len(entry) > 0 and all(isinstance(value, Tensor) for value in entry.values())


def _strip_prefixes(key: str) -> str:
    while key.startswith(_WRAPPER_PREFIXES):
        key = key.split(".", 1)[1]
    return key


def _rename(key: str, names: Mapping[str, str]) -> str:
    for foreign, ours in names.items():
        if key == foreign or key.startswith(foreign + "."):
            return ours + key[len(foreign) :]
    return key


def _convert_attention(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    match = re.match(r"blocks\.\d+\.attn\.", key)
    if match is None or (key.endswith("reatten_matrix.weight") and tensor.ndim != 4):
        return key, tensor
    entry = {key: tensor}
    translate(entry, match.group(), second_form=False)
    return entry.popitem()


def _second_form_names(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """vit_pytorch's keys -> ours, but for the attention's own. Its revisions differ in where the LayerNorms sit: in
    wrappers around the attention and the feed forward (``fn.norm``), or inside both and around the patch embedding."""
    norm_in_feed_forward = any(
        re.fullmatch(r"transformer\.layers\.\d+\.1\.(fn\.)*net\.0\.weight", key) and tensor.ndim == 1
        for key, tensor in state_dict.items()
    )
    feed_forward = {"norm": "norm2", "net.0": "mlp.fc1", "net.3": "mlp.fc2"}
    if norm_in_feed_forward:
        feed_forward = {"net.0": "norm2", "net.1": "mlp.fc1", "net.4": "mlp.fc2"}
    patch_embedding = {"to_patch_embedding.1": "patch_embed.proj"}
    if "to_patch_embedding.2.weight" in state_dict:
        patch_embedding = {
            "to_patch_embedding.1": "patch_embed.pre_norm",
            "to_patch_embedding.2": "patch_embed.proj",
            "to_patch_embedding.3": "patch_embed.norm",
        }

    names: dict[str, str] = {}
    for key in state_dict:
        match = re.fullmatch(r"transformer\.layers\.(\d+)\.([01])\.(?:fn\.)*(.+)", key)
        if match is None:
            names[key] = _rename(key, _SECOND_FORM_MODEL | patch_embedding)
        else:
            block, branch, rest = match.groups()
            if branch == "1":
                rest = _rename(rest, feed_forward)
            else:
                rest = _rename(rest, {"norm": "norm1"}) if rest.startswith("norm.") else f"attn.{rest}"
            names[key] = f"blocks.{block}.{rest}"
    return names


def _convert_patch_pixels(name: str, tensor: Tensor, proj_weight_shape: Shape) -> Tensor:
    """Reorder a tensor over the pixels of a patch from vit_pytorch's (row, column, channel) to our channel first."""
    _, channels, height, width = proj_weight_shape
    pixels = channels * height * width
    if name == "patch_embed.proj.weight" and tensor.ndim == 2 and tensor.shape[1] == pixels:
        return tensor.unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)
    if name.startswith("patch_embed.pre_norm.") and tensor.shape == (pixels,):
        return tensor.unflatten(0, (height, width, channels)).permute(2, 0, 1).flatten()
    return tensor


def _to_ours(state_dict: Mapping[str, Tensor], model: DeepViT) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """The layout of ``state_dict``, its tensors under our keys, and our key -> the checkpoint's."""
    names = {key: key for key in state_dict}
    if "pos_embedding" in state_dict:
        layout = "vit_pytorch"
        names = _second_form_names(state_dict)
    elif any(".attn.reatten_matrix." in key for key in state_dict):
        layout = "official"
    else:
        layout = "reattn"

    ours: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    proj_weight_shape = tuple(model.patch_embed.proj.weight.shape)
    for key, tensor in state_dict.items():
        name, tensor = _convert_attention(names[key], tensor)
        if layout == "vit_pytorch":
            tensor = _convert_patch_pixels(name, tensor, proj_weight_shape)
        ours[name] = tensor
        origin[name] = key
    return layout, ours, origin


def _fit_pos_embed(state_dict: dict[str, Tensor], model: DeepViT) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Resample the positions in ``state_dict`` if it is only their number that differs from the model's."""
    pos_embed = state_dict.get("pos_embed")
    if pos_embed is None or pos_embed.ndim != 3 or pos_embed.shape[1] == model.pos_embed.shape[1]:
        return None
    num_patches = pos_embed.shape[1] - model.num_prefix_tokens
    side = round(max(num_patches, 0) ** 0.5)
    if side == 0 or side * side != num_patches or pos_embed.shape[2] != model.embed_dim:
        return None
    state_dict["pos_embed"] = resample_pos_embed(pos_embed, model.grid_size)
    return (side, side), model.grid_size


def _drop_other_head(state_dict: dict[str, Tensor], model: DeepViT) -> bool:
    """Take the head out of ``state_dict`` if it counts other classes than the model."""
    weight = state_dict.get("head.weight")
    if weight is None or weight.ndim != 2 or weight.shape[0] == model.num_classes:
        return False
    for key in ("head.weight", "head.bias"):
        state_dict.pop(key, None)
    logger.info(
        "the checkpoint's head counts %d classes, the model's %d: the head is left as it was",
        weight.shape[0],
        model.num_classes,
    )
    return True


def load_checkpoint(
    model: DeepViT,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    prefer_ema: bool = True,
    strict: bool = True,
) -> LoadReport:
    """Load a whole checkpoint into ``model``, translating its layout.

    Positions learned for another image size are resampled (a checkpoint's grid is taken to be square); a head that
    counts other classes is left out, and the model's stays as it was. When an error is raised, the model is unchanged.

    The model must be built to match. For a checkpoint of ``vit_pytorch.deepvit.DeepViT(image_size, patch_size,
    num_classes, dim, depth, heads, mlp_dim, dim_head)`` with class token pooling, that is ``DeepViT(image_size,
    patch_size, num_classes=num_classes, embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=mlp_dim / dim,
    attn_head_dim=dim_head, norm="layer", qkv_bias=False, layer_norm_eps=1e-5, patch_norm=...)``, where ``patch_norm``
    is True if the checkpoint has a ``to_patch_embedding.2.weight``.

    Args:
        model: where the weights go; they take its dtype and device.
        checkpoint: the path of a file (``torch.save`` or safetensors), or its contents.
        prefer_ema: prefer the moving average over the plain weights where a file holds both.
        strict: raise when any key is missing, unexpected or of another shape; False loads what fits and reports the
            rest.

    Raises:
        RuntimeError: with ``strict``, naming every key that does not fit, with the shapes.
        ValueError, ImportError: the file cannot be read, see :func:`read_checkpoint` and :func:`select_state_dict`.
    """
    contents = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    source, foreign = select_state_dict(contents, prefer_ema)
    layout, state_dict, origin = _to_ours(foreign, model)
    resampled = _fit_pos_embed(state_dict, model)
    head_kept = _drop_other_head(state_dict, model)

    expected = model.state_dict()
    for key, tensor in expected.items():
        # Early BatchNorm versions did not count their batches; the count serves a cumulative average alone.
        if key.endswith("num_batches_tracked"):
            state_dict.setdefault(key, tensor)
    kept = {"head.weight", "head.bias"} if head_kept else set()
    report = LoadReport(
        source=source,
        layout=layout,
        missing=[key for key in expected if key not in state_dict and key not in kept],
        unexpected=[origin[key] for key in state_dict if key not in expected],
        mismatched={
            key: (tuple(state_dict[key].shape), tuple(tensor.shape))
            for key, tensor in expected.items()
            if key in state_dict and state_dict[key].shape != tensor.shape
        },
        resampled_pos_embed=resampled,
        head_kept=head_kept,
    )
    if strict and (report.missing or report.unexpected or report.mismatched):
        raise RuntimeError(_describe_misfits(report, expected, foreign, origin))
    fitting = {key: state_dict[key] for key in expected if key in state_dict and key not in report.mismatched}
    model.load_state_dict(fitting, strict=False)
    return report


def _describe_misfits(
    report: LoadReport, expected: Mapping[str, Tensor], foreign: Mapping[str, Tensor], origin: Mapping[str, str]
) -> str:
    lines = [f"the checkpoint ({report.layout} layout) does not fit the model:"]
    lines += [f"  missing: {key} {tuple(expected[key].shape)}" for key in report.missing]
    lines += [f"  unexpected: {key} {tuple(foreign[key].shape)}" for key in report.unexpected]
    for key, (got, wanted) in report.mismatched.items():
        source_key = origin.get(key, key)
        renamed = "" if source_key == key else f" (from {source_key})"
        lines.append(f"  shape: {key}{renamed} must be {wanted}, got {got}")
    return "\n".join(lines)


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a :class:`DeepViT` with batch norm under the keys of the official code.

    Raises:
        ValueError: the official layout has no place for a key, as it has none for a norm over the heads.
    """
    official: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        match = re.fullmatch(r"(blocks\.\d+\.attn\.)(.+)", key)
        if match is None:
            official[key] = tensor
            continue
        prefix, name = match.groups()
        if name in ("pre_theta", "pre_bias"):
            raise ValueError(f"the official layout knows no mixing before the softmax, got {key}")
        if name.startswith("head_norm.") and f"{prefix}head_norm.running_mean" not in state_dict:
            raise ValueError(f'the official layout knows norm="batch" only, got {key} without running statistics')
        if name == "theta":
            tensor = tensor.t().contiguous()[:, :, None, None]
        official[prefix + _rename(name, _OFFICIAL_ATTENTION)] = tensor
    return official
