"""``pytest benchmarks/ --benchmark-only``: time and peak memory as the sequence grows, layer norm, one sample.

A contender that would take longer than ``TOO_LONG`` at a size, by the growth so far, is not measured there; nor is one
whose maps do not fit into memory.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from benchmarks import measure
from benchmarks.compare import CUDA, DEVICE, Comparison, compare_operator, label, played_back
from benchmarks.measure import Problem

DIRECTIONS = ("forward", "forward+backward")
SEQLENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
# On a CPU the forward pass alone goes on to the end: its time is that of a benchmark run.
LONGEST = {"forward": 8192, "forward+backward": 8192 if CUDA else 4096}
QUICK_SEQLENS = (64, 128)
TOO_LONG_MS = 3000.0

pytestmark = played_back


def problem(seqlen: int) -> Problem:
    batch, dtype = (8, torch.bfloat16) if CUDA else (1, torch.float32)
    return Problem(batch, 12, seqlen, 32, "layer", dtype)


@functools.cache
def compare(seqlen: int, direction: str, names: tuple[str, ...], device: torch.device, quick: bool) -> Comparison:
    """All are kept, as a size decides who is measured at the next."""
    faults, smaller = {}, seqlen // 2
    if smaller in SEQLENS:
        before = compare(smaller, direction, names, device, quick)
        faults = {
            name: before.faults.get(name, f"not measured: {smaller} took {before.ms.get(name, 0) / 1e3:.1f} s")
            for name in names
            if name in before.faults or 4 * before.ms[name] > TOO_LONG_MS
        }
    able = tuple(name for name in names if name not in faults)
    seconds, rounds = (0.0, 1) if quick else (0.6, 3)
    comparison = compare_operator(problem(seqlen), direction, able, device, seconds, rounds)
    comparison.faults.update(faults)
    return comparison


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    seqlens = QUICK_SEQLENS if metafunc.config.getoption("--quick") else SEQLENS
    names = (*measure.fused_backends(DEVICE), "eager", "sdpa")
    cases = []
    # Both directions of a size follow each other: what is right is found out once.
    for seqlen, direction in itertools.product(seqlens, DIRECTIONS):
        if seqlen <= LONGEST[direction]:
            group = label(problem(seqlen), direction)
            cases += [pytest.param(seqlen, direction, names, name, id=f"{group}-{name}") for name in names]
    metafunc.parametrize(("seqlen", "direction", "names", "contender"), cases)


def test_scaling(benchmark, device, quick, seqlen, direction, names, contender):
    comparison = compare(seqlen, direction, names, device, quick)
    comparison.report_problem(benchmark, "scaling", contender, problem(seqlen), direction, device)
