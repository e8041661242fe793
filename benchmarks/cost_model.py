"""``python -m benchmarks.cost_model``: forecasts of the GPU kernels.

What a kernel does is counted by executing it (``kernel_counts``); its time lies between that of the resource it keeps
busiest and that of all of them together. Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.kernel_counts import Counts, ceil_div, read_counts, round_up
from reattn.backends import cuda_plan

RESULTS = pathlib.Path(__file__).parent / "results"
PAGE = RESULTS.parents[1] / "docs" / "performance.md"
SWEEPS = ("forward", "grad_maps", "grad_query", "grad_key", "backward", "products")


class Card(NamedTuple):
    """A GPU: figures of its data sheet, the clock being the one that its float32 rate implies."""

    name: str
    multiprocessors: int
    clock: float
    memory: float  # bytes a second


CARDS = (Card("H100", 132, 1.98e9, 3.35e12), Card("H200", 132, 1.98e9, 4.8e12))
# Of the 989 TFLOP/s that wgmma reaches on them, mma.sync reaches 62.9 % (arXiv 2501.12084): operations a second.
MMA = 0.629 * 989.4e12
# What L2 delivers no data sheet tells. XLA's cost model has 6.65 TB/s, measured on an H100. A multiprocessor alone gets
# 64 bytes a clock.
L2, L2_PORT = 6.65e12, 64
# What a multiprocessor does in a clock (CUDA C++ Programming Guide, "Arithmetic Instructions"): warp instructions, and
# special functions of a lane. One wavefront of shared memory or one shuffle goes through its load and store unit.
ISSUE, SPECIAL, WAVEFRONTS = 4, 16, 1
# What a launch takes beyond its work.
START = 2e-6

# Tensors of (batch, heads, seqlen, head_dim) that a kernel has to read or write, once each.
# The maps that kernels of a backward pass leave each other are not counted: they stay in L2.
TENSORS = {"forward": 4, "finish": 3, "grad_sums": 2, "add_up": 0, "unfold": 0}
TENSORS |= {"grad_maps": 4, "grad_scores": 2, "grad_query": 3, "grad_key": 4, "backward": 5, "unmix": 3, "products": 4}


class Forecast(NamedTuple):
    """Of a kernel's launches on a card, all together.

    ``seconds``: what it is expected to take, halfway between ``floor``, where the resource that ``binding`` names runs
    at its full rate and hides all others, and ``serial``, where nothing hides anything. ``bytes_floor``: what device
    memory alone would take.
    """

    backend: str
    kernel: str
    shape: tuple[int, int, int, int]
    norm: str
    seconds: float
    binding: str
    floor: float
    serial: float
    bytes_floor: float
    counts: Counts

    def for_32(self, number: float) -> float:
        """Of a number of a block: how many there are for 32 elements of the maps, none of them padding."""
        batch, heads, seqlen, _ = self.shape
        return number * self.counts.blocks / (batch * heads * seqlen**2 / 32)

    def for_32_computed(self, number: float) -> float:
        """The same for 32 elements that a CUDA kernel computes, those of whole tiles of 16 keys and a block's rows."""
        batch, heads, seqlen, head_dim = self.shape
        rows = 16
        if self.kernel == "forward":
            size = cuda_plan.Size(2, heads, head_dim, batch, seqlen, seqlen, self.norm == "batch")
            plan = cuda_plan.make_plan("forward", size, cuda_plan.SHARED_LIMIT[90], CARDS[0].multiprocessors)
            assert plan, "an H100 has room for it"
            rows = plan.rows
        return self.for_32(number) * seqlen**2 / (round_up(seqlen, rows) * round_up(seqlen, 16))


def forecast(counts: Counts, card: Card) -> Forecast:
    """By what the multiprocessor does that has most blocks, and by what all of them move."""
    clocks = counts.launches * ceil_div(ceil_div(counts.blocks, counts.launches), card.multiprocessors) / card.clock
    moved = counts.blocks * counts.global_bytes
    times = {
        "issue": clocks * counts.instructions / ISSUE,
        "special": clocks * counts.special * 32 / SPECIAL,
        "shared": clocks * (counts.wavefronts + counts.shuffles) / WAVEFRONTS,
        "tensor": clocks * counts.tensor / (MMA / card.multiprocessors / card.clock),
        "L2": max(moved / L2, clocks * counts.global_bytes / L2_PORT),
        "memory": TENSORS[counts.kernel] * math.prod(counts.shape) * 2 / card.memory,
    }
    binding = max(times, key=times.__getitem__)
    start = counts.launches * START
    floor, serial = start + times[binding], start + sum(times.values())
    place = counts.backend, counts.kernel, counts.shape, counts.norm
    return Forecast(*place, (floor + serial) / 2, binding, floor, serial, times["memory"], counts)


def forecasts(card: str) -> list[Forecast]:
    """For every launch of a training step at the headline shapes in bfloat16, from the committed counts.

    ``card``: a name that holds that of one in CARDS, as torch gives it. Raises ValueError for another one.
    """
    found = [each for each in CARDS if each.name in card]
    if not found:
        raise ValueError(f"card is {card!r}; there are figures for {', '.join(each.name for each in CARDS)}")
    return [forecast(counts, found[0]) for counts in read_counts()]


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    assert all(len(row) == len(columns) for row in rows), (columns, rows)
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)] + [""]


