"""``python -m benchmarks.launch_cost``: what a call of the CUDA backend costs the host before the driver.

Needs no GPU: calls are made on CPU tensors, with all that the backend does up to ``cuLaunchKernel``, which does nothing
here. So torch's guard, its stream and the driver itself are not in it. Prints microseconds of a direction, the best of
several rounds; of that, what torch needs to allocate the results; launches, and how many functions are called.
"operator" is a forward pass of ``re_attention`` without gradients: its checks, the choice of a backend and torch's
dispatcher too; "gradients" is one with gradients and the backward pass, by way of autograd.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from cuda.bindings.driver import CUresult
from torch import Tensor

from reattn import re_attention
from reattn.backends import common, cuda, cuda_driver
from reattn.backends.contract import Inputs
from reattn.backends.cuda_plan import SHARED_LIMIT
from reattn.problem import Problem

# So small that memory is had for nothing.
SHAPE = (1, 12, 17, 64)
# Many short ones: on a busy machine few are undisturbed.
ROUNDS, CALLS = 200, 50
# What the operator takes beside query, key and value.
NAMES = Inputs._fields[3:10]


class NoDriver(cuda_driver.CudaDriver):
    """Of an H100 that is not there: kernels are neither loaded nor run. ``launches``: how many were asked for."""

    launches = 0

    def target(self, device: int) -> str:
        return "compute_90"

    def describe(self, device: int) -> tuple[int, int]:
        return SHARED_LIMIT[90], 132

    def load(self, *_: Any) -> object:
        return object()

    def cuLaunchKernel(self, *_: Any) -> tuple[Any]:
        self.launches += 1
        return (CUresult.CUDA_SUCCESS,)


@contextlib.contextmanager
def no_driver() -> Iterator[NoDriver]:
    driver = NoDriver()
    before = cuda_driver.use(driver)
    # What is not compiled costs no time.
    on_cpu = mock.patch.object(cuda, "EMULATED", True)
    codes = mock.patch.object(cuda_driver.cuda_compile, "compiled", lambda kernels, target: [None] * len(kernels))
    bindings = SimpleNamespace(cuLaunchKernel=driver.cuLaunchKernel, CUresult=CUresult)
    try:
        with on_cpu, codes, mock.patch.object(cuda_driver, "_bindings", lambda: bindings):
            yield driver
    finally:
        cuda_driver.use(before)


def step(norm: str) -> dict[str, Callable[[], Any]]:
    """A forward pass, a backward pass, the operator without and with gradients, and what both passes allocate for their
    results; batch norm in training."""
    batch, heads, seqlen, head_dim = SHAPE
    qkv = torch.zeros(batch, seqlen, 3, heads, head_dim, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    inputs = Inputs(*qkv, torch.eye(heads), torch.zeros(heads), torch.ones(heads), torch.zeros(heads))
    if norm == "batch":
        running = torch.zeros(heads), torch.ones(heads), torch.zeros((), dtype=torch.int64)
        inputs = inputs._replace(running_mean=running[0], running_var=running[1], num_batches_tracked=running[2])
    problem = Problem.of(inputs.query, norm=norm, training=norm == "batch", scale=0.125)
    outputs = cuda.forward(problem, inputs)
    grad = torch.zeros_like(outputs.out)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:7] if tensor is not None]
    differentiated = Inputs(*leaves, *inputs[7:])
    options: dict[str, Any] = {"norm": norm, "training": norm == "batch", "backend": "cuda"}

    def operator(inputs: Inputs) -> Tensor:
        given = inputs._asdict()
        return re_attention(*inputs[:3], **{name: given[name] for name in NAMES}, **options)

    def without_gradients() -> Tensor:
        with torch.no_grad():
            return operator(inputs)

    return {
        "forward": lambda: cuda.forward(problem, inputs),
        "backward": lambda: cuda.backward(problem, grad, inputs, outputs, None),
        "operator": without_gradients,
        "gradients": lambda: torch.autograd.grad(operator(differentiated), leaves, grad),
        "results": lambda: (
            common.empty_outputs(problem, inputs),
            common.empty_gradients(problem, inputs, None),
        ),
    }


def count_calls(function: Callable[[], Any]) -> int:
    """How many functions it calls, Python's and built-in ones: the same on every machine."""
    calls = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls - 1  # that of sys.setprofile


def microseconds(function: Callable[[], Any]) -> float:
    """The best round's mean."""
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            function()
        best = min(best, time.perf_counter() - begin)
    return best / CALLS * 1e6


def main() -> None:
    torch.set_num_threads(1)
    with no_driver() as driver:
        for norm in ("layer", "batch"):
            directions = step(norm)
            allocating = microseconds(directions.pop("results"))
            for name, function in directions.items():
                took, driver.launches = microseconds(function), 0
                calls = count_calls(function)
                print(f"{norm:6} {name:9} {took:5.1f} us, launches: {driver.launches}, functions called: {calls}")
            print(f"{norm:6} results   {allocating:5.1f} us to allocate, in both directions")


if __name__ == "__main__":
    main()
