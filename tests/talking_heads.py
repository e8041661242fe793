"""Attention layers that mix the scores and the maps, of the same structure as the published ones: for the tests."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers import TalkingHeads


class CaitAttention(TalkingHeads):
    """As in CaiT; keeps its maps."""

    def __init__(self, dim=24, num_heads=3, drop=0.0):
        super().__init__(dim, num_heads, drop)

    def maps(self, query, key):
        self.softmax_maps, self.mixed_maps = super().maps(query, key)
        return self.softmax_maps, self.mixed_maps


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
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.proj(out)


class Attend(nn.Module):
    """As in x-transformers: convolutions without bias, the one before the softmax beside a residual connection."""

    residual = True

    def __init__(self, heads, pre, post, dropout):
        super().__init__()
        self.attn_fn = partial(F.softmax, dtype=torch.float32)
        self.attn_dropout = nn.Dropout(dropout)
        self.pre_softmax_talking_heads = nn.Conv2d(heads, heads, 1, bias=False) if pre else None
        self.post_softmax_talking_heads = nn.Conv2d(heads, heads, 1, bias=False) if post else None

    def forward(self, query, key, value, seen, bias, causal):
        scores = query @ key.mT * query.shape[-1] ** -0.5
        if self.pre_softmax_talking_heads is not None:
            scores = self.pre_softmax_talking_heads(scores) + (scores if self.residual else 0.0)
        if bias is not None:
            scores = scores + bias
        if seen is not None:
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        maps = self.attn_dropout(self.attn_fn(scores, dim=-1).to(scores.dtype))
        if self.post_softmax_talking_heads is not None:
            maps = self.post_softmax_talking_heads(maps)
        return maps @ value


class SeparateAttention(nn.Module):
    """As in x-transformers: three projections without bias, the maps in a module of their own, and its way of being
    called."""

    def __init__(
        self,
        dim=24,
        dim_head=8,
        heads=3,
        causal=False,
        pre_talking_heads=True,
        post_talking_heads=True,
        dropout=0.0,
        max_attend_past=None,
    ):
        super().__init__()
        self.heads, self.causal, self.max_attend_past = heads, causal, max_attend_past
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, heads * dim_head, bias=False) for _ in range(3))
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.attend = Attend(heads, pre_talking_heads, post_talking_heads, dropout)

    def forward(self, x, context=None, mask=None, context_mask=None, attn_mask=None, rel_pos=None, attn_bias=None):
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v)
        )
        seen = None if mask is None else mask[:, None, None]
        if attn_mask is not None:
            seen = attn_mask if seen is None else seen & attn_mask
        bias = attn_bias if rel_pos is None else rel_pos(x.shape[1], x.shape[1])
        return self.to_out(self.attend(query, key, value, seen, bias, self.causal).transpose(1, 2).flatten(2))
