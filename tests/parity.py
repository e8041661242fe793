"""``assert_parity``: a backend against float64, as close as the same computation done eagerly in the same dtype.

For the output, every gradient and the running statistics, the error of the backend may be twice that of the eager
reference plus one rounding, in the Frobenius norm and for the worst element. What eager arithmetic happens to lose
depends on the CPU and its order of summation, and a gradient of a few numbers may come out right by luck: so its error
is the largest over several orders, and twice what ``error_bound.py`` derives, without any such luck, is allowed too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from error_bound import estimate_errors
from torch import Tensor

from reattn import re_attention, reference

# name: (norm, training)
MODES = {
    "batch-training": ("batch", True),
    "batch-eval": ("batch", False),
    "layer": ("layer", True),
    "none": (None, False),
}
STATISTICS = ("running_mean", "running_var")
MARKS = {"triton": (), "cuda": pytest.mark.cuda, "cpu": pytest.mark.extension}
FUSED = tuple(pytest.param(name, marks=marks) for name, marks in MARKS.items())
BACKENDS = (*FUSED, "reference")
ORDERS = 12
NORMS = (2, math.inf)


def device_of(backend: str) -> torch.device:
    """Where a backend is tested: the cpu backend on the CPU, the others on the GPU if there is one."""
    return torch.device("cuda" if backend != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass
class Problem:
    """A call of the operator: its tensors and options, the gradient of its output, the dropout mask if it is given."""

    tensors: dict[str, Tensor | None]
    options: dict[str, Any]
    grad: Tensor
    keep: Tensor | None = None
    seed: int = 0

    def with_tensors(self, **tensors: Tensor | None) -> Problem:
        return replace(self, tensors=self.tensors | tensors)

    def with_options(self, **options: Any) -> Problem:
        return replace(self, options=self.options | options)

    def to(self, dtype: torch.dtype) -> Problem:
        tensors = {
            name: tensor if tensor is None or tensor.dtype == torch.bool else tensor.to(dtype)
            for name, tensor in self.tensors.items()
        }
        mask, given = tensors.get("attn_mask"), self.tensors.get("attn_mask")
        if mask is not None and given is not None and mask.is_floating_point():
            # What hides is the lowest number of the dtype.
            lowest = given == torch.finfo(given.dtype).min
            tensors["attn_mask"] = mask.masked_fill(lowest, torch.finfo(dtype).min)
        return replace(self, tensors=tensors, grad=self.grad.to(dtype))

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        assert tensor is not None, name
        return tensor


def make_problem(
    mode: str = "layer",
    *,
    heads: int = 3,
    head_dim: int = 16,
    seqlen: int = 17,
    seqlen_k: int | None = None,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "projection",
    seed: int | None = None,
    **options: Any,
) -> Problem:
    """A problem with random tensors, every optional one included; query, key and value as views of a projection.

    Drawn from the seed; without one from that of the environment variable REATTN_TEST_SEED, or 0.
    """
    seed = int(os.environ.get("REATTN_TEST_SEED", "0")) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    norm, training = MODES[mode]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def rows(length: int) -> Tensor:
        if layout == "projection":
            return normal(batch, length, 3, heads, head_dim).to(device, dtype).select(2, 1).transpose(1, 2)
        if layout == "head_dim strided":
            return normal(batch, heads, head_dim, length).to(device, dtype).mT
        if layout == "expanded":
            return normal(1, 1, length, head_dim).to(device, dtype).expand(batch, heads, -1, -1)
        if layout == "contiguous":
            return normal(batch, heads, length, head_dim).to(device, dtype)
        raise ValueError(layout)

    length = seqlen if seqlen_k is None else seqlen_k
    maps = {"query": rows(seqlen), "key": rows(length), "value": rows(length)}
    parameters = {"theta": normal(heads, heads) * heads**-0.5, "bias": normal(heads)}
    if norm is not None:
        parameters |= {"norm_weight": 1 + 0.3 * normal(heads), "norm_bias": normal(heads)}
    if norm == "batch":
        parameters |= {"running_mean": 0.1 * normal(heads), "running_var": 0.001 + 0.01 * normal(heads).square()}
    tensors = maps | {name: parameter.to(device, parameter_dtype) for name, parameter in parameters.items()}
    grad = normal(batch, seqlen, heads, head_dim).to(device, dtype).transpose(1, 2)
    return Problem(tensors, {"norm": norm, "training": training, **options}, grad)


def compute(problem: Problem, backend: str) -> dict[str, Tensor]:
    """The output, every gradient and the running statistics after the call, by name."""
    arguments: dict[str, Any] = {}
    for name, tensor in problem.tensors.items():
        if tensor is not None:
            constant = name in STATISTICS or tensor.dtype == torch.bool
            arguments[name] = tensor.clone() if constant else tensor.detach().requires_grad_()
    torch.manual_seed(problem.seed)
    if problem.keep is not None and backend == "reference":
        output = reference.re_attention(**arguments, **problem.options, keep=problem.keep)
    else:
        output = re_attention(**arguments, **problem.options, backend=backend)
    output.backward(problem.grad)
    results = {"output": output.detach()}
    for name, argument in arguments.items():
        if name in STATISTICS:
            results[name] = argument
        elif argument.requires_grad:
            results[f"{name} gradient"] = torch.zeros_like(argument) if argument.grad is None else argument.grad
    return results


def drawn_mask(
    backend: str,
    *,
    heads: int = 3,
    head_dim: int = 16,
    seqlen: int = 17,
    seqlen_k: int = 17,
    batch: int = 2,
    dropout_p: float = 0.3,
    seed: int = 0,
) -> Tensor:
    """What a backend keeps, (batch, heads, seqlen, seqlen_k): equal scores, and values that show the maps."""
    device = device_of(backend)
    query = torch.zeros(batch, heads, seqlen, head_dim, device=device)
    key = torch.zeros(batch, heads, seqlen_k, head_dim, device=device)
    theta = torch.eye(heads, device=device)
    chunks = []
    for unit in torch.eye(seqlen_k, device=device).split(head_dim, dim=1):
        value = torch.zeros_like(key)
        value[..., : unit.shape[1]] = unit
        torch.manual_seed(seed)
        maps = re_attention(query, key, value, theta, dropout_p=dropout_p, backend=backend)
        chunks.append(maps[..., : unit.shape[1]] > 0.5 / seqlen_k)
    return torch.cat(chunks, -1)


def compute_shuffled(problem: Problem, seed: int) -> dict[str, Tensor]:
    """What the reference computes with heads, queries, keys and head_dim in a random order; results in the given."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (*problem["query"].shape[1:], problem["key"].shape[2], problem.grad.shape[1])
    orders_of = [torch.randperm(size, generator=generator).to(problem.grad.device) for size in sizes]
    heads, rows, dims, columns, heads_out = orders_of
    if len(heads_out) == len(heads):
        heads_out = heads
    if problem.options.get("is_causal"):
        rows, columns = rows.sort().values, columns.sort().values
    orders = {"query": (None, heads, rows, dims), "output": (None, heads_out, rows, dims)}
    orders |= {"key": (None, heads, columns, dims), "value": (None, heads_out, columns, dims)}
    orders |= {"theta": (heads, heads_out), "pre_theta": (heads, heads), "pre_bias": (heads,)}
    if (mask := problem.tensors.get("attn_mask")) is not None:
        orders["attn_mask"] = (None, heads, rows, columns)[-mask.ndim :]

    def reordered(tensor: Tensor, order: tuple[Tensor | None, ...]) -> Tensor:
        # A mask may lack the first ones, or have one of them for all.
        for dim, permutation in enumerate(order[-tensor.ndim :]):
            if permutation is not None and tensor.shape[dim] == len(permutation):
                tensor = tensor.index_select(dim, permutation)
        return tensor

    tensors = {
        name: reordered(t, orders.get(name, (heads_out,))) for name, t in problem.tensors.items() if t is not None
    }
    shuffled = replace(
        problem.with_tensors(**tensors),
        grad=reordered(problem.grad, orders["output"]),
        keep=None if problem.keep is None else reordered(problem.keep, (None, heads, rows, columns)),
    )
    back = {name: tuple(p if p is None else p.argsort() for p in order) for name, order in orders.items()}
    return {
        name: reordered(result, back.get(name.removesuffix(" gradient"), (heads_out.argsort(),)))
        for name, result in compute(shuffled, "reference").items()
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fails, naming the tensors, if two results of ``compute`` differ in a single bit."""
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def assert_defined_by(problem: Problem, definition: Callable[[Problem], Tensor]) -> None:
    """Fails unless the reference computes a float64 problem, and every gradient, as the definition spells it out."""
    found = compute(problem, "reference")
    leaves = {
        name: tensor.detach().requires_grad_() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in problem.tensors.items()
    }
    expected = definition(problem.with_tensors(**leaves))
    torch.testing.assert_close(found["output"], expected, rtol=1e-10, atol=1e-10)
    expected.backward(problem.grad)
    for name, result in found.items():
        if name.endswith("gradient"):
            right = leaves[name.removesuffix(" gradient")].grad
            right = torch.zeros_like(result) if right is None else right
            torch.testing.assert_close(result, right, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def sizes_of(tensor: Tensor) -> dict[float, float]:
    """The Frobenius norm and the largest element, by norm."""
    return {norm: torch.linalg.vector_norm(tensor.double(), norm).item() if tensor.numel() else 0.0 for norm in NORMS}


def assert_parity(problem: Problem, backend: str, times: float = 2.0, run: Callable | None = None) -> dict[str, float]:
    """The relative error of every result in the Frobenius norm; fails, naming tensor and errors, if the backend is less
    exact than the dtype allows.

    Its error may be that many times the eager one, or that of simulated rounding. ``run(problem, backend)`` computes
    in place of :func:`compute`.
    """
    assert problem.keep is not None or not problem.options.get("dropout_p"), "the dropout mask has to be given"
    exact = compute(problem.to(torch.float64), "reference")
    found = (run or compute)(problem, backend)
    assert found.keys() == exact.keys()
    errors = {name: sizes_of(found[name] - right) for name, right in exact.items()}
    rounding = {name: sizes_of(right) for name, right in exact.items()}
    relative = {name: errors[name][2] / (rounding[name][2] or 1.0) for name in exact}
    eager = {name: dict.fromkeys(NORMS, 0.0) for name in exact}
    faults: list[str] = []

    def any_faults(estimate: dict[str, dict[float, float]] | None = None) -> bool:
        """Whether anything is further off than what has been computed so far allows."""
        faults.clear()
        for name, norm in product(exact, NORMS):
            allowed = times * eager[name][norm] + torch.finfo(problem.grad.dtype).eps * rounding[name][norm]
            estimated = estimate[name][norm] if estimate else 0.0
            if not errors[name][norm] <= max(allowed, times * estimated):
                faults.append(
                    f"{name}: error {errors[name][norm]:.3g}, allowed {max(allowed, times * estimated):.3g} "
                    f"(eager {eager[name][norm]:.3g}, simulated {estimated:.3g}) in norm {norm}"
                )
        return bool(faults)

    # What allows more is computed where less does not suffice.
    for order in range(ORDERS):
        results = compute_shuffled(problem, order) if order else compute(problem, "reference")
        for name, right in exact.items():
            assert found[name].dtype == results[name].dtype and found[name].shape == right.shape, name
            for norm, error in sizes_of(results[name] - right).items():
                assert math.isfinite(error), f"{name}: eager arithmetic overflows, nothing to compare with"
                eager[name][norm] = max(eager[name][norm], error)
        if not any_faults():
            return relative
    assert not any_faults(estimate_errors(problem, exact, sizes_of)), "\n".join(faults)
    return relative
