"""``python -m benchmarks.kernel_counts``: what a block of each GPU kernel does, counted by executing it; no GPU needed.

Compiles what a training step launches at the headline shapes for an H100 or H200 and executes one block of each
kernel's PTX in the emulator: how often each line of it ran, wavefronts of shared memory with and without bank
conflicts, bytes of global memory. What was issued follows from the machine code (``sass``). Writes
results/kernel_counts.json, which ``cost_model`` reads. Needs triton, NVRTC and the emulator, which ``make emulator``
builds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import pathlib
import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import compile_report, sass

COUNTS = pathlib.Path(__file__).parent / "results" / "kernel_counts.json"
ARCH, SHARED_BYTES, MULTIPROCESSORS = 90, 232448, 132
SHAPES = ((128, 12, 197, 32), (128, 12, 197, 64), (32, 12, 577, 32), (1, 12, 197, 64))
NORMS = ("layer", "batch", "none")
BACKENDS = ("triton", "cuda")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(number: int, multiple: int) -> int:
    return ceil_div(number, multiple) * multiple


class Counts(NamedTuple):
    """Of a kernel's launch: blocks, what a block has, and what one of them does."""

    backend: str
    kernel: str
    shape: tuple[int, int, int, int]
    norm: str
    blocks: int
    threads: int
    registers: int  # of a thread
    shared_bytes: int
    instructions: int  # of a warp, that are issued
    special: int
    shuffles: int
    tensor: int  # operations of tensor cores
    wavefronts: int  # of shared memory
    conflict_free: int  # wavefronts that there would be without bank conflicts
    global_bytes: int  # that lanes load, store or copy

    @property
    def resident(self) -> int:
        """Blocks that fit on a multiprocessor of compute capability 9.0 at a time."""
        each_warp = round_up(self.registers, 8) * 32
        by_registers = 65536 // (each_warp * ceil_div(self.threads, 32))
        return min(by_registers, 233472 // (self.shared_bytes + 1024), 2048 // self.threads, 32)


class Launch(NamedTuple):
    """A kernel that was launched: what it is compiled to, and what a block of it did."""

    kernel: str
    entry: str
    cubin: bytes
    blocks: int
    threads: int
    shared_bytes: int
    report: Any


def read_counts(path: pathlib.Path = COUNTS) -> list[Counts]:
    """What this module wrote."""
    rows = json.loads(path.read_text())["counts"]
    return [Counts(**{**row, "shape": tuple(row["shape"])}) for row in rows]


def count(backend: str, shape: tuple[int, int, int, int], norm: str) -> list[Counts]:
    """Of every launch of a training step in bfloat16; ``norm``: one of NORMS, batch norm in training."""
    launches = {"triton": triton_launches, "cuda": cuda_launches}[backend](shape, norm)
    return [_counts(launch, backend, shape, norm) for launch in launches]


def _counts(launch: Launch, backend: str, shape: tuple[int, int, int, int], norm: str) -> Counts:
    report = launch.report
    # Lines hold one instruction each, or some that run together.
    lines = {line: times for line, _, times in report.executed}
    issued = sass.executed(sass.disassemble(launch.cubin)[launch.entry], lines)
    return Counts(
        backend=backend,
        kernel=launch.kernel,
        shape=shape,
        norm=norm,
        blocks=launch.blocks,
        threads=launch.threads,
        registers=sass.registers(launch.cubin)[launch.entry],
        shared_bytes=launch.shared_bytes,
        instructions=round(issued.total()),
        special=round(sum(times for opcode, times in issued.items() if opcode.startswith("MUFU"))),
        shuffles=sum(times for _, opcode, times in report.executed if opcode.startswith("shfl")),
        tensor=sum(_operations(opcode) * times for _, opcode, times in report.executed),
        wavefronts=sum(wavefronts for *_, wavefronts, _ in report.shared),
        conflict_free=sum(least for *_, least in report.shared),
        global_bytes=report.device_bytes,
    )


def _operations(opcode: str) -> int:
    """Of tensor cores in an instruction of PTX."""
    shape = re.match(r"mma\.\S*\.m(\d+)n(\d+)k(\d+)\.", opcode)
    return 2 * math.prod(map(int, shape.groups())) if shape else 0


def train_step(backend: Any, shape: tuple[int, int, int, int], norm: str) -> None:
    """Both directions on the CPU's memory. Only the first sample has numbers: blocks of others are not executed."""
    from reattn.backends import common
    from reattn.backends.contract import Inputs
    from reattn.problem import Problem

    batch, heads, seqlen, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.zeros(batch, seqlen, 3, heads, head_dim, dtype=torch.bfloat16)
    qkv[0].normal_(generator=generator)
    inputs = Inputs(*qkv.permute(2, 0, 3, 1, 4), torch.eye(heads), torch.zeros(heads))
    if norm != "none":
        inputs = inputs._replace(norm_weight=torch.ones(heads), norm_bias=torch.zeros(heads))
    if norm == "batch":
        running = torch.zeros(heads), torch.ones(heads), torch.zeros((), dtype=torch.int64)
        inputs = inputs._replace(running_mean=running[0], running_var=running[1], num_batches_tracked=running[2])
    named = None if norm == "none" else norm
    problem = Problem.of(inputs.query, norm=named, training=norm == "batch", scale=head_dim**-0.5)
    outputs = backend.forward(problem, inputs)
    backend.backward(problem, common.empty_heads_last(inputs.query).zero_(), inputs, outputs, None)


def _execute(
    kernel: str, ptx: str, cubin: bytes, grid: tuple[int, ...], threads: int, shared_bytes: int, **launch: Any
) -> Launch:
    """A launch of which one block is executed; ``launch``: what Program.run takes beside these."""
    from emulator._machine import Program

    entry = re.search(r"\.entry\s+(\w+)", ptx)[1]
    program = Program(ptx, entry)
    if callable(launch["arguments"]):
        launch["arguments"] = launch["arguments"](program)
    threads = threads or program.threads
    sizes = {"grid": (*grid, 1, 1)[:3], "threads": threads, "shared_bytes": shared_bytes}
    # Tests look for races; here that would take memory for every byte of the tensors.
    report = program.run(**sizes, **launch, blocks=[0], check_races=False, count_wavefronts=True)
    return Launch(kernel, entry, cubin, math.prod(grid), threads, shared_bytes + program.static_shared, report)


def triton_launches(shape: tuple[int, int, int, int], norm: str) -> list[Launch]:
    """Of a training step on the Triton backend; a block of each is executed."""
    from reattn.backends import common
    from reattn.backends import triton as backend

    launches = []

    def run(kernel: Any, grid: tuple[int, ...], tile: Any, *args: Any, **constants: Any) -> None:
        compiled = compile_report.compile_launch(kernel, args, constants, tile, ARCH)
        given = list(_passed(args))
        storages = [value.untyped_storage() for value in given if isinstance(value, torch.Tensor)]
        launches.append(
            _execute(
                kernel.__name__.removesuffix("_kernel"),
                compiled.asm["ptx"],
                compiled.asm["cubin"],
                grid,
                32 * tile.num_warps,
                compiled.metadata.shared,
                arguments=lambda program: _packed(given, program.parameters),
                memory=[(storage.data_ptr(), storage.nbytes()) for storage in storages],
            )
        )

    with (
        mock.patch.object(backend, "_run", run),
        mock.patch.object(backend, "_arch", lambda device: ARCH),
        mock.patch.object(backend, "_splits", lambda out: common.splits(out, MULTIPROCESSORS)),
    ):
        train_step(backend, shape, norm)
    return launches


def _passed(args: tuple[Any, ...]) -> Iterator[Any]:
    """The arguments that a compiled kernel has parameters for."""
    for value in args:
        if isinstance(value, tuple):
            yield from _passed(value)
        elif value is not None and not isinstance(value, bool) and not (isinstance(value, int) and value == 1):
            yield value


def _packed(values: list[Any], parameters: list[tuple[str, int, int]]) -> bytes:
    """As the space of parameters holds them; zeros for those that Triton adds."""
    packed = b""
    for value, (_, offset, size) in zip([*values, *[0] * (len(parameters) - len(values))], parameters, strict=True):
        packed = packed.ljust(offset, b"\0")
        if isinstance(value, float):
            packed += struct.pack("<f", value)
        else:
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            packed += number.to_bytes(size, "little", signed=number < 0)
    return packed


def cuda_launches(shape: tuple[int, int, int, int], norm: str) -> list[Launch]:
    """The same on the CUDA backend; NVRTC and ptxas compile the sources as nvcc does.

    Raises RuntimeError where ``emulator.cuda.install()`` was not called before reattn was imported.
    """
    import emulator.cuda
    from emulator import nvrtc

    from reattn.backends import cuda as backend

    if not backend.EMULATED:
        raise RuntimeError("emulator.cuda.install() has to be called before reattn is imported")
    launches = []

    def run(
        source: str,
        name: str,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        params: bytes,
        memory: list[tuple[int, int]],
    ) -> None:
        ptx, _ = nvrtc.compile_kernel(source, name, ARCH)
        kernel = re.search(r"(\w+)_kernel", name)[1]
        # Of the two that triton ships, the newer one: NVRTC's PTX is of CUDA 13.
        cubin = sass.assemble(ptx, f"sm_{ARCH}", "ptxas-blackwell")
        launches.append(_execute(kernel, ptx, cubin, grid, threads, shared_bytes, arguments=params, memory=memory))

    backend._cuda.set_launcher(run)
    try:
        with mock.patch.object(backend, "_describe", lambda device: (SHARED_BYTES, MULTIPROCESSORS)):
            train_step(backend, shape, norm)
    finally:
        backend._cuda.set_launcher(emulator.cuda.launch)
    return launches


def versions() -> dict[str, str]:
    """Of the compilers that the counts are of."""
    import triton
    from emulator import nvrtc

    return {"triton": triton.__version__, "nvrtc": ".".join(map(str, nvrtc.version()))}


def main() -> None:
    import emulator.cuda

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    emulator.cuda.install()
    rows = []
    for backend, shape, norm in itertools.product(BACKENDS, SHAPES, NORMS):
        rows += [json.dumps(each._asdict()) for each in count(backend, shape, norm)]
        print(backend, shape, norm, flush=True)
    head = f'{{"made with": {json.dumps(versions())},\n"counts": [\n'
    COUNTS.write_text(head + ",\n".join(rows) + "\n]}\n")
    print(COUNTS)


if __name__ == "__main__":
    main()
