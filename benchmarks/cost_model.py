"""``python -m benchmarks.cost_model``: forecasts of the GPU kernels; on a CPU predicted times beside measured ones.

GPU: what a kernel does is counted by executing it (``kernel_counts``); its time lies between that of the resource it
keeps busiest and that of all of them together. CPU: a call is stages one after the other, at rates that ``cpu_stages``
measured; its predicted time is their sum on the busiest thread. Prints Markdown.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import pathlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.kernel_counts import Counts, ceil_div, read_counts, round_up
from benchmarks.measure import Problem
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
TENSORS |= {"grad_maps": 4, "grad_query": 3, "grad_key": 4, "backward": 5, "products": 4}


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


# A core of the AMD EPYC (Zen 3, AVX2) of benchmarks/results/amd-epyc-zen3, as cpu_stages measured it.
LANES, FLOPS_PER_CYCLE = 8, 32
# A product reaches this share, as if every sum had so many terms more: at head_dim 16, 32, 64 and over 98 keys.
PRODUCT_SHARE, PRODUCT_START = 0.88, 3.1
# Cycles an element of the maps: the softmax, and with the LSE known; the norm; what is no product in a row of the
# backward pass, and the norm there.
SOFTMAX, EXPONENTIALS, NORMALISE, BACKWARD_ROW, NORM_BACKWARD = 1.8, 1.3, 0.6, 2.0, 1.5
# The same of batch norm: its sums in training, and the backward pass. By how much longer calls take than those without
# a norm, on a core that is not the one above.
MOMENTS_SUMS, BATCH_BACKWARD = 0.4, 0.6
# Nanoseconds, whatever the clock, a float that comes from or goes to memory; cycles more if head_dim is not aligned.
PACK, PACK_BACKWARD, LOAD, STORE, STORE_GRADIENT, REDUCE, UNALIGNED = 0.58, 1.55, 0.83, 0.28, 0.68, 1.19, 1.4
# Million cycles of a call of next to no work, forward and with backward: Python and autograd; with layer norm and
# running statistics those of the code that the committed results are of, which folded the norm in PyTorch.
CALL = {"none": (0.35, 1.3), "layer": (0.5, 1.6), "batch-eval": (0.5, 1.7), "batch": (0.41, 1.5)}
# The folder of results that the model is for; other cores have other rates. Its batch norm in training is that of older
# kernels, which took the statistics in a sweep of their own and computed every score twice: that is left out.
MODELLED = "amd-epyc-zen3"
# Cycles of plain attention, forward and with backward: an element of its maps, more for each of head_dim in whole
# sixteens, a call: the yardstick of a core's speed. Fitted to committed results, as the next two are.
PLAIN = ((3.0, 0.18, 0.15e6), (10.5, 0.52, 0.5e6))
# What stays in the L3 cache of a shared host, and bytes a second of what does not, for all threads: read off the growth
# beyond 1024 tokens.
CACHE, BEYOND_CACHE = 12e6, 24e9

Stages = Counter[str]  # seconds by name


class CpuPlan(NamedTuple):
    """As csrc/cpu/driver.cpp cuts a problem with AVX2; ``keys`` are padded, ``whole`` rows are swept once."""

    keys: int
    whole: bool
    block_rows: int
    groups: int
    group_rows: int
    wave: int


def cpu_plan(problem: Problem, backward: bool) -> CpuPlan:
    batch, heads, seqlen, head_dim = problem.shape
    keys = round_up(seqlen, LANES)
    row_length = 16 * (ceil_div(keys, 16) | 1)
    row_bytes = (8 if backward else 4) * heads * row_length
    fewest, most, wanted_bytes = (24, 48, 1 << 20) if backward else (12, 48, 384 << 10)
    block_rows = min(max(wanted_bytes // row_bytes, fewest), most)
    whole = block_rows * row_bytes <= 5 << 20
    block_rows = block_rows if whole else most
    sample_bytes, groups = 8 * heads * round_up(keys, 16) * head_dim, 1
    if backward:
        grad_bytes = 8 * heads * row_length * head_dim
        groups = max(min(ceil_div(8, batch), (192 << 20) // grad_bytes, seqlen // 48), 1)
        sample_bytes = 2 * sample_bytes + groups * grad_bytes
    else:
        block_rows = min(max(ceil_div(batch * seqlen, 16), fewest), block_rows)
    group_rows = ceil_div(seqlen, groups)
    block_rows = round_up(ceil_div(group_rows, ceil_div(group_rows, block_rows)), 6)
    return CpuPlan(keys, whole, block_rows, groups, group_rows, min(max((16 << 20) // sample_bytes, 1), batch))


@dataclass(frozen=True)
class Core:
    """Seconds of what a core does for a problem."""

    problem: Problem
    clock: float

    def cycles(self, number: float) -> float:
        return number / self.clock

    def moved(self, floats: float, nanoseconds: float) -> float:
        unaligned = self.problem.head_dim % LANES > 0
        return floats * (1e-9 * nanoseconds + unaligned * self.cycles(UNALIGNED))

    def product(self, rows: int, columns: int, depth: int) -> float:
        parts = 1 << (ceil_div(depth, 128) - 1).bit_length()  # sums of more than 128 terms are cut
        terms = (depth + parts * PRODUCT_START) / PRODUCT_SHARE
        return self.cycles(2 * rows * round_up(columns, LANES) * terms / FLOPS_PER_CYCLE)

    def rows(self, call: str, plan: CpuPlan, rows: int) -> Stages:
        """Some query rows of a sample, all heads of them."""
        _, heads, seqlen, head_dim = self.problem.shape
        layer, batch = self.problem.norm == "layer", self.problem.norm.startswith("batch")
        sweeps, maps, floats = 1 if plan.whole else 2, heads * rows * plan.keys, heads * rows * head_dim
        scores = sweeps * heads * self.product(rows, seqlen, head_dim)
        values = heads * self.product(rows, head_dim, seqlen)
        mixing = rows * self.product(heads, seqlen, heads)
        if call == "backward":
            row = self.cycles((BACKWARD_ROW + NORM_BACKWARD * layer + BATCH_BACKWARD * batch) * maps) + 3 * mixing
            gradients = 2 * heads * self.product(head_dim, seqlen, rows)
            stages = {"load": self.moved(2 * floats, LOAD), "scores": scores, "gradients of the maps": scores}
            stages |= {"softmax, mixing, norm and back": sweeps * row, "gradients of keys and values": gradients}
            return Stages(stages | {"gradient of queries": values, "store": self.moved(floats, STORE_GRADIENT)})
        softmax = self.cycles((SOFTMAX + EXPONENTIALS * (sweeps - 1)) * maps)
        stages = {"load": self.moved(floats, LOAD), "scores": scores, "softmax": softmax}
        norm = NORMALISE * layer + MOMENTS_SUMS * (self.problem.norm == "batch")
        stages["mixing and norm"] = mixing + self.cycles(norm * maps)
        return Stages(stages | {"product with values": values, "store": self.moved(floats, STORE)})

    def waiting(self, call: str, plan: CpuPlan, threads: int) -> float:
        """For packed keys and values and the sums of their gradients, where all that is in use exceeds the cache."""
        batch, heads, seqlen, head_dim = self.problem.shape
        backward, tensor = call == "backward", 4 * heads * plan.keys * head_dim
        maps = (8 if backward else 4) * heads * plan.block_rows * plan.keys * plan.whole
        packed, sums = 2 * tensor, 2 * tensor * backward
        if min(batch, threads) * packed + threads * (maps + sums) <= CACHE:
            return 0.0
        again = 0 if plan.whole else tensor
        return batch * ceil_div(seqlen, plan.block_rows) * (packed + again + 2 * sums) / BEYOND_CACHE

    def run(self, call: str, threads: int) -> Stages:
        """Wave after wave of samples: keys are packed, rows computed, in the backward pass groups' gradients summed."""
        batch, heads, seqlen, head_dim = self.problem.shape
        backward = call == "backward"
        plan = cpu_plan(self.problem, backward)
        units = []
        for first in range(0, seqlen, plan.group_rows):
            end = min(first + plan.group_rows, seqlen)
            blocks = [min(plan.block_rows, end - row) for row in range(first, end, plan.block_rows)]
            done = [self.rows(call, plan, rows) for rows in blocks]
            units += [sum(done, Stages())] if backward else done
        stretches = [heads * head_dim * min(48, seqlen - key) for key in range(0, seqlen, 48)]
        pack = [Stages(pack=self.moved(2 * floats, PACK_BACKWARD if backward else PACK)) for floats in stretches]
        reduce = [Stages(reduce=self.moved((1 + plan.groups) * floats, REDUCE)) for floats in stretches]
        total = Stages()
        for first in range(0, batch, plan.wave):
            for region in (pack, units, reduce * backward):
                total += busiest(min(plan.wave, batch - first) * region, threads)
        return total + Stages({"waiting for memory": self.waiting(call, plan, threads)})


