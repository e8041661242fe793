"""The backends and the choice among them: one predicate serves the automatic choice and an explicit request."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from reattn.backends import cpu, cuda, reference, triton

logger = logging.getLogger("reattn")


@dataclass(frozen=True)
class Request:
    """What a call asks of a backend; ``None`` stands for "any", as in :func:`available_backends`."""

    device: torch.device
    dtype: torch.dtype | None = None
    heads: int | None = None
    head_dim: int | None = None
    masked: bool = False


class Backend(Protocol):
    """Every backend answers this; the fused ones compute the canonical form too (:class:`FusedBackend`), and name the
    kind of ``DEVICE`` they are made for."""

    def not_supported(self, request: Request) -> list[str]:
        """Every reason why this backend cannot serve the request; empty when it can."""
        ...


class FusedBackend(Backend, Protocol):
    """Forward and backward over canonical tensors, and the sums from which batch statistics are known.

    ``query``, ``key``, ``value``, ``out``, ``grad``: ``(batch, heads, seqlen, head_dim)``, any strides, one dtype.
    ``weight (heads, heads)``, ``shift``, ``gamma``, ``beta (heads,)``: float32, contiguous. ``lse (batch, heads,
    seqlen)``: float32, to base 2. ``seed``: one int64 on the device, given exactly when ``dropout_p > 0``.
    With ``gamma``, weight and shift sum to zero over the heads after mixing, and so do their gradients.
    """

    def statistics(
        self, query: Tensor, key: Tensor, seed: Tensor | None, scale: float, dropout_p: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of P - 1/seqlen_k ``(heads,)``, of its products over pairs of heads ``(heads, heads)``, both float64;
        and the LSE."""
        ...

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor,
        shift: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        lse: Tensor | None,
        seed: Tensor | None,
        scale: float,
        eps: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        """The output, in ``(batch, seqlen, heads, head_dim)`` memory order, and the LSE."""
        ...

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor,
        shift: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        coupled: Tensor | None,
        constant: Tensor | None,
        lse: Tensor,
        seed: Tensor | None,
        scale: float,
        eps: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of query, key, value, weight, shift, gamma, beta; the last two empty when there is no gamma."""
        ...

    def grad_dot_out(self, grad: Tensor, out: Tensor) -> Tensor:
        """``sum grad * out`` by head: ``(heads,)``, float32."""
        ...


# In order of preference.
BACKENDS: dict[str, ModuleType] = {"triton": triton, "cuda": cuda, "cpu": cpu, "reference": reference}


def fused(name: str) -> FusedBackend:
    """The fused backend of that name."""
    return cast(FusedBackend, BACKENDS[name])


def available_backends() -> dict[str, list[str]]:
    """Name -> every reason why that backend cannot run on this machine; an empty list means it can.

    The default device is asked about: CUDA when torch sees one, else the CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: backend.not_supported(Request(device)) for name, backend in BACKENDS.items()}


def choose(requested: str, request: Request, shapes: str) -> str:
    """The backend that serves a request: the one asked for, or with "auto" the first that supports the inputs.

    ``REATTN_BACKEND`` replaces "auto". Raises ``ValueError`` for an unknown name and ``RuntimeError``, with every
    reason and
    the shapes, when the backend asked for cannot do it: an explicit choice never falls back.
    """
    if requested == "auto":
        requested = os.environ.get("REATTN_BACKEND") or "auto"
    if requested == "auto":
        refusals: dict[str, list[str]] = {}
        for name, backend in BACKENDS.items():
            reasons = backend.not_supported(request)
            if not reasons:
                # A graph being traced cannot log; the same call outside one does.
                if name == "reference" and not torch.compiler.is_compiling():
                    # What is made for another kind of device has nothing to say.
                    own = [other for other in refusals if request.device.type == BACKENDS[other].DEVICE]
                    _log_fallback("; ".join(f"{other}: {', '.join(refusals[other])}" for other in own or refusals))
                return name
            refusals[name] = reasons
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, got {requested!r}")
    reasons = BACKENDS[requested].not_supported(request)
    if reasons:
        raise RuntimeError(f"backend {requested!r} cannot run this: {'; '.join(reasons)} ({shapes})")
    return requested


@functools.cache
def _log_fallback(reasons: str) -> None:
    """Once for each set of reasons, not once a call."""
    logger.warning("re_attention runs on the reference backend, which materialises every map: %s", reasons)
