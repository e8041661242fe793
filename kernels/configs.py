"""Tile configurations, one table, and the choice among them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .tiles import Shape


class Tile(NamedTuple):
    """How a kernel is cut: block of query rows, block of keys, warps, software-pipelining stages, most of head_dim at once."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int = 1
    dim: int = 128


def shape(heads: int, head_dim: int, dim: int, precision: str) -> Shape:
    """The compile-time constants for a problem of which at most ``dim`` columns of head_dim are held at once."""
    padded = 1 << (heads - 1).bit_length()
    pack = max(1, 16 // padded)
    whole = -(-head_dim // 16) * 16
    if whole > dim:
        return Shape(heads, padded, pack, head_dim, dim, 0, -(-head_dim // dim), precision)
    main = 1 << (whole.bit_length() - 1)
    tail = whole - main
    if tail & (tail - 1):  # 112 = 64 + 48: the tail, too, must be a power of two
        main, tail = 2 * main, 0
    return Shape(heads, padded, pack, head_dim, main, tail, 1, precision)


def tile(kernel: str, arch: int, itemsize: int, heads: int, head_dim: int) -> Tile:
    return Tile(16, 16, 8, 1, 128)
