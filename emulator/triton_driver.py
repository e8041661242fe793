"""A driver for Triton whose device is the emulator: kernels are compiled for a GPU, their PTX runs on CPU tensors."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

import emulator
from reattn.backends.cuda_plan import SHARED_LIMIT

_FORMATS = {
    "i1": "B",
    "i8": "b",
    "i16": "h",
    "i32": "i",
    "i64": "q",
    "u1": "B",
    "u8": "B",
    "u16": "H",
    "u32": "I",
    "u64": "Q",
}
_FORMATS |= {"fp32": "f", "fp64": "d"}


class Driver(DriverBase):
    """As Triton's driver of a CUDA device of this compute capability, 90 for 9.0."""

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch
        self.launcher_cls = Launcher
        properties = {"max_shared_mem": SHARED_LIMIT[arch], "multiprocessor_count": 4}
        self.utils = SimpleNamespace(load_binary=self.load_binary, get_device_properties=lambda device: properties)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by device.
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError("the emulator has no time")

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """(module, function, registers, spilled registers, most threads)"""
        program = emulator.Program(kernel.decode(), name)
        return program, program, 0, 0, 1024  # without a module, Triton would load it again for every launch


class Launcher:
    """Executes a compiled kernel; called as Triton calls its own launchers."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.types = tuple(src.signature.values())
        self.threads = 32 * metadata.num_warps
        self.shared_bytes = metadata.shared

    def __call__(
        self, grid_x: int, grid_y: int, grid_z: int, stream: int, program: emulator.Program, packed: Any,
        launch_metadata: Any, enter_hook: Any, exit_hook: Any, *args: Any,
    ) -> None:  # fmt: skip
        arguments, memory = bytearray(program.parameters[-1][1] + program.parameters[-1][2]), []
        given = list(_flat(self.types, args))
        # Two more that Triton adds: scratch memory, which no kernel here has.
        assert len(given) + 2 == len(program.parameters), (given, program.parameters)
        for (type_, value), (_, offset, _) in zip(given, program.parameters, strict=False):
            if type_.startswith("*"):
                memory.append((value.data_ptr(), emulator.extent(value)))
                struct.pack_into("<Q", arguments, offset, value.data_ptr())
            else:
                struct.pack_into("<" + _FORMATS[type_], arguments, offset, value)
        emulator.launch(program, (grid_x, grid_y, grid_z), self.threads, self.shared_bytes, bytes(arguments), memory)


def _flat(types: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """(type, value) of the arguments that are none of the kernel's constants; tuples one after the other."""
    for type_, value in zip(types, values, strict=True):
        if isinstance(type_, tuple):
            yield from _flat(type_, value)
        elif type_ != "constexpr":
            yield type_, value


def _stages(backend: Any = None, stages: dict[str, Any] | None = None, *_: Any) -> tuple[str, str] | None:
    """PTX is what is executed: no machine code is made of it."""
    if stages is None:
        return "executed PTX", "executed PTX"
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


def install(arch: int = 90) -> None:
    """From now on Triton's kernels are compiled for this compute capability and executed by the emulator."""
    triton.knobs.runtime.add_stages_inspection_hook = _stages
    triton.runtime.driver.set_active(Driver(arch))