def busiest(units: list[Stages], threads: int) -> Stages:
    """What the last thread to be done has done, as each takes the next unit when it is free."""
    team = [(0.0, thread, Stages()) for thread in range(threads)]
    for unit in units:
        _, thread, stages = team[0]
        heapq.heapreplace(team, ((stages + unit).total(), thread, stages + unit))
    return max(team)[2]


def cpu_stages(problem: Problem, backward: bool, clock: float, threads: int) -> Stages:
    """Of a call, on the busiest thread."""
    core, batch = Core(problem, clock), problem.norm == "batch"
    total = Stages({"Python": core.cycles(1e6 * CALL[problem.norm][backward])})
    for call in ["forward"] + ["backward"] * backward:
        total += core.run(call, threads)
    numbers = math.prod(problem.shape) / threads
    if batch:  # what the maps made of the values becomes the output
        total["finish"] += core.moved(numbers, LOAD + STORE)
    if batch and backward:  # grad * out is summed, and grad
        total["load"] += core.moved(2 * numbers, LOAD)
    return total


class Result(NamedTuple):
    """Of a committed file: a call of the operator on the CPU, and the plain attention that took turns."""

    folder: str
    device: str
    threads: int
    problem: Problem
    backward: bool
    ms: float
    plain_ms: float

    def clock(self) -> float:
        """The speed of a core meanwhile. The host is shared: it changes by the second, and is not recorded."""
        start, each, call = PLAIN[self.backward]
        batch, heads, seqlen, head_dim = self.problem.shape
        cycles = batch * heads * seqlen**2 * (start + each * round_up(head_dim, 16)) / self.threads + call
        return cycles / (1e-3 * self.plain_ms)


