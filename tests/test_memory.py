"""No tensor of seqlen x seqlen elements exists on the fused path, but for a bounded part in a GPU's backward pass."""

import itertools

import pytest
import torch
from parity import MODES, compute, device_of, make_problem
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reattn import re_attention
from reattn.backends import common, cpu, cuda, cuda_plan, triton
from reattn.kernels import configs

SEQLEN, SEQLEN_K = 300, 320
modes = pytest.mark.parametrize("mode", MODES)


class LargestTensor(TorchDispatchMode):
    """Remembers the most bytes of any tensor that an operation returns, those behind a view included, and keeps all."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.bytes = max(self.bytes, storage.nbytes())
                self.storages[storage.data_ptr()] = storage
        return result

    @property
    def total(self):
        """Bytes of all tensors, as if none had been freed."""
        return sum(storage.nbytes() for storage in self.storages.values())


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
    return make_problem(mode, **(sizes | options), layout="contiguous", device=device)


@pytest.mark.parametrize(
    ("mode", "dropout_p"),
    [("batch-training", 0.0), ("batch-training", 0.1), ("batch-eval", 0.0), ("layer", 0.1), ("none", 0.0)],
)
@pytest.mark.parametrize("backend", ["triton", pytest.param("cpu", marks=pytest.mark.extension)])
def test_largest_tensor(mode, dropout_p, backend, device, largest):
    """Forward, and on the CPU backward: no larger than the inputs; not even a byte for every element of one head's
    map."""
    problem = make_large_problem(mode, device, dropout_p=dropout_p)
    with largest:
        if backend == "cpu":
            compute(problem, backend)
        else:
            re_attention(**problem.tensors, **problem.options, backend=backend)
    longest = problem["key" if backend == "cpu" else "query"]
    assert largest.bytes == longest.nbytes < SEQLEN * SEQLEN_K


def large_mask(kind, batch, device):
    """What a call is given: a row of keys for all queries, expanded; nothing; or an element for every position of the
    heads' maps, whose gradient is wanted."""
    if kind == "causal":
        return {"is_causal": True}
    if kind == "padding":
        return {"attn_mask": (torch.arange(SEQLEN_K, device=device) < 200).expand(batch, 3, SEQLEN, SEQLEN_K)}
    return {"attn_mask": torch.linspace(-1, 1, SEQLEN_K, device=device).repeat(3, SEQLEN, 1).requires_grad_()}


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("layer", "padding"), ("batch-training", "causal"), ("layer", "bias"), ("batch-training", "bias")],
)
def test_masks_allocate_no_map(mode, kind, backend, device, largest):
    """Forward and backward, all that they allocate: beyond a call without a mask not a byte for every element of one
    head's map, but for the gradient of the mask itself, and what a part of the workspace adds to it."""
    batch = 2 if backend == "cpu" else 1  # emulated kernels take long

    def allocated(**mask):
        largest.__init__()
        problem = make_large_problem(mode, device, batch=batch).with_options(**mask)
        with largest:
            compute(problem, backend)
        return largest.total

    mask = large_mask(kind, batch, device)
    times = 2 if backend == "cpu" else 3  # itself is seen, and its gradient
    given = times * mask["attn_mask"].nbytes if kind == "bias" else 0
    assert allocated(**mask) - given - allocated() < batch * SEQLEN * SEQLEN_K


def workspace_bound(size, multiprocessors, rows=16):
    """Bytes of the two maps that a backward pass keeps of some rows at a time: common.WORKSPACE_BYTES, or what a
    block of so many rows for each multiprocessor takes, if that is more."""
    keys = cuda_plan.round_up(size.seqlen_k, 16)
    return max(common.WORKSPACE_BYTES, multiprocessors * rows * size.heads * keys * 2 * size.element_bytes)


