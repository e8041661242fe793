"""``install()``: the CUDA backend without a GPU: NVRTC compiles its kernels, and the emulator executes their PTX."""

from __future__ import annotations

import functools
import sys

import emulator
from emulator import nvrtc

# The compute capability that the kernels are compiled for, 90 for 9.0. From 8.0 on their sources are the same for all.
arch = 80


@functools.cache
def compiled(source: str, name: str, arch: int) -> emulator.Program:
    """See :func:`emulator.nvrtc.compile_kernel`."""
    return emulator.Program(*nvrtc.compile_kernel(source, name, arch))


def launch(
    source: str,
    name: str,
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    params: bytes,
    memory: list[tuple[int, int]],
) -> None:
    """What a launch of the extension comes to: see emulator/cuda_host.h."""
    emulator.launch(compiled(source, name, arch), (*grid, 1), threads, shared_bytes, params, memory)


def install() -> None:
    """Puts the extension's host part in the place of ``reattn._cuda``, in this process.

    To be called before ``reattn.backends`` is imported. Raises ImportError where `make emulator` has not been run.
    """
    from emulator import _cuda

    if "reattn.backends.cuda" in sys.modules:
        raise RuntimeError("emulator.cuda.install() has to come before reattn's import")
    _cuda.set_launcher(launch)
    sys.modules["reattn._cuda"] = _cuda
