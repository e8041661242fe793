"""The CUDA C++ backend: every plan, any order of its blocks, what it refuses, failures, and what only a GPU shows."""

import functools
import math
import os
import random
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from fuzz import FLOATS, mask_of, random_problem
from parity import MODES, STATISTICS, assert_parity, assert_same, compute, device_of, drawn_mask, make_problem

from build_extensions import SHARED_LIMIT
from reattn import re_attention
from reattn.backends import choose, cpu, cuda, triton
from reattn.backends.contract import Inputs
from reattn.problem import Problem

if cuda.EMULATED:
    import emulator.cuda

pytestmark = pytest.mark.cuda
modes = pytest.mark.parametrize("mode", MODES)
emulated = pytest.mark.skipif(not cuda.EMULATED, reason="needs the emulator")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
KERNELS = ("forward", "backward_query", "backward_key")
MOST_SHARED = SHARED_LIMIT[90]


class Cut(NamedTuple):
    """How the first kernels cut a problem; those of the backward pass own 16 rows, and keys' at most 64 rows a tile."""

    rows: int
    tile: int
    stages: int = 2
    on_smallest_card: bool = False


CUTS = {
    "32 rows, all keys": Cut(32, 1 << 20),
    "32 rows, tiles of 64": Cut(32, 64),
    "16 rows, all keys": Cut(16, 1 << 20),
    "16 rows, tiles of 64": Cut(16, 64),
    "16 rows, tiles of 32": Cut(16, 32),
    "16 rows, tiles of 16": Cut(16, 16),
    "one stage": Cut(16, 16, 1),
    "one stage, no gaps": Cut(16, 16, 1, on_smallest_card=True),
}
# Taller blocks are for 16-bit elements.
SIXTEEN_ROWS = [name for name, cut in CUTS.items() if cut.rows == 16]


def make_cuda_problem(mode, **options):
    return make_problem(mode, device=device_of("cuda"), **options)


