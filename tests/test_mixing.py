"""Mixing before the softmax, no mixing after it, and another number of heads after it than before."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from error_bound import simulate
from fuzz import laid_out
from parity import (
    FUSED,
    MODES,
    STATISTICS,
    assert_defined_by,
    assert_parity,
    assert_same,
    compute,
    device_of,
    drawn_mask,
    make_problem,
)
from test_masks import KINDS, definition
from torch.autograd import gradcheck

from reattn import re_attention
from reattn.backends import cpu

modes = pytest.mark.parametrize("mode", MODES)
fused = pytest.mark.parametrize("backend", FUSED)
HEADS = 3
# Backends that mix before the softmax.
own = pytest.mark.parametrize("backend", ["triton", pytest.param("cpu", marks=pytest.mark.extension)])


def mixing_problem(
    mode, kind="none", *, heads=HEADS, heads_out=None, pre=True, post=True, dtype=torch.float64, device="cpu", **sizes
):
    """With every optional tensor; in float64, its parameters in float32 otherwise."""
    heads_out = heads_out or heads
    sizes = {"head_dim": 4, "seqlen": 7, "seqlen_k": 9, "batch": 2} | sizes
    dtypes = {"dtype": dtype, "parameter_dtype": torch.promote_types(dtype, torch.float32), "device": device}
    problem = make_problem(mode, **sizes, heads=heads, **dtypes)
    wide = make_problem(mode, **sizes, heads=heads_out, seed=1, **dtypes)
    draw = torch.Generator().manual_seed(2)
    pre_theta, pre_bias, theta = (
        torch.randn(*shape, dtype=torch.float64, generator=draw).to(device, dtypes["parameter_dtype"])
        for shape in ((heads, heads), (heads,), (heads, heads_out))
    )
    if heads_out != heads:
        of_heads_out = {name: wide[name] for name in wide.tensors if name not in ("query", "key", "theta")}
        problem = problem.with_tensors(**of_heads_out, theta=theta * heads**-0.5)
        problem.grad = wide.grad
    if pre:
        problem = problem.with_tensors(pre_theta=pre_theta * (heads / 3) ** -0.5, pre_bias=pre_bias)
    if not post:
        problem = problem.with_tensors(theta=None)
    if kind != "none":
        make, is_causal = KINDS[kind]
        mask = make(sizes["batch"], heads, sizes["seqlen"], sizes["seqlen_k"], draw)
        if mask is not None:
            lowest = mask == torch.finfo(torch.float32).min
            mask = mask.to(device, dtype if mask.is_floating_point() else mask.dtype)
            if mask.is_floating_point():
                mask = mask.masked_fill(lowest.to(device), torch.finfo(dtype).min)
        problem = problem.with_tensors(attn_mask=mask).with_options(is_causal=is_causal)
    return problem


def spelled_out(problem):
    """The definition of tests/test_masks.py, of scores that are mixed before."""
    t = {"attn_mask": None} | problem.tensors
    scores = torch.einsum("bhid,bhjd->bhij", t["query"], t["key"]) * t["query"].shape[3] ** -0.5
    if t.get("pre_theta") is not None:
        scores = sum(t["pre_theta"][h][:, None, None] * scores[:, h, None] for h in range(HEADS)) + t["pre_bias"].view(
            1, -1, 1, 1
        )
    if t["theta"] is None:
        t["theta"] = torch.eye(HEADS, dtype=torch.float64)
    options = {"is_causal": False} | problem.options
    return definition(problem.with_tensors(**t).with_options(**options), scores)


SETTINGS = {
    "pre": {},
    "pre-alone": {"post": False},
    "no-mixing": {"pre": False, "post": False},
    "more-heads": {"pre": False, "heads_out": 5},
    "fewer-heads": {"heads_out": 2},
}
CASES = [
    (setting, kind)
    for setting in SETTINGS
    for kind in ("none", *KINDS)
    if "heads_out" not in SETTINGS[setting] or kind not in ("by-head", "full-bias", "table-bias", "causal-bias")
]


@modes
@pytest.mark.parametrize(("setting", "kind"), CASES)
def test_the_reference_is_the_definition(setting, kind, mode):
    problem = mixing_problem(mode, kind, **SETTINGS[setting])
    assert_defined_by(problem, spelled_out)


@modes
def test_gradcheck(mode):
    problem = mixing_problem(mode, heads_out=2, head_dim=2, seqlen=3, seqlen_k=4, batch=1)
    leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items() if name not in STATISTICS}

    def operator(*tensors):
        statistics = {name: problem[name].clone() for name in STATISTICS if name in problem.tensors}
        return re_attention(**dict(zip(leaves, tensors, strict=True)), **statistics, **problem.options)

    assert gradcheck(operator, tuple(leaves.values()))


@modes
def test_the_identity_changes_nothing(mode):
    """As pre_theta, and as theta."""
    problem = mixing_problem(mode, pre=False)
    eye = torch.eye(HEADS, dtype=torch.float64)
    found = compute(problem.with_tensors(pre_theta=eye), "reference")
    for name, expected in compute(problem, "reference").items():
        torch.testing.assert_close(found[name], expected)
    found = compute(problem.with_tensors(theta=eye), "reference")
    for name, expected in compute(problem.with_tensors(theta=None), "reference").items():
        torch.testing.assert_close(found[name], expected)


def test_a_bias_before_the_softmax_changes_nothing():
    problem = mixing_problem("layer", "padding")
    found = compute(problem, "reference")
    torch.testing.assert_close(found["output"], compute(problem.with_tensors(pre_bias=None), "reference")["output"])
    torch.testing.assert_close(found["pre_bias gradient"], torch.zeros(HEADS, dtype=torch.float64))


@modes
@pytest.mark.parametrize("kind", ["padding", "causal", "by-row"])
def test_nothing_of_hidden_keys_arrives(kind, mode):
    """What is NaN in a key of one head and in its value reaches no query that does not see it, and every one that does;
    nor does a query that sees nothing reach a gradient."""
    problem = mixing_problem(mode, kind, seqlen=9)
    clean = compute(problem, "reference")
    visible = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    if problem.tensors["attn_mask"] is not None:
        visible = visible & problem["attn_mask"]
    if problem.options["is_causal"]:
        visible = visible.tril()
    index = int(visible[-1, 0].sum(0).argmin())
    seen = visible[-1, 0, :, index]
    assert not seen.all()
    broken = {name: problem[name].clone() for name in ("key", "value")}
    for tensor in broken.values():
        tensor[-1, 1, index] = float("nan")
    found = compute(problem.with_tensors(**broken), "reference")
    if not (mode == "batch-training" and seen.any()):
        assert torch.equal(found["output"][0], clean["output"][0])
        for name in ("output", "query gradient"):
            assert torch.equal(found[name][-1, :, ~seen], clean[name][-1, :, ~seen])
    assert found["output"][-1, :, seen].isnan().all()
    if not seen.any():
        assert all(torch.equal(found[name], right) for name, right in clean.items() if name != "value gradient")
    blind = ~visible[-1, 0].any(-1)
    query = problem["query"].clone()
    query[-1, :, blind] = float("nan")
    found = compute(problem.with_tensors(query=query), "reference")
    assert all(torch.equal(found[name], right) for name, right in clean.items())


def test_packed():
    torch.manual_seed(0)
    packed = torch.randn(2, 7, 3, HEADS, 4, dtype=torch.float64, requires_grad=True)
    theta, pre_theta = torch.randn(2, HEADS, HEADS, dtype=torch.float64)
    out = re_attention(packed, None, None, theta, pre_theta=pre_theta)
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(out, re_attention(query, key, value, theta, pre_theta=pre_theta))
    with pytest.raises(ValueError, match=r"theta must have shape \(3, 3\) to match query's 3 heads, got \(3, 5\)"):
        re_attention(packed, None, None, torch.ones(HEADS, 5, dtype=torch.float64))


def test_autocast():
    """Query, key and value in autocast's dtype; pre_theta and its gradient stay float32."""
    problem = make_problem("layer")
    pre_theta = torch.eye(3).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = re_attention(**problem.tensors, **problem.options, pre_theta=pre_theta, backend="reference")
        expected = re_attention(**problem.tensors, **problem.options, backend="reference")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert pre_theta.grad.dtype == torch.float32 and pre_theta.grad.isfinite().all()


