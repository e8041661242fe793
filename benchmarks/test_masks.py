"""``pytest benchmarks/ --benchmark-only``: what masks cost.

The fused backends of this machine with a mask, beside the same call without one, plain attention with the same mask,
and the published forms in eager PyTorch.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from benchmarks import measure
from benchmarks.compare import CUDA, DEVICE, UNMASKED, Comparison, compare_operator, label, played_back
from benchmarks.measure import Problem

DIRECTIONS = ("forward", "forward+backward")
NORMS = ("batch", "layer", "none")
DTYPE = torch.bfloat16 if CUDA else torch.float32
# batch, heads, seqlen, head_dim
SHAPES = dict.fromkeys(measure.MASKS, (128 if CUDA else 8, 12, 197, 32))
SHAPES["causal"] = (32, 12, 1024, 32) if CUDA else (1, 3, 1024, 64)
QUICK_SHAPE = (2, 4, 50, 8)

pytestmark = played_back


def problems(quick: bool) -> list[Problem]:
    """Those of a shape and norm one after the other: they share the call without a mask."""
    return [
        Problem(*(QUICK_SHAPE if quick else shape), norm, DTYPE, mask)
        for norm, (mask, shape) in itertools.product(NORMS, SHAPES.items())
    ]


@functools.lru_cache(maxsize=1)
def compare(problem: Problem, direction: str, names: tuple[str, ...], device: torch.device, quick: bool) -> Comparison:
    seconds, rounds = (0.0, 1) if quick else (0.3, 3)
    return compare_operator(problem, direction, names, device, seconds, rounds)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    ours = measure.fused_backends(DEVICE)
    names = (*itertools.chain(*((name, name + UNMASKED) for name in ours)), "eager", "sdpa")
    cases = [
        pytest.param(problem, direction, names, name, id=f"{label(problem, direction)}-{name}")
        for problem in problems(metafunc.config.getoption("--quick"))
        for direction, name in itertools.product(DIRECTIONS, names)
    ]
    metafunc.parametrize(("problem", "direction", "names", "contender"), cases)


def test_masks(benchmark, device, quick, problem, direction, names, contender):
    comparison = compare(problem, direction, names, device, quick)
    comparison.report_problem(benchmark, "masks", contender, problem, direction, device)
