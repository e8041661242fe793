"""What the Triton kernels do for DeepViT's shapes, counted by executing them: limits that no change may exceed."""

import functools

import pytest
import torch

from benchmarks import kernel_counts

pytestmark = pytest.mark.triton
BATCH, HEADS, SEQLEN = 128, 12, 197
SWEEPS = ("forward", "grad_maps", "grad_query", "grad_key")

# Blocks of a sample: of 32 rows, of 16, of 32 rows of four heads, of 64 or 32 keys of four heads.
BLOCKS = {
    "forward": {32: 7, 64: 7},
    "grad_maps": {32: 13, 64: 13},
    "grad_query": {32: 21, 64: 21},
    "grad_key": {32: 12, 64: 21},
}
# Wavefronts of shared memory of a block, by head_dim.
WAVEFRONTS = {
    "forward": {32: 25_000, 64: 38_000},
    "grad_maps": {32: 28_000, 64: 34_500},
    "grad_query": {32: 4_800, 64: 6_700},
    "grad_key": {32: 6_800, 64: 6_800},
}
# Wavefronts in those that there would be without bank conflicts. At head_dim 32 copies to shared memory, of rows that
# are 64 bytes, take turns, as nothing else does.
CONFLICTS = {32: 1.35, 64: 1.2}
BARRIERS = {"forward": 280, "grad_maps": 300, "grad_query": 40, "grad_key": 80}
# Warp instructions for 32 elements of the maps that are computed, by norm and head_dim: those of 12 heads, 208 keys and
# whole blocks of rows. Forward, and all of the backward pass.
INSTRUCTIONS = {("layer", 32): (38, 112), ("batch", 32): (36, 103), ("layer", 64): (51, 127), ("batch", 64): (51, 120)}


# Where scores are mixed before the softmax, head_dim 64, no norm: wavefronts of a block, and instructions for
# 32 elements that are no padding.
PRE_MIXED = {
    "forward": (57_000, 85),
    "grad_maps": (28_500, 119),
    "grad_scores": (39_000, 52),
    "grad_query": (4_400, 10.2),
}


@functools.cache
def counted(head_dim, norm, pre_theta=False):
    """The kernels of a training step, by name."""
    if torch.cuda.is_available():
        pytest.skip("the emulator takes the place of a GPU")
    pytest.importorskip("emulator", exc_type=ImportError)
    shape = BATCH, HEADS, SEQLEN, head_dim
    return {each.kernel: each for each in kernel_counts.count("triton", shape, norm, pre_theta=pre_theta)}


cases = pytest.mark.parametrize(("norm", "head_dim"), INSTRUCTIONS)


@cases
def test_wavefronts(norm, head_dim):
    found = counted(head_dim, norm)
    for kernel in SWEEPS:
        assert found[kernel].blocks == BATCH * BLOCKS[kernel][head_dim], kernel
        assert found[kernel].wavefronts <= WAVEFRONTS[kernel][head_dim], kernel
        assert found[kernel].wavefronts <= CONFLICTS[head_dim] * found[kernel].conflict_free, kernel


@cases
def test_barriers(norm, head_dim):
    found = counted(head_dim, norm)
    for kernel in SWEEPS:
        assert found[kernel].barriers <= BARRIERS[kernel], kernel


@cases
def test_instructions(norm, head_dim):
    found = counted(head_dim, norm)

    def issued(kernel):
        return found[kernel].blocks / BATCH * found[kernel].instructions

    forward, backward = INSTRUCTIONS[norm, head_dim]
    assert issued("forward") / (HEADS * 224 * 208 / 32) <= forward
    assert sum(map(issued, SWEEPS[1:])) / (HEADS * 208 * 208 / 32) <= backward


@pytest.mark.parametrize("kernel", PRE_MIXED)
def test_mixing_before_the_softmax(kernel):
    found = counted(64, "none", pre_theta=True)[kernel]
    wavefronts, instructions = PRE_MIXED[kernel]
    assert found.wavefronts <= wavefronts
    assert found.blocks * found.instructions / (BATCH * HEADS * SEQLEN**2 / 32) <= instructions
