"""Models by name, for the command line: those of :mod:`reattn.models`, and timm's."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from reattn.checkpoints import load_checkpoint, read_checkpoint, select_state_dict
from reattn.models import DeepViT, create_model, list_models

TIMM_PREFIX = "timm:"


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


def build_model(name: str, arguments: dict[str, Any]) -> nn.Module:
    """A model with random weights: one of :func:`reattn.models.list_models`, or ``timm:NAME``.

    Raises:
        ValueError: there is no such model.
        ImportError: timm is asked for and missing.
        TypeError, ValueError, RuntimeError: the model does not take ``arguments``.
    """
    if not name.startswith(TIMM_PREFIX):
        if name not in list_models():
            raise ValueError(f"must be one of {', '.join(list_models())}, or {TIMM_PREFIX}NAME, got {name!r}")
        return create_model(name, **arguments)
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{name} needs timm: pip install timm") from error
    timm_name = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(timm_name):
        raise ValueError(f"must be {TIMM_PREFIX} and a name of timm.list_models(), got {timm_name!r}")
    return timm.create_model(timm_name, pretrained=False, **arguments)


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
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    own = model.state_dict()
    kept = [
        key
        for name in ([classifier] if isinstance(classifier, str) else classifier)
        for key in (f"{name}.weight", f"{name}.bias")
        if key in own and (key not in state_dict or state_dict[key].shape != own[key].shape)
    ]
    model.load_state_dict(state_dict | {key: own[key] for key in kept})
