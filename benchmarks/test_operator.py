"""``pytest benchmarks/ --benchmark-only``: the operator against its peers, forward and forward + backward.

On CUDA the triton backend at the sizes of the official models, on a CPU the reference backend at small ones. Every
contender of a problem is validated, and then timed with the others to give the ratios in ``extra_info``: milliseconds of
all, ratio to plain attention and to the best peer, TFLOP/s.
"""

from __future__ import annotations

import functools
import itertools
import time
from dataclasses import dataclass, field

import pytest
import torch

from benchmarks import measure, peers
from benchmarks.measure import Oracle, Problem

CUDA = torch.cuda.is_available()
OURS = "triton" if CUDA else "reference"
DIRECTIONS = ("forward", "forward+backward")

if CUDA:
    PROBLEMS = [
        *(
            Problem(*shape, norm, torch.bfloat16)
            for shape in ((128, 12, 197, 32), (128, 12, 197, 64), (128, 12, 197, 33), (32, 12, 577, 32))
            for norm in peers.EAGER
        ),
        *(
            Problem(128, 12, 197, 32, norm, dtype)
            for dtype in (torch.float16, torch.float32)
            for norm in ("batch", "layer")
        ),
    ]
else:
    PROBLEMS = [
        *(Problem(8, 12, 197, 32, norm, torch.float32) for norm in peers.EAGER),
        *(Problem(8, 12, 197, 32, norm, torch.bfloat16) for norm in ("batch", "layer")),
        *(Problem(2, 6, 257, 33, norm, torch.float32) for norm in ("batch", "layer")),
    ]


def contenders(problem: Problem) -> tuple[str, ...]:
    """On a CPU compiling takes ten seconds a problem, on CUDA one sample at a time is nothing but launches."""
    if CUDA:
        return (OURS, "eager", "compiled", "sdpa")
    compiled = ("compiled",) if problem == PROBLEMS[0]._replace_norm(problem.norm) else ()
    return (OURS, "eager", *compiled, "sample", "sdpa")
