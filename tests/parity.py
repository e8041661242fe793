"""``assert_parity``: a backend against float64, as close as the same computation done eagerly in the same dtype.

The error of the backend may be twice that of the eager reference plus one rounding, for the output, every gradient and the running
statistics, both in the Frobenius norm and for the worst element.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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


def sensitivity(problem: Problem, exact: dict[str, Tensor], draws: int = 4) -> dict[str, Tensor]:
    """How far one float32 rounding of every input moves the exact results: root mean square over a few random ones.

    No algorithm that computes in float32 can promise more. It matters where terms of a sum cancel or a norm divides by almost
    nothing: there the eager error of a tensor of a few numbers is a matter of luck.
    """
    generator = torch.Generator().manual_seed(problem.seed)

    def perturbed(tensor: Tensor) -> Tensor:
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return tensor.double() * (1 + torch.finfo(torch.float32).eps * noise.to(tensor.device))

    squares = {name: torch.zeros_like(right) for name, right in exact.items()}
    for _ in range(draws):
        tensors = {name: None if t is None else perturbed(t) for name, t in problem.tensors.items()}
        moved = compute(replace(problem, tensors=tensors, grad=perturbed(problem.grad)), "reference")
        for name, right in exact.items():
            squares[name] += (moved[name] - right).square() / draws
    return {name: square.sqrt() for name, square in squares.items()}


def assert_parity(problem: Problem, backend: str = "triton") -> None:
    """Fails, naming the tensor and both errors, if the backend is less exact than eager arithmetic in the same dtype allows."""
    exact = compute(problem.to(torch.float64), "reference")
    eager = compute(problem, "reference")
    found = compute(problem, backend)
    moved = sensitivity(problem, exact)
    rounding = torch.finfo(problem.tensors["query"].dtype).eps
    faults = []
    for name, right in exact.items():
        assert found[name].dtype == eager[name].dtype and found[name].shape == right.shape, name
        assert eager[name].isfinite().all(), f"{name}: eager arithmetic overflows, there is nothing to compare with"
        for norm in (2, float("inf")) if right.numel() else ():
            error, eager_error, size, least = (
                torch.linalg.vector_norm(tensor.double(), norm).item()
                for tensor in (found[name] - right, eager[name] - right, right, moved[name])
            )
            allowed = 2 * eager_error + rounding * size + least
            if not error <= allowed:
                faults.append(f"{name}: error {error:.3g} in norm {norm}, eager {eager_error:.3g}, allowed {allowed:.3g}")
    assert not faults, "\n".join(faults)
