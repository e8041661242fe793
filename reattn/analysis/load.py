"""Models by name, for the command line: those of :mod:`reattn.models`, other libraries', and any Python function's."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reattn.analysis.images import Preprocessing
from reattn.checkpoints import load_checkpoint, read_checkpoint, select_state_dict
from reattn.checks import class_name
from reattn.models import DeepViT, create_model, list_models

FORMS = "timm:NAME, hf:FOLDER, torchvision:NAME or MODULE:FUNCTION"

# Where a head that counts classes lies: the parts of a model that no attention depends on.
_CLASSIFIERS = ("head", "classifier", "heads.head")
_WITHOUT_EFFECT = ("classifier.", "pooler.")
# Steps of a preprocessor_config.json that are done or change no pixel, and what else would change them.
_FOLLOWED = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_reduce_labels")
_NOT_FOLLOWED = ("crop_pct", "keep_aspect_ratio", "rescale_offset")
_PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Source:
    """A model, and what is known where it comes from.

    Attributes:
        model: with random weights unless ``weights`` says otherwise.
        weights: where they are from; None: they are random.
        preprocessing: None: the model itself may know, see :meth:`Preprocessing.of`.
    """

    model: nn.Module
    weights: str | None = None
    preprocessing: Preprocessing | None = None


def parse_arguments(assignments: Sequence[str]) -> dict[str, Any]:
    """``["depth=4", "norm=layer"]`` as ``{"depth": 4, "norm": "layer"}``: Python literals, or else strings.

    Raises:
        ValueError: one is not NAME=VALUE.
    """
    arguments: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"must be NAME=VALUE, got {assignment!r}")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments


def build_model(name: str, arguments: dict[str, Any]) -> Source:
    """A model by its name: one of :func:`reattn.models.list_models`, or of a form in :data:`FORMS`.

    ``hf:FOLDER`` is a folder of transformers, with config.json, weights if they are there, and preprocessor_config.json
    likewise; ``MODULE:FUNCTION`` is called with ``arguments`` and returns a module. Nothing is downloaded.

    Raises:
        ValueError: there is no such model, or its folder or function does not make one.
        ImportError: the library is missing.
        TypeError, ValueError, RuntimeError: the model does not take ``arguments``.
    """
    form, colon, rest = name.partition(":")
    if not colon:
        if name not in list_models():
            raise ValueError(f"must be one of {', '.join(list_models())}, or {FORMS}, got {name!r}")
        return Source(create_model(name, **arguments))
    build = _FORMS.get(form)
    if build is not None:
        return build(rest, arguments)
    return _of_function(form, rest, arguments)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} must be installed: pip install {name} ({error})") from error


def _of_timm(name: str, arguments: dict[str, Any]) -> Source:
    timm = _library("timm")
    if not timm.is_model(name):
        raise ValueError(f"must be timm: and a name of timm.list_models(), got {name!r}")
    return Source(timm.create_model(name, pretrained=False, **arguments))


def _of_torchvision(name: str, arguments: dict[str, Any]) -> Source:
    models = _library("torchvision").models
    if name not in models.list_models():
        raise ValueError(f"must be torchvision: and a name of torchvision.models.list_models(), got {name!r}")
    model = models.get_model(name, weights=None, **arguments)
    prepared = next(iter(models.get_model_weights(name))).transforms()
    if not hasattr(prepared, "crop_size"):
        return Source(model)
    crop, resized = prepared.crop_size[0], prepared.resize_size[0]
    side = getattr(model, "image_size", crop)
    preprocessing = Preprocessing(
        channels=3,
        height=side,
        width=side,
        crop_pct=crop / resized,
        interpolation=prepared.interpolation.value,
        mean=tuple(prepared.mean),
        std=tuple(prepared.std),
    )
    return Source(model, preprocessing=preprocessing)


def _of_transformers(name: str, arguments: dict[str, Any]) -> Source:
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(f"must be hf: and a folder with a config.json (nothing is downloaded), got {name!r}")
    transformers = _library("transformers")
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
    # What a damaged file raises depends on the release.
    except Exception as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}") from error
    unknown = [argument for argument in arguments if not hasattr(config, argument)]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} must be in {folder / 'config.json'} to be changed")
    for argument, value in arguments.items():
        setattr(config, argument, value)
    classifies = any(kind.endswith("ForImageClassification") for kind in config.architectures or ())
    automatic = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
    weights = [path for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)]
    try:
        if not weights:
            model = automatic.from_config(config, dtype=torch.float32, trust_remote_code=False)
        else:
            model, report = automatic.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, **local
            )
    except Exception as error:
        raise ValueError(f"{folder} cannot be loaded by transformers: {error}") from error
    missing = sorted(k for k in report["missing_keys"] if not k.startswith(_WITHOUT_EFFECT)) if weights else []
    if missing:
        raise ValueError(f"{weights[0]} must hold every weight of {class_name(model)}, got none for {missing[:5]}")
    # The second is what a CLIPProcessor of transformers 5 writes.
    names = ("preprocessor_config.json", "processor_config.json")
    prepared = next((folder / name for name in names if (folder / name).is_file()), None)
    return Source(
        # Of CLIP and its like the part that sees.
        getattr(model, "vision_model", model) if not classifies else model,
        str(folder) if weights else None,
        as_transformers_says(prepared) if prepared else None,
    )


def as_transformers_says(path: Path) -> Preprocessing:
    """The preprocessing in a preprocessor_config.json, or in the ``image_processor`` of a processor_config.json.

    A step that is null is not done, as in transformers.

    Raises:
        ValueError: the file cannot be read, or asks for what :class:`Preprocessing` does not do.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "processor_config.json":
            config = config["image_processor"]
        others = [
            k for k, v in config.items() if v and (k in _NOT_FOLLOWED or k.startswith("do_") and k not in _FOLLOWED)
        ]
        if others:
            raise ValueError(f"{', '.join(others)} must be false or missing, got {[config[name] for name in others]}")
        for step in ("do_resize", "do_rescale"):
            if not config.get(step, True):
                raise ValueError(f"{step} must be true or missing, got {config[step]}")
        # What is null is missing, and not there to fall back on in transformers either.
        config = {key: value for key, value in config.items() if value is not None or key.startswith("do_")}
        size, crop = config["size"], config["crop_size"] if config.get("do_center_crop") else None
        if isinstance(size, int):
            kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
            size = {"shortest_edge": size} if "CLIP" in kind else {"height": size, "width": size}
        squash = "height" in size
        resized = (size["height"], size["width"]) if squash else (size["shortest_edge"],) * 2
        if crop is None and not squash:
            raise ValueError("images must be cropped to one size, got shortest_edge without do_center_crop")
        height, width = resized if crop is None else (crop, crop) if isinstance(crop, int) else _sides(crop)
        shares = {height / resized[0], width / resized[1]}
        if len(shares) > 1 or max(shares) > 1:
            raise ValueError(f"images must be resized to no less than the crop, got {resized} and {height, width}")
        if abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
            raise ValueError("pixels must be rescaled by 1 / 255, got another factor")
        normalizes = config.get("do_normalize", True)
        mean, std = (config["image_mean"], config["image_std"]) if normalizes else ((0.0,) * 3, (1.0,) * 3)
        share = shares.pop()
        return Preprocessing(
            channels=len(mean),
            height=height,
            width=width,
            # The share is of whole pixels, and what it leaves is rounded down.
            crop_pct=share if int(height / share) == resized[0] else height / (resized[0] + 0.5),
            interpolation=_PILLOW[config["resample"]],
            squash=squash,
            mean=tuple(mean),
            std=tuple(std),
        )
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing or unknown" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} cannot be followed: {reason}") from error


