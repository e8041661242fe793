"""``re_attention``: its definition, its arguments, masks, autocast and running statistics."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import BACKENDS, MODES, compute, make_problem
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from reattn import re_attention

modes = pytest.mark.parametrize("mode", MODES)
backends = pytest.mark.parametrize("backend", BACKENDS)


def call(problem, **options):
    return re_attention(**problem.tensors, **problem.options, **options)


def float64_problem(mode, **sizes):
    sizes = {"heads": 3, "head_dim": 4, "seqlen": 5, "seqlen_k": 6, "batch": 2} | sizes
    return make_problem(mode, **sizes, dtype=torch.float64, parameter_dtype=torch.float64)


@modes
def test_definition(mode):
    """The operator spelled out with einsum and torch's own norms."""
    problem = float64_problem(mode).with_options(output_scale=0.7, scale=0.3)
    norm, training = MODES[mode]
    attn = torch.einsum("bhid,bhjd->bhij", problem["query"], problem["key"]).mul(0.3).softmax(-1)
    mixed = torch.einsum("bhij,hg->bgij", attn, problem["theta"]) + problem["bias"].view(3, 1, 1)
    if norm == "batch":
        running = problem["running_mean"].clone(), problem["running_var"].clone()
        mixed = F.batch_norm(mixed, *running, problem["norm_weight"], problem["norm_bias"], training, 0.1, 1e-5)
    elif norm == "layer":
        over_heads = F.layer_norm(mixed.permute(0, 2, 3, 1), (3,), problem["norm_weight"], problem["norm_bias"], 1e-5)
        mixed = over_heads.permute(0, 3, 1, 2)
    expected = torch.einsum("bgij,bgjd->bgid", mixed * 0.7, problem["value"])
    torch.testing.assert_close(call(problem, backend="reference"), expected)


@modes
@pytest.mark.parametrize("optional", [True, False], ids=["affine", "plain"])
def test_reference_gradcheck(mode, optional):
    problem = float64_problem(mode, head_dim=2, seqlen=3, seqlen_k=4, batch=1)
    if not optional:
        problem = problem.with_tensors(bias=None, norm_weight=None, norm_bias=None)
    fixed = {name: problem.tensors.get(name) for name in ("running_mean", "running_var")}
    inputs = {name: tensor for name, tensor in problem.tensors.items() if name not in fixed and tensor is not None}

    def operator(*tensors):
        statistics = {name: None if tensor is None else tensor.clone() for name, tensor in fixed.items()}
        arguments = dict(zip(inputs, tensors, strict=True)) | statistics
        return re_attention(**arguments, **problem.options, backend="reference")

    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs.values())
    assert gradcheck(operator, leaves)
    if mode == "batch-training":
        assert gradgradcheck(operator, leaves)


@backends
@modes
def test_layout_of_the_output(mode, backend, device):
    """Merging the heads copies nothing."""
    problem = make_problem(mode, device=device)
    output = call(problem, backend=backend)
    assert output.shape == (2, 3, 17, 16) and output.dtype == problem["query"].dtype
    assert output.transpose(1, 2).flatten(2).data_ptr() == output.data_ptr()


@backends
def test_scale_defaults_to_that_of_head_dim(backend, device):
    problem = make_problem(device=device)
    torch.testing.assert_close(call(problem, backend=backend), call(problem, backend=backend, scale=0.25))


