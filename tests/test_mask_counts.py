"""What masks cost, by counts of the executed kernels: limits that no change may exceed."""

import pytest
import torch

from benchmarks import kernel_counts

GPU_BACKENDS = [pytest.param("triton", marks=pytest.mark.triton), pytest.param("cuda", marks=pytest.mark.cuda)]
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator takes the place of a GPU"),
    pytest.mark.parametrize("gpu_backend", GPU_BACKENDS),
]


def counted(*problem, **options):
    pytest.importorskip("emulator", exc_type=ImportError)
    return {each.kernel: each for each in kernel_counts.count(*problem, **options)}


@pytest.mark.parametrize(("norm", "head_dim"), [("layer", 32), ("batch", 64)])
def test_padding(norm, head_dim, gpu_backend):
    """Of full length: at most a twentieth more wavefronts of shared memory than without a mask, and instructions; of
    the CUDA kernels, whose time these do not bind, a tenth: on an H200 such a mask cost 2 to 5 % (padding.json)."""
    without, padded = (counted(gpu_backend, (128, 12, 197, head_dim), norm, mask) for mask in ("none", "padding"))

    def total(found, which):
        return sum(each.blocks * getattr(each, which) for each in found.values())

    for which in ("instructions", "wavefronts"):
        most = 1.1 if (gpu_backend, which) == ("cuda", "instructions") else 1.05
        assert total(padded, which) <= most * total(without, which), which


@pytest.mark.slow
def test_causal(gpu_backend):
    """Keys that no query of a block sees are skipped: at 1024 tokens what the first and the last block of the forward
    sweep do is at most 0.65 times what they do without a mask."""
    shape = (1, 12, 1024, 64)
    forward = counted(gpu_backend, shape, "layer")["forward"]
    first, last = (
        counted(gpu_backend, shape, "layer", "causal", [block])["forward"] for block in (0, forward.blocks - 1)
    )
    assert first.blocks == forward.blocks
    for which in ("instructions", "wavefronts"):
        both = getattr(first, which) + getattr(last, which)
        assert both <= 0.65 * 2 * getattr(forward, which), which
