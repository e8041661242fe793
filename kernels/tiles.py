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


class Mixing(NamedTuple):
    """Pointers to float32 parameters, None where there is none: weight (heads, heads), shift, gamma, beta (heads,);
    and what batch statistics add to the maps' gradient, coupled (heads, heads) and constant (heads,)."""

    weight: Any
    shift: Any
    gamma: Any = None
    beta: Any = None
    coupled: Any = None
    constant: Any = None


class Shape(NamedTuple):
    """The compile-time constants of a problem; see the module's docstring. Columns up to DIM_LOADED are read, up to
    HEAD_DIM written."""

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
def load_matrix(ptr, row_stride, column_stride, SHAPE: tl.constexpr):
    """A heads x heads matrix, PACK times down the diagonal: [PACK * HEADS_PADDED, PACK * HEADS_PADDED], float32."""
    index = tl.arange(0, SHAPE.PACK * SHAPE.HEADS_PADDED)
    head = index % SHAPE.HEADS_PADDED
    same_row = (index // SHAPE.HEADS_PADDED)[:, None] == (index // SHAPE.HEADS_PADDED)[None, :]
    mask = same_row & (head < SHAPE.HEADS)[:, None] & (head < SHAPE.HEADS)[None, :]
    return tl.load(ptr + head[:, None] * row_stride + head[None, :] * column_stride, mask=mask, other=0.0)


@triton.jit
def load_vector(ptr, SHAPE: tl.constexpr):
    """A vector over heads, PACK times: [1, PACK * HEADS_PADDED, 1], float32."""
    head = tl.arange(0, SHAPE.PACK * SHAPE.HEADS_PADDED) % SHAPE.HEADS_PADDED
    return tl.load(ptr + head, mask=head < SHAPE.HEADS, other=0.0)[None, :, None]


@triton.jit
def load_mixing(mixing, centre, dtype: tl.constexpr, SHAPE: tl.constexpr):
    """The mixing weights [g, h] in the dots' dtype; the shift, with what centring took from the maps; gamma and beta,
    or the shift."""
    weights = load_matrix(mixing.weight, 1, SHAPE.HEADS, SHAPE)
    shift = load_vector(mixing.shift, SHAPE) + (tl.sum(weights, axis=1) * centre)[None, :, None]
    gamma, beta = shift, shift
    if mixing.gamma is not None:
        gamma = load_vector(mixing.gamma, SHAPE)
        beta = load_vector(mixing.beta, SHAPE)
    return weights.to(dtype), shift, gamma, beta


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
def mean_over_heads(tile, SHAPE: tl.constexpr):
    """Mean over the heads of every row, in place of each: row-major in and out."""
    by_row = tl.reshape(tile, (tile.shape[0] * SHAPE.PACK, SHAPE.HEADS_PADDED, tile.shape[2]))
    mean = tl.sum(by_row, axis=1, keep_dims=True) * (1.0 / SHAPE.HEADS)
    return tl.reshape(tl.broadcast_to(mean, by_row.shape), tile.shape)


@triton.jit
def is_finite(tile):
    """Neither infinite nor NaN."""
    return tl.abs(tile) < float("inf")


@triton.jit
def probabilities(scores, lse, columns, seqlen_k, SHAPE: tl.constexpr):
    """exp2(scores - lse), zero at keys outside the sequence: [HEADS_PADDED, BLOCK_M, BLOCK_N], float32.

    Rows that share a mixing dot are kept apart by zero weights, which do not stop a NaN: a row whose softmax is NaN is
    zero here, and ``poison_rows`` makes its results NaN again.
    """
    exponents = scores - lse[:, :, None]
    if SHAPE.PACK > 1:
        exponents = tl.where(is_finite(lse)[:, :, None], exponents, float("-inf"))
    return tl.where((columns < seqlen_k)[None, None, :], tl.exp2(exponents), 0.0)


@triton.jit
def poison_rows(tile, lse, SHAPE: tl.constexpr):
    """NaN in every head of a row whose softmax is NaN in one of them, as mixing would leave it: head-major."""
    if SHAPE.PACK > 1:
        tile = tl.where(is_finite(over_heads(lse))[:, :, None], tile, float("nan"))
    return tile


@triton.jit
def over_heads(lse):
    """The LSE, with infinity in every head of a row where it is not finite in one: [HEADS_PADDED, BLOCK_M]."""
    finite = tl.min(tl.where(is_finite(lse), 1, 0), axis=0, keep_dims=True) > 0
    return tl.where(finite, lse, float("inf"))


@triton.jit
def row_lse(
    q_tile, q, row_start, k, batch, scale_log2, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHAPE: tl.constexpr
):  # fmt: skip
    """Log-sum-exp, base 2, of the scores of a block of rows with every key: [HEADS_PADDED, BLOCK_M]."""
    running_max = tl.full((SHAPE.HEADS_PADDED, BLOCK_M), float("-inf"), dtype=tl.float32)
    running_sum = tl.full((SHAPE.HEADS_PADDED, BLOCK_M), 0.0, dtype=tl.float32)
    for start in range(0, k.seqlen, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, batch, start, 0, BLOCK_N, SHAPE)
        scores = dot_rows(q_tile, q, row_start, k_tile, k, start, batch, BLOCK_M, BLOCK_N, SHAPE) * scale_log2
        scores = tl.where((columns < k.seqlen)[None, None, :], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, axis=2))
        # A row of -inf so far would give inf - inf.
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        running_sum = running_sum * tl.exp2(running_max - finite_max)
        running_sum += tl.sum(tl.exp2(scores - finite_max[:, :, None]), axis=2)
        running_max = new_max
    return running_max + tl.log2(running_sum)


