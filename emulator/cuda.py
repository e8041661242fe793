"""``install()``: the CUDA backend without a GPU: NVRTC compiles its kernels, and the emulator executes their PTX."""

from __future__ import annotations

import functools
import sys

import emulator
from emulator import _cuda, nvrtc

# The compute capability that the kernels are compiled for, 90 for 9.0.
arch = 90


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


def install(capability: int) -> None:
    """Puts the extension's host part in the place of ``reattn._cuda``, in this process, its kernels compiled for a
    compute capability: 90 for 9.0.

    To be called before ``reattn`` is imported.
    """
    global arch
    if "reattn.backends.cuda" in sys.modules:
        raise RuntimeError("emulator.cuda.install has to come before the import of reattn")
    arch = capability
    _cuda.set_launcher(launch)
    sys.modules["reattn._cuda"] = _cuda