@pytest.mark.parametrize("multiprocessors", [1, 40, 132])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_workspace_is_bounded_whatever_the_batch(element_bytes, multiprocessors):
    """And linear in seqlen_k; every row of every sample is in one launch, which its part of the workspace has room
    for."""
    lengths = (1, 15, 197, 577, 6000)
    for heads, batch, seqlen, seqlen_k in itertools.product((1, 12, 32), (1, 7, 128), lengths, lengths):
        size = cuda_plan.Size(element_bytes, heads, 64, batch, seqlen, seqlen_k, False)
        cut = cuda_plan.cut_backward(size, cuda_plan.SHARED_LIMIT[90], multiprocessors)
        assert 2 * cut.maps * element_bytes <= workspace_bound(size, multiprocessors), size
        whole = all(part.rows == seqlen for part in cut.parts)
        # Those of a sample alone.
        assert cut.sums == (0 if whole else heads * seqlen_k * 64), size
        place = (0, 0)
        for part in cut.parts:
            assert (part.first_sample, part.first_row) == place and part.first_row % 16 == 0, size
            assert part.samples * heads * part.rows * cuda_plan.round_up(seqlen_k, 16) <= cut.maps, size
            assert part.samples == 1 or part.rows == seqlen, size
            end = part.first_row + part.rows
            place = (part.first_sample + part.samples, 0) if end == seqlen else (part.first_sample, end)
        assert place == (batch, 0), size


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize(("block_rows", "multiple"), [(4, 32), (16, 32), (32, 32)])
def test_parts_of_a_backward_pass(block_rows, multiple, multiprocessors):
    """Every row of every sample is in one part, none is larger than the first, and samples that come in several parts
    are cut at multiples."""
    for row_bytes, batch, seqlen in itertools.product((1 << 10, 1 << 20), (1, 7, 128), (1, 31, 197, 6000)):
        parts = common.cut_workspace(row_bytes, batch, seqlen, block_rows, multiprocessors, multiple)
        rows = [
            (sample, row)
            for part in parts
            for sample in range(part.first_sample, part.first_sample + part.samples)
            for row in range(part.first_row, part.first_row + part.rows)
        ]
        assert sorted(rows) == list(itertools.product(range(batch), range(seqlen)))
        first = parts[0]
        assert all(part.samples <= first.samples and part.rows <= first.rows for part in parts)
        assert all(part.first_row % multiple == 0 for part in parts)
        most = max(common.WORKSPACE_BYTES, row_bytes * block_rows * multiprocessors) + row_bytes * (multiple - 1)
        assert first.samples * first.rows * row_bytes <= most


@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_memory_of_a_call_grows_by_no_map(batch_statistics, backend, largest, monkeypatch, forget_plans):
    """All that forward and backward allocate: with the batch it grows by less than a third of a sample's maps, or two
    thirds where head_dim is larger, and linearly with the length, for workspaces of the least size."""
    # Of 8 columns Triton would have to make padded copies; rows are those of a block.
    head_dim, share, rows = (8, 1 / 3, 16) if backend == "cuda" else (16, 2 / 3, 32)
    mode = "batch-training" if batch_statistics else "layer"
    device = device_of(backend)
    monkeypatch.setattr(common, "WORKSPACE_BYTES", 0)
    monkeypatch.setattr(cuda, "_cut", lambda size, shared_bytes, _: cuda_plan.cut_backward(size, shared_bytes, 4))
    monkeypatch.setattr(triton, "_processors", lambda tensor: 4)
    forget_plans()

    def allocated(batch, seqlen):
        largest.__init__()
        sizes = {"heads": 2, "head_dim": head_dim, "seqlen": seqlen, "batch": batch, "dtype": torch.float16}
        problem = make_problem(mode, **sizes, layout="contiguous", device=device)
        with largest:
            compute(problem, backend)
        size = cuda_plan.Size(2, 2, head_dim, batch, seqlen, seqlen, batch_statistics)
        assert largest.bytes == workspace_bound(size, 4, rows)
        return largest.total

    one_map = 2 * 304 * 304 * 2
    few = allocated(1, 304)
    assert allocated(5, 304) - few < 4 * one_map * share
    assert allocated(1, 3 * 304) < 3.1 * few


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
    problem = make_problem(mode, heads=12, head_dim=32, seqlen=577, batch=32, dtype=torch.bfloat16, device=device)
    peaks = {}
    for backend in (fused, "reference"):
        compute(problem, backend)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compute(problem, backend)
        peaks[backend] = torch.cuda.max_memory_allocated() - before
    one_map = 32 * 12 * 577 * 577 * 2
    assert peaks[fused] < one_map < peaks["reference"] / 3
