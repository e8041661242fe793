"""What stands before and after the sweeps: sums over the batch, in a fixed order, and what is made of them."""

import triton
import triton.language as tl

from .fold import column_factor, mixed_centre, output_factors
from .masks import hides
from .tiles import is_finite, which_block


@triton.jit
def sum_number(ptr, number, programs, BLOCK: tl.constexpr):
    """The sum of one of the numbers that programs left in (numbers, programs): float64."""
    total = tl.full((BLOCK,), 0.0, dtype=tl.float64)
    for start in range(0, programs, BLOCK):
        index = start + tl.arange(0, BLOCK)
        pointers = ptr + tl.cast(number, tl.int64) * programs + index
        total += tl.load(pointers, mask=index < programs, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def raw_sums(norm, sums_ptr, head, programs, positions, centre, BLOCK: tl.constexpr, SHAPE: tl.constexpr):
    """Sum and sum of squares of a head's mixed maps without bias, from what the forward programs left; and of how many
    positions: ``positions``, or how many are not hidden."""
    if SHAPE.HIDES:
        positions = sum_number(sums_ptr, 2 * SHAPE.HEADS_OUT + head, programs, BLOCK)
    mean = mixed_centre(norm, head, centre, SHAPE)
    scale = tl.cast(norm.unit_scale, tl.float64)
    centred = sum_number(sums_ptr, head, programs, BLOCK) / scale
    squares = sum_number(sums_ptr, SHAPE.HEADS_OUT + head, programs, BLOCK) / (scale * scale)
    return centred + positions * mean, squares + 2 * mean * centred + positions * mean * mean, positions


@triton.jit
def moments(
    norm, sums_ptr, head, programs, positions, centre, SYNCHRONISED: tl.constexpr, BLOCK: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """Mean, variance and 1 / deviation of a head's mixed maps without bias, and how many were averaged: float64."""
    if SYNCHRONISED:
        total = tl.load(norm.statistics + head)
        squares = tl.load(norm.statistics + SHAPE.HEADS_OUT + head)
        positions = tl.load(norm.statistics + 2 * SHAPE.HEADS_OUT + head)
    else:
        total, squares, positions = raw_sums(norm, sums_ptr, head, programs, positions, centre, BLOCK, SHAPE)
    count = tl.maximum(positions, 1.0)
    mean = total / count
    variance = squares / count - mean * mean
    variance = tl.where(variance < 0, 0.0, variance)
    inverse = tl.where(positions > 0, 1.0 / tl.sqrt(variance + tl.cast(norm.eps, tl.float64)), 0.0)
    return mean, variance, inverse, positions


@triton.jit
def add_up_kernel(
    norm, sums_ptr, totals_ptr, programs, positions, centre, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """One head: the sums that programs left, to (3, HEADS_OUT) after the forward pass or (2, HEADS_OUT) before the
    backward pass, float64, for an all-reduce."""
    head = tl.program_id(0)
    positions = tl.cast(positions, tl.float64)
    if BACKWARD:
        first = sum_number(sums_ptr, head, programs, BLOCK)
        second = sum_number(sums_ptr, SHAPE.HEADS_OUT + head, programs, BLOCK)
    else:
        first, second, positions = raw_sums(
            norm, sums_ptr, head, programs, positions, tl.cast(centre, tl.float64), BLOCK, SHAPE
        )
        tl.store(totals_ptr + 2 * SHAPE.HEADS_OUT + head, positions)
    tl.store(totals_ptr + head, first)
    tl.store(totals_ptr + SHAPE.HEADS_OUT + head, second)


@triton.jit
def which_part(seqlen, splits, SHAPE: tl.constexpr):
    """This program's sample and head, and its rows: from the first on, up to the last."""
    part = tl.program_id(0) % splits
    head = tl.program_id(0) // splits % SHAPE.HEADS_OUT
    rows = tl.cdiv(seqlen, splits)
    return tl.program_id(0) // splits // SHAPE.HEADS_OUT, head, part * rows, tl.minimum(part * rows + rows, seqlen)


@triton.jit
def head_pointers(view, batch, head, start, end, ROWS: tl.constexpr, SHAPE: tl.constexpr, DIM: tl.constexpr):
    """Pointers to rows of one head, and which lie before end: [ROWS, DIM]."""
    rows = start + tl.arange(0, ROWS)[:, None]
    dims = tl.arange(0, DIM)[None, :]
    base = view.ptr + tl.cast(batch, tl.int64) * view.batch_stride + tl.cast(head, tl.int64) * view.head_stride
    return base + rows.to(tl.int64) * view.row_stride + dims, (rows < end) & (dims < SHAPE.HEAD_DIM)


@triton.jit
def finish_kernel(
    v, out, norm, mask, sums_ptr, statistics_ptr, value_sum_ptr, batches_ptr, programs, positions, splits, momentum,
    SYNCHRONISED: tl.constexpr, BY_ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """out = slope * out + level * sum of the values, for rows of one sample and head; the last program writes the
    statistics, and takes them into the running ones (momentum < 0: as the mean over all batches). BY_ROW: the sums of
    the values have a row for each query, and are there already."""
    centre = 1.0 / tl.cast(v.seqlen, tl.float64)
    positions = tl.cast(positions, tl.float64)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        share = tl.cast(momentum, tl.float64)
        if batches_ptr is not None:
            batches = tl.load(batches_ptr) + 1
            # All threads read what one of them writes.
            tl.debug_barrier()
            tl.store(batches_ptr, batches)
            share = tl.where(share < 0, 1.0 / batches.to(tl.float64), share)
        for head in range(SHAPE.HEADS_OUT):
            mean, variance, inverse, counted = moments(
                norm, sums_ptr, head, programs, positions, centre, SYNCHRONISED, BLOCK, SHAPE
            )
            tl.store(statistics_ptr + head, mean - mixed_centre(norm, head, centre, SHAPE))
            tl.store(statistics_ptr + SHAPE.HEADS_OUT + head, inverse)
            tl.store(statistics_ptr + 2 * SHAPE.HEADS_OUT + head, counted)
            if norm.running_mean is not None:
                bias = tl.cast(0.0, tl.float64)
                if norm.bias is not None:
                    bias += tl.load(norm.bias + head).to(tl.float64)
                old_mean = tl.load(norm.running_mean + head).to(tl.float64)
                old_var = tl.load(norm.running_var + head).to(tl.float64)
                tl.debug_barrier()
                # A head without positions leaves them as they are.
                of_batch = tl.where(counted > 0, share, 0.0)
                unbiased = tl.where(counted > 1, variance * (counted / (counted - 1.0)), old_var)
                new_mean = old_mean + of_batch * (mean + bias - old_mean)
                new_var = old_var + of_batch * (unbiased - old_var)
                tl.store(norm.running_mean + head, new_mean.to(tl.float32))
                tl.store(norm.running_var + head, new_var.to(tl.float32))
    else:
        batch, head, first, end = which_part(out.seqlen, splits, SHAPE)
        mean, _, inverse, _ = moments(norm, sums_ptr, head, programs, positions, centre, SYNCHRONISED, BLOCK, SHAPE)
        offset = mean - mixed_centre(norm, head, centre, SHAPE)
        slope, level = output_factors(norm, head, inverse, offset)

        of_head = value_sum_ptr + tl.cast(batch * SHAPE.HEADS_OUT + head, tl.int64) * SHAPE.HEAD_DIM * value_rows(
            out, BY_ROW
        )
        dims = tl.arange(0, DIM)
        value_sum = tl.full((1, DIM), 0.0, dtype=tl.float32)
        if not BY_ROW:
            values = tl.full((ROWS, DIM), 0.0, dtype=tl.float32)
            for start in range(0, v.seqlen, ROWS):
                pointers, inside = head_pointers(v, batch, head, start, v.seqlen, ROWS, SHAPE, DIM)
                if SHAPE.MASK != "none":
                    keys = start + tl.arange(0, ROWS)[:, None]
                    inside &= visible_of_head(mask, batch, head, 0, keys, keys < v.seqlen, SHAPE)
                values += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
            value_sum = tl.sum(values, axis=0)[None, :]
            if first == 0:
                tl.store(of_head + dims[None, :], value_sum, mask=dims[None, :] < SHAPE.HEAD_DIM)
        for start in range(first, end, ROWS):
            pointers, inside = head_pointers(out, batch, head, start, end, ROWS, SHAPE, DIM)
            seen = value_sum
            if BY_ROW:
                seen = load_value_sum(of_head, start, inside, ROWS, DIM, SHAPE)
            finished = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * slope + level * seen
            tl.store(pointers, finished.to(out.ptr.dtype.element_ty), mask=inside)


@triton.jit
def value_rows(out, BY_ROW: tl.constexpr):
    """Rows that the sums of the values have."""
    return out.seqlen if BY_ROW else 1


@triton.jit
def load_value_sum(of_head, start, inside, ROWS: tl.constexpr, DIM: tl.constexpr, SHAPE: tl.constexpr):
    """Sums of the values that some queries see: [ROWS, DIM]."""
    rows = start + tl.arange(0, ROWS)[:, None]
    return tl.load(of_head + rows.to(tl.int64) * SHAPE.HEAD_DIM + tl.arange(0, DIM)[None, :], mask=inside, other=0.0)


@triton.jit
def visible_of_head(mask, batch, head, rows, keys, inside, SHAPE: tl.constexpr):
    """Which keys a head's mask does not hide, of those inside."""
    base = mask.ptr + tl.cast(batch, tl.int64) * mask.batch_stride + tl.cast(head, tl.int64) * mask.head_stride
    pointers = base + (tl.cast(rows, tl.int64) * mask.row_stride + tl.cast(keys, tl.int64) * mask.key_stride)
    return ~hides(tl.load(pointers, mask=inside, other=0), mask, SHAPE) & inside


@triton.jit
def value_sum_kernel(
    v, mask, value_sum_ptr, seqlen, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, SHAPE: tl.constexpr
):
    """For rows of one sample and head: the sums of the values of the keys that each of them sees, to (batch,
    HEADS_OUT, seqlen, HEAD_DIM), float32."""
    batch, row_start = which_block(seqlen, ROWS)
    head = tl.program_id(1)
    dtype: tl.constexpr = v.ptr.dtype.element_ty
    rows = row_start + tl.arange(0, ROWS)[:, None]
    sums = tl.full((ROWS, DIM), 0.0, dtype=tl.float32)
    broken = sums
    end = tl.minimum(row_start + ROWS, v.seqlen) if SHAPE.CAUSAL else v.seqlen
    for start in range(0, end, KEYS):
        keys = start + tl.arange(0, KEYS)[None, :]
        visible = (keys < v.seqlen) & (rows < seqlen)
        if SHAPE.CAUSAL:
            visible &= keys <= rows
        if SHAPE.MASK != "none":
            visible = visible_of_head(mask, batch, head, rows, keys, visible, SHAPE)
        pointers, inside = head_pointers(v, batch, head, start, v.seqlen, KEYS, SHAPE, DIM)
        values = tl.load(pointers, mask=inside, other=0.0)
        finite = is_finite(values)
        weights = tl.where(visible, 1.0, 0.0).to(dtype)
        sums += tl.dot(weights, tl.where(finite, values, 0.0).to(dtype), input_precision="ieee")
        broken += tl.dot(weights, tl.where(finite, 0.0, 1.0).to(dtype), input_precision="ieee")
    # Zero times what is not finite would be NaN in rows that do not see it.
    sums = tl.where(broken == 0, sums, float("nan"))
    dims = tl.arange(0, DIM)[None, :]
    place = value_sum_ptr + (tl.cast(batch, tl.int64) * SHAPE.HEADS_OUT + head) * seqlen * SHAPE.HEAD_DIM
    tl.store(place + rows.to(tl.int64) * SHAPE.HEAD_DIM + dims, sums, mask=(rows < seqlen) & (dims < SHAPE.HEAD_DIM))


@triton.jit
def grad_sums_kernel(
    grad, out, value_sum_ptr, sums_ptr, splits, BY_ROW: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """Sums of grad * out and of grad times the sum of the values, over rows of one sample and head, to (2 *
    HEADS_OUT, samples * splits)."""
    batch, head, first, end = which_part(out.seqlen, splits, SHAPE)
    dims = tl.arange(0, DIM)[None, :]
    of_head = value_sum_ptr + tl.cast(batch * SHAPE.HEADS_OUT + head, tl.int64) * SHAPE.HEAD_DIM * value_rows(
        out, BY_ROW
    )
    values = tl.load(of_head + dims, mask=dims < SHAPE.HEAD_DIM, other=0.0)
    of_out = tl.full((ROWS, DIM), 0.0, dtype=tl.float32)
    of_values = tl.full((ROWS, DIM), 0.0, dtype=tl.float32)
    for start in range(first, end, ROWS):
        grad_pointers, mask = head_pointers(grad, batch, head, start, end, ROWS, SHAPE, DIM)
        out_pointers, mask = head_pointers(out, batch, head, start, end, ROWS, SHAPE, DIM)
        grads = tl.load(grad_pointers, mask=mask, other=0.0).to(tl.float32)
        of_out += grads * tl.load(out_pointers, mask=mask, other=0.0).to(tl.float32)
        seen = values
        if BY_ROW:
            seen = load_value_sum(of_head, start, mask, ROWS, DIM, SHAPE)
        of_values += grads * seen
    programs = tl.num_programs(0) // SHAPE.HEADS_OUT
    place = sums_ptr + tl.cast(head, tl.int64) * programs + batch * splits + tl.program_id(0) % splits
    tl.store(place, tl.sum(tl.sum(of_out, axis=1), axis=0))
    tl.store(place + tl.cast(programs, tl.int64) * SHAPE.HEADS_OUT, tl.sum(tl.sum(of_values, axis=1), axis=0))


@triton.jit
def sum_packed(ptr, stride, programs, BLOCK: tl.constexpr, SHAPE: tl.constexpr):
    """The sum over programs of PACK * HEADS_PADDED neighbouring numbers: [PACK * HEADS_PADDED], float64."""
    HEADS_PACKED: tl.constexpr = SHAPE.PACK * SHAPE.HEADS_PADDED
    total = tl.full((BLOCK, HEADS_PACKED), 0.0, dtype=tl.float64)
    index = tl.arange(0, HEADS_PACKED)[None, :]
    for start in range(0, programs, BLOCK):
        program = start + tl.arange(0, BLOCK)[:, None]
        total += tl.load(ptr + program.to(tl.int64) * stride + index, mask=program < programs, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def sum_packs(sums, SHAPE: tl.constexpr):
    """[PACK * HEADS_PADDED] -> [HEADS_PADDED]: over the rows that share a dot."""
    return tl.sum(tl.reshape(sums, (SHAPE.PACK, SHAPE.HEADS_PADDED)), axis=0)


@triton.jit
def unfold_kernel(
    norm, vectors_ptr, products_ptr, grad_theta_ptr, grad_bias_ptr, grad_weight_ptr, grad_norm_bias_ptr, programs,
    centre, BLOCK: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """The gradients of what the user gave from the sums that programs of ``grad_maps_kernel`` left: a program for
    each row of theta, and one for the vectors."""
    PACK: tl.constexpr = SHAPE.PACK
    HEADS_PACKED: tl.constexpr = PACK * SHAPE.HEADS_PADDED
    row = tl.program_id(0)
    heads = tl.arange(0, SHAPE.HEADS_PADDED)
    inside = heads < SHAPE.HEADS_OUT
    factor = tl.sum(tl.reshape(column_factor(norm, SHAPE, True), (SHAPE.PACK, SHAPE.HEADS_PADDED)), axis=0)
    factor = factor.to(tl.float64) / SHAPE.PACK
    shift = tl.full((SHAPE.HEADS_PADDED,), 0.0, dtype=tl.float64)
    if vectors_ptr is not None:
        shift = sum_packs(sum_packed(vectors_ptr, HEADS_PACKED, programs, BLOCK, SHAPE), SHAPE)
    if row < SHAPE.HEADS:
        # The kernels multiply centred maps: what the centre would add is the sum of the gradients of the shift.
        sums = shift * tl.cast(centre, tl.float64)
        for pack in tl.static_range(PACK):
            first = products_ptr + (pack * SHAPE.HEADS_PADDED + row) * HEADS_PACKED
            packed = sum_packed(first, HEADS_PACKED * HEADS_PACKED, programs, BLOCK, SHAPE)
            own = tl.arange(0, HEADS_PACKED) // SHAPE.HEADS_PADDED == pack
            sums += sum_packs(tl.where(own, packed, 0.0), SHAPE)
        if SHAPE.NORM == "layer":
            sums -= tl.sum(tl.where(inside, sums, 0.0), axis=0) / SHAPE.HEADS_OUT
        tl.store(grad_theta_ptr + row * SHAPE.HEADS_OUT + heads, (sums * factor).to(tl.float32), mask=inside)
    else:
        if grad_bias_ptr is not None:
            if SHAPE.NORM == "layer":
                shift -= tl.sum(tl.where(inside, shift, 0.0), axis=0) / SHAPE.HEADS_OUT
            if SHAPE.TRAINING:
                # The mean takes the bias away.
                shift *= 0.0
            tl.store(grad_bias_ptr + heads, (shift * factor).to(tl.float32), mask=inside)
        stride = tl.cast(programs, tl.int64) * HEADS_PACKED
        if grad_weight_ptr is not None:
            sums = sum_packs(sum_packed(vectors_ptr + stride, HEADS_PACKED, programs, BLOCK, SHAPE), SHAPE)
            tl.store(grad_weight_ptr + heads, (sums * norm.output_scale).to(tl.float32), mask=inside)
        if grad_norm_bias_ptr is not None:
            sums = sum_packs(sum_packed(vectors_ptr + 2 * stride, HEADS_PACKED, programs, BLOCK, SHAPE), SHAPE)
            tl.store(grad_norm_bias_ptr + heads, (sums * norm.output_scale).to(tl.float32), mask=inside)
