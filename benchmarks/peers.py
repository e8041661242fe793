"""What re-attention is measured against: its published forms in PyTorch, and plain attention as the floor.

Every peer is a function of ``(query, key, value, parameters)``: query, key and value ``(batch, heads, seqlen,
head_dim)`` of one floating dtype, :class:`Parameters` in float32 (float64 with float64 inputs). It returns ``(batch,
heads, seqlen, head_dim)`` in the dtype of query. Peers compute in that dtype, as a model cast to it does, with the
fewest passes over the maps that the published forms allow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
MOMENTUM = 0.1


class Parameters(NamedTuple):
    """``theta (heads, heads)``, rows are heads before mixing; the others ``(heads,)``, None where a form has none."""

    theta: Tensor
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None


Peer = Callable[[Tensor, Tensor, Tensor, Parameters], Tensor]


def official(query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> Tensor:
    """The official form in training: 1x1 convolution with bias, batch norm by the statistics of the batch."""
    return _batch_norm(_mix_by_convolution(query, key, parameters), parameters, training=True) @ value


def official_eval(query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> Tensor:
    """The official form in eval: batch norm by the running statistics."""
    return _batch_norm(_mix_by_convolution(query, key, parameters), parameters, training=False) @ value


def second_form(query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> Tensor:
    """The second form: mixed by an einsum without bias, LayerNorm over the heads, between two permutations."""
    probs = _softmax(query, key)
    maps = torch.einsum("bhij,hg->bgij", probs, parameters.theta.to(probs.dtype)).permute(0, 2, 3, 1)
    # CUDA's LayerNorm takes parameters of its input's dtype only.
    affine = (None if p is None else p.to(maps.dtype) for p in (parameters.norm_weight, parameters.norm_bias))
    return F.layer_norm(maps, maps.shape[-1:], *affine, EPS).permute(0, 3, 1, 2) @ value


def without_norm(query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> Tensor:
    """Talking heads after the softmax: mixed, not normalised."""
    return _mix_by_convolution(query, key, parameters) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> Tensor:
    """Plain softmax attention by PyTorch's fused kernels: no mixing, so not the same function but its floor."""
    return F.scaled_dot_product_attention(query, key, value)


# The eager form of every norm that is measured; "batch" is in training.
EAGER: dict[str, Peer] = {
    "batch": official,
    "batch-eval": official_eval,
    "layer": second_form,
    "none": without_norm,
}


def by_name(name: str, norm: str, compiler: str = "inductor") -> Peer:
    """The peer "eager", "compiled", "one-sample-at-a-time" or "sdpa"; "compiled" discards what was compiled before."""
    if name == "compiled":
        # Dynamo gives up after a few compilations of one function, and every problem is one.
        torch.compiler.reset()
        return compiled(EAGER[norm], compiler)
    return {"eager": EAGER[norm], "one-sample-at-a-time": one_sample_at_a_time(norm), "sdpa": sdpa}[name]


def compiled(peer: Peer, compiler: str = "inductor") -> Peer:
    """``torch.compile`` of a peer, for the very shapes it meets; ``compiler`` is torch.compile's backend."""
    return torch.compile(peer, fullgraph=True, dynamic=False, backend=compiler)


def one_sample_at_a_time(norm: str) -> Peer:
    """The eager form in a loop over the batch, whose maps then fit into a cache."""
    if norm == "batch":
        return _official_by_sample
    eager = EAGER[norm]

    def peer(query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> Tensor:
        samples = zip(query.split(1), key.split(1), value.split(1), strict=True)
        return torch.cat([eager(*sample, parameters) for sample in samples])

    return peer


def _official_by_sample(query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> Tensor:
    """Two loops: statistics span the batch, and are put together from those of the samples (law of total variance)."""
    samples = zip(query.split(1), key.split(1), strict=True)
    # In the parameters' precision, for the gradient's sake: its three terms cancel, and must be summed before rounding.
    maps = [_mix_by_convolution(*sample, parameters).to(parameters.theta.dtype) for sample in samples]
    moments = [torch.var_mean(sample, (0, 2, 3), correction=0) for sample in maps]
    variances, means = (torch.stack(moment) for moment in zip(*moments, strict=True))
    mean = means.mean(0)
    var = variances.mean(0) + (means - mean).square().mean(0)
    if parameters.running_mean is not None and parameters.running_var is not None:
        count = len(maps) * maps[0].shape[2] * maps[0].shape[3]
        parameters.running_mean.lerp_(mean.detach(), MOMENTUM)
        parameters.running_var.lerp_(var.detach() * (count / (count - 1)), MOMENTUM)
    by_batch = parameters._replace(running_mean=mean, running_var=var)
    slope, shift = _affine(by_batch)
    normalised = ((sample * slope + shift).to(value.dtype) for sample in maps)
    return torch.cat([sample @ v for sample, v in zip(normalised, value.split(1), strict=True)])


def _affine(parameters: Parameters) -> tuple[Tensor, Tensor]:
    """Batch norm as ``maps * slope + shift``, each ``(heads, 1, 1)``."""
    assert parameters.running_mean is not None and parameters.running_var is not None
    slope = (parameters.running_var + EPS).rsqrt()
    if parameters.norm_weight is not None:
        slope = slope * parameters.norm_weight
    shift = -parameters.running_mean * slope
    if parameters.norm_bias is not None:
        shift = shift + parameters.norm_bias
    return slope[:, None, None], shift[:, None, None]


def _softmax(query: Tensor, key: Tensor) -> Tensor:
    return ((query @ key.mT) * query.shape[-1] ** -0.5).softmax(-1)


def _mix_by_convolution(query: Tensor, key: Tensor, parameters: Parameters) -> Tensor:
    probs = _softmax(query, key)
    bias = None if parameters.bias is None else parameters.bias.to(probs.dtype)
    return F.conv2d(probs, parameters.theta.mT[:, :, None, None].to(probs.dtype), bias)


def _batch_norm(maps: Tensor, parameters: Parameters, training: bool) -> Tensor:
    _, _, weight, bias, mean, var = parameters
    return F.batch_norm(maps, mean, var, weight, bias, training, MOMENTUM, EPS)