# A valid call with batch norm, then what is wrong with it: changed arguments, error, message.
VALID = {
    "query": torch.zeros(2, 3, 5, 4),
    "key": torch.zeros(2, 3, 6, 4),
    "value": torch.zeros(2, 3, 6, 4),
    "theta": torch.eye(3),
    "norm": "batch",
    "training": True,
}
NESTED = torch.nested.nested_tensor([torch.zeros(5, 3, 3, 4)] * 2, layout=torch.jagged)
INVALID = [
    ({"query": [1.0]}, TypeError, "query must be a Tensor, got list"),
    ({"query": np.zeros((2, 3, 5, 4), "float32")}, TypeError, "query must be a Tensor, got numpy.ndarray"),
    (
        {"query": NESTED, "key": None, "value": None},
        ValueError,
        "query must be a dense Tensor, got a nested one of 2: pad it, and hide the padding by attn_mask",
    ),
    (
        {"key": NESTED},
        ValueError,
        "key must be a dense Tensor, got a nested one of 2: pad it, and hide the padding by attn_mask",
    ),
    ({"key": None}, TypeError, "key must be a Tensor, got NoneType"),
    (
        {"value": torch.zeros(2, 6, 4)},
        ValueError,
        "value must have shape (batch, heads, seqlen, head_dim), got (2, 6, 4)",
    ),
    (
        {"query": torch.zeros(2, 3, 5, 4, dtype=torch.int64)},
        TypeError,
        "query must have a floating dtype, got torch.int64",
    ),
    (
        {"key": torch.zeros(2, 3, 6, 4, dtype=torch.float16)},
        ValueError,
        "key must be torch.float32 on cpu, as query is, got torch.float16 on cpu",
    ),
    (
        {"value": torch.zeros(2, 3, 6, 4, device="meta")},
        ValueError,
        "value must be torch.float32 on cpu, as query is, got torch.float32 on meta",
    ),
    (
        {"query": torch.zeros(2, 0, 5, 4)},
        ValueError,
        "query must have at least one head and head_dim 1, got (2, 0, 5, 4)",
    ),
    (
        {"key": torch.zeros(2, 4, 6, 4)},
        ValueError,
        "key must have shape (2, 3, 6, 4) to match query and key, got (2, 4, 6, 4)",
    ),
    (
        {"value": torch.zeros(2, 3, 7, 4)},
        ValueError,
        "value must have shape (2, 3, 6, 4) to match query and key, got (2, 3, 7, 4)",
    ),
    (
        {"key": torch.zeros(2, 3, 0, 4), "value": torch.zeros(2, 3, 0, 4)},
        ValueError,
        "key must hold at least one position, got (2, 3, 0, 4)",
    ),
    ({"theta": 1.0}, TypeError, "theta must be a Tensor, got float"),
    ({"theta": torch.eye(4)}, ValueError, "theta must have shape (3, 3) to match query's 3 heads, got (4, 4)"),
    (
        {"theta": torch.eye(3, dtype=torch.int32)},
        TypeError,
        "theta must have a floating dtype, got torch.int32",
    ),
    ({"theta": torch.eye(3, device="meta")}, ValueError, "theta must be on cpu, as query is, got meta"),
    ({"bias": 1.0}, TypeError, "bias must be a Tensor, got float"),
    ({"norm": "group"}, ValueError, "norm must be one of ('batch', 'layer', None), got 'group'"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be in [0, 1), got -0.1"),
    (
        {"running_var": torch.ones(3)},
        ValueError,
        "running_mean and running_var must be given together, got one of them",
    ),
    (
        {"training": False},
        ValueError,
        "running_mean and running_var must be given for norm='batch' with training=False, got None",
    ),
    (
        {name: torch.zeros(1, 3, 1, 4) for name in ("query", "key", "value")},
        ValueError,
        "query and key must span more than one position for norm='batch' with training=True, got batch 1, seqlen 1, "
        "seqlen_k 1",
    ),
    (
        {"backend": "cudnn"},
        ValueError,
        "backend must be one of ['auto', 'cuda', 'triton', 'cpu', 'reference'], got 'cudnn'",
    ),
    *(
        (
            {name: torch.zeros(3, 1)},
            ValueError,
            f"{name} must have shape (3,) to match query's 3 heads, got (3, 1)",
        )
        for name in ("bias", "norm_weight", "norm_bias", "running_mean", "running_var")
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), INVALID, ids=[message[:60] for _, _, message in INVALID])
def test_errors(changes, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        re_attention(**(VALID | changes))


def test_valid_arguments_raise_nothing():
    assert re_attention(**VALID, backend="reference").shape == (2, 3, 5, 4)


def masks(seqlen, seqlen_k):
    generator = torch.Generator().manual_seed(0)
    allowed = torch.rand(2, 3, seqlen, seqlen_k, generator=generator) < 0.6
    allowed[..., 0] = True
    added = torch.zeros(seqlen, seqlen_k, dtype=torch.float64).masked_fill(~allowed[0, 0], float("-inf"))
    return {
        "boolean": {"attn_mask": allowed},
        "boolean-by-row": {"attn_mask": allowed[0, 0]},
        "boolean-by-key": {"attn_mask": allowed[:, :1, :1]},
        "added": {"attn_mask": torch.randn(2, 3, seqlen, seqlen_k, generator=generator, dtype=torch.float64)},
        "minus-infinity": {"attn_mask": added},
        "causal": {"is_causal": True},
    }


@pytest.mark.parametrize("name", masks(1, 1))
@pytest.mark.parametrize("seqlen_k", [5, 7])
def test_masks_are_those_of_sdpa(name, seqlen_k):
    problem = float64_problem("none", seqlen=5, seqlen_k=seqlen_k)
    mask = masks(5, seqlen_k)[name]
    query, key, value = (problem[name] for name in ("query", "key", "value"))
    found = re_attention(query, key, value, torch.eye(3, dtype=torch.float64), **mask)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value, **mask))


