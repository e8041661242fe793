"""``python -m benchmarks.cost_model``: what a call has to do, counted, and the time that takes, beside measured times.

GPU: the counts of a kernel follow from its tile and its steps; its predicted time is that of the resource it keeps
busiest, as if that hid all others. CPU: a call is stages one after the other, at rates that ``cpu_stages`` measured;
its predicted time is their sum on the busiest thread. Prints Markdown.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import pathlib
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.measure import Problem
from reattn.kernels import configs

RESULTS = pathlib.Path(__file__).parent / "results"
BACKENDS = ("triton", "cuda")
SHAPES = ((128, 12, 197, 32), (128, 12, 197, 33), (128, 12, 197, 64), (32, 12, 577, 32))
OFFICIAL = [Problem(*shape, norm, torch.bfloat16) for shape in SHAPES for norm in ("batch", "layer")]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(number: int, multiple: int) -> int:
    return ceil_div(number, multiple) * multiple


class Counts(NamedTuple):
    """What a kernel does, or what a device can do in a second."""

    device: float  # bytes from and to device memory
    l2: float  # bytes between L2 and multiprocessors
    tensor: float  # operations of tensor cores
    float32: float  # instructions of a lane in float32, a fused multiply-add being one
    special: float  # exp2 and reciprocal roots
    shared: float  # bytes from and to shared memory


class Device(NamedTuple):
    """A GPU: figures of its data sheet, the clock being the one that its float32 rate implies."""

    name: str
    arch: int
    multiprocessors: int
    clock: float
    memory: float  # bytes a second
    mma: float  # operations of mma.sync a second, in 16 bits
    shared: int  # bytes that a block may have

    def rates(self) -> Counts:
        """A multiprocessor has 128 lanes, 16 special functions and 128 shared bytes a clock (CUDA guide)."""
        clocks = self.multiprocessors * self.clock
        return Counts(self.memory, L2_BYTES * clocks, self.mma, 128 * clocks, 16 * clocks, 128 * clocks)


# What L2 delivers no data sheet tells. XLA's cost model has 6.65 TB/s, measured on an H100; others in proportion.
L2_BYTES = 6.65e12 / (132 * 1.98e9)
# Of the 989 TFLOP/s that wgmma reaches, mma.sync reaches 62.9 % (arXiv 2501.12084). What it reaches on a B200 was not
# found, and is taken to be as much for each multiprocessor.
HOPPER_MMA = 0.629 * 989.4e12
DEVICES = (
    Device("A100", 80, 108, 1.41e9, 2.039e12, 312e12, 163 << 10),
    Device("H100", 90, 132, 1.98e9, 3.35e12, HOPPER_MMA, 227 << 10),
    Device("H200", 90, 132, 1.98e9, 4.8e12, HOPPER_MMA, 227 << 10),
    Device("B200", 100, 148, 1.98e9, 8e12, HOPPER_MMA * 148 / 132, 227 << 10),
)


class Step(NamedTuple):
    """What is done for an element of the maps; ``moved``: its bytes through shared memory, in Triton and in CUDA.

    Float32, special functions and Triton's bytes are those of loops compiled for sm_90 at head_dim 32.
    """

    scores: int = 0  # products over head_dim, of own rows with streamed ones
    products: int = 0  # of maps with streamed rows
    streams: int = 0  # tensors whose rows come past those of the block
    mixing: int = 0  # products over the heads
    special: float = 0
    float32: int = 0
    moved: tuple[int, int] = (0, 0)


LSE = Step(scores=1, streams=1, special=1, float32=6)
MAPS = Step(scores=1, streams=1, special=1, float32=4, moved=(4, 2))
RESCALE = Step(float32=2, moved=(0, 6))  # in the place of MAPS where a row stays in shared memory
MIX = Step(mixing=1, float32=1, moved=(4, 4))
NORM = Step(special=0.5, float32=5)
MOMENTS = Step(float32=3)
STREAM = Step(streams=1)
MULTIPLY = Step(products=1, moved=(0, 2))
GRADIENT = Step(scores=1, streams=1, mixing=1, float32=1, moved=(14, 8))
MIX_AGAIN = Step(mixing=1, moved=(0, 2))
UNDO_LAYER = Step(float32=10, moved=(13, 2))
UNDO_BATCH = Step(float32=2, moved=(5, 2))
SUMS = Step(mixing=1, float32=4, moved=(14, 8))
LAYER_SUMS = Step(float32=3)
BATCH_SUMS = Step(float32=5, moved=(9, 0))
GRAD_SCORES = Step(products=1, float32=2, moved=(0, 8))

# Tensors that a kernel reads in blocks, streams past them, writes; and float32 vectors such as the LSE. Not all kernels
# sweep over maps: some sum what others left, and finish also makes the output of what the forward kernel left.
TENSORS = {
    "forward": (1, 2, 1, 1),
    "finish": (1, 1, 1, 0),
    "grad_sums": (2, 0, 0, 0),
    "add_up": (0, 0, 0, 0),
    "backward_query": (2, 2, 1, 2),
    "backward_key": (2, 2, 2, 2),
    "unfold": (0, 0, 0, 0),
}
SWEEPS = tuple(configs.TABLE)
PADDED_HEADS = 16


def steps(kernel: str, norm: str, cuda: bool, resident: bool) -> list[Step]:
    """Of a kernel, in order; ``resident``: all maps of a block's rows stay in shared memory."""
    layer, batch = norm == "layer", norm == "batch"
    mix = [MIX] + [NORM] * layer
    again = [STREAM] * cuda  # CUDA reads a tensor again to multiply by it, Triton has the tile
    if kernel == "forward":
        maps = RESCALE if cuda and resident else MAPS
        return [LSE, maps, *mix] + [MOMENTS] * batch + [STREAM, MULTIPLY]
    undo = [GRADIENT] + [UNDO_LAYER] * layer + [UNDO_BATCH] * batch
    if kernel == "backward_query":
        sweep = [MAPS] + [MIX_AGAIN] * (layer or batch) + [NORM] * layer + undo
        sums = [SUMS] + [LAYER_SUMS] * layer + [BATCH_SUMS] * batch
        return sweep + sums + sweep * (not (cuda and resident)) + [GRAD_SCORES] + again
    return [MAPS, *mix, *undo, MULTIPLY, GRAD_SCORES] + 2 * again


