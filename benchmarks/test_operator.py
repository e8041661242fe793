"""``pytest benchmarks/ --benchmark-only``: the operator against its peers, forward and forward + backward.

The fused backend of this machine, triton on CUDA, else the native CPU backend, at sizes of the official models.
Contenders are validated and then timed side by side: from this come the ratios to plain attention and to the best peer,
the GFLOP/s, and on a CPU their share of what a matrix product reaches, in ``extra_info``. On a CPU only these ratios
mean anything: the times beside them were not taken in turns. ``--every-peer`` compiles the eager forms for every
problem, not only for the first: ten seconds or more each.
"""

from __future__ import annotations

import functools
import itertools
import time
from typing import Any

import pytest
import torch

from benchmarks import measure, peers
from benchmarks.measure import Call, Oracle, Problem

CUDA = torch.cuda.is_available()
OURS = "triton" if CUDA else "cpu"
DIRECTIONS = ("forward", "forward+backward")
PUBLISHED = ("batch", "layer")
# batch, heads, seqlen, head_dim
CPU_SHAPES = [
    (8, 12, 197, 32),
    (8, 12, 197, 64),
    (2, 12, 577, 32),
    (64, 12, 197, 32),
    (1, 12, 197, 32),
    (8, 6, 197, 64),
    (8, 12, 197, 33),
]


def problems() -> list[Problem]:
    """Every norm in the usual dtype, the published ones in the others."""
    norms = tuple(peers.EAGER)
    shapes = [(128, 12, 197, 32), (128, 12, 197, 64), (128, 12, 197, 33), (32, 12, 577, 32)]
    if CUDA:
        usual = [Problem(*shape, norm, torch.bfloat16) for shape in shapes for norm in norms]
        others = (torch.float16, torch.float32)
        return usual + [Problem(*shapes[0], norm, dtype) for norm in PUBLISHED for dtype in others]
    single = [Problem(*shape, norm, torch.float32) for shape in CPU_SHAPES[1:] for norm in PUBLISHED]
    half = [Problem(*shape, norm, torch.bfloat16) for shape in CPU_SHAPES if shape[0] <= 8 for norm in PUBLISHED]
    return [Problem(*CPU_SHAPES[0], norm, torch.float32) for norm in norms] + single + half


def contenders(problem: Problem, every_peer: bool) -> tuple[str, ...]:
    """On CUDA one sample at a time would be nothing but launches; on a CPU compiling takes ten seconds or more each."""
    if CUDA:
        return (OURS, "eager", "compiled", "sdpa")
    compiled = every_peer or (problem.norm in PUBLISHED and problem.shape == CPU_SHAPES[0])
    return (OURS, "eager", *(("compiled",) if compiled else ()), "one-sample-at-a-time", "sdpa")


def label(problem: Problem, direction: str) -> str:
    shape = f"{problem.batch}x{problem.heads}x{problem.seqlen}x{problem.head_dim}"
    return f"{shape}-{problem.norm}-{str(problem.dtype).removeprefix('torch.')}-{direction}"


@functools.lru_cache(maxsize=1)
def validated(
    problem: Problem, names: tuple[str, ...], device: torch.device
) -> tuple[dict[str, peers.Peer], dict[str, str]]:
    """The contenders whose results are right, and by name what is the matter with the others."""
    backend = measure.default_backend(device)
    oracle = Oracle(problem, device, distinct=4 if CUDA else problem.batch)
    right, faults = {}, {}
    for name in names:
        ours = name == OURS
        contender = measure.operator(problem.norm, backend) if ours else peers.by_name(name, problem.norm)
        # Plain attention computes something else on purpose.
        if name != "sdpa":
            _, status = measure.attempt(functools.partial(oracle.check, name, contender, ours=ours))
            if status != "ok":
                faults[name] = status
                continue
        right[name] = contender
    return right, faults


