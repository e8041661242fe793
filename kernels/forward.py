"""The forward kernel, and the sums over all maps from which batch statistics are known."""

import triton
import triton.language as tl

from .tiles import (
    accumulate,
    dot_rows,
    dropout,
    load_mixing,
    load_rows,
    map_tile,
    normalise,
    per_row_pointers,
    poison_rows,
    row_lse,
    store_partial_sums,
    store_rows,
    to_head_major,
    to_row_major,
    which_block,
    zero_rows,
)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    mixing,
    lse_ptr,
    seed_ptr,
    scale_log2,
    eps,
    dropout_p,
    LSE_KNOWN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """One block of query rows, all heads: the LSE in one sweep over the keys (unless known), the output in a second."""
    batch, row_start = which_block(q.seqlen, BLOCK_M)
    chunk = tl.program_id(1) if SHAPE.CHUNKS > 1 else 0
    q_tile = load_rows(q, batch, row_start, 0, BLOCK_M, SHAPE)
    lse_block, row_mask = per_row_pointers(lse_ptr, batch, row_start, q.seqlen, BLOCK_M, SHAPE)
    if LSE_KNOWN:
        lse = tl.load(lse_block, mask=row_mask, other=0.0)
    else:
        lse = row_lse(q_tile, q, row_start, k, batch, scale_log2, BLOCK_M, BLOCK_N, SHAPE)
        tl.store(lse_block, lse, mask=row_mask)

    dtype: tl.constexpr = q.ptr.dtype.element_ty
    parameters = load_mixing(mixing, 1.0 / k.seqlen, dtype, SHAPE)
    out_main, out_tail = zero_rows(BLOCK_M, SHAPE)
    for start in range(0, k.seqlen, BLOCK_N):
        k_tile = load_rows(k, batch, start, 0, BLOCK_N, SHAPE)
        _, _, centred = map_tile(
            q_tile, q, row_start, k_tile, k, start, batch, lse, seed_ptr, scale_log2, dropout_p, dtype,
            BLOCK_M, BLOCK_N, SHAPE,
        )  # fmt: skip
        # A key outside the sequence gets some finite weight here, and its value is loaded as zero.
        normed, _, _ = normalise(centred, parameters, mixing, eps, SHAPE)
        normed = to_head_major(normed.to(dtype), SHAPE)
        v_tile = load_rows(v, batch, start, chunk, BLOCK_N, SHAPE)
        out_main, out_tail = accumulate(out_main, out_tail, normed, v_tile, SHAPE)
    out_main = poison_rows(out_main, lse, SHAPE)
    out_tail = poison_rows(out_tail, lse, SHAPE)
    store_rows(out, batch, row_start, chunk, out_main, out_tail, BLOCK_M, SHAPE)


@triton.jit
def statistics_kernel(
    q,
    k,
    lse_ptr,
    seed_ptr,
    sums_ptr,
    products_ptr,
    scale_log2,
    dropout_p,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """One block of query rows: the LSE, and sums over its maps of P - 1/seqlen_k and of the products of every two
    heads.

    Partial sums, added up afterwards in a fixed order: (programs, PACK * HEADS_PADDED) and its square.
    """
    HEADS_PACKED: tl.constexpr = SHAPE.PACK * SHAPE.HEADS_PADDED
    batch, row_start = which_block(q.seqlen, BLOCK_M)
    rows = row_start + tl.arange(0, BLOCK_M)
    q_tile = load_rows(q, batch, row_start, 0, BLOCK_M, SHAPE)
    lse = row_lse(q_tile, q, row_start, k, batch, scale_log2, BLOCK_M, BLOCK_N, SHAPE)
    lse_block, row_mask = per_row_pointers(lse_ptr, batch, row_start, q.seqlen, BLOCK_M, SHAPE)
    tl.store(lse_block, lse, mask=row_mask)

    centre = 1.0 / k.seqlen
    sums = tl.full((BLOCK_M // SHAPE.PACK, HEADS_PACKED), 0.0, dtype=tl.float32)
    products = tl.full((BLOCK_M // SHAPE.PACK, HEADS_PACKED, HEADS_PACKED), 0.0, dtype=tl.float32)
    for start in range(0, k.seqlen, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, batch, start, 0, BLOCK_N, SHAPE)
        scores = dot_rows(q_tile, q, row_start, k_tile, k, start, batch, BLOCK_M, BLOCK_N, SHAPE) * scale_log2
        probs = dropout(tl.exp2(scores - lse[:, :, None]), seed_ptr, dropout_p, batch, rows, columns, SHAPE)
        inside = (rows < q.seqlen)[None, :, None] & (columns < k.seqlen)[None, None, :]
        centred = to_row_major(tl.where(inside, probs - centre, 0.0), SHAPE)
        sums += tl.sum(centred, axis=2)
        centred = centred.to(q.ptr.dtype.element_ty)
        products += tl.dot(centred, tl.permute(centred, (0, 2, 1)), input_precision=SHAPE.PRECISION)
    store_partial_sums(sums_ptr, products_ptr, tl.sum(sums, axis=0), tl.sum(products, axis=0))
