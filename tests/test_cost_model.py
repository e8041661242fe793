"""The cost model: its counts against other arithmetic and the compiler's, its predictions against committed times."""

import json
import re

import pytest
import torch

from benchmarks import cost_model
from benchmarks.cost_model import BACKENDS, DEVICES, OFFICIAL, RESULTS, SWEEPS, Core, Stages, count, find_cut
from benchmarks.measure import Problem

A100, H100, H200, B200 = DEVICES
EPYC = RESULTS / "amd-epyc-zen3"
# GHz that a core of a shared host may seem to have.
SLOWEST, FASTEST = 1.2e9, 3.6e9
MEASURED = cost_model.cpu_results()


def bfloat16(*shape, norm="layer"):
    return Problem(*shape, norm, torch.bfloat16)


def float32(*shape):
    return Problem(*shape, "layer", torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_without_padding(backend):
    """Forward is products over head_dim with keys, in Triton twice, and with values, and one over the heads."""
    batch, heads, seqlen, head_dim = shape = (3, 16 if backend == "triton" else 12, 64, 32)
    found = count("forward", bfloat16(*shape, norm="batch"), H100, backend)
    times = 3 if backend == "triton" else 2
    products = 2 * times * batch * heads * seqlen**2 * head_dim
    assert found.tensor == products + 2 * 16 * 16 * batch * seqlen**2
    assert found.special == (times - 1) * batch * heads * seqlen**2


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize(("backend", "sweeps"), [("triton", 2), ("cuda", 1)])
def test_bytes_of_forward(backend, sweeps, norm):
    """The formula of docs/performance.md for what every block of 32 query rows reads, and each tensor once; with batch
    norm two sums of each block and head."""
    tensor, lse = 128 * 12 * 197 * 64 * 2, 128 * 12 * 197 * 4
    problem = bfloat16(128, 12, 197, 64, norm=norm)
    found, sums = count("forward", problem, H100, backend), 2 * 12 * 128 * 7 * 4 * (norm == "batch")
    assert find_cut("forward", problem, H100, backend).own == 32
    assert found.l2 == 7 * (sweeps + 1) * tensor + 2 * tensor + lse + sums
    assert found.device == 4 * tensor + lse + sums


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_statistics_are_an_epilogue(backend):
    """What they cost beyond a sweep: reading and writing tensors once, and a few sums."""
    problem = bfloat16(128, 12, 197, 64, norm="batch")
    tensor = 128 * 12 * 197 * 64 * 2
    assert cost_model.kernels("batch", False) == ["forward", "finish"]
    assert cost_model.kernels("layer", True) == ["forward", "backward_query", "backward_key", "unfold"]
    for kernel, tensors in (("finish", 3), ("grad_sums", 2), ("add_up", 0), ("unfold", 0)):
        found = count(kernel, problem, H100, backend)
        assert found.device == pytest.approx(tensors * tensor, abs=3e6)
        assert found.tensor == found.shared == 0
    layer = count("forward", bfloat16(*problem.shape), H100, backend)
    assert count("forward", problem, H100, backend).tensor == layer.tensor


def test_sums_that_blocks_leave():
    """Each block of backward_query leaves a 16 x 16 matrix and three vectors, of which a row of theta needs 16 each."""
    problem = bfloat16(128, 12, 197, 32)
    sums = 128 * 13 * (16 * 16 + 3 * 16)
    assert cost_model.partial_sums("backward_query", problem, H100, "triton") == sums
    device, l2 = cost_model.sums_read("unfold", problem, H100, "triton")
    assert device == 4 * sums and l2 == pytest.approx(4 * 128 * 13 * (12 * 2 * 16 + 3 * 16))


def test_tensor_operations_are_those_compiled():
    """HMMA instructions of a warp for each pair of tiles, from the committed compile report."""
    lines = (RESULTS / "compile_report.txt").read_text().splitlines()
    rows = [line.split() for line in lines if re.match(r"\s*sm_90 bfloat16 +12 ", line)]
    checked = set()
    for _, dtype, heads, dim, norm, kernel, tile, *_, hmma in rows:
        if kernel not in SWEEPS or norm not in ("layer", "batch"):
            continue
        block_m, block_n, warps, *_ = map(int, tile.split("x"))
        # Nothing is padded but the heads.
        problem = Problem(1, int(heads), 32, int(dim), norm, getattr(torch, dtype))
        tiles = 32 // block_m * (32 // block_n)
        operations = 2 * 16 * 8 * 16 * int(hmma) * warps
        assert count(kernel, problem, H100, "triton").tensor == operations * tiles, (kernel, norm, dim)
        checked.add((kernel, norm, dim))
    assert len(checked) == 3 * 2 * 3


# Bytes of the shared-memory instructions in loops of the SASS for sm_90 and head_dim 64, an element of the maps.
COMPILED = {
    ("forward", "batch"): 49,
    ("backward_query", "batch"): 178,
    ("backward_key", "batch"): 90.5,
    ("forward", "layer"): 49,
    ("backward_query", "layer"): 186,
    ("backward_key", "layer"): 100.5,
}


@pytest.mark.parametrize(("kernel", "norm"), COMPILED)
def test_shared_memory_is_that_compiled(kernel, norm):
    found = count(kernel, bfloat16(1, 16, 32, 64, norm=norm), H100, "triton")
    assert found.shared / (16 * 32 * 32) == pytest.approx(COMPILED[kernel, norm], rel=0.05)


@pytest.mark.cuda
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_cuts_are_those_of_the_extension(device):
    from reattn.backends import cuda

    for problem in [*OFFICIAL, bfloat16(1, 12, 197, 64), bfloat16(8, 6, 50, 48), bfloat16(2, 3, 1024, 16)]:
        depth = cost_model.loaded_dim(problem, "cuda")
        sizes = (2, problem.heads, depth, problem.batch, problem.seqlen, problem.seqlen)
        flags = (False, problem.norm == "batch")
        for kernel in SWEEPS:
            card = device.shared, device.multiprocessors
            plan = cuda._cuda.make_plan(getattr(cuda._cuda.Kernel, kernel), sizes, *flags, *card)
            cut = find_cut(kernel, problem, device, "cuda")
            assert cut == (plan.own, plan.tile, plan.resident)
            assert cost_model.shared_bytes(kernel, problem, cut) == plan.bytes


def test_copies_of_unaligned_rows():
    rows = 128 * 12 * 197
    seconds = cost_model.copy_time("forward", bfloat16(128, 12, 197, 33), H100, "triton")
    assert seconds == pytest.approx(3 * rows * (48 + 33 + 33) * 2 / 3.35e12)
    assert cost_model.copy_time("forward", bfloat16(128, 12, 197, 32), H100, "triton") == 0


@pytest.mark.parametrize(
    ("slowed", "resource"),
    [({"memory": 1e9}, "device"), ({"mma": 1e9}, "tensor"), ({}, "shared")],
    ids=lambda case: str(case),
)
def test_slowest_resource_takes_the_time(slowed, resource):
    device, problem = H100._replace(**slowed), bfloat16(128, 12, 197, 64)
    seconds, binding = cost_model.gpu_time("forward", problem, device, "triton")
    least = getattr(count("forward", problem, device, "triton"), resource) / getattr(device.rates(), resource)
    assert binding == resource
    # 896 blocks are 6.8 for each of 132 multiprocessors, and 7 for some.
    assert seconds == pytest.approx(least if resource == "device" else least * 7 * 132 / 896)


def test_measured_times_stand_beside_predicted_ones(tmp_path):
    facts = {"batch": 128, "heads": 12, "seqlen": 197, "head_dim": 64, "norm": "layer", "dtype": "bfloat16"}
    facts |= {"kind": "operator", "contender": "triton", "direction": "forward", "ms": 1.25, "ratio_to_sdpa": None}
    machine = {"reattn": {"device": "NVIDIA H100 80GB HBM3", "threads": 8}}
    (tmp_path / "h100").mkdir()
    contents = {"machine_info": machine, "benchmarks": [{"extra_info": facts}]}
    (tmp_path / "h100" / "operator.json").write_text(json.dumps(contents))
    measured = cost_model.results(tmp_path)
    (row,) = [line for line in cost_model.gpu_table(measured) if "measured" in line]
    assert "128x12x197x64 | layer | triton | H100" in row
    assert ", measured 1250 |" in row


def test_threads_take_units_as_they_come():
    units = [Stages(work=seconds) for seconds in (3.0, 1.0, 1.0, 2.0)]
    assert cost_model.busiest(units, 1) == {"work": 7.0}
    assert cost_model.busiest(units, 2) == {"work": 4.0}


def test_cpu_plan():
    """The rows that cpu_stages has by default are those of its problem; long rows are cut, a batch of one parted."""
    assert [cost_model.cpu_plan(float32(8, 12, 197, 32), backward).block_rows for backward in (False, True)] == [36, 42]
    assert [cost_model.cpu_plan(float32(1, 12, 8192, 32), backward).whole for backward in (False, True)] == [
        True,
        False,
    ]
    assert cost_model.cpu_plan(float32(1, 12, 197, 32), True).groups == 4


STAGE_NAMES = {
    "pack keys and values": "pack",
    "load queries": "load",
    "load queries and gradients": "load",
    "store the output": "store",
    "store the gradient of queries": "store",
    "store gradients of keys, values": "reduce",
}


def test_stages_are_those_measured():
    text = (EPYC / "stages.txt").read_text()
    clock = float(re.search(r"out of registers: ([\d.]+) GFLOP/s", text)[1]) * 1e9 / cost_model.FLOPS_PER_CYCLE
    shape = map(int, re.search(r"^(\d+)x(\d+)x(\d+)x(\d+) float32, layer norm", text, re.MULTILINE).groups())
    core = Core(float32(*shape), clock)
    forward, backward = text.split("\nforward\n")[1].split("\nbackward\n")
    for call, part in (("forward", forward), ("backward", backward)):
        predicted = core.run(call, threads=1)
        measured = {name: float(ms) for name, ms in re.findall(r"^  (\S.*?) {2,}(\d+\.\d+)", part, re.MULTILINE)}
        assert predicted.total() == pytest.approx(1e-3 * measured.pop("all"), rel=0.1)
        assert {STAGE_NAMES.get(name, name) for name in measured} == set(predicted)
        for name, ms in measured.items():
            assert predicted[STAGE_NAMES.get(name, name)] == pytest.approx(1e-3 * ms, rel=0.15, abs=2e-4), name


def test_old_results_of_batch_norm_are_left_out():
    """They are of kernels that computed scores twice; every other norm counts."""
    everything = [r for r in cost_model.results() if r.backend == "cpu" and r.problem.dtype == torch.float32]
    left_out = [r for r in everything if r not in MEASURED]
    left_out = [r for r in left_out if r.folder == cost_model.MODELLED]
    assert left_out and all(r.problem.norm == "batch" for r in left_out)
    assert {r.problem.norm for r in MEASURED} >= {"layer", "none", "batch-eval"}


def test_batch_norm_is_one_sweep():
    """In training it computes scores once, and then goes over the output; going back it sums over two tensors first."""
    calls = [("batch", False), ("none", False), ("batch", True), ("none", True)]
    shape = (8, 12, 197, 32)
    stages = {call: cost_model.cpu_stages(Problem(*shape, call[0], torch.float32), call[1], 3e9, 1) for call in calls}
    for backward in (False, True):
        batch, none = stages["batch", backward], stages["none", backward]
        assert batch["scores"] == none["scores"]
        assert set(batch) - set(none) == {"finish"}
        assert none.total() < batch.total() < 1.3 * none.total()
    core = Core(float32(*shape), 3e9)
    loaded = stages["batch", True]["load"] - stages["none", True]["load"]
    assert loaded == pytest.approx(core.moved(2 * 8 * 12 * 197 * 32, cost_model.LOAD))


def deviation(result):
    return abs(1e3 * cost_model.predict(result).total() / result.ms - 1)


@pytest.mark.parametrize(
    "result", MEASURED, ids=lambda r: "-".join([*cost_model.name(r.problem), "backward" * r.backward])
)
def test_predicted_is_measured(result):
    assert deviation(result) <= 0.25
    assert SLOWEST <= result.clock() <= FASTEST


@pytest.mark.parametrize(
    ("constant", "factor"),
    [
        ("PRODUCT_SHARE", 0.5),
        ("PRODUCT_START", 8),
        ("SOFTMAX", 4),
        ("BACKWARD_ROW", 6),
        ("LOAD", 10),
        ("UNALIGNED", 30),
        ("BEYOND_CACHE", 0.2),
        ("CACHE", 10),
    ],
)
def test_a_wrong_constant_shows(constant, factor, monkeypatch):
    monkeypatch.setattr(cost_model, constant, factor * getattr(cost_model, constant))
    assert max(map(deviation, MEASURED)) > 0.25


def test_prints_every_problem(capsys):
    cost_model.main()
    printed = capsys.readouterr().out
    for problem in OFFICIAL:
        for backend in BACKENDS:
            for device in DEVICES:
                assert f"| {' | '.join([*cost_model.name(problem), backend, device.name])} |" in printed
    assert printed.count("| forward + backward |") == sum(result.backward for result in MEASURED)


@pytest.mark.skipif(not (RESULTS.parents[1] / "docs").is_dir(), reason="needs the source tree")
def test_page_shows_what_is_printed(capsys):
    cost_model.main()
    printed = {line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")}
    page = (RESULTS.parents[1] / "docs" / "performance.md").read_text().splitlines()
    assert len(printed) > 100 and printed <= set(page)
