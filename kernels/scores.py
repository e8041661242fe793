"""The only place where a product of query and key becomes a probability: scale, exponential, dropout."""

import triton
import triton.language as tl

from .masks import HIDDEN, find_visible_keys, hides, load_mask
from .tiles import (
    OUTSIDE,
    by_head,
    by_position,
    dot_layout,
    dot_rows,
    held,
    is_finite,
    laid_out_like,
    load_matrix,
    load_rows,
    mix_heads,
    over_heads,
    positions,
    sum_by_halves,
)


@triton.jit
def load_pre_mixing(pre_theta_ptr, dtype: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHAPE):
    """What ``mix_scores`` of tiles with BLOCK_N keys takes: the weights in the dots' dtype, and the layout of what it
    mixes. None where nothing is mixed before the softmax."""
    pre_mixing = None
    if SHAPE.PRE_MIX:
        HEADS: tl.constexpr = SHAPE.HEADS
        weights = load_matrix(pre_theta_ptr, HEADS, 1, HEADS, HEADS, SHAPE).to(dtype)
        pre_mixing = weights, dot_layout(weights, BLOCK_M, positions(BLOCK_M, BLOCK_N, SHAPE), 1, SHAPE)
    return pre_mixing


@triton.jit
def as_operand(scaled, dtype: tl.constexpr):
    """Scaled products of query and key in the dots' dtype, what is not finite as zero; and where it is finite."""
    rounded = scaled.to(dtype)
    finite = is_finite(rounded)
    return tl.where(finite, rounded, 0.0).to(dtype), finite


@triton.jit
def scale_dots(dots, scale_log2):
    """Products of query and key as they are mixed: scaled, as float16 holds them."""
    return rounded_product(dots, scale_log2 * LN2)


@triton.jit
def mix_scores(scaled, pre_mixing, SHAPE: tl.constexpr):
    """What ``scale_dots`` leaves, mixed over the heads: [HEADS_PADDED, BLOCK_M, BLOCK_N], float32.

    Zero times what is not finite would be NaN in rows that share a dot with its row. There a head keeps its own as NaN,
    which ``spread_over_heads`` takes to the others, or, where a mask may hide it from this head alone, all have it at
    once.
    """
    weights, layout = pre_mixing
    dtype: tl.constexpr = weights.dtype
    if SHAPE.PACK > 1:
        rounded, finite = as_operand(scaled, dtype)
    else:
        rounded = scaled.to(dtype)
    tile = laid_out_like(by_position(rounded, SHAPE), layout)
    # In the layout of the dots, which Triton can sum: see ``laid_out_like``.
    mixed = by_head(mix_heads(tile, weights, SHAPE), scaled.shape[2], SHAPE)
    mixed = tl.inline_asm_elementwise("", "=f,0,f", [mixed, scaled], dtype=tl.float32, is_pure=True, pack=1)
    if SHAPE.PACK > 1:
        if SHAPE.MASK_HEADS:
            broken = tl.reshape(tl.where(finite, 0.0, 1.0), (scaled.shape[0], scaled.shape[1] * scaled.shape[2]))
            broken = tl.reshape(sum_by_halves(broken), (1, scaled.shape[1], scaled.shape[2]))
            mixed = tl.where(broken == 0.0, mixed, float("nan"))
        else:
            mixed = tl.where(finite, mixed, float("nan"))
    elif SHAPE.HEADS < SHAPE.HEADS_PADDED:
        # Zero weights make NaN of what is infinite.
        heads = tl.arange(0, SHAPE.HEADS_PADDED)[:, None, None]
        mixed = tl.where(heads < SHAPE.HEADS, mixed, 0.0)
    return mixed


@triton.jit
def spread_over_heads(lse, SHAPE: tl.constexpr):
    """NaN in every head of a row whose LSE is NaN in one: scores are made of all. Not in heads that see no key."""
    if SHAPE.PACK > 1:
        broken = over_heads(tl.where(lse == lse, 0.0, float("nan"))) != 0.0
        if SHAPE.MASK_HEADS:
            broken &= lse != float("-inf")
        lse = tl.where(broken, float("nan"), lse)
    return lse


