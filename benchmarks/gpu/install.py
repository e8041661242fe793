"""The card, and the editable installation if it is not there yet."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any, NamedTuple, TextIO

from benchmarks.gpu.pool import Clock, run_command

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Card(NamedTuple):
    name: str
    capability: str

    @property
    def folder(self) -> str:
        """Of results that are committed."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def find_card() -> Card:
    """The first GPU, as its driver or else torch tells it; raises ``RuntimeError`` where there is none."""
    by_torch = (
        "import torch; print(torch.cuda.get_device_name(), '%d.%d' % torch.cuda.get_device_capability(), sep=', ')"
    )
    commands = (
        ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"],
        [sys.executable, "-c", by_torch],
    )
    said = ""
    for command in commands:
        try:
            printed = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
            continue
        line = printed.stdout.partition("\n")[0]
        if printed.returncode == 0 and re.fullmatch(r".+, \d+\.\d+", line):
            return Card(*line.rsplit(", ", 1))
        said = (printed.stderr or printed.stdout).strip().rpartition("\n")[2]
    raise RuntimeError(f"needs a CUDA device, and neither nvidia-smi nor torch finds one ({said})")


def is_installed(root: pathlib.Path = ROOT) -> bool:
    """Whether the package is installed from this folder, editable."""
    try:
        told = importlib.metadata.distribution("reattn").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False
    where = json.loads(told or "{}")
    return where.get("url") == root.as_uri() and bool(where.get("dir_info", {}).get("editable"))


def install(clock: Clock, log: TextIO) -> dict[str, Any]:
    """With what the machine has: no network is needed."""
    if is_installed():
        return {"status": "ok", "found": True}
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "-e", "."]
    environment = os.environ | {"REATTN_BUILD_CPU": "0"}
    return run_command(command, clock.left(60), log, environment, ROOT)
