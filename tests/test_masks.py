"""Masks and causal attention: what they mean, and every backend against float64."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from fuzz import random_problem
from parity import (
    BACKENDS,
    FUSED,
    MARKS,
    MODES,
    assert_defined_by,
    assert_parity,
    assert_same,
    compute,
    device_of,
    drawn_mask,
    make_problem,
)
from torch.nn import functional as F

from reattn import re_attention

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
modes = pytest.mark.parametrize("mode", MODES)


def by_backend(names, choices, few, backends=FUSED):
    """Every choice with every backend; a few with those that the emulator executes, which compile for seconds."""
    cases = []
    for backend in backends:
        name, marks = (backend, ()) if isinstance(backend, str) else (*backend.values, backend.marks)
        chosen = few if name in ("triton", "cuda") else choices
        cases += [pytest.param(name, *choice, marks=marks) for choice in chosen]
    return pytest.mark.parametrize(("backend", *names), cases)


def lengths(batch, seqlen_k):
    """Of each sample another number of keys: all of them, and at least two."""
    return torch.linspace(seqlen_k, max(2, seqlen_k // 3), batch).long()[:, None, None, None]


def padding(batch, heads, seqlen, seqlen_k, draw):
    return torch.arange(seqlen_k) < lengths(batch, seqlen_k)


def by_row(batch, heads, seqlen, seqlen_k, draw):
    """Some queries see nothing, and some keys are seen by none."""
    mask = torch.rand(seqlen, seqlen_k, generator=draw) < 0.6
    mask[1::5], mask[:, 2::7] = False, False
    mask[0, 0] = True
    return mask


def by_head(batch, heads, seqlen, seqlen_k, draw):
    return torch.rand(1, heads, seqlen, seqlen_k, generator=draw) < 0.7


def rows_alone(batch, heads, seqlen, seqlen_k, draw):
    mask = torch.rand(batch, 1, seqlen, 1, generator=draw) < 0.7
    mask[0, :, 0] = True
    return mask


def full_bias(batch, heads, seqlen, seqlen_k, draw):
    """Some of it hides, in either way."""
    mask = torch.randn(batch, heads, seqlen, seqlen_k, generator=draw)
    hidden = torch.rand(batch, heads, seqlen, seqlen_k, generator=draw)
    return mask.masked_fill(hidden < 0.2, -torch.inf).masked_fill((hidden > 0.8), torch.finfo(torch.float32).min)


def table_bias(batch, heads, seqlen, seqlen_k, draw):
    return torch.randn(heads, seqlen, seqlen_k, generator=draw)


def key_bias(batch, heads, seqlen, seqlen_k, draw):
    return torch.randn(batch, 1, 1, seqlen_k, generator=draw)


def no_mask(batch, heads, seqlen, seqlen_k, draw):
    return None


# name: (attn_mask, is_causal)
KINDS = {
    "padding": (padding, False),
    "by-row": (by_row, False),
    "by-head": (by_head, False),
    "rows-alone": (rows_alone, False),
    "full-bias": (full_bias, False),
    "table-bias": (table_bias, False),
    "key-bias": (key_bias, False),
    "causal": (no_mask, True),
    "causal-padding": (padding, True),
    "causal-bias": (table_bias, True),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def masked_problem(kind, mode="layer", *, heads=3, seqlen=17, seqlen_k=None, batch=2, seed=0, **options):
    seqlen_k = seqlen if seqlen_k is None else seqlen_k
    sizes = {"heads": heads, "seqlen": seqlen, "seqlen_k": seqlen_k, "batch": batch}
    problem = make_problem(mode, **sizes, **options)
    make, is_causal = KINDS[kind]
    mask = make(batch, heads, seqlen, seqlen_k, torch.Generator().manual_seed(seed))
    if mask is not None:
        lowest = mask == torch.finfo(torch.float32).min
        mask = mask.to(problem.grad.device, mask.dtype if mask.dtype == torch.bool else problem.grad.dtype)
        if mask.is_floating_point():
            mask = mask.masked_fill(lowest.to(mask.device), torch.finfo(mask.dtype).min)
    return problem.with_tensors(attn_mask=mask).with_options(is_causal=is_causal)


# heads, head_dim, seqlen, seqlen_k, batch
SHAPES = [
    (3, 16, 17, 17, 2),
    (12, 32, 50, 50, 2),
    (6, 33, 17, 50, 3),
    (16, 16, 50, 17, 1),
    (12, 64, 40, 70, 2),
    (1, 8, 9, 9, 2),
]


def parity_cases():
    """Every kind with every mode, by one GPU backend at least; shapes and dtypes in turn."""
    for (row, backend), (index, kind) in itertools.product(enumerate(MARKS), enumerate(KINDS)):
        for turn, mode in enumerate(MODES):
            if backend != "cpu" and (row + index + turn) % 2:
                continue
            shape, dtype = SHAPES[(index + turn) % len(SHAPES)], list(FLOATS)[(index + turn) % 3]
            sizes = dict(zip(("heads", "head_dim", "seqlen", "seqlen_k", "batch"), shape, strict=True))
            name = f"{backend}-{kind}-{mode}-{'x'.join(map(str, shape))}-{dtype}"
            yield pytest.param(backend, kind, mode, sizes, FLOATS[dtype], id=name, marks=MARKS[backend])


@pytest.mark.parametrize(("backend", "kind", "mode", "sizes", "dtype"), list(parity_cases()))
def test_parity(backend, kind, mode, sizes, dtype, device):
    assert_parity(masked_problem(kind, mode, **sizes, dtype=dtype, device=device), backend)


def head_cases():
    """Every head count with each backend; dtypes, kinds, modes and architectures in turn."""
    counts = (1, 2, 3, 4, 6, 8, 12, 16, 17, 32)
    for index, ((row, backend), heads) in enumerate(itertools.product(enumerate(("triton", "cuda")), counts)):
        dtype = list(FLOATS)[(index + row) % 3]
        kind, mode = list(KINDS)[index % len(KINDS)], list(MODES)[(index + index // 10) % 4]
        arch, head_dim = (90, 80)[(index + row) % 2], (32, 33, 64, 80)[(index + index // 3) % 4]
        name = f"{backend}-{heads}x{head_dim}-{dtype}-{kind}-{mode}-sm_{arch}"
        yield pytest.param(backend, heads, head_dim, FLOATS[dtype], kind, mode, arch, id=name, marks=MARKS[backend])


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "heads", "head_dim", "dtype", "kind", "mode", "arch"), list(head_cases()))
def test_every_head_count(backend, heads, head_dim, dtype, kind, mode, arch, device, compiled_for):
    compiled_for(arch)
    sizes = {"heads": heads, "head_dim": head_dim, "seqlen": 21, "seqlen_k": 26, "batch": 2}
    assert_parity(masked_problem(kind, mode, **sizes, dtype=dtype, device=device), backend)


def definition(problem, scores=None):
    """What the operator is with a mask, in float64, term by term; of other scores than query and key give."""
    t, options = problem.tensors, problem.options
    query, key, value, theta = (t[name] for name in ("query", "key", "value", "theta"))
    shape = (*query.shape[:3], key.shape[2])
    visible = torch.ones(shape, dtype=torch.bool)
    if scores is None:
        scores = torch.einsum("bhid,bhjd->bhij", query, key) * query.shape[3] ** -0.5
    mask = t["attn_mask"]
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        visible = visible & (mask > torch.finfo(mask.dtype).min)
        scores = scores + mask.where(visible, 0.0)
    if options["is_causal"]:
        visible = visible & (torch.arange(shape[2])[:, None] >= torch.arange(shape[3]))
    weights = scores.exp() * visible
    maps = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    mixed = torch.einsum("bhij,hg->bijg", maps, theta) + t["bias"]
    # Where theta makes another number of heads, all of them see the same.
    seen = visible.movedim(1, 3) if mixed.shape[3] == shape[1] else visible[:, 0, ..., None]
    if options["norm"] == "layer":
        mixed = F.layer_norm(mixed, mixed.shape[-1:], t["norm_weight"], t["norm_bias"])
    elif options["norm"] == "batch":
        mean, var = t["running_mean"], t["running_var"]
        if options["training"]:
            count = seen.sum((0, 1, 2))
            mean = (mixed * seen).sum((0, 1, 2)) / count
            var = ((mixed - mean).square() * seen).sum((0, 1, 2)) / count
        mixed = (mixed - mean) / (var + 1e-5).sqrt() * t["norm_weight"] + t["norm_bias"]
    return torch.einsum("bijg,bgjd->bgid", mixed * seen, value)


@kinds
@modes
def test_the_reference_is_the_definition(kind, mode):
    problem = masked_problem(kind, mode, seqlen_k=21, dtype=torch.float64, parameter_dtype=torch.float64)
    assert_defined_by(problem, definition)


def test_running_statistics_are_those_of_what_is_visible(backend, device):
    """Two samples padded to one length: the statistics are those of the positions that are there."""
    problem = masked_problem("padding", "batch-training", seqlen=9, device=device, momentum=1.0)
    found = compute(problem, backend)
    mask = problem["attn_mask"]
    maps = (problem["query"].double() @ problem["key"].double().mT / 4).masked_fill(~mask, -torch.inf).softmax(-1)
    mixed = torch.einsum("bhij,hg->bgij", maps, problem["theta"].double()) + problem["bias"].double()[:, None, None]
    visible = mixed.movedim(1, -1)[mask[:, 0].expand(-1, 9, -1)]
    torch.testing.assert_close(found["running_mean"].double(), visible.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["running_var"].double(), visible.var(0), rtol=1e-4, atol=1e-7)


@by_backend(
    ("kind", "mode"),
    list(itertools.product(["padding", "causal", "by-row", "full-bias"], MODES)),
    [("padding", "batch-training"), ("causal", "layer"), ("by-row", "none"), ("full-bias", "batch-eval")],
    BACKENDS,
)
def test_nothing_of_hidden_keys_arrives(kind, mode, backend):
    """What is NaN in a key and its value reaches no query that does not see it."""
    problem = masked_problem(kind, mode, heads=5, device=device_of(backend))
    clean = compute(problem, backend)
    visible = torch.ones(2, 5, 17, 17, dtype=torch.bool, device=problem.grad.device)
    mask = problem.tensors["attn_mask"]
    if mask is not None:
        visible &= mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    if problem.options["is_causal"]:
        visible = visible.tril()
    # Of the last sample and all heads, a key that not all see.
    seen_by = visible[-1].any(0).sum(0)
    index = int(seen_by.argmin())
    assert seen_by[index] < 17
    # Of a key that some see, batch statistics take it everywhere, as they should.
    everywhere = mode == "batch-training" and bool(seen_by[index])
    broken = {name: problem[name].clone() for name in (["value"] if everywhere else ["key", "value"])}
    for tensor in broken.values():
        tensor[-1, :, index] = float("nan")
    found = compute(problem.with_tensors(**broken), backend)
    blind = ~visible[-1, :, :, index].any(0)
    assert torch.equal(found["output"][-1, :, blind], clean["output"][-1, :, blind])
    assert torch.equal(found["output"][0], clean["output"][0])
    if not everywhere:
        assert torch.equal(found["query gradient"][-1, :, blind], clean["query gradient"][-1, :, blind])
    # A value reaches the head that sees it, a key all of them.
    reached = found["output"][-1, :, ~blind].isnan()
    assert reached.any(-1).any(0).all() if everywhere else reached.all()


@by_backend(["mode"], [[mode] for mode in MODES], [["batch-training"], ["layer"]], BACKENDS)
def test_queries_that_see_nothing(mode, backend):
    """They give 0 and send no gradient, even where they are NaN; with no key visible at all, nothing is NaN."""
    device = device_of(backend)
    problem = masked_problem("rows-alone", mode, device=device)
    rows = ~problem["attn_mask"].expand(2, 3, 17, 17).any(-1)
    clean = compute(problem, backend)
    assert not clean["output"][rows].any() and not clean["query gradient"][rows].any()
    query = problem["query"].clone()
    query[rows] = float("nan")
    found = compute(problem.with_tensors(query=query), backend)
    assert_same(found, clean)
    nothing = problem.with_tensors(attn_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device))
    for name, result in compute(nothing, backend).items():
        if name.startswith("running"):
            assert torch.equal(result, problem[name])
        else:
            assert not result.any(), name


@by_backend(
    ("kind", "mode"),
    list(itertools.product(["left-padding", "blind-head", "blind-sample"], MODES)),
    [("left-padding", "layer"), ("blind-head", "batch-training"), ("blind-sample", "none")],
    BACKENDS,
)
def test_nan_in_queries_that_see_nothing(kind, mode, backend):
    """The first queries behind padding on the left, with a causal mask; those of one head; all of a sample."""
    device = device_of(backend)
    mask = torch.ones(2, 3, 1, 17, dtype=torch.bool, device=device)
    query = make_problem(mode, device=device)["query"].clone()
    if kind == "left-padding":
        mask[0, :, :, :4] = False
        mask = mask[:, :1]
        query[0, :, 1] = float("nan")
    elif kind == "blind-head":
        mask[0, 1] = False
        query[0, 1] = float("nan")
    else:
        mask[0] = False
        mask = mask[:, :1]
        query[0] = float("nan")
    problem = make_problem(mode, device=device).with_tensors(attn_mask=mask)
    problem = problem.with_options(is_causal=kind == "left-padding")
    found, clean = compute(problem.with_tensors(query=query), backend), compute(problem, backend)
    assert_same(found, clean)


def test_a_head_that_sees_nothing_keeps_its_statistics(backend, device):
    """And the others take theirs."""
    mask = torch.tensor([False, True, True], device=device)[None, :, None, None]
    problem = make_problem("batch-training", device=device, momentum=0.5).with_tensors(attn_mask=mask)
    found, expected = compute(problem, backend), compute(problem, "reference")
    for name in ("running_mean", "running_var"):
        assert torch.equal(found[name][0], problem[name][0])
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    assert not found["output"][:, 0].any()


def test_one_query(backend, device):
    """Causal, it sees the first key alone."""
    assert_parity(masked_problem("causal", "batch-training", seqlen=1, seqlen_k=9, batch=3, device=device), backend)


def test_layer_norm_without_eps(backend, device):
    """What is hidden has nothing to be divided by."""
    problem = masked_problem("padding", heads=4, device=device, eps=0.0)
    problem = problem.with_tensors(bias=None, theta=torch.eye(4, device=device))
    found = compute(problem, backend)
    assert all(result.isfinite().all() for result in found.values())
    expected = compute(problem.to(torch.float64), "reference")["output"]
    torch.testing.assert_close(found["output"].double(), expected, rtol=1e-3, atol=1e-3)


@by_backend(["mode"], [[mode] for mode in MODES], [["layer"]])
def test_masks_in_any_layout(mode, backend, device):
    """Expanded, transposed, sliced: the same results, but for how their instructions are contracted."""
    problem = masked_problem("by-row", mode, device=device)
    mask = problem["attn_mask"]
    clean = compute(problem, backend)
    wide = torch.zeros(34, 51, dtype=torch.bool, device=device)
    wide[::2, ::3] = mask
    for other in (mask.expand(2, 3, 17, 17), mask.T.contiguous().T, wide[::2, ::3], mask[None, None]):
        torch.testing.assert_close(compute(problem.with_tensors(attn_mask=other), backend), clean)


@by_backend(["kind"], [["full-bias"], ["table-bias"], ["key-bias"], ["causal-bias"]], [["table-bias"], ["key-bias"]])
def test_gradient_of_a_bias_that_others_share(kind, backend, device):
    """In the shape that was given; none is computed where none is asked for, with the same other results."""
    problem = masked_problem(kind, "batch-training", device=device)
    mask = problem["attn_mask"]
    found = compute(problem, backend)
    assert found["attn_mask gradient"].shape == mask.shape
    constant = problem.with_tensors(attn_mask=None).with_options(attn_mask=mask.detach())
    results = compute(constant, backend)
    assert_same(results, {name: found[name] for name in results})


@by_backend(
    ("kind", "mode"),
    list(itertools.product(["padding", "causal-bias"], MODES)),
    [("padding", "layer"), ("causal-bias", "batch-training")],
)
def test_dropout(kind, mode, backend, device):
    problem = masked_problem(kind, mode, device=device, dropout_p=0.3)
    assert_parity(replace(problem, keep=drawn_mask(backend)), backend)


@by_backend(["seed"], [[seed] for seed in range(10)], [[0], [2], [3], [7]])
def test_fuzz(seed, backend):
    draw = random.Random(1000 + seed)
    problem, what = random_problem(draw, backend, most_queries=40, most_keys=50)
    batch, heads, seqlen, _ = problem["query"].shape
    seqlen_k = problem["key"].shape[2]
    kind = draw.choice(list(KINDS))
    make, is_causal = KINDS[kind]
    mask = make(batch, heads, seqlen, seqlen_k, torch.Generator().manual_seed(seed))
    if mask is not None and mask.is_floating_point():
        mask = mask.to(problem.grad.dtype)
    device = device_of(backend)
    problem = problem.with_tensors(attn_mask=mask if mask is None else mask.to(device))
    print(kind, what)
    assert_parity(problem.with_options(is_causal=is_causal), backend)


def test_float_masks_are_cast(backend, device):
    """A float32 bias beside 16-bit queries, and under autocast, takes their dtype; its gradient is its own."""
    problem = masked_problem("table-bias", device=device, dtype=torch.bfloat16)
    found = compute(problem.with_tensors(attn_mask=problem["attn_mask"].float()), backend)
    assert found["attn_mask gradient"].dtype == torch.float32
    clean = compute(problem, backend)
    assert torch.equal(found["output"], clean["output"])
    torch.testing.assert_close(found["attn_mask gradient"].bfloat16(), clean["attn_mask gradient"])
    maps = [problem[name].float() for name in ("query", "key", "value")]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = re_attention(*maps, problem["theta"], attn_mask=problem["attn_mask"].float(), backend=backend)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("given", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS.values()], ids=["float64", *FLOATS])
def test_what_hides_in_a_dtype_hides_in_every_other(dtype, given):
    """The lowest number of a mask's own dtype, beside queries of another."""
    problem = make_problem("layer", dtype=dtype)
    visible = torch.rand(17, 17, generator=torch.Generator().manual_seed(0)) < 0.7
    added = torch.zeros(17, 17, dtype=given).masked_fill(~visible, torch.finfo(given).min)
    results = []
    for mask in (added, visible):
        arguments = {name: tensor.clone() for name, tensor in problem.tensors.items()}
        results.append(re_attention(**arguments, **problem.options, attn_mask=mask, backend="reference"))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([[True]], TypeError, "attn_mask must be a Tensor, got list"),
        (
            torch.ones(5, 6, dtype=torch.int64),
            TypeError,
            "attn_mask must have dtype bool or a floating one, got torch.int64",
        ),
        (
            torch.ones(2, 6, dtype=torch.bool),
            ValueError,
            r"attn_mask must broadcast to .* = \(2, 3, 5, 6\), got \(2, 6\)",
        ),
        (torch.ones(4, 3, 5, 6), ValueError, r"attn_mask must broadcast to .* = \(2, 3, 5, 6\), got \(4, 3, 5, 6\)"),
        (torch.ones(1, 2, 3, 5, 6), ValueError, r"attn_mask must broadcast to .*, got \(1, 2, 3, 5, 6\)"),
        (
            torch.ones(5, 6, dtype=torch.bool, device="meta"),
            ValueError,
            "attn_mask must be on cpu, as query is, got meta",
        ),
    ],
    ids=["list", "integers", "batch x keys", "another batch", "five dimensions", "another device"],
)
def test_what_a_mask_may_not_be(mask, error, message):
    query, key = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 6, 8)
    with pytest.raises(error, match=message):
        re_attention(query, key, key, torch.eye(3), attn_mask=mask)


def test_is_causal_is_a_bool():
    query = torch.zeros(1, 1, 2, 8)
    with pytest.raises(TypeError, match="is_causal must be a bool, got torch.Tensor"):
        re_attention(query, query, query, torch.eye(1), is_causal=torch.tensor(True))
