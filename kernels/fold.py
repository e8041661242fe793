"""What a norm makes of theta, bias and its own parameters, and of their gradients: the only place in the Triton kernels
that knows a norm's name. csrc/fold.h is its like. Derivation: docs/operator.md, sections 2 to 4.

All vectors are by head after mixing."""

import triton
import triton.language as tl

from .tiles import after_mixing, load_heads, load_matrix, mean_over_heads, mix_heads


@triton.jit
def load_gamma(norm, SHAPE: tl.constexpr):
    """output_scale * norm_weight: [PACK * HEADS_PADDED]."""
    return load_heads(norm.norm_weight, 1.0, after_mixing(SHAPE)) * norm.output_scale


@triton.jit
def load_beta(norm, SHAPE: tl.constexpr):
    """output_scale * norm_bias: [PACK * HEADS_PADDED]."""
    return load_heads(norm.norm_bias, 0.0, after_mixing(SHAPE)) * norm.output_scale


@triton.jit
def inverse_deviation(norm, SHAPE: tl.constexpr):
    """1 / standard deviation, of the batch or as it runs: [PACK * HEADS_PADDED]."""
    if SHAPE.TRAINING:
        inverse = load_heads(norm.statistics + SHAPE.HEADS_OUT, 0.0, after_mixing(SHAPE)).to(tl.float32)
    else:
        inverse = tl.rsqrt(load_heads(norm.running_var, 1.0, after_mixing(SHAPE)) + norm.eps)
    return inverse


@triton.jit
def column_factor(norm, SHAPE: tl.constexpr, BACKWARD: tl.constexpr):
    """The factor of a column of theta: [PACK * HEADS_PADDED]."""
    if SHAPE.NORM == "none":
        factor = load_heads(None, 1.0, SHAPE) * norm.output_scale
    elif SHAPE.NORM == "layer":
        factor = load_heads(None, 1.0, SHAPE)
    elif BACKWARD:
        factor = inverse_deviation(norm, SHAPE)
    elif SHAPE.TRAINING:
        factor = load_heads(None, 1.0, SHAPE) * norm.unit_scale
    else:
        factor = inverse_deviation(norm, SHAPE) * load_gamma(norm, SHAPE)
    return factor


@triton.jit
def load_weights(norm, SHAPE: tl.constexpr, BACKWARD: tl.constexpr, UNMIX: tl.constexpr):
    """The mixing weights, heads before mixing down and after it across, or with UNMIX the other way round: float32,
    PACK times down the diagonal."""
    factor = column_factor(norm, SHAPE, BACKWARD)
    HEADS: tl.constexpr = SHAPE.HEADS
    HEADS_OUT: tl.constexpr = SHAPE.HEADS_OUT
    if UNMIX:
        theta = load_matrix(norm.theta, 1, HEADS_OUT, HEADS_OUT, HEADS, SHAPE)
        if SHAPE.NORM == "layer":
            # Centring over the heads is linear.
            ones = load_matrix(norm.theta, 1, HEADS_OUT, HEADS_OUT, HEADS, SHAPE, ONES=True)
            theta -= ones * (tl.sum(theta, axis=0) / HEADS_OUT)[None, :]
        weights = theta * factor[:, None]
    else:
        theta = load_matrix(norm.theta, HEADS_OUT, 1, HEADS, HEADS_OUT, SHAPE)
        if SHAPE.NORM == "layer":
            ones = load_matrix(norm.theta, HEADS_OUT, 1, HEADS, HEADS_OUT, SHAPE, ONES=True)
            theta -= ones * (tl.sum(theta, axis=1) / HEADS_OUT)[:, None]
        weights = theta * factor[None, :]
    return weights


@triton.jit
def load_mixing(norm, centre, dtype: tl.constexpr, SHAPE: tl.constexpr, BACKWARD: tl.constexpr):
    """The mixing weights in the dots' dtype; the shift, with what centring took from the maps; gamma and beta. Vectors
    are [1, 1, PACK * HEADS_PADDED]; where gamma and beta are not needed, they are the shift."""
    OUT: tl.constexpr = after_mixing(SHAPE)
    weights = load_weights(norm, SHAPE, BACKWARD, False)
    bias = load_heads(norm.bias, 0.0, OUT)
    taken = tl.sum(weights, axis=0) * centre
    if SHAPE.NORM == "none":
        shift = bias * norm.output_scale + taken
    elif SHAPE.NORM == "layer":
        mean = tl.sum(bias, axis=0) / (OUT.HEADS * SHAPE.PACK)
        head = tl.arange(0, SHAPE.PACK * SHAPE.HEADS_PADDED) % SHAPE.HEADS_PADDED
        shift = tl.where(head < OUT.HEADS, bias - mean + taken, 0.0)
    elif SHAPE.TRAINING:
        # The maps stay centred.
        shift = taken * 0.0
        if BACKWARD:
            shift = -load_heads(norm.statistics, 0.0, OUT).to(tl.float32) * inverse_deviation(norm, SHAPE)
    else:
        factor = column_factor(norm, SHAPE, BACKWARD)
        shift = (bias - load_heads(norm.running_mean, 0.0, OUT)) * factor + taken
        if not BACKWARD:
            shift += load_beta(norm, SHAPE)
    shift = shift[None, None, :]
    gamma, beta = shift, shift
    if SHAPE.NORM == "layer" or (SHAPE.NORM == "batch" and BACKWARD):
        gamma = load_gamma(norm, SHAPE)[None, None, :]
        beta = load_beta(norm, SHAPE)[None, None, :]
    return weights.to(dtype), shift, gamma, beta