@functools.cache
def find_plan(kernel, sizes, flags, cut):
    """The plan of that kind that make_plan chooses for a card of some size, the largest if not said otherwise."""
    streamed = sizes[4 if kernel == "backward_key" else 5]
    tile = min(cut.tile, -(-streamed // 16) * 16, 64 if kernel == "backward_key" else 1 << 20)
    rows = cut.rows if kernel == "forward" else 16
    for shared_bytes in range(4096, MOST_SHARED + 1, 256)[:: 1 if cut.on_smallest_card else -1]:
        # Few multiprocessors are occupied by taller blocks too.
        for multiprocessors in (1, 1 << 20):
            plan = cuda._cuda.make_plan(
                getattr(cuda._cuda.Kernel, kernel), sizes, *flags, shared_bytes, multiprocessors
            )
            if plan.bytes and (plan.own, plan.tile, plan.stages) == (rows, tile, cut.stages):
                assert plan.resident == (tile >= streamed)
                return plan
    raise LookupError(f"no card has {cut} for {kernel} of {sizes}")


@pytest.fixture
def use_cut(monkeypatch):
    """Has every launch cut that way; returns the kernels that are launched."""
    if cuda._describe(0)[0] < MOST_SHARED:
        pytest.skip("needs a card with as much shared memory as an H100 has")

    def use(name):
        launched = set()

        def plan_of(kernel, sizes, flags, *card):
            launched.add(kernel)
            return find_plan(kernel, sizes, flags, CUTS[name])

        monkeypatch.setattr(cuda, "_make_plan", plan_of)
        return launched

    return use


@pytest.fixture
def use_card(monkeypatch):
    """The shared memory and multiprocessors that the backend sees."""
    return lambda *card: monkeypatch.setattr(cuda, "_describe", lambda device: card)


@pytest.fixture
def use_launcher():
    """What the extension calls with each launch, in the emulator's place."""
    yield cuda._cuda.set_launcher
    cuda._cuda.set_launcher(emulator.cuda.launch)


def keys_for(cut):
    """Fewer would fit whole where 32 rows have tiles of 64."""
    return 150 if cut == "32 rows, tiles of 64" else 70


def plan_cases():
    """Every plan, with every mode and two dtypes; either with dropout in turn."""
    for index, cut in enumerate(CUTS):
        for turn, mode in enumerate(MODES):
            dtypes = ("float16", "bfloat16") if CUTS[cut].rows == 32 else ("float32", ("float16", "bfloat16")[turn % 2])
            for which, dtype in enumerate(dtypes):
                dropout_p = 0.3 * ((index + turn // 2 + which) % 2)
                name = f"{cut}-{mode}-{dtype}{'-dropout' * bool(dropout_p)}"
                yield pytest.param(cut, mode, FLOATS[dtype], dropout_p, id=name)


@pytest.mark.parametrize(("cut", "mode", "dtype", "dropout_p"), list(plan_cases()))
def test_plans(cut, mode, dtype, dropout_p, use_cut):
    sizes = {"seqlen": 35, "seqlen_k": keys_for(cut)}
    keep = mask_of("cuda", **sizes, head_dim=128) if dropout_p else None
    problem = make_cuda_problem(mode, **sizes, head_dim=33, dtype=dtype, dropout_p=dropout_p)
    launched = use_cut(cut)
    assert_parity(replace(problem, keep=keep), "cuda")
    assert launched == {*KERNELS}


# Heads and head_dim: rows of several pieces, several columns of blocks, three heads to a warp, and hardly anything.
SHAPES = [(1, 3), (3, 128), (12, 64), (13, 33), (13, 80), (32, 35)]


def shape_cases():
    """Every shape with every plan that it may have; modes and dtypes in turn."""
    turn = 0
    for heads, head_dim in SHAPES:
        for cut in CUTS:
            dtype, mode = list(FLOATS)[turn % 3], list(MODES)[turn % 4]
            if CUTS[cut].rows == 32 and (heads > 12 or head_dim > 64):
                continue
            if CUTS[cut].rows == 32 or heads == 32:
                dtype = ("float16", "bfloat16")[turn % 2]
            turn += 1
            yield pytest.param(cut, mode, FLOATS[dtype], heads, head_dim, id=f"{heads}x{head_dim}-{cut}-{mode}-{dtype}")


@pytest.mark.parametrize(("cut", "mode", "dtype", "heads", "head_dim"), list(shape_cases()))
def test_shapes_of_plans(cut, mode, dtype, heads, head_dim, use_cut):
    seqlen_k = 40 if heads == 32 else keys_for(cut)
    sizes = {"heads": heads, "head_dim": head_dim, "seqlen": 19, "seqlen_k": seqlen_k, "batch": 1}
    # The norm over a single head leaves a sign.
    mode = "none" if heads == 1 and mode == "layer" else mode
    use_cut(cut)
    assert_parity(make_cuda_problem(mode, **sizes, dtype=dtype), "cuda")


def assert_near(found, expected, allowed):
    """As far from it, in the Frobenius norm and relative to it."""
    for name in expected:
        # The mixing bias has no gradient where a norm follows: what is left is the rounding of its terms.
        size = expected["theta gradient" if name == "bias gradient" else name].double().norm()
        difference = (found[name].double() - expected[name]).norm()
        assert difference <= allowed * size, f"{name}: {difference / size:.3g}"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_plans_agree(mode, dtype, use_cut):
    """To rounding; dropout included."""
    problem = make_cuda_problem(mode, heads=5, seqlen=35, seqlen_k=150, dtype=FLOATS[dtype], dropout_p=0.2)
    first, *others = SIXTEEN_ROWS if dtype == "float32" else CUTS
    use_cut(first)
    expected = compute(problem, "cuda")
    for cut in others:
        use_cut(cut)
        assert_near(compute(problem, "cuda"), expected, {"float32": 5e-5, "float16": 1e-3}[dtype])


@pytest.mark.extension
@pytest.mark.parametrize("cut", SIXTEEN_ROWS)
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
    "32 rows, all keys": {"heads": 12, "dtype": torch.float16},
    "16 rows, tiles of 32": {"heads": 4, "dtype": torch.float32},
    "16 rows, all keys": {"heads": 14, "dtype": torch.bfloat16, "head_dim": 40},
    "one stage": {"heads": 3, "dtype": torch.float16, "head_dim": 72},
}


@emulated
@pytest.mark.parametrize("cut", ORDERED)
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_order_of_blocks_changes_nothing(mode, cut, use_cut):
    """Bitwise. Within a block any two threads that it could make a difference to are a race, which is an error."""
    problem = make_problem(mode, **ORDERED[cut], seqlen=35, seqlen_k=40, batch=1, dropout_p=0.1)
    use_cut(cut)
    expected = compute(problem, "cuda")
    for reorder in (list.reverse, random.Random(0).shuffle):
        reorder(blocks := list(range(1000)))
        with emulator.executing(blocks=blocks) as launches:
            assert_same(compute(problem, "cuda"), expected)
        assert 1 < max(math.prod(launched.grid) for launched in launches) < 1000


@emulated
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("mode", "heads"), [("batch-training", 5), ("layer", 13)])
def test_compute_capability(mode, heads, dtype, monkeypatch):
    """The kernels for 7.5, without asynchronous copies, without the larger products, without bfloat16."""
    monkeypatch.setattr(emulator.cuda, "arch", 75)
    assert_parity(make_problem(mode, heads=heads, seqlen=19, dtype=FLOATS[dtype]), "cuda")


@emulated
@pytest.mark.parametrize(
    ("heads", "dtype", "mode", "instantiation"),
    [
        (12, torch.float16, "batch-training", "reattn::Half, 16, 2, true"),
        (12, torch.float16, "layer", "reattn::Half, 16, 2, false"),
        (13, torch.bfloat16, "none", "reattn::BFloat16, 32, 1, false"),
        (12, torch.float32, "batch-training", "float, 16, 1, true"),
    ],
)
def test_what_is_launched(heads, dtype, mode, instantiation, use_launcher):
    """The kernels by the names that they are compiled by, with parameters of their size."""
    launches = []
    use_launcher(lambda *launch: launches.append(launch))
    compute(make_problem(mode, heads=heads, batch=8, dtype=dtype), "cuda")
    element, padded, *_ = instantiation.split(", ")
    expected = [("forward", f"forward_kernel<{instantiation}>")]
    if mode == "batch-training":
        expected += [("sums", f"{name}_kernel<{element}>") for name in ("finish", "grad_sums", "add_up")]
    expected += [(f"backward_{of}", f"backward_{of}_kernel<{element}, {padded}>") for of in ("query", "key")]
    expected += [("sums", f"unfold_kernel<{element}>")]
    assert [launch[:2] for launch in launches] == [(source, f"reattn::{name}") for source, name in expected]
    for source, name, grid, threads, shared_bytes, params, memory in launches:
        ((_, offset, size),) = emulator.cuda.compiled(source, name, 80).parameters
        assert (offset, size) == (0, len(params))
        assert min(grid) > 0 and threads % 32 == 0 and shared_bytes > 0
        assert memory and all(address and size > 0 for address, size in memory)


@emulated
def test_what_a_launch_raises(use_launcher):
    """Comes out of the call as it is, and nothing is left for the next one."""
    problem = make_problem("layer")
    expected = compute(problem, "cuda")
    error = KeyError("not that one")

    def fail(*launch):
        raise error

    use_launcher(fail)
    with pytest.raises(KeyError) as raised:
        compute(problem, "cuda")
    assert raised.value is error
    use_launcher(emulator.cuda.launch)
    assert_same(compute(problem, "cuda"), expected)


@pytest.fixture
def forget(monkeypatch):
    """What the backend remembers of devices, before and after the test has changed it."""
    cuda._find_card_faults.cache_clear()
    yield
    monkeypatch.undo()
    cuda._find_card_faults.cache_clear()


def test_every_reason_that_inputs_give():
    problem = Problem(torch.device("meta"), torch.float64, heads=33, head_dim=129, masked=True)
    reasons = [
        "needs a CUDA tensor, got meta",
        "dtype must be float32, float16 or bfloat16, got torch.float64",
        "takes at most 32 heads, got 33",
        "takes head_dim up to 128, got 129",
        "does not take attn_mask or is_causal",
    ]
    assert cuda.not_supported(problem) == reasons
    query = torch.zeros(2, 33, 5, 129, dtype=torch.float64, device=problem.device)
    message = f"backend 'cuda' cannot run this: {'; '.join(reasons)} (query (2, 33, 5, 129), key (2, 33, 5, 129)"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        re_attention(query, query, query, torch.eye(33, device="meta"), is_causal=True, backend="cuda")


def raising(message):
    def fail(*args):
        raise RuntimeError(message)

    return fail


NOT_BUILT = "the CUDA extension cannot be imported (undefined symbol: reattn)"
NO_DRIVER = "no CUDA device: cudaErrorInsufficientDriver (CUDA driver version is insufficient)"
NO_MEMORY = "no CUDA device: cudaErrorMemoryAllocation (out of memory)"
# Whose attribute, what it is instead; what is then said of a tensor on a GPU.
MACHINES = {
    "not built": (cuda, "_import_error", NOT_BUILT, NOT_BUILT),
    "fault": (getattr(cuda, "_cuda", None), "count_devices", raising(NO_MEMORY), NO_MEMORY),
    "no device": (getattr(cuda, "_cuda", None), "count_devices", lambda: 0, "no CUDA device"),
    "AMD": (torch.version, "hip", "6.4", "AMD GPUs are not supported"),
    "Volta": (
        torch.cuda,
        "get_device_capability",
        lambda device: (7, 0),
        "needs compute capability 7.5 or higher, got 7.0",
    ),
    "no kernels": (
        getattr(cuda, "_cuda", None),
        "check_device",
        raising("unfold: cudaErrorNoKernelImageForDevice"),
        "was built without kernels for compute capability 12.0: unfold: cudaErrorNoKernelImageForDevice",
    ),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_machines_that_do_not_run_it(machine, forget, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    *attribute, reason = MACHINES[machine]
    monkeypatch.setattr(*attribute)
    assert cuda.unavailable(GPU) == [reason]
    assert cuda.not_supported(Problem(GPU, torch.float16, 33, 16)) == [reason, "takes at most 32 heads, got 33"]


@pytest.mark.parametrize(
    ("versions", "has"), [((12080, 13000), "the one installed is for CUDA 12.8"), ((0, 13010), "none is installed")]
)
def test_driver_that_is_too_old(versions, has, forget, monkeypatch):
    """Whatever runs instead, the reason says which one the extension needs."""
    monkeypatch.setattr(cuda._cuda, "count_devices", raising(NO_DRIVER))
    monkeypatch.setattr(cuda._cuda, "cuda_versions", lambda: versions, raising=False)
    needs = "no CUDA device: the extension needs an NVIDIA driver for CUDA 13 or newer"
    assert cuda.unavailable(GPU) == [f"{needs}, {has}"]


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

    def record(name, launch):
        return lambda *args: (launched.append((name, list(current))), launch(*args))

    monkeypatch.setattr(torch.cuda, "device", guard)
    for name in ("forward", "add_up", "finish", "grad_sums", "backward_query", "backward_key", "unfold"):
        monkeypatch.setattr(cuda._cuda, name, record(name, getattr(cuda._cuda, name)))
    for name in ("forward", "finish", "grad_sums", "backward"):
        monkeypatch.setattr(cuda, name, on_device(getattr(cuda, name)))
    problem = make_problem(mode)
    compute(problem, "cuda")
    assert {name for name, _ in launched} >= {"forward", "backward_query", "backward_key", "unfold"}
    assert all(devices[:1] == [GPU] for _, devices in launched)
    assert not current


def test_machines_that_run_it(forget, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    for capability in ((7, 5), (9, 0), (12, 1)):
        cuda._find_card_faults.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(cuda._cuda, "check_device", lambda: None)
        assert cuda.not_supported(Problem(GPU, torch.bfloat16, 32, 128)) == []


def test_cpu_tensors_are_for_tests_alone(monkeypatch):
    monkeypatch.setattr(cuda, "EMULATED", False)
    assert "needs a CUDA tensor, got cpu" in cuda.unavailable(CPU)


@pytest.mark.parametrize(
    ("shared_bytes", "heads", "head_dim", "dtype"),
    [(65536, 32, 128, torch.float32), (65536, 32, 64, torch.float16), (16384, 12, 64, torch.bfloat16)],
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


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_plans_fit_at_any_length(kernel, itemsize):
    """Nothing overflows where all keys would take more bytes than an int counts."""
    for heads in (1, 12, 13, 32):
        for length in (1, 1 << 12, 1 << 20, 1 << 26):
            for shared_bytes in (65536, MOST_SHARED):
                sizes = (itemsize, heads, 128, 1, length, length)
                plan = cuda._cuda.make_plan(getattr(cuda._cuda.Kernel, kernel), sizes, True, True, shared_bytes, 1)
                assert 0 <= plan.bytes <= shared_bytes, (heads, length)
                assert plan.blocks == -(-length // plan.own) if plan.bytes else shared_bytes < MOST_SHARED


@emulated
def test_auto_prefers_triton_and_then_cuda(monkeypatch):
    monkeypatch.delenv("REATTN_BACKEND", raising=False)
    problem = Problem(CPU, torch.float32, 12, 64)
    preferred = ["triton", "cuda", *["cpu"] * (not cpu._import_error), "reference"]
    for expected, refusing in zip(preferred, (triton, cuda, cpu), strict=False):
        assert choose("auto", problem, "") == expected
        monkeypatch.setattr(refusing, "not_supported", lambda problem: ["not today"])


def test_failed_launch(use_card, monkeypatch):
    """It raises, and leaves nothing behind for the next call to find."""
    problem = make_cuda_problem("layer", heads=12, seqlen_k=400)
    expected = compute(problem, "cuda")
    use_card(1 << 22, 1)
    with pytest.raises(RuntimeError, match="^forward: cudaErrorInvalidValue"):
        compute(problem, "cuda")
    monkeypatch.undo()
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


@pytest.mark.parametrize("cut", ["32 rows, all keys", "16 rows, all keys", "16 rows, tiles of 64"])
@pytest.mark.parametrize("hidden", [64, 70, 128])
@modes
def test_rows_that_begin_with_minus_infinity(mode, hidden, cut, use_cut):
    """Products overflow to -inf as long as nothing finite has been seen; the maxima of every 64 keys are noted."""
    problem = make_cuda_problem(mode, seqlen=19, seqlen_k=150, dtype=torch.bfloat16)
    query, key = problem["query"].clone(), problem["key"].clone()
    query[..., 0] = query[..., 0].abs() + 10
    key[:, 1:, :hidden, 0] = -3e38
    problem = problem.with_tensors(query=query, key=key)
    use_cut(cut)
    assert_parity(problem, "cuda")
    assert not compute(problem, "cuda")["key gradient"][:, 1:, :hidden].any()


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


def built_extension():
    return next((Path(cuda.__file__).parents[1]).glob("_cuda.*so"), None)


@pytest.mark.skipif(built_extension() is None, reason="needs the CUDA extension")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_import_without_a_driver():
    """A fresh interpreter has the extension in reattn/, which finds no device and says so."""
    script = (
        "import torch\n"
        "from reattn.backends import cuda\n"
        "assert not cuda.EMULATED\n"
        "print(*cuda.unavailable(torch.device('cuda')), sep='; ')\n"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    needs = r": the extension needs an NVIDIA driver for CUDA \d+ or newer, none is installed"
    assert re.fullmatch(rf"no CUDA device({needs}|: cudaError\w+ \(.*\))?", finished.stdout.strip())


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
