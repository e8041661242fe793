"""What a call asks for, without its tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """One call of the operator but for its tensors: what backends decide by.

    ``norm`` and the numbers are those of :func:`reattn.re_attention`. ``training``: batch norm takes its statistics
    from this batch. ``synchronised``: from those of several ranks. ``mask``: the kind of ``attn_mask``, "bool" or
    "float"; ``mask_gradient``: it is differentiated. ``pre_mixed``: the scores are mixed, by ``pre_theta``.
    ``heads_out``: heads after mixing; None: as many as before. ``called``: what is called on the maps, as a text.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    head_dim: int
    norm: str | None = None
    training: bool = False
    synchronised: bool = False
    mask: str | None = None
    mask_gradient: bool = False
    is_causal: bool = False
    scale: float = 1.0
    output_scale: float = 1.0
    eps: float = 1e-5
    dropout_p: float = 0.0
    momentum: float | None = 0.1
    pre_mixed: bool = False
    heads_out: int | None = None
    called: str | None = None

    @staticmethod
    def of(query: Tensor, **options: Any) -> Problem:
        """The problem of a query ``(batch, heads, seqlen, head_dim)`` and the fields that it does not tell."""
        _, heads, _, head_dim = query.shape
        return Problem(query.device, query.dtype, heads, head_dim, **options)

    @property
    def batch_statistics(self) -> bool:
        """Whether the norm needs sums over the whole batch."""
        return self.norm == "batch" and self.training

    @property
    def most_heads(self) -> int:
        """Before mixing or after it."""
        return max(self.heads, self.heads_out or 0)

    @property
    def masked(self) -> bool:
        """Whether keys may be hidden."""
        return self.mask is not None or self.is_causal
