"""The reference backend takes everything: its computation is :mod:`reattn.reference`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reattn.backends import Request


def not_supported(request: Request) -> list[str]:
    """No reason, ever."""
    return []
