"""Tiles, and the steps on them that the kernels share.

Two arrangements of a tile of maps occur. *Head-major* ``[HEADS_PADDED, BLOCK_M, BLOCK_N]`` suits the products with
query, key and value: one dot batched over the heads. *Row-major* ``[BLOCK_M / PACK, PACK * HEADS_PADDED, BLOCK_N]``
suits mixing: one dot for every row, with the heads as the axis summed over, and the norm's reduction over heads within
a warp. A dot sums over at least 16 terms, so with fewer than 16 padded heads PACK rows share one, and the mixing
weights stand repeated down a block diagonal.

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
    numbers. ``statistics (2 * HEADS + 1,)`` and ``grad_sums (2, HEADS)`` are float64, of batch norm in training."""

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


class Shape(NamedTuple):
    """The compile-time constants of a problem; see the module's docstring. Columns up to DIM_LOADED are read, up to
    HEAD_DIM written. NORM: "none", "layer" or "batch"; TRAINING: batch norm takes the statistics of the batch."""

    HEADS: int
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


@triton.jit
def which_block(seqlen, BLOCK: tl.constexpr):
    """This program's sample and first row; samples follow one another along the one grid axis that may be long."""
    blocks = tl.cdiv(seqlen, BLOCK)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK


@triton.jit
def row_pointers(view, batch, start, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """The first element of every head's rows, and which lie inside: [HEADS_PADDED, ROWS, 1].

    The block's own offset is 64-bit; within it 32 bits do (the launcher sets WIDE where they do not) and spare
    registers.
    """
    heads = tl.arange(0, SHAPE.HEADS_PADDED)[:, None, None]
    rows = tl.arange(0, ROWS)[None, :, None]
    inside = (heads < SHAPE.HEADS) & (start + rows < view.seqlen)
    if SHAPE.WIDE:
        heads = heads.to(tl.int64)
        rows = rows.to(tl.int64)
    base = view.ptr + tl.cast(batch, tl.int64) * view.batch_stride + tl.cast(start, tl.int64) * view.row_stride
    return base + (heads * view.head_stride + rows * view.row_stride), inside


@triton.jit
def load_rows(view, batch, start, chunk, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """A chunk of head_dim of every head's rows, zero outside: ([HEADS_PADDED, ROWS, DIM_MAIN], [.., DIM_TAIL])."""
    base, inside = row_pointers(view, batch, start, ROWS, SHAPE)
    dims = (chunk * SHAPE.DIM_MAIN + tl.arange(0, SHAPE.DIM_MAIN))[None, None, :]
    main = tl.load(base + dims, mask=inside & (dims < SHAPE.DIM_LOADED), other=0.0)
    tail = main
    if SHAPE.DIM_TAIL > 0:
        dims = (SHAPE.DIM_MAIN + tl.arange(0, SHAPE.DIM_TAIL))[None, None, :]
        tail = tl.load(base + dims, mask=inside & (dims < SHAPE.DIM_LOADED), other=0.0)
    return main, tail


@triton.jit
def store_rows(view, batch, start, chunk, main, tail, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """Writes a chunk of head_dim of every head's rows, in the tensor's dtype."""
    base, inside = row_pointers(view, batch, start, ROWS, SHAPE)
    dims = (chunk * SHAPE.DIM_MAIN + tl.arange(0, SHAPE.DIM_MAIN))[None, None, :]
    tl.store(base + dims, main.to(view.ptr.dtype.element_ty), mask=inside & (dims < SHAPE.HEAD_DIM))
    if SHAPE.DIM_TAIL > 0:
        dims = (SHAPE.DIM_MAIN + tl.arange(0, SHAPE.DIM_TAIL))[None, None, :]
        tl.store(base + dims, tail.to(view.ptr.dtype.element_ty), mask=inside & (dims < SHAPE.HEAD_DIM))


@triton.jit
def per_row_pointers(ptr, batch, start, seqlen, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """Pointers into a contiguous (batch, heads, seqlen) tensor, and which lie inside: [HEADS_PADDED, ROWS]."""
    heads = tl.arange(0, SHAPE.HEADS_PADDED)[:, None]
    rows = tl.arange(0, ROWS)[None, :]
    inside = (heads < SHAPE.HEADS) & (start + rows < seqlen)
    if SHAPE.WIDE:
        heads = heads.to(tl.int64)
    return ptr + (tl.cast(batch, tl.int64) * SHAPE.HEADS * seqlen + start) + (heads * seqlen + rows), inside


@triton.jit
def load_matrix(ptr, row_stride, column_stride, SHAPE: tl.constexpr, ONES: tl.constexpr = False):
    """A heads x heads matrix, or ones in its place, PACK times down the diagonal: [PACK * HEADS_PADDED, PACK *
    HEADS_PADDED], float32."""
    index = tl.arange(0, SHAPE.PACK * SHAPE.HEADS_PADDED)
    head = index % SHAPE.HEADS_PADDED
    same_row = (index // SHAPE.HEADS_PADDED)[:, None] == (index // SHAPE.HEADS_PADDED)[None, :]
    mask = same_row & (head < SHAPE.HEADS)[:, None] & (head < SHAPE.HEADS)[None, :]
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
def rows_inside(row_start, seqlen, BLOCK_M: tl.constexpr, SHAPE: tl.constexpr):
    """Which rows of a row-major tile lie inside the sequence: [BLOCK_M / PACK, PACK * HEADS_PADDED]."""
    HEADS_PACKED: tl.constexpr = SHAPE.PACK * SHAPE.HEADS_PADDED
    groups = tl.arange(0, BLOCK_M // SHAPE.PACK)[:, None]
    rows = row_start + groups * SHAPE.PACK + (tl.arange(0, HEADS_PACKED) // SHAPE.HEADS_PADDED)[None, :]
    return rows < seqlen


@triton.jit
def inside_by_row(row_start, seqlen, columns, seqlen_k, BLOCK_M: tl.constexpr, SHAPE: tl.constexpr):
    """Which positions of a row-major tile lie inside both sequences: [BLOCK_M / PACK, PACK * HEADS_PADDED, BLOCK_N]."""
    return rows_inside(row_start, seqlen, BLOCK_M, SHAPE)[:, :, None] & (columns < seqlen_k)[None, None, :]


@triton.jit
def store_partial_sums(vector_ptr, matrix_ptr, vector, matrix):
    """This program's sums into (programs, SIZE) and (programs, SIZE, SIZE), contiguous."""
    program = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, vector.shape[0])
    tl.store(vector_ptr + program * vector.shape[0] + index, vector)
    matrix_ptr += program * vector.shape[0] * vector.shape[0]
    tl.store(matrix_ptr + index[:, None] * vector.shape[0] + index[None, :], matrix)


@triton.jit
def dot_heads(a_tile, b_tile, SHAPE: tl.constexpr):
    """a @ b^T for every head: [HEADS_PADDED, M, DIM] x [HEADS_PADDED, N, DIM] -> [HEADS_PADDED, M, N], float32."""
    product = tl.dot(a_tile[0], tl.permute(b_tile[0], (0, 2, 1)), input_precision=SHAPE.PRECISION)
    if SHAPE.DIM_TAIL > 0:
        product += tl.dot(a_tile[1], tl.permute(b_tile[1], (0, 2, 1)), input_precision=SHAPE.PRECISION)
    return product


@triton.jit
def dot_rows(
    a_tile, a, a_start, b_tile, b, b_start, batch, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, SHAPE: tl.constexpr
):  # fmt: skip
    """``dot_heads`` over all of head_dim: of the tiles where they hold it, else loading both chunk by chunk."""
    if SHAPE.CHUNKS == 1:
        product = dot_heads(a_tile, b_tile, SHAPE)
    else:
        product = tl.full((SHAPE.HEADS_PADDED, A_ROWS, B_ROWS), 0.0, dtype=tl.float32)
        for chunk in range(SHAPE.CHUNKS):
            a_chunk = load_rows(a, batch, a_start, chunk, A_ROWS, SHAPE)
            b_chunk = load_rows(b, batch, b_start, chunk, B_ROWS, SHAPE)
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


@triton.jit
def to_row_major(tile, SHAPE: tl.constexpr):
    """[HEADS_PADDED, BLOCK_M, BLOCK_N] -> [BLOCK_M / PACK, PACK * HEADS_PADDED, BLOCK_N]."""
    by_row = tl.permute(tile, (1, 0, 2))
    return tl.reshape(by_row, (tile.shape[1] // SHAPE.PACK, SHAPE.PACK * SHAPE.HEADS_PADDED, tile.shape[2]))


@triton.jit
def to_head_major(tile, SHAPE: tl.constexpr):
    """[BLOCK_M / PACK, PACK * HEADS_PADDED, BLOCK_N] -> [HEADS_PADDED, BLOCK_M, BLOCK_N]."""
    by_row = tl.reshape(tile, (tile.shape[0] * SHAPE.PACK, SHAPE.HEADS_PADDED, tile.shape[2]))
    return tl.permute(by_row, (1, 0, 2))


@triton.jit
def mix_heads(weights, tile, SHAPE: tl.constexpr):
    """weights @ tile over the heads of every row: [HEADS, HEADS] x [ROWS, HEADS, BLOCK_N] -> [ROWS, HEADS, BLOCK_N],
    float32."""
    ROWS: tl.constexpr = tile.shape[0]
    HEADS: tl.constexpr = tile.shape[1]
    BLOCK_N: tl.constexpr = tile.shape[2]
    weights = weights.to(tile.dtype)
    if (tile.dtype == tl.float32 and SHAPE.PRECISION == "ieee") or SHAPE.HEADS_PADDED > 16:
        # Not on tensor cores: a dot batched over rows would hold the weights once for every row.
        columns = tl.reshape(tl.permute(tile, (1, 0, 2)), (HEADS, ROWS * BLOCK_N))
        mixed = tl.reshape(tl.dot(weights, columns, input_precision="ieee"), (HEADS, ROWS, BLOCK_N))
        mixed = tl.permute(mixed, (1, 0, 2))
    else:
        weights = tl.broadcast_to(weights[None, :, :], (ROWS, HEADS, HEADS))
        mixed = tl.dot(weights, tile, input_precision=SHAPE.PRECISION)
    return mixed


@triton.jit
def mean_over_heads(tile, dtype: tl.constexpr, SHAPE: tl.constexpr):
    """Mean over the heads of every row, in place of each: row-major in and out, float32. ``dtype``: of the dots.

    In full precision a dot of float32 leaves a layout whose warps lie across several axes, and of that Triton before
    3.8 computes sums wrongly (github.com/triton-lang/triton/pull/9219): a dot with ones takes the sum's place. Which
    layout a reduction meets Triton does not say; tests/test_compiled.py runs them all.
    """
    if dtype == tl.float32 and SHAPE.PRECISION == "ieee":
        # The padding gets the mean of its row too, and no root of zero.
        index = tl.arange(0, SHAPE.PACK * SHAPE.HEADS_PADDED)
        same_row = (index // SHAPE.HEADS_PADDED)[:, None] == (index // SHAPE.HEADS_PADDED)[None, :]
        ones = tl.where(same_row & (index % SHAPE.HEADS_PADDED < SHAPE.HEADS)[None, :], 1.0, 0.0)
        means = mix_heads(ones, tile, SHAPE) * (1.0 / SHAPE.HEADS)
    else:
        by_row = tl.reshape(tile, (tile.shape[0] * SHAPE.PACK, SHAPE.HEADS_PADDED, tile.shape[2]))
        mean = tl.sum(by_row, axis=1, keep_dims=True) * (1.0 / SHAPE.HEADS)
        means = tl.reshape(tl.broadcast_to(mean, by_row.shape), tile.shape)
    return means


@triton.jit
def is_finite(tile):
    """Neither infinite nor NaN."""
    return tl.abs(tile) < float("inf")


@triton.jit
def poison_rows(tile, lse, SHAPE: tl.constexpr):
    """NaN in every head of a row whose softmax is NaN in one of them, as mixing would leave it: head-major."""
    if SHAPE.PACK > 1:
        tile = tl.where(is_finite(over_heads(lse))[:, :, None], tile, float("nan"))
    return tile


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