@triton.jit
def dropout(probs, seed_ptr, dropout_p, batch, rows, columns, SHAPE: tl.constexpr):
    """Drops and rescales a head-major tile; what is drawn depends on seed and position alone, not on the tiling."""
    if seed_ptr is not None:
        heads = tl.arange(0, SHAPE.HEADS_PADDED)[:, None, None]
        zero = tl.full(probs.shape, 0, dtype=tl.int32)
        bits, _, _, _ = tl.philox(
            tl.load(seed_ptr),
            zero + columns[None, None, :],
            zero + rows[None, :, None],
            zero + (batch.to(tl.int32) * SHAPE.HEADS + heads),
            zero,
        )
        probs = tl.where(uint_to_uniform_float(bits) >= dropout_p, probs * (1.0 / (1.0 - dropout_p)), 0.0)
    return probs


@triton.jit
def uint_to_uniform_float(bits):
    """Uniform in [0, 1) from the upper 24 of 32 random bits."""
    return (bits.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def map_tile(
    q_tile, q, row_start, k_tile, k, column_start, batch, lse, seed_ptr, scale_log2, dropout_p, dtype: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """A tile of the softmax maps, P and P after dropout, head-major; and the latter centred, row-major, in the dots'
    dtype."""
    rows = row_start + tl.arange(0, BLOCK_M)
    columns = column_start + tl.arange(0, BLOCK_N)
    scores = dot_rows(q_tile, q, row_start, k_tile, k, column_start, batch, BLOCK_M, BLOCK_N, SHAPE) * scale_log2
    probs = probabilities(scores, lse, columns, k.seqlen, SHAPE)
    kept = dropout(probs, seed_ptr, dropout_p, batch, rows, columns, SHAPE)
    return probs, kept, to_row_major((kept - 1.0 / k.seqlen).to(dtype), SHAPE)


@triton.jit
def normalise(centred, parameters, mixing, eps, SHAPE: tl.constexpr):
    """Mixes a tile and divides it by its root mean square over heads, where there is a norm: the result, the quotient,
    1 / rms."""
    weights, shift, gamma, beta = parameters
    normed = mix_heads(weights, centred, SHAPE) + shift
    unit, inverse_rms = normed, normed
    if mixing.gamma is not None:
        inverse_rms = tl.rsqrt(mean_over_heads(normed * normed, SHAPE) + eps)
        unit = normed * inverse_rms
        normed = unit * gamma + beta
    return normed, unit, inverse_rms
