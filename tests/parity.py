"""``assert_parity``: a backend against float64, as close as the same computation done eagerly in the same dtype.

The error of the backend may be twice that of the eager reference plus one rounding, for the output, every gradient and the running
statistics, both in the Frobenius norm and for the worst element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

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
DIFFERENTIATED = ("query", "key", "value", "theta", "bias", "norm_weight", "norm_bias")
ORDERS = 3
STATISTICS = ("running_mean", "running_var")


@dataclass
class Problem:
    """The arguments of one call of the operator, the gradient of its output, and the dropout mask where there is one."""

    tensors: dict[str, Tensor | None]
    options: dict[str, Any]
    grad: Tensor | None
    keep: Tensor | None = None
    seed: int = 0

    def to(self, dtype: torch.dtype) -> Problem:
        tensors = {name: None if tensor is None else tensor.to(dtype) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, grad=None if self.grad is None else self.grad.to(dtype))


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
    bias: bool = True,
    affine: bool = True,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """A problem with random tensors: views of a qkv projection, parameters of the sizes that training meets."""
    generator = torch.Generator().manual_seed(seed)
    seqlen_k = seqlen if seqlen_k is None else seqlen_k
    norm, training = MODES[mode]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def maps(length: int) -> Tensor:
        if layout == "projection":
            return normal(batch, length, 3, heads, head_dim).to(device, dtype).select(2, 1).transpose(1, 2)
        if layout == "transposed":
            return normal(batch, heads, head_dim, length).to(device, dtype).mT
        if layout == "expanded":
            return normal(1, 1, length, head_dim).to(device, dtype).expand(batch, heads, -1, -1)
        assert layout == "contiguous", layout
        return normal(batch, heads, length, head_dim).to(device, dtype)

    tensors: dict[str, Tensor | None] = {"query": maps(seqlen), "key": maps(seqlen_k), "value": maps(seqlen_k)}
    parameters = {"theta": normal(heads, heads) * heads**-0.5, "bias": normal(heads) if bias else None}
    if norm is not None and affine:
        parameters |= {"norm_weight": 1 + 0.3 * normal(heads), "norm_bias": normal(heads)}
    if norm == "batch":
        parameters |= {"running_mean": 0.1 * normal(heads), "running_var": 0.001 + 0.01 * normal(heads).square()}
    tensors |= {name: None if p is None else p.to(device, parameter_dtype) for name, p in parameters.items()}
    grad = normal(batch, seqlen, heads, head_dim).to(device, dtype).transpose(1, 2)
    return Problem(tensors, {"norm": norm, "training": training, **options}, grad)


def compute(problem: Problem, backend: str) -> dict[str, Tensor]:
    """The output, every gradient and the running statistics after the call, by name."""
    arguments = {}
    for name, tensor in problem.tensors.items():
        if tensor is None or name in STATISTICS:
            arguments[name] = None if tensor is None else tensor.clone()
        else:
            arguments[name] = tensor.detach().requires_grad_()
    torch.manual_seed(problem.seed)
    if problem.keep is not None and backend == "reference":
        output = reference.re_attention(**arguments, **problem.options, keep=problem.keep)
    else:
        output = re_attention(**arguments, **problem.options, backend=backend)
    results = {"output": output.detach()}
    if problem.grad is not None:
        output.backward(problem.grad)
        for name in DIFFERENTIATED:
            if arguments.get(name) is not None:
                grad = arguments[name].grad
                results[f"{name} gradient"] = torch.zeros_like(arguments[name]) if grad is None else grad
    return results | {name: arguments[name] for name in STATISTICS if arguments.get(name) is not None}


def compute_shuffled(problem: Problem, seed: int) -> dict[str, Tensor]:
    """What the eager reference computes when queries, keys and head_dim come in another order; the results in the given one."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, seqlen, head_dim = problem.tensors["query"].shape
    device = problem.tensors["query"].device
    rows, columns, dims = (
        torch.randperm(size, generator=generator).to(device)
        for size in (seqlen, problem.tensors["key"].shape[2], head_dim)
    )
    order = {"query": (rows, dims), "key": (columns, dims), "value": (columns, dims), "output": (rows, dims)}

    def shuffled(tensor: Tensor, name: str) -> Tensor:
        positions, dims = order[name]
        return tensor[:, :, positions][..., dims]

    tensors = problem.tensors | {name: shuffled(problem.tensors[name], name) for name in ("query", "key", "value")}
    keep = None if problem.keep is None else problem.keep[:, :, rows][..., columns]
    results = compute(replace(problem, tensors=tensors, grad=shuffled(problem.grad, "output"), keep=keep), "reference")
    for name, (positions, dims) in order.items():
        name = name if name == "output" else f"{name} gradient"
        results[name] = results[name][:, :, positions.argsort()][..., dims.argsort()]
    return results


def assert_parity(problem: Problem, backend: str = "triton") -> None:
    """Fails, naming the tensor and both errors, if the backend is less exact than eager arithmetic in the same dtype allows."""
    exact = compute(problem.to(torch.float64), "reference")
    eager = [compute(problem, "reference"), *(compute_shuffled(problem, seed) for seed in range(ORDERS))]
    found = compute(problem, backend)
    rounding = torch.finfo(problem.tensors["query"].dtype).eps
    faults = []
    for name, right in exact.items():
        assert found[name].dtype == eager[0][name].dtype and found[name].shape == right.shape, name
        for norm in (2, float("inf")) if right.numel() else ():

            def error_of(results: dict[str, Tensor], name=name, right=right, norm=norm) -> float:
                return torch.linalg.vector_norm(results[name].double() - right, norm).item()

            eager_error = max(map(error_of, eager))
            assert math.isfinite(eager_error), f"{name}: eager arithmetic overflows, there is nothing to compare with"
            allowed = 2 * eager_error + rounding * torch.linalg.vector_norm(right, norm).item()
            if not error_of(found) <= allowed:
                faults.append(
                    f"{name}: error {error_of(found):.3g} in norm {norm}, eager {eager_error:.3g}, allowed {allowed:.3g}"
                )
    assert not faults, "\n".join(faults)
