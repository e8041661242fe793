"""The only place where a product of query and key becomes a probability: scale, exponential, dropout."""

import triton
import triton.language as tl

from .tiles import by_position, dot_rows, held, is_finite, load_rows, position_keys, position_rows


@triton.jit
def score_tile(
    q_tile, q, row_start, k_tile, k, column_start, batch, first_head, mask, visible, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHAPE: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """Scores as exponents to base 2, -inf at keys outside the sequence and at hidden ones: [HEADS_PADDED, BLOCK_M,
    BLOCK_N], float32."""
    columns = column_start + tl.arange(0, BLOCK_N)
    dots = dot_rows(q_tile, q, row_start, k_tile, k, column_start, batch, first_head, BLOCK_M, BLOCK_N, SHAPE, visible)
    if WHOLE:
        scores = rounded_product(dots, scale_log2)
    elif SHAPE.MASK == "none":
        scores = rounded_product(dots, scale_log2)
        scores = tl.where((columns < k.seqlen)[None, None, :], scores, float("-inf"))
    else:
        given = load_mask(mask, batch, first_head, row_start, q, column_start, k, BLOCK_M, BLOCK_N, SHAPE)
        hidden = hides(given, mask, SHAPE)
        if SHAPE.MASK == "float":
            scores = rounded_sum(dots, scale_log2, tl.where(hidden, float("-inf"), given.to(tl.float32) * LOG2E))
        elif SHAPE.BY_KEY:
            scores = rounded_sum(dots, scale_log2, tl.where(hidden, float("-inf"), 0.0))
        else:
            scores = rounded_product(dots, scale_log2)
        if not SHAPE.BY_KEY:
            # Of keys that some see: NaN is not hidden by what is added.
            scores = tl.where(hidden, float("-inf"), scores)
    if SHAPE.CAUSAL and not WHOLE:
        rows = row_start + tl.arange(0, BLOCK_M)
        scores = tl.where(columns[None, None, :] > rows[None, :, None], float("-inf"), scores)
    return scores


@triton.jit
def load_mask(
    mask, batch, first_head, row_start, q, column_start, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """A tile of the mask, by head: [HEADS_PADDED or 1, BLOCK_M or 1, BLOCK_N]."""
    columns = tl.arange(0, BLOCK_N)[None, None, :]
    heads = tl.arange(0, SHAPE.HEADS_PADDED)[:, None, None]
    rows = tl.arange(0, BLOCK_M)[None, :, None]
    inside = columns < k.seqlen - column_start
    if SHAPE.MASK_ROWS:
        inside &= rows < q.seqlen - row_start
    if SHAPE.MASK_HEADS:
        inside &= heads < SHAPE.HEADS - first_head
    return load_masked(mask, batch, first_head, heads, row_start, rows, column_start, columns, inside, SHAPE)


@triton.jit
def load_masked(mask, batch, first_head, heads, row_start, rows, column_start, columns, inside, SHAPE: tl.constexpr):
    """The mask at some heads, rows and keys, each counted from the first; what hides, outside."""
    if SHAPE.WIDE:
        heads, rows, columns = heads.to(tl.int64), rows.to(tl.int64), columns.to(tl.int64)
    base = mask.ptr + tl.cast(batch, tl.int64) * mask.batch_stride + tl.cast(column_start, tl.int64) * mask.key_stride
    offsets = columns * mask.key_stride
    if SHAPE.MASK_ROWS:
        base += tl.cast(row_start, tl.int64) * mask.row_stride
        offsets += rows * mask.row_stride
    if SHAPE.MASK_HEADS:
        base += tl.cast(first_head, tl.int64) * mask.head_stride
        offsets += heads * mask.head_stride
    if SHAPE.MASK == "float":
        given = tl.load(base + offsets, mask=inside, other=float("-inf"))
    else:
        given = load_bytes(base + offsets, inside)
    return given


@triton.jit
def load_bytes(pointers, inside):
    """Bytes as int32, zero outside.

    Where a load of 8 bits has to do with an operand of a dot, Triton takes the operand for one of 8 bits and lays it out
    as such.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.u8 $0, [$1]; }", "=r,l,r",
        [pointers.to(tl.int64), inside.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def hides(given, mask, SHAPE: tl.constexpr):
    """Where the elements of a mask hide a key. What is NaN does not."""
    if SHAPE.MASK == "bool":
        hidden = given == 0
    else:
        hidden = given.to(tl.float32) <= mask.lowest
    return hidden


@triton.jit
def find_visible_keys(
    mask, batch, first_head, start, k, ROWS: tl.constexpr, SHAPE: tl.constexpr, WHOLE: tl.constexpr = False
):
    """Where keys are hidden from all queries alike, which are visible: [HEADS_PADDED or 1, ROWS, 1]; else None. The others
    are not read: nothing that is in them arrives anywhere."""
    visible = None
    if SHAPE.BY_KEY and not WHOLE:
        heads = tl.arange(0, SHAPE.HEADS_PADDED)[:, None, None]
        own = tl.arange(0, ROWS)[None, :, None]
        inside = own < k.seqlen - start
        if SHAPE.MASK_HEADS:
            inside &= heads < SHAPE.HEADS - first_head
        visible = ~hides(load_masked(mask, batch, first_head, heads, 0, 0, start, own, inside, SHAPE), mask, SHAPE)
    return visible


@triton.jit
def find_visible_positions(
    mask, batch, row_start, q, column_start, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHAPE: tl.constexpr
):
    """Which positions are not hidden and have a key of the sequence, of a mask that all heads share: [GROUPS or 1,
    POSITIONS, 1], with heads where a dot has several rows."""
    columns = position_keys(BLOCK_M, BLOCK_N, SHAPE)
    visible = columns < k.seqlen - column_start
    if SHAPE.BY_ROW:
        rows = position_rows(BLOCK_M, BLOCK_N, SHAPE)
        if SHAPE.CAUSAL:
            visible &= column_start + columns <= row_start + rows
    else:
        rows = columns
    if SHAPE.MASK != "none":
        if SHAPE.MASK_ROWS:
            visible &= rows < q.seqlen - row_start
        given = load_masked(mask, batch, 0, 0, row_start, rows, column_start, columns, visible, SHAPE)
        visible &= ~hides(given, mask, SHAPE)
    return visible


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def find_span(mask, batch, row_start, k, BLOCK_M: tl.constexpr, SHAPE: tl.constexpr):
    """How many of the first keys a block of rows may see as without a mask, and behind how many it sees none."""
    clear, keys = k.seqlen, k.seqlen
    if SHAPE.CAUSAL:
        clear, keys = tl.minimum(row_start + 1, k.seqlen), tl.minimum(row_start + BLOCK_M, k.seqlen)
    if SHAPE.BY_KEY and not SHAPE.MASK_HEADS:
        own = tl.arange(0, 256)
        first = tl.full((256,), k.seqlen, dtype=tl.int32)
        end = tl.full((256,), 0, dtype=tl.int32)
        for start in range(0, k.seqlen, 256):
            given = load_masked(mask, batch, 0, 0, 0, 0, start, own, own < k.seqlen - start, SHAPE)
            hidden = hides(given, mask, SHAPE)
            first = tl.minimum(first, tl.where(hidden, start + own, k.seqlen))
            end = tl.maximum(end, tl.where(hidden, 0, start + own + 1))
        clear, keys = tl.minimum(clear, tl.min(first)), tl.minimum(keys, tl.max(end))
    return clear, keys


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


# What stands for the LSE of rows outside the sequence, and of those that see no key.
OUTSIDE = tl.constexpr(1e30)
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
    running_max, running_sum, q_tile, q, row_start, k, start, batch, mask, scale_log2, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SHAPE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The largest score, and the sum of exp2(score - that), after some more keys: [HEADS_PADDED, BLOCK_M] each."""
    visible = find_visible_keys(mask, batch, 0, start, k, BLOCK_N, SHAPE, WHOLE)
    k_tile = load_rows(k, batch, 0, start, 0, BLOCK_N, SHAPE, WHOLE, visible=visible)
    scores = score_tile(
        q_tile, q, row_start, k_tile, k, start, batch, 0, mask, visible, scale_log2, BLOCK_M, BLOCK_N, SHAPE, WHOLE
    )
    new_max = tl.maximum(running_max, tl.max(scores, axis=2))
    # A row of -inf so far would give inf - inf.
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    running_sum = running_sum * tl.exp2(running_max - finite_max)
    running_sum += tl.sum(tl.exp2(scores - finite_max[:, :, None]), axis=2)
    return new_max, running_sum


@triton.jit
def row_lse(
    q_tile, q, row_start, k, clear, keys, batch, mask, scale_log2, BLOCK_M: tl.constexpr, SHAPE: tl.constexpr
):  # fmt: skip
    """Log-sum-exp, base 2, of the scores of a block of rows, see ``find_span``: [HEADS_PADDED, BLOCK_M]; -inf for a row
    that sees no key."""
    running_max = tl.full((SHAPE.HEADS_PADDED, BLOCK_M), float("-inf"), dtype=tl.float32)
    running_sum = tl.full((SHAPE.HEADS_PADDED, BLOCK_M), 0.0, dtype=tl.float32)
    q_tile = held(q_tile[0]), q_tile[1]
    whole = clear // LSE_KEYS * LSE_KEYS if SHAPE.CLEAR or not SHAPE.HIDES else 0
    if SHAPE.CLEAR or not SHAPE.HIDES:
        for start in range(0, whole, LSE_KEYS):
            running_max, running_sum = lse_step(
                running_max, running_sum, q_tile, q, row_start, k, start, batch, mask, scale_log2, BLOCK_M, LSE_KEYS,
                SHAPE, True,
            )  # fmt: skip
    for start in tl.range(whole, keys, LSE_KEYS, num_stages=1 if SHAPE.CLEAR or not SHAPE.HIDES else None):
        running_max, running_sum = lse_step(
            running_max, running_sum, q_tile, q, row_start, k, start, batch, mask, scale_log2, BLOCK_M, LSE_KEYS, SHAPE,
            False,
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
    q_tile, q, row_start, k_tile, k, column_start, batch, lse, seed_ptr, mask, visible, scale_log2, dropout_p,
    dtype: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHAPE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of the softmax maps, P and P after dropout, by head; the latter centred, by position, in the dots' dtype,
    HIDDEN where a mask of its own hides a key from a head; and what is hidden, by head."""
    rows = row_start + tl.arange(0, BLOCK_M)
    columns = column_start + tl.arange(0, BLOCK_N)
    scores = score_tile(
        q_tile, q, row_start, k_tile, k, column_start, batch, 0, mask, visible, scale_log2, BLOCK_M, BLOCK_N, SHAPE,
        WHOLE,
    )  # fmt: skip
    probs = probabilities(scores, lse, SHAPE)
    kept = dropout(probs, seed_ptr, dropout_p, batch, 0, rows, columns, SHAPE)
    centred = kept - 1.0 / k.seqlen
    hidden = scores == float("-inf")
    if SHAPE.MASK_HEADS:
        centred = tl.where(hidden, HIDDEN, centred)
    return probs, kept, by_position(centred.to(dtype), SHAPE), hidden


# In place of a centred map, which is never below -1: the mask of a head then takes the way of its map to where heads are
# mixed. Its bits are the same in bfloat16 and float16.
HIDDEN = tl.constexpr(-2.0)


@triton.jit
def find_hidden(centred, centre, SHAPE: tl.constexpr):
    """The centred maps, those that masks of their own hide as maps of zero, and what is hidden: by position."""
    if centred.dtype.primitive_bitwidth == 16:
        hidden = centred.to(tl.int16, bitcast=True) == -0x4000
    else:
        hidden = centred.to(tl.int32, bitcast=True) == -0x40000000
    return tl.where(hidden, (-centre).to(centred.dtype), centred), hidden