def kernels(norm: str, backward: bool) -> list[str]:
    """That a call launches."""
    batch = norm == "batch"
    gradients = ["grad_sums", "add_up"] * batch + ["backward_query", "backward_key", "unfold"]
    return ["forward"] + ["finish"] * batch + gradients * backward


class Cut(NamedTuple):
    """Of a kernel: own rows of a block, streamed rows of a tile, whether one tile holds all of them."""

    own: int
    tile: int
    resident: bool = False


def find_cut(kernel: str, problem: Problem, device: Device, backend: str) -> Cut:
    """Triton's by its tile table; CUDA's as csrc/cuda/plan.cpp chooses for up to 12 heads of up to 64 in 16 bits."""
    if backend == "triton":
        tile = configs.tile(kernel, device.arch, problem.dtype.itemsize, problem.heads, problem.head_dim)
        return Cut(tile.BLOCK_N, tile.BLOCK_M) if kernel == "backward_key" else Cut(tile.BLOCK_M, tile.BLOCK_N)
    keys = round_up(problem.seqlen, 16)
    tall = kernel == "forward" and problem.batch * ceil_div(problem.seqlen, 32) >= device.multiprocessors
    tiles = [keys] * (kernel != "backward_key") + [64, 32, 16]
    cuts = [Cut(own, min(tile, keys), tile >= keys) for tile in tiles for own in ((32, 16) if tall else (16,))]
    return next(cut for cut in cuts if shared_bytes(kernel, problem, cut) <= device.shared)


def shared_bytes(kernel: str, problem: Problem, cut: Cut) -> int:
    """That a block of the CUDA kernel takes, as csrc/cuda/plan.cpp lays it out."""
    heads, forward = problem.heads, kernel == "forward"
    maps = heads * (cut.own * (round_up(2 * cut.tile, 16) | 16) + 16)
    parts = [maps] * {"backward_query": 2, "backward_key": 3}.get(kernel, 1)
    parts += [heads * 32 * (2 * round_up(problem.head_dim, 16) + 16), 2 * 16 * 48 + 16, 5 * 16 * 4]
    parts += [heads * cut.own * ceil_div(cut.tile, 64) * 4] * (forward and cut.resident)
    parts += [19 * 16 * 4] * (kernel == "backward_query")
    parts += [heads * 2 * 16 * 4] * (forward and problem.norm == "batch")
    return sum(round_up(part, 128) for part in parts)


