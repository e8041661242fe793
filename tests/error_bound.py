"""What rounding costs the operator: its steps in float64, each with an error of the size that rounding may have there.

An estimate of the error that owes nothing to the luck of one CPU's order of summation. Every step of the forward and
the backward pass (docs/operator.md, sections 2 and 4) is computed in float64 and then moved at random, each element by
a normal error as large as one of up to ``unit * magnitude`` is on average: ``unit`` is half of float32's eps,
``magnitude`` the sum of the absolute values of the terms that the element is made of. So an error that later steps
amplify, cancel or share between elements is followed to the results as it would be in a real computation, and the
differences from the exact results are errors that a right computation may have.

A sum of n products in float32 may be off by ``n * unit * magnitude`` at worst; by less than ``unit * magnitude`` when
rounding goes either way, for terms of either sign in any order, for those of one sign in blocks of a few dozen. 16-bit
problems also round the operands of their products, softmax maps, mixing weights, normalised maps and the gradients of
maps and scores, to their dtype, and where scores are mixed before the softmax what is mixed there; sums, statistics and
norm stay in float32, as in the kernels. The results are rounded to the dtype that they have. With ``tf32`` the same
operands of a float32 problem lose their digits behind the tenth, as tensor cores take them; query, key, value and the
output's gradient must have none there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reattn.reference import visible_keys

# Makes a wrong step of a right one and of the named steps before it.
Fault = Callable[[Tensor, dict[str, Tensor]], Tensor]
# Simulated computations of an estimate.
SAMPLES = 8
# What an operand of tf32 loses on average, and at most as much again: digits are cut off.
TF32_UNIT = 2.0**-11


class Rounding:
    """Random errors: of float32 arithmetic, and of operands in the dtype of query, key and value."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, seed: int | None, faults: dict[str, Fault], tf32: bool = False
    ):
        """Without a seed nothing is rounded; a named step is what its fault makes of it."""
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        self.dtype, self.tf32 = dtype, tf32
        self.faults = faults
        self.steps: dict[str, Tensor] = {}

    def moved(self, exact: Tensor, distance: Tensor) -> Tensor:
        """Each element by a normal error with the variance of a uniform one up to that distance."""
        if self.generator is None:
            return exact
        normal = torch.randn(exact.shape, dtype=torch.float64, device=exact.device, generator=self.generator)
        return exact + normal * distance / 3**0.5

    def __call__(self, exact: Tensor, magnitude: Tensor | None = None, name: str | None = None) -> Tensor:
        """A result of float32 arithmetic; ``magnitude`` is its own absolute value if it is no sum."""
        if name in self.faults:
            exact = self.faults[name](exact, self.steps)
        if name is not None:
            self.steps[name] = exact
        magnitude = exact.abs() if magnitude is None else magnitude
        return self.moved(exact, torch.finfo(torch.float32).eps / 2 * magnitude)

    def stored(self, exact: Tensor, dtype: torch.dtype) -> Tensor:
        """In that dtype; float16 has numbers below the normal ones, as far apart as the smallest normal ones."""
        info = torch.finfo(dtype)
        return self.moved(exact, info.eps / 2 * exact.abs().clamp_min(info.tiny) * (exact != 0))

    def operand(self, exact: Tensor) -> Tensor:
        """An operand of a product, in the dtype of the problem, or as tensor cores take one of tf32."""
        if self.tf32 and self.generator is not None:
            return self.moved(exact * (1 - TF32_UNIT), TF32_UNIT * exact.abs())
        return exact if self.dtype == torch.float32 else self.stored(exact, self.dtype)


def per_head(vector: Tensor) -> Tensor:
    """Of shape (heads,), against maps."""
    return vector[:, None, None]


def mix(weight: Tensor, maps: Tensor) -> Tensor:
    """``sum_h weight[h, g] maps[h]``."""
    return torch.einsum("bhij,hg->bgij", maps, weight)


def simulate(
    problem: Any, seed: int | None = 0, faults: dict[str, Fault] | None = None, tf32: bool = False
) -> dict[str, Tensor]:
    """``parity.compute``, in float64, with errors drawn from that seed, or exactly without one; with faults at will."""
    rounding = Rounding(problem.grad.dtype, problem.grad.device, seed, faults or {}, tf32)
    results = _simulate(problem, rounding, **problem.options)
    assert rounding.faults.keys() <= rounding.steps.keys()
    return results


