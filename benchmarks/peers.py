"""What re-attention is measured against: its published forms in PyTorch, and plain attention as the floor.

Every peer is a function of ``(query, key, value, parameters)``: query, key and value ``(batch, heads, seqlen,
head_dim)`` of one floating dtype, :class:`Parameters` in float32 (float64 with float64 inputs). It returns ``(batch,
heads, seqlen, head_dim)`` in the dtype of query. Peers compute in that dtype, as a model cast to it does, with the
fewest passes over the maps that the published forms allow. Masks let every query see a key, and additive ones hide
nothing; one sample at a time takes none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5
MOMENTUM = 0.1


class Parameters(NamedTuple):
    """``theta (heads, heads)``, rows are heads before mixing; the others ``(heads,)``, None where a form has none.

    ``attn_mask``, boolean or in the dtype of query, and ``is_causal`` as in :func:`reattn.re_attention`.
    """

    theta: Tensor
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    attn_mask: Tensor | None = None
    is_causal: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {name: each for name, each in self._asdict().items() if isinstance(each, Tensor)}

    def double(self) -> Parameters:
        """The same in float64."""
        return self._replace(**{n: t.double() for n, t in self.tensors().items() if t.is_floating_point()})


Peer = Callable[[Tensor, Tensor, Tensor, Parameters], Tensor]


def official(query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> Tensor:
    """The official form in training: 1x1 convolution with bias, batch norm by the statistics of the batch."""
    maps, visible = _mix_by_convolution(query, key, parameters), _visible(query, key, parameters)
    if visible is not None:
        # Of what is visible alone; torch's batch norm knows no mask. In the parameters' precision, as that is.
        wide, taken = maps.to(parameters.theta.dtype), visible.expand_as(maps)
        count = taken.sum((0, 2, 3), dtype=wide.dtype)
        mean = (wide * taken).sum((0, 2, 3)) / count
        var = ((wide - mean[:, None, None]) * taken).square().sum((0, 2, 3)) / count
        slope, shift = _affine(_with_statistics(parameters, mean, var, count))
        return (wide * slope + shift).to(maps.dtype).masked_fill(~visible, 0) @ value
    return _batch_norm(maps, parameters, training=True) @ value


def official_eval(query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> Tensor:
    """The official form in eval: batch norm by the running statistics."""
    maps = _batch_norm(_mix_by_convolution(query, key, parameters), parameters, training=False)
    return _hide(maps, query, key, parameters) @ value


def second_form(query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> Tensor:
    """The second form: mixed by an einsum without bias, LayerNorm over the heads, between two permutations."""
    probs = _softmax(query, key, parameters)
    maps = torch.einsum("bhij,hg->bgij", probs, parameters.theta.to(probs.dtype)).permute(0, 2, 3, 1)
    # CUDA's LayerNorm takes parameters of its input's dtype only.
    affine = (None if p is None else p.to(maps.dtype) for p in (parameters.norm_weight, parameters.norm_bias))
    maps = F.layer_norm(maps, maps.shape[-1:], *affine, EPS).permute(0, 3, 1, 2)
    return _hide(maps, query, key, parameters) @ value


def without_norm(query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> Tensor:
    """Talking heads after the softmax: mixed, not normalised."""
    return _hide(_mix_by_convolution(query, key, parameters), query, key, parameters) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> Tensor:
    """Plain softmax attention by PyTorch's fused kernels: no mixing, so not the same function but its floor."""
    mask = parameters.attn_mask
    if mask is not None and mask.ndim == 3:
        mask = mask[None]  # its fused kernels take none of three dimensions
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=parameters.is_causal)


def without_mask(peer: Peer) -> Peer:
    """The same of parameters without their mask."""

    def unmasked(query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> Tensor:
        return peer(query, key, value, parameters._replace(attn_mask=None, is_causal=False))

    return unmasked


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
    count = len(maps) * maps[0].shape[2] * maps[0].shape[3]
    slope, shift = _affine(_with_statistics(parameters, mean, var, count))
    normalised = ((sample * slope + shift).to(value.dtype) for sample in maps)
    return torch.cat([sample @ v for sample, v in zip(normalised, value.split(1), strict=True)])


def _with_statistics(parameters: Parameters, mean: Tensor, var: Tensor, count: Tensor | int) -> Parameters:
    """Parameters with a batch's statistics in place of the running ones, which these update."""
    if parameters.running_mean is not None and parameters.running_var is not None:
        parameters.running_mean.lerp_(mean.detach(), MOMENTUM)
        parameters.running_var.lerp_(var.detach() * (count / (count - 1)), MOMENTUM)
    return parameters._replace(running_mean=mean, running_var=var)


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


def _visible(query: Tensor, key: Tensor, parameters: Parameters) -> Tensor | None:
    """Boolean, broadcastable to the maps; None where nothing is hidden."""
    mask = parameters.attn_mask
    visible = mask if mask is not None and mask.dtype == torch.bool else None
    if parameters.is_causal:
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        visible = causal if visible is None else visible & causal
    return visible


def _hide(maps: Tensor, query: Tensor, key: Tensor, parameters: Parameters, value: float = 0.0) -> Tensor:
    visible = _visible(query, key, parameters)
    return maps if visible is None else maps.masked_fill(~visible, value)


def _softmax(query: Tensor, key: Tensor, parameters: Parameters) -> Tensor:
    scores, mask = (query @ key.mT) * query.shape[-1] ** -0.5, parameters.attn_mask
    if mask is not None and mask.is_floating_point():
        scores = scores + mask
    return _hide(scores, query, key, parameters, float("-inf")).softmax(-1)


def _mix_by_convolution(query: Tensor, key: Tensor, parameters: Parameters) -> Tensor:
    probs = _softmax(query, key, parameters)
    bias = None if parameters.bias is None else parameters.bias.to(probs.dtype)
    return F.conv2d(probs, parameters.theta.mT[:, :, None, None].to(probs.dtype), bias)


def _batch_norm(maps: Tensor, parameters: Parameters, training: bool) -> Tensor:
    _, _, weight, bias, mean, var, *_ = parameters
    return F.batch_norm(maps, mean, var, weight, bias, training, MOMENTUM, EPS)


class TalkingHeads(nn.Module):
    """CaiT's attention, as timm has it: linear layers with bias over the heads of the scores and of the maps."""

    def __init__(self, dim: int, num_heads: int, drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(drop)
        self.proj_l = nn.Linear(num_heads, num_heads)
        self.proj_w = nn.Linear(num_heads, num_heads)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def maps(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the softmax, and mixed."""
        softmax_maps = over_heads(self.proj_l, query * self.scale @ key.mT).softmax(-1)
        return softmax_maps, over_heads(self.proj_w, softmax_maps)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = (self.attn_drop(self.maps(query, key)[1]) @ value).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out))


def over_heads(layer: nn.Module, maps: Tensor) -> Tensor:
    """A linear layer over the heads of ``(batch, heads, i, j)``."""
    return layer(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
