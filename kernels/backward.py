"""The backward kernels: one query-major (delta, query, sums for the parameters), one key-major (key, value)."""

import triton
import triton.language as tl

from .fold import load_mixing, load_unmixing, normalise, normalise_backward
from .scores import map_tile
from .tiles import (
    accumulate,
    dot_rows,
    inside_by_row,
    is_finite,
    load_rows,
    mix_heads,
    over_heads,
    per_row_pointers,
    poison_rows,
    store_partial_sums,
    store_rows,
    sum_by_halves,
    to_head_major,
    to_row_major,
    which_block,
    zero_rows,
)


@triton.jit
def gradient_tile(
    grad_tile, grad, row_start, v_tile, v, column_start, batch, unit, inverse_rms, mixing, unmixing,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Carries the output's gradient back through norm and mixing.

    The gradients of the dropped maps, head-major; of the normalised and of the mixed tile, row-major.
    """
    weights, _, _ = unmixing
    grad_normed = dot_rows(grad_tile, grad, row_start, v_tile, v, column_start, batch, BLOCK_M, BLOCK_N, SHAPE)
    grad_normed = to_row_major(grad_normed, SHAPE)
    grad_mixed = normalise_backward(grad_normed, unit, inverse_rms, mixing, unmixing, SHAPE)
    grad_kept = mix_heads(weights, grad_mixed.to(weights.dtype), SHAPE)
    return to_head_major(grad_kept, SHAPE), grad_normed, grad_mixed


@triton.jit
def backward_query_kernel(
    q,
    k,
    v,
    grad,
    grad_q,
    norm,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    grad_shift_ptr,
    grad_gamma_ptr,
    grad_beta_ptr,
    grad_weight_ptr,
    scale,
    scale_log2,
    dropout_p,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """One block of query rows, all heads: delta = sum_j P dP and the parameters' partial sums in one sweep, dQ in a
    second.

    delta is not rowsum(dO * O), as in attention without mixing: the heads are coupled. Summed from the very products
    it is subtracted from later, it leaves dS exactly zero where the softmax is saturated. Partial sums for shift,
    gamma and beta go to (programs, PACK * HEADS_PADDED), for the weights to (programs, PACK * HEADS_PADDED, PACK *
    HEADS_PADDED).
    """
    HEADS_PACKED: tl.constexpr = SHAPE.PACK * SHAPE.HEADS_PADDED
    batch, row_start = which_block(q.seqlen, BLOCK_M)
    chunk = tl.program_id(1) if SHAPE.CHUNKS > 1 else 0
    q_tile = load_rows(q, batch, row_start, 0, BLOCK_M, SHAPE)
    grad_tile = load_rows(grad, batch, row_start, 0, BLOCK_M, SHAPE)
    lse_block, row_mask = per_row_pointers(lse_ptr, batch, row_start, q.seqlen, BLOCK_M, SHAPE)
    # Rows outside the sequence: P is zero, and the LSE finite.
    lse = tl.load(lse_block, mask=row_mask, other=1e30)
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    mixing = load_mixing(norm, 1.0 / k.seqlen, dtype, SHAPE, True)
    unmixing = load_unmixing(norm, dtype, SHAPE)

    delta = tl.full((SHAPE.HEADS_PADDED, BLOCK_M), 0.0, dtype=tl.float32)
    mass = tl.full((SHAPE.HEADS_PADDED, BLOCK_M), 0.0, dtype=tl.float32)
    grad_shift = tl.full((BLOCK_M // SHAPE.PACK, HEADS_PACKED), 0.0, dtype=tl.float32)
    grad_gamma = tl.full((BLOCK_M // SHAPE.PACK, HEADS_PACKED), 0.0, dtype=tl.float32)
    grad_beta = tl.full((BLOCK_M // SHAPE.PACK, HEADS_PACKED), 0.0, dtype=tl.float32)
    # A sum for every group of rows, added up at the end: as one dot over rows and keys, every warp would hold all
    # operands.
    grad_weight = tl.full((BLOCK_M // SHAPE.PACK, HEADS_PACKED, HEADS_PACKED), 0.0, dtype=tl.float32)
    for column_start in range(0, k.seqlen, BLOCK_N):
        k_tile = load_rows(k, batch, column_start, 0, BLOCK_N, SHAPE)
        v_tile = load_rows(v, batch, column_start, 0, BLOCK_N, SHAPE)
        probs, kept, centred = map_tile(
            q_tile, q, row_start, k_tile, k, column_start, batch, lse, seed_ptr, scale_log2, dropout_p, dtype,
            BLOCK_M, BLOCK_N, SHAPE,
        )  # fmt: skip
        normed, unit, inverse_rms = normalise(centred, mixing, norm, SHAPE, True)
        grad_kept, grad_normed, grad_mixed = gradient_tile(
            grad_tile, grad, row_start, v_tile, v, column_start, batch, unit, inverse_rms, mixing, unmixing,
            BLOCK_M, BLOCK_N, SHAPE,
        )  # fmt: skip
        delta += tl.sum(kept * grad_kept, axis=2)
        mass += tl.sum(probs, axis=2)
        if SHAPE.TRAINING:
            # Batch statistics give positions outside the sequences a gradient, which must not be summed.
            columns = column_start + tl.arange(0, BLOCK_N)
            inside = inside_by_row(row_start, q.seqlen, columns, k.seqlen, BLOCK_M, SHAPE)
            grad_mixed = tl.where(inside, grad_mixed, 0.0)
        grad_shift += tl.sum(grad_mixed, axis=2)
        if SHAPE.NORM != "none":
            grad_gamma += tl.sum(grad_normed * unit, axis=2)
            grad_beta += tl.sum(grad_normed, axis=2)
        grad_columns = tl.permute(grad_mixed.to(dtype), (0, 2, 1))
        grad_weight += tl.dot(centred, grad_columns, input_precision=SHAPE.PRECISION)

    # Large scores leave rows of P that sum to 1 only nearly: what dP has in common would then not cancel.
    delta = tl.where(row_mask, delta / mass, 0.0)
    grad_shift = sum_by_halves(grad_shift)
    grad_gamma = sum_by_halves(grad_gamma)
    grad_weight = tl.sum(grad_weight, axis=0)
    if SHAPE.PACK > 1:
        # What a row whose softmax is NaN would have left, had it not been zero in ``probabilities``.
        reached = lse
        if SHAPE.NORM == "layer":
            reached = over_heads(lse)
        delta = tl.where(is_finite(reached), delta, float("nan"))
        clean = tl.min(tl.where(is_finite(reached), 1, 0), axis=1) > 0
        clean = tl.reshape(tl.broadcast_to(clean[None, :], (SHAPE.PACK, SHAPE.HEADS_PADDED)), (HEADS_PACKED,))
        grad_weight = tl.where(clean[:, None], grad_weight, float("nan"))
        if SHAPE.NORM == "layer":
            grad_shift = tl.where(clean, grad_shift, float("nan"))
        if SHAPE.NORM != "none":
            # Mixing takes it to all heads.
            broken = tl.sum(tl.sum(tl.where(is_finite(lse), 0, 1), axis=1), axis=0)
            grad_gamma = tl.where(broken > 0, float("nan"), grad_gamma)
    delta_block, row_mask = per_row_pointers(delta_ptr, batch, row_start, q.seqlen, BLOCK_M, SHAPE)
    # Every chunk's program stores the same values here.
    tl.store(delta_block, delta, mask=row_mask)
    store_partial_sums(grad_shift_ptr, grad_weight_ptr, grad_shift, grad_weight)
    if SHAPE.NORM != "none":
        index = tl.program_id(0).to(tl.int64) * HEADS_PACKED + tl.arange(0, HEADS_PACKED)
        tl.store(grad_gamma_ptr + index, grad_gamma)
        tl.store(grad_beta_ptr + index, sum_by_halves(grad_beta))

    dq_main, dq_tail = zero_rows(BLOCK_M, SHAPE)
    for column_start in range(0, k.seqlen, BLOCK_N):
        k_tile = load_rows(k, batch, column_start, 0, BLOCK_N, SHAPE)
        v_tile = load_rows(v, batch, column_start, 0, BLOCK_N, SHAPE)
        probs, kept, centred = map_tile(
            q_tile, q, row_start, k_tile, k, column_start, batch, lse, seed_ptr, scale_log2, dropout_p, dtype,
            BLOCK_M, BLOCK_N, SHAPE,
        )  # fmt: skip
        normed, unit, inverse_rms = normalise(centred, mixing, norm, SHAPE, True)
        grad_kept, grad_normed, grad_mixed = gradient_tile(
            grad_tile, grad, row_start, v_tile, v, column_start, batch, unit, inverse_rms, mixing, unmixing,
            BLOCK_M, BLOCK_N, SHAPE,
        )  # fmt: skip
        grad_scores = (kept * grad_kept - probs * delta[:, :, None]).to(dtype)
        k_chunk = k_tile
        if SHAPE.CHUNKS > 1:
            k_chunk = load_rows(k, batch, column_start, chunk, BLOCK_N, SHAPE)
        dq_main, dq_tail = accumulate(dq_main, dq_tail, grad_scores, k_chunk, SHAPE)
    store_rows(grad_q, batch, row_start, chunk, dq_main * scale, dq_tail * scale, BLOCK_M, SHAPE)


@triton.jit
def backward_key_kernel(
    q,
    k,
    v,
    grad,
    grad_k,
    grad_v,
    norm,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    scale,
    scale_log2,
    dropout_p,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """One block of keys, all heads: dK and dV in one sweep over the query rows."""
    batch, column_start = which_block(k.seqlen, BLOCK_N)
    chunk = tl.program_id(1) if SHAPE.CHUNKS > 1 else 0
    k_tile = load_rows(k, batch, column_start, 0, BLOCK_N, SHAPE)
    v_tile = load_rows(v, batch, column_start, 0, BLOCK_N, SHAPE)
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    mixing = load_mixing(norm, 1.0 / k.seqlen, dtype, SHAPE, True)
    unmixing = load_unmixing(norm, dtype, SHAPE)

    dk_main, dk_tail = zero_rows(BLOCK_N, SHAPE)
    dv_main, dv_tail = zero_rows(BLOCK_N, SHAPE)
    for row_start in range(0, q.seqlen, BLOCK_M):
        q_tile = load_rows(q, batch, row_start, 0, BLOCK_M, SHAPE)
        grad_tile = load_rows(grad, batch, row_start, 0, BLOCK_M, SHAPE)
        lse_block, row_mask = per_row_pointers(lse_ptr, batch, row_start, q.seqlen, BLOCK_M, SHAPE)
        lse = tl.load(lse_block, mask=row_mask, other=1e30)
        probs, kept, centred = map_tile(
            q_tile, q, row_start, k_tile, k, column_start, batch, lse, seed_ptr, scale_log2, dropout_p, dtype,
            BLOCK_M, BLOCK_N, SHAPE,
        )  # fmt: skip
        normed, unit, inverse_rms = normalise(centred, mixing, norm, SHAPE, True)
        grad_kept, grad_normed, grad_mixed = gradient_tile(
            grad_tile, grad, row_start, v_tile, v, column_start, batch, unit, inverse_rms, mixing, unmixing,
            BLOCK_M, BLOCK_N, SHAPE,
        )  # fmt: skip
        normed = poison_rows(to_head_major(normed.to(dtype), SHAPE), lse, SHAPE)
        grad_chunk = grad_tile
        if SHAPE.CHUNKS > 1:
            grad_chunk = load_rows(grad, batch, row_start, chunk, BLOCK_M, SHAPE)
        dv_main, dv_tail = accumulate(dv_main, dv_tail, tl.permute(normed, (0, 2, 1)), grad_chunk, SHAPE)
        delta_block, row_mask = per_row_pointers(delta_ptr, batch, row_start, q.seqlen, BLOCK_M, SHAPE)
        delta = tl.load(delta_block, mask=row_mask, other=0.0)
        # Rows outside the sequence have no gradient and no query: every term they add is zero.
        grad_scores = (kept * grad_kept - probs * delta[:, :, None]).to(dtype)
        q_chunk = q_tile
        if SHAPE.CHUNKS > 1:
            q_chunk = load_rows(q, batch, row_start, chunk, BLOCK_M, SHAPE)
        dk_main, dk_tail = accumulate(dk_main, dk_tail, tl.permute(grad_scores, (0, 2, 1)), q_chunk, SHAPE)
    store_rows(grad_k, batch, column_start, chunk, dk_main * scale, dk_tail * scale, BLOCK_N, SHAPE)
    store_rows(grad_v, batch, column_start, chunk, dv_main, dv_tail, BLOCK_N, SHAPE)
