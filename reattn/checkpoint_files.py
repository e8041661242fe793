"""Checkpoint files: how they are read, and where in them the weights are."""

from __future__ import annotations

import os
import pickle
import re
from argparse import Namespace
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

_EMA_ENTRIES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
# Of timm and Lightning; DeiT and torchvision; torch's tutorials; DeepSpeed.
_ENTRIES = ("state_dict", "model", "model_state_dict", "module")
# What torch.compile, FSDP, activation checkpointing and opacus put into names, anywhere. No model has parts called so.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_module")
# How a file begins that is none of ours: what is downloaded, or chosen, by mistake.
_OTHER_FILES = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: `git lfs pull` fetches that",
    b"<": "a web page (HTML or XML), as a download that failed leaves it",
    b"{": "JSON text",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x89HDF": "an HDF5 file, as Keras writes it",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file",
}
_MAX_HEADER = 100_000_000  # of safetensors


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The contents of a checkpoint file on the CPU. What it holds tells its kind, not its ending: safetensors, or what
    ``torch.save`` writes, in its present form (zip) and the one before.

    Nothing in the file is executed: ``torch.load`` runs with ``weights_only=True``, extended only by the plain
    ``argparse.Namespace`` in which training scripts, timm's and the official one among them, keep their options.

    Raises:
        ImportError: a safetensors file, and the safetensors package is not installed.
        OSError: there is no such file, or it may not be read.
        ValueError: the file is damaged, cut short or of another kind, asks for anything but tensors and plain
            containers, or holds no mapping with tensors. The message names the file and says what was found.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        files = ", ".join(sorted(os.listdir(path))[:10]) or "nothing"
        raise ValueError(f"{path} must be a checkpoint file, got a directory that holds {files}")
    with open(path, "rb") as file:
        start = file.read(1024)
    is_safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER
    if not is_safetensors:
        _refuse_other_files(path, start)
    try:
        checkpoint = _read_safetensors(path) if is_safetensors else _read_torch(path)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # whatever comes of bytes that mean nothing
        if isinstance(error, pickle.UnpicklingError) and (code := re.search(r"GLOBAL (\S+)", str(error))):
            raise ValueError(
                f"{path} cannot be read with weights_only=True: it asks for {code[1]}, which is neither a tensor nor a "
                "plain container. If you trust whoever wrote the file with running code, give what you read yourself: "
                "torch.load(path, weights_only=False)"
            ) from error
        kind = "safetensors" if is_safetensors else _kind(start)
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        raise ValueError(
            f"{path} cannot be read, as if damaged or cut short: {os.path.getsize(path)} bytes, {kind}; "
            + reason.splitlines()[0][:300]
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} must hold a mapping of names to tensors, got {type(checkpoint).__name__}")
    if not any(isinstance(value, Tensor) or _has_tensors(value) for value in checkpoint.values()):
        raise ValueError(
            f"{path}: checkpoint must be a state dict or hold one, got no tensors in a mapping with the keys "
            f"{list(checkpoint)[:10]}"
        )
    return checkpoint


def _has_tensors(entry: Any) -> bool:
    return isinstance(entry, Mapping) and any(isinstance(value, Tensor) for value in entry.values())


def _refuse_other_files(path: str, start: bytes) -> None:
    found = "an empty file" if not start else None
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for beginning, kind in _OTHER_FILES.items():
        if text.startswith(beginning):
            found = kind
    if start[257:262] == b"ustar":
        found = "a tar archive: unpack it"
    if found:
        raise ValueError(f"{path} must be a checkpoint file (of torch.save, or safetensors), got {found}")


def _kind(start: bytes) -> str:
    if start.startswith(b"PK"):
        return "a zip archive (torch.save)"
    if start.startswith(b"\x80"):
        return "a pickle (torch.save's older form)"
    return f"beginning with {start[:16]!r}"


def _read_safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {path} needs the safetensors package: pip install safetensors") from error
    return load_file(path, device="cpu")


def _read_torch(path: str) -> Any:
    # An open file: torch.load would go by the ending of a path.
    with open(path, "rb") as file, torch.serialization.safe_globals([Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True)


def select_state_dict(checkpoint: Mapping[str, Any], prefer_ema: bool = True) -> tuple[str, dict[str, Tensor]]:
    """The weights inside a checkpoint, freed of what wrappers add to their names.

    That is, anywhere in a name, the parts of ``torch.compile``, FSDP, activation checkpointing and opacus; and
    ``module.`` before all names (DDP, timm's and torch's averaged models, whose ``n_averaged`` goes too). A name that
    has it beside others that have not keeps it: that is a part of the model.

    Args:
        checkpoint: a plain state dict, or a mapping with one under "state_dict_ema", "model_ema", "ema_state_dict" or
            "ema", or under "state_dict", "model", "model_state_dict" or "module".
        prefer_ema: take the exponential moving average first, where there is one; False takes it last.

    Returns:
        The name of the entry, "" for a plain state dict, and the state dict.

    Raises:
        ValueError: no state dict is found, or two names become one when their wrappers go.
    """
    entries = (*_EMA_ENTRIES, *_ENTRIES) if prefer_ema else (*_ENTRIES, *_EMA_ENTRIES)
    source = next((name for name in entries if _is_state_dict(checkpoint.get(name))), "")
    state_dict = checkpoint[source] if source else checkpoint
    if not _is_state_dict(state_dict):
        raise ValueError(
            f"checkpoint must be a state dict or hold one under {', '.join(entries)}, "
            f"got a mapping with the keys {list(checkpoint)[:10]}{_what_there_is(checkpoint, entries)}"
        )
    names = {key: without_parts(key, WRAPPERS) for key in state_dict}
    while True:
        wrapped = {key: name for key, name in names.items() if name != "n_averaged"}
        if not wrapped or not all(name.startswith("module.") for name in wrapped.values()):
            break
        names = {key: name.removeprefix("module.") for key, name in wrapped.items()}
    return source, renamed(state_dict, names)


def without_parts(key: str, parts: Collection[str]) -> str:
    """``key`` without those of its parts, between dots, that are among ``parts``."""
    return ".".join(part for part in key.split(".") if part not in parts)


def renamed(state_dict: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """What ``names`` holds of a state dict, under its names; ``ValueError`` where one is used twice."""
    result: dict[str, Tensor] = {}
    for key, name in names.items():
        if name in result:
            raise ValueError(f"checkpoint holds {name!r} more than once, under names that wrappers changed")
        result[name] = state_dict[key]
    return result


def _is_state_dict(entry: Any) -> bool:
    if not isinstance(entry, Mapping) or not entry:
        return False
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entry.items())


def _what_there_is(checkpoint: Mapping[str, Any], entries: Collection[str]) -> str:
    """What else may be meant, or why a state dict is none."""
    for name in entries:
        entry = checkpoint.get(name)
        if isinstance(entry, Mapping):
            for key, value in entry.items():
                if not isinstance(value, Tensor):
                    return f"; {name} holds a {type(value).__name__} under {key!r}"
    others = [repr(name) for name, entry in checkpoint.items() if _is_state_dict(entry)]
    if others:
        return f"; there are tensors under {', '.join(others)}: give the one that is meant, checkpoint[{others[0]}]"
    return ""
