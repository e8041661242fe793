"""Executes what the compilers make of the GPU kernels, their PTX, on the CPU. Results are those of the device, bit for
bit, where PTX says what the bits are; every race, stray access and divergent collective is an error. Tests run the
Triton and the CUDA backend through it where there is no GPU; the cost model takes its counts from it.

It is no model of time, and not of ptxas but for one thing: products and sums that PTX lets it contract are contracted.
What approximate instructions may be off, they are off. Sums of tensor cores are rounded toward zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

try:
    import emulator._machine as _machine
except ImportError as error:
    raise ImportError(f"{error}; `make emulator` compiles it") from None

Fault, Program, Report = _machine.Fault, _machine.Program, _machine.Report


class Launched(NamedTuple):
    """A launch that was executed: the kernel's name, the blocks of its grid, threads and bytes of shared memory of a
    block beside what the kernel declares itself, what warps executed, and the kernel."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    report: Report
    program: Program


# How launches are executed, and the list that they are put into; ``executing`` sets both for a while.
_options: dict[str, Any] = {"blocks": None, "check_races": True, "count_wavefronts": False}
_once = False
_launches: list[Launched] | None = None


@contextlib.contextmanager
def executing(
    *, blocks: list[int] | None = None, check_races: bool = True, count_wavefronts: bool = False, once: bool = False
) -> Iterator[list[Launched]]:
    """Collects the launches within. ``blocks``: the numbers of those that are executed, the others are left out;
    ``check_races=False`` is quicker; ``count_wavefronts`` fills ``Report.shared``; ``once``: nothing is executed of a
    kernel's later launches."""
    global _options, _launches, _once
    before = _options, _launches, _once
    _options = {"blocks": blocks, "check_races": check_races, "count_wavefronts": count_wavefronts}
    _launches, _once = [], once
    try:
        yield _launches
    finally:
        _options, _launches, _once = before


def launch(
    program: Program,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    arguments: bytes,
    memory: list[tuple[int, int]],
) -> None:
    """Executes a launch. ``memory``: (address, bytes) of what the kernel may touch. Raises ``Fault``."""
    options = dict(_options)
    if _once and any(launched.program is program for launched in _launches or []):
        options["blocks"] = []
    if options["blocks"] is not None:
        options["blocks"] = [block for block in options["blocks"] if block < grid[0] * grid[1] * grid[2]]
    report = program.run(
        grid=grid, threads=threads, shared_bytes=shared_bytes, arguments=arguments, memory=memory, **options
    )
    if _launches is not None:
        _launches.append(Launched(program.name, grid, threads, shared_bytes, report, program))


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
