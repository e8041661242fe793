"""Tiles, and the steps on them that the kernels share.

Two arrangements of a tile of maps occur. *By head*, ``[HEADS_PADDED, BLOCK_M, BLOCK_N]``, suits the products with
query, key and value: one dot batched over the heads, which the warps share out among them. *By position*, ``[GROUPS,
POSITIONS, PACK * HEADS_PADDED]``, suits mixing: positions of the maps are rows and heads are columns. Mixing is then
one dot with the weights, and a norm's reduction over heads stays within four lanes. Positions come in groups, one for
each of 8 warps, and a dot is batched over the groups: none needs what another warp has. A dot sums over at least 16
terms, so with fewer than 16 padded heads PACK query rows share one, and the mixing weights stand repeated down a block
diagonal.

head_dim is covered by two powers of two, DIM_MAIN and DIM_TAIL (0 for none): 33 is 32 + 16, not 64. Where all of it
does not fit on chip, it is cut in CHUNKS of DIM_MAIN instead: products over head_dim load one after the other, and
each chunk of an output is a program of its own.

Maps are centred at 1 / seqlen_k before they are rounded to the dot's dtype: rounding then scales with what differs
between keys, not with the constant part, which enters in float32 through the shift.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class View(NamedTuple):
    """A (batch, heads, seqlen, head_dim) tensor as kernels take it, its rows contiguous: pointer, strides, seqlen."""

    ptr: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any
    seqlen: Any


class Norm(NamedTuple):
    """What the user gave beside query, key and value: pointers to float32 parameters, None where there is none, and
    numbers. ``statistics (3, HEADS_OUT)`` and ``grad_sums (2, HEADS_OUT)`` are float64, of batch norm in training."""

    theta: Any
    bias: Any
    norm_weight: Any
    norm_bias: Any
    running_mean: Any
    running_var: Any
    statistics: Any
    grad_sums: Any
    output_scale: Any
    eps: Any
    unit_scale: Any


class Mask(NamedTuple):
    """A mask, or a bias of the scores: pointer, or None; strides, 0 where all share an element; the largest number that
    hides."""

    ptr: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any
    key_stride: Any
    lowest: Any


class Shape(NamedTuple):
    """The compile-time constants of a problem; see the module's docstring. HEADS before mixing, HEADS_OUT after it; of
    what has heads after mixing, functions take ``after_mixing(SHAPE)``. PRE_MIX: the scores are mixed before the
    softmax. Columns up to DIM_LOADED are read, up to HEAD_DIM written. NORM: "none", "layer" or "batch"; TRAINING:
    batch norm takes the statistics of the batch. MASK: "none", "bool" or "float", and whether it differs between heads
    and queries. HIDES: there is one, or CAUSAL; BY_KEY: it hides keys from all queries alike, and these are not loaded;
    BY_ROW: what is hidden differs between queries, or is dealt with as if it did; CLEAR: before the first hidden key of
    a block of queries all is as without a mask."""

    HEADS: int
    HEADS_OUT: int
    HEADS_PADDED: int
    PACK: int
    HEAD_DIM: int
    DIM_LOADED: int
    DIM_MAIN: int
    DIM_TAIL: int
    CHUNKS: int
    PRECISION: str
    WIDE: bool
    NORM: str
    TRAINING: bool
    MASK: str
    MASK_HEADS: bool
    MASK_ROWS: bool
    CAUSAL: bool
    HIDES: bool
    BY_KEY: bool
    BY_ROW: bool
    CLEAR: bool
    PRE_MIX: bool


@triton.constexpr_function
def after_mixing(shape):
    """The shape of a problem for what has heads after mixing."""
    return shape._replace(HEADS=shape.HEADS_OUT)


@triton.jit
def which_block(seqlen, BLOCK: tl.constexpr):
    """This program's sample and first row, or key; samples follow one another along the one grid axis that may be
    long."""
    blocks = tl.cdiv(seqlen, BLOCK)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK


@triton.jit
def row_pointers(
    view, batch, first_head, start, ROWS: tl.constexpr, SHAPE: tl.constexpr, WHOLE: tl.constexpr = False,
    REPEAT: tl.constexpr = False,
):  # fmt: skip
    """The first element of rows of all heads, or some from the first on, and which lie inside: [HEADS_PADDED, ROWS, 1].

    WHOLE: all rows are known to lie inside. REPEAT: rows behind the last repeat it.

    The block's own offset is 64-bit; within it 32 bits do (the launcher sets WIDE where they do not) and spare
    registers.
    """
    heads = tl.arange(0, SHAPE.HEADS_PADDED)[:, None, None]
    rows = tl.arange(0, ROWS)[None, :, None]
    if REPEAT:
        rows = tl.minimum(rows, view.seqlen - 1 - start)
    if WHOLE:
        inside = (first_head + heads < SHAPE.HEADS) & (rows >= 0)  # of one shape with the other
    else:
        # One comparison: heads that do not exist have no rows.
        inside = rows < tl.where(first_head + heads < SHAPE.HEADS, view.seqlen - start, 0)
    if SHAPE.WIDE:
        heads = heads.to(tl.int64)
        rows = rows.to(tl.int64)
    base = view.ptr + tl.cast(batch, tl.int64) * view.batch_stride + tl.cast(start, tl.int64) * view.row_stride
    base += tl.cast(first_head, tl.int64) * view.head_stride
    return base + (heads * view.head_stride + rows * view.row_stride), inside


@triton.jit
def load_rows(
    view, batch, first_head, start, chunk, ROWS: tl.constexpr, SHAPE: tl.constexpr, WHOLE: tl.constexpr = False,
    REPEAT: tl.constexpr = False, visible=None,
):  # fmt: skip
    """A chunk of head_dim of all heads' rows, zero outside, and where they are not visible: ([HEADS_PADDED, ROWS,
    DIM_MAIN], [.., DIM_TAIL]). WHOLE and REPEAT as in ``row_pointers``."""
    base, inside = row_pointers(view, batch, first_head, start, ROWS, SHAPE, WHOLE, REPEAT)
    if visible is not None:
        inside &= visible
    dims = (chunk * SHAPE.DIM_MAIN + tl.arange(0, SHAPE.DIM_MAIN))[None, None, :]
    main = tl.load(heads_first(base, dims), mask=inside & (dims < SHAPE.DIM_LOADED), other=0.0)
    tail = main
    if SHAPE.DIM_TAIL > 0:
        dims = (SHAPE.DIM_MAIN + tl.arange(0, SHAPE.DIM_TAIL))[None, None, :]
        tail = tl.load(heads_first(base, dims), mask=inside & (dims < SHAPE.DIM_LOADED), other=0.0)
    return main, tail


@triton.jit
def heads_first(base, dims):
    """``base + dims``, pointers [HEADS, ROWS, DIM], loaded so that neighbouring threads have neighbouring heads.

    What a thread loads are then rows of one head, and Triton stores them, as operands of dots, swizzled by row. By
    itself it would let neighbouring threads have neighbouring rows and swizzle by head, so that ``ldmatrix``, which
    reads eight rows of a head, met the same banks eight times. It orders the axes by how many elements are contiguous
    along each. For heads the hint is not true; nothing but their order depends on it, since vectors go along DIM.
    """
    return tl.max_contiguous(base + dims, (2, 1, 16))


@triton.jit
def store_rows(view, batch, first_head, start, chunk, main, tail, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """Writes a chunk of head_dim of every head's rows, in the tensor's dtype."""
    base, inside = row_pointers(view, batch, first_head, start, ROWS, SHAPE)
    dims = (chunk * SHAPE.DIM_MAIN + tl.arange(0, SHAPE.DIM_MAIN))[None, None, :]
    tl.store(base + dims, main.to(view.ptr.dtype.element_ty), mask=inside & (dims < SHAPE.HEAD_DIM))
    if SHAPE.DIM_TAIL > 0:
        dims = (SHAPE.DIM_MAIN + tl.arange(0, SHAPE.DIM_TAIL))[None, None, :]
        tl.store(base + dims, tail.to(view.ptr.dtype.element_ty), mask=inside & (dims < SHAPE.HEAD_DIM))


@triton.jit
def per_row_pointers(ptr, batch, first_head, start, seqlen, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """Pointers into a contiguous (batch, heads, seqlen) tensor, and which lie inside: [HEADS_PADDED, ROWS]."""
    heads = tl.arange(0, SHAPE.HEADS_PADDED)[:, None]
    rows = tl.arange(0, ROWS)[None, :]
    inside = (first_head + heads < SHAPE.HEADS) & (start + rows < seqlen)
    if SHAPE.WIDE:
        heads = heads.to(tl.int64)
    base = ptr + ((tl.cast(batch, tl.int64) * SHAPE.HEADS + first_head) * seqlen + start)
    return base + (heads * seqlen + rows), inside


@triton.jit
def load_matrix(
    ptr, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHAPE: tl.constexpr,
    ONES: tl.constexpr = False,
):  # fmt: skip
    """A matrix of ROWS x COLUMNS heads, or ones in its place, PACK times down the diagonal: [PACK * HEADS_PADDED,
    PACK * HEADS_PADDED], float32."""
    index = tl.arange(0, SHAPE.PACK * SHAPE.HEADS_PADDED)
    head = index % SHAPE.HEADS_PADDED
    same_row = (index // SHAPE.HEADS_PADDED)[:, None] == (index // SHAPE.HEADS_PADDED)[None, :]
    mask = same_row & (head < ROWS)[:, None] & (head < COLUMNS)[None, :]
    if ONES:
        matrix = tl.where(mask, 1.0, 0.0)
    else:
        matrix = tl.load(ptr + head[:, None] * row_stride + head[None, :] * column_stride, mask=mask, other=0.0)
    return matrix


@triton.jit
def load_heads(ptr, default, SHAPE: tl.constexpr):
    """A vector over heads, PACK times: [PACK * HEADS_PADDED]; ``default`` in the padding, and everywhere for None."""
    head = tl.arange(0, SHAPE.PACK * SHAPE.HEADS_PADDED) % SHAPE.HEADS_PADDED
    if ptr is None:
        values = tl.full((SHAPE.PACK * SHAPE.HEADS_PADDED,), default, dtype=tl.float32)
    else:
        values = tl.load(ptr + head, mask=head < SHAPE.HEADS, other=default)
    return values


@triton.jit
def position_rows(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHAPE: tl.constexpr):
    """The row of the block that a position belongs to: [GROUPS, POSITIONS, 1], with heads where a dot has several
    rows."""
    group = tl.arange(0, groups(BLOCK_M, SHAPE))[:, None, None]
    rows = group + tl.arange(0, positions(BLOCK_M, BLOCK_N, SHAPE))[None, :, None] // BLOCK_N * groups(BLOCK_M, SHAPE)
    if SHAPE.PACK > 1:
        pack = tl.arange(0, SHAPE.PACK * SHAPE.HEADS_PADDED)[None, None, :] // SHAPE.HEADS_PADDED
        rows += pack * (BLOCK_M // SHAPE.PACK)
    return rows


@triton.jit
def position_keys(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHAPE: tl.constexpr):
    """The key of the block that a position belongs to: [1, POSITIONS, 1]."""
    return (tl.arange(0, positions(BLOCK_M, BLOCK_N, SHAPE)) % BLOCK_N)[None, :, None]


@triton.jit
def dot_heads(a_tile, b_tile, SHAPE: tl.constexpr):
    """a @ b^T for every head: [HEADS_PADDED, M, DIM] x [HEADS_PADDED, N, DIM] -> [HEADS_PADDED, M, N], float32."""
    product = tl.dot(a_tile[0], tl.permute(b_tile[0], (0, 2, 1)), input_precision=SHAPE.PRECISION)
    if SHAPE.DIM_TAIL > 0:
        product += tl.dot(a_tile[1], tl.permute(b_tile[1], (0, 2, 1)), input_precision=SHAPE.PRECISION)
    return product


@triton.jit
def dot_rows(
    a_tile, a, a_start, b_tile, b, b_start, batch, first_head, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr,
    SHAPE: tl.constexpr, visible=None,
):  # fmt: skip
    """``dot_heads`` over all of head_dim: of the tiles where they hold it, else loading both chunk by chunk; of b what
    is visible."""
    if SHAPE.CHUNKS == 1:
        product = dot_heads(a_tile, b_tile, SHAPE)
    else:
        product = tl.full((SHAPE.HEADS_PADDED, A_ROWS, B_ROWS), 0.0, dtype=tl.float32)
        for chunk in range(SHAPE.CHUNKS):
            a_chunk = load_rows(a, batch, first_head, a_start, chunk, A_ROWS, SHAPE)
            b_chunk = load_rows(b, batch, first_head, b_start, chunk, B_ROWS, SHAPE, visible=visible)
            product += dot_heads(a_chunk, b_chunk, SHAPE)
    return product


@triton.jit
def zero_rows(ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """Accumulators for a block of rows: ([HEADS_PADDED, ROWS, DIM_MAIN], [.., DIM_TAIL]), float32."""
    main = tl.full((SHAPE.HEADS_PADDED, ROWS, SHAPE.DIM_MAIN), 0.0, dtype=tl.float32)
    tail = main
    if SHAPE.DIM_TAIL > 0:
        tail = tl.full((SHAPE.HEADS_PADDED, ROWS, SHAPE.DIM_TAIL), 0.0, dtype=tl.float32)
    return main, tail


@triton.jit
def accumulate(main, tail, weights, tile, SHAPE: tl.constexpr):
    """weights @ tile for every head, added: [HEADS_PADDED, M, N] x [HEADS_PADDED, N, DIM] -> [HEADS_PADDED, M, DIM]."""
    main += tl.dot(weights, tile[0], input_precision=SHAPE.PRECISION)
    if SHAPE.DIM_TAIL > 0:
        tail += tl.dot(weights, tile[1], input_precision=SHAPE.PRECISION)
    return main, tail


@triton.constexpr_function
def groups(block_m, shape):
    """Into how many groups the positions of a tile of so many query rows come."""
    return min(8, block_m // shape.PACK)


@triton.constexpr_function
def positions(block_m, block_n, shape):
    """How many a group of ``groups`` has. (Triton 3.6 cannot call one such function from another.)"""
    return max(1, block_m // shape.PACK // 8) * block_n


@triton.jit
def by_position(tile, SHAPE: tl.constexpr):
    """[HEADS_PADDED, BLOCK_M, BLOCK_N] -> [GROUPS, POSITIONS, PACK * HEADS_PADDED]."""
    GROUPS: tl.constexpr = groups(tile.shape[1], SHAPE)
    ROWS: tl.constexpr = tile.shape[1] // SHAPE.PACK // GROUPS
    apart = tl.reshape(tile, (SHAPE.HEADS_PADDED, SHAPE.PACK, ROWS, GROUPS, tile.shape[2]))
    return tl.reshape(
        tl.permute(apart, (3, 2, 4, 1, 0)), (GROUPS, ROWS * tile.shape[2], SHAPE.PACK * SHAPE.HEADS_PADDED)
    )


@triton.jit
def by_head(tile, BLOCK_N: tl.constexpr, SHAPE: tl.constexpr):
    """[GROUPS, POSITIONS, PACK * HEADS_PADDED] -> [HEADS_PADDED, BLOCK_M, BLOCK_N]."""
    GROUPS: tl.constexpr = tile.shape[0]
    ROWS: tl.constexpr = tile.shape[1] // BLOCK_N
    apart = tl.reshape(tile, (GROUPS, ROWS, BLOCK_N, SHAPE.PACK, SHAPE.HEADS_PADDED))
    return tl.reshape(tl.permute(apart, (4, 3, 1, 0, 2)), (SHAPE.HEADS_PADDED, SHAPE.PACK * ROWS * GROUPS, BLOCK_N))


@triton.jit
def mix_heads(tile, weights, SHAPE: tl.constexpr):
    """tile @ weights over the heads of every position, float32: [.., HEADS] x [HEADS, HEADS], by position."""
    weights = tl.broadcast_to(weights.to(tile.dtype)[None, :, :], (tile.shape[0], tile.shape[2], tile.shape[2]))
    return tl.dot(tile, weights, input_precision=SHAPE.PRECISION)


@triton.jit
def mean_over_heads(tile, dtype: tl.constexpr, SHAPE: tl.constexpr):
    """Mean over the heads of every position, in place of each: float32. ``dtype``: of the dots.

    In full precision a dot of float32 leaves a layout whose warps lie across several axes, and of that Triton before
    3.8 computes sums wrongly (github.com/triton-lang/triton/pull/9219): a dot with ones takes the sum's place. Which
    layout a reduction meets Triton does not say; tests/test_compiled.py runs them all.
    """
    if dtype == tl.float32 and SHAPE.PRECISION == "ieee":
        # The padding gets the mean of its row too, and no root of zero.
        index = tl.arange(0, SHAPE.PACK * SHAPE.HEADS_PADDED)
        same_row = (index // SHAPE.HEADS_PADDED)[:, None] == (index // SHAPE.HEADS_PADDED)[None, :]
        ones = tl.where(same_row & (index % SHAPE.HEADS_PADDED < SHAPE.HEADS)[:, None], 1.0, 0.0)
        means = mix_heads(tile, ones, SHAPE) * (1.0 / SHAPE.HEADS)
    elif SHAPE.PACK == 1:
        means = tl.broadcast_to(tl.sum(tile, axis=2, keep_dims=True) * (1.0 / SHAPE.HEADS), tile.shape)
    else:
        apart = tl.reshape(tile, (tile.shape[0], tile.shape[1], SHAPE.PACK, SHAPE.HEADS_PADDED))
        mean = tl.sum(apart, axis=3, keep_dims=True) * (1.0 / SHAPE.HEADS)
        means = tl.reshape(tl.broadcast_to(mean, apart.shape), tile.shape)
    return means


@triton.jit
def zero_sums(BLOCK_M: tl.constexpr, SHAPE: tl.constexpr):
    """What ``fold_positions`` of such tiles adds up in: [GROUPS, 8, PACK * HEADS_PADDED], float32."""
    return tl.full((groups(BLOCK_M, SHAPE), 8, SHAPE.PACK * SHAPE.HEADS_PADDED), 0.0, dtype=tl.float32)


@triton.jit
def fold_positions(tile, dtype: tl.constexpr, SHAPE: tl.constexpr):
    """Sums of every eighth position: by position, to [GROUPS, 8, PACK * HEADS_PADDED]. After a 16-bit dot each sum lies
    in one lane; for full float32 see ``mean_over_heads``. ``dtype``: of the dots."""
    apart = tl.reshape(tile, (tile.shape[0], tile.shape[1] // 8, 8, tile.shape[2]))
    if dtype == tl.float32 and SHAPE.PRECISION == "ieee":
        rows = tl.reshape(tl.permute(apart, (1, 0, 2, 3)), (tile.shape[1] // 8, tile.shape[0] * 8 * tile.shape[2]))
        sums = tl.reshape(sum_by_halves(rows), (tile.shape[0], 8, tile.shape[2]))
    else:
        sums = tl.sum(apart, axis=1)
    return sums


@triton.jit
def held(tile):
    """A tile that was loaded before a loop, in registers: else dots fetch it from shared memory in every turn."""
    if tile.dtype.primitive_bitwidth == 16:
        tile = tl.inline_asm_elementwise("", "=r,0", [tile], dtype=tile.dtype, is_pure=True, pack=2)
    return tile


@triton.jit
def laid_out_like(tile, other):
    """A 16-bit tile in the layout of a float32 tile, or of one that broadcasts to it, which a dot has computed.

    Nothing is computed: an empty instruction takes both tiles, which need one layout for that, and Triton takes that
    of the dot. It converts through shared memory with a swizzle that suits both sides, and what then lies as a dot's
    result does is the first operand of the next dot as it is. By itself Triton would store the tile as an operand,
    with a swizzle for one side, and the other would meet the same banks eight times.
    """
    if tile.dtype.primitive_bitwidth == 16:
        other = tl.broadcast_to(other, tile.shape)
        tile = tl.inline_asm_elementwise("", "=r,0,r,r", [tile, other], dtype=tile.dtype, is_pure=True, pack=2)
    return tile


@triton.jit
def dot_layout(weights, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, AXIS: tl.constexpr, SHAPE: tl.constexpr):
    """For ``laid_out_like``: the layout of what dots of [GROUPS, ROWS, HEADS] tiles with the weights leave. Before the
    loop it takes one such dot, of zeros, whose largest number along AXIS holds few registers."""
    tile = tl.full((groups(BLOCK_M, SHAPE), ROWS, SHAPE.PACK * SHAPE.HEADS_PADDED), 0.0, dtype=weights.dtype)
    return tl.max(mix_heads(tile, weights, SHAPE), axis=AXIS, keep_dims=True)


@triton.jit
def is_finite(tile):
    """Neither infinite nor NaN."""
    if tile.dtype == tl.float16:
        finite = (tile.to(tl.int16, bitcast=True) & 0x7C00) != 0x7C00
    elif tile.dtype == tl.bfloat16:
        finite = (tile.to(tl.int16, bitcast=True) & 0x7F80) != 0x7F80
    else:
        finite = tl.abs(tile) < float("inf")
    return finite


@triton.jit
def any_broken(main, tail, SHAPE: tl.constexpr):
    """How many elements of a block of rows are not finite."""
    broken = tl.sum(tl.where(is_finite(main), 0, 1))
    if SHAPE.DIM_TAIL > 0:
        broken += tl.sum(tl.where(is_finite(tail), 0, 1))
    return broken


@triton.jit
def only_finite(tile, SHAPE: tl.constexpr):
    """A block of rows, zero where it is not finite. Zero times what is not would be NaN: what is hidden has weight
    zero."""
    main = tl.where(is_finite(tile[0]), tile[0], 0.0).to(tile[0].dtype)
    tail = main
    if SHAPE.DIM_TAIL > 0:
        tail = tl.where(is_finite(tile[1]), tile[1], 0.0).to(tile[1].dtype)
    return main, tail


@triton.jit
def broken_rows(tile, SHAPE: tl.constexpr):
    """Which rows are not finite: [HEADS_PADDED, ROWS]."""
    broken = tl.sum(tl.where(is_finite(tile[0]), 0, 1), axis=2)
    if SHAPE.DIM_TAIL > 0:
        broken += tl.sum(tl.where(is_finite(tile[1]), 0, 1), axis=2)
    return broken > 0


@triton.jit
def poison_rows(tile, lse, SHAPE: tl.constexpr):
    """NaN in every head of a row whose softmax is NaN in one of them, as mixing would leave it: by head."""
    if SHAPE.PACK > 1:
        tile = tl.where(sound_rows(lse, SHAPE)[:, :, None], tile, float("nan"))
    return tile


# What stands for the LSE of rows outside the sequence, and of those that see no key.
OUTSIDE = tl.constexpr(1e30)


@triton.jit
def sound_rows(lse, SHAPE: tl.constexpr):
    """Which rows no head's softmax makes NaN, or see no key, by head: [HEADS_PADDED, BLOCK_M]."""
    sound = is_finite(over_heads(lse))
    if SHAPE.MASK_HEADS:
        sound |= lse == OUTSIDE
    return sound