def results(folder: pathlib.Path = RESULTS) -> list[Result]:
    """Of every CPU, at the shapes of the operator's benchmarks and as the sequence grows."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        contents = json.loads(path.read_text())
        machine = contents["machine_info"]["reattn"]
        for facts in (benchmark["extra_info"] for benchmark in contents["benchmarks"]):
            if facts["kind"] in ("operator", "scaling") and facts["contender"] == "cpu":
                sizes = [facts[name] for name in ("batch", "heads", "seqlen", "head_dim", "norm")]
                problem = Problem(*sizes, getattr(torch, facts["dtype"]))
                times = facts["ms"], facts["ms"] / (facts["ratio_to_sdpa"] or math.nan)
                call = problem, facts["direction"] != "forward", *times
                found.append(Result(path.parent.name, machine["device"], machine["threads"], *call))
    return found


def cpu_results(folder: pathlib.Path = RESULTS) -> list[Result]:
    """Those that the model is for."""
    found = [each for each in results(folder) if each.problem.dtype == torch.float32]
    return [each for each in found if each.problem.norm != "batch" and each.folder == MODELLED]


def predict(result: Result) -> Stages:
    return cpu_stages(result.problem, result.backward, result.clock(), result.threads)


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    assert all(len(row) == len(columns) for row in rows), (columns, rows)
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)] + [""]


def name(problem: Problem) -> list[str]:
    return ["x".join(map(str, problem.shape)), problem.norm]


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


BACKWARD = ("grad_sums", "add_up", "backward", "products", "unfold")


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


def mask_table() -> list[str]:
    """What a padding mask costs: over the same call without one, instructions and the time that is expected."""
    card = CARDS[0]
    with_mask = [forecast(counts, card) for counts in read_counts("padding")]
    rows = []
    for call in dict.fromkeys((each.shape, each.norm, each.backend) for each in with_mask):
        cells = []
        for number in (lambda each: each.counts.blocks * each.counts.instructions, lambda each: each.seconds):
            for only in (("forward", "finish"), None):
                mine, others = (
                    sum(
                        number(each)
                        for each in found
                        if (each.shape, each.norm, each.backend) == call and (only is None or each.kernel in only)
                    )
                    for found in (with_mask, forecasts(card.name))
                )
                cells.append(f"{mine / others:.2f}")
        rows.append(["x".join(map(str, call[0])), call[1], call[2], *cells])
    of, parts = ("instructions", f"time on an {card.name}"), ("forward", "with backward")
    columns = [f"{what}, {part}" for what in of for part in parts]
    return table(["a padding mask over none", "norm", "backend", *columns], rows)


def cpu_table(measured: list[Result]) -> list[str]:
    rows = []
    for result in measured:
        stages = predict(result)
        ms, (stage, most) = 1e3 * stages.total(), stages.most_common(1)[0]
        times = [f"{result.clock() / 1e9:.1f}", f"{ms:.2f}", f"{result.ms:.2f}", f"{ms / result.ms:.2f}"]
        direction = "forward + backward" if result.backward else "forward"
        rows.append([*name(result.problem), direction, *times, f"{stage}, {1e5 * most / ms:.0f} %"])
    columns = ["problem", "norm", "direction", "speed, GHz", "predicted ms", "measured ms", "ratio", "takes most"]
    return [f"Float32, {measured[0].device}, {measured[0].threads} threads:", "", *table(columns, rows)]


def tables() -> list[str]:
    """Lines of Markdown."""
    shapes = dict.fromkeys(each.shape for each in read_counts())
    gpu = [line for shape in shapes for line in kernel_table(shape)] + instruction_table() + call_table() + mask_table()
    title = f"GPU, bfloat16; counts for 32 elements of the maps, microseconds on an {CARDS[0].name}:"
    return [title, "", *gpu, *cpu_table(cpu_results())]


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
