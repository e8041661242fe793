"""Every norm folded into one canonical form, on heads x heads tensors, in differentiable PyTorch.

The kernels compute ``A = W^T P + c`` and, only when ``gamma`` is given, ``gamma * A * rsqrt(mean_over_heads(A^2) +
eps) + beta``. No kernel knows a norm's name: centring over the heads folds into the weights, batch statistics and the
output scale into weights and shift. Autograd carries the gradients of ``W, c, gamma, beta`` back to theta, bias and
the norm's parameters. Derivation: docs/operator.md, section 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Canonical(NamedTuple):
    """What the kernels take, float32: ``weight (heads, heads)``, ``shift``, ``gamma``, ``beta`` each ``(heads,)``."""

    weight: Tensor
    shift: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None


class BatchCoupling(NamedTuple):
    """What the backward pass needs to follow batch statistics back into the maps; constants, not differentiated.

    ``unit`` is theta over the standard deviation, ``(heads, heads)``; ``weight`` and ``beta`` are the canonical mixing
    weights and the norm's shift; ``mean`` the mean of each head's map; ``positions`` how many were averaged, one
    number.
    """

    unit: Tensor
    weight: Tensor
    beta: Tensor
    mean: Tensor
    positions: Tensor


def _or(tensor: Tensor | None, default: float, like: Tensor) -> Tensor:
    return like.new_full(like.shape[-1:], default) if tensor is None else tensor.float()


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """At batch 1 every operation on a small tensor, and its gradient, shows in the time of a call."""
    return tensor if factor == 1.0 else tensor * factor


def fold_plain(theta: Tensor, bias: Tensor | None, output_scale: float) -> Canonical:
    """No norm: ``W = theta``, ``c = bias``."""
    theta = theta.float()
    return Canonical(_scaled(theta, output_scale), _scaled(_or(bias, 0.0, theta), output_scale))


def fold_layer(
    theta: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, output_scale: float
) -> Canonical:
    """LayerNorm over heads: centring is linear and folds away; a root mean square is left."""
    theta = theta.float()
    shift = _or(bias, 0.0, theta)
    return Canonical(
        theta - theta.mean(1, keepdim=True),
        shift if bias is None else shift - shift.mean(),
        _scaled(_or(norm_weight, 1.0, theta), output_scale),
        _scaled(_or(norm_bias, 0.0, theta), output_scale),
    )


def fold_batch(
    theta: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    output_scale: float,
) -> Canonical:
    """Batch norm with the statistics ``mean, var (heads,)`` of A, running or of this batch: an affine map per head."""
    theta = theta.float()
    slope = _scaled((var.float() + eps).rsqrt(), output_scale)
    if norm_weight is not None:
        slope = slope * norm_weight.float()
    centred = -mean.float() if bias is None else bias.float() - mean.float()
    shift = centred * slope
    if norm_bias is not None:
        shift = shift + _scaled(norm_bias.float(), output_scale)
    return Canonical(theta * slope, shift)


def mixed_moments(theta: Tensor, bias: Tensor | None, map_mean: Tensor, map_cov: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``A = theta^T P + bias`` from those of P: ``map_mean (heads,)``, ``map_cov (heads,
    heads)``.

    In the precision of ``map_cov``, float64: nearly equal heads mixed by weights of opposite sign cancel.
    """
    theta = theta.to(map_cov.dtype)
    mean = map_mean @ theta
    if bias is not None:
        mean = mean + bias.to(map_cov.dtype)
    return mean, ((map_cov @ theta) * theta).sum(0)


@torch.no_grad()
def couple(
    canonical: Canonical,
    theta: Tensor,
    var: Tensor,
    norm_bias: Tensor | None,
    map_mean: Tensor,
    count: Tensor,
    eps: float,
    output_scale: float,
) -> BatchCoupling:
    """Keeps what :func:`coupling_gradient` will need of a forward pass with batch statistics."""
    theta = theta.float()
    return BatchCoupling(
        theta * (var.float() + eps).rsqrt(),
        canonical.weight.detach(),
        _or(norm_bias, 0.0, theta) * output_scale,
        map_mean.float(),
        count.float(),
    )


def coupling_gradient(
    coupling: BatchCoupling, grad_dot_out: Tensor, grad_shift: Tensor, seqlen_k: int
) -> tuple[Tensor, Tensor]:
    """The term batch statistics add to the gradient of the maps: ``dP += E (P - 1/seqlen_k) + e``.

    ``grad_dot_out[g] = sum dO[g] O[g]`` and ``grad_shift[g] = sum dN[g]``, ``(heads,)``, over the batch of every rank:
    the gradient of the variance is known from them before any sweep over the keys. ``E (heads, heads)``, ``e
    (heads,)``; without dropout ``e`` vanishes in the softmax. Derivation: docs/operator.md, section 4.
    """
    unit, weight, beta, mean, positions = coupling
    # Sums of products and not matmuls: this runs in the backward pass, where autocast may be on and would round these.
    slope = (beta * grad_shift - grad_dot_out) / positions
    coupled = ((unit * slope)[:, None] * unit).sum(-1)
    constant = -(weight * grad_shift).sum(-1) / positions - (coupled * (mean - 1.0 / seqlen_k)).sum(-1)
    return coupled, constant