@torch.no_grad()
def _simulate(
    problem: Any,
    rounding: Rounding,
    *,
    norm: str | None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    output_scale: float = 1.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> dict[str, Tensor]:
    assert problem.keep is not None or dropout_p == 0, "the mask has to be given"
    tensors = {name: tensor.double() for name, tensor in problem.tensors.items() if tensor is not None}
    mask = problem.tensors.get("attn_mask")
    visible = visible_keys(mask, is_causal, tensors["query"], tensors["key"])
    seen = torch.ones((), dtype=torch.float64, device=problem.grad.device) if visible is None else visible.double()
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    theta = tensors.get("theta", torch.eye(query.shape[1], dtype=torch.float64, device=query.device))
    pre_theta = tensors.get("pre_theta")
    zeros, ones = torch.zeros_like(theta[0]), torch.ones_like(theta[0])
    bias, beta = (tensors.get(name, zeros) for name in ("bias", "norm_bias"))
    gamma = tensors.get("norm_weight", ones) * output_scale
    beta = beta * output_scale
    grad = problem.grad.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    seqlen_k = key.shape[2]
    maps, over = (query.shape[0], theta.shape[1], query.shape[2], seqlen_k), (0, 2, 3)
    count = seen.expand(maps).sum(over)

    # Scores and softmax.
    products = rounding(query @ key.mT, query.abs() @ key.abs().mT)
    if pre_theta is not None:
        products, pre_weight = rounding.operand(products), rounding.operand(pre_theta)
        scores = rounding(mix(pre_weight, products), mix(pre_weight.abs(), products.abs()))
    else:
        scores = products
    scores = rounding(scores * scale, name="scores")
    if mask is not None and mask.is_floating_point():
        scores = rounding(scores + mask.double().where(visible, 0.0))
    blind = torch.zeros((), dtype=torch.bool, device=grad.device)
    if visible is not None:
        blind = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True).masked_fill(blind, 0.0)
    lse = rounding(lse, 1 + lse.abs(), "lse")
    probs = (scores - lse).exp()
    probs = rounding(probs, probs * (1 + (scores - lse).abs().masked_fill(probs == 0, 0.0)), "probs")
    kept: Tensor | float = 1.0
    if problem.keep is not None:
        # The factor is one number in float32: all elements share its error.
        factor = rounding(torch.ones((), dtype=torch.float64, device=grad.device) / (1 - dropout_p))
        kept = problem.keep.double() * factor
    dropped = rounding.operand(rounding(probs * kept, name="dropped"))

    # Mixing; mixed_size is the sum of the absolute values of its terms.
    weight = rounding.operand(theta)
    mixed_size = mix(weight.abs(), dropped)
    mixed = rounding(mix(weight, dropped), mixed_size, "mixed")

    # Norm: normed = slope * hat + shift. What it is made of: normed_size, hat_size.
    shift = per_head(beta)
    results = {}
    if norm == "batch" and training:
        # Statistics are those of the maps without their common part, to which the bias belongs. What rounds the mean,
        # which holds that part, moves a head as a whole.
        common = theta.sum(0) / seqlen_k + bias
        centred = (mixed + per_head(bias - common)) * seen
        offset = rounding(centred.sum(over) / count, centred.abs().sum(over) / count)
        var = centred.square().sum(over) / count
        var = rounding(var - offset.square(), var)
        rstd = per_head(rounding((var + eps).rsqrt()))
        mean = rounding(offset + common, theta.abs().sum(0) / seqlen_k + bias.abs())
        hat = rounding((mixed + per_head(bias - mean)) * rstd)
        hat_size = mixed_size * rstd
        slope = per_head(gamma)
        if "running_mean" in tensors:
            for name, new in (("running_mean", mean), ("running_var", var * count / (count - 1))):
                old, new = (1 - momentum) * tensors[name], momentum * new
                results[name] = rounding(old + new, old.abs() + new.abs(), name)
    elif norm == "batch":
        mean, var = tensors["running_mean"], tensors["running_var"]
        rstd = per_head(rounding((var + eps).rsqrt()))
        hat_size = (mixed_size + per_head(bias.abs() + mean.abs())) * rstd
        hat = rounding((mixed + per_head(bias - mean)) * rstd, hat_size)
        slope = per_head(gamma)
    elif norm == "layer":
        biased, size = mixed + per_head(bias), mixed_size + per_head(bias.abs())
        size = size + size.mean(1, keepdim=True)
        centred = rounding(biased - biased.mean(1, keepdim=True), size)
        rstd = rounding((centred.square().mean(1, keepdim=True) + eps).rsqrt())
        hat = rounding(centred * rstd)
        hat_size = size * rstd
        slope = per_head(gamma)
    else:
        rstd = torch.ones((), dtype=torch.float64, device=grad.device)
        hat_size = mixed_size + per_head(bias.abs())
        hat = rounding(mixed + per_head(bias), hat_size)
        slope = rstd * output_scale
    rounding.steps["hat"] = hat
    normed_size = slope.abs() * hat.abs() + shift.abs()
    normed_size = normed_size * seen
    normed = rounding.operand(rounding((slope * hat + shift) * seen, normed_size, "normed"))
    output = rounding(normed @ value, normed_size @ value.abs(), "output")
    output = results["output"] = rounding.stored(output, problem.grad.dtype)

    # Backward: values, then norm.
    grad_value = rounding(normed.mT @ grad, normed_size.mT @ grad.abs(), "grad_value")
    size = grad.abs() @ value.abs().mT * seen
    grad_normed = rounding(grad @ value.mT * seen, size, "grad_normed")
    grad_shift = rounding(grad_normed.sum(over), size.sum(over), "grad_shift")
    size = (grad_normed * hat_size).abs().sum(over)
    grad_slope = rounding((grad_normed * hat).sum(over), size, "grad_slope")
    if norm == "batch" and training:
        # In place of grad_slope, which the sweep over the maps knows only when it has ended.
        kappa = (grad * output).sum(over) - beta * grad_shift
        kappa = rounding(kappa, (grad * output).abs().sum(over) + (beta * grad_shift).abs())
        mean, pull = per_head(grad_shift / count), per_head(kappa / count)
        grad_mixed = rstd * (slope * (grad_normed - mean) - pull * hat) * seen
        size = rstd * (slope.abs() * (grad_normed.abs() + mean.abs()) + pull.abs() * hat_size) * seen
    elif norm == "layer":
        scaled = slope * grad_normed
        dot = (scaled * hat).mean(1, keepdim=True)
        dot = rounding(dot, (scaled * hat).abs().mean(1, keepdim=True))
        common = scaled.mean(1, keepdim=True)
        grad_mixed = rstd * (scaled - common - hat * dot)
        # Mixing weights whose mean over the heads is taken away, or a gradient whose mean is: the same.
        grad_mixed = grad_mixed - grad_mixed.mean(1, keepdim=True)
        size = rstd * (scaled.abs() + scaled.abs().mean(1, keepdim=True) + (hat * dot).abs())
    else:
        grad_mixed = rstd * slope * grad_normed
        size = grad_mixed.abs()
    grad_mixed = rounding.operand(rounding(grad_mixed, size, "grad_mixed"))

    # Mixing, dropout, softmax, scores.
    grad_theta = torch.einsum("bhij,bgij->hg", dropped, grad_mixed)
    grad_theta = rounding(grad_theta, torch.einsum("bhij,bgij->hg", dropped, size), "grad_theta")
    grad_bias = rounding(grad_mixed.sum(over), size.sum(over), "grad_bias")
    grad_probs = rounding(mix(weight.mT, grad_mixed) * kept, mix(weight.mT.abs(), size) * kept, "grad_probs")
    delta = (probs * grad_probs).sum(-1, keepdim=True)
    delta = rounding(delta, (probs * grad_probs).abs().sum(-1, keepdim=True), "delta")
    grad_scores = rounding(probs * (grad_probs - delta), probs * (grad_probs.abs() + delta.abs()), "grad_scores")
    grad_scores = rounding.operand(grad_scores)
    grad_products, gradients = grad_scores, {}
    if pre_theta is not None:
        size = torch.einsum("bhij,bgij->hg", products.abs(), grad_scores.abs())
        grad_pre_theta = rounding(torch.einsum("bhij,bgij->hg", products, grad_scores), size, "grad_pre_theta")
        # The bias adds the same to all keys: its gradient is a sum of zeros.
        sums = rounding(torch.zeros_like(pre_theta[0]), grad_scores.abs().sum(over))
        gradients = {"pre_theta": scale * grad_pre_theta, "pre_bias": sums}
        size = mix(pre_weight.mT.abs(), grad_scores.abs())
        grad_products = rounding.operand(rounding(mix(pre_weight.mT, grad_scores), size, "grad_products"))
    grad_query = scale * rounding(grad_products @ key, grad_products.abs() @ key.abs(), "grad_query")
    grad_key = scale * rounding(grad_products.mT @ query, grad_products.abs().mT @ query.abs(), "grad_key")

    gradients |= {
        "attn_mask": None if mask is None else grad_scores.sum_to_size(mask.shape),
        "query": grad_query,
        "key": grad_key,
        "value": grad_value,
        "theta": grad_theta,
        "bias": grad_bias,
        "norm_weight": grad_slope * output_scale,
        "norm_bias": grad_shift * output_scale,
    }
    for name, tensor in problem.tensors.items():
        if tensor is None or tensor.dtype == torch.bool:
            continue
        if name in gradients:
            results[f"{name} gradient"] = rounding.stored(gradients[name], tensor.dtype)
        else:
            result = results.get(name, tensor.double())
            results[name] = rounding.stored(result, tensor.dtype) if name in results else result
    return results


def estimate_errors(
    problem: Any, exact: dict[str, Tensor], sizes_of: Callable[[Tensor], dict[float, float]], tf32: bool = False
) -> dict[str, dict[float, float]]:
    """The errors that each result may have, by name and norm: the largest of the simulated computations."""
    errors: dict[str, dict[float, float]] = {name: {} for name in exact}
    for seed in range(SAMPLES):
        for name, result in simulate(problem, seed, tf32=tf32).items():
            for norm, error in sizes_of(result - exact[name]).items():
                errors[name][norm] = max(errors[name].get(norm, 0.0), error)
    return errors
