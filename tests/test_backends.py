"""The choice of a backend, and the Triton one's configurations: rows of the table, head_dim in chunks, wide offsets."""

import itertools
import json
import logging
import pathlib
import re
from dataclasses import replace

import pytest
import torch
from parity import assert_parity, compute, drawn_mask, make_problem

import reattn
from reattn import backends, re_attention
from reattn.backends import BACKENDS, available_backends, choose, common, cpu, cuda, triton
from reattn.backends.common import MAX_HEAD_DIM, MAX_HEADS
from reattn.kernels import configs
from reattn.problem import Problem

CPU = torch.device("cpu")
SMALL_SHARED, LARGE_SHARED = 86, 80


def tiles_of(*problem):
    return tuple(configs.tile(kernel, *problem) for kernel in configs.TABLE)


def cases_of_the_table():
    """Architecture, bytes an element, heads, head_dim, whether with what takes more registers: together they use every
    row, in chunks of head_dim if it can.

    Those of cards with little shared memory are slow.
    """
    cases = {}
    for position, (kernel, rows) in enumerate(configs.TABLE.items()):
        for row in rows:
            candidates = [
                (arch, row.itemsize, row.heads, head_dim, dropout)
                for dropout in ((True,) if kernel == "grad_scores" else (False, True))
                for head_dim in (33, 65, 16, 64)
                for arch in (SMALL_SHARED, LARGE_SHARED)
                if head_dim <= row.head_dim
            ]
            case = next(case for case in candidates if tiles_of(*case)[position] == row.tile)
            cases.setdefault(tiles_of(*case), case)
    return [
        pytest.param(*case, marks=[pytest.mark.slow] * (case[0] == SMALL_SHARED)) for case in sorted(cases.values())
    ]


@pytest.mark.triton
def test_available_backends():
    found = available_backends()
    assert list(found) == ["cuda", "triton", "cpu", "reference"]
    assert found["triton"] == found["reference"] == []
    assert reattn.available_backends is available_backends


def test_triton_gives_every_reason(monkeypatch):
    monkeypatch.setattr(triton, "EMULATED", False)
    problem = Problem(CPU, torch.float64, heads=33, head_dim=129, heads_out=40)
    assert triton.not_supported(problem) == [
        "needs a CUDA device, got cpu",
        "dtype must be float32, float16 or bfloat16, got torch.float64",
        "takes at most 32 heads, got 33",
        "takes at most 32 heads after mixing, got 40",
        "takes head_dim up to 128, got 129",
    ]


