"""The CUDA C++ backend: every plan, any order of its blocks, what it refuses, failures, and what only a GPU shows."""

import ctypes
import functools
import itertools
import math
import os
import random
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from fuzz import FLOATS, mask_of, random_problem
from parity import MODES, STATISTICS, assert_parity, assert_same, compute, device_of, drawn_mask, make_problem
from test_masks import KINDS, masked_problem

from reattn import re_attention
from reattn.backends import choose, common, cpu, cuda, cuda_driver, cuda_plan, triton
from reattn.backends.contract import Inputs
from reattn.backends.cuda_plan import SHARED_LIMIT, Plan, Size
from reattn.problem import Problem

if cuda.EMULATED:
    import emulator.cuda

pytestmark = pytest.mark.cuda
modes = pytest.mark.parametrize("mode", MODES)
emulated = pytest.mark.skipif(not cuda.EMULATED, reason="needs the emulator")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MOST_SHARED = SHARED_LIMIT[90]


class Cut(NamedTuple):
    """How kernels cut a problem. The backward pass always owns 16 rows; its launches have ``launch_blocks`` blocks."""

    rows: int
    keys: int | None = None  # in a tile, of all if not said otherwise
    turns: int = 1  # heads of a warp
    launch_blocks: int = 1 << 20

    def plan(self, kernel: str, size: Size) -> Plan:
        whole = cuda_plan.round_up(size.seqlen_k, 16)
        rows, keys = self.rows if kernel == "forward" else 16, min(self.keys or whole, whole)
        warps = -(-size.heads // self.turns)
        return Plan(rows, keys, keys == whole, warps, cuda_plan._shared_bytes(kernel, size, rows, keys, warps))


# With 35 queries a sample is three blocks of the backward pass: launches are a sample, two and one block, or one.
CUTS = {
    "32 rows, all keys": Cut(32),
    "32 rows, tiles of 64": Cut(32, 64, launch_blocks=3),
    "32 rows, two heads a warp": Cut(32, turns=2, launch_blocks=2),
    "16 rows, all keys": Cut(16, launch_blocks=2),
    "16 rows, tiles of 64": Cut(16, 64, launch_blocks=1),
    "16 rows, tiles of 16": Cut(16, 16, launch_blocks=3),
    "16 rows, two heads a warp": Cut(16, turns=2, launch_blocks=1),
    "16 rows, tiles of 32, three heads a warp": Cut(16, 32, turns=3, launch_blocks=2),
}
# The last of a block's tiles has 8 rows: of 16-bit elements without a mask, head_dim up to 64, and up to 12 warps.
HALF_TILES = {"24 rows, two heads a warp": Cut(24, turns=2, launch_blocks=2), "40 rows": Cut(40)}
# Taller blocks are for 16-bit elements.
SIXTEEN_ROWS = [name for name, cut in CUTS.items() if cut.rows == 16]


def make_cuda_problem(mode, **options):
    return make_problem(mode, device=device_of("cuda"), **options)


def cut_as(name, monkeypatch):
    """Has calls cut their problems that way, once plans are forgotten."""
    cut = (CUTS | HALF_TILES)[name]

    def plan_of(kernel, size, shared_bytes, multiprocessors):
        plan = cut.plan(kernel, size)
        if plan.shared_bytes > shared_bytes:
            pytest.skip("needs a card with more shared memory")
        return plan

    def launches_of(size, shared_bytes, multiprocessors):
        block = 2 * 16 * size.heads * cuda_plan.round_up(size.seqlen_k, 16) * size.element_bytes
        monkeypatch.setattr(common, "WORKSPACE_BYTES", cut.launch_blocks * block)
        return cuda_plan.cut_backward(size, shared_bytes, 1)

    monkeypatch.setattr(cuda, "_plan", plan_of)
    monkeypatch.setattr(cuda, "_cut", launches_of)


@pytest.fixture
def use_cut(monkeypatch, use_launch, forget_plans):
    """Has a call cut its problem that way; returns how often each kernel is launched."""

    def use(name):
        launched, launch = Counter(), cuda_driver.launch

        def count(loaded, *args):
            launched[loaded.kernel.function] += 1
            launch(loaded, *args)

        cut_as(name, monkeypatch)
        forget_plans()
        use_launch(count)
        return launched

    return use


@pytest.fixture
def use_card(monkeypatch, forget_plans):
    """The shared memory and multiprocessors that the backend sees."""

    def use(*card):
        monkeypatch.setattr(cuda, "_describe", lambda device: card)
        forget_plans()

    return use


@pytest.fixture
def use_launch(monkeypatch):
    """What is called with each launch."""
    return lambda launch: monkeypatch.setattr(cuda_driver, "launch", launch)


# Of 128 keys or fewer a warp of products takes 32, of more 64; of tiles, the last ones are not whole.
LENGTHS = (70, 150)


def plan_cases():
    """Every two of cut, mode and dtype together; with dropout, and with more keys, in turn."""
    for index, cut in enumerate(CUTS):
        for turn, mode in enumerate(MODES):
            for which, dtype in enumerate(FLOATS):
                if (index + turn + which) % 3 or CUTS[cut].rows == 32 and dtype == "float32":
                    continue
                dropout_p = 0.3 * ((index + turn // 2 + which) % 2)
                seqlen_k = LENGTHS[(index // 2 + turn // 2) % 2]
                name = f"{cut}-{mode}-{dtype}-{seqlen_k}{'-dropout' * bool(dropout_p)}"
                yield pytest.param(cut, mode, FLOATS[dtype], seqlen_k, dropout_p, id=name)


@pytest.mark.parametrize(("cut", "mode", "dtype", "seqlen_k", "dropout_p"), list(plan_cases()))
def test_plans(cut, mode, dtype, seqlen_k, dropout_p, use_cut):
    sizes = {"seqlen": 35, "seqlen_k": seqlen_k}
    keep = mask_of("cuda", **sizes, head_dim=128) if dropout_p else None
    problem = make_cuda_problem(mode, **sizes, head_dim=33, dtype=dtype, dropout_p=dropout_p)
    launched = use_cut(cut)
    assert_parity(replace(problem, keep=keep), "cuda")
    parts = {1 << 20: 1, 3: 2, 2: 4, 1: 6}[CUTS[cut].launch_blocks]
    sums = {"finish", "grad_sums", "add_up"} if mode == "batch-training" else set()
    assert launched == {"forward": 1, "backward": parts, "products": parts, "unfold": 1} | dict.fromkeys(sums, 1)


def half_tile_cases():
    """Both with every mode and 16-bit dtype; columns that are stored in ways of their own, and the rest, in turn."""
    for index, (cut, mode, dtype) in enumerate(itertools.product(HALF_TILES, MODES, ("bfloat16", "float16"))):
        options = {"heads": (12, 5)[index % 2], "head_dim": (64, 32, 33, 48, 16)[index % 5], "batch": 1 + index % 2}
        options |= {"seqlen": (43, 80, 7)[index % 3], "seqlen_k": LENGTHS[index // 2 % 2]}
        options |= {"dropout_p": 0.3 * (index // 4 % 2), "pre_theta": index % 7 == 6}
        name = "-".join(f"{name}={value}" for name, value in options.items())
        yield pytest.param(cut, mode, FLOATS[dtype], options, id=f"{cut}-{mode}-{dtype}-{name}")


@pytest.mark.parametrize(("cut", "mode", "dtype", "options"), list(half_tile_cases()))
def test_half_tiles(cut, mode, dtype, options, use_cut, monkeypatch):
    """By blocks that take several groups of rows, one after the other."""
    monkeypatch.setattr(cuda_plan, "blocks_at_once", lambda *_: 2)
    dropout_p, mixed = options["dropout_p"], options["pre_theta"]
    sizes = {name: value for name, value in options.items() if name not in ("dropout_p", "pre_theta")}
    keep = mask_of("cuda", **sizes | {"head_dim": 128}) if dropout_p else None
    problem = make_cuda_problem(mode, **sizes, dtype=dtype, **({"dropout_p": dropout_p} if dropout_p else {}))
    if mixed:
        problem = problem.with_tensors(pre_theta=torch.linalg.qr(problem["theta"])[0])
    use_cut(cut)
    assert_parity(replace(problem, keep=keep), "cuda")


@pytest.mark.parametrize("cut", HALF_TILES)
def test_rows_of_half_tiles_do_not_meet(cut, use_cut):
    """What is not finite in one query stays there."""
    use_cut(cut)
    rows = (0, 15, 17, 23, 39)
    for mode, dtype in (("layer", torch.bfloat16), ("none", torch.float16)):
        problem = make_cuda_problem(mode, heads=3, head_dim=32, seqlen=41, seqlen_k=70, batch=1, dtype=dtype)
        clean = compute(problem, "cuda")
        for row, number in itertools.product(rows, (float("nan"), float("inf"))):
            query = problem["query"].clone()
            query[0, 1, row] = number
            found = compute(problem.with_tensors(query=query), "cuda")
            others = torch.arange(41, device=query.device) != row
            assert found["output"][:, :, row].isnan().any()
            for name in ("output", "query gradient"):
                assert torch.equal(found[name][:, :, others], clean[name][:, :, others]), (name, row, number)


# Heads and head_dim: rows of several pieces, several columns of blocks, several heads to a warp, and hardly anything.
SHAPES = [(1, 3), (3, 128), (12, 64), (13, 33), (13, 80), (32, 35)]


def shape_cases():
    """Every shape with every plan that an H100 has shared memory for; modes, dtypes and lengths in turn."""
    turn = 0
    for heads, head_dim in SHAPES:
        for cut in CUTS:
            dtype, mode, seqlen_k = list(FLOATS)[turn % 3], list(MODES)[turn % 4], LENGTHS[turn // 2 % 2]
            if CUTS[cut].rows == 32 or heads == 32:
                dtype = ("float16", "bfloat16")[turn % 2]
            if heads == 32:
                seqlen_k = 40
            size = Size(FLOATS[dtype].itemsize, heads, head_dim, 1, 19, seqlen_k, mode == "batch-training")
            if max(CUTS[cut].plan(kernel, size).shared_bytes for kernel in ("forward", "backward")) > MOST_SHARED:
                continue
            turn += 1
            name = f"{heads}x{head_dim}-{cut}-{mode}-{dtype}-{seqlen_k}"
            yield pytest.param(cut, mode, FLOATS[dtype], heads, head_dim, seqlen_k, id=name)


@pytest.mark.parametrize(("cut", "mode", "dtype", "heads", "head_dim", "seqlen_k"), list(shape_cases()))
def test_shapes_of_plans(cut, mode, dtype, heads, head_dim, seqlen_k, use_cut):
    sizes = {"heads": heads, "head_dim": head_dim, "seqlen": 19, "seqlen_k": seqlen_k, "batch": 1}
    # The norm over a single head leaves a sign.
    mode = "none" if heads == 1 and mode == "layer" else mode
    use_cut(cut)
    assert_parity(make_cuda_problem(mode, **sizes, dtype=dtype), "cuda")


def masked_cases():
    """Every cut with every third kind of mask; modes, dtypes and lengths in turn."""
    for index, cut in enumerate(CUTS):
        for turn, kind in enumerate(KINDS):
            if (index + turn) % 3:
                continue
            dtype, mode = list(FLOATS)[(index + turn // 3) % 3], list(MODES)[(index // 2 + turn // 2) % 4]
            if CUTS[cut].rows == 32 and dtype == "float32":
                dtype = "bfloat16"
            seqlen_k = LENGTHS[(index + turn // 2) % 2]
            yield pytest.param(cut, kind, mode, FLOATS[dtype], seqlen_k, id=f"{cut}-{kind}-{mode}-{dtype}-{seqlen_k}")


@pytest.mark.parametrize(("cut", "kind", "mode", "dtype", "seqlen_k"), list(masked_cases()))
def test_masks_with_every_plan(cut, kind, mode, dtype, seqlen_k, use_cut):
    use_cut(cut)
    sizes = {"heads": 5, "head_dim": 33, "seqlen": 35, "seqlen_k": seqlen_k}
    assert_parity(masked_problem(kind, mode, **sizes, dtype=dtype, device=device_of("cuda")), "cuda")


def test_causal_with_many_keys_in_parts(use_cut):
    """Blocks of keys that the first launches see nothing of."""
    use_cut("16 rows, two heads a warp")
    for dtype, mode in (("float32", "layer"), ("float16", "batch-training")):
        sizes = {"heads": 2, "seqlen": 300, "seqlen_k": 330, "batch": 1}
        assert_parity(masked_problem("causal-bias", mode, **sizes, dtype=FLOATS[dtype]), "cuda")


def hidden_cases():
    """Every problem with every kind of mask, by one after the other of the cuts that float32 has as well or, in 16
    bits, of all."""
    problems = (
        ("float32", 16, "none", ("key", "value")),
        ("float32", 40, "batch-training", ("value",)),
        ("bfloat16", 72, "batch-training", ("value",)),
        ("float16", 33, "batch-training", ("value",)),
        ("bfloat16", 33, "layer", ("key", "value")),
    )
    for index, (problem, kind) in enumerate(itertools.product(problems, ("padding", "causal", "by-head"))):
        cuts = SIXTEEN_ROWS[::2] if problem[0] == "float32" else list(CUTS)[::2]
        cut = cuts[(index + index // len(cuts)) % len(cuts)]
        yield pytest.param(cut, kind, *problem, id=f"{cut}-{kind}-{'-'.join(map(str, problem[:3]))}")


@pytest.mark.parametrize(("cut", "kind", "dtype", "head_dim", "mode", "broken"), list(hidden_cases()))
def test_nothing_of_hidden_values_arrives(cut, kind, dtype, head_dim, mode, broken, use_cut):
    """Nor of hidden keys, from wherever they are read; where they are seen, NaN is. Batch statistics take what keys are
    everywhere."""
    use_cut(cut)
    sizes = {"heads": 3, "head_dim": head_dim, "seqlen": 35, "seqlen_k": 70, "batch": 1 + (kind == "padding")}
    problem = masked_problem(kind, mode, **sizes, dtype=FLOATS[dtype], device=device_of("cuda"))
    clean = compute(problem, "cuda")
    tensors, key = {name: problem[name].clone() for name in broken}, 34 if kind == "causal" else 69
    for tensor in tensors.values():
        tensor[-1, :, key] = float("nan")
    found = compute(problem.with_tensors(**tensors), "cuda")
    visible = torch.ones(sizes["batch"], 3, 35, 70, dtype=torch.bool, device=problem.grad.device)
    visible = visible.tril() if kind == "causal" else visible & problem["attn_mask"]
    seen = visible[-1, :, :, key]
    blind = ~seen.any(0) if "key" in broken else ~seen
    assert torch.equal(
        found["output"][-1].masked_fill(~blind[..., None], 0), clean["output"][-1].masked_fill(~blind[..., None], 0)
    )
    assert found["output"][-1][seen].isnan().all()
    assert torch.equal(found["output"][:-1], clean["output"][:-1])
    blind = ~seen.any(0)
    if mode != "batch-training" or not seen.any():
        assert torch.equal(found["query gradient"][-1, :, blind], clean["query gradient"][-1, :, blind])


def call_of(problem):
    """What a backend's forward pass is given for it."""
    names = Inputs._fields[:-1]
    call = Problem.of(problem["query"], **problem.options, scale=problem["query"].shape[-1] ** -0.5)
    return call, Inputs(**{name: problem.tensors[name] for name in names if name in problem.tensors})


@pytest.mark.parametrize("kind", ["padding", "causal-padding", "by-head", "full-bias"])
def test_masks_with_synchronised_statistics(kind):
    """Of one rank alone they are those that a call finds by itself; both backward passes are right."""
    problem = masked_problem(kind, "batch-training", seqlen_k=21, dtype=torch.float16, device=device_of("cuda"))
    call, inputs = call_of(problem)
    mask = problem["attn_mask"][(None,) * (4 - problem["attn_mask"].ndim)]
    inputs, added = inputs._replace(attn_mask=mask), mask.dtype != torch.bool
    call = call._replace(mask="float" if added else "bool", mask_gradient=added)
    running = [[tensor.clone() for tensor in inputs[7:9]] for _ in range(2)]
    alone, together = (inputs._replace(running_mean=mean, running_var=var) for mean, var in running)
    outputs = cuda.forward(call, alone)
    gradients = cuda.backward(call, problem.grad, alone, outputs, None)
    call = call._replace(synchronised=True)
    of_ranks = cuda.forward(call, together)
    of_ranks = of_ranks._replace(statistics=cuda.finish(call, together, of_ranks))
    sums = cuda.grad_sums(call, problem.grad, of_ranks)
    others = cuda.backward(call, problem.grad, together, of_ranks, sums)
    for first, second in zip((*outputs, *gradients, *running[0]), (*of_ranks, *others, *running[1]), strict=True):
        torch.testing.assert_close(second.double(), first.double(), rtol=1e-3, atol=1e-3)


def assert_near(found, expected, allowed):
    """As far from it, in the Frobenius norm and relative to it."""
    for name in expected:
        # The mixing bias has no gradient where a norm follows: what is left is the rounding of its terms.
        size = expected["theta gradient" if name == "bias gradient" else name].double().norm()
        difference = (found[name].double() - expected[name]).norm()
        assert difference <= allowed * size, f"{name}: {difference / size:.3g}"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_plans_agree(mode, dtype, use_cut):
    """To rounding; dropout included."""
    problem = make_cuda_problem(mode, heads=5, seqlen=35, seqlen_k=150, dtype=FLOATS[dtype], dropout_p=0.2)
    first, *others = SIXTEEN_ROWS if dtype == "float32" else CUTS
    use_cut(first)
    expected = compute(problem, "cuda")
    for cut in others:
        use_cut(cut)
        assert_near(compute(problem, "cuda"), expected, {"float32": 5e-5, "float16": 1e-3, "bfloat16": 8e-3}[dtype])


@pytest.mark.extension
@pytest.mark.parametrize("cut", CUTS)
def test_plans_draw_the_same_mask(cut, use_cut):
    """And the same random numbers as the CPU backend: of 32 keys, it lays them out as 4 words of 8 counters."""
    if device_of("cuda") != CPU:
        pytest.skip("the seed is drawn by another generator")
    sizes = {"heads": 5, "seqlen": 19, "seqlen_k": 96, "head_dim": 128, "seed": 7}
    use_cut(cut)
    by_counter = drawn_mask("cuda", **sizes).unflatten(-1, (3, 8, 4))
    assert torch.equal(by_counter.mT.flatten(-3), mask_of("cpu", **sizes))


# Shared memory of a block and multiprocessors.
CARDS = {
    "T4": (65536, 40),
    "RTX 3090": (SHARED_LIMIT[86], 82),
    "A100": (SHARED_LIMIT[80], 108),
    "H100": (SHARED_LIMIT[90], 132),
    "small": (SHARED_LIMIT[90], 1),
}
# Heads, batch and length of DeepViT, and what the forward and the backward pass have for it in 16 bits: rows, keys,
# warps. An H100 has shared memory for longer rows.
PLANS = {
    ("T4", 12, 128, 197): ((32, 64, 12), (16, 64, 6)),
    ("RTX 3090", 12, 128, 197): ((16, 208, 12), (16, 96, 12)),
    ("A100", 12, 128, 197): ((24, 208, 12), (16, 192, 12)),
    ("H100", 12, 128, 197): ((32, 208, 12), (16, 208, 12)),
    ("H100", 12, 128, 257): ((32, 272, 12), (16, 272, 12)),
    ("H100", 12, 8, 197): ((16, 208, 12), (16, 208, 12)),
    ("H100", 12, 128, 1568): ((32, 272, 12), (16, 272, 12)),
    ("H100", 32, 128, 197): ((16, 208, 11), (16, 96, 8)),
}


@pytest.mark.parametrize(("card", "heads", "batch", "length"), PLANS)
def test_plan_of_a_card(card, heads, batch, length):
    size = Size(2, heads, 64, batch, length, length, False)
    plans = [cuda_plan.make_plan(kernel, size, *CARDS[card]) for kernel in ("forward", "backward")]
    assert [(plan.rows, plan.keys, plan.warps) for plan in plans] == [*PLANS[card, heads, batch, length]]
    assert all(plan.resident == (plan.keys >= length) for plan in plans)


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("card", CARDS)
def test_products_fit_every_card(card, element_bytes):
    for head_dim, length in itertools.product((8, 32, 64, 128), (16, 128, 129, 197, 256, 257, 5000)):
        shared_bytes, multiprocessors = CARDS[card]
        size = Size(element_bytes, 12, head_dim, 128, length, length, False)
        plan = cuda_plan.cut_backward(size, shared_bytes, multiprocessors).products
        assert plan.shared_bytes <= shared_bytes and 16 * 2 * plan.warps >= plan.keys, (head_dim, length)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("card", CARDS)
def test_cards(card, dropout_p, use_card):
    """Each kernel with the plan that this card would have for it."""
    if cuda._describe(0)[0] < CARDS[card][0]:
        pytest.skip("needs as much shared memory")
    sizes = {"heads": 6, "seqlen": 35, "seqlen_k": 200, "batch": 1}
    keep = mask_of("cuda", **sizes, head_dim=128, dropout_p=dropout_p) if dropout_p else None
    use_card(*CARDS[card])
    problem = make_cuda_problem("batch-training", **sizes, head_dim=64, dtype=torch.float16, dropout_p=dropout_p)
    assert_parity(replace(problem, keep=keep), "cuda")


ORDERED = {
    "32 rows, tiles of 64": {"heads": 12, "dtype": torch.float16},
    "16 rows, tiles of 16": {"heads": 4, "dtype": torch.float32},
    "16 rows, all keys": {"heads": 14, "dtype": torch.bfloat16, "head_dim": 40},
    "16 rows, two heads a warp": {"heads": 3, "dtype": torch.float16, "head_dim": 72},
}


@emulated
@pytest.mark.parametrize("cut", ORDERED)
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_order_of_blocks_changes_nothing(mode, cut, use_cut):
    """Bitwise. Within a block any two threads that it could make a difference to are a race, which is an error."""
    problem = make_problem(mode, **ORDERED[cut], seqlen=35, seqlen_k=70, dropout_p=0.1)
    use_cut(cut)
    expected = compute(problem, "cuda")
    for reorder in (list.reverse, random.Random(0).shuffle):
        reorder(blocks := list(range(1000)))
        with emulator.executing(blocks=blocks) as launches:
            assert_same(compute(problem, "cuda"), expected)
        assert 1 < max(math.prod(launched.grid) for launched in launches) < 1000


@emulated
@pytest.mark.parametrize("arch", [75, 80])
@pytest.mark.parametrize("cut", ["32 rows, two heads a warp", "16 rows, all keys", "16 rows, tiles of 64"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_compute_capability(dtype, cut, arch, use_cut, request):
    """The kernels for 7.5, without asynchronous copies, without the larger products, without bfloat16; and for 8.0,
    which stores no matrices."""
    if dtype == "float32" and CUTS[cut].rows == 32:
        pytest.skip("taller blocks are for 16-bit elements")
    request.addfinalizer(functools.partial(cuda_driver.use, cuda_driver.use(emulator.cuda.Driver(arch))))
    use_cut(cut)
    turn = list(FLOATS).index(dtype) + list(CUTS).index(cut) + (arch == 80)
    mode, heads = (("batch-training", 5), ("layer", 13))[turn % 2]
    sizes = {"heads": heads, "seqlen": 35, "seqlen_k": 70, "batch": 1}
    assert_parity(make_problem(mode, **sizes, dtype=FLOATS[dtype]), "cuda")


@emulated
@pytest.mark.parametrize(
    ("heads", "dtype", "mode", "element"),
    [
        (12, torch.float16, "batch-training", "Half"),
        (12, torch.float16, "layer", "Half"),
        (13, torch.bfloat16, "none", "BFloat16"),
        (12, torch.float32, "batch-training", "float"),
    ],
)
def test_what_is_launched(heads, dtype, mode, element, use_launch):
    """The kernels by the names and for the shape that they are compiled with, with parameters of their size."""
    launches = []
    use_launch(lambda *launch: launches.append(launch))
    compute(make_problem(mode, heads=heads, batch=8, dtype=dtype), "cuda")
    sums = ["finish", "grad_sums", "add_up"] if mode == "batch-training" else []
    expected = ["forward", *sums, "backward", "products", "unfold"]
    kernels = [loaded.kernel for loaded, *_ in launches]
    assert [kernel.name for kernel in kernels] == [f"reattn::{name}" for name in expected]
    sources = {"forward", "backward", "products"}
    assert [kernel.source for kernel in kernels] == [name if name in sources else "sums" for name in expected]
    shape = {("REATTN_ELEMENT", element), ("REATTN_HEADS", heads), ("REATTN_HEAD_DIM", 16)}
    assert all(shape <= {*kernel.constants} for kernel in kernels)
    for loaded, grid, threads, shared_bytes, stream, params, tensors in launches:
        ((_, offset, size),) = loaded.function.parameters
        assert (offset, size) == (0, ctypes.sizeof(params))
        assert min(grid) > 0 and threads % 32 == 0 and shared_bytes > 0 and stream == 0
        assert any(tensor is not None for tensor in tensors)


def test_what_is_remembered_has_no_addresses(use_launch, forget_plans):
    """A call without bias and parameters of the norm, after one of the same shapes that has them, finds none."""
    launch, given = cuda_driver.launch, []

    def record(loaded, *args):
        params = args[-2]
        given.append((params.fold.p.bias, params.fold.p.norm_weight, params.grad_bias, params.grad_norm_weight))
        launch(loaded, *args)

    forget_plans()
    use_launch(record)
    problem = make_cuda_problem("layer")
    compute(problem, "cuda")
    assert all(given[-1])
    given.clear()
    assert_parity(problem.with_tensors(bias=None, norm_weight=None, norm_bias=None), "cuda")
    assert given and all(address is None for addresses in given for address in addresses)


@emulated
def test_what_a_launch_raises(use_launch, monkeypatch):
    """Comes out of the call as it is, and nothing is left for the next one."""
    problem = make_problem("layer")
    expected = compute(problem, "cuda")
    error = KeyError("not that one")

    def fail(*launch):
        raise error

    use_launch(fail)
    with pytest.raises(KeyError) as raised:
        compute(problem, "cuda")
    assert raised.value is error
    monkeypatch.undo()
    assert_same(compute(problem, "cuda"), expected)


def test_every_reason_that_inputs_give():
    problem = Problem(torch.device("meta"), torch.float64, heads=33, head_dim=129, is_causal=True)
    reasons = [
        "needs a CUDA tensor, got meta",
        "dtype must be float32, float16 or bfloat16, got torch.float64",
        "takes at most 32 heads, got 33",
        "takes head_dim up to 128, got 129",
    ]
    assert cuda.not_supported(problem) == reasons
    query = torch.zeros(2, 33, 5, 129, dtype=torch.float64, device=problem.device)
    message = f"backend 'cuda' cannot run this: {'; '.join(reasons)} (query (2, 33, 5, 129), key (2, 33, 5, 129)"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        re_attention(query, query, query, torch.eye(33, device="meta"), is_causal=True, backend="cuda")


@emulated
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_calls_are_on_the_device_of_their_tensors(mode, monkeypatch):
    """torch's guard makes it current before anything is launched."""
    current, launched = [], []

    @contextmanager
    def guard(device):
        current.append(device)
        yield
        current.pop()

    def on_device(function):
        return lambda problem, *args: function(problem._replace(device=GPU), *args)

    def record(launch):
        return lambda loaded, *args: (launched.append((loaded.kernel.function, list(current))), launch(loaded, *args))

    monkeypatch.setattr(torch.cuda, "device", guard)
    # Another one is; a build for CPUs alone has no such function.
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1 + GPU.index, raising=False)
    monkeypatch.setattr(cuda_driver, "launch", record(cuda_driver.launch))
    for name in ("forward", "finish", "grad_sums", "backward"):
        monkeypatch.setattr(cuda, name, on_device(getattr(cuda, name)))
    problem = make_problem(mode)
    compute(problem, "cuda")
    assert {"forward", "backward", "products", "unfold"} <= {name for name, _ in launched}
    assert all(devices[:1] == [GPU] for _, devices in launched)
    assert not current


def test_cpu_tensors_are_for_tests_alone(monkeypatch):
    monkeypatch.setattr(cuda, "EMULATED", False)
    assert "needs a CUDA tensor, got cpu" in cuda.unavailable(CPU)


@pytest.mark.parametrize(
    ("shared_bytes", "heads", "head_dim", "dtype"),
    [(65536, 32, 128, torch.float32), (57344, 32, 128, torch.float16), (16384, 12, 64, torch.bfloat16)],
)
def test_too_little_shared_memory(shared_bytes, heads, head_dim, dtype, use_card):
    use_card(shared_bytes, 1)
    reason = (
        f"needs more shared memory than the {shared_bytes // 1024} KB that a block has on this card, for {heads} heads"
        f" of head_dim {head_dim} and {dtype.itemsize} bytes an element"
    )
    problem = make_cuda_problem("layer", heads=heads, head_dim=head_dim, dtype=dtype)
    with pytest.raises(RuntimeError, match=re.escape(f"backend 'cuda' cannot run this: {reason} (query (2, {heads}")):
        re_attention(**problem.tensors, **problem.options, backend="cuda")
    # Whether it suffices does not depend on what has more than fits.
    use_card(MOST_SHARED, 1)
    assert cuda.not_supported(Problem(problem["query"].device, dtype, heads, head_dim)) == []


@pytest.mark.parametrize(
    ("shared_bytes", "head_dim", "heads"),
    [
        (65536, 16, 23),
        (65536, 128, 17),
        (SHARED_LIMIT[86], 96, 32),
        (SHARED_LIMIT[86], 128, 30),
        (SHARED_LIMIT[80], 128, 32),
    ],
)
def test_most_heads_of_float32(shared_bytes, head_dim, heads, use_card):
    """As the README says; in 16 bits every card takes them all."""
    use_card(shared_bytes, 40)
    assert not cuda._too_large(0, 4, heads, head_dim) and not cuda._too_large(0, 2, 32, head_dim)
    assert heads == 32 or cuda._too_large(0, 4, heads + 1, head_dim)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_plans_fit_at_any_length(kernel, itemsize):
    """Also where all keys would take more bytes than an int counts."""
    for heads in (1, 12, 13, 32):
        for length in (1, 1 << 12, 1 << 20, 1 << 26):
            for shared_bytes in (65536, MOST_SHARED):
                size = Size(itemsize, heads, 128, 1, length, length, True)
                plan = cuda_plan.make_plan(kernel, size, shared_bytes, 1)
                if plan is None:
                    assert shared_bytes < MOST_SHARED, (heads, length)
                else:
                    assert plan.shared_bytes <= shared_bytes, (heads, length)
                    assert plan.resident == (plan.keys >= length) and plan.keys % 16 == 0, (heads, length)
                    assert 1 <= plan.warps <= min(heads, 16), (heads, length)


@emulated
def test_auto_prefers_cuda_and_then_triton(monkeypatch):
    monkeypatch.delenv("REATTN_BACKEND", raising=False)
    problem = Problem(CPU, torch.float32, 12, 64)
    preferred = ["cuda", "triton", *["cpu"] * (not cpu._import_error), "reference"]
    for expected, refusing in zip(preferred, (cuda, triton, cpu), strict=False):
        assert choose("auto", problem, "") == expected
        monkeypatch.setattr(refusing, "not_supported", lambda problem: ["not today"])


def test_failed_launch(use_card, monkeypatch, forget_plans):
    """It raises, and leaves nothing behind for the next call to find."""
    problem = make_cuda_problem("layer", heads=12, seqlen_k=400)
    expected = compute(problem, "cuda")
    use_card(1 << 22, 1)
    with pytest.raises(RuntimeError, match="^reattn::forward: CUDA_ERROR_INVALID_VALUE"):
        compute(problem, "cuda")
    monkeypatch.undo()
    forget_plans()
    if problem.grad.is_cuda:
        torch.cuda.synchronize()
    assert_same(compute(problem, "cuda"), expected)


@pytest.mark.parametrize("seed", range(int(os.environ.get("REATTN_FUZZ", "24"))))
def test_random_problems(seed, use_card):
    """Where so many are compared, a gradient that comes out right by luck in eager arithmetic is no rarity."""
    draw = random.Random(seed)
    problem, made_of = random_problem(draw, "cuda", most_queries=40)
    query, largest = problem["query"], cuda._describe(0)[0]
    call = Problem.of(query)
    cards = [(shared_bytes, draw.choice([1, 1000])) for shared_bytes, _ in CARDS.values() if shared_bytes < largest]
    draw.shuffle(cards)
    # One that is large enough, of those that are no larger than the real one.
    for card in [*cards, (largest, draw.choice([1, 1000]))]:
        use_card(*card)
        if not cuda.not_supported(call):
            break
    print(f"seed {seed}: { {'card': card} | made_of }")
    assert_parity(problem, "cuda", times=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@modes
def test_scores_of_a_million(mode, dtype):
    problem = make_cuda_problem(mode, seqlen_k=150, dtype=FLOATS[dtype])
    large = {name: problem[name] * 500 for name in ("query", "key")}
    assert (large["query"].double() @ large["key"].double().mT / 4).abs().max() > 1e6
    assert_parity(problem.with_tensors(**large), "cuda")


@pytest.mark.parametrize("cut", ["32 rows, all keys", "16 rows, two heads a warp", "16 rows, tiles of 64"])
@pytest.mark.parametrize("hidden", [16, 128])
@pytest.mark.parametrize("below", [0, 500])
@modes
def test_rows_that_begin_with_minus_infinity(mode, below, hidden, cut, use_cut):
    """Products overflow to -inf, in the keys that say what the others are compared with as well; these may be so low
    that no exponential is left."""
    problem = make_cuda_problem(mode, seqlen=19, seqlen_k=150, dtype=torch.bfloat16)
    query, key = problem["query"].clone(), problem["key"].clone()
    query[..., 0] = query[..., 0].abs() + 10
    key[:, 1:, :hidden, 0] = -3e38
    query[..., 1], key[..., 1] = 1, -4 * below
    problem = problem.with_tensors(query=query, key=key)
    use_cut(cut)
    assert_parity(problem, "cuda")
    assert not compute(problem, "cuda")["key gradient"][:, 1:, :hidden].any()


def grown(problem, by):
    """The same problem with scores that are larger by that much in every fifth key from 16 on, in odd rows."""
    query, key = problem["query"].clone(), problem["key"].clone()
    query[..., 0], key[..., 0] = 0, 0
    query[:, :, 1::2, 0] = key[:, :, 16::5, 0] = (by * query.shape[-1] ** 0.5) ** 0.5
    return problem.with_tensors(query=query, key=key)


def growing_cases():
    """Every two of a size, a cut and a dtype."""
    cuts = ["32 rows, all keys", "32 rows, tiles of 64", "16 rows, all keys", "16 rows, tiles of 64"]
    every = itertools.product(enumerate([9, 14, 100, 10_000]), enumerate(cuts), enumerate(FLOATS))
    for (number, by), (row, cut), (column, dtype) in every:
        # Taller blocks are for 16-bit elements.
        if (number + row + column) % 2 == 0 and not (dtype == "float32" and CUTS[cut].rows == 32):
            yield pytest.param(dtype, cut, by, id=f"{dtype}-{cut}-{by}")


@pytest.mark.parametrize(("dtype", "cut", "by"), list(growing_cases()))
def test_scores_that_grow(dtype, cut, by, use_cut):
    """The first 16 keys say what the others are compared with: the sum of exponentials leaves what is held of it in
    float16, and in float32, where later scores are larger by far, and is taken again."""
    use_cut(cut)
    mode = list(MODES)[(list(CUTS).index(cut) // 3 + list(FLOATS).index(dtype) + round(math.log10(by))) % len(MODES)]
    problem = make_cuda_problem(mode, seqlen=35, seqlen_k=150, dtype=FLOATS[dtype])
    assert_parity(grown(problem, by), "cuda")


@emulated
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("cut", "sweeps"), [("16 rows, all keys", 1), ("16 rows, tiles of 64", 2)])
def test_scores_that_grow_are_computed_again(cut, sweeps, dtype, use_cut):
    """Once more than they would be else: where it is needed the test above tells nothing of what is not."""

    def exponentials(problem):
        with emulator.executing() as launches:
            cuda.forward(*call_of(problem))
        return sum(times for _, opcode, times in launches[0].report.lines if opcode.startswith("ex2"))

    use_cut(cut)
    problem = make_problem("none", seqlen=35, seqlen_k=150, dtype=FLOATS[dtype])
    once = exponentials(grown(problem, 0))
    # Far from e^9, of which 150 keys add up to 64 times their number at most.
    assert exponentials(grown(problem, 4)) == once
    assert exponentials(grown(problem, 14)) == once * (sweeps + 1) / sweeps


@pytest.mark.parametrize(("factor", "dtype"), [(1e-6, name) for name in FLOATS] + [(1e4, "float32"), (1e4, "bfloat16")])
@modes
def test_theta_of_any_size(mode, factor, dtype):
    """What the maps are multiplied by is brought to what float16 holds."""
    problem = make_cuda_problem(mode, heads=5, seqlen=35, seqlen_k=70, dtype=FLOATS[dtype])
    assert_parity(problem.with_tensors(theta=problem["theta"] * factor), "cuda")


def assert_right(found, expected, allowed=2e-2):
    """Of the size of the largest in its head."""
    size = expected.abs().amax((2, 3), keepdim=True)
    torch.testing.assert_close(found.double() / size, expected / size, rtol=0, atol=allowed)


def outputs_and_gradients(backend, tensors, **options):
    """The output and the gradients of all tensors for a gradient of ones, in float64 of the reference."""
    exact = backend == "reference"
    leaves = {name: (t.double() if exact else t).detach().requires_grad_() for name, t in tensors.items()}
    out = re_attention(**leaves, **options, backend=backend)
    return out.detach(), dict(zip(leaves, torch.autograd.grad(out.sum(), list(leaves.values())), strict=True))


def drawn(dtype, heads, seqlen_k, head_dim=16, seqlen=20):
    """Queries, keys and values, and a generator that drew them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": seqlen, "key": seqlen_k, "value": seqlen_k}
    device = device_of("cuda")
    tensors = {
        name: torch.randn(1, heads, rows, head_dim, generator=generator).to(device, dtype)
        for name, rows in shapes.items()
    }
    return tensors, generator


@pytest.mark.parametrize("cut", ["32 rows, all keys", "16 rows, tiles of 64"])
@pytest.mark.parametrize(("dtype", "factor"), [("bfloat16", 1e5), ("bfloat16", 1e9), ("float32", 1e12)])
def test_scores_beyond_digits(dtype, factor, cut, use_cut):
    """Float32 holds nothing of a score but its first digits: one key is all that there is of a row."""
    use_cut(cut)
    tensors, generator = drawn(FLOATS[dtype], 4, 96)
    tensors["query"] = tensors["query"] * factor
    tensors["theta"] = torch.randn(4, 4, generator=generator).to(tensors["query"].device)
    found, gradients = outputs_and_gradients("cuda", tensors)
    expected, right = outputs_and_gradients("reference", tensors)
    assert_right(found, expected)
    assert_right(gradients["value"], right["value"])
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_columns_that_cancel(use_cut):
    """Sums of scores depend on their order; all kernels have one, or maps would not be those of their sum."""
    tensors, generator = drawn(torch.bfloat16, 2, 96, head_dim=64)
    tensors["query"][..., 0], tensors["query"][..., 16] = 2.0**12, -(2.0**12)
    tensors["key"][..., 0], tensors["key"][..., 16] = 2.0**13, 2.0**13
    tensors["theta"] = torch.randn(2, 2, generator=generator).to(tensors["query"].device)
    found = []
    for cut in ("32 rows, all keys", "16 rows, tiles of 64"):
        use_cut(cut)
        out, gradients = outputs_and_gradients("cuda", tensors)
        # Of the query, in these two columns, it is 2^13 times a sum of what cancels.
        gradients["query"] = gradients["query"][..., 17:]
        found.append({"out": out, **gradients})
        # Rows of maps sum to one whatever rounding makes of the scores.
        weights = {"theta": torch.eye(2, device=out.device), "value": torch.ones_like(tensors["value"])}
        ones = re_attention(**{**tensors, **weights}, backend="cuda")
        torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=2e-2)
    assert_near(found[1], {name: tensor.double() for name, tensor in found[0].items()}, 2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hardly_anything_is_kept(dtype):
    """What is kept is multiplied by a hundred."""
    tensors, generator = drawn(FLOATS[dtype], 32, 20)
    tensors["query"] = tensors["query"] * 30
    tensors["theta"] = torch.full((32, 32), 0.99, device=tensors["query"].device)
    out = re_attention(**tensors, dropout_p=0.99, backend="cuda")
    assert out.isfinite().all() and out.count_nonzero() > 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [0.0, 1e-17])
def test_bias_beside_next_to_no_weights(size, dtype):
    """Layer norm makes of it what it is; the gradients are finite."""
    tensors, generator = drawn(FLOATS[dtype], 12, 20)
    device = tensors["query"].device
    tensors["theta"] = size * torch.randn(12, 12, generator=generator).to(device)
    tensors["bias"] = 8 * torch.tensor([1.0, -1.0] * 6, device=device)
    found, gradients = outputs_and_gradients("cuda", tensors, norm="layer")
    expected, _ = outputs_and_gradients("reference", tensors, norm="layer")
    assert_right(found, expected)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_eps_and_keys_that_do_not_exist(dtype):
    """Where nothing is mixed, the norm would divide by zero."""
    tensors, _ = drawn(FLOATS[dtype], 8, 20)
    tensors["theta"], tensors["norm_weight"] = torch.eye(8), torch.ones(8)
    tensors = {name: tensor.to(device_of("cuda")) for name, tensor in tensors.items()}
    found, gradients = outputs_and_gradients("cuda", tensors, norm="layer", eps=0.0)
    assert found.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["theta", "bias"])
@pytest.mark.parametrize("size", [1e10, math.inf])
def test_one_head_is_beyond_all_others(size, name, dtype):
    """Without a norm over heads it is alone in that."""
    tensors, generator = drawn(FLOATS[dtype], 4, 20)
    device = tensors["query"].device
    tensors["theta"], tensors["bias"] = torch.randn(4, 4, generator=generator), torch.randn(4, generator=generator)
    tensors[name].view(-1)[0] = size
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    found, expected = (
        re_attention(**{n: t.double() if backend == "reference" else t for n, t in tensors.items()}, backend=backend)
        for backend in ("cuda", "reference")
    )
    assert_right(found[:, 1:], expected[:, 1:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_theta_at_the_ends_of_float32(size, dtype):
    tensors, generator = drawn(FLOATS[dtype], 4, 20)
    tensors["theta"] = size * torch.randn(4, 4, generator=generator).to(tensors["query"].device)
    found, gradients = outputs_and_gradients("cuda", tensors)
    expected, right = outputs_and_gradients("reference", tensors)
    assert_right(found, expected)
    assert_right(gradients["value"], right["value"])


def test_grids_are_within_limits():
    """The second number of a grid is at most 65535: samples and heads of a launch, whatever the lengths."""
    for batch, heads, seqlen, seqlen_k in [
        (1, 1, 1, 1 << 23),
        (1 << 20, 32, 1, 1),
        (1 << 20, 1, 16, 16),
        (9, 7, 70, 70),
    ]:
        cut = cuda_plan.cut_backward(Size(2, heads, 128, batch, seqlen, seqlen_k, False), MOST_SHARED, 132)
        assert all(part.samples * heads < 1 << 16 for part in cut.parts)


@pytest.mark.parametrize("cut", ["32 rows, all keys", "16 rows, all keys"])
@modes
def test_rows_of_many_keys(mode, cut, use_cut):
    use_cut(cut)
    assert_parity(make_cuda_problem(mode, seqlen_k=300, dtype=torch.bfloat16), "cuda")


@modes
def test_large_batch_of_single_queries(mode):
    assert_parity(make_cuda_problem(mode, heads=2, head_dim=8, batch=300, seqlen=1, seqlen_k=3), "cuda")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("sequence", ["seqlen_k", "seqlen"])
def test_tails(sequence, dtype):
    """Of 8, 16 and 64 rows: every length up to 70 of the one sequence against a short one of the other."""
    for length in range(1, 71):
        print(f"{sequence} {length}")
        sizes = {"seqlen": 1, "seqlen_k": 2} | {sequence: length}
        assert_parity(make_cuda_problem("none", heads=2, head_dim=8, **sizes, dtype=FLOATS[dtype]), "cuda")


DEEPVIT = {"heads": 12, "head_dim": 64, "seqlen": 197, "batch": 8}


@pytest.mark.gpu
@modes
def test_stream(mode):
    """Inputs that arrive late, on a stream that nothing but the kernels' own place in it makes them wait for."""
    problem = make_cuda_problem(mode, **DEEPVIT, dtype=torch.bfloat16, dropout_p=0.1)
    expected = compute(problem, "cuda")
    blank = {name: torch.full_like(tensor, float("nan")) for name, tensor in problem.tensors.items()}
    late = replace(problem.with_tensors(**blank), grad=torch.full_like(problem.grad, float("nan")))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Some 50 ms, far more than launching what follows takes.
        torch.cuda._sleep(100_000_000)
        for name, tensor in problem.tensors.items():
            late[name].copy_(tensor)
        late.grad.copy_(problem.grad)
        found = compute(late, "cuda")
    torch.cuda.current_stream().wait_stream(stream)
    assert_near(found, expected, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_cuda_graph(mode, dropout_p):
    """Forward and backward, captured once and replayed with other inputs; each replay draws a mask of its own."""
    problem = make_cuda_problem(mode, **DEEPVIT, dtype=torch.float16, dropout_p=dropout_p)
    names = [name for name in problem.tensors if name not in STATISTICS]
    static = {name: tensor.clone() for name, tensor in problem.tensors.items()}
    leaves = [static[name].requires_grad_() for name in names]

    def step():
        output = re_attention(**static, **problem.options, backend="cuda")
        return output, *torch.autograd.grad(output, leaves, problem.grad, materialize_grads=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    other = problem.with_tensors(**{name: 0.7 * problem[name].flip(0) for name in names})
    with torch.no_grad():
        for name in names:
            static[name].copy_(other[name])
    graph.replay()
    first = [result.detach().clone() for result in captured]
    graph.replay()
    assert torch.equal(first[0], captured[0]) == (not dropout_p)
    if not dropout_p:
        expected = compute(other, "cuda")
        found = dict(zip(["output", *(f"{name} gradient" for name in names)], first, strict=True))
        assert_near(found, {name: expected[name] for name in found}, 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@modes
def test_second_gpu(mode):
    """It is used where the tensors are, whichever device is current."""
    problem = make_problem(mode, **DEEPVIT | {"batch": 2}, dtype=torch.float16, device="cuda:1")
    with torch.cuda.device(0):
        assert_parity(problem, "cuda")
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """The first and the last samples of a batch, as in a batch of their own; sums over all of it."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of device memory")
    few, shape = 256, (4, 64, 64)
    batch = 2**31 // (4 * 64 * 64) + few
    generator = torch.Generator("cuda").manual_seed(0)
    everything = torch.randn(batch, *shape, dtype=torch.float16, device="cuda", generator=generator)
    theta = torch.randn(4, 4, device="cuda", generator=generator)

    def results(tensor):
        leaves = [tensor.detach().requires_grad_() for _ in range(3)]
        output = re_attention(*leaves, theta, norm="layer", backend="cuda")
        return output.detach(), *torch.autograd.grad(output, leaves, tensor)

    found = [(result[:few].clone(), result[-few:].clone()) for result in results(everything)]
    for index, part in enumerate((everything[:few], everything[-few:])):
        for result, expected in zip(found, results(part), strict=True):
            torch.testing.assert_close(result[index], expected)
    call = Problem.of(everything, norm="batch", training=True, scale=0.125)
    outputs = cuda.forward(call, Inputs(everything, everything, everything, theta))
    assert all(result.isfinite().all() for result in outputs)
    of_values = everything[-few:].float().sum(2)
    torch.testing.assert_close(outputs.value_sum[-few:], of_values)
    squares = sum(part.double().square().sum((0, 2, 3)) for part in everything.split(4096))
    found = cuda.grad_sums(call, everything, outputs._replace(out=everything))[0]
    torch.testing.assert_close(found, squares, rtol=1e-4, atol=0)
    del everything, found
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("seqlen", [64, 197, 577])
@modes
def test_against_triton(mode, seqlen):
    """At DeepViT's size, where float64 maps of every test would take their time."""
    problem = make_cuda_problem(mode, **DEEPVIT | {"seqlen": seqlen}, dtype=torch.bfloat16)
    expected = compute(problem, "triton")
    # A sum over all keys of what is rounded for each: no more exact in eager arithmetic.
    del expected["bias gradient"]
    assert_near(compute(problem, "cuda"), expected, 0.02)
