"""Tile configurations: one table, and the choice among its rows.

Every row fits the shared memory of each architecture it serves, and in 16 bits, up to 16 heads, compiles with next to
no spills in a loop, with dropout too unless the row says otherwise; float32 and more heads spill more. ``python -m
benchmarks.compile_report`` shows what each row costs, with the Triton release that it imports, and has the limits.
Which of several such rows is fastest has not been measured on a GPU yet: they were chosen for tall blocks of query
rows, since keys and values are read again for every block.
"""

from __future__ import annotations

from typing import NamedTuple

from .tiles import Shape


class Tile(NamedTuple):
    """How a kernel is cut: block of query rows, block of keys (the LSE has its own, ``scores.LSE_KEYS``), warps,
    pipelining stages, most of head_dim held at once."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int = 8
    num_stages: int = 1
    dim: int = 128


class Row(NamedTuple):
    """A tile, and the largest problem it is for: bytes an element, heads, head_dim; whether 100 KB of shared memory do;
    and whether registers suffice for dropout, or mixing before the softmax, which take some dozen more."""

    itemsize: int
    heads: int
    head_dim: int
    tile: Tile
    small: bool = True
    dropout: bool = True


# Kernels of which a program takes some heads, as many as it has warps, and all of head_dim.
BY_HEAD = ("grad_query", "grad_key")

# By kernel; the first row that holds the problem is taken.
TABLE: dict[str, tuple[Row, ...]] = {
    "forward": (
        Row(2, 8, 32, Tile(64, 16, 8, 2)),
        Row(2, 4, 64, Tile(32, 32, 8, 2)),
        Row(2, 8, 64, Tile(32, 16, 8, 2)),
        Row(2, 16, 32, Tile(32, 16, 8, 2), dropout=False),
        Row(2, 16, 64, Tile(32, 16, 8, 2), small=False, dropout=False),
        Row(2, 16, 48, Tile(16, 16, 8, 2)),
        Row(2, 16, 64, Tile(16, 16)),
        Row(2, 16, 128, Tile(16, 16, dim=64)),
        Row(2, 32, 128, Tile(16, 16, dim=16)),
        Row(4, 8, 128, Tile(32, 16, dim=16)),
        Row(4, 16, 128, Tile(16, 16, dim=16)),
        Row(4, 32, 128, Tile(4, 16, dim=16)),
    ),
    "grad_maps": (
        Row(2, 8, 64, Tile(32, 16)),
        Row(2, 16, 32, Tile(16, 16, 8, 2), dropout=False),
        Row(2, 16, 64, Tile(16, 16, 8, 2), small=False, dropout=False),
        Row(2, 16, 64, Tile(16, 16), dropout=False),
        Row(2, 16, 48, Tile(8, 16, 8, 2)),
        Row(2, 16, 64, Tile(8, 16)),
        Row(2, 8, 128, Tile(16, 16, dim=32)),
        Row(2, 16, 128, Tile(8, 16, dim=32)),
        Row(2, 32, 128, Tile(4, 16, dim=16)),
        Row(4, 4, 128, Tile(32, 16, dim=16)),
        Row(4, 16, 128, Tile(16, 16, dim=16)),
        Row(4, 32, 128, Tile(4, 16, dim=16)),
    ),
    "grad_scores": (
        Row(2, 16, 64, Tile(32, 16)),
        Row(2, 8, 128, Tile(16, 16, dim=32)),
        Row(2, 16, 128, Tile(8, 16, dim=32)),
        Row(2, 32, 128, Tile(4, 16, dim=16)),
        Row(4, 4, 128, Tile(32, 16, dim=16)),
        Row(4, 16, 128, Tile(16, 16, dim=16)),
        Row(4, 32, 128, Tile(4, 16, dim=16)),
    ),
    "grad_query": (
        Row(2, 32, 64, Tile(32, 16, 4, 2)),
        Row(2, 32, 128, Tile(16, 16, 4, 2)),
        Row(4, 32, 128, Tile(8, 16, 4)),
    ),
    "grad_key": (
        Row(2, 32, 32, Tile(16, 64, 4, 2)),
        Row(2, 32, 64, Tile(16, 32, 4, 2)),
        Row(2, 32, 128, Tile(16, 16, 4, 2)),
        Row(4, 32, 64, Tile(16, 16, 4)),
        Row(4, 32, 128, Tile(16, 8, 4)),
    ),
}

# Of the kernels that sum what others left: warps; partial sums that a program of ``unfold_kernel`` adds at once.
SUMS_TILE = Tile(0, 0, 4)
UNFOLD_BLOCK = 32


# Architectures whose blocks have 163 KB of shared memory, and on which the larger tiles do not spill (on sm_100 they
# do); others are held to 99 KB.
_LARGE_SHARED = (80, 87, 90)


def tile(kernel: str, arch: int, itemsize: int, heads: int, head_dim: int, more_registers: bool = False) -> Tile:
    """The table's tile for a problem, on an architecture (80 for sm_80). ``heads``: before or after mixing, the larger
    number. ``more_registers``: for dropout, or mixing before the softmax."""
    for row in TABLE[kernel]:
        fits = row.itemsize == itemsize and heads <= row.heads and head_dim <= row.head_dim
        if fits and (row.small or arch in _LARGE_SHARED) and (row.dropout or not more_registers):
            return row.tile
    raise LookupError(f"{kernel} has no tile for {heads} heads of {head_dim}, {itemsize} bytes an element")


def candidates(kernel: str, itemsize: int, heads: int) -> list[Tile]:
    """What tuning tries: every tile the table holds for this kernel and dtype, and its neighbours in warps and
    stages."""
    pack = max(1, 16 // padded(heads))
    rows = {row.tile for row in TABLE[kernel] if row.itemsize == itemsize}
    varied = {
        cut._replace(num_warps=warps, num_stages=stages) for cut in rows for warps in (4, 8, 16) for stages in (1, 2, 3)
    }
    return sorted(cut for cut in varied if pack <= cut.BLOCK_M)


def padded(heads: int) -> int:
    """The next power of two."""
    return 1 << (heads - 1).bit_length()


def shape(
    heads: int,
    head_dim: int,
    dim_loaded: int,
    dim: int,
    precision: str,
    *,
    wide: bool,
    norm: str,
    training: bool,
    heads_out: int | None = None,
    pre_mixed: bool = False,
    mask: str = "none",
    mask_heads: bool = False,
    mask_rows: bool = False,
    causal: bool = False,
) -> Shape:
    """The compile-time constants for a problem of which at most ``dim`` columns of head_dim are held at once.

    ``dim_loaded``: columns that may be read, the rest being zero; ``wide``: offsets within a tile need 64 bits.
    """
    whole = -(-head_dim // 16) * 16
    main, tail, chunks = 1 << (whole.bit_length() - 1), 0, 1
    if whole > dim:
        main, chunks = dim, -(-whole // dim)
    elif whole > main:
        tail = whole - main
        if tail & (tail - 1):  # 112 = 64 + 48: the tail, too, must be a power of two
            main, tail = 2 * main, 0
    heads_out = heads if heads_out is None else heads_out
    heads_padded = padded(max(heads, heads_out))
    pack = max(1, 16 // heads_padded)
    dims = head_dim, dim_loaded, main, tail, chunks
    masked = mask != "none"
    clear = (masked or causal) and mask != "float" and not mask_heads and not mask_rows
    # A key that is hidden from one head is no less needed for the mixed scores of the others.
    by_key = masked and not mask_rows and not (mask_heads and pre_mixed)
    by_row = mask_rows or mask_heads or causal or (masked and not by_key)
    masks = mask, mask_heads, mask_rows, causal, masked or causal, by_key, by_row, clear
    return Shape(heads, heads_out, heads_padded, pack, *dims, precision, wide, norm, training, *masks, pre_mixed)


def sums_blocks(head_dim: int) -> dict[str, int]:
    """How the kernels in sums.py cut their work: rows of a head at once, partial sums at once, columns."""
    dim = max(16, padded(head_dim))
    return {"ROWS": 2048 // dim, "BLOCK": 512, "DIM": dim}