def loaded_dim(problem: Problem, backend: str) -> int:
    """Columns that are read: head_dim, or that of a padded copy."""
    return round_up(problem.head_dim, 8 if backend == "cuda" else 16)


def blocks(kernel: str, problem: Problem, device: Device, backend: str) -> int:
    """That a kernel has."""
    batch, heads, seqlen, _ = problem.shape
    if kernel in SWEEPS:
        return batch * ceil_div(seqlen, find_cut(kernel, problem, device, backend).own)
    if kernel in ("add_up", "unfold"):
        return heads + (kernel == "unfold")
    splits = max(min(ceil_div(4 * device.multiprocessors, batch * heads), ceil_div(seqlen, 64)), 1)
    return batch * heads * splits + (kernel == "finish")


def partial_sums(kernel: str, problem: Problem, device: Device, backend: str) -> int:
    """Float32 numbers that the blocks of a kernel leave for another one to add."""
    numbers = {
        "forward": 2 * problem.heads * (problem.norm == "batch"),
        "grad_sums": 2,
        "backward_query": (PADDED_HEADS + 3) * PADDED_HEADS,
    }
    return numbers.get(kernel, 0) * blocks(kernel, problem, device, backend)


def sums_read(kernel: str, problem: Problem, device: Device, backend: str) -> tuple[float, float]:
    """Bytes of partial sums that a kernel reads from device memory, and from L2: some are read by several blocks."""
    left_by = {"finish": "forward", "add_up": "grad_sums", "unfold": "backward_query"}.get(kernel)
    if left_by is None:
        return 0.0, 0.0
    numbers, heads = partial_sums(left_by, problem, device, backend), problem.heads
    if kernel == "unfold":  # a row of the matrix and a vector for each head; all vectors
        times = (2 * heads + 3) / (PADDED_HEADS + 3)
    else:  # sums of one head, and by one block of all heads
        times = (blocks(kernel, problem, device, backend) - (kernel == "finish")) / heads + (kernel == "finish")
    return 4.0 * numbers, 4.0 * numbers * times


def count(kernel: str, problem: Problem, device: Device, backend: str) -> Counts:
    """What all blocks of a kernel do together, padding included; for 9 to 16 heads, in CUDA up to 12."""
    cuda, (batch, heads, seqlen, head_dim) = backend == "cuda", problem.shape
    rows, itemsize = batch * heads * seqlen, problem.dtype.itemsize
    own, streamed, written, vectors = TENSORS[kernel]
    stored = written * rows * head_dim * itemsize + vectors * rows * 4
    stored += 4 * partial_sums(kernel, problem, device, backend)
    if kernel not in SWEEPS:
        read, again = sums_read(kernel, problem, device, backend)
        moved = (own + streamed) * rows * head_dim * itemsize + stored
        return Counts(moved + read, moved + again, 0, (own + streamed) * rows * head_dim, 0, 0)
    cut = find_cut(kernel, problem, device, backend)
    done = steps(kernel, problem.norm, cuda, cut.resident)
    scores, products, streams, mixing, special, float32 = (sum(step[i] for step in done) for i in range(6))
    # What streams is written once and read for each product. Triton reads own rows from shared memory again, CUDA holds
    # them in registers.
    operands = (streams + scores + products) / cut.own + (0 if cuda else scores / cut.tile)
    depth = round_up(head_dim, 16)
    positions = batch * round_up(seqlen, cut.own) * round_up(seqlen, cut.tile)
    maps = positions * (heads if cuda else PADDED_HEADS)
    tensor = rows * loaded_dim(problem, backend) * itemsize
    return Counts(
        device=(own + streamed) * tensor + stored,
        l2=ceil_div(seqlen, cut.own) * streams * tensor + own * tensor + stored,
        tensor=2 * depth * (scores + products) * maps + 2 * PADDED_HEADS * mixing * positions * PADDED_HEADS,
        float32=float32 * maps,
        special=special * maps,
        shared=maps * (operands * depth * itemsize + sum(step.moved[cuda] for step in done)),
    )


def gpu_time(kernel: str, problem: Problem, device: Device, backend: str) -> tuple[float, str]:
    """Seconds, and the resource that takes them. Multiprocessors have one block at a time, at the end some none."""
    counts, rates = count(kernel, problem, device, backend), device.rates()
    number = blocks(kernel, problem, device, backend)
    idle = round_up(number, device.multiprocessors) / number
    times = {name: getattr(counts, name) / getattr(rates, name) for name in Counts._fields}
    return max((time if name == "device" else time * idle, name) for name, time in times.items())


