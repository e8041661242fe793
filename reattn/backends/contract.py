"""What every backend provides, and what the fused ones are given and return."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from reattn.problem import Problem

# Query, key, value, or their gradients.
Maps = tuple[Tensor, Tensor, Tensor]


class Inputs(NamedTuple):
    """The tensors of a call, as :func:`reattn.re_attention` takes them.

    ``seed``: one int64 on the device, given exactly when something is dropped. ``attn_mask``: four dimensions, each of
    size 1 or that of the maps ``(batch, heads, seqlen, seqlen_k)``; boolean, or in the dtype of ``query``, where
    :func:`lowest` hides. With ``is_causal`` it hides beside that. ``pre_theta``: what mixes the scores, before mask and
    softmax; its bias changes nothing and is no part of them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    theta: Tensor
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    seed: Tensor | None = None
    attn_mask: Tensor | None = None
    pre_theta: Tensor | None = None


def lowest(dtype: torch.dtype) -> float:
    """The largest number of an additive mask that hides a key: what libraries write in place of -infinity."""
    return torch.finfo(dtype).min


class Outputs(NamedTuple):
    """What a forward pass leaves. The last two are empty where there are no batch statistics.

    ``out (batch, heads_out, seqlen, head_dim)`` in ``(batch, seqlen, heads_out, head_dim)`` memory order; ``lse (batch,
    heads, seqlen)``: log-sum-exp of the scores, to base 2, float32; -infinity for a query that sees no key.
    ``statistics (3, heads_out)``, float64: of the mixed maps less their bias, sum, sum of squares and number of the
    positions that are not hidden, by head; once they are final, the mean less what 1 / seqlen_k as maps would give,
    1 / standard deviation, and the number again. ``value_sum (batch, heads_out, rows, head_dim)``, float32: the sum of
    value over the keys that are not hidden; a row for each query where what is hidden differs between them, else one.
    """

    out: Tensor
    lse: Tensor
    statistics: Tensor
    value_sum: Tensor


class Gradients(NamedTuple):
    """In the dtypes of what they are the gradients of; empty for what is None."""

    query: Tensor
    key: Tensor
    value: Tensor
    theta: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    attn_mask: Tensor  # empty, too, unless ``mask_gradient``
    pre_theta: Tensor


class Backend(Protocol):
    """Every backend answers these. ``DEVICE``: the kind of device it is made for."""

    DEVICE: str

    def unavailable(self, device: torch.device) -> list[str]:
        """Every reason why this backend cannot run on a device, whatever the call; empty when it can."""
        ...

    def not_supported(self, problem: Problem) -> list[str]:
        """Every reason why this backend cannot serve a call, those of its device included; empty when it can."""
        ...


class FusedBackend(Backend, Protocol):
    """A direction is one call, of :meth:`forward` or :meth:`backward`. Batch statistics of several ranks need two: the
    other two methods stand before and after the all-reduce."""

    def forward(self, problem: Problem, inputs: Inputs) -> Outputs:
        """The output. Batch norm in training updates the running statistics; where it is synchronised, ``out`` and
        ``statistics`` are what :meth:`finish` needs, and nothing is updated yet."""
        ...

    def finish(self, problem: Problem, inputs: Inputs, unfinished: Outputs) -> Tensor:
        """Makes ``unfinished.out`` the output, in place, from statistics that were summed over ranks, and updates the
        running statistics. Returns the final statistics."""
        ...

    def grad_sums(self, problem: Problem, grad: Tensor, outputs: Outputs) -> Tensor:
        """``(2, heads_out)``, float64: sums of ``grad * out``, and of ``grad`` times the sum of value over the keys."""
        ...

    def backward(
        self,
        problem: Problem,
        grad: Tensor,
        inputs: Inputs,
        outputs: Outputs,
        sums: Tensor | None,
        into: Maps | None = None,
    ) -> Gradients:
        """All gradients. ``sums``: as :meth:`grad_sums` returns them, summed over ranks; None: of this batch.
        ``outputs.out`` is not read where there are no batch statistics. ``into``: tensors that take the gradients of
        query, key and value; rows contiguous, and as far apart as in tensors that torch has just allocated: they are
        written 16 bytes at a time."""
        ...