def test_dropout_acts_between_the_two_mixings():
    problem = mixing_problem("none")
    torch.manual_seed(3)
    found = re_attention(**problem.tensors, dropout_p=0.4)
    torch.manual_seed(3)
    # Values that show the maps.
    wide = [F.pad(problem[name], (0, 5)) for name in ("query", "key")]
    eye = torch.eye(9, dtype=torch.float64).expand(2, HEADS, 9, 9)
    before = {name: problem[name] for name in ("pre_theta", "pre_bias")}
    maps = re_attention(*wide, eye, **before, scale=0.5, dropout_p=0.4)
    mixed = torch.einsum("bhij,hg->bgij", maps, problem["theta"]) + problem["bias"][:, None, None]
    torch.testing.assert_close(found, mixed @ problem["value"])


@pytest.mark.parametrize("setting", ["pre", "pre-alone", "fewer-heads"])
def test_compiled(setting):
    problem = mixing_problem("layer", "padding", **SETTINGS[setting])
    compiled = torch.compile(re_attention, fullgraph=True, backend="aot_eager")
    tensors = {
        name: t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for name, t in problem.tensors.items()
    }
    out = compiled(**tensors, **problem.options)
    out.backward(problem.grad)
    expected = compute(problem, "reference")
    torch.testing.assert_close(out, expected["output"])
    torch.testing.assert_close(tensors["query"].grad, expected["query gradient"])


