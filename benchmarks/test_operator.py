"""``pytest benchmarks/ --benchmark-only``: the operator against its peers, forward and forward + backward.

The fused backends of this machine at sizes of the official models, against the published forms in PyTorch, eager,
compiled and one sample at a time, and plain attention.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from benchmarks import measure, peers
from benchmarks.compare import CUDA, DEVICE, Comparison, compare_operator, label, played_back
from benchmarks.measure import Problem

DIRECTIONS = ("forward", "forward+backward")
PUBLISHED = ("batch", "layer")

pytestmark = played_back

# batch, heads, seqlen, head_dim; large batches for throughput, one sample for latency
CUDA_SHAPES = [
    (128, 12, 197, 32),
    (128, 12, 197, 64),
    (32, 12, 577, 32),
    (1, 12, 197, 32),
    (128, 12, 197, 33),
    (128, 12, 197, 35),
    (8, 12, 197, 32),
]
CPU_SHAPES = [
    (8, 12, 197, 32),
    (8, 12, 197, 64),
    (2, 12, 577, 32),
    (1, 12, 197, 32),
    (64, 12, 197, 32),
    (8, 12, 197, 33),
    (8, 12, 197, 35),
    (8, 6, 197, 64),
]
QUICK_SHAPES = [(2, 4, 50, 33)]


def problems(quick: bool) -> list[Problem]:
    """What says most comes first, should the time run out: every norm at one shape, the published ones at all."""
    if quick:
        return [Problem(*shape, norm, dtype) for shape in QUICK_SHAPES for norm, dtype in _kinds()]
    shapes, usual = (CUDA_SHAPES, torch.bfloat16) if CUDA else (CPU_SHAPES, torch.float32)
    others = (torch.float16, torch.float32) if CUDA else (torch.bfloat16,)
    return [
        *(Problem(*shape, norm, usual) for shape in shapes[:3] for norm in PUBLISHED),
        *(Problem(*shapes[0], norm, dtype) for dtype in others for norm in PUBLISHED),
        *(Problem(*shape, norm, usual) for shape in shapes[3:] for norm in PUBLISHED),
        *(Problem(*shapes[0], norm, usual) for norm in peers.EAGER if norm not in PUBLISHED),
    ]


def _kinds() -> list[tuple[str, torch.dtype]]:
    return [*((norm, torch.float32) for norm in peers.EAGER), ("layer", torch.bfloat16)]


def contenders(problem: Problem, ours: tuple[str, ...], every_peer: bool) -> tuple[str, ...]:
    """Compiling takes ten seconds or more each; one sample at a time is nothing but launches on CUDA: tried once."""
    compiled = every_peer or (problem.norm in PUBLISHED and problem.shape in (*CUDA_SHAPES[:3], CPU_SHAPES[0]))
    one_by_one = () if CUDA and problem.shape != CUDA_SHAPES[-1] else ("one-sample-at-a-time",)
    return (*ours, "eager", *(("compiled",) if compiled else ()), *one_by_one, "sdpa")


@functools.lru_cache(maxsize=1)
def compare(problem: Problem, direction: str, names: tuple[str, ...], device: torch.device, quick: bool) -> Comparison:
    """One at a time is kept: tests of one problem follow each other."""
    seconds, rounds = (0.0, 1) if quick else (0.8, 3)
    return compare_operator(problem, direction, names, device, seconds, rounds)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every problem, direction and contender, those that share a comparison one after the other."""
    config = metafunc.config
    ours = measure.fused_backends(DEVICE)
    cases = []
    for problem, direction in itertools.product(problems(config.getoption("--quick")), DIRECTIONS):
        names = contenders(problem, ours, config.getoption("--every-peer"))
        cases += [
            pytest.param(problem, direction, names, name, id=f"{label(problem, direction)}-{name}") for name in names
        ]
    if not CUDA:
        skip = pytest.mark.skip(reason=f"torch {torch.__version__} sees no CUDA device: nothing is measured on one")
        cases.append(pytest.param(None, None, (), "triton", id="on-a-gpu", marks=skip))
    metafunc.parametrize(("problem", "direction", "names", "contender"), cases)


def test_operator(benchmark, device, quick, problem, direction, names, contender):
    comparison = compare(problem, direction, names, device, quick)
    comparison.report_problem(benchmark, "operator", contender, problem, direction, device)