class Comparison:
    """Every contender timed in one direction, side by side."""

    def __init__(self, problem: Problem, direction: str, names: tuple[str, ...], device: torch.device) -> None:
        self.problem, self.direction = problem, direction
        self.backward = direction != "forward"
        right, faults = validated(problem, names, device)
        self.faults = dict(faults)
        inputs = [
            measure.make_inputs(problem, device, seed) for seed in range(1, 1 + measure.rotations(problem, device))
        ]
        parameters = measure.make_parameters(problem, device)
        self.calls: dict[str, list[Call]] = {
            name: [measure.make_call(contender, each, parameters, self.backward) for each in inputs]
            for name, contender in right.items()
        }
        self.ms: dict[str, float] = {}
        self.peak_bytes: dict[str, int | None] = {}
        if not CUDA:
            self.ms = measure.time_interleaved({name: calls[0] for name, calls in self.calls.items()}, seconds=0.5)
            return
        for name, calls in self.calls.items():
            ms, status = measure.attempt(functools.partial(measure.time_cuda, calls))
            if ms is None:
                self.faults[name] = status
            else:
                self.ms[name], self.peak_bytes[name] = ms, measure.peak_memory(calls[0], device)

    def facts(self, name: str) -> dict[str, Any]:
        """What the results say of a contender beside its time."""
        problem, ms = self.problem, self.ms[name]
        rivals = {other: self.ms[other] for other in self.ms if other not in (OURS, "sdpa")}
        best = min(rivals, key=rivals.__getitem__, default=None)
        return {
            "batch": problem.batch,
            "heads": problem.heads,
            "seqlen": problem.seqlen,
            "head_dim": problem.head_dim,
            "norm": problem.norm,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "direction": self.direction,
            "backend": name,
            "ms": ms,
            "all_ms": self.ms,
            "faults": self.faults,
            "peak_bytes": self.peak_bytes.get(name),
            "tflops": problem.flops(self.backward) / ms / 1e9,
            "ratio_to_sdpa": ms / self.ms["sdpa"] if "sdpa" in self.ms else None,
            "best_peer": best,
            "ratio_to_best_peer": ms / rivals[best] if best else None,
            "share_of_matmul": None if CUDA else problem.flops(self.backward) / (1e-3 * ms) / matmul_rate(),
        }


# One at a time is kept: its inputs take memory, and tests of one problem follow each other.
compare = functools.lru_cache(maxsize=1)(Comparison)


@functools.cache
def matmul_rate() -> float:
    return measure.cpu_flops_per_s(torch.get_num_threads())


def synchronised_clock() -> float:
    """Of two readings the difference holds all work that was launched between them."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every problem, direction and contender, those that share a comparison one after the other."""
    cases = []
    for problem, direction in itertools.product(problems(), DIRECTIONS):
        names = contenders(problem, metafunc.config.getoption("--every-peer"))
        cases += [
            pytest.param(problem, direction, names, name, id=f"{label(problem, direction)}-{name}") for name in names
        ]
    metafunc.parametrize(("problem", "direction", "names", "contender"), cases)


@pytest.mark.benchmark(timer=synchronised_clock)
def test_operator(benchmark, device, problem, direction, names, contender):
    comparison = compare(problem, direction, names, device)
    if contender in comparison.faults:
        give_up = pytest.fail if contender == OURS else pytest.skip
        give_up(comparison.faults[contender])
    benchmark.group = label(problem, direction)
    benchmark.extra_info.update(comparison.facts(contender))
    ms = comparison.ms[contender]
    rotation = itertools.cycle(comparison.calls[contender])
    # Rounds of about 20 ms on a GPU; on a CPU 0.2 seconds in all.
    iterations = min(max(1, round(20 / ms)), 1000) if CUDA else 1
    rounds = 10 if CUDA else min(max(3, round(200 / ms)), 50)
    benchmark.pedantic(lambda: next(rotation)(), rounds=rounds, iterations=iterations, warmup_rounds=1)