def copy_time(kernel: str, problem: Problem, device: Device, backend: str) -> float:
    """Seconds for padded copies of tensors whose rows cannot be read 16 bytes at a time: zeroed, read and written."""
    copied = {"forward": 3, "grad_sums": int(backend == "cuda"), "backward_query": 4}
    loaded, head_dim = loaded_dim(problem, backend), problem.head_dim
    columns = (loaded + 2 * head_dim) * (loaded > head_dim)
    rows = problem.batch * problem.heads * problem.seqlen
    return copied.get(kernel, 0) * rows * columns * problem.dtype.itemsize / device.memory


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
    """Of a committed file: a call of the operator on one of our backends, and the plain attention that took turns."""

    folder: str
    device: str
    threads: int
    backend: str
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
    """Of every device, at the shapes of the operator's benchmarks and as the sequence grows."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        contents = json.loads(path.read_text())
        machine = contents["machine_info"]["reattn"]
        for facts in (benchmark["extra_info"] for benchmark in contents["benchmarks"]):
            backend, operator = facts["contender"], facts["kind"] in ("operator", "scaling")
            if operator and backend in (*BACKENDS, "cpu"):
                sizes = [facts[name] for name in ("batch", "heads", "seqlen", "head_dim", "norm")]
                problem = Problem(*sizes, getattr(torch, facts["dtype"]))
                times = facts["ms"], facts["ms"] / (facts["ratio_to_sdpa"] or math.nan)
                call = backend, problem, facts["direction"] != "forward", *times
                found.append(Result(path.parent.name, machine["device"], machine["threads"], *call))
    return found


def cpu_results(folder: pathlib.Path = RESULTS) -> list[Result]:
    """Those that the model is for."""
    found = [each for each in results(folder) if each.backend == "cpu" and each.problem.dtype == torch.float32]
    return [each for each in found if each.problem.norm != "batch" and each.folder == MODELLED]


def predict(result: Result) -> Stages:
    return cpu_stages(result.problem, result.backward, result.clock(), result.threads)


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)] + [""]


def name(problem: Problem) -> list[str]:
    return ["x".join(map(str, problem.shape)), problem.norm]


def count_table(device: Device) -> list[str]:
    rows = []
    for problem, backend in itertools.product(OFFICIAL[:2], BACKENDS):
        for kernel in kernels(problem.norm, True):
            cut = find_cut(kernel, problem, device, backend) if kernel in SWEEPS else None
            values = [f"{value / 1e9:.3g}" for value in count(kernel, problem, device, backend)]
            rows.append([*name(problem), backend, kernel, f"{cut.own} x {cut.tile}" if cut else "-", *values])
    units = ["device GB", "L2 GB", "tensor GFLOP", "float32 G", "special G", "shared GB"]
    return [f"Counts, {device.name}:", "", *table(["problem", "norm", "backend", "kernel", "tile", *units], rows)]


def gpu_table(measured: list[Result]) -> list[str]:
    rows = []
    for problem, backend, device in itertools.product(OFFICIAL, BACKENDS, DEVICES):
        times = {kernel: gpu_time(kernel, problem, device, backend) for kernel in kernels(problem.norm, True)}
        cells = [f"{1e6 * times[kernel][0]:.0f} {times[kernel][1]}" if kernel in times else "-" for kernel in TENSORS]
        for backward in (False, True):
            launched = kernels(problem.norm, backward)
            total = sum(times[kernel][0] + copy_time(kernel, problem, device, backend) for kernel in launched)
            call = backend, problem, backward
            ms = [result.ms for result in measured if device.name in result.device and result[3:6] == call]
            cells.append(", measured ".join(f"{number:.0f}" for number in (1e6 * total, *(1e3 * each for each in ms))))
        rows.append([*name(problem), backend, device.name, *cells])
    columns = ["problem", "norm", "backend", "device", *TENSORS, "all of forward", "and backward"]
    return ["Predicted microseconds, and what takes them:", "", *table(columns, rows)]


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


def main() -> None:
    print("\n".join([*count_table(DEVICES[1]), *gpu_table(results()), *cpu_table(cpu_results())]).rstrip())


if __name__ == "__main__":
    main()