@pytest.mark.parametrize(("capability", "reasons"), [((7, 5), 1), ((8, 0), 0), ((10, 0), 0)])
def test_triton_needs_ampere(capability, reasons, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = triton.not_supported(Problem(torch.device("cuda"), torch.float16, 12, 64))
    assert found == ["needs compute capability 8.0 or higher, got 7.5"] * reasons


def test_triton_says_why_it_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(triton, "_import_error", "No module named 'triton'")
    reason = "triton or reattn.kernels cannot be imported (No module named 'triton')"
    assert triton.unavailable(CPU) == [reason]
    assert available_backends()["triton"] == [reason]


@pytest.fixture
def extension_cannot_be_imported(monkeypatch):
    reason = "the CPU extension cannot be imported (undefined symbol: reattn)"
    monkeypatch.setattr(cpu, "_import_error", reason)
    return reason


@pytest.mark.parametrize(
    ("error", "kept", "reason"),
    [
        (ModuleNotFoundError("No module named _cpu"), True, "was not built: no working GCC or Clang"),
        (ModuleNotFoundError("No module named _cpu"), False, "cannot be imported (No module named _cpu)"),
        (ImportError("undefined symbol: reattn"), True, "cannot be imported (undefined symbol: reattn)"),
    ],
    ids=["not built", "not there", "broken"],
)  # fmt: skip
def test_why_an_extension_is_missing(error, kept, reason, tmp_path, monkeypatch):
    """What its build had to say, where that is why."""
    monkeypatch.setattr(common, "NOT_BUILT", tmp_path / "not_built.txt")
    if kept:
        common.NOT_BUILT.write_text("reattn._cpu: no working GCC or Clang\n")
    assert common.why_not_imported("reattn._cpu", error) == f"the CPU extension {reason}"


@pytest.mark.extension
def test_cpu_gives_every_reason(monkeypatch):
    monkeypatch.setenv("REATTN_CPU_ISA", "mmx")
    problem = Problem(torch.device("cuda"), torch.float64, heads=33, head_dim=129)
    isa, *reasons = cpu.not_supported(problem)
    assert re.fullmatch(r"REATTN_CPU_ISA must be one of \['portable'.*\] on this machine, got 'mmx'", isa)
    assert reasons == [
        "needs a CPU tensor, got cuda",
        "dtype must be float32, float16 or bfloat16, got torch.float64",
        "takes at most 32 heads, got 33",
        "takes head_dim up to 128, got 129",
    ]


def test_cpu_says_why_it_cannot_be_imported(extension_cannot_be_imported):
    reason = extension_cannot_be_imported
    assert cpu.unavailable(CPU) == [reason]
    assert available_backends()["cpu"][0] == reason
    query = torch.zeros(1, 3, 5, 4)
    with pytest.raises(RuntimeError, match=re.escape(f"backend 'cpu' cannot run this: {reason} (query (1, 3, 5, 4)")):
        re_attention(query, query, query, torch.eye(3), backend="cpu")


def test_auto_prefers_what_was_faster():
    """CUDA before Triton: on an H200 it was faster, or once, with a bias at 1024 tokens, a tenth slower."""
    assert list(BACKENDS)[:2] == ["cuda", "triton"]
    results = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / "nvidia-h200" / "kernels" / "backends.json"
    rows = json.loads(results.read_text())["rows"]
    ratios = [row["us"]["cuda"][way] / row["us"]["triton"][way] for row in rows for way in row["us"]["cuda"]]
    assert len(ratios) > 40 and max(ratios) < 1.1 and sorted(ratios)[-2] < 1


@pytest.mark.parametrize("emulated", [True, pytest.param(False, marks=pytest.mark.extension)])
def test_auto_takes_the_first_that_can(emulated, monkeypatch):
    """Triton, as an example, where there is no CUDA backend."""
    monkeypatch.delenv("REATTN_BACKEND", raising=False)
    monkeypatch.setattr(triton, "EMULATED", emulated)
    monkeypatch.setattr(cuda, "EMULATED", False)
    assert choose("auto", Problem(CPU, torch.float32, 12, 64), "") == ("triton" if emulated else "cpu")
    assert choose("auto", Problem(CPU, torch.float64, 12, 64), "") == "reference"
    assert choose("auto", Problem(CPU, torch.float32, 33, 64), "") == "reference"


def test_auto_without_the_extension(extension_cannot_be_imported, monkeypatch):
    monkeypatch.delenv("REATTN_BACKEND", raising=False)
    monkeypatch.setattr(triton, "EMULATED", False)
    monkeypatch.setattr(cuda, "EMULATED", False)
    assert choose("auto", Problem(CPU, torch.float32, 12, 64), "") == "reference"


def test_environment_overrides_auto(monkeypatch, device):
    monkeypatch.setattr(triton, "EMULATED", True)
    problem = Problem(CPU, torch.float32, 12, 64)
    monkeypatch.setenv("REATTN_BACKEND", "reference")
    assert choose("auto", problem, "") == "reference"
    assert choose("triton", problem, "") == "triton"
    monkeypatch.setenv("REATTN_BACKEND", "cudnn")
    names = "['auto', 'cuda', 'triton', 'cpu', 'reference']"
    with pytest.raises(ValueError, match=re.escape(f"backend must be one of {names}, got 'cudnn'")):
        choose("auto", problem, "")
    monkeypatch.setenv("REATTN_BACKEND", "triton")
    query = torch.zeros(1, 3, 5, 4, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this: dtype must be"):
        re_attention(query, query, query, torch.eye(3, device=device))


@pytest.mark.triton
def test_explicit_backend_raises_with_every_reason_and_the_shapes(device):
    query = torch.zeros(2, 33, 5, 130, dtype=torch.float64, device=device)
    key = torch.zeros(2, 33, 7, 130, dtype=torch.float64, device=device)
    message = (
        "backend 'triton' cannot run this: dtype must be float32, float16 or bfloat16, got torch.float64; takes at "
        "most 32 heads, got 33; takes head_dim up to 128, got 130 "
        f"(query (2, 33, 5, 130), key (2, 33, 7, 130), torch.float64 on {query.device})"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        re_attention(query, key, key, backend="triton")


def test_one_log_line_for_each_fallback(monkeypatch, caplog):
    """With the reasons of the backends made for that device, those of the others being no news."""
    monkeypatch.delenv("REATTN_BACKEND", raising=False)
    monkeypatch.setattr(triton, "not_supported", lambda problem: ["too old", "too small"])
    monkeypatch.setattr(cuda, "not_supported", lambda problem: ["too many"])
    monkeypatch.setattr(cpu, "not_supported", lambda problem: ["too wide"])
    backends._log_fallback.cache_clear()
    with caplog.at_level(logging.INFO, logger="reattn"):
        for device in (torch.device("cuda"), CPU):
            problem = Problem(device, torch.float16, 12, 64)
            assert [choose("auto", problem, "") for _ in range(3)] == ["reference"] * 3
            assert choose("reference", problem, "") == "reference"
    line = "re_attention runs on the reference backend, which materialises every map: "
    assert [record.getMessage() for record in caplog.records] == [
        line + "cuda: too many; triton: too old, too small",
        line + "cpu: too wide",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    backends._log_fallback.cache_clear()


def test_every_backend_answers_the_same_question():
    problem = Problem(CPU, torch.float32, 12, 64)
    for backend in BACKENDS.values():
        assert isinstance(backend.unavailable(CPU), list) and isinstance(backend.not_supported(problem), list)


@pytest.mark.parametrize("kernel", configs.TABLE)
def test_no_row_hides_another(kernel):
    """Each row of the table serves the largest problem it is for, on some architecture, with dropout or without."""
    for row in configs.TABLE[kernel]:
        cards = itertools.product((SMALL_SHARED, LARGE_SHARED), (False, True))
        served = {configs.tile(kernel, arch, *row[:3], dropout) for arch, dropout in cards}
        assert row.tile in served, row


@pytest.mark.parametrize("kernel", configs.TABLE)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_problem_has_a_tile(kernel, itemsize):
    for arch in (80, 86, 89, 90, 100, 120):
        for heads in range(1, MAX_HEADS + 1):
            for head_dim, dropout in itertools.product((1, 33, 65, MAX_HEAD_DIM), (False, True)):
                tile = configs.tile(kernel, arch, itemsize, heads, head_dim, dropout)
                # Rows that share a dot over the heads are in one block.
                assert kernel in configs.BY_HEAD or tile.BLOCK_M * configs.padded(heads) >= 16
    with pytest.raises(LookupError, match=f"{kernel} has no tile for 33 heads of 64, {itemsize} bytes an element"):
        configs.tile(kernel, 80, itemsize, 33, 64)


@pytest.mark.parametrize(
    ("arch", "itemsize", "heads", "head_dim", "dropout"), cases_of_the_table(), ids=lambda number: str(number)
)
def test_rows_of_the_table(arch, itemsize, heads, head_dim, dropout, device, use_tile):
    """Batch norm in training and mixing before the softmax launch every kernel."""
    if device.type == "cpu":
        use_tile(lambda kernel, _, *problem: configs.tile(kernel, arch, *problem, dropout))
    sizes = {"heads": heads, "head_dim": head_dim, "seqlen": 17, "seqlen_k": 10, "batch": 1}
    dtype = torch.float16 if itemsize == 2 else torch.float32
    problem = make_problem("batch-training", **sizes, dtype=dtype, device=device)
    assert_parity(mixed_before(problem) if dropout else problem, "triton")


def mixed_before(problem):
    """Its scores mixed before the softmax."""
    theta = problem["theta"]
    draw = torch.Generator().manual_seed(3)
    pre_theta = torch.randn(theta.shape, generator=draw) * len(theta) ** -0.5
    return problem.with_tensors(pre_theta=pre_theta.to(theta))


@pytest.mark.parametrize("mode", ["batch-training", "layer"])
@pytest.mark.parametrize(
    ("head_dim", "block_m", "block_n", "dim"),
    [
        (33, 16, 16, 32),
        pytest.param(35, 16, 32, 16, marks=pytest.mark.slow),
        pytest.param(40, 32, 16, 16, marks=pytest.mark.slow),
        pytest.param(80, 16, 16, 64, marks=pytest.mark.slow),
    ],
)
def test_head_dim_in_chunks(head_dim, block_m, block_n, dim, mode, device, use_tile):
    use_tile(configs.Tile(block_m, block_n, dim=dim))
    sizes = {"heads": 6, "head_dim": head_dim, "seqlen_k": 20, "batch": 1}
    problem = make_problem(mode, **sizes, dtype=torch.float16, device=device)
    assert_parity(mixed_before(problem) if mode == "layer" else problem, "triton")


def test_chunks_cover_head_dim():
    for head_dim in range(1, 129):
        for dim in (16, 32, 64, 128):
            shape = configs.shape(12, head_dim, head_dim, dim, "ieee", wide=False, norm="none", training=False)
            covered = shape.CHUNKS * shape.DIM_MAIN + shape.DIM_TAIL
            assert head_dim <= covered
            assert max(shape.DIM_MAIN, shape.DIM_TAIL) <= dim
            assert shape.DIM_TAIL in (0, 16, 32)
            assert covered < head_dim + 16 or shape.DIM_TAIL == 0
    shape = configs.shape(12, 33, 33, 128, "ieee", wide=False, norm="none", training=False)
    assert (shape.DIM_MAIN, shape.DIM_TAIL, shape.CHUNKS) == (32, 16, 1)


@pytest.fixture
def recorded_shapes(monkeypatch):
    """The compile-time constants of every launch."""
    recorded = []
    original = configs.shape

    def record(*args, **kwargs):
        recorded.append(original(*args, **kwargs))
        return recorded[-1]

    monkeypatch.setattr(configs, "shape", record)
    return recorded


@pytest.mark.triton
def test_wide_offsets_change_nothing(device, monkeypatch, recorded_shapes):
    problem = make_problem("batch-training", heads=6, head_dim=33, device=device, dropout_p=0.1)
    expected = compute(problem, "triton")
    assert recorded_shapes and not any(shape.WIDE for shape in recorded_shapes)
    narrow = configs.shape
    monkeypatch.setattr(configs, "shape", lambda *args, **kwargs: narrow(*args, **kwargs)._replace(WIDE=True))
    found = compute(problem, "triton")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.triton
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_offsets_beyond_two_to_the_31(mode, device, recorded_shapes):
    """Heads 2**30 elements apart; of the memory between them nothing is ever touched."""
    problem = make_problem(mode, dtype=torch.float16, device=device)
    try:
        storage = torch.empty(2 * 2**30 + 2 * 17 * 16, dtype=torch.float16, device=device)
    except RuntimeError:
        pytest.skip("this machine does not have the 4 GB of address space")
    far_apart = storage.as_strided((2, 3, 17, 16), (17 * 16, 2**30, 16, 1))
    far_apart.copy_(problem["key"])
    expected = compute(problem, "triton")
    recorded_shapes.clear()
    found = compute(problem.with_tensors(key=far_apart), "triton")
    assert any(shape.WIDE for shape in recorded_shapes)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.triton
@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
@pytest.mark.parametrize(("mode", "dtype"), [("layer", torch.bfloat16), ("batch-training", torch.float32)])
def test_backward_pass_in_parts(mode, dtype, blocks, device, monkeypatch):
    """Parts of so many blocks of rows: some samples, one, or some rows of one, whose sums go on in float32."""
    parts, cut = [], common.cut_workspace
    monkeypatch.setattr(common, "WORKSPACE_BYTES", 0)
    monkeypatch.setattr(triton, "_processors", lambda tensor: blocks)
    monkeypatch.setattr(common, "cut_workspace", lambda *args: parts.extend(found := cut(*args)) or found)
    sizes = {"heads": 6, "head_dim": 20, "seqlen": 70, "seqlen_k": 45, "batch": 3}
    problem = make_problem(mode, **sizes, dtype=dtype, device=device, dropout_p=0.2)
    problem = replace(problem, keep=drawn_mask("triton", **sizes, dropout_p=0.2))
    assert_parity(mixed_before(problem) if mode == "layer" else problem, "triton")
    rows = {row for part in parts for row in range(part.first_row, part.first_row + part.rows)}
    assert rows == set(range(70)) and {part.first_sample for part in parts} <= set(range(3))
    assert len(parts) > 1 and (blocks > 2 or any(part.first_row for part in parts))


# The table's tile, and those that tuning tries beside it: the faster, the less right.
TABLES, RIGHT, SPOILT = configs.Tile(16, 16), configs.Tile(16, 32), configs.Tile(32, 16)
MILLISECONDS = {TABLES: 3.0, RIGHT: 2.0, SPOILT: 1.0}
SMALL = {"seqlen": 20, "batch": 1}


@pytest.fixture
def tuning(monkeypatch, use_tile):
    """Tunes in times that are given; returns how a kernel's launches with SPOILT are spoilt, and the choices by key."""
    spoilt, launched, run = {}, [], triton._run

    def spoil(kernel, grid, tile, *args, **constants):
        launched.append(tile)
        how = spoilt.get(kernel.__name__) if tile == SPOILT else None
        if isinstance(how, Exception):
            raise how
        run(kernel, (grid[0] - (how == "a block left out"), *grid[1:]), tile, *args, **constants)
        if callable(how):
            how(*args)

    def do_bench(launch, **options):
        launch()
        return MILLISECONDS[launched[-1]]

    use_tile(TABLES)
    monkeypatch.setenv("REATTN_AUTOTUNE", "1")
    monkeypatch.setattr(configs, "candidates", lambda *problem: [SPOILT, RIGHT])
    monkeypatch.setattr(triton, "_run", spoil)
    monkeypatch.setattr(triton.triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(triton, "_tuned_tiles", chosen := {})
    return spoilt, chosen


def assert_tuned(problem, chosen, caplog, **tiles):
    """Every kernel with its tile, and results that are those of the table's, whatever was tried; returns the log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("REATTN_AUTOTUNE")
        expected = compute(problem, "triton")
    with caplog.at_level(logging.INFO, logger="reattn"):
        found = compute(problem, "triton")
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-3), name
    assert {key[0]: tile for key, tile in chosen.items()} == dict.fromkeys(configs.TABLE, SPOILT) | tiles
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("mode", ["layer", "batch-training"])
def test_tuning_takes_the_fastest_tile_once(mode, tuning, caplog, device):
    """One that is spoilt no more than the others here."""
    problem = mixed_before(make_problem(mode, **SMALL, device=device))
    for _ in range(2):
        lines = assert_tuned(problem, tuning[1], caplog)
        assert len(lines) == 5 and all(line.startswith("tuned ") for line in lines)


WAYS_TO_SPOIL = {
    "forward_kernel": {
        "a block left out": "a block left out",
        "one row of the output": lambda q, k, v, out, *_: out.ptr[0, 0, 3].mul_(1.1),
        "one LSE": lambda q, k, v, out, norm, pre_theta, mask, lse, *_: lse[0, 2, 5].add_(0.02),
        "infinite": lambda q, k, v, out, *_: out.ptr[0, 0, 3, 0].fill_(float("inf")),
        "too many registers": triton.triton.runtime.errors.OutOfResources(300, 255, "registers"),
        "not compiled": RuntimeError("PassManager::run failed"),
    },
    "grad_maps_kernel": {
        "a block left out": "a block left out",
        "delta": lambda q, k, v, grad, norm, pre_theta, mask, lse, delta, *_: delta[0, 0, 0].add_(1),
        "a normalised map": lambda *args: args[10][0, 1, 3].mul_(1.1),
        "a map's gradient": lambda *args: args[11][0, 1, 3].mul_(1.1),
        "a partial sum": lambda *args: args[12][..., 0].add_(5),
        "the products": lambda *args: args[15].mul_(1.1),
    },
    "grad_scores_kernel": {
        "a block left out": "a block left out",
        "the products' gradient": lambda *args: args[7][0, 1, 3].mul_(1.1),
        "the products": lambda *args: args[9].mul_(1.1),
    },
    "grad_query_kernel": {
        "a block left out": "a block left out",
        "the query's gradient": lambda q, k, grad_q, *_: grad_q.ptr[0, 0, 3].mul_(1.1),
    },
    "grad_key_kernel": {
        "a block left out": "a block left out",
        "the value's gradient": lambda q, grad, mask, grad_k, grad_v, *_: grad_v.ptr.mul_(1.05),
    },
}


@pytest.mark.parametrize(("kernel", "how"), [(kernel, how) for kernel, ways in WAYS_TO_SPOIL.items() for how in ways])
def test_tuning_refuses_a_tile_that_is_wrong(kernel, how, tuning, caplog, monkeypatch, device):
    """And names it; the fastest of those that are right is taken."""
    spoilt, chosen = tuning
    spoilt[kernel] = WAYS_TO_SPOIL[kernel][how]
    name = kernel.removesuffix("_kernel")
    monkeypatch.setattr(configs, "candidates", lambda kernel, *problem: [SPOILT, RIGHT] if kernel == name else [])
    problem = mixed_before(make_problem("batch-training", **SMALL, device=device, dtype=torch.float16))
    lines = assert_tuned(problem, chosen, caplog, **dict.fromkeys(configs.TABLE, TABLES) | {name: RIGHT})
    (refusal,) = (line for line in lines if "refused" in line)
    assert name in refusal and str(SPOILT) in refusal and str(RIGHT) not in refusal


def test_tuning_where_the_tables_tile_does_not_run(tuning, use_tile, device):
    """What it raises is raised, as it is without tuning."""
    spoilt, chosen = tuning
    spoilt["forward_kernel"] = triton.triton.runtime.errors.OutOfResources(300, 255, "registers")
    use_tile(SPOILT)
    with pytest.raises(triton.triton.runtime.errors.OutOfResources, match="registers"):
        compute(make_problem("layer", **SMALL, device=device), "triton")
    assert not chosen


def test_tuning_again_for_another_kernel(tuning, monkeypatch, device):
    """What compiles another kernel is another problem; another length is not."""
    _, chosen = tuning
    monkeypatch.setattr(triton, "_run", lambda *launch, **constants: None)
    monkeypatch.setattr(triton, "_difference", lambda *tensors: 0.0)
    monkeypatch.setattr(triton.triton.testing, "do_bench", lambda launch, **options: 1.0)
    problems = [
        make_problem(mode, **SMALL, device=device) for mode in ("layer", "batch-training", "batch-eval", "none")
    ]
    problems += [make_problem(**SMALL, device=device, **other) for other in ({"heads": 4}, {"head_dim": 40})]
    problems += [make_problem(**SMALL, device=device, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)]
    problems += [problems[0].with_options(dropout_p=0.1), problems[0].with_tensors(bias=None)]
    for number, problem in enumerate(problems, 1):
        compute(problem, "triton")
        assert len(chosen) == 4 * number
    make_shape = configs.shape
    for number, change in enumerate(({"WIDE": True}, {"PRECISION": "tf32"}), len(problems) + 1):
        monkeypatch.setattr(configs, "shape", lambda *args, new=change, **kw: make_shape(*args, **kw)._replace(**new))
        compute(problems[0], "triton")
        assert len(chosen) == 4 * number
    monkeypatch.setattr(configs, "shape", make_shape)
    compute(make_problem("layer", seqlen=21, device=device), "triton")
    assert len(chosen) == 4 * number
