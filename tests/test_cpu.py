"""The CPU backend: instruction sets, threads, long rows, layouts, conversions, processes and memory."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch
from fuzz import FLOATS, random_problem, with_mask
from parity import MODES, assert_parity, assert_same, compute, drawn_mask, make_problem

from reattn import re_attention
from reattn.backends import choose, cpu
from reattn.backends.contract import Inputs
from reattn.problem import Problem

pytestmark = pytest.mark.extension
modes = pytest.mark.parametrize("mode", MODES)
dtypes = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
REQUEST = Problem(torch.device("cpu"), torch.float32, 3, 16)


def usable_instruction_sets():
    return [name for name, runs, _ in cpu._cpu.instruction_sets() if runs]


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request, monkeypatch):
    """Each instruction set in turn, where it was built and this machine runs it."""
    if request.param not in usable_instruction_sets():
        pytest.skip(f"{request.param} was not built or does not run here")
    monkeypatch.setenv("REATTN_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def use_threads():
    """Sets the number of torch's threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Whole vectors, ragged ones, less than one.
SHAPES = {
    "whole": {"heads": 12, "head_dim": 64, "seqlen": 48, "seqlen_k": 96, "batch": 1},
    "ragged": {"heads": 7, "head_dim": 33, "seqlen": 35, "seqlen_k": 101, "batch": 2},
    "tiny": {"heads": 2, "head_dim": 3, "seqlen": 7, "seqlen_k": 3, "batch": 3},
}


@pytest.mark.parametrize("shape", SHAPES)
@dtypes
@modes
def test_instruction_sets(mode, dtype, shape, isa):
    assert_parity(make_problem(mode, **SHAPES[shape], dtype=dtype), "cpu")


def test_instruction_sets_draw_the_same_mask(isa, monkeypatch):
    sizes = {"heads": 5, "seqlen": 20, "seqlen_k": 150, "head_dim": 128}
    found = drawn_mask("cpu", **sizes)
    monkeypatch.setenv("REATTN_CPU_ISA", "portable")
    assert torch.equal(found, drawn_mask("cpu", **sizes))


def test_best_instruction_set_is_the_default(monkeypatch):
    monkeypatch.delenv("REATTN_CPU_ISA", raising=False)
    paying = [name for name, runs, pays in cpu._cpu.instruction_sets() if runs and pays]
    assert cpu.instruction_set() == paying[-1]
    monkeypatch.setenv("REATTN_CPU_ISA", "portable")
    assert cpu.instruction_set() == "portable"


def test_instruction_set_that_does_not_pay_is_taken_when_named(monkeypatch):
    """As dot products of bfloat16 pairs on Intel's CPUs, which take longer than float32's."""
    monkeypatch.setattr(cpu, "INSTRUCTION_SETS", [("plain", True, True), ("dots", True, False), ("tiles", False, True)])
    cpu._find_isa.cache_clear()
    try:
        assert cpu._find_isa(None) == 0 and cpu._find_isa("dots") == 1
        with pytest.raises(
            ValueError, match=re.escape("must be one of ['plain', 'dots'] on this machine, got 'tiles'")
        ):
            cpu._find_isa("tiles")
    finally:
        cpu._find_isa.cache_clear()


def test_instruction_set_that_is_not_there(monkeypatch):
    monkeypatch.setenv("REATTN_CPU_ISA", "mmx")
    monkeypatch.delenv("REATTN_BACKEND", raising=False)
    reason = f"REATTN_CPU_ISA must be one of {usable_instruction_sets()} on this machine, got 'mmx'"
    assert cpu.not_supported(REQUEST) == [reason]
    problem = make_problem()
    with pytest.raises(RuntimeError, match=re.escape(f"backend 'cpu' cannot run this: {reason} (query (2, 3, 17, 16)")):
        re_attention(**problem.tensors, **problem.options, backend="cpu")
    monkeypatch.setattr("reattn.backends.triton.EMULATED", False)
    monkeypatch.setattr("reattn.backends.cuda.EMULATED", False)
    assert choose("auto", REQUEST, "") == "reference"


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got torch.float64"),
        ({"heads": 33}, "takes at most 32 heads, got 33"),
        ({"head_dim": 129}, "takes head_dim up to 128, got 129"),
    ],
    ids=["float64", "33 heads", "head_dim 129"],
)
def test_what_it_does_not_take(sizes, reason):
    problem = make_problem(**sizes)
    with pytest.raises(RuntimeError, match=re.escape(f"backend 'cpu' cannot run this: {reason} (query (2, ")):
        re_attention(**problem.tensors, **problem.options, backend="cpu")


