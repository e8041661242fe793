"""The backward pass: a sweep that leaves maps to two kernels, which multiply them by query, key and gradient.

``grad_maps_kernel`` computes every map once, of all heads together, and leaves the normalised maps and the gradients of
the maps in a workspace, (samples, heads, rows, keys). What is left has no heads to mix: ``grad_query_kernel`` makes of
them dQ, and in their place the gradients of the scores; ``grad_key_kernel`` makes dK and dV. Where scores are mixed
before the softmax, ``grad_scores_kernel`` comes between: its gradients of the scores are unmixed already.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .fold import load_mixing, load_unmixing, normalise, normalise_backward
from .masks import find_hidden, find_span, find_visible_keys, find_visible_positions
from .scores import (
    LOG2E,
    as_exponents,
    as_operand,
    dropout,
    find_hidden_by_head,
    hidden_from_all,
    load_pre_mixing,
    map_tile,
    mix_scores,
    probabilities,
    scale_dots,
    score_tile,
    unless_blind,
)
from .tiles import (
    OUTSIDE,
    accumulate,
    after_mixing,
    any_broken,
    by_head,
    by_position,
    dot_layout,
    dot_rows,
    fold_positions,
    groups,
    heads_first,
    is_finite,
    laid_out_like,
    load_matrix,
    load_rows,
    mix_heads,
    only_finite,
    over_heads,
    per_row_pointers,
    poison_rows,
    position_keys,
    position_rows,
    positions,
    reached_heads,
    sound_rows,
    store_rows,
    sum_by_halves,
    which_block,
    zero_rows,
    zero_sums,
)


class Rows(NamedTuple):
    """Of each sample whose maps lie in the workspace: the first row, how many, and the keys of a row of the maps."""

    first: Any
    count: Any
    keys: Any


@triton.jit
def map_pointers(
    ptr, rows, sample, first_head, row, column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHAPE: tl.constexpr,
    OPERANDS: tl.constexpr = False,
):  # fmt: skip
    """Pointers into the workspace, ``row`` counted from the first, and which lie inside: by head. Rows of the workspace
    are filled up to 16 keys, so that masks leave loads whole. OPERANDS: what is loaded is an operand of a dot, see
    ``heads_first``."""
    heads = first_head + tl.arange(0, SHAPE.HEADS_PADDED)[:, None, None]
    own = tl.arange(0, BLOCK_M)[None, :, None]
    columns = tl.arange(0, BLOCK_N)[None, None, :]
    inside = (row + own < tl.where(heads < SHAPE.HEADS, rows.count, 0)) & (column + columns < rows.keys)
    if SHAPE.CAUSAL:
        # Of what is hidden, 16 keys at a time, nothing was written.
        inside &= (column + columns) // 16 * 16 <= rows.first + row + own
    if SHAPE.WIDE:
        own = own.to(tl.int64)
    matrix = tl.cast(rows.count, tl.int64) * rows.keys
    first = ptr + (tl.cast(sample, tl.int64) * SHAPE.HEADS * matrix + tl.cast(row, tl.int64) * rows.keys + column)
    pointers = first + (heads * matrix + (own * rows.keys + columns))
    if OPERANDS:
        pointers = heads_first(first + heads * matrix, own * rows.keys + columns)
    return pointers, inside


@triton.jit
def load_lse(ptr, batch, first_head, row_start, q, BLOCK_M: tl.constexpr, SHAPE: tl.constexpr):
    """The LSE of a block of rows, OUTSIDE where there is none, and which rows lie inside: [HEADS_PADDED, BLOCK_M]."""
    pointers, inside = per_row_pointers(ptr, batch, first_head, row_start, q.seqlen, BLOCK_M, SHAPE)
    return unless_blind(tl.load(pointers, mask=inside, other=OUTSIDE), SHAPE), inside


@triton.jit(do_not_specialize=["first_sample"])
def grad_maps_kernel(
    q,
    k,
    v,
    grad,
    norm,
    pre_theta_ptr,
    mask,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    mixed_ptr,
    grad_maps_ptr,
    grad_shift_ptr,
    grad_gamma_ptr,
    grad_beta_ptr,
    grad_weight_ptr,
    scale_log2,
    dropout_p,
    first_sample,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """One block of query rows, all heads: the maps of the workspace, delta = sum_j P dP, and the parameters' sums.

    delta is not rowsum(dO * O), as in attention without mixing: the heads are coupled. Summed from the very products
    it is subtracted from later, it leaves dS exactly zero where the softmax is saturated. Partial sums for shift,
    gamma and beta go to (blocks, PACK * HEADS_PADDED), for the weights to (blocks, PACK * HEADS_PADDED, PACK *
    HEADS_PADDED).
    """
    GROUPS: tl.constexpr = groups(BLOCK_M, SHAPE)
    HEADS_PACKED: tl.constexpr = SHAPE.PACK * SHAPE.HEADS_PADDED
    sample, row = which_block(rows.count, BLOCK_M)
    batch, row_start = first_sample + sample, rows.first + row
    # Rows outside the sequence repeat the last query: zero times an infinite key would be NaN. They have no gradient.
    q_tile = load_rows(q, batch, 0, row_start, 0, BLOCK_M, SHAPE, REPEAT=True)
    OUT: tl.constexpr = after_mixing(SHAPE)
    grad_tile = load_rows(grad, batch, 0, row_start, 0, BLOCK_M, OUT)
    lse, row_mask = load_lse(lse_ptr, batch, 0, row_start, q, BLOCK_M, SHAPE)
    clear, keys = find_span(mask, batch, row_start, k, BLOCK_M, SHAPE)
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    mixing = load_mixing(norm, 1.0 / k.seqlen, dtype, SHAPE, True)
    unmixing = load_unmixing(norm, dtype, SHAPE)
    pre_mixing = load_pre_mixing(pre_theta_ptr, dtype, BLOCK_M, BLOCK_N, SHAPE)
    layout = dot_layout(mixing[0], BLOCK_M, positions(BLOCK_M, BLOCK_N, SHAPE), 1, SHAPE)
    transposed_layout = dot_layout(mixing[0], BLOCK_M, HEADS_PACKED, 2, SHAPE)
    in_sequence = row_start + position_rows(BLOCK_M, BLOCK_N, SHAPE) < q.seqlen

    delta = tl.full((SHAPE.HEADS_PADDED, BLOCK_M, BLOCK_N), 0.0, dtype=tl.float32)
    mass = tl.full((SHAPE.HEADS_PADDED, BLOCK_M), 0.0, dtype=tl.float32)
    grad_shift = zero_sums(BLOCK_M, SHAPE)
    grad_gamma = zero_sums(BLOCK_M, SHAPE)
    grad_beta = zero_sums(BLOCK_M, SHAPE)
    # A sum for every group of positions, added up at the end.
    grad_weight = tl.full((GROUPS, HEADS_PACKED, HEADS_PACKED), 0.0, dtype=tl.float32)
    whole = clear // BLOCK_N * BLOCK_N if SHAPE.CLEAR else 0
    # In the second sweep, if there is one, the first keys, which need no mask.
    for sweep in tl.static_range(2 if SHAPE.CLEAR else 1):
        for column in tl.range(
            0 if sweep > 0 else whole, whole if sweep > 0 else keys, BLOCK_N,
            num_stages=1 if SHAPE.CLEAR and sweep == 0 else None,
        ):  # fmt: skip
            visible = find_visible_keys(mask, batch, 0, column, k, BLOCK_N, SHAPE, sweep > 0)
            k_tile = load_rows(k, batch, 0, column, 0, BLOCK_N, SHAPE, sweep > 0, visible=visible)
            v_tile = load_rows(v, batch, 0, column, 0, BLOCK_N, OUT, sweep > 0, visible=visible)
            probs, kept, centred, hidden_by_head = map_tile(
                q_tile, q, row_start, k_tile, k, column, batch, lse, pre_mixing, seed_ptr, mask, visible, scale_log2,
                dropout_p, dtype, BLOCK_M, BLOCK_N, SHAPE, sweep > 0,
            )  # fmt: skip
            heads_by_position = laid_out_like(tl.permute(centred, (0, 2, 1)), transposed_layout)
            centred = laid_out_like(centred, layout)
            if SHAPE.MASK_HEADS:
                heads_by_position, _ = find_hidden(heads_by_position, 1.0 / k.seqlen, SHAPE)
                centred, hidden = find_hidden(centred, 1.0 / k.seqlen, SHAPE)
            # Before the dot that ``unit`` comes from: of the layouts of a sum's operands Triton takes the later dot's.
            grad_normed = dot_rows(
                grad_tile, grad, row_start, v_tile, v, column, batch, 0, BLOCK_M, BLOCK_N, OUT, visible
            )
            normed, unit, inverse_rms = normalise(centred, mixing, norm, SHAPE, True)
            grad_normed = laid_out_like(by_position(grad_normed.to(dtype), SHAPE), unit).to(tl.float32)
            inside_both = in_sequence
            if SHAPE.MASK_HEADS:
                inside_both &= ~hidden
            elif sweep > 0:
                pass
            elif SHAPE.BY_ROW or (SHAPE.HIDES and SHAPE.TRAINING):
                inside_both &= find_visible_positions(mask, batch, row_start, q, column, k, BLOCK_M, BLOCK_N, SHAPE)
            elif SHAPE.TRAINING:
                inside_both &= column + position_keys(BLOCK_M, BLOCK_N, SHAPE) < k.seqlen
            if SHAPE.BY_ROW and sweep == 0:
                normed = tl.where(inside_both, normed, 0.0)
                grad_normed = tl.where(inside_both, grad_normed, 0.0)
            pointers, inside = map_pointers(mixed_ptr, rows, sample, 0, row, column, BLOCK_M, BLOCK_N, OUT)
            tl.store(pointers, by_head(normed.to(dtype), BLOCK_N, SHAPE), mask=inside)

            grad_mixed = normalise_backward(grad_normed, unit, inverse_rms, mixing, unmixing, SHAPE)
            if SHAPE.TRAINING:
                # Batch statistics give positions outside the sequences a gradient, which must not be summed.
                grad_mixed = tl.where(inside_both, grad_mixed, 0.0)
            grad_shift += fold_positions(grad_mixed, dtype, SHAPE)
            if SHAPE.NORM != "none":
                of_gamma = grad_normed * unit
                if SHAPE.MASK_HEADS:
                    of_gamma = tl.where(inside_both, of_gamma, 0.0)  # zero times NaN of another head
                grad_gamma += fold_positions(of_gamma, dtype, SHAPE)
                grad_beta += fold_positions(grad_normed, dtype, SHAPE)
            rounded = grad_mixed.to(dtype)
            grad_weight += tl.dot(heads_by_position, rounded, input_precision=SHAPE.PRECISION)
            grad_kept = by_head(mix_heads(rounded, unmixing[0], SHAPE).to(dtype), BLOCK_N, SHAPE)
            grad_kept = laid_out_like(grad_kept, probs)
            if (SHAPE.MASK_HEADS or (SHAPE.BY_ROW and SHAPE.PACK > 1)) and sweep == 0:
                # A head, or a row that shares the dot, may see what is not finite here.
                grad_kept = tl.where(hidden_by_head, 0.0, grad_kept).to(dtype)
            pointers, inside = map_pointers(grad_maps_ptr, rows, sample, 0, row, column, BLOCK_M, BLOCK_N, SHAPE)
            tl.store(pointers, grad_kept, mask=inside)
            delta += kept * grad_kept.to(tl.float32)
            mass += tl.sum(probs, axis=2)

    if SHAPE.PACK > 1:
        if tl.sum(tl.where(is_finite(lse), 0, 1)) > 0:
            # Seldom: see ``probabilities``.
            tl.debug_barrier()
            for column in range(0, keys, BLOCK_N):
                pointers, inside = map_pointers(mixed_ptr, rows, sample, 0, row, column, BLOCK_M, BLOCK_N, OUT)
                normed = poison_rows(tl.load(pointers, mask=inside, other=0.0), lse, SHAPE)
                if SHAPE.BY_ROW:
                    hidden = find_hidden_by_head(q, row_start, k, column, batch, 0, mask, BLOCK_M, BLOCK_N, SHAPE)
                    normed = tl.where(hidden, 0.0, normed)
                tl.store(pointers, normed.to(dtype), mask=inside)

    # Large scores leave rows of P that sum to 1 only nearly: what dP has in common would then not cancel.
    sees = row_mask
    if SHAPE.HIDES:
        sees &= mass != 0  # of a row that sees no key
    delta = tl.where(sees, tl.sum(delta, axis=2) / mass, 0.0)
    grad_shift = sum_by_halves(tl.reshape(grad_shift, (8 * GROUPS, HEADS_PACKED)))
    grad_gamma = sum_by_halves(tl.reshape(grad_gamma, (8 * GROUPS, HEADS_PACKED)))
    grad_beta = sum_by_halves(tl.reshape(grad_beta, (8 * GROUPS, HEADS_PACKED)))
    grad_weight = sum_by_halves(tl.reshape(grad_weight, (GROUPS, HEADS_PACKED * HEADS_PACKED)))
    grad_weight = tl.reshape(grad_weight, (HEADS_PACKED, HEADS_PACKED))
    if SHAPE.PACK > 1:
        # What a row whose softmax is NaN would have left, had it not been zero in ``probabilities``.
        reached, sound = lse, is_finite(lse)
        if SHAPE.NORM == "layer":
            reached, sound = over_heads(lse), sound_rows(lse, SHAPE)
        delta = tl.where(sound, delta, float("nan"))
        clean = tl.min(tl.where(is_finite(reached), 1, 0), axis=1) > 0
        clean = tl.reshape(tl.broadcast_to(clean[None, :], (SHAPE.PACK, SHAPE.HEADS_PADDED)), (HEADS_PACKED,))
        grad_weight = tl.where(clean[:, None], grad_weight, float("nan"))
        if SHAPE.NORM == "layer":
            grad_shift = tl.where(clean, grad_shift, float("nan"))
        if SHAPE.NORM != "none":
            # Mixing takes it to all heads.
            broken = reached_heads(lse, row_mask, SHAPE)
            if SHAPE.MASK_HEADS:
                broken = tl.reshape(tl.broadcast_to(broken[None, :], (SHAPE.PACK, SHAPE.HEADS_PADDED)), (HEADS_PACKED,))
            grad_gamma = tl.where(broken, float("nan"), grad_gamma)
    delta_block, row_mask = per_row_pointers(delta_ptr, batch, 0, row_start, q.seqlen, BLOCK_M, SHAPE)
    tl.store(delta_block, delta, mask=row_mask)
    block = tl.cast(batch, tl.int64) * tl.cdiv(q.seqlen, BLOCK_M) + row_start // BLOCK_M
    index = tl.arange(0, HEADS_PACKED)
    tl.store(grad_shift_ptr + block * HEADS_PACKED + index, grad_shift)
    if SHAPE.NORM != "none":
        tl.store(grad_gamma_ptr + block * HEADS_PACKED + index, grad_gamma)
        tl.store(grad_beta_ptr + block * HEADS_PACKED + index, grad_beta)
    place = grad_weight_ptr + block * (HEADS_PACKED * HEADS_PACKED)
    tl.store(place + index[:, None] * HEADS_PACKED + index[None, :], grad_weight)


@triton.jit(do_not_specialize=["first_sample"])
def grad_scores_kernel(
    q,
    k,
    pre_theta_ptr,
    mask,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    grad_maps_ptr,
    grad_scores_ptr,
    grad_weight_ptr,
    scale_log2,
    dropout_p,
    first_sample,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """One block of query rows, all heads, where scores are mixed: in the place of the gradients of the maps those of
    the products of query and key; those of the mixed scores to ``grad_scores_ptr``, unless None; and partial sums for
    the gradient of the weights, to (blocks, PACK * HEADS_PADDED, PACK * HEADS_PADDED)."""
    GROUPS: tl.constexpr = groups(BLOCK_M, SHAPE)
    HEADS_PACKED: tl.constexpr = SHAPE.PACK * SHAPE.HEADS_PADDED
    HEADS: tl.constexpr = SHAPE.HEADS
    sample, row = which_block(rows.count, BLOCK_M)
    batch, row_start = first_sample + sample, rows.first + row
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    q_tile = load_rows(q, batch, 0, row_start, 0, BLOCK_M, SHAPE, REPEAT=True)
    lse, _ = load_lse(lse_ptr, batch, 0, row_start, q, BLOCK_M, SHAPE)
    _, keys = find_span(mask, batch, row_start, k, BLOCK_M, SHAPE)
    delta_block, row_mask = per_row_pointers(delta_ptr, batch, 0, row_start, q.seqlen, BLOCK_M, SHAPE)
    delta = tl.load(delta_block, mask=row_mask, other=0.0)
    reached = delta
    if SHAPE.PACK > 1:
        delta = tl.where(is_finite(reached), delta, 0.0)
    pre_mixing = load_pre_mixing(pre_theta_ptr, dtype, BLOCK_M, BLOCK_N, SHAPE)
    unmixing = load_matrix(pre_theta_ptr, 1, HEADS, HEADS, HEADS, SHAPE).to(dtype)
    layout = dot_layout(unmixing, BLOCK_M, positions(BLOCK_M, BLOCK_N, SHAPE), 1, SHAPE)
    transposed_layout = dot_layout(unmixing, BLOCK_M, HEADS_PACKED, 2, SHAPE)
    grad_weight = tl.full((GROUPS, HEADS_PACKED, HEADS_PACKED), 0.0, dtype=tl.float32)
    for column in range(0, keys, BLOCK_N):
        visible = find_visible_keys(mask, batch, 0, column, k, BLOCK_N, SHAPE)
        k_tile = load_rows(k, batch, 0, column, 0, BLOCK_N, SHAPE, visible=visible)
        scaled = dot_rows(q_tile, q, row_start, k_tile, k, column, batch, 0, BLOCK_M, BLOCK_N, SHAPE, visible)
        scaled = scale_dots(scaled, scale_log2)
        # Nothing of a key that is not finite may arrive where it is hidden; where it is seen, delta is NaN.
        operand, finite = as_operand(scaled, dtype)
        operand = laid_out_like(tl.permute(by_position(operand, SHAPE), (0, 2, 1)), transposed_layout)
        scores = as_exponents(
            mix_scores(scaled, pre_mixing, SHAPE), q, row_start, k, column, batch, 0, mask, tl.cast(LOG2E, tl.float32),
            BLOCK_M, BLOCK_N, SHAPE, False,
        )  # fmt: skip
        probs = probabilities(scores, lse, SHAPE)
        kept = dropout(
            probs, seed_ptr, dropout_p, batch, 0, row_start + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N),
            SHAPE,
        )  # fmt: skip
        pointers, inside = map_pointers(grad_maps_ptr, rows, sample, 0, row, column, BLOCK_M, BLOCK_N, SHAPE)
        grad_kept = laid_out_like(tl.load(pointers, mask=inside, other=0.0), scores).to(tl.float32)
        grad_scores = (kept * grad_kept - probs * delta[:, :, None]).to(dtype)
        if SHAPE.BY_ROW:
            # Zero times the delta of a row that sees what is not finite.
            grad_scores = tl.where(scores == float("-inf"), 0.0, grad_scores).to(dtype)
        if grad_scores_ptr is not None:
            of_mask, inside = map_pointers(grad_scores_ptr, rows, sample, 0, row, column, BLOCK_M, BLOCK_N, SHAPE)
            of_bias = poison_rows(grad_scores, reached, SHAPE)
            if SHAPE.HIDES:
                of_bias = tl.where(scores == float("-inf"), 0.0, of_bias)
            tl.store(of_mask, of_bias.to(dtype), mask=inside)
        grad_scores = laid_out_like(by_position(grad_scores, SHAPE), layout)
        grad_weight += tl.dot(operand, grad_scores, input_precision=SHAPE.PRECISION)
        grad_dots = by_head(mix_heads(grad_scores, unmixing, SHAPE).to(dtype), BLOCK_N, SHAPE)
        grad_dots = poison_rows(grad_dots, reached, SHAPE)
        if SHAPE.BY_ROW and SHAPE.PACK > 1:
            grad_dots = tl.where(hidden_from_all(scores, SHAPE), 0.0, grad_dots).to(dtype)
        tl.store(pointers, grad_dots, mask=inside)
    grad_weight = sum_by_halves(tl.reshape(grad_weight, (GROUPS, HEADS_PACKED * HEADS_PACKED)))
    grad_weight = tl.reshape(grad_weight, (HEADS_PACKED, HEADS_PACKED))
    if SHAPE.PACK > 1:
        broken = tl.sum(tl.sum(tl.where(is_finite(reached), 0, 1), axis=1), axis=0)
        grad_weight = tl.where(broken > 0, float("nan"), grad_weight)
    block = tl.cast(batch, tl.int64) * tl.cdiv(q.seqlen, BLOCK_M) + row_start // BLOCK_M
    index = tl.arange(0, HEADS_PACKED)
    place = grad_weight_ptr + block * (HEADS_PACKED * HEADS_PACKED)
    tl.store(place + index[:, None] * HEADS_PACKED + index[None, :], grad_weight)


@triton.jit(do_not_specialize=["first_sample"])
def grad_query_kernel(
    q,
    k,
    grad_q,
    mask,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    grad_maps_ptr,
    scale,
    scale_log2,
    dropout_p,
    first_sample,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """One block of query rows, some heads: dQ, and in the place of the gradients of the maps those of the scores, which
    are there already where scores are mixed."""
    sample, row = which_block(rows.count, BLOCK_M)
    first_head = tl.program_id(1) * SHAPE.HEADS_PADDED
    batch, row_start = first_sample + sample, rows.first + row
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    q_tile = load_rows(q, batch, first_head, row_start, 0, BLOCK_M, SHAPE)
    lse, _ = load_lse(lse_ptr, batch, first_head, row_start, q, BLOCK_M, SHAPE)
    clear, keys = find_span(mask, batch, row_start, k, BLOCK_M, SHAPE)
    delta_block, row_mask = per_row_pointers(delta_ptr, batch, first_head, row_start, q.seqlen, BLOCK_M, SHAPE)
    delta = tl.load(delta_block, mask=row_mask, other=0.0)
    dq_main, dq_tail = zero_rows(BLOCK_M, SHAPE)
    whole = clear // BLOCK_N * BLOCK_N if SHAPE.CLEAR else 0
    for sweep in tl.static_range(2 if SHAPE.CLEAR else 1):
        for column in tl.range(
            0 if sweep > 0 else whole, whole if sweep > 0 else keys, BLOCK_N,
            num_stages=1 if SHAPE.CLEAR and sweep == 0 else None,
        ):  # fmt: skip
            visible = find_visible_keys(mask, batch, first_head, column, k, BLOCK_N, SHAPE, sweep > 0)
            k_tile = load_rows(k, batch, first_head, column, 0, BLOCK_N, SHAPE, sweep > 0, visible=visible)
            pointers, inside = map_pointers(
                grad_maps_ptr, rows, sample, first_head, row, column, BLOCK_M, BLOCK_N, SHAPE, OPERANDS=SHAPE.PRE_MIX
            )
            grad_kept = tl.load(pointers, mask=inside, other=0.0)
            if SHAPE.PRE_MIX:
                grad_scores = grad_kept
            else:
                scores = score_tile(
                    q_tile, q, row_start, k_tile, k, column, batch, first_head, None, mask, visible, scale_log2,
                    BLOCK_M, BLOCK_N, SHAPE, sweep > 0,
                )  # fmt: skip
                probs = probabilities(scores, lse, SHAPE)
                kept = dropout(
                    probs, seed_ptr, dropout_p, batch, first_head, row_start + tl.arange(0, BLOCK_M),
                    column + tl.arange(0, BLOCK_N), SHAPE,
                )  # fmt: skip
                grad_kept = laid_out_like(grad_kept, scores).to(tl.float32)
                grad_scores = (kept * grad_kept - probs * delta[:, :, None]).to(dtype)
                tl.store(pointers, grad_scores, mask=inside)
            dq_main, dq_tail = accumulate(dq_main, dq_tail, grad_scores, k_tile, SHAPE)
    if SHAPE.BY_ROW or SHAPE.MASK == "float":
        if any_broken(dq_main, dq_tail, SHAPE) > 0:
            # Zero times a key that is not finite is NaN, and so is zero times the delta of a row that sees one. Seldom,
            # so once more; gradients of rows that see it are NaN already.
            tl.debug_barrier()
            dq_main, dq_tail = zero_rows(BLOCK_M, SHAPE)
            for column in range(0, keys, BLOCK_N):
                visible = find_visible_keys(mask, batch, first_head, column, k, BLOCK_N, SHAPE)
                k_tile = load_rows(k, batch, first_head, column, 0, BLOCK_N, SHAPE, visible=visible)
                k_tile = only_finite(k_tile, SHAPE)
                pointers, inside = map_pointers(
                    grad_maps_ptr, rows, sample, first_head, row, column, BLOCK_M, BLOCK_N, SHAPE
                )
                grad_scores = tl.load(pointers, mask=inside, other=0.0)
                if not SHAPE.PRE_MIX:  # there it is zero already
                    hidden = find_hidden_by_head(
                        q, row_start, k, column, batch, first_head, mask, BLOCK_M, BLOCK_N, SHAPE
                    )
                    grad_scores = tl.where(hidden, 0.0, grad_scores).to(dtype)
                    tl.store(pointers, grad_scores, mask=inside)
                dq_main, dq_tail = accumulate(dq_main, dq_tail, grad_scores, k_tile, SHAPE)
    store_rows(grad_q, batch, first_head, row_start, 0, dq_main * scale, dq_tail * scale, BLOCK_M, SHAPE)


@triton.jit(do_not_specialize=["first_sample"])
def grad_key_kernel(
    q,
    grad,
    mask,
    grad_k,
    grad_v,
    sum_k,
    sum_v,
    mixed_ptr,
    grad_scores_ptr,
    scale,
    first_sample,
    rows,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """One block of keys, some heads: dV = N^T dO and dK = dS^T Q. Where the rows of a sample come in several parts:
    unless this is the FIRST, the sums start from ``sum_v`` and ``sum_k``; unless it is the LAST, they are stored there.
    """
    sample, column = which_block(grad_k.seqlen, BLOCK_N)
    first_head = tl.program_id(1) * SHAPE.HEADS_PADDED
    OUT: tl.constexpr = after_mixing(SHAPE)
    batch = first_sample + sample
    dk_main, dk_tail = zero_rows(BLOCK_N, SHAPE)
    dv_main, dv_tail = zero_rows(BLOCK_N, SHAPE)
    if not FIRST:
        dk_main, dk_tail = load_rows(sum_k, sample, first_head, column, 0, BLOCK_N, SHAPE)
        dv_main, dv_tail = load_rows(sum_v, sample, first_head, column, 0, BLOCK_N, OUT)
    first_row = 0
    if SHAPE.CAUSAL:
        first_row = tl.maximum(column - rows.first, 0) // BLOCK_M * BLOCK_M
    for row in range(first_row, rows.count, BLOCK_M):
        q_tile = load_rows(q, batch, first_head, rows.first + row, 0, BLOCK_M, SHAPE)
        grad_tile = load_rows(grad, batch, first_head, rows.first + row, 0, BLOCK_M, OUT)
        pointers, inside = map_pointers(
            mixed_ptr, rows, sample, first_head, row, column, BLOCK_M, BLOCK_N, OUT, OPERANDS=True
        )
        normed = tl.load(pointers, mask=inside, other=0.0)
        dv_main, dv_tail = accumulate(dv_main, dv_tail, tl.permute(normed, (0, 2, 1)), grad_tile, SHAPE)
        pointers, inside = map_pointers(
            grad_scores_ptr, rows, sample, first_head, row, column, BLOCK_M, BLOCK_N, SHAPE, OPERANDS=True
        )
        grad_scores = tl.load(pointers, mask=inside, other=0.0)
        dk_main, dk_tail = accumulate(dk_main, dk_tail, tl.permute(grad_scores, (0, 2, 1)), q_tile, SHAPE)
    if SHAPE.BY_ROW:
        if any_broken(dk_main, dk_tail, SHAPE) > 0:
            # As in ``grad_query_kernel``, of queries that do not see these keys.
            dk_main, dk_tail = zero_rows(BLOCK_N, SHAPE)
            if not FIRST:
                dk_main, dk_tail = load_rows(sum_k, sample, first_head, column, 0, BLOCK_N, SHAPE)
            for row in range(first_row, rows.count, BLOCK_M):
                q_tile = load_rows(q, batch, first_head, rows.first + row, 0, BLOCK_M, SHAPE)
                pointers, inside = map_pointers(
                    grad_scores_ptr, rows, sample, first_head, row, column, BLOCK_M, BLOCK_N, SHAPE, OPERANDS=True
                )
                grad_scores = tl.permute(tl.load(pointers, mask=inside, other=0.0), (0, 2, 1))
                dk_main, dk_tail = accumulate(dk_main, dk_tail, grad_scores, only_finite(q_tile, SHAPE), SHAPE)
    if SHAPE.BY_KEY:
        # Weights of hidden keys were left as they came.
        visible = find_visible_keys(mask, batch, first_head, column, grad_k, BLOCK_N, SHAPE)
        dk_main, dk_tail = tl.where(visible, dk_main, 0.0), tl.where(visible, dk_tail, 0.0)
        dv_main, dv_tail = tl.where(visible, dv_main, 0.0), tl.where(visible, dv_tail, 0.0)
    if LAST:
        store_rows(grad_k, batch, first_head, column, 0, dk_main * scale, dk_tail * scale, BLOCK_N, SHAPE)
        store_rows(grad_v, batch, first_head, column, 0, dv_main, dv_tail, BLOCK_N, OUT)
    else:
        store_rows(sum_k, sample, first_head, column, 0, dk_main, dk_tail, BLOCK_N, SHAPE)
        store_rows(sum_v, sample, first_head, column, 0, dv_main, dv_tail, BLOCK_N, OUT)
