"""The fused operator against float64: every norm, dtype and family of shapes, and inputs that invite trouble."""

from dataclasses import replace

import pytest
import torch
from parity import MARKS, MODES, assert_parity, compute, drawn_mask, make_problem

from reattn import re_attention

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# heads, head_dim, seqlen, seqlen_k, batch
SHAPES = [
    (1, 16, 17, 17, 2),
    (3, 32, 50, 50, 2),
    (6, 33, 17, 50, 1),
    (12, 32, 50, 50, 1),
    (12, 64, 17, 17, 2),
    (16, 35, 1, 17, 2),
    (12, 33, 50, 197, 1),
    (3, 64, 196, 17, 1),
    (6, 80, 17, 50, 1),
    (3, 128, 17, 17, 1),
    (3, 1, 17, 3, 2),
    (17, 16, 17, 17, 1),
    (32, 32, 17, 17, 1),
    (12, 32, 197, 197, 1),
    (12, 32, 17, 17, 0),
]
modes = pytest.mark.parametrize("mode", MODES)


def shape_cases():
    """Every shape with every mode, dtypes in turn: each pair of a shape, a mode and a dtype occurs on the CPU, and by
    one of the GPU backends."""
    for row, (backend, marks) in enumerate(MARKS.items()):
        for index, (heads, head_dim, seqlen, seqlen_k, batch) in enumerate(SHAPES):
            for turn, mode in enumerate(MODES):
                if backend != "cpu" and (row + index + turn) % 2:
                    continue
                dtype = list(FLOATS)[(index + turn) % 3]
                name = f"{backend}-{batch}x{heads}x{seqlen}x{seqlen_k}x{head_dim}-{mode}-{dtype}"
                sizes = {"heads": heads, "head_dim": head_dim, "seqlen": seqlen, "seqlen_k": seqlen_k, "batch": batch}
                # Long in the emulator.
                slow = heads * seqlen * seqlen_k >= 12 * 197 * 197 and mode != "batch-training"
                marked = [marks] * bool(marks) + [pytest.mark.slow] * slow
                yield pytest.param(sizes, mode, FLOATS[dtype], backend, id=name, marks=marked)


@pytest.mark.parametrize(("sizes", "mode", "dtype", "backend"), list(shape_cases()))
def test_shapes(sizes, mode, dtype, backend, device):
    assert_parity(make_problem(mode, **sizes, dtype=dtype, device=device), backend)


@pytest.mark.parametrize("mode", ["batch-eval", "layer", "none"])
def test_one_key(mode, backend, device):
    """Each map is 1: nothing may reach query and key."""
    problem = make_problem(mode, seqlen_k=1, device=device)
    assert_parity(problem, backend)
    found = compute(problem, backend)
    assert not found["query gradient"].any() and not found["key gradient"].any()


def test_maps_without_variance(backend, device):
    """Batch statistics of maps that are all 1: the output is the norm's bias, up to one rounding over sqrt(eps)."""
    problem = make_problem("batch-training", seqlen_k=1, device=device)
    found = compute(problem, backend)
    expected = problem["norm_bias"][:, None, None] * problem["value"]
    torch.testing.assert_close(found["output"], expected.expand(-1, -1, 17, -1), rtol=0, atol=5e-4)
    for name in ("query", "key", "theta", "bias"):
        torch.testing.assert_close(found[f"{name} gradient"], torch.zeros_like(problem[name]), rtol=0, atol=0.1)
    torch.testing.assert_close(found["running_var"], 0.9 * problem["running_var"])


@modes
@pytest.mark.parametrize("layout", ["contiguous", "head_dim strided", "expanded"])
def test_layouts(layout, mode, backend, device):
    assert_parity(make_problem(mode, layout=layout, device=device, dtype=torch.float16), backend)


