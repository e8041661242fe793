"""``install()``: the CUDA backend without a GPU. Its kernels are compiled by NVRTC and their PTX is run here."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from emulator import nvrtc
from emulator._machine import Program

FOLDER = Path(__file__).resolve().parents[1] / "out" / "emulator"

# The compute capability that the kernels are compiled for, 90 for 9.0. From 8.0 on the sources are the same for all.
arch = 80


@functools.cache
def compiled(source: str, name: str, arch: int) -> Program:
    """See :func:`emulator.nvrtc.compile_kernel`."""
    return Program(*nvrtc.compile_kernel(source, name, arch))


def launch(
    source: str,
    name: str,
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    params: bytes,
    memory: Sequence[tuple[int, int]],
    blocks: Sequence[int] | None = None,
) -> None:
    """What a launch of the extension comes to: see emulator/cuda_host.h; ``blocks`` alone, in that order."""
    program = compiled(source, name, arch)
    program.run(
        grid=(*grid, 1), threads=threads, shared_bytes=shared_bytes, arguments=params, memory=memory, blocks=blocks
    )


def install() -> None:
    """Puts the extension's host part in the place of ``reattn._cuda``, in this process.

    To be called before ``reattn`` is imported. Raises ImportError where `make emulator` has not been run.
    """
    if "reattn.backends.cuda" in sys.modules:
        raise RuntimeError("emulator.cuda.install() has to come before reattn's import")
    spec = importlib.machinery.PathFinder.find_spec("_cuda", [str(FOLDER)])
    if spec is None or spec.loader is None:
        raise ImportError(f"no extension module _cuda in {FOLDER}: run `make emulator`")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.set_launcher(launch)
    sys.modules["reattn._cuda"] = module
