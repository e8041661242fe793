"""The card, the editable installation, and the CUDA extension built for that card alone: only what is not there yet.

build/gpu.json remembers what was built from which sources. A copied tree has new times of modification: those of
unchanged sources are set back, so that ninja compiles only what changed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import threading
from typing import Any, NamedTuple, TextIO

from benchmarks.gpu.pool import Clock, run_command

ROOT = pathlib.Path(__file__).resolve().parents[2]
STAMP = ROOT / "build" / "gpu.json"
SOURCES = ("setup.py", "build_extensions.py", "pyproject.toml", "csrc/*.h", "csrc/cuda/*")
FAILURE = re.compile(r"reattn: CUDA extension .*|.*\b(?:error|fatal)\b.*", re.IGNORECASE)


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
    """The Python part, with what the machine has: no network is needed."""
    if is_installed():
        return {"status": "ok", "found": True}
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "-e", "."]
    environment = os.environ | {"REATTN_BUILD_CPU": "0", "REATTN_BUILD_CUDA": "0"}
    return run_command(command, clock.left(60), log, environment, ROOT)


def hashes(root: pathlib.Path = ROOT) -> dict[str, str]:
    """Of every source by its path."""
    paths = sorted(path for pattern in SOURCES for path in root.glob(pattern) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def library(root: pathlib.Path = ROOT) -> pathlib.Path:
    return root / "reattn" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


class Build:
    """The extension's build, in a thread of its own; a gate of the pool."""

    def __init__(self, card: Card, clock: Clock, path: pathlib.Path, root: pathlib.Path = ROOT) -> None:
        self.result: dict[str, Any] = {}
        self._card, self._clock, self._path, self._root = card, clock, path, root
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Build:
        self._thread.start()
        return self

    def gate(self) -> str | None:
        if self._thread.is_alive() or not self.result:
            return None
        return "" if self.result["status"] == "ok" else f"CUDA extension not built: {self.result['error']}"

    def wait(self, until: float) -> bool:
        """Whether the extension is there, at the latest at the clock's second."""
        self._thread.join(self._clock.left(until))
        return self.gate() == ""

    def _run(self) -> None:
        try:
            self.result = self._build()
        except Exception as error:
            self.result = {"status": "failed", "error": f"{type(error).__name__}: {error}"}

    def _build(self) -> dict[str, Any]:
        stamp = self._root / STAMP.relative_to(ROOT)
        before = json.loads(stamp.read_text()) if stamp.is_file() else {"sources": {}, "times": {}}
        now = {"python": sys.executable, "capability": self._card.capability, "sources": hashes(self._root)}
        if library(self._root).is_file() and all(before.get(name) == value for name, value in now.items()):
            return {"status": "ok", "found": True}
        changed = [name for name, digest in now["sources"].items() if before["sources"].get(name) != digest]
        for name in now["sources"]:
            times = {} if name in changed else {"ns": (before["times"][name],) * 2}
            os.utime(self._root / name, **times)
        wishes = {"REATTN_BUILD_CPU": "0", "REATTN_BUILD_CUDA": "1", "REATTN_CUDA_ARCHS": self._card.capability}
        with self._path.open("w") as log:
            command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            # All but a breath of what is left: what does not get done is ended with everything else.
            result = run_command(command, self._clock.left() - 1, log, os.environ | wishes, self._root)
        if result["status"] == "ok":
            now["times"] = {name: (self._root / name).stat().st_mtime_ns for name in now["sources"]}
            stamp.parent.mkdir(exist_ok=True)
            stamp.write_text(json.dumps(now))
        else:
            said = FAILURE.findall(self._path.read_text(errors="replace"))
            result["error"] = said[0].strip()[:300] if said else result["error"]
        return {**result, "changed": len(changed)}
