"""The cost model: what it counts of GPU kernels, against the kernels and other arithmetic."""

import json
import sys

import networkx
import pytest
import torch

from benchmarks import compile_report, cost_model, kernel_counts, sass
from benchmarks.cost_model import CARDS, forecast
from benchmarks.kernel_counts import Counts, read_counts

H100, H200 = CARDS


def committed(backend, shape=(128, 12, 197, 64), norm="layer"):
    return {each.kernel: each for each in read_counts() if each[:1] + each[2:4] == (backend, shape, norm)}


def need_compiler(backend):
    pytest.importorskip("triton", reason="needs ptxas, which triton ships")
    made_with = json.loads(kernel_counts.COUNTS.read_text())["made with"][backend]
    if (here := kernel_counts.version(backend)) != made_with:
        pytest.skip(f"the counts are of what {made_with} compiles, here is {here}")


@pytest.mark.parametrize("backend", kernel_counts.BACKENDS)
def test_committed_counts_are_of_the_kernels_that_there_are(backend):
    """A training step, counted again."""
    if torch.cuda.is_available():
        pytest.skip("the emulator takes the place of a GPU")
    pytest.importorskip("emulator.cuda" if backend == "cuda" else "emulator", exc_type=ImportError)
    need_compiler(backend)
    shape, norm = (1, 12, 197, 64), "batch"
    found = {each.kernel: each for each in kernel_counts.count(backend, shape, norm)}
    assert found == committed(backend, shape, norm), "run python -m benchmarks.kernel_counts, and cost_model --docs"


def test_every_launch_is_counted():
    sweeps = {"triton": ["grad_maps", "grad_query", "grad_key"], "cuda": ["backward", "products"]}
    for backend in kernel_counts.BACKENDS:
        for shape in kernel_counts.SHAPES:
            for norm in kernel_counts.NORMS:
                sums = ["finish", "grad_sums", "add_up"] if norm == "batch" else []
                expected = ["forward", *sums, *sweeps[backend], "unfold"]
                assert list(committed(backend, shape, norm)) == expected


