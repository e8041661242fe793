"""The forward kernel."""

import triton
import triton.language as tl

from .fold import load_mixing, normalise
from .scores import map_tile, row_lse
from .tiles import (
    accumulate,
    is_finite,
    load_rows,
    per_row_pointers,
    poison_rows,
    rows_inside,
    store_rows,
    sum_by_halves,
    to_head_major,
    which_block,
    zero_rows,
)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    norm,
    lse_ptr,
    seed_ptr,
    sums_ptr,
    scale_log2,
    dropout_p,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """One block of query rows, all heads: the LSE in one sweep over the keys, the output in a second.

    Batch norm in training: what the mixed maps make of the values, of which ``finish_kernel`` makes the output; and
    sums of the mixed maps and of their squares, by head, to (2 * HEADS, programs).
    """
    HEADS_PACKED: tl.constexpr = SHAPE.PACK * SHAPE.HEADS_PADDED
    batch, row_start = which_block(q.seqlen, BLOCK_M)
    chunk = tl.program_id(1) if SHAPE.CHUNKS > 1 else 0
    q_tile = load_rows(q, batch, row_start, 0, BLOCK_M, SHAPE)
    lse = row_lse(q_tile, q, row_start, k, batch, scale_log2, BLOCK_M, BLOCK_N, SHAPE)
    lse_block, row_mask = per_row_pointers(lse_ptr, batch, row_start, q.seqlen, BLOCK_M, SHAPE)
    tl.store(lse_block, lse, mask=row_mask)

    dtype: tl.constexpr = q.ptr.dtype.element_ty
    mixing = load_mixing(norm, 1.0 / k.seqlen, dtype, SHAPE, False)
    out_main, out_tail = zero_rows(BLOCK_M, SHAPE)
    # Fewer sums than rows, which would take registers: those of rows that a thread has alike. Of float32 no thread has
    # any.
    SUMS: tl.constexpr = BLOCK_M // SHAPE.PACK if dtype == tl.float32 else min(BLOCK_M // SHAPE.PACK, 8)
    sums = tl.full((SUMS, HEADS_PACKED), 0.0, dtype=tl.float32)
    squares = sums
    for start in range(0, k.seqlen, BLOCK_N):
        k_tile = load_rows(k, batch, start, 0, BLOCK_N, SHAPE)
        _, _, centred = map_tile(
            q_tile, q, row_start, k_tile, k, start, batch, lse, seed_ptr, scale_log2, dropout_p, dtype,
            BLOCK_M, BLOCK_N, SHAPE,
        )  # fmt: skip
        # A key outside the sequence gets some finite weight here, and its value is loaded as zero.
        normed, _, _ = normalise(centred, mixing, norm, SHAPE, False)
        if SHAPE.TRAINING:
            columns = start + tl.arange(0, BLOCK_N)
            summed = tl.where((columns < k.seqlen)[None, None, :], normed, 0.0)
            inside = rows_inside(row_start, q.seqlen, BLOCK_M, SHAPE)
            sums += sum_rows(tl.where(inside, tl.sum(summed, axis=2), 0.0), SUMS)
            squares += sum_rows(tl.where(inside, tl.sum(summed * summed, axis=2), 0.0), SUMS)
        normed = to_head_major(normed.to(dtype), SHAPE)
        v_tile = load_rows(v, batch, start, chunk, BLOCK_N, SHAPE)
        out_main, out_tail = accumulate(out_main, out_tail, normed, v_tile, SHAPE)
    out_main = poison_rows(out_main, lse, SHAPE)
    out_tail = poison_rows(out_tail, lse, SHAPE)
    store_rows(out, batch, row_start, chunk, out_main, out_tail, BLOCK_M, SHAPE)
    if SHAPE.TRAINING:
        # Every chunk's program stores the same values here.
        store_head_sums(sums_ptr, 0, sums, lse, row_mask, SHAPE)
        store_head_sums(sums_ptr, SHAPE.HEADS, squares, lse, row_mask, SHAPE)


@triton.jit
def sum_rows(tile, ROWS: tl.constexpr):
    """[.., HEADS] -> [ROWS, HEADS]: sums of every ROWS-th row."""
    if tile.shape[0] > ROWS:
        tile = tl.sum(tl.reshape(tile, (tile.shape[0] // ROWS, ROWS, tile.shape[1])), axis=0)
    return tile


@triton.jit
def store_head_sums(ptr, first, sums, lse, row_mask, SHAPE: tl.constexpr):
    """This program's sums by head, [BLOCK_M / PACK, PACK * HEADS_PADDED] by row and head, to column first + head of
    (.., programs); NaN if the softmax of a row is."""
    total = sum_by_halves(tl.reshape(sums, (sums.shape[0] * SHAPE.PACK, SHAPE.HEADS_PADDED)))
    if SHAPE.PACK > 1:
        broken = tl.sum(tl.sum(tl.where(is_finite(lse) | ~row_mask, 0, 1), axis=1), axis=0)
        total = tl.where(broken > 0, float("nan"), total)
    heads = tl.arange(0, SHAPE.HEADS_PADDED)
    pointers = ptr + (first + heads).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(pointers, total, mask=heads < SHAPE.HEADS)
