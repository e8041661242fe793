"""What the CUDA kernels issue for DeepViT's shapes, counted by executing them: limits that no change may exceed."""

import functools

import pytest
import torch

from benchmarks import cost_model, kernel_counts

pytestmark = pytest.mark.cuda
BATCH, HEADS, SEQLEN = 128, 12, 197
BACKWARD = cost_model.BACKWARD

# Warp instructions for 32 elements of the maps that are computed, those of whole tiles.
LIMITS = {
    ("layer", "forward"): 22,
    ("batch", "forward"): 18,
    ("layer", "backward"): 71,
    ("batch", "backward"): 64,
}
# Of head_dim 32 in those of head_dim 64: exp2, packing, mixing and norm do not depend on it. Wavefronts of shared
# memory in those that there would be without conflicts.
SMALLER_HEADS, CONFLICTS = {"forward": 0.92, "backward": 0.97}, 1.3


# The same where scores are mixed before the softmax, without a norm; and conflicts of the way back through it.
PRE_MIXED = {"forward": 38, "backward": 97}
UNMIX_CONFLICTS = 1.45


@functools.cache
def counted(head_dim, norm, pre_theta=False):
    """The kernels of a training step, by name."""
    if torch.cuda.is_available():
        pytest.skip("the emulator takes the place of a GPU")
    pytest.importorskip("triton", reason="needs ptxas, which triton ships")
    shape = BATCH, HEADS, SEQLEN, head_dim
    return {each.kernel: each for each in kernel_counts.count("cuda", shape, norm, pre_theta=pre_theta)}


def instructions(head_dim, norm, which, pre_theta=False):
    kernels = ("forward",) if which == "forward" else BACKWARD
    found = [cost_model.forecast(each, cost_model.CARDS[0]) for each in counted(head_dim, norm, pre_theta).values()]
    return sum(each.for_32_computed(each.counts.instructions) for each in found if each.kernel in kernels)


@pytest.mark.parametrize(("norm", "which"), LIMITS)
def test_instructions(norm, which):
    assert instructions(64, norm, which) <= LIMITS[norm, which]


@pytest.mark.parametrize(("norm", "which"), LIMITS)
def test_smaller_heads_issue_less(norm, which):
    assert instructions(32, norm, which) <= SMALLER_HEADS[which] * instructions(64, norm, which)


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_bank_conflicts(head_dim, norm):
    for name in ("forward", "backward", "products"):
        found = counted(head_dim, norm)[name]
        assert found.wavefronts <= CONFLICTS * found.conflict_free, name


@pytest.mark.parametrize("which", PRE_MIXED)
def test_mixing_before_the_softmax(which):
    assert instructions(64, "none", which, pre_theta=True) <= PRE_MIXED[which]
    for name in ("forward", "backward", "unmix", "products"):
        found = counted(64, "none", pre_theta=True)[name]
        assert found.wavefronts <= (UNMIX_CONFLICTS if name == "unmix" else CONFLICTS) * found.conflict_free, name


def test_elements_that_are_computed():
    """Of 197 rows and keys: 224 rows in blocks of 32, else 208, and 208 keys."""
    found = counted(64, "layer")
    assert (found["forward"].blocks, found["backward"].blocks) == (7 * BATCH, 13 * BATCH)
    for name, rows in (("forward", 224), ("backward", 208), ("products", 208)):
        forecast = cost_model.forecast(found[name], cost_model.CARDS[0])
        computed = BATCH * HEADS * rows * 208 / 32
        assert forecast.for_32_computed(1) == pytest.approx(found[name].blocks / computed)
        assert forecast.for_32(1) == pytest.approx(found[name].blocks / (BATCH * HEADS * 197 * 197 / 32))
