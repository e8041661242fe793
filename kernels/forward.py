"""The forward kernel."""

import triton
import triton.language as tl

from .fold import load_mixing, normalise
from .masks import find_hidden, find_span, find_visible_keys, find_visible_positions
from .scores import load_pre_mixing, map_tile, row_lse, spread_over_heads, unless_blind
from .tiles import (
    accumulate,
    after_mixing,
    any_broken,
    broken_rows,
    by_head,
    dot_layout,
    fold_positions,
    held,
    laid_out_like,
    load_rows,
    only_finite,
    per_row_pointers,
    poison_rows,
    position_keys,
    position_rows,
    positions,
    reached_heads,
    store_rows,
    sum_by_halves,
    which_block,
    zero_rows,
    zero_sums,
)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    norm,
    pre_theta_ptr,
    mask,
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
    sums of the mixed maps and of their squares, and where keys may be hidden how many are not, by head, to (2 or 3 *
    HEADS_OUT, programs).
    """
    batch, row_start = which_block(q.seqlen, BLOCK_M)
    chunk = tl.program_id(1) if SHAPE.CHUNKS > 1 else 0
    q_tile = load_rows(q, batch, 0, row_start, 0, BLOCK_M, SHAPE)
    # Above head_dim 32 registers suffice neither for two copies of the loop nor for the queries.
    APART: tl.constexpr = SHAPE.DIM_MAIN <= 32
    if APART:
        q_tile = held(q_tile[0]), q_tile[1]
    clear, keys = find_span(mask, batch, row_start, k, BLOCK_M, SHAPE)
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    lse = row_lse(q_tile, q, row_start, k, clear, keys, batch, pre_theta_ptr, mask, scale_log2, dtype, BLOCK_M, SHAPE)
    if SHAPE.PRE_MIX:
        lse = spread_over_heads(lse, SHAPE)
    lse_block, row_mask = per_row_pointers(lse_ptr, batch, 0, row_start, q.seqlen, BLOCK_M, SHAPE)
    tl.store(lse_block, lse, mask=row_mask)
    lse = unless_blind(lse, SHAPE)

    pre_mixing = load_pre_mixing(pre_theta_ptr, dtype, BLOCK_M, BLOCK_N, SHAPE)
    mixing = load_mixing(norm, 1.0 / k.seqlen, dtype, SHAPE, False)
    layout = dot_layout(mixing[0], BLOCK_M, positions(BLOCK_M, BLOCK_N, SHAPE), 1, SHAPE)
    out_main, out_tail = zero_rows(BLOCK_M, SHAPE)
    rows = row_start + position_rows(BLOCK_M, BLOCK_N, SHAPE) < q.seqlen
    sums = zero_sums(BLOCK_M, SHAPE)
    squares, counts = sums, sums
    # The last keys apart, so that the others need no mask.
    TWICE: tl.constexpr = SHAPE.CLEAR if SHAPE.HIDES else APART
    whole = clear // BLOCK_N * BLOCK_N if TWICE else 0
    if TWICE:
        for start in range(0, whole, BLOCK_N):
            out_main, out_tail, sums, squares, counts = forward_step(
                out_main, out_tail, sums, squares, counts, q_tile, q, row_start, k, v, start, batch, chunk, lse,
                pre_mixing, mixing, layout, norm, mask, rows, seed_ptr, scale_log2, dropout_p, BLOCK_M, BLOCK_N, SHAPE,
                True, False,
            )  # fmt: skip
    for start in tl.range(whole, keys, BLOCK_N, num_stages=1 if TWICE else None):
        out_main, out_tail, sums, squares, counts = forward_step(
            out_main, out_tail, sums, squares, counts, q_tile, q, row_start, k, v, start, batch, chunk, lse,
            pre_mixing, mixing, layout, norm, mask, rows, seed_ptr, scale_log2, dropout_p, BLOCK_M, BLOCK_N, SHAPE,
            False, False,
        )  # fmt: skip
    if SHAPE.BY_ROW:
        if any_broken(out_main, out_tail, SHAPE) > 0:
            # Zero times what is not finite is NaN. Seldom, so once more.
            out_main, out_tail = zero_rows(BLOCK_M, SHAPE)
            for start in range(0, keys, BLOCK_N):
                out_main, out_tail, _, _, _ = forward_step(
                    out_main, out_tail, sums, squares, counts, q_tile, q, row_start, k, v, start, batch, chunk, lse,
                    pre_mixing, mixing, layout, norm, mask, rows, seed_ptr, scale_log2, dropout_p, BLOCK_M, BLOCK_N,
                    SHAPE, False, True,
                )  # fmt: skip
    out_main = poison_rows(out_main, lse, SHAPE)
    out_tail = poison_rows(out_tail, lse, SHAPE)
    store_rows(out, batch, 0, row_start, chunk, out_main, out_tail, BLOCK_M, after_mixing(SHAPE))
    if SHAPE.TRAINING:
        # Every chunk's program stores the same values here.
        store_head_sums(sums_ptr, 0, sums, lse, row_mask, dtype, SHAPE)
        store_head_sums(sums_ptr, SHAPE.HEADS_OUT, squares, lse, row_mask, dtype, SHAPE)
        if SHAPE.HIDES:
            store_head_sums(sums_ptr, 2 * SHAPE.HEADS_OUT, counts, lse, row_mask, dtype, SHAPE, COUNTS=True)


@triton.jit
def forward_step(
    out_main, out_tail, sums, squares, counts, q_tile, q, row_start, k, v, start, batch, chunk, lse, pre_mixing, mixing,
    layout, norm, mask, rows, seed_ptr, scale_log2, dropout_p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHAPE: tl.constexpr, WHOLE: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys to the output, and to the sums over the mixed maps. STRICT: a value that is not finite
    reaches no row that does not see it."""
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    visible = find_visible_keys(mask, batch, 0, start, k, BLOCK_N, SHAPE, WHOLE)
    k_tile = load_rows(k, batch, 0, start, 0, BLOCK_N, SHAPE, WHOLE, visible=visible)
    _, _, centred, hidden_by_head = map_tile(
        q_tile, q, row_start, k_tile, k, start, batch, lse, pre_mixing, seed_ptr, mask, visible, scale_log2, dropout_p,
        dtype, BLOCK_M, BLOCK_N, SHAPE, WHOLE,
    )  # fmt: skip
    # A key outside the sequence gets some finite weight here, and its value is loaded as zero.
    centred = laid_out_like(centred, layout)
    if SHAPE.MASK_HEADS:
        centred, hidden = find_hidden(centred, 1.0 / k.seqlen, SHAPE)
    normed, _, _ = normalise(centred, mixing, norm, SHAPE, False)
    inside = rows
    if SHAPE.MASK_HEADS:
        inside &= ~hidden
    elif WHOLE:
        pass
    elif SHAPE.BY_ROW or (SHAPE.HIDES and SHAPE.TRAINING):
        inside &= find_visible_positions(mask, batch, row_start, q, start, k, BLOCK_M, BLOCK_N, SHAPE)
    elif SHAPE.TRAINING:
        inside &= start + position_keys(BLOCK_M, BLOCK_N, SHAPE) < k.seqlen
    if SHAPE.TRAINING or (SHAPE.BY_ROW and not WHOLE):
        summed = tl.where(inside, normed, 0.0)
    if SHAPE.BY_ROW and not WHOLE:
        normed = summed
    if SHAPE.TRAINING:
        sums += fold_positions(summed, dtype, SHAPE)
        squares += fold_positions(summed * summed, dtype, SHAPE)
        if SHAPE.HIDES:
            counts += fold_positions(tl.where(inside, 1.0, tl.zeros_like(normed)), dtype, SHAPE)
    normed = laid_out_like(by_head(normed.to(dtype), BLOCK_N, SHAPE), lse[:, :, None])
    v_tile = load_rows(v, batch, 0, start, chunk, BLOCK_N, after_mixing(SHAPE), WHOLE, visible=visible)
    if STRICT:
        seen = broken_rows(v_tile, SHAPE)[:, None, :] & ~hidden_by_head
        normed = tl.where(seen, float("nan"), normed).to(dtype)
        v_tile = only_finite(v_tile, SHAPE)
    out_main, out_tail = accumulate(out_main, out_tail, normed, v_tile, SHAPE)
    return out_main, out_tail, sums, squares, counts


@triton.jit
def store_head_sums(
    ptr, first, sums, lse, row_mask, dtype: tl.constexpr, SHAPE: tl.constexpr, COUNTS: tl.constexpr = False
):
    """This program's sums by head, of positions that were folded, to column first + head of (.., programs); NaN, unless
    they are COUNTS, if the softmax of a row is."""
    if dtype == tl.float32 and SHAPE.PRECISION == "ieee":
        total = sum_by_halves(tl.reshape(sums, (sums.shape[0] * sums.shape[1] * SHAPE.PACK, SHAPE.HEADS_PADDED)))
    else:
        total = tl.sum(tl.sum(sums, axis=1), axis=0)
        total = tl.sum(tl.reshape(total, (SHAPE.PACK, SHAPE.HEADS_PADDED)), axis=0)
    if SHAPE.PACK > 1 and not COUNTS:
        total = tl.where(reached_heads(lse, row_mask, SHAPE), float("nan"), total)
    heads = tl.arange(0, SHAPE.HEADS_PADDED)
    pointers = ptr + (first + heads).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(pointers, total, mask=heads < SHAPE.HEADS_OUT)
