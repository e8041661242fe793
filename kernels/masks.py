"""Which keys are hidden: masks by key, by query, by head, and causal ones.

What is hidden has a score of -inf, and weight zero after mixing and norm. Where a mask hides keys from all queries
alike, they are not loaded, so that their weights do not matter. Where it differs between queries, the weights of hidden
keys are set to zero. Zero times what is not finite is NaN: a block whose results are not finite is computed once more,
strictly.
"""

import triton
import triton.language as tl

from .tiles import position_keys, position_rows


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
    base = mask.ptr + tl.cast(batch, tl.int64) * mask.batch_stride + tl.cast(column_start, tl.int64) * mask.key_stride
    offsets = distance(columns, mask.key_stride, SHAPE)
    if SHAPE.MASK_ROWS:
        base += tl.cast(row_start, tl.int64) * mask.row_stride
        offsets += distance(rows, mask.row_stride, SHAPE)
    if SHAPE.MASK_HEADS:
        base += tl.cast(first_head, tl.int64) * mask.head_stride
        offsets += distance(heads, mask.head_stride, SHAPE)
    if SHAPE.MASK == "float":
        given = tl.load(base + offsets, mask=inside, other=float("-inf"))
    else:
        given = load_bytes(base + offsets, inside)
    return given


@triton.jit
def distance(index, stride, SHAPE: tl.constexpr):
    """Of an element within a tile."""
    return (index.to(tl.int64) if SHAPE.WIDE else index) * stride


@triton.jit
def load_bytes(pointers, inside):
    """Bytes as int32, zero outside.

    Where a load of 8 bits has to do with an operand of a dot, Triton takes the operand for one of 8 bits, and lays it
    out as such.
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
    """Where keys are hidden from all queries alike, which are visible: [HEADS_PADDED or 1, ROWS, 1]; else None. The
    others are not read: nothing that is in them arrives anywhere."""
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


# Keys at a time while the span is looked for.
SPAN_KEYS = tl.constexpr(256)


@triton.jit
def find_span(mask, batch, row_start, k, BLOCK_M: tl.constexpr, SHAPE: tl.constexpr):
    """How many of the first keys a block of rows may see as without a mask, and behind how many it sees none."""
    clear, keys = k.seqlen, k.seqlen
    if SHAPE.CAUSAL:
        clear, keys = tl.minimum(row_start + 1, k.seqlen), tl.minimum(row_start + BLOCK_M, k.seqlen)
    if SHAPE.BY_KEY and not SHAPE.MASK_HEADS:
        own = tl.arange(0, SPAN_KEYS)
        first = tl.full((SPAN_KEYS,), k.seqlen, dtype=tl.int32)
        end = tl.full((SPAN_KEYS,), 0, dtype=tl.int32)
        for start in range(0, k.seqlen, SPAN_KEYS):
            given = load_masked(mask, batch, 0, 0, 0, 0, start, own, own < k.seqlen - start, SHAPE)
            hidden = hides(given, mask, SHAPE)
            first = tl.minimum(first, tl.where(hidden, start + own, k.seqlen))
            end = tl.maximum(end, tl.where(hidden, 0, start + own + 1))
        clear, keys = tl.minimum(clear, tl.min(first)), tl.minimum(keys, tl.max(end))
    return clear, keys


# In place of a centred map, which is never below -1: the mask of a head then takes the way of its map to where heads
# are mixed. Its bits are the same in bfloat16 and float16.
HIDDEN = tl.constexpr(-2.0)


@triton.jit
def find_hidden(centred, centre, SHAPE: tl.constexpr):
    """The centred maps, those that masks of their own hide as maps of zero, and what is hidden: by position."""
    if centred.dtype.primitive_bitwidth == 16:
        hidden = centred.to(tl.int16, bitcast=True) == -0x4000
    else:
        hidden = centred.to(tl.int32, bitcast=True) == -0x40000000
    return tl.where(hidden, (-centre).to(centred.dtype), centred), hidden
