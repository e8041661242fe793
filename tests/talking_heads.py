"""Attention layers that mix the scores and the maps, of the same structure as the published ones: for the tests."""

import torch
from torch import nn


def over_heads(layer, maps):
    """A linear layer over the heads of ``(batch, heads, i, j)``."""
    return layer(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CaitAttention(nn.Module):
    """As in CaiT: linear layers with bias on scores and maps, and the maps' dropout after both."""

    def __init__(self, dim=24, num_heads=3, drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(drop)
        self.proj_l = nn.Linear(num_heads, num_heads)
        self.proj_w = nn.Linear(num_heads, num_heads)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        self.softmax_maps = over_heads(self.proj_l, query * self.scale @ key.mT).softmax(-1)
        self.mixed_maps = over_heads(self.proj_w, self.softmax_maps)
        out = (self.attn_drop(self.mixed_maps) @ value).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out))


class ClassAttn(nn.Module):
    """As in CaiT's last blocks: the class token's query alone."""

    def __init__(self, dim=24, num_heads=3):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q(x[:, :1]), self.k(x), self.v(x))
        )
        out = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.proj(out)


class Attend(nn.Module):
    """As in x-transformers: convolutions without bias, the one before the softmax beside a residual connection."""

    def __init__(self, heads, pre, post):
        super().__init__()
        self.pre_softmax_talking_heads = nn.Conv2d(heads, heads, 1, bias=False) if pre else None
        self.post_softmax_talking_heads = nn.Conv2d(heads, heads, 1, bias=False) if post else None
        self.residual = True

    def forward(self, query, key, value, mask, causal):
        scores = query @ key.mT * query.shape[-1] ** -0.5
        if self.pre_softmax_talking_heads is not None:
            scores = self.pre_softmax_talking_heads(scores) + (scores if self.residual else 0.0)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        maps = scores.softmax(-1)
        if self.post_softmax_talking_heads is not None:
            maps = self.post_softmax_talking_heads(maps)
        return maps @ value


class SeparateAttention(nn.Module):
    """As in x-transformers: three projections without bias, and the maps in a module of their own."""

    def __init__(self, dim=24, heads=3, pre=True, post=True, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.attend = Attend(heads, pre, post)

    def forward(self, x, mask=None):
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(self.attend(query, key, value, mask, self.causal).transpose(1, 2).flatten(2))
