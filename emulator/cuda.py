"""``install()``: the CUDA backend without a GPU: NVRTC compiles its kernels, and the emulator executes their PTX."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

import emulator
from reattn.backends import cuda, cuda_driver
from reattn.backends.cuda_compile import Code, Kernel
from reattn.backends.cuda_driver import Loaded
from reattn.backends.cuda_plan import SHARED_LIMIT

# Of an H100's block; and few enough multiprocessors for a small problem to occupy.
SHARED_BYTES, MULTIPROCESSORS = SHARED_LIMIT[90], 4


@functools.cache
def _program(image: bytes, entry: str) -> emulator.Program:
    return emulator.Program(image.decode(), entry)


class Driver:
    """As :class:`reattn.backends.cuda_driver.CudaDriver`, of a device of this compute capability, 90 for 9.0."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def target(self, device: int) -> str:
        return f"compute_{self.arch}"

    def describe(self, device: int) -> tuple[int, int]:
        return SHARED_BYTES, MULTIPROCESSORS

    def load(self, device: int, kernel: Kernel, code: Code) -> emulator.Program:
        return _program(code.image, code.entry)

    def launch(
        self,
        loaded: Loaded,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        params: ctypes.Structure,
        tensors: Sequence[torch.Tensor | None],
    ) -> None:
        if shared_bytes > SHARED_BYTES or not (0 < grid[0] < 1 << 31 and 0 < grid[1] < 1 << 16):
            raise RuntimeError(f"{loaded.kernel.name}: CUDA_ERROR_INVALID_VALUE (emulated)")
        memory = [(tensor.data_ptr(), emulator.extent(tensor)) for tensor in tensors if tensor is not None]
        memory = [(begin, size) for begin, size in memory if size]
        emulator.launch(loaded.function, (*grid, 1), threads, shared_bytes, bytes(params), memory)


def install(arch: int = 90) -> None:
    """From now on CUDA kernels are compiled for this compute capability and executed by the emulator."""
    cuda_driver.use(Driver(arch))
    cuda.EMULATED = True
