"""What the backends do to tensors alike."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_heads_last(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised ``(batch, heads, seqlen, head_dim)`` in ``(batch, seqlen, heads, head_dim)`` memory order, in the
    dtype of ``like`` unless another is given."""
    batch, heads, seqlen, head_dim = like.shape
    return like.new_empty(batch, seqlen, heads, head_dim, dtype=dtype).transpose(1, 2)


def address(tensor: Tensor | None) -> int:
    """Of the first element, as the extensions take it; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
