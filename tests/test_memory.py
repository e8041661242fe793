"""No tensor of seqlen x seqlen elements ever exists on the fused path."""

import pytest
import torch
from parity import MODES, compute, make_problem
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reattn.backends import cpu, cuda, triton
from reattn.kernels import configs

SEQLEN, SEQLEN_K = 300, 320
modes = pytest.mark.parametrize("mode", MODES)


class LargestTensor(TorchDispatchMode):
    """Remembers the most bytes of any tensor that an operation returns, those behind a view included."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.fixture
def largest(monkeypatch):
    """Watches the backends too: a mode does not see what happens inside an op."""
    mode = LargestTensor()

    def watched(launcher):
        def launch(*args):
            with mode:
                return launcher(*args)

        return launch

    for module in (triton, cuda, cpu):
        for name in ("forward", "finish", "grad_sums", "backward"):
            monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return mode


def make_large_problem(mode, device, **options):
    sizes = {"heads": 3, "head_dim": 16, "seqlen": SEQLEN, "seqlen_k": SEQLEN_K, "batch": 1}
    return make_problem(mode, **sizes, layout="contiguous", device=device, **options)


@pytest.mark.parametrize(
    ("mode", "dropout_p"),
    [("batch-training", 0.0), ("batch-training", 0.1), ("batch-eval", 0.0), ("layer", 0.1), ("none", 0.0)],
)
def test_largest_tensor(mode, dropout_p, backend, device, largest):
    """Forward and backward: no larger than the inputs; not even a byte for every element of one head's map."""
    problem = make_large_problem(mode, device, dropout_p=dropout_p)
    with largest:
        compute(problem, backend)
    assert largest.bytes == problem["key"].nbytes < SEQLEN * SEQLEN_K


@modes
def test_reference_materialises_every_map(mode, device, largest):
    """The measurement above would see it."""
    problem = make_large_problem(mode, device)
    with largest:
        compute(problem, "reference")
    assert largest.bytes >= 3 * SEQLEN * SEQLEN_K * 4


@pytest.mark.triton
def test_measurement_sees_inside_the_launchers(device, largest, monkeypatch):
    shape = configs.shape

    def wasteful(*args, **kwargs):
        torch.empty(SEQLEN * SEQLEN_K, device=device)
        return shape(*args, **kwargs)

    monkeypatch.setattr(configs, "shape", wasteful)
    with largest:
        compute(make_problem(seqlen=5, device=device), "triton")
    assert largest.bytes == SEQLEN * SEQLEN_K * 4


@pytest.mark.gpu
@pytest.mark.parametrize("fused", ["triton", pytest.param("cuda", marks=pytest.mark.cuda)])
@modes
def test_peak_memory(mode, fused, device):
    """Forward and backward at DeepViT's size: less than one map, where the reference holds several."""
    problem = make_problem(mode, heads=12, head_dim=32, seqlen=577, batch=8, dtype=torch.bfloat16, device=device)
    peaks = {}
    for backend in (fused, "reference"):
        compute(problem, backend)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compute(problem, backend)
        peaks[backend] = torch.cuda.max_memory_allocated() - before
    one_map = 8 * 12 * 577 * 577 * 2
    assert peaks[fused] < one_map < peaks["reference"] / 3