@modes
@pytest.mark.parametrize(
    "expand",
    [
        pytest.param(lambda grad: grad.new_ones(()).expand(grad.shape), id="sum"),
        pytest.param(lambda grad: (grad.new_ones(()) / grad.numel()).expand(grad.shape), id="mean"),
        pytest.param(lambda grad: grad[:, :1].expand(grad.shape), id="over-heads"),
        pytest.param(lambda grad: grad[:, :, :1, :1].expand(grad.shape), id="over-rows-and-head_dim"),
        pytest.param(lambda grad: grad.contiguous().mT.contiguous().mT, id="head_dim-strided"),
    ],
)
def test_gradient_layouts(expand, mode, backend, device):
    problem = make_problem(mode, device=device)
    assert_parity(replace(problem, grad=expand(problem.grad)), backend)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_norm_over_two_heads(dtype, backend, device):
    """Of two heads the norm leaves hardly more than a sign: what reaches query and key is a small difference."""
    assert_parity(make_problem("layer", heads=2, dtype=dtype, device=device), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_without_eps(dtype, backend, device):
    """What stands in the padding of heads that are no power of two has no variance: its root may not reach them."""
    problem = make_problem("layer", heads=12, dtype=dtype, device=device, eps=0.0)
    found = compute(problem, backend)
    assert all(result.isfinite().all() for result in found.values())
    assert_parity(problem, backend, run=lambda *_: found)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_gradient_that_all_heads_share(dtype, backend, device):
    """The norm over heads removes what is common to them, which may be far larger than what is left."""
    problem = make_problem("layer", dtype=dtype, device=device)
    value, grad = (tensor[:, :1] + tensor / 64 for tensor in (problem["value"], problem.grad))
    ones = torch.ones_like(problem["norm_weight"])
    assert_parity(replace(problem.with_tensors(value=value, norm_weight=ones), grad=grad), backend)


@pytest.mark.parametrize("mode", ["batch-training", "batch-eval", "layer"])
def test_a_head_that_is_switched_off(mode, backend, device):
    """norm_weight is 0 there: its gradient, and those of all others, are what they should be."""
    problem = make_problem(mode, device=device, output_scale=0.7)
    weight = problem["norm_weight"].clone()
    weight[1] = 0
    problem = problem.with_tensors(norm_weight=weight)
    assert_parity(problem, backend)
    assert compute(problem, backend)["norm_weight gradient"][1] != 0


@modes
def test_scale_and_output_scale(mode, backend, device):
    assert_parity(make_problem(mode, device=device, scale=0.6, output_scale=33**-0.5), backend)


@modes
def test_without_optional_tensors(mode, backend, device):
    absent = dict.fromkeys(("bias", "norm_weight", "norm_bias"))
    if MODES[mode][1]:
        absent |= dict.fromkeys(("running_mean", "running_var"))
    assert_parity(make_problem(mode, device=device).with_tensors(**absent), backend)


@pytest.mark.parametrize("absent", ["bias", "norm_weight", "norm_bias"])
@pytest.mark.parametrize("mode", ["batch-training", "batch-eval", "layer"])
def test_without_one_optional_tensor(mode, absent, backend, device):
    problem = make_problem(mode, device=device, dtype=torch.float16)
    assert_parity(problem.with_tensors(**{absent: None}), backend)


@modes
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
def test_parameter_dtypes(mode, dtype, parameter_dtype, backend, device):
    dtypes = {"dtype": FLOATS[dtype], "parameter_dtype": FLOATS[parameter_dtype]}
    assert_parity(make_problem(mode, **dtypes, device=device), backend)


@modes
def test_strided_theta(mode, backend, device):
    """As a transposed convolution weight is."""
    problem = make_problem(mode, device=device)
    assert_parity(problem.with_tensors(theta=problem["theta"].mT.contiguous().mT), backend)


@modes
def test_no_queries(mode, backend, device):
    problem = make_problem(mode, seqlen=0, seqlen_k=5, device=device)
    results = compute(problem, backend)
    assert results["output"].shape == (2, 3, 0, 16)
    assert not any(result.any() for name, result in results.items() if name.endswith("gradient"))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_momentum_and_eps(momentum, backend, device):
    assert_parity(make_problem("batch-training", device=device, momentum=momentum, eps=1e-3), backend)


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_saturated_softmax(mode, dtype, backend, device):
    """Scores of about +-1e4: every map is 0 or 1, and nearly every gradient of query and key vanishes."""
    problem = make_problem(mode, device=device, dtype=dtype)
    large = {name: problem[name] * 60 for name in ("query", "key")}
    largest_score = (large["query"].double() @ large["key"].double().mT / 4).abs().max().item()
    assert 1e4 < largest_score < 5e4
    assert_parity(problem.with_tensors(**large), backend)


@modes
def test_values_with_a_large_mean(mode, backend, device):
    problem = make_problem(mode, device=device)
    assert_parity(problem.with_tensors(value=problem["value"] + 30), backend)


@modes
def test_nearly_equal_heads(mode, backend, device):
    """The covariance of the maps is then nearly singular, and theta may cancel it."""
    problem = make_problem(mode, device=device, layout="expanded")
    noise = make_problem(mode, device=device)
    noisy = {name: problem[name] + 1e-3 * noise[name] for name in ("query", "key")}
    assert_parity(problem.with_tensors(**noisy), backend)


@modes
def test_every_output_element_is_written(mode, backend, device, monkeypatch):
    """Memory that the backend allocates holds NaN; what the kernels return must not depend on it."""
    problem = make_problem(mode, heads=6, head_dim=33, seqlen=35, seqlen_k=19, device=device, dropout_p=0.1)
    expected = compute(problem, backend)
    poisoned = []

    def poison(allocate):
        def allocate_nan(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            poisoned.append(tensor.shape)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_nan

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", poison(torch.Tensor.new_empty_strided))
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    found = compute(problem, backend)
    assert len(poisoned) >= 5
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def kind(tensor):
    """0 where finite, 1 where NaN, 2 where infinite."""
    return tensor.isnan().int() + 2 * tensor.isinf().int()


@pytest.mark.parametrize("mode", ["layer", "none"])
@pytest.mark.parametrize("heads", [3, 12])
def test_an_infinite_key_that_no_query_is_drawn_to(heads, mode, backend, device):
    """All maps are finite. Rows of a block that are outside the sequence, of which the key makes NaN, reach nothing."""
    problem = make_problem(mode, heads=heads, device=device)
    key = problem["key"].clone()
    key[1, :, 2, 5] = float("-inf")
    problem = problem.with_tensors(query=problem["query"].abs(), key=key)
    found, expected = compute(problem, backend), compute(problem, "reference")
    assert expected["output"].isfinite().all() and expected["key gradient"].isfinite().all()
    for name in expected:
        assert torch.equal(found[name].isfinite(), expected[name].isfinite()), name


@pytest.mark.parametrize("mode", ["batch-eval", "layer", "none"])
@pytest.mark.parametrize("heads", [3, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "where", "value"),
    [
        pytest.param("query", (0, 1, 3, 5), float("nan"), id="nan-in-query"),
        pytest.param("query", (0, 1, 3, 5), float("inf"), id="inf-in-query"),
        pytest.param("query", (0, 2), float("nan"), id="nan-in-a-head-of-query"),
        pytest.param("query", (slice(None), slice(None), 4), float("nan"), id="nan-in-a-row-of-query"),
        pytest.param("key", (1, 0, 2, 5), float("nan"), id="nan-in-key"),
        pytest.param("key", (1, 0, 2, 5), float("-inf"), id="inf-in-key"),
        pytest.param("value", (1, 0, 2, 5), float("nan"), id="nan-in-value"),
        pytest.param("value", (1, 0, 2, 5), float("inf"), id="inf-in-value"),
    ],
)
def test_nonfinite_inputs(name, where, value, heads, mode, backend, device):
    problem = make_problem(mode, heads=heads, device=device)
    spoilt = problem[name].clone()
    spoilt[where] = value
    problem = problem.with_tensors(**{name: spoilt})
    found, expected = compute(problem, backend), compute(problem, "reference")
    assert not expected["output"].isfinite().all()
    torch.testing.assert_close(kind(found["output"]), kind(expected["output"]), rtol=0, atol=0)
    wrong = [name for name in expected if not torch.equal(found[name].isfinite(), expected[name].isfinite())]
    assert not wrong


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("heads", [3, 12])
def test_dropout(heads, mode, dtype, backend, device):
    """The reference is given the mask that was drawn; the backward pass has to draw it again."""
    keep = drawn_mask(backend, heads=heads, seqlen_k=35, seed=5)
    problem = make_problem(mode, heads=heads, seqlen_k=35, dtype=dtype, device=device, dropout_p=0.3)
    assert_parity(replace(problem, keep=keep, seed=5), backend)


def test_dropout_rate_and_independence(backend):
    """Shares of kept elements, and of those kept in two places, within four standard deviations."""
    keep = drawn_mask(backend, heads=4, seqlen=40, seqlen_k=40, batch=4, dropout_p=0.3).double()

    def deviations(kept, expected):
        return (kept.mean() - expected).abs() / (expected * (1 - expected) / kept.numel()) ** 0.5

    assert deviations(keep, 0.7) < 4
    for dim in range(4):
        assert deviations(keep * keep.roll(1, dim), 0.7**2) < 4
    assert deviations(keep * keep.mT, 0.7**2) < 4


def test_dropout_follows_the_seed(backend):
    first, again, other = (drawn_mask(backend, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dropout_differs_between_calls(backend, device):
    problem = make_problem(device=device, dropout_p=0.5)
    torch.manual_seed(0)
    one, two = (re_attention(**problem.tensors, **problem.options, backend=backend) for _ in range(2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 32)], ids=str)
def test_dropout_does_not_depend_on_the_tile(tile, use_tile):
    from reattn.kernels import configs

    expected = drawn_mask("triton", seqlen=35, seqlen_k=35)
    use_tile(configs.Tile(*tile))
    assert torch.equal(drawn_mask("triton", seqlen=35, seqlen_k=35), expected)


@pytest.mark.parametrize("mode", ["batch-training", "layer"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_determinism(mode, dropout_p, backend, device):
    """Bitwise, theta's gradient included: sums over parts are taken in a fixed order."""
    problem = make_problem(mode, seqlen=35, device=device, dropout_p=dropout_p)
    one, two = (compute(problem, backend) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("mode", ["layer", "none"])
def test_training_matters_to_batch_norm_alone(mode, backend, device):
    problem = make_problem(mode, device=device)
    one, two = (compute(problem.with_options(training=training), backend) for training in (False, True))
    assert all(torch.equal(one[name], two[name]) for name in one)