def test_tensor_operations():
    """Forward is products over head_dim with keys, in Triton twice, and with values, and one over the heads: 32 rows,
    197 keys being 208, or 224 in Triton's first sweep, by instructions for 16 heads in Triton, of which 12 are
    multiplied in CUDA. There ones add up each head's rows, and each row's weights tell what the centre makes of the
    shift. In Triton a product over the heads more, for 16 keys, says how positions are laid out."""
    product, mixing = 2 * 32 * 208 * 64, 2 * 32 * 208 * 16 * 16
    ones, centres = 12 * 2 * 13, 32 * 2  # of mma.m16n8k16
    cuda = committed("cuda", norm="none")["forward"].tensor
    assert cuda == 2 * 12 * product + mixing + 2 * 16 * 8 * 16 * (ones + centres)
    blocks, rows = committed("triton")["forward"].blocks / 128, 197
    own = {7: 32, 13: 16}[blocks]
    assert -(-rows // own) == blocks
    first_sweep, layout = 16 * product * 224 / 208, mixing * 16 / 208
    assert committed("triton")["forward"].tensor == (first_sweep + 2 * 16 * product + mixing + layout) * own / 32


@pytest.mark.parametrize(("backend", "sweeps"), [("triton", 2), ("cuda", 1)])
def test_bytes_of_forward(backend, sweeps):
    """Keys in every sweep, and values; a block's own queries and outputs."""
    found = committed(backend)["forward"]
    rows = 12 * ((sweeps + 1) * 197 + 2 * 197 / (found.blocks / 128))
    assert found.global_bytes == pytest.approx(2 * 64 * rows, rel=0.06)


def test_instructions_of_a_kernel_counted_by_hand():
    """What stands in a loop of the Triton kernel runs for each whole tile of keys, 32 in the first sweep and 16 in the
    other; all else, such as the loop behind each for the last keys, once, in 8 warps."""
    need_compiler("triton")
    case = compile_report.Case(90, "bfloat16", 12, 32, "layer")
    kernel, *launch = next(each for each in compile_report.recorded_launches(case) if "forward" in each[0].__name__)
    tile = launch[-1]
    ptx = compile_report.compile_launch(kernel, *launch, 90).asm["ptx"]
    blocks, flow = sass.disassemble(sass.assemble(ptx))["forward_kernel"]
    reached = {next(iter(blocks)), *networkx.descendants(flow, next(iter(blocks)))}
    loops = [part for part in networkx.strongly_connected_components(flow.subgraph(reached)) if len(part) > 1]
    loops += [{label} for label in reached if flow.has_edge(label, label)]
    order = list(blocks)
    loops.sort(key=lambda loop: min(map(order.index, loop)))
    first, _, second, _ = (sum(len(blocks[label]) for label in loop) for loop in loops)
    once = sum(len(blocks[label]) for label in reached) - first - second
    expected = tile.num_warps * (once + 197 // 32 * first + 197 // tile.BLOCK_N * second)
    assert committed("triton", (128, 12, 197, 32))["forward"].instructions == pytest.approx(expected, rel=0.03)


LAUNCH = Counts("cuda", "forward", (128, 12, 197, 64), "layer", 896, 384, 160, 200_000, 0, 0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("busy", "binding", "seconds"),
    [
        ({"instructions": 400_000}, "issue", 7 * 100_000 / 1.98e9),
        ({"special": 10_000}, "special", 7 * 20_000 / 1.98e9),
        ({"wavefronts": 20_000, "shuffles": 10_000}, "shared", 7 * 30_000 / 1.98e9),
        ({"tensor": 10**9}, "tensor", 7 * 132 * 10**9 / (0.629 * 989.4e12)),
        ({"global_bytes": 10**7}, "L2", 896 * 10**7 / 6.65e12),
        # A few blocks draw on a part of what L2 delivers.
        ({"global_bytes": 10**7, "blocks": 1}, "L2", 10**7 / (64 * 1.98e9)),
        ({}, "memory", 4 * 128 * 12 * 197 * 64 * 2 / 3.35e12),
    ],
)
def test_what_binds(busy, binding, seconds):
    """896 blocks are 6.8 for each of 132 multiprocessors, and 7 for some."""
    found = forecast(LAUNCH._replace(**busy), H100)
    memory = found.bytes_floor if busy else 0
    assert found.binding == binding
    assert found.floor == pytest.approx(cost_model.START + seconds)
    assert found.serial == pytest.approx(cost_model.START + seconds + memory)
    assert found.seconds == pytest.approx((found.floor + found.serial) / 2)


@pytest.mark.parametrize(
    ("threads", "registers", "shared_bytes", "blocks"),
    [(384, 168, 0, 1), (256, 128, 0, 2), (256, 255, 0, 1), (128, 64, 80_000, 2), (1024, 16, 0, 2), (32, 16, 0, 32)],
)
def test_blocks_at_a_time(threads, registers, shared_bytes, blocks):
    launch = LAUNCH._replace(threads=threads, registers=registers, shared_bytes=shared_bytes)
    assert launch.resident == blocks


def test_forecasts_by_card():
    on_h100, on_h200 = (cost_model.forecasts(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"))
    assert len(on_h100) == len(on_h200) == len(read_counts())
    for slow, fast in zip(on_h100, on_h200, strict=True):
        assert fast.counts == slow.counts and 0 < fast.bytes_floor <= slow.bytes_floor or not slow.bytes_floor
        assert slow.floor <= slow.seconds <= slow.serial and fast.seconds <= slow.seconds
    with pytest.raises(ValueError, match="card is 'NVIDIA L4'; there are figures for H100, H200"):
        cost_model.forecasts("NVIDIA L4")


def test_counts_for_32_elements():
    launch = LAUNCH._replace(blocks=10, shape=(1, 12, 32, 64), instructions=96)
    assert forecast(launch, H100).for_32(launch.instructions) == 10 * 96 / (12 * 32)


def test_prints_every_problem(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cost_model"])
    cost_model.main()
    printed = capsys.readouterr().out
    for each in read_counts():
        assert f"| {each.norm} | {each.backend} | {each.kernel} |" in printed
        assert f"| {'x'.join(map(str, each.shape))} | {each.norm} | {each.backend} |" in printed


def test_updates_the_tables_of_a_page():
    page = "before\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |\n\n| c |\n| --- |\n| 5 |\n"
    lines = ["| a | b |", "| --- | --- |", "| 6 | 7 |", "", "| d |", "| --- |", "| 8 |", ""]
    assert cost_model.updated(page, lines) == page.replace("| 1 | 2 |\n| 3 | 4 |", "| 6 | 7 |")


@pytest.mark.skipif(not cost_model.PAGE.exists(), reason="needs the source tree")
def test_page_shows_what_is_printed():
    page, lines = cost_model.PAGE.read_text(), cost_model.tables()
    assert cost_model.updated(page, lines) == page, "run python -m benchmarks.cost_model --docs"
    assert len({line for line in lines if line.startswith("| ")} & set(page.splitlines())) > 80
