"""The backends and the choice among them: one predicate serves the automatic choice and an explicit request."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable

import torch

from reattn.backends import cpu, cuda, reference, triton
from reattn.backends.contract import Backend, FusedBackend
from reattn.problem import Problem

logger = logging.getLogger("reattn")

FUSED: dict[str, FusedBackend] = {"triton": triton, "cuda": cuda, "cpu": cpu}
# In order of preference.
BACKENDS: dict[str, Backend] = {**FUSED, "reference": reference}


def available_backends() -> dict[str, list[str]]:
    """Name -> every reason why that backend cannot run on this machine; an empty list means it can.

    The default device is asked about: CUDA when torch sees one, else the CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: backend.unavailable(device) for name, backend in BACKENDS.items()}


def choose(requested: str, problem: Problem, shapes: str | Callable[[], str]) -> str:
    """The backend that serves a problem: the one asked for, or with "auto" the first that supports it.

    ``REATTN_BACKEND`` replaces "auto". Raises ``ValueError`` for an unknown name and ``RuntimeError``, with every
    reason and the shapes, when the backend asked for cannot do it: an explicit choice never falls back.
    """
    if requested == "auto":
        requested = os.environ.get("REATTN_BACKEND") or "auto"
    if requested == "auto":
        refusals: dict[str, list[str]] = {}
        for name, backend in BACKENDS.items():
            reasons = backend.not_supported(problem)
            if not reasons:
                # A graph being traced cannot log; the same call outside one does.
                if name == "reference" and not torch.compiler.is_compiling():
                    # What is made for another kind of device has nothing to say.
                    own = [other for other in refusals if problem.device.type == BACKENDS[other].DEVICE]
                    _log_fallback("; ".join(f"{other}: {', '.join(refusals[other])}" for other in own or refusals))
                return name
            refusals[name] = reasons
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, got {requested!r}")
    reasons = BACKENDS[requested].not_supported(problem)
    if reasons:
        what = f"{shapes if isinstance(shapes, str) else shapes()}, {problem.dtype} on {problem.device}"
        raise RuntimeError(f"backend {requested!r} cannot run this: {'; '.join(reasons)} ({what})")
    return requested


@functools.cache
def _log_fallback(reasons: str) -> None:
    """Once for each set of reasons, not once a call."""
    logger.warning("re_attention runs on the reference backend, which materialises every map: %s", reasons)
