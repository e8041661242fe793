"""The reference backend takes everything: its computation is :mod:`reattn.reference`."""

from __future__ import annotations

import torch

from reattn.problem import Problem

DEVICE = "any"


def unavailable(device: torch.device) -> list[str]:
    """No reason, ever."""
    return []


def not_supported(problem: Problem) -> list[str]:
    """No reason, ever."""
    return []