# Samples by one thread each, by groups of blocks, block by block, and so in several rounds: see make_plan in
# csrc/cpu/driver.cpp.
THREADS = (2, 3, 5, 7, 7, 16, 1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_threads_change_nothing(mode, dropout_p, batch, use_threads):
    """Bitwise: outputs, gradients and running statistics of many blocks, by any number of threads, and again."""
    problem = make_problem(mode, heads=6, seqlen=300, seqlen_k=50, batch=batch, dropout_p=dropout_p)
    use_threads(1)
    expected = compute(problem, "cpu")
    for number in THREADS:
        use_threads(number)
        assert_same(compute(problem, "cpu"), expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_threads_change_nothing_in_two_sweeps(mode, is_causal, use_threads, short_rows):
    problem = make_problem(mode, heads=6, seqlen=300, seqlen_k=800, batch=2, is_causal=is_causal)
    use_threads(1)
    expected = compute(problem, "cpu")
    for number in THREADS:
        use_threads(number)
        assert_same(compute(problem, "cpu"), expected)


@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_every_number_of_heads(mode, isa):
    """As many as registers hold, in which they are mixed, and more."""
    for heads in (*range(2, 20), 32):
        assert_parity(make_problem(mode, heads=heads, batch=1, seqlen=5, seqlen_k=35), "cpu")


@pytest.mark.parametrize("seqlen_k", [1, 2, 3, 17, 100, 197, 3000])
def test_lse(seqlen_k, isa):
    """Of scores that are all alike it is their number's logarithm, whose rounding is all that it may differ by."""
    maps = torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, seqlen_k, 8), torch.zeros(1, 3, seqlen_k, 8)
    lse = torch.ops.reattn.forward(*Inputs(*maps, torch.eye(3)), backend="cpu", scale=1.0)[1]
    torch.testing.assert_close(lse.double(), torch.full_like(lse, seqlen_k).double().log2(), rtol=2e-7, atol=0)


@pytest.fixture
def short_rows():
    """Rows of all keys never fit into a cache: they are cut into stretches, in two sweeps."""
    usual = cpu._cpu.set_whole_bytes(0)
    yield
    cpu._cpu.set_whole_bytes(usual)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@modes
def test_long_rows(mode, dropout_p, isa, short_rows):
    sizes = {"heads": 12, "seqlen": 9, "seqlen_k": 900, "batch": 1}
    problem = make_problem(mode, **sizes, head_dim=8, dropout_p=dropout_p)
    assert_parity(with_mask(problem, "cpu", **sizes), "cpu")


@pytest.mark.parametrize("dropout_p", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_several_waves(mode, dropout_p):
    """Keys and values are packed for a part of the batch at a time: three samples forward, one backward."""
    sizes = {"heads": 32, "seqlen": 5, "seqlen_k": 160, "batch": 5}
    problem = make_problem(mode, **sizes, head_dim=128, dropout_p=dropout_p)
    assert_parity(with_mask(problem, "cpu", **sizes), "cpu")


@modes
def test_negative_scale(mode, isa):
    """Bitwise what it is for the opposite of the query; the largest score is that of the smallest product."""
    problem = make_problem(mode, seqlen_k=35, scale=-0.25)
    large = problem.with_tensors(query=problem["query"] * 8, key=problem["key"] * 8)
    found = compute(large, "cpu")
    expected = compute(large.with_tensors(query=-large["query"]).with_options(scale=0.25), "cpu")
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert_same(found, expected | {"query gradient": -expected["query gradient"]})


def masked(problem, shape, is_causal=False, added=True):
    """With a mask of that shape, of which a third hides, and all of its end."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.rand(shape, generator=generator) < 0.3
    hidden[..., 0] = False
    if shape[3] > 1:
        hidden[..., -shape[3] // 5 :] = True
    mask = torch.randn(shape, generator=generator).to(problem.grad.dtype).masked_fill(hidden, -torch.inf)
    return problem.with_tensors(attn_mask=mask if added else ~hidden).with_options(is_causal=is_causal)


@pytest.mark.parametrize("shape", SHAPES)
@dtypes
@modes
def test_masks_of_instruction_sets(mode, dtype, shape, isa):
    sizes = SHAPES[shape]
    batch, heads, seqlen, seqlen_k = (sizes[name] for name in ("batch", "heads", "seqlen", "seqlen_k"))
    problem = make_problem(mode, **sizes, dtype=dtype)
    for of, added in (((batch, 1, 1, seqlen_k), False), ((1, heads, seqlen, seqlen_k), True)):
        assert_parity(masked(problem, of, added=added, is_causal=added), "cpu")


# Of a mask that samples or queries share, parts and groups sum the gradient on their own: see make_plan.
@pytest.mark.parametrize("shape", [(3, 6, 300, 150), (1, 6, 300, 150), (1, 6, 1, 150), (3, 1, 1, 150), (1, 1, 300, 1)])
@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_threads_change_nothing_with_a_mask(mode, shape, use_threads):
    problem = make_problem(mode, heads=6, seqlen=300, seqlen_k=150, batch=3)
    problem = masked(problem, shape, is_causal=shape[2] == 1)
    use_threads(1)
    expected = compute(problem, "cpu")
    for number in THREADS:
        use_threads(number)
        assert_same(compute(problem, "cpu"), expected)
    assert_parity(problem, "cpu")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 900), (1, 12, 9, 900), (1, 1, 9, 1)])
@modes
def test_masks_of_long_rows(mode, shape, is_causal, short_rows):
    problem = make_problem(mode, heads=12, seqlen=9, seqlen_k=900, batch=1, head_dim=8)
    assert_parity(masked(problem, shape, is_causal), "cpu")


@pytest.mark.parametrize("is_causal", [False, True])
def test_masks_that_are_expanded(is_causal):
    """One row for all queries, whose gradient has rows all the same."""
    problem = masked(make_problem("batch-training"), (2, 1, 1, 17), is_causal)
    mask = problem["attn_mask"].expand(2, 3, 17, 17)
    assert_parity(problem.with_tensors(attn_mask=mask), "cpu")


def test_masks_of_several_waves():
    problem = make_problem("layer", heads=32, seqlen=5, seqlen_k=160, batch=5, head_dim=128)
    assert_parity(masked(problem, (1, 32, 5, 160)), "cpu")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@dtypes
@modes
def test_hidden_values_that_are_not_finite(mode, dtype, number, isa):
    """A value alone, of one head: what sees it is NaN, all else is as it was."""
    problem = masked(make_problem(mode, dtype=dtype), (2, 3, 17, 17), added=False)
    clean = compute(problem, "cpu")
    value = problem["value"].clone()
    value[1, 2, 5, 3] = number
    found = compute(problem.with_tensors(value=value), "cpu")
    sees = torch.zeros(2, 3, 17, dtype=torch.bool)
    sees[1, 2] = problem["attn_mask"][1, 2, :, 5]
    assert found["output"][sees].isnan().all() and sees.any()
    assert torch.equal(found["output"][~sees], clean["output"][~sees])


@pytest.mark.parametrize("pre_mixed", [False, True])
@pytest.mark.parametrize("mode", ["none", "layer", "batch-training"])
def test_hidden_keys_get_no_gradient_from_rows_that_are_not_finite(mode, pre_mixed, isa):
    """A key that is NaN and seen by one query: keys that this one does not see have the gradients of the others."""
    problem = make_problem(mode, heads=3, seqlen=3, seqlen_k=6, batch=1)
    mask = torch.zeros(1, 1, 3, 6)
    mask[..., 4] = mask[..., 0, 5] = mask[..., 1:, 2] = -torch.inf
    key = problem["key"].clone()
    key[0, 0, 2, 0] = torch.nan
    problem = problem.with_tensors(attn_mask=mask, key=key)
    if pre_mixed:
        problem = problem.with_tensors(pre_theta=torch.eye(3) + 0.1)
    found = compute(problem, "cpu")
    # Statistics of the batch take NaN to every key that is seen.
    seen = [] if mode == "batch-training" else [5]
    assert found["output"][0, :, 0].isnan().all()
    for name in ("key gradient", "value gradient"):
        assert not found[name][0, :, [4, *seen]].isnan().any()
    assert not found["attn_mask gradient"][mask == -torch.inf].isnan().any()


def test_scores_that_overflow_are_not_hidden():
    """A query all of whose scores are -infinity is NaN, as without a mask; it is not one that sees nothing."""
    query, key = torch.full((1, 1, 2, 4), -1e30), torch.full((1, 1, 2, 4), 1e30)
    out = re_attention(query, key, key, torch.eye(1), is_causal=True, backend="cpu")
    assert out.isnan().all()


def seeds(number, quick):
    """As many, those after the first few slow; REATTN_FUZZ is another number."""
    number = int(os.environ.get("REATTN_FUZZ", number))
    return [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= quick)) for seed in range(number)]


@pytest.mark.parametrize("seed", seeds(60, quick=20))
def test_random_problems(seed, monkeypatch):
    draw = random.Random(seed)
    settings = {"isa": draw.choice(usable_instruction_sets()), "threads": draw.randint(1, 3)}
    monkeypatch.setenv("REATTN_CPU_ISA", settings["isa"])
    # As the backend sees it: the reference takes longer on threads that share a core.
    monkeypatch.setattr(torch, "get_num_threads", lambda: settings["threads"])
    problem, made_of = random_problem(draw, "cpu")
    print(f"seed {seed}: {settings | made_of}")
    assert_parity(problem, "cpu")


@pytest.mark.parametrize("mode", ["batch-training", "layer"])
def test_offsets_beyond_two_to_the_31(mode):
    """Heads 2**30 elements apart; of the memory between them nothing is ever touched."""
    problem = make_problem(mode, dtype=torch.float16)
    try:
        storage = torch.empty(2 * 2**30 + 2 * 17 * 16, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("this machine does not have the 4 GB of address space")
    far_apart = storage.as_strided((2, 3, 17, 16), (17 * 16, 2**30, 16, 1))
    far_apart.copy_(problem["key"])
    assert_same(compute(problem.with_tensors(key=far_apart), "cpu"), compute(problem, "cpu"))


@pytest.mark.parametrize("head_dim", [128, 3])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_conversions(dtype, strided, head_dim, isa):
    """One head and one key: theta times the value, and theta times the gradient, of every number that there is.

    The products are exact in float32 as long as they are normal. Many lie halfway between two numbers, below the normal
    ones, or above the largest. Products of bfloat16 take what is below the normal ones for zero, operands and results.
    """

    def flushed(tensor):
        flushes = dtype == torch.bfloat16 and isa in ("avx512_bf16", "amx")
        return tensor.masked_fill(tensor.abs() < torch.finfo(dtype).tiny, 0) if flushes else tensor

    numbers = torch.arange(2**16).to(torch.uint16).view(dtype)
    value = numbers[: len(numbers) // head_dim * head_dim].view(-1, 1, 1, head_dim)
    grad = value.flip(0)
    if strided:
        value, grad = (tensor.repeat_interleave(2, 3)[..., ::2] for tensor in (value, grad))
    zeros = torch.zeros_like(value)
    for factor in (1.0, 1.5, -0.75, 1.5 * 2**-12, 1.25 * 2**-20):
        expected, expected_grad = (flushed(flushed(tensor.float()) * factor).to(dtype) for tensor in (value, grad))
        leaf = value.detach().requires_grad_()
        found = re_attention(zeros, zeros, leaf, torch.tensor([[factor]]), backend="cpu")
        found.backward(grad)
        for result, right in ((found.detach(), expected), (leaf.grad, expected_grad)):
            torch.testing.assert_close(result, right, rtol=0, atol=0, equal_nan=True)


def test_many_python_threads(use_threads):
    """Each on problems of its own, all at once, as serial calls compute them."""
    use_threads(3)
    problems = [make_problem(mode, heads=4 + index, seqlen=60) for index, mode in enumerate([*MODES, *MODES])]
    expected = [compute(problem, "cpu") for problem in problems]
    found = [[] for _ in problems]
    together = threading.Barrier(len(problems))

    def work(index):
        together.wait(timeout=60)
        found[index] = [compute(problems[index], "cpu") for _ in range(10)]

    workers = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    for results, right in zip(found, expected, strict=True):
        assert len(results) == 10
        for result in results:
            assert_same(result, right)


def test_gil_is_released(use_threads, monkeypatch):
    """Another Python thread gets its turn several times within one call of the extension."""
    use_threads(1)
    calls, turns, done = {}, [], threading.Event()

    def timed(name, function):
        def call(*args):
            start = time.perf_counter()
            function(*args)
            calls[name] = start, time.perf_counter()

        return call

    def take_turns():
        while not done.wait(0.001):
            turns.append(time.perf_counter())

    for name in ("forward", "backward"):
        monkeypatch.setattr(cpu._cpu, name, timed(name, getattr(cpu._cpu, name)))
    other = threading.Thread(target=take_turns)
    other.start()
    compute(make_problem("batch-training", heads=12, head_dim=32, seqlen=700), "cpu")
    done.set()
    other.join()
    for name in ("forward", "backward"):
        start, end = calls[name]
        assert sum(start < turn < end for turn in turns) >= 3, name


def run_script(script, timeout=120):
    """What a fresh interpreter prints; it and its children are killed if they take too long."""
    if "REATTN_CPU_FOLDER" in os.environ:
        pytest.skip("a fresh interpreter loads the extension in reattn/")
    command = [sys.executable, "-c", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, start_new_session=True) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    return output


# Few enough elements for torch's own operators to stay on one thread: after a fork theirs would wait forever.
FORK = """
import multiprocessing, sys
import torch
from reattn import re_attention

torch.set_num_threads(4)
torch.manual_seed(0)
tensors = torch.randn(4, 2, 6, 100, 8)
theta = torch.randn(6, 6)

def results():
    query, key, value, grad = (tensor.detach().requires_grad_() for tensor in tensors)
    output = re_attention(query, key, value, theta, norm="layer", backend="cpu")
    output.backward(grad)
    return output.detach(), query.grad, key.grad, value.grad
"""
AFTER = {
    "the backend": "results()",
    "torch's threads": "torch.ones(1 << 20).exp()",
}


@pytest.mark.parametrize("after", AFTER)
def test_forked_process(after):
    script = f"""{FORK}
def child(pipe):
    pipe.send([tensor.tolist() for tensor in results()])

{AFTER[after]}
context = multiprocessing.get_context("fork")
ours, theirs = context.Pipe()
process = context.Process(target=child, args=(theirs,), daemon=True)
process.start()
assert ours.poll(60), "the child does not answer"
found = ours.recv()
process.join()
assert all(torch.equal(torch.tensor(one), other) for one, other in zip(found, results()))
"""
    run_script(script)


def test_workers_of_a_loader():
    script = f"""{FORK}
class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.stack(results()) * index

expected = torch.stack(results())
loader = torch.utils.data.DataLoader(Samples(), num_workers=2, timeout=60, multiprocessing_context="fork")
found = list(loader)
assert len(found) == 4
assert all(torch.equal(one[0], expected * index) for index, one in enumerate(found))
"""
    run_script(script)


MEMORY = """
import json, pathlib, time
import torch
from reattn import re_attention

def peak():
    # In megabytes. getrusage would begin with the peak of the process that started this one.
    (line,) = [line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**10

torch.set_num_threads(2)
imported = peak()
projection = torch.randn(1, 8192, 3, 12, 64, requires_grad=True)
query, key, value = projection.permute(2, 0, 3, 1, 4)
theta, gamma, beta = torch.eye(12, requires_grad=True), torch.ones(12), torch.zeros(12)
start = time.perf_counter()
output = re_attention(query, key, value, theta, norm="layer", norm_weight=gamma, norm_bias=beta, backend="cpu")
output.square().sum().backward()
assert projection.grad.isfinite().all() and theta.grad.any()
print(json.dumps({"imported": imported, "peak": peak(), "seconds": time.perf_counter() - start}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_peak_memory():
    """8192 tokens, forward and backward: a single map of one head takes 256 MB, those of all heads 3 GB.

    Beyond what importing takes, which builds of torch differ in. Inputs, results, what autograd holds of them and
    packed operands take 540 MB.
    """
    measured = json.loads(run_script(MEMORY, timeout=400))
    print(measured)
    assert measured["peak"] - measured["imported"] < 650