def kernel_table(shape: tuple[int, int, int, int]) -> list[str]:
    """Of every launch at a shape: what it does for 32 elements of the maps, microseconds on the first of CARDS, and
    those expected on the others."""
    found = [[each for each in forecasts(card.name) if each.shape == shape] for card in CARDS]
    rows = []
    for each, *others in zip(*found, strict=True):
        counts = each.counts
        numbers = [counts.instructions, counts.wavefronts + counts.shuffles, counts.conflict_free + counts.shuffles]
        cells = [f"{each.for_32(number):.1f}" if each.kernel in SWEEPS else "-" for number in numbers]
        waves = counts.blocks / (CARDS[0].multiprocessors * counts.resident)
        cells += [f"{counts.blocks * counts.global_bytes / 1e6:.0f}", f"{counts.blocks}", f"{counts.resident}"]
        cells.append(f"{waves:.1f}")
        times = each.bytes_floor, each.floor, each.seconds, each.serial, *(other.seconds for other in others)
        cells += [each.binding, *(f"{1e6 * time:.0f}" for time in times)]
        rows.append([each.norm, each.backend, each.kernel, *cells])
    columns = [
        "x".join(map(str, shape)),
        "backend",
        "kernel",
        "instructions",
        "wavefronts",
        "without conflicts",
        "L2 MB",
    ]
    columns += ["blocks", "at a time", "waves", "binds", "bytes", "floor", "**expected**", "serial"]
    return table(columns + [f"on an {card.name}" for card in CARDS[1:]], rows)


BACKWARD = ("grad_sums", "add_up", "backward", "unmix", "products", "unfold")


def instructions(
    backend: str, shape: tuple[int, int, int, int], norm: str, kernels: Sequence[str]
) -> tuple[float, float]:
    """Warp instructions of a pass for 32 elements of the maps: those that there are, and those that are computed."""
    found = [
        each for each in forecasts(CARDS[0].name) if (each.backend, each.shape, each.norm) == (backend, shape, norm)
    ]
    mine = [each for each in found if each.kernel in kernels]
    numbers = [(each.for_32(n), each.for_32_computed(n)) for each in mine for n in [each.counts.instructions]]
    of_maps, computed = map(sum, zip(*numbers, strict=True))
    return of_maps, computed


def instruction_table() -> list[str]:
    """What the CUDA kernels of a pass issue."""
    rows = []
    for shape in dict.fromkeys(each.shape for each in read_counts()):
        for norm in dict.fromkeys(each.norm for each in read_counts()):
            passes = instructions("cuda", shape, norm, ["forward"]), instructions("cuda", shape, norm, BACKWARD)
            rows.append(["x".join(map(str, shape)), norm, *(f"{number:.1f}" for each in passes for number in each)])
    columns = ["forward", "of those computed", "backward", "of those computed"]
    return table(["CUDA, warp instructions for 32 elements", "norm", *columns], rows)


def call_table() -> list[str]:
    """Microseconds that the launches of a call are expected to take together."""
    found = [(card.name, forecasts(card.name)) for card in CARDS]
    rows = []
    for call in dict.fromkeys((each.shape, each.norm, each.backend) for each in found[0][1]):
        cells = []
        for _, launches in found:
            mine = [each for each in launches if (each.shape, each.norm, each.backend) == call]
            forward = sum(each.seconds for each in mine if each.kernel in ("forward", "finish"))
            cells += [f"{1e6 * time:.0f}" for time in (forward, sum(each.seconds for each in mine))]
        rows.append(["x".join(map(str, call[0])), call[1], call[2], *cells])
    columns = [f"{name}, {what}" for name, _ in found for what in ("forward", "with backward")]
    return table(["forecast", "norm", "backend", *columns], rows)


def extra_table(name: str, **extra: Any) -> list[str]:
    """What the ``extra`` of counts costs: over the same call without it, instructions and the time that is expected."""
    card = CARDS[0]
    with_extra = [forecast(counts, card) for counts in read_counts(**extra)]
    rows = []
    for call in dict.fromkeys((each.shape, each.norm, each.backend) for each in with_extra):
        cells = []
        for number in (lambda each: each.counts.blocks * each.counts.instructions, lambda each: each.seconds):
            for only in (("forward", "finish"), None):
                mine, others = (
                    sum(
                        number(each)
                        for each in found
                        if (each.shape, each.norm, each.backend) == call and (only is None or each.kernel in only)
                    )
                    for found in (with_extra, forecasts(card.name))
                )
                cells.append(f"{mine / others:.2f}")
        rows.append(["x".join(map(str, call[0])), call[1], call[2], *cells])
    of, parts = ("instructions", f"time on an {card.name}"), ("forward", "with backward")
    columns = [f"{what}, {part}" for what in of for part in parts]
    return table([f"{name} over none", "norm", "backend", *columns], rows)


def tables() -> list[str]:
    """Lines of Markdown."""
    shapes = dict.fromkeys(each.shape for each in read_counts())
    gpu = [line for shape in shapes for line in kernel_table(shape)] + instruction_table() + call_table()
    gpu += extra_table("a padding mask", mask="padding") + extra_table("mixing before the softmax", pre_theta=True)
    title = f"GPU, bfloat16; counts for 32 elements of the maps, microseconds on an {CARDS[0].name}:"
    return [title, "", *gpu]


def updated(page: str, lines: list[str]) -> str:
    """A page with the rows of those tables that it shows, which it knows by their columns."""
    for columns, rows in re.findall(r"(\|.*\n)((?:\|.*\n)+)", "\n".join([*lines, ""])):
        page = re.sub(re.escape(columns) + r"(?:\|.*\n)+", lambda _, new=columns + rows: new, page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--docs", action="store_true", help="bring the tables of docs/performance.md up to date instead"
    )
    if parser.parse_args().docs:
        PAGE.write_text(updated(PAGE.read_text(), tables()))
    else:
        print("\n".join(tables()).rstrip())


if __name__ == "__main__":
    main()