@triton.jit
def score_tile(
    q_tile, q, row_start, k_tile, k, column_start, batch, first_head, pre_mixing, mask, visible, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHAPE: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """Scores as exponents to base 2, -inf at keys outside the sequence and at hidden ones: [HEADS_PADDED, BLOCK_M,
    BLOCK_N], float32."""
    dots = dot_rows(q_tile, q, row_start, k_tile, k, column_start, batch, first_head, BLOCK_M, BLOCK_N, SHAPE, visible)
    if SHAPE.PRE_MIX:
        dots = mix_scores(scale_dots(dots, scale_log2), pre_mixing, SHAPE)
        scale_log2 = tl.cast(LOG2E, tl.float32)
    return as_exponents(
        dots, q, row_start, k, column_start, batch, first_head, mask, scale_log2, BLOCK_M, BLOCK_N, SHAPE, WHOLE
    )


@triton.jit
def as_exponents(
    dots, q, row_start, k, column_start, batch, first_head, mask, scale_log2, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SHAPE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``score_tile`` of products of query and key, or of scores that are scaled and mixed already."""
    columns = column_start + tl.arange(0, BLOCK_N)
    if WHOLE:
        scores = rounded_product(dots, scale_log2)
    elif SHAPE.MASK == "none":
        scores = rounded_product(dots, scale_log2)
        scores = tl.where((columns < k.seqlen)[None, None, :], scores, float("-inf"))
    else:
        given = load_mask(mask, batch, first_head, row_start, q, column_start, k, BLOCK_M, BLOCK_N, SHAPE)
        hidden = hides(given, mask, SHAPE)
        if SHAPE.MASK == "float":
            added = given.to(tl.float32) * LOG2E
            added = tl.where(added < FARTHEST, FARTHEST, added)  # what is visible stays so, and NaN too
            scores = rounded_sum(dots, scale_log2, tl.where(hidden, float("-inf"), added))
        elif SHAPE.BY_KEY:
            scores = rounded_sum(dots, scale_log2, tl.where(hidden, float("-inf"), 0.0))
        else:
            scores = rounded_product(dots, scale_log2)
        if not SHAPE.BY_KEY or SHAPE.CAUSAL or SHAPE.MASK_HEADS:
            # What is NaN, in a key that some see or in a query that sees none, is not hidden by what is added.
            scores = tl.where(hidden, float("-inf"), scores)
    if SHAPE.CAUSAL and not WHOLE:
        rows = row_start + tl.arange(0, BLOCK_M)
        scores = tl.where(columns[None, None, :] > rows[None, :, None], float("-inf"), scores)
    return scores


@triton.jit
def find_hidden_by_head(
    q, row_start, k, column_start, batch, first_head, mask, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """Which keys are outside the sequence or hidden: [HEADS_PADDED, BLOCK_M, BLOCK_N]."""
    zeros = tl.full((SHAPE.HEADS_PADDED, BLOCK_M, BLOCK_N), 0.0, dtype=tl.float32)
    return as_exponents(
        zeros, q, row_start, k, column_start, batch, first_head, mask, tl.cast(0.0, tl.float32), BLOCK_M, BLOCK_N,
        SHAPE, False,
    ) == float("-inf")  # fmt: skip


@triton.jit
def hidden_from_all(scores, SHAPE: tl.constexpr):
    """Of scores whose heads are mixed, which keys no head sees: [HEADS_PADDED or 1, BLOCK_M, BLOCK_N]."""
    hidden = scores == float("-inf")
    if SHAPE.MASK_HEADS:
        seen = tl.reshape(tl.where(hidden, 0.0, 1.0), (scores.shape[0], scores.shape[1] * scores.shape[2]))
        hidden = tl.reshape(sum_by_halves(seen), (1, scores.shape[1], scores.shape[2])) == 0.0
    return hidden


LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FARTHEST = tl.constexpr(-3.4e38)


@triton.jit
def rounded_product(a, b):
    """a * b, rounded whatever is added to it.

    What the largest score is taken from and what the LSE has to be the same number. ptxas would make one instruction of
    product and difference in one place and not in the other, and a score of 1e4 be off by what its rounding is.
    """
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def rounded_sum(a, b, c):
    """a * b + c, rounded once wherever it is used; see ``rounded_product``."""
    return tl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], dtype=tl.float32, is_pure=True, pack=1
    )


# Keys at a time while the LSE is computed: more than in the other sweep, which has to keep other tiles as well.
LSE_KEYS = tl.constexpr(32)


@triton.jit
def unless_blind(lse, SHAPE: tl.constexpr):
    """The LSE, OUTSIDE for rows that see no key."""
    return tl.where(lse == float("-inf"), OUTSIDE, lse) if SHAPE.HIDES else lse


@triton.jit
def probabilities(scores, lse, SHAPE: tl.constexpr):
    """exp2(scores - lse): [HEADS_PADDED, BLOCK_M, BLOCK_N], float32.

    Rows that share a mixing dot are kept apart by zero weights, which do not stop a NaN: a row whose softmax is NaN is
    zero here, and ``poison_rows`` makes its results NaN again.
    """
    exponents = scores - lse[:, :, None]
    if SHAPE.PACK > 1 or SHAPE.CHUNKS > 1:
        # Rows outside the sequence have no part in anything, whatever an infinite key makes of them.
        known = lse != OUTSIDE
        if SHAPE.PACK > 1:
            known = known & is_finite(lse)
        exponents = tl.where(known[:, :, None], exponents, float("-inf"))
    return tl.exp2(exponents)


@triton.jit
def lse_step(
    running_max, running_sum, q_tile, q, row_start, k, start, batch, pre_mixing, mask, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHAPE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The largest score, and the sum of exp2(score - that), after some more keys: [HEADS_PADDED, BLOCK_M] each."""
    visible = find_visible_keys(mask, batch, 0, start, k, BLOCK_N, SHAPE, WHOLE)
    k_tile = load_rows(k, batch, 0, start, 0, BLOCK_N, SHAPE, WHOLE, visible=visible)
    scores = score_tile(
        q_tile, q, row_start, k_tile, k, start, batch, 0, pre_mixing, mask, visible, scale_log2, BLOCK_M, BLOCK_N,
        SHAPE, WHOLE,
    )  # fmt: skip
    new_max = tl.maximum(running_max, tl.max(scores, axis=2))
    # A row of -inf so far would give inf - inf.
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    running_sum = running_sum * tl.exp2(running_max - finite_max)
    running_sum += tl.sum(tl.exp2(scores - finite_max[:, :, None]), axis=2)
    return new_max, running_sum


@triton.jit
def row_lse(
    q_tile, q, row_start, k, clear, keys, batch, pre_theta_ptr, mask, scale_log2, dtype: tl.constexpr,
    BLOCK_M: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp, base 2, of the scores of a block of rows, see ``find_span``: [HEADS_PADDED, BLOCK_M]; -inf for a row
    that sees no key."""
    running_max = tl.full((SHAPE.HEADS_PADDED, BLOCK_M), float("-inf"), dtype=tl.float32)
    running_sum = tl.full((SHAPE.HEADS_PADDED, BLOCK_M), 0.0, dtype=tl.float32)
    q_tile = held(q_tile[0]), q_tile[1]
    pre_mixing = load_pre_mixing(pre_theta_ptr, dtype, BLOCK_M, LSE_KEYS, SHAPE)
    whole = clear // LSE_KEYS * LSE_KEYS if SHAPE.CLEAR or not SHAPE.HIDES else 0
    if SHAPE.CLEAR or not SHAPE.HIDES:
        for start in range(0, whole, LSE_KEYS):
            running_max, running_sum = lse_step(
                running_max, running_sum, q_tile, q, row_start, k, start, batch, pre_mixing, mask, scale_log2, BLOCK_M,
                LSE_KEYS, SHAPE, True,
            )  # fmt: skip
    for start in tl.range(whole, keys, LSE_KEYS, num_stages=1 if SHAPE.CLEAR or not SHAPE.HIDES else None):
        running_max, running_sum = lse_step(
            running_max, running_sum, q_tile, q, row_start, k, start, batch, pre_mixing, mask, scale_log2, BLOCK_M,
            LSE_KEYS, SHAPE, False,
        )  # fmt: skip
    return running_max + tl.log2(running_sum)


@triton.jit
def dropout(probs, seed_ptr, dropout_p, batch, first_head, rows, columns, SHAPE: tl.constexpr):
    """Drops and rescales a tile, by head; what is drawn depends on seed and position alone, not on the tiling."""
    if seed_ptr is not None:
        heads = first_head + tl.arange(0, SHAPE.HEADS_PADDED)[:, None, None]
        zero = tl.full(probs.shape, 0, dtype=tl.int32)
        bits, _, _, _ = tl.philox(
            tl.load(seed_ptr),
            zero + columns[None, None, :],
            zero + rows[None, :, None],
            zero + (batch.to(tl.int32) * SHAPE.HEADS + heads),
            zero,
        )
        probs = tl.where(uint_to_uniform_float(bits) >= dropout_p, probs * tl.div_rn(1.0, 1.0 - dropout_p), 0.0)
    return probs


@triton.jit
def uint_to_uniform_float(bits):
    """Uniform in [0, 1) from the upper 24 of 32 random bits."""
    return (bits.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def map_tile(
    q_tile, q, row_start, k_tile, k, column_start, batch, lse, pre_mixing, seed_ptr, mask, visible, scale_log2,
    dropout_p, dtype: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHAPE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of the softmax maps, P and P after dropout, by head; the latter centred, by position, in the dots' dtype,
    HIDDEN where a mask of its own hides a key from a head; and what is hidden, by head."""
    rows = row_start + tl.arange(0, BLOCK_M)
    columns = column_start + tl.arange(0, BLOCK_N)
    scores = score_tile(
        q_tile, q, row_start, k_tile, k, column_start, batch, 0, pre_mixing, mask, visible, scale_log2, BLOCK_M,
        BLOCK_N, SHAPE, WHOLE,
    )  # fmt: skip
    probs = probabilities(scores, lse, SHAPE)
    kept = dropout(probs, seed_ptr, dropout_p, batch, 0, rows, columns, SHAPE)
    centred = kept - 1.0 / k.seqlen
    hidden = scores == float("-inf")
    if SHAPE.MASK_HEADS:
        centred = tl.where(hidden, HIDDEN, centred)
    return probs, kept, by_position(centred.to(dtype), SHAPE), hidden
