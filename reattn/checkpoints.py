"""Load whole DeepViT checkpoints, of whichever code base wrote them, into :class:`reattn.models.DeepViT`.

Layouts understood: ours, the official DeepViT code's, and vit_pytorch's (all its published revisions). A file that a
training framework wrote is searched for the model in it, see :func:`load_checkpoint`.
"""

import logging
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reattn.checkpoint_files import WRAPPERS, read_checkpoint, renamed, select_state_dict, without_parts
from reattn.checks import class_name
from reattn.layouts import translate
from reattn.models.deepvit import DeepViT, checkpoint_filter_fn

__all__ = [
    "LoadReport",
    "from_vit_pytorch",
    "load_checkpoint",
    "read_checkpoint",
    "select_state_dict",
    "to_official",
    "to_vit_pytorch",
]

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]

_OFFICIAL_ATTENTION = {
    "theta": "reatten_matrix.weight",
    "theta_bias": "reatten_matrix.bias",
    "head_norm": "var_norm",
}
_AFFINE = (".weight", ".bias")
_OFFICIAL_KEYS = re.compile(
    r"cls_token|pos_embed|(norm|head|patch_embed\.proj)\.(weight|bias)|patch_embed\.conv[12]\.weight"
    r"|(patch_embed\.bn[12]|blocks\.\d+\.attn\.var_norm)"
    r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
    r"|blocks\.\d+\.(norm[12]|mlp\.fc[12]|attn\.(qkv|proj|reatten_matrix))\.(weight|bias)"
)
# Ours, vit_pytorch's since 1.0, and what both have of it; and the final norm, which has two names here.
_TO_SECOND_FORM = (
    ("cls_token", "cls_token", ("",)),
    ("pos_embed", "pos_embedding", ("",)),
    ("patch_embed.pre_norm", "to_patch_embedding.1", _AFFINE),
    ("patch_embed.proj", "to_patch_embedding.2", _AFFINE),
    ("patch_embed.norm", "to_patch_embedding.3", _AFFINE),
    ("head", "mlp_head.1", _AFFINE),
)
_BLOCK_TO_SECOND_FORM = (
    ("norm1", "0.norm", _AFFINE),
    ("attn.qkv", "0.to_qkv", (".weight",)),
    ("attn.theta", "0.reattn_weights", ("",)),
    ("attn.head_norm", "0.reattn_norm.1", _AFFINE),
    ("attn.proj", "0.to_out.0", _AFFINE),
    ("norm2", "1.net.0", _AFFINE),
    ("mlp.fc1", "1.net.1", _AFFINE),
    ("mlp.fc2", "1.net.4", _AFFINE),
)
# All tokens, the class token too, are averaged before the final norm.
_MEAN_POOLING = {"global_pool": "avg", "fc_norm": True, "pool_include_prefix": True}
_POOLINGS = (
    "global_pool='token' (its pool=\"cls\") or global_pool='avg', fc_norm=True, pool_include_prefix=True (its "
    'pool="mean")'
)


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_checkpoint` did.

    Attributes:
        source: the entry of the file that was read, such as "state_dict_ema"; "" for a plain state dict.
        layout: "reattn", "official" or "vit_pytorch".
        missing: parameters and buffers of the model that the checkpoint does not hold.
        unexpected: keys of the checkpoint that the model has no place for, as they stand there but for prefix and
            wrappers.
        mismatched: key of the model -> (shape in the checkpoint, shape in the model).
        resampled_pos_embed: (grid in the checkpoint, grid of the model) where the positions were resampled, else None.
        head_kept: the checkpoint counts other classes, so that the model's head was left as it was.
        prefix: what stands before the model's names in the checkpoint, such as "model.".
        outside: keys beside those with the prefix, as of a loss, which were left out.
        left_on_meta: parameters and buffers of a model on the meta device that still have no data.
    """

    source: str
    layout: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    resampled_pos_embed: tuple[tuple[int, int], tuple[int, int]] | None = None
    head_kept: bool = False
    prefix: str = ""
    outside: list[str] = field(default_factory=list)
    left_on_meta: list[str] = field(default_factory=list)


def _find_model(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any], own: Collection[str], prefer_ema: bool
) -> tuple[str, str, dict[str, Tensor], list[str]]:
    """The entry that holds the model, the prefix of its keys, its tensors without that, and the keys beside them.

    What stands before ``cls_token`` is the prefix, or before the positions, where the model or the checkpoint has no
    class token. ``own`` are the keys of the model to be loaded, whose parts may have class tokens, positions and names
    of wrappers of their own.
    """
    if not isinstance(checkpoint, str | os.PathLike | Mapping):
        raise TypeError(f"checkpoint must be a path or a mapping, as state_dict() gives, got {class_name(checkpoint)}")
    if not isinstance(checkpoint, Mapping):
        contents = read_checkpoint(checkpoint)
        try:
            return _find_model(contents, own, prefer_ema)
        except ValueError as error:
            raise ValueError(f"{os.fspath(checkpoint)}: {error}") from error
    source, state_dict = select_state_dict(checkpoint, prefer_ema)
    anchors = ["cls_token"] if not own or "cls_token" in own else []
    found_by = (_prefixes(state_dict, own, anchor) for anchor in (*anchors, "pos_embed", "pos_embedding"))
    prefixes = next(filter(None, found_by), [])
    prefix = _choose(prefixes, prefer_ema)
    others = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    # What DDP puts before the names of a part that it wraps.
    wrapper = "" if any("module" in key.split(".") for key in own) else r"(?<=\.)module\."
    names = {
        key: re.sub(wrapper, "", key.removeprefix(prefix))
        for key in state_dict
        if key.startswith(prefix) and not key.startswith(others)
    }
    outside = [key for key in state_dict if key not in names]
    if outside:
        logger.info("left out, beside the keys with the prefix %r: %s", prefix, ", ".join(outside))
    found = renamed(state_dict, names)
    if empty := [key for key, tensor in found.items() if tensor.is_meta]:
        raise ValueError(f"checkpoint must hold data, got tensors on the meta device: {', '.join(empty)}")
    return source, prefix, found, outside


def _prefixes(state_dict: Mapping[str, Tensor], own: Collection[str], anchor: str) -> list[str]:
    """What stands before the name ``anchor`` in ``state_dict``, but where a part of the model has it."""
    of_parts = [key for key in own if key.endswith(f".{anchor}")]

    def is_part(key: str) -> bool:
        cut = [key.removesuffix(part) for part in of_parts if f".{key}".endswith(f".{part}")]
        return any(f"{prefix}{anchor}" in state_dict for prefix in cut)

    tokens = [key for key in state_dict if f".{key}".endswith(f".{anchor}") and not is_part(key)]
    return [key.removesuffix(anchor) for key in tokens]


def _choose(prefixes: list[str], prefer_ema: bool) -> str:
    if len(prefixes) < 2:
        return prefixes[0] if prefixes else ""
    averages = [prefix for prefix in prefixes if "ema" in re.split(r"[._]", prefix)]
    plain = [prefix for prefix in prefixes if prefix not in averages]
    if len(averages) == len(plain) == 1:
        return averages[0] if prefer_ema else plain[0]
    raise ValueError(
        f"checkpoint must hold one model, got several, under the prefixes {', '.join(map(repr, prefixes))}: give the "
        f"one that is meant, {_without_prefix(prefixes[0])}"
    )


def _without_prefix(prefix: str) -> str:
    return (
        f"{{key.removeprefix({prefix!r}): tensor for key, tensor in state_dict.items() if key.startswith({prefix!r})}}"
    )


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


def _second_form_names(state_dict: Mapping[str, Tensor], final_norm: str = "norm") -> dict[str, str]:
    """vit_pytorch's keys -> ours, the final norm under the name given. Its revisions differ in where the LayerNorms
    sit: in wrappers around the attention and the feed forward (``fn.norm``), or inside both and around the patch
    embedding."""
    norm_in_feed_forward = any(
        re.fullmatch(r"transformer\.layers\.\d+\.1\.(fn\.)*net\.0\.weight", key) and tensor.ndim == 1
        for key, tensor in state_dict.items()
    )
    older = {} if norm_in_feed_forward else {"1.norm": "1.net.0", "1.net.0": "1.net.1", "1.net.3": "1.net.4"}
    without_norms = {"to_patch_embedding.1": "to_patch_embedding.2"}
    embedding = {} if "to_patch_embedding.2.weight" in state_dict else without_norms
    outer, inner = ({theirs: ours for ours, theirs, _ in table} for table in (_TO_SECOND_FORM, _BLOCK_TO_SECOND_FORM))
    outer["mlp_head.0"] = final_norm
    names: dict[str, str] = {}
    for key in state_dict:
        match = re.fullmatch(r"transformer\.layers\.(\d+)\.([01]\.)(?:fn\.)*(.+)", key)
        if match is None:
            names[key] = _rename(_rename(key, embedding), outer)
        else:
            names[key] = f"blocks.{match[1]}.{_rename(_rename(match[2] + match[3], older), inner)}"
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
        names = _second_form_names(state_dict, "norm" if isinstance(model.fc_norm, nn.Identity) else "fc_norm")
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
        if name in ours:
            raise ValueError(f"checkpoint holds {name} twice, as {origin[name]} and as {key}")
        ours[name] = tensor
        origin[name] = key
    return layout, ours, origin


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def _fit_pos_embed(state_dict: dict[str, Tensor], model: DeepViT) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Resample the positions in ``state_dict`` if it is only their number that differs from the model's. Where timm's
    ``no_embed_class`` left them out of the tokens before the patches, zeros are added; no model with re-attention was
    trained so."""
    pos_embed = state_dict.get("pos_embed")
    if pos_embed is None or pos_embed.ndim != 3 or pos_embed.shape[1] == model.pos_embed.shape[1]:
        return None
    count, prefix = pos_embed.shape[1], model.num_prefix_tokens
    plain = not any(key.endswith(".theta") for key in state_dict)
    missing = [added for added in ({0, prefix} if plain else {0}) if _is_square(count - prefix + added)]
    if len(missing) != 1 or pos_embed.shape[::2] != (1, model.embed_dim):
        return None
    if missing[0]:
        logger.info("the checkpoint has no positions for the first %d tokens: they are 0", missing[0])
    state_dict["pos_embed"] = torch.cat([pos_embed.new_zeros(1, missing[0], model.embed_dim), pos_embed], dim=1)
    if state_dict["pos_embed"].shape == model.pos_embed.shape:
        return None
    side = math.isqrt(state_dict["pos_embed"].shape[1] - prefix)
    state_dict |= checkpoint_filter_fn(state_dict, model)
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

    Positions learned for another image size are resampled (a checkpoint's grid is taken to be square), and are 0 for
    class token and registers where timm's ``no_embed_class=True`` had none for them, in plain ViTs alone; a head that
    counts other classes is left out, and the model's stays as it was. When an error is raised, the model is unchanged.

    The model must be built to match; :func:`from_vit_pytorch` builds it for a checkpoint of vit_pytorch.

    Our layout has the names of timm's ViT: such a checkpoint fits a model of the same parts with ``attention="self"``.

    What wrappers add to names goes (:func:`select_state_dict`), and so does a prefix before all of the model's, such as
    Lightning's ``model.``, with whatever stands beside it, as the weights of a loss: ``LoadReport.prefix`` and
    ``outside``. Where there are two such models, and one has ``ema`` in its prefix, ``prefer_ema`` decides.

    Args:
        model: where the weights go; they take its dtype and device. On the meta device it gets tensors of its dtype,
            parameters and buffers alike, on the device of the checkpoint's, the CPU for a file.
        checkpoint: the path of a file (``torch.save`` or safetensors), or its contents.
        prefer_ema: prefer the moving average over the plain weights where a file holds both.
        strict: raise when any key is missing, unexpected or of another shape, or would stay on the meta device; False
            loads what fits and reports the rest.

    Raises:
        TypeError: ``model`` is no DeepViT, as when something wraps it; ``checkpoint`` is neither path nor mapping.
        RuntimeError: with ``strict``, naming every key that does not fit, with the shapes; or weights of vit_pytorch
            for a model that pools otherwise than its ``pool="cls"`` or ``pool="mean"``.
        ValueError, ImportError: the file cannot be read, see :func:`read_checkpoint` and :func:`select_state_dict`;
            it holds several models, or tensors without data.
    """
    if not isinstance(model, DeepViT):
        raise TypeError(f"model must be a DeepViT, got {class_name(model)}: load before wrapping, or what is wrapped")
    # Blocks that are compiled have names of their own.
    own = {without_parts(key, WRAPPERS): key for key in model.state_dict()}
    expected = dict(zip(own, model.state_dict().values(), strict=True))
    source, prefix, foreign, outside = _find_model(checkpoint, expected, prefer_ema)
    layout, state_dict, origin = _to_ours(foreign, model)
    resampled = _fit_pos_embed(state_dict, model)
    head_kept = _drop_other_head(state_dict, model)

    for key, tensor in expected.items():
        # Early BatchNorm versions did not count their batches; the count serves a cumulative average alone.
        if key.endswith("num_batches_tracked"):
            state_dict.setdefault(key, torch.zeros((), dtype=tensor.dtype) if tensor.is_meta else tensor)
    kept = {"head.weight", "head.bias"} if head_kept else set()
    mismatched = {
        key: (tuple(state_dict[key].shape), tuple(tensor.shape))
        for key, tensor in expected.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    }
    fitting = {key: state_dict[key] for key in expected if key in state_dict and key not in mismatched}
    parts = {
        without_parts(key, WRAPPERS): tensor for key, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    report = LoadReport(
        source=source,
        layout=layout,
        missing=[key for key in expected if key not in state_dict and key not in kept],
        unexpected=[origin[key] for key in state_dict if key not in expected],
        mismatched=mismatched,
        resampled_pos_embed=resampled,
        head_kept=head_kept,
        prefix=prefix,
        outside=outside,
        left_on_meta=[key for key, tensor in parts.items() if tensor.is_meta and key not in fitting],
    )
    if strict and (report.missing or report.unexpected or report.mismatched or report.left_on_meta):
        raise RuntimeError(_describe_misfits(report, parts, foreign, origin))
    if strict and layout == "vit_pytorch" and not head_kept and (misfit := _misfit_of_pooling(model)):
        raise RuntimeError(f"a head of vit_pytorch fits {misfit}")
    if report.left_on_meta:
        logger.warning("left on the meta device, without data: %s", ", ".join(report.left_on_meta))
    # Copies: training must not change the checkpoint.
    on_meta = {
        own[key]: tensor.to(expected[key].dtype, copy=True, memory_format=torch.contiguous_format)
        for key, tensor in fitting.items()
        if expected[key].is_meta
    }
    model.load_state_dict(on_meta, strict=False, assign=True)
    with_data = {own[key]: tensor for key, tensor in fitting.items() if not expected[key].is_meta}
    model.load_state_dict(with_data, strict=False)
    return report


def _misfit_of_pooling(model: DeepViT) -> str | None:
    """How the model pools otherwise than vit_pytorch, if so. A norm after the class token is taken is that before."""
    fc_norm = not isinstance(model.fc_norm, nn.Identity)
    found = {"global_pool": model.global_pool, "fc_norm": fc_norm, "pool_include_prefix": model.pool_include_prefix}
    if model.global_pool == "token" or found == _MEAN_POOLING:
        return None
    return f"{_POOLINGS}, got {', '.join(f'{name}={value!r}' for name, value in found.items())}"


def _describe_misfits(
    report: LoadReport, expected: Mapping[str, Tensor], foreign: Mapping[str, Tensor], origin: Mapping[str, str]
) -> str:
    under = f", under the prefix {report.prefix!r}" if report.prefix else ""
    lines = [f"the checkpoint ({report.layout} layout{under}) does not fit the model:"]
    lines += [f"  missing: {key} {tuple(expected[key].shape)}" for key in report.missing]
    lines += [f"  unexpected: {key} {tuple(foreign[key].shape)}" for key in report.unexpected]
    for key, (got, wanted) in report.mismatched.items():
        source_key = origin.get(key, key)
        renamed = "" if source_key == key else f" (from {source_key})"
        lines.append(f"  shape: {key}{renamed} must be {wanted}, got {got}")
    left = [key for key in report.left_on_meta if key not in (*report.missing, *report.mismatched)]
    lines += [f"  left on the meta device: {key} {tuple(expected[key].shape)}" for key in left]
    if report.outside:
        lines.append(f"  left out, without the prefix: {', '.join(report.outside)}")
    common = os.path.commonprefix(report.unexpected).rpartition(".")
    if len(report.unexpected) == len(foreign) and any(common):
        prefix = common[0] + "."
        lines.append(f"  if {prefix!r} is a prefix before the names of the model, give {_without_prefix(prefix)}")
    return "\n".join(lines)


def from_vit_pytorch(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    pool: str = "cls",
    in_chans: int = 3,
    prefer_ema: bool = True,
    **overrides: Any,
) -> DeepViT:
    """The :class:`reattn.models.DeepViT` that computes what a ``vit_pytorch.deepvit.DeepViT`` does, with its weights.

    Everything but the arguments is read off the shapes: heads from ``reattn_weights``, patches from the embedding,
    images, which vit_pytorch wants square, from the positions. Equivalent to ``DeepViT(image_size, patch_size,
    num_classes=num_classes, embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=mlp_dim / dim,
    attn_head_dim=dim_head, norm="layer", qkv_bias=False, layer_norm_eps=1e-5, patch_norm=...)`` and
    :func:`load_checkpoint`; ``patch_norm`` for version 1.0 of vit_pytorch and later; with ``pool="mean"`` also
    ``global_pool="avg", fc_norm=True, pool_include_prefix=True``.

    Args:
        checkpoint: the path of a file, or its contents, as for :func:`load_checkpoint`.
        pool: "cls" or "mean", as the model was built; no state dict says it.
        in_chans: channels of the images, ``channels`` there.
        prefer_ema: as for :func:`load_checkpoint`.
        overrides: arguments of :class:`reattn.models.DeepViT` in the place of those, or besides: dropout, say, which is
            ``attn_drop_rate=dropout, proj_drop_rate=dropout, pos_drop_rate=emb_dropout``, or another ``img_size``.
            dtype and device are the checkpoint's otherwise.

    Raises:
        ValueError: another ``pool``; or the checkpoint is no such model's, or not of ``in_chans`` channels.
        RuntimeError, ImportError: as :func:`load_checkpoint`.

    Source: ``vit_pytorch/deepvit.py`` (MIT), all its published revisions.
    """
    if pool not in ("cls", "mean"):
        raise ValueError(f'pool must be "cls" or "mean", got {pool!r}')
    *_, state_dict, _ = _find_model(checkpoint, (), prefer_ema)
    names = _second_form_names(state_dict)
    shapes = {name: state_dict[key].shape for key, name in names.items() if name != key or key == "cls_token"}
    read = ["cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight"]
    read += [f"blocks.0.{name}" for name in ("attn.theta", "attn.qkv.weight", "mlp.fc1.weight")]
    if absent := [name for name in read if name not in shapes]:
        raise ValueError(
            "checkpoint must be that of a vit_pytorch.deepvit.DeepViT, got one without its equivalent of "
            f"{', '.join(absent)}; load_checkpoint takes other layouts"
        )
    dim, pixels = shapes["patch_embed.proj.weight"]
    patch_size, grid = math.isqrt(pixels // max(in_chans, 1)), math.isqrt(shapes["pos_embed"][1] - 1)
    if patch_size**2 * in_chans != pixels:
        raise ValueError(f"in_chans must be that of square patches of {pixels} numbers, got {in_chans}")
    heads = shapes["blocks.0.attn.theta"][0]
    config = {
        "img_size": grid * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": shapes["head.weight"][0],
        "embed_dim": dim,
        "depth": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        "num_heads": heads,
        # Half a unit more, as the product with dim is cut down to an integer.
        "mlp_ratio": (shapes["blocks.0.mlp.fc1.weight"][0] + 0.5) / dim,
        "attn_head_dim": shapes["blocks.0.attn.qkv.weight"][0] // (3 * heads),
        "norm": "layer",
        "qkv_bias": False,
        "layer_norm_eps": 1e-5,
        "patch_norm": "patch_embed.norm.weight" in shapes,
        "dtype": state_dict["cls_token"].dtype,
        "device": state_dict["cls_token"].device,
    }
    config |= _MEAN_POOLING if pool == "mean" else {}
    model = DeepViT(**{**config, **overrides})
    load_checkpoint(model, state_dict)
    return model


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a :class:`reattn.models.DeepViT` with batch norm under the keys of the official code.

    The official model pools by class token and has GELU and LayerNorms of eps 1e-6: that a state dict does not say.

    Raises:
        ValueError: the official layout has no place for a key, as it has none for a norm over the heads, registers or
            LayerScale, or one for what is not there, as the class token: each is named.
    """
    official: dict[str, Tensor] = {}
    misfits = []
    needed = ["cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"]
    for key, tensor in state_dict.items():
        match = re.fullmatch(r"(blocks\.\d+\.attn\.)(.+)", key)
        prefix, name = match.groups() if match else ("", key)
        if match and name in ("pre_theta", "pre_bias"):
            raise ValueError(f"the official layout knows no mixing before the softmax, got {key}")
        if match and name.startswith("head_norm.") and f"{prefix}head_norm.running_mean" not in state_dict:
            raise ValueError(f'the official layout knows norm="batch" only, got {key} without running statistics')
        if match and name in ("theta", "head_norm.weight"):
            needed += [f"{prefix}{part}" for part in ("theta", "theta_bias", "head_norm.weight")]
        if match and name == "theta":
            if len(set(tensor.shape)) > 1:
                misfits.append(f"{key} {tuple(tensor.shape)} makes another number of heads")
            tensor = tensor.t().contiguous()[:, :, None, None]
        theirs = prefix + _rename(name, _OFFICIAL_ATTENTION) if match else key
        if not _OFFICIAL_KEYS.fullmatch(theirs):
            misfits.append(f"no place for {key}")
        elif key.endswith(".weight") and not re.search(r"\.(qkv|conv[12])\.weight$", key):
            needed.append(f"{key.removesuffix('weight')}bias")
        official[theirs] = tensor
    misfits += [f"{key} is missing" for key in dict.fromkeys(needed) if key not in state_dict]
    if misfits:
        raise ValueError(
            'the official layout knows LayerNorm with bias, a class token, and mixing with norm="batch" only: '
            + "; ".join(misfits)
        )
    return official


def to_vit_pytorch(weights: DeepViT | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a ``vit_pytorch.deepvit.DeepViT`` (1.0 or later) with the weights of a model of ours.

    The model must be one that :func:`from_vit_pytorch` builds: ``norm="layer", qkv_bias=False, patch_norm=True``, a
    class token, a head, square images, and, what a state dict does not say and only a model given here is asked,
    ``layer_norm_eps=1e-5, output_scale=1, residual_scale=1``, GELU, and a pooling of vit_pytorch's: ``pool="cls"`` or
    ``pool="mean"`` of the model there must be the same.

    Raises:
        ValueError: vit_pytorch's layout has no place for what is there, or one for what is not: each is named.
    """
    misfits = []
    if isinstance(weights, DeepViT):
        misfits = _other_settings(weights)
        weights = weights.state_dict()
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    final_norm = ("fc_norm" if "fc_norm.weight" in weights else "norm", "mlp_head.0", _AFFINE)
    names = {f"{ours}{end}": f"{theirs}{end}" for ours, theirs, ends in (*_TO_SECOND_FORM, final_norm) for end in ends}
    names |= {
        f"blocks.{index}.{ours}{end}": f"transformer.layers.{index}.{theirs}{end}"
        for index in range(depth)
        for ours, theirs, ends in _BLOCK_TO_SECOND_FORM
        for end in ends
    }
    misfits += [f"no place for {key}" for key in weights if key not in names]
    misfits += [f"{key} is missing" for key in names if key not in weights]
    if "pos_embed" in weights and not _is_square(weights["pos_embed"].shape[1] - 1):
        misfits.append(f"pos_embed {tuple(weights['pos_embed'].shape)} is of images that are not square")
    for key in weights:
        if key.endswith(".theta") and len(set(shape := tuple(weights[key].shape))) > 1:
            misfits.append(f"{key} {shape} makes another number of heads")
    if misfits:
        raise ValueError(
            'vit_pytorch\'s layout knows norm="layer", qkv_bias=False, patch_norm=True, a class token, re-attention in '
            f"all blocks and a head only: {'; '.join(misfits)}"
        )
    pixels = weights["patch_embed.proj.weight"].shape[1:]
    theirs = {}
    for ours, name in names.items():
        tensor = weights[ours]
        if ours == "patch_embed.proj.weight":
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)
        if ours.startswith("patch_embed.pre_norm."):
            tensor = tensor.unflatten(0, pixels).permute(1, 2, 0).flatten()
        theirs[name] = tensor
    return theirs


def _other_settings(model: DeepViT) -> list[str]:
    """What vit_pytorch computes otherwise, and no state dict shows."""
    blocks: list[Any] = list(model.blocks)
    norms = [model.norm if isinstance(model.fc_norm, nn.Identity) else model.fc_norm]
    norms += [norm for block in blocks for norm in (block.norm1, block.norm2)]
    settings: list[tuple[str, Any, Any]] = []
    settings += [("norm_layer", class_name(norm), "LayerNorm") for norm in norms if not isinstance(norm, nn.LayerNorm)]
    settings += [("layer_norm_eps", norm.eps, 1e-5) for norm in model.modules() if isinstance(norm, nn.LayerNorm)]
    settings += [("act_layer", class_name(block.mlp.act), "GELU") for block in blocks if not _is_gelu(block.mlp.act)]
    for index, block in enumerate(blocks):
        usual = getattr(block.attn, "head_dim", 1) ** -0.5
        settings.append((f"blocks.{index}.residual_scale", block.residual_scale, 1.0))
        settings.append((f"blocks.{index}.attn.output_scale", getattr(block.attn, "output_scale", 1.0), 1.0))
        settings.append((f"blocks.{index}.attn.scale", getattr(block.attn, "scale", usual), usual))
    wrong = {f"{name} must be {wanted!r}, got {got!r}": None for name, got, wanted in settings if got != wanted}
    pooling = _misfit_of_pooling(model)
    return [*wrong, *([f"the pooling must be {pooling}"] if pooling else [])]


def _is_gelu(act: nn.Module) -> bool:
    """By what it computes: timm has a class of its own for it."""
    probe = torch.linspace(-3, 3, 14, device="cpu")
    return next(act.parameters(), None) is None and torch.equal(act(probe.clone()), nn.functional.gelu(probe))
