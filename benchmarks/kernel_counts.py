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
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import sass
from reattn.backends.cuda_plan import SHARED_LIMIT

if TYPE_CHECKING:
    import emulator

NVRTC = "nvidia-cuda-nvrtc"
COUNTS = pathlib.Path(__file__).parent / "results" / "kernel_counts.json"
ARCH, MULTIPROCESSORS = 90, 132
SHAPES = ((128, 12, 197, 32), (128, 12, 197, 64), (32, 12, 577, 32), (1, 12, 197, 64))
NORMS = ("layer", "batch", "none")
# Padding: boolean by sample and key, here of full length.
MASKS = ("none", "padding", "causal")
BACKENDS = ("triton", "cuda")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(number: int, multiple: int) -> int:
    return ceil_div(number, multiple) * multiple


class Counts(NamedTuple):
    """Of a kernel's launches in a training step: blocks of all, what a block has, and what one of them does."""

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
    barriers: int  # of a block
    launches: int = 1
    mask: str = "none"
    pre_theta: bool = False  # scores are mixed before the softmax

    @property
    def resident(self) -> int:
        """Blocks that fit on a multiprocessor of compute capability 9.0 at a time."""
        each_warp = round_up(self.registers, 8) * 32
        by_registers = 65536 // (each_warp * ceil_div(self.threads, 32))
        return min(by_registers, 233472 // (self.shared_bytes + 1024), 2048 // self.threads, 32)


def read_counts(mask: str = "none", pre_theta: bool = False) -> list[Counts]:
    """What this module wrote, of such calls."""
    rows = (Counts(**{**row, "shape": tuple(row["shape"])}) for row in json.loads(COUNTS.read_text())["counts"])
    return [row for row in rows if (row.mask, row.pre_theta) == (mask, pre_theta)]


def count(
    backend: str,
    shape: tuple[int, int, int, int],
    norm: str,
    mask: str = "none",
    blocks: Sequence[int] = (0,),
    pre_theta: bool = False,
) -> list[Counts]:
    """Of every kernel of a training step in bfloat16; ``norm``: one of NORMS, batch norm in training; ``mask``: one of
    MASKS; ``pre_theta``: scores are mixed before the softmax. ``blocks``: which are executed, of those that a kernel
    has, and added up.

    Needs the emulator in the place of a GPU, as :func:`install` puts it there, or the tests do.
    """
    import emulator

    run = {"triton": run_triton, "cuda": run_cuda}[backend]
    with emulator.executing(blocks=list(blocks), check_races=False, count_wavefronts=True, once=True) as launches:
        run(shape, norm, mask, pre_theta)
    kernels: dict[str, list[emulator.Launched]] = {}
    for launch in launches:
        kernels.setdefault(launch.kernel, []).append(launch)
    return [_counts(each, backend, shape, norm)._replace(mask=mask, pre_theta=pre_theta) for each in kernels.values()]


def _counts(launches: list[emulator.Launched], backend: str, shape: tuple[int, int, int, int], norm: str) -> Counts:
    """Of the launches of one kernel, each of them like the first."""
    launch = launches[0]
    program, report, warps = launch.program, launch.report, launch.threads // 32
    # Of the two that triton ships, NVRTC's PTX needs the newer one; Triton takes the other one for this architecture.
    cubin = sass.assemble(program.ptx, "ptxas" if backend == "triton" else "ptxas-blackwell")
    # Instructions that share a line run together.
    issued = sass.executed(sass.disassemble(cubin)[program.name], {line: times for line, _, times in report.lines})
    return Counts(
        backend=backend,
        # reattn::forward of CUDA C++ has a name that ends in reattn7forwardENS_6ParamsE.
        kernel=re.search(r"(?:reattn\d+|^)([a-z_]+?)(?:_kernel$|E)", program.name)[1],
        shape=shape,
        norm=norm,
        blocks=sum(math.prod(each.grid) for each in launches),
        threads=launch.threads,
        registers=sass.registers(cubin)[program.name],
        shared_bytes=launch.shared_bytes + program.static_shared,
        instructions=round(issued.total()),
        special=round(sum(times for opcode, times in issued.items() if opcode.startswith("MUFU"))),
        shuffles=sum(times for _, opcode, times in report.lines if opcode.startswith("shfl")),
        tensor=sum(_operations(opcode) * times for _, opcode, times in report.lines),
        wavefronts=sum(wavefronts for *_, wavefronts, _ in report.shared),
        conflict_free=sum(least for *_, least in report.shared),
        global_bytes=report.device_bytes,
        launches=len(launches),
        barriers=sum(times for _, opcode, times in report.lines if opcode.startswith("bar.sync")) // warps,
    )


def _operations(opcode: str) -> int:
    """Of tensor cores in an instruction of PTX."""
    shape = re.match(r"mma\.\S*\.m(\d+)n(\d+)k(\d+)\.", opcode)
    return 2 * math.prod(map(int, shape.groups())) if shape else 0


class Filled(TorchDispatchMode):
    """New tensors hold ones: what blocks that are not executed would have written decides a branch or two."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.fill_(1) if "empty" in func.__name__ else result


def train_step(backend: Any, shape: tuple[int, int, int, int], norm: str, mask: str, pre_theta: bool) -> None:
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
    if pre_theta:
        inputs = inputs._replace(pre_theta=torch.eye(heads))
    named = None if norm == "none" else norm
    if mask == "padding":
        inputs = inputs._replace(attn_mask=torch.ones(batch, 1, 1, seqlen, dtype=torch.bool))
    around = {"mask": "bool" if mask == "padding" else None, "is_causal": mask == "causal", "pre_mixed": pre_theta}
    problem = Problem.of(inputs.query, norm=named, training=norm == "batch", scale=head_dim**-0.5, **around)
    with Filled():
        outputs = backend.forward(problem, inputs)
        backend.backward(problem, common.empty_heads_last(inputs.query).zero_(), inputs, outputs, None)


def run_triton(shape: tuple[int, int, int, int], norm: str, mask: str = "none", pre_theta: bool = False) -> None:
    """A training step on the Triton backend."""
    import triton

    from emulator import triton_driver
    from reattn.backends import triton as backend

    before = triton.runtime.driver.active.arch
    triton_driver.install(ARCH)
    try:
        with (
            mock.patch.object(backend, "_arch", lambda device: ARCH),
            mock.patch.object(backend, "_processors", lambda tensor: MULTIPROCESSORS),
        ):
            train_step(backend, shape, norm, mask, pre_theta)
    finally:
        triton_driver.install(before)


def run_cuda(shape: tuple[int, int, int, int], norm: str, mask: str = "none", pre_theta: bool = False) -> None:
    """The same on the CUDA backend. A block of the forward pass, which takes many groups of rows, stands for as many
    that take one."""
    import emulator.cuda
    from reattn.backends import cuda as backend
    from reattn.backends import cuda_driver

    before = cuda_driver.use(emulator.cuda.Driver(ARCH))
    launch = cuda_driver.launch

    def launch_all(loaded: Any, grid: tuple[int, int], *how: Any) -> None:
        *_, params, _ = how
        if loaded.kernel.function == "forward":
            grid = params.row_blocks_of_launch, grid[1]
        launch(loaded, grid, *how)

    try:
        with (
            mock.patch.object(backend, "_describe", lambda device: (SHARED_LIMIT[ARCH], MULTIPROCESSORS)),
            mock.patch.object(cuda_driver, "launch", launch_all),
        ):
            train_step(backend, shape, norm, mask, pre_theta)
    finally:
        cuda_driver.use(before)


def install() -> None:
    """Puts the emulator in the place of a GPU."""
    import emulator.cuda
    from emulator import triton_driver

    emulator.cuda.install(ARCH)
    triton_driver.install(ARCH)


def version(backend: str) -> str:
    """Of the compilers that the counts are of; triton brings ptxas, too."""
    import triton

    by_triton = f"triton {triton.__version__}"
    return by_triton if backend == "triton" else f"NVRTC {metadata.version(NVRTC)}, ptxas of {by_triton}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    install()
    rows = []
    for backend, shape, norm, mask, pre_theta in (
        *itertools.product(BACKENDS, SHAPES, NORMS, ["none"], [False]),
        *itertools.product(BACKENDS, SHAPES[:2], NORMS[:2], ["padding"], [False]),
        *itertools.product(BACKENDS, SHAPES[:2], NORMS[::2], ["none"], [True]),
    ):
        counts = count(backend, shape, norm, mask, pre_theta=pre_theta)
        rows += [json.dumps(each._asdict()) for each in counts]
        print(backend, shape, norm, mask, "pre_theta" * pre_theta, flush=True)
    made_with = {backend: version(backend) for backend in BACKENDS}
    head = f'{{"made with": {json.dumps(made_with)},\n"counts": [\n'
    COUNTS.write_text(head + ",\n".join(rows) + "\n]}\n")
    print(COUNTS)


if __name__ == "__main__":
    main()