@fused
def test_fused_backends_without_theta(backend):
    """They mix by the identity."""
    device = device_of(backend)
    problem = make_problem("layer", device=device)
    found = compute(problem.with_tensors(theta=None), backend)
    expected = compute(problem.with_tensors(theta=torch.eye(3, device=device)), backend)
    del expected["theta gradient"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], right) for name, right in expected.items())


FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.mark.extension
@modes
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("setting", "kind"), CASES)
def test_cpu_parity(setting, kind, dtype, mode):
    assert_parity(mixing_problem(mode, kind, **SETTINGS[setting], dtype=FLOATS[dtype]), "cpu")


def compiled_cases():
    """Each head count with each dtype. Mode, mask, head_dim, heads after mixing, dropout and lengths take turns."""
    kinds = ("none", "padding", "causal", "by-row", "none", "table-bias", "causal-padding", "by-head")
    after = {1: 3, 3: 1, 6: 12, 8: 6, 12: 16, 16: 9, 17: 12, 32: 31}
    for number, (heads, dtype) in enumerate(itertools.product(after, FLOATS)):
        mode, kind = list(MODES)[(number + number // 8) % 4], kinds[number % 8]
        lengths = ((17, 33), (33, 20), (1, 50))[number // 2 % 3]
        if lengths[0] == 1 and kind.startswith("causal"):
            kind = "by-head"  # of a single key there is nothing to learn
        sizes = dict(zip(("seqlen", "seqlen_k"), lengths, strict=True)) | {"head_dim": (32, 64, 48, 128)[number % 4]}
        if (number + number // 3) % 3 == 1 and kind not in ("by-head", "table-bias"):
            sizes["heads_out"] = after[heads]
        dropout_p = 0.3 if number % 5 == 2 else 0.0
        name = "-".join(f"{key}={size}" for key, size in sizes.items())
        name = f"{heads}-{dtype}-{mode}-{kind}-{name}" + "-dropout" * (dropout_p > 0)
        yield pytest.param(heads, dtype, mode, kind, sizes, dropout_p, id=name)


@own
@pytest.mark.parametrize(("heads", "dtype", "mode", "kind", "sizes", "dropout_p"), list(compiled_cases()))
def test_parity(heads, dtype, mode, kind, sizes, dropout_p, backend):
    device = device_of(backend)
    problem = mixing_problem(mode, kind, heads=heads, dtype=FLOATS[dtype], device=device, **sizes)
    if dropout_p:
        lengths = {name: sizes[name] for name in ("seqlen", "seqlen_k")}
        keep = drawn_mask(backend, heads=heads, **lengths, dropout_p=dropout_p)
        problem = replace(problem.with_options(dropout_p=dropout_p), keep=keep)
    assert_parity(problem, backend)


def random_problem(draw, backend):
    """Anything that the backend takes, and what it is made of."""
    heads = draw.choice([draw.randint(1, 12), draw.randint(1, 32)])
    made = {
        "heads": heads,
        "heads_out": draw.choice([heads, draw.randint(1, 32)]) if backend != "cuda" else heads,
        "head_dim": draw.choice([16, 32, 48, draw.randint(1, 128)]),
        "seqlen": draw.randint(1, 60),
        "seqlen_k": draw.randint(2, 80),
        "batch": draw.randint(1, 3),
        "dtype": draw.choice(list(FLOATS.values())),
    }
    mode = draw.choice(list(MODES))
    by_head = ("by-head", "full-bias", "table-bias", "causal-bias")
    kind = draw.choice(["none", *(kind for kind in KINDS if made["heads_out"] == heads or kind not in by_head)])
    problem = mixing_problem(mode, kind, **made, device=device_of(backend))
    options = {"scale": draw.choice([None, 0.3, -0.2]), "dropout_p": draw.choice([0.0, 0.0, 0.3])}
    problem = problem.with_options(**options)
    if options["dropout_p"]:
        sizes = {name: made[name] for name in ("heads", "seqlen", "seqlen_k", "batch")}
        problem = replace(problem, keep=drawn_mask(backend, **sizes, head_dim=128))
    layouts = {}
    for name in ("query", "key", "value", "grad", "attn_mask"):
        tensor = problem.grad if name == "grad" else problem.tensors.get(name)
        if tensor is None:
            continue
        # Keys that are all the same leave batch statistics of zero.
        tensor, layouts[name] = laid_out(tensor, draw, [0] if name == "key" else [])
        problem = replace(problem, grad=tensor) if name == "grad" else problem.with_tensors(**{name: tensor})
    return problem, {"mode": mode, "kind": kind, **made, **options, **layouts}


RANDOM = [("cpu", seed) for seed in range(40)]
RANDOM += [(backend, seed) for backend, seeds in (("triton", 1), ("cuda", 2)) for seed in range(seeds)]


@pytest.mark.extension
@pytest.mark.cuda
@pytest.mark.parametrize(("backend", "seed"), RANDOM)
def test_random_problems(backend, seed, monkeypatch):
    draw = random.Random(seed)
    problem, made_of = random_problem(draw, backend)
    if backend == "cpu":  # last, so that the problems are the same on every machine
        monkeypatch.setenv("REATTN_CPU_ISA", draw.choice([name for name, runs, _ in cpu.INSTRUCTION_SETS if runs]))
    print(made_of)
    assert_parity(problem, backend)


@own
@pytest.mark.parametrize(("heads", "mode"), [(3, "layer"), (8, "none"), (12, "batch-eval")])
def test_nan_in_a_query_stays_in_its_row(heads, mode, backend):
    """And reaches all of it: every head is made of all."""
    device = device_of(backend)
    problem = mixing_problem(mode, heads=heads, head_dim=16, seqlen=20, dtype=torch.float32, device=device)
    query = problem["query"].clone()
    query[0, heads // 2, 5, 3] = float("nan")
    problem = problem.with_tensors(query=query, pre_bias=None)
    found, expected = compute(problem, backend), compute(problem, "reference")
    assert expected["output"][0, :, 5].isnan().all() and not expected["output"][0, :, 6].isnan().any()
    for name, right in expected.items():
        assert torch.equal(found[name].isnan(), right.isnan()), name


@own
@pytest.mark.parametrize(("heads", "kind"), [(3, "padding"), (3, "causal"), (3, "by-row"), (12, "by-row")])
def test_fused_backends_let_nothing_of_hidden_keys_arrive(heads, kind, backend):
    """What is NaN in a key, or in a query that sees nothing."""
    device = device_of(backend)
    problem = mixing_problem("layer", kind, heads=heads, head_dim=16, seqlen=9, dtype=torch.float32, device=device)
    clean = compute(problem, backend)
    visible = torch.ones(2, 1, 9, 9, dtype=torch.bool, device=device)
    if (mask := problem.tensors["attn_mask"]) is not None:
        visible = visible & mask
    if problem.options["is_causal"]:
        visible = visible.tril()
    index = int(visible[-1, 0].sum(0).argmin())
    key = problem["key"].clone()
    key[-1, 1, index] = float("nan")
    found = compute(problem.with_tensors(key=key), backend)
    hidden = ~visible[-1, 0, :, index]
    assert hidden.any() and torch.equal(found["output"][0], clean["output"][0])
    for name in ("output", "query gradient"):
        assert torch.equal(found[name][-1, :, hidden], clean[name][-1, :, hidden])
        assert name != "output" or found[name][-1, :, ~hidden].isnan().all()
    if hidden.all():
        assert_same(found, clean)
    blind = ~visible[-1, 0].any(-1)
    query = problem["query"].clone()
    query[-1, :, blind] = float("nan")
    assert_same(compute(problem.with_tensors(query=query), backend), clean)


@fused
@pytest.mark.parametrize("heads", [3, 12])
def test_products_that_float16_does_not_hold(heads, backend):
    """They are scaled before they are rounded."""
    problem = mixing_problem("layer", heads=heads, head_dim=64, dtype=torch.float16, device=device_of(backend))
    large = {name: problem[name] * 100 for name in ("query", "key")}
    assert (large["query"].float() @ large["key"].float().mT).abs().max() > 2**17
    assert_parity(problem.with_tensors(**large).with_options(scale=2.0**-14), backend)


@fused
@pytest.mark.parametrize("heads", [3, 12])
def test_what_is_hidden_from_one_head_alone(heads, backend):
    """What is NaN in its key makes NaN of the others' scores."""
    problem = mixing_problem("layer", heads=heads, head_dim=16, dtype=torch.float32, device=device_of(backend))
    mask = torch.ones(1, heads, 7, 9, dtype=torch.bool, device=problem.grad.device)
    mask[:, 1, :, 4] = False
    key = problem["key"].clone()
    key[0, 1, 4] = float("nan")
    problem = problem.with_tensors(key=key, attn_mask=mask)
    found, expected = compute(problem, backend), compute(problem, "reference")
    assert expected["output"][0].isnan().all() and expected["output"][1].isfinite().all()
    for name in ("output", "query gradient"):
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name


# heads, mode, pre_theta, dtype
SPREADING = [
    (3, "layer", False, "float32"),
    (4, "batch-training", True, "bfloat16"),
    (12, "none", True, "float32"),
    (12, "layer", False, "float16"),
]


@fused
@pytest.mark.parametrize("row", [2, 13])
@pytest.mark.parametrize(("heads", "mode", "pre", "dtype"), SPREADING)
def test_a_row_that_is_not_finite_reaches_no_key_that_it_does_not_see(heads, mode, pre, dtype, row, backend):
    """Not even as gradients, that of a bias among them; but for batch statistics, which are of all rows. The last keys
    are hidden from all rows."""
    device = device_of(backend)
    mode = "batch-eval" if mode == "batch-training" else mode
    sizes = {"head_dim": 16, "seqlen": 16, "seqlen_k": 37}
    problem = mixing_problem(mode, heads=heads, pre=pre, **sizes, dtype=FLOATS[dtype], device=device)
    visible = torch.ones(1, 1, 16, 37, dtype=torch.bool, device=device)
    visible[..., 3] = False
    visible[..., 33:] = False
    visible[..., row, :] = torch.arange(37, device=device) < 5
    mask = torch.zeros(visible.shape, dtype=FLOATS[dtype], device=device).masked_fill(~visible, float("-inf"))
    key = problem["key"].clone()
    key[0, 1, 3] = float("nan")
    found = compute(problem.with_tensors(key=key, attn_mask=mask), backend)
    assert found["output"][0, :, row].isnan().all()
    seen, heads_reached = torch.arange(37) < 5, torch.arange(heads) == 1
    for name, of_all_heads in (("value gradient", True), ("key gradient", pre or mode == "layer")):
        reached = found[name].isnan().any(-1)
        expected = (heads_reached | of_all_heads)[:, None] & seen
        assert torch.equal(reached[0].cpu(), expected) and not reached[1].any(), name
    assert torch.equal(found["attn_mask gradient"].isnan().any((0, 1, 2)).cpu(), seen)


@fused
@pytest.mark.parametrize("heads", [3, 12])
def test_a_row_that_is_not_finite_reaches_no_key_that_no_head_sees(heads, backend):
    """Where scores are mixed and masks differ between heads."""
    device = device_of(backend)
    problem = mixing_problem("none", heads=heads, head_dim=16, dtype=torch.float32, device=device)
    mask = torch.ones(1, heads, 7, 9, dtype=torch.bool, device=device)
    mask[..., 3] = False
    mask[:, :, 2] = torch.arange(9, device=device) < 5
    mask[:, 1, 2, 5] = True
    key = problem["key"].clone()
    key[0, 1, 3] = float("nan")
    found = compute(problem.with_tensors(key=key, attn_mask=mask), backend)
    assert torch.equal(found["key gradient"][0].isnan().any(-1).any(0).cpu(), torch.arange(9) < 6)


@fused
@pytest.mark.parametrize("by_row", [True, False], ids=["by-row", "by-key"])
@pytest.mark.parametrize(("heads", "mode", "pre", "dtype"), SPREADING)
def test_a_head_that_sees_nothing_takes_nothing_of_the_others(heads, mode, pre, dtype, by_row, backend):
    """Neither does one where it does not see some keys, nor its running statistics."""
    device = device_of(backend)
    problem = mixing_problem(mode, heads=heads, pre=pre, head_dim=16, dtype=FLOATS[dtype], device=device)
    mask = torch.ones(1, heads, 7 if by_row else 1, 9, dtype=torch.bool, device=device)
    rows = 3 if by_row else 0
    mask[:, 1, rows] = False
    mask[:, 2, rows, 5:] = False
    query = problem["query"].clone()
    query[0, 0, 3] = float("nan")
    problem = problem.with_tensors(query=query, attn_mask=mask, pre_bias=None)
    found, expected = compute(problem, backend), compute(problem, "reference")
    assert not found["output"][0, 1, 3].any()
    for name in {"output", "query gradient", "key gradient", "value gradient", *STATISTICS} & expected.keys():
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name
    if mode == "batch-training" and by_row:
        for name in ("running_mean", "running_var"):
            assert (torch.arange(heads)[expected[name].isfinite().cpu()]).tolist() == [1]


@fused
def test_a_bias_that_is_not_a_number(backend):
    """It hides nothing, and is not ignored."""
    device = device_of(backend)
    problem = mixing_problem("layer", "full-bias", pre=False, head_dim=16, dtype=torch.float32, device=device)
    mask = problem["attn_mask"].clone()
    mask[..., 2, 4] = float("nan")
    problem = problem.with_tensors(attn_mask=mask)
    found = compute(problem, backend)["output"].isnan()
    assert torch.equal(found, compute(problem, "reference")["output"].isnan())
    assert found[:, :, 2].all() and not found[:, :, 3].any()


@fused
def test_a_key_without_weight(backend):
    """All of whose scores are -infinity; see docs/performance.md for Triton with at most 8 heads."""
    problem = mixing_problem("layer", heads=12, head_dim=16, dtype=torch.float32, device=device_of(backend))
    query = problem["query"].clone()
    query[..., 0] = -query[..., 0].abs() - 1
    key = problem["key"].clone()
    key[0, :, 4, 0] = float("inf")
    problem = problem.with_tensors(query=query, key=key, pre_theta=problem["pre_theta"].abs() + 0.01)
    found, expected = compute(problem, backend)["output"], compute(problem, "reference")["output"]
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@own
def test_what_is_not_finite_before_the_softmax(backend):
    """A bias that is NaN is not ignored; one that is finite has a gradient, of zeros."""
    problem = mixing_problem("layer", head_dim=16, dtype=torch.float32, device=device_of(backend))
    assert not compute(problem, backend)["pre_bias gradient"].any()
    pre_bias = problem["pre_bias"].clone()
    pre_bias[1] = float("nan")
    assert compute(problem.with_tensors(pre_bias=pre_bias), backend)["output"].isnan().all()


@own
def test_reproducible(backend):
    sizes = {"head_dim": 16, "seqlen": 50, "batch": 3, "device": device_of(backend)}
    problem = mixing_problem("batch-training", "padding", dtype=torch.float32, **sizes)
    assert_same(compute(problem, backend), compute(problem, backend))


@modes
@pytest.mark.parametrize(
    ("setting", "kind"), [("pre", "causal-bias"), ("fewer-heads", "by-row"), ("pre-alone", "none")]
)
def test_the_simulation_of_rounding_is_the_operator(setting, kind, mode):
    problem = mixing_problem(mode, kind, **SETTINGS[setting])
    found = simulate(problem, None)
    for name, right in compute(problem, "reference").items():
        torch.testing.assert_close(
            found[name], right, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}{text}"
        )


@pytest.mark.parametrize("dtype", FLOATS)
def test_faults_before_the_softmax_are_found(dtype):
    """A gradient that lacks its last row, and scores that are mixed by the transpose."""
    problem = mixing_problem("layer", head_dim=16, seqlen=17, seqlen_k=35, dtype=FLOATS[dtype])

    def without_last_row(problem, _):
        results = compute(problem, "reference")
        lost = results["pre_theta gradient"] - _pre_theta_gradient_before(problem, problem["query"].shape[2] - 1)
        return results | {"pre_theta gradient": results["pre_theta gradient"] - lost}

    with pytest.raises(AssertionError, match="(?m)^pre_theta gradient: error"):
        assert_parity(problem, "faulty", run=without_last_row)

    def transposed(problem, _):
        return compute(problem.with_tensors(pre_theta=problem["pre_theta"].mT), "reference")

    with pytest.raises(AssertionError, match="(?m)^output: error"):
        assert_parity(problem, "faulty", run=transposed)


def _pre_theta_gradient_before(problem, end):
    """Of the first rows alone."""
    rows = problem.with_tensors(query=problem["query"][:, :, :end])
    rows.grad = problem.grad[:, :, :end]
    return compute(rows, "reference")["pre_theta gradient"]


@pytest.mark.cuda
def test_cuda_declines_other_numbers_of_heads():
    problem = mixing_problem("layer", **SETTINGS["more-heads"], dtype=torch.float32, device=device_of("cuda"))
    message = "'cuda' cannot run this: .*takes as many heads after mixing as before, got 3 and 5"
    with pytest.raises(RuntimeError, match=message):
        re_attention(**problem.tensors, **problem.options, backend="cuda")


@fused
@pytest.mark.parametrize("mode", ["layer", "batch-training"])
def test_keys_that_one_head_does_not_see(mode, backend):
    """Hidden from it for all queries alike: the mixed scores of the others need them."""
    problem = mixing_problem(
        mode, "by-head", heads=4, head_dim=16, seqlen=1, batch=4, dtype=torch.float32, device=device_of(backend)
    )
    assert problem["attn_mask"].shape == (1, 4, 1, 9) and (~problem["attn_mask"]).any()
    assert_parity(problem, backend)