def _sides(size: dict[str, int]) -> tuple[int, int]:
    return size["height"], size["width"]


def _of_function(module_name: str, name: str, arguments: dict[str, Any]) -> Source:
    full = f"{module_name}:{name}"
    try:
        function = getattr(importlib.import_module(module_name), name)
    # A module of one's own may raise anything.
    except Exception as error:
        raise ValueError(f"must be one of {', '.join(list_models())}, or {FORMS}, got {full!r}: {error}") from error
    try:
        model = function(**arguments)
    except Exception as error:
        raise ValueError(f"{full} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{full} must return a torch.nn.Module, got {class_name(model)}")
    return Source(model, weights=full)


_FORMS: dict[str, Callable[[str, dict[str, Any]], Source]] = {
    "timm": _of_timm,
    "torchvision": _of_torchvision,
    "hf": _of_transformers,
}


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Loads a checkpoint file; a head that counts other classes is left out, as no attention depends on it.

    Raises:
        RuntimeError: keys or shapes do not fit, named.
        ValueError, ImportError, OSError: the file cannot be read.
    """
    if isinstance(model, DeepViT):
        load_checkpoint(model, checkpoint)
        return
    _, state_dict = select_state_dict(read_checkpoint(checkpoint))
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or _CLASSIFIERS
    own = model.state_dict()
    kept = [
        key
        for name in ([classifier] if isinstance(classifier, str) else classifier)
        for key in (f"{name}.weight", f"{name}.bias")
        if key in own and (key not in state_dict or state_dict[key].shape != own[key].shape)
    ]
    model.load_state_dict(state_dict | {key: own[key] for key in kept})
