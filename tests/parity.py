"""``assert_parity``: a backend against float64, as close as the same computation done eagerly in the same dtype.

For the output, every gradient and the running statistics, the error of the backend may be twice that of the eager
reference plus one rounding, in the Frobenius norm and for the worst element. A gradient of a few numbers may come out
right by luck: the eager error is the largest over several orders of summation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
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
FUSED = (
    "triton",
    pytest.param("cuda", marks=pytest.mark.cuda),
    pytest.param("cpu", marks=pytest.mark.extension),
)
BACKENDS = (*FUSED, "reference")
ORDERS = 12


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
        tensors = {name: None if tensor is None else tensor.to(dtype) for name, tensor in self.tensors.items()}
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
    **options: Any,
) -> Problem:
    """A problem with random tensors, every optional one included; query, key and value as views of a projection."""
    generator = torch.Generator().manual_seed(0)
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
            arguments[name] = tensor.clone() if name in STATISTICS else tensor.detach().requires_grad_()
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
        else:
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
    sizes = (*problem["query"].shape[1:], problem["key"].shape[2])
    heads, rows, dims, columns = (torch.randperm(size, generator=generator).to(problem.grad.device) for size in sizes)
    orders = dict.fromkeys(("query", "output"), (None, heads, rows, dims))
    orders |= dict.fromkeys(("key", "value"), (None, heads, columns, dims)) | {"theta": (heads, heads)}

    def reordered(tensor: Tensor, order: tuple[Tensor | None, ...]) -> Tensor:
        for dim, permutation in enumerate(order):
            if permutation is not None:
                tensor = tensor.index_select(dim, permutation)
        return tensor

    tensors = {name: reordered(t, orders.get(name, (heads,))) for name, t in problem.tensors.items() if t is not None}
    shuffled = replace(
        problem.with_tensors(**tensors),
        grad=reordered(problem.grad, orders["output"]),
        keep=None if problem.keep is None else reordered(problem.keep, (None, heads, rows, columns)),
    )
    back = {name: tuple(p if p is None else p.argsort() for p in order) for name, order in orders.items()}
    return {
        name: reordered(result, back.get(name.removesuffix(" gradient"), (heads.argsort(),)))
        for name, result in compute(shuffled, "reference").items()
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fails, naming the tensors, if two results of ``compute`` differ in a single bit."""
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def assert_parity(problem: Problem, backend: str, times: float = 2.0) -> None:
    """Fails, naming tensor and errors, if the backend is less exact than eager arithmetic in the same dtype.

    Its error may be that many times the eager one.
    """
    exact = compute(problem.to(torch.float64), "reference")
    eager = [compute(problem, "reference"), *(compute_shuffled(problem, seed) for seed in range(1, ORDERS))]
    found = compute(problem, backend)
    assert found.keys() == exact.keys()
    faults = []
    for name, right in exact.items():
        assert found[name].dtype == eager[0][name].dtype and found[name].shape == right.shape, name
        if not right.numel():
            continue
        for norm in (2, math.inf):
            size, error, *eager_errors = (
                torch.linalg.vector_norm(tensor.double(), norm).item()
                for tensor in (right, found[name] - right, *(results[name] - right for results in eager))
            )
            assert math.isfinite(sum(eager_errors)), f"{name}: eager arithmetic overflows, nothing to compare with"
            allowed = times * max(eager_errors) + torch.finfo(problem.grad.dtype).eps * size
            if not error <= allowed:
                faults.append(
                    f"{name}: error {error:.3g}, allowed {allowed:.3g} (eager {max(eager_errors):.3g}) in norm {norm}"
                )
    assert not faults, "\n".join(faults)