@triton.jit
def reached_heads(lse, row_mask, SHAPE: tl.constexpr):
    """Whether NaN of a row's softmax is in the mixed maps of a head: [HEADS_PADDED], or one for all. ``row_mask``: rows
    in the sequence."""
    if SHAPE.MASK_HEADS:
        reached = tl.sum(tl.where(sound_rows(lse, SHAPE) | ~row_mask, 0, 1), axis=1) > 0
    else:
        reached = tl.sum(tl.sum(tl.where(is_finite(lse) | ~row_mask, 0, 1), axis=1), axis=0) > 0
    return reached


@triton.jit
def over_heads(lse):
    """The LSE, with infinity in every head of a row where it is not finite in one: [HEADS_PADDED, BLOCK_M]."""
    broken = sum_by_halves(tl.where(is_finite(lse), 0.0, 1.0))
    return tl.where(broken[None, :] == 0.0, lse, float("inf"))


@triton.jit
def sum_by_halves(tile):
    """The sum over the rows, [ROWS, N] -> [N], for layouts of which ``tl.sum`` would be wrong; see
    ``mean_over_heads``."""
    if tile.shape[0] == 1:
        total = tl.reshape(tile, (tile.shape[1],))
    else:
        halves = tl.reshape(tile, (2, tile.shape[0] // 2, tile.shape[1]))
        upper, lower = tl.split(tl.permute(halves, (1, 2, 0)))
        total = sum_by_halves(upper + lower)
    return total
