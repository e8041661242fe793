"""The backends and the choice among them: one predicate serves the automatic choice and an explicit request."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, _GeneratorContextManager, contextmanager

import torch

from reattn.backends import cpu, cuda, reference, triton
from reattn.backends.contract import Backend, FusedBackend
from reattn.problem import Problem

logger = logging.getLogger("reattn")

FUSED: dict[str, FusedBackend] = {"cuda": cuda, "triton": triton, "cpu": cpu}
# In order of preference.
BACKENDS: dict[str, Backend] = {**FUSED, "reference": reference}


def available_backends() -> dict[str, list[str]]:
    """Name -> every reason why that backend cannot run on this machine; an empty list means it can.

    The default device is asked about: CUDA when torch sees one, else the CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: backend.unavailable(device) for name, backend in BACKENDS.items()}


class _Entered(threading.local):
    # Set in each thread: torch.compile guards on it then, and on a class attribute it would not.
    def __init__(self) -> None:
        self.name: str | None = None


_entered = _Entered()


def use_backend(name: str) -> _GeneratorContextManager[None]:
    """A context, or a decorator, in which ``backend="auto"`` stands for the backend of that name.

    It wins over ``REATTN_BACKEND``, loses against a backend that a call or module names itself, and holds in the thread
    that enters it. What ``torch.compile`` compiled outside is compiled anew inside.

    Args:
        name: ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpu"`` or ``"reference"``.

    Raises:
        ValueError: no backend has that name; at once, not when it is entered.
    """
    _check_name(name)
    return _use(name)


def same_backend() -> AbstractContextManager[None]:
    """A context in which "auto" stands for what it does now, entered wherever and whenever."""
    return _use(_entered.name)


@contextmanager
def _use(name: str | None) -> Iterator[None]:
    before, _entered.name = _entered.name, name
    try:
        yield
    finally:
        _entered.name = before


def choose(requested: str, problem: Problem, shapes: str | Callable[[], str]) -> str:
    """The backend that serves a problem: the one asked for, or with "auto" the first that supports it.

    :func:`use_backend`, and then ``REATTN_BACKEND``, replace "auto". For a file that is to run without this package,
    ONNX or TorchScript, "auto" is the reference, which is torch's own operators. Raises ``ValueError`` for an unknown
    name and ``RuntimeError``, with every reason and the shapes, when the backend asked for cannot do it: an explicit
    choice never falls back.
    """
    if requested == "auto":
        requested = _entered.name or os.environ.get("REATTN_BACKEND") or "auto"
    _check_name(requested)
    file = _traced_for()
    if file is not None:
        if requested in FUSED:
            raise RuntimeError(
                f"backend {requested!r} is an operator of this package, which {file} does not have: use "
                'backend="reference", or "auto", which takes it by itself here; reattn.use_backend and REATTN_BACKEND '
                'replace "auto"'
            )
        if file == "ONNX" and (problem.batch_statistics or problem.dropout_p > 0.0):
            raise RuntimeError(
                "an ONNX file holds neither statistics of a batch nor dropout: call eval() on the model before the "
                "export, and let its batch norms track running statistics "
                f"(norm={problem.norm!r}, training={problem.training}, dropout_p={problem.dropout_p})"
            )
        return "reference"
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
    reasons = BACKENDS[requested].not_supported(problem)
    if reasons:
        what = f"{shapes if isinstance(shapes, str) else shapes()}, {problem.dtype} on {problem.device}"
        raise RuntimeError(f"backend {requested!r} cannot run this: {'; '.join(reasons)} ({what})")
    return requested


def _check_name(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, got {name!r}")


def _traced_for() -> str | None:
    """The format of a file that knows torch's own operators alone, where a call is traced for one."""
    if torch.compiler.is_compiling():
        return "ONNX" if exporting_onnx() else None
    return ("ONNX" if exporting_onnx() else "TorchScript") if torch.jit.is_tracing() else None  # type: ignore[attr-defined]


def exporting_onnx() -> bool:
    """Whether ``torch.onnx.export`` is at work, by either exporter."""
    return torch.onnx.is_in_onnx_export()


# torch.compile takes torch's function to be False; what is marked is called.
exporting_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _log_fallback(reasons: str) -> None:
    """Once for each set of reasons, not once a call."""
    logger.warning("re_attention runs on the reference backend, which materialises every map: %s", reasons)