@triton.jit
def load_unmixing(norm, dtype: tl.constexpr, SHAPE: tl.constexpr):
    """The weights [h, g] in the dots' dtype; and what batch statistics add to the gradient of the mixed maps, which is
    gamma dN - common - along A: [1, 1, PACK * HEADS_PADDED]. Without such statistics both vectors are gamma, unused."""
    OUT: tl.constexpr = after_mixing(SHAPE)
    weights = load_weights(norm, SHAPE, True, True).to(dtype)
    common = load_gamma(norm, SHAPE)
    along = common
    if SHAPE.NORM == "batch" and SHAPE.TRAINING:
        positions = load_heads(norm.statistics + 2 * OUT.HEADS, 1.0, OUT)
        of_values = load_heads(norm.grad_sums + OUT.HEADS, 0.0, OUT)
        of_out = load_heads(norm.grad_sums, 0.0, OUT)
        along = ((of_out - load_beta(norm, SHAPE).to(tl.float64) * of_values) / positions).to(tl.float32)
        common = (common.to(tl.float64) * of_values / positions).to(tl.float32)
    return weights, common[None, None, :], along[None, None, :]


@triton.jit
def normalise(centred, mixing, norm, SHAPE: tl.constexpr, BACKWARD: tl.constexpr):
    """Mixes a tile and divides it by its root mean square over heads where the norm does: the result, the quotient,
    1 / rms."""
    weights, shift, gamma, beta = mixing
    normed = mix_heads(centred, weights, SHAPE) + shift
    unit, inverse_rms = normed, normed
    if SHAPE.NORM == "layer":
        # Without eps: where there is no key, or a hidden one, there may be nothing to divide.
        smallest: tl.constexpr = 2e-38
        mean_square = mean_over_heads(normed * normed, weights.dtype, after_mixing(SHAPE))
        mean_square = tl.maximum(mean_square + norm.eps, smallest)
        inverse_rms = tl.rsqrt(mean_square)
        unit = normed * inverse_rms
    if SHAPE.NORM == "layer" or (SHAPE.NORM == "batch" and BACKWARD):
        normed = unit * gamma + beta
    return normed, unit, inverse_rms


@triton.jit
def normalise_backward(grad_normed, unit, inverse_rms, mixing, unmixing, SHAPE: tl.constexpr):
    """The gradient of the mixed tile from that of the normalised one: by position."""
    _, _, gamma, _ = mixing
    weights, common, along = unmixing
    grad_mixed = grad_normed
    OUT: tl.constexpr = after_mixing(SHAPE)
    if SHAPE.NORM == "layer":
        # The weights sum to zero over the heads after mixing: what these share reaches nothing, and would only be
        # rounded.
        scaled = grad_normed * gamma
        scaled -= mean_over_heads(scaled, weights.dtype, OUT)
        if OUT.HEADS < SHAPE.HEADS_PADDED:
            head = tl.arange(0, SHAPE.PACK * SHAPE.HEADS_PADDED) % SHAPE.HEADS_PADDED
            scaled = tl.where((head < OUT.HEADS)[None, None, :], scaled, 0.0)
        grad_mixed = inverse_rms * (scaled - unit * mean_over_heads(scaled * unit, weights.dtype, OUT))
    if SHAPE.NORM == "batch":
        grad_mixed = grad_normed * gamma
        if SHAPE.TRAINING:
            grad_mixed -= unit * along + common
    return grad_mixed


@triton.jit
def mixed_centre(norm, head, centre, SHAPE: tl.constexpr):
    """What a head's mixed maps are about: the centre of the maps, mixed; float64."""
    heads = tl.arange(0, SHAPE.HEADS_PADDED)
    column = tl.load(norm.theta + heads * SHAPE.HEADS_OUT + head, mask=heads < SHAPE.HEADS, other=0.0)
    return tl.sum(column.to(tl.float64), axis=0) * centre


@triton.jit
def output_factors(norm, head, inverse, offset):
    """What makes a head's output of the sweep's and of the sum of the values, with statistics of the batch: the factors
    of both. inverse: 1 / deviation; offset: the mean of the centred maps, mixed; float64."""
    gamma = tl.cast(norm.output_scale, tl.float32)
    if norm.norm_weight is not None:
        gamma *= tl.load(norm.norm_weight + head)
    beta = tl.cast(0.0, tl.float32)
    if norm.norm_bias is not None:
        beta += tl.load(norm.norm_bias + head) * norm.output_scale
    gamma *= inverse.to(tl.float32)
    return gamma / norm.unit_scale, beta - (gamma.to(tl.float64) * offset).to(tl.float32)