def test_mask_and_causality_together():
    problem = float64_problem("layer", seqlen=6)
    allowed = masks(6, 6)["boolean"]["attn_mask"]
    both = call(problem, attn_mask=allowed, is_causal=True)
    torch.testing.assert_close(both, call(problem, attn_mask=allowed & torch.ones(6, 6, dtype=torch.bool).tril()))


@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_row_that_may_see_nothing(kind):
    """Its maps are zero, not NaN, and nothing flows back through it."""
    problem = float64_problem("none").with_tensors(bias=None)
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[2] = False
    if kind == "added":
        mask = torch.zeros(5, 6, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    results = compute(problem.with_options(attn_mask=mask), "reference")
    assert not results["output"][:, :, 2].any()
    assert results["output"][:, :, [0, 1, 3, 4]].all()
    assert all(result.isfinite().all() for result in results.values())
    assert not results["query gradient"][:, :, 2].any()


@backends
@modes
def test_autocast(mode, backend, device):
    """Query, key and value in autocast's dtype; theta, the norm's parameters and all their gradients stay float32."""
    problem = make_problem(mode, device=device)
    names = [name for name in problem.tensors if not name.startswith("running")]
    results = []
    for autocast in (True, False):
        leaves = {name: problem[name].detach().requires_grad_() for name in names}
        maps = {} if autocast else {name: leaves[name].bfloat16() for name in ("query", "key", "value")}
        statistics = {name: t.clone() for name, t in problem.tensors.items() if name not in names}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            output = re_attention(**(leaves | maps | statistics), **problem.options, backend=backend)
        assert output.dtype == torch.bfloat16
        output.backward(problem.grad.to(output.dtype))
        results.append([output, *(leaf.grad for leaf in leaves.values()), *statistics.values()])
        assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values() if leaf.grad is not None)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@backends
@pytest.mark.parametrize("momentum", [0.1, 0.75])
def test_running_statistics_are_those_of_batch_norm(momentum, backend, device):
    """Two steps: the mean, and the unbiased variance, of the mixed maps."""
    norm = nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64, device=device)
    running_mean, running_var = torch.zeros(3, device=device), torch.ones(3, device=device)
    for step in range(2):
        problem = make_problem("batch-training", device=device, seqlen=5 + step, seqlen_k=7, momentum=momentum)
        call(problem.with_tensors(running_mean=running_mean, running_var=running_var), backend=backend)
        query, key, theta, bias = (problem[name].double() for name in ("query", "key", "theta", "bias"))
        maps = (query @ key.mT / 4).softmax(-1)
        norm(torch.einsum("bhij,hg->bgij", maps, theta) + bias[:, None, None])
    torch.testing.assert_close(running_mean, norm.running_mean.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(running_var, norm.running_var.float(), rtol=1e-6, atol=1e-7)


@backends
def test_running_statistics_in_another_dtype(backend, device):
    """Updated in place, in the dtype they have."""
    problem = make_problem("batch-training", device=device)
    halves = {name: problem[name].half() for name in ("running_mean", "running_var")}
    results = [compute(p, backend) for p in (problem, problem.with_tensors(**halves))]
    for name in halves:
        assert results[1][name].dtype == torch.float16
        torch.testing.assert_close(results[1][name], results[0][name].half(), rtol=2e-3, atol=0)


@backends
def test_evaluation_leaves_running_statistics_alone(backend, device):
    problem = make_problem("batch-eval", device=device)
    results = compute(problem, backend)
    assert all(torch.equal(results[name], problem[name]) for name in ("running_mean", "running_var"))


@backends
def test_empty_batch(backend, device):
    """No output, no gradient, and statistics as they were: there is nothing to average."""
    problem = make_problem("batch-training", batch=0, device=device)
    results = compute(problem, backend)
    assert results["output"].shape == (0, 3, 17, 16)
    assert not results["theta gradient"].any()
    assert all(torch.equal(results[name], problem[name]) for name in ("running_mean", "running_var"))


@backends
def test_dropout_keeps_the_expected_maps(backend, device):
    """Kept maps are scaled by 1 / (1 - p): on average nothing changes."""
    seqlen = 64
    query = torch.zeros(2, 3, seqlen, 16, device=device)
    torch.manual_seed(0)
    output = re_attention(query, query, query + 1, torch.eye(3, device=device), dropout_p=0.25, backend=backend)
    torch.testing.assert_close(output.mean(), torch.tensor(1.0, device=device), rtol=0, atol=0.02)
    assert output.std() > 0.01
