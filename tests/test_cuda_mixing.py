"""The CUDA C++ backend where scores are mixed before the softmax: against float64, and what must not reach whom."""

import functools
import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from fuzz import FLOATS, mask_of
from parity import MODES, assert_parity, assert_same, compute, device_of, make_problem
from test_cuda import CUTS, cut_as
from test_masks import KINDS, masked_problem

from reattn.backends import cuda, cuda_driver

if cuda.EMULATED:
    import emulator.cuda

pytestmark = pytest.mark.cuda
emulated = pytest.mark.skipif(not cuda.EMULATED, reason="needs the emulator")


@pytest.fixture
def use_cut(monkeypatch, forget_plans):
    """Has a call cut its problem that way."""

    def use(name):
        cut_as(name, monkeypatch)
        forget_plans()

    return use


def mixing_problem(mode="layer", kind="none", *, heads=3, seed=1, **options):
    """With a matrix that keeps the size of the scores."""
    device = device_of("cuda")
    if kind == "none":
        problem = make_problem(mode, heads=heads, device=device, **options)
    else:
        problem = masked_problem(kind, mode, heads=heads, device=device, **options)
    pre_theta = torch.randn(heads, heads, generator=torch.Generator().manual_seed(seed)) * heads**-0.5
    return problem.with_tensors(pre_theta=pre_theta.to(device))


# heads, head_dim, seqlen, seqlen_k, dtype, mode, kind of mask
SHAPES = [
    (1, 8, 33, 50, "float32", "none", "none"),
    (1, 64, 17, 17, "bfloat16", "batch-training", "causal"),
    (3, 32, 33, 50, "float16", "layer", "by-head"),
    (8, 128, 17, 17, "float32", "batch-eval", "full-bias"),
    (12, 64, 33, 50, "bfloat16", "layer", "none"),
    (12, 32, 17, 17, "float32", "batch-training", "padding"),
    (16, 8, 33, 50, "bfloat16", "none", "by-row"),
    (17, 32, 33, 50, "float16", "batch-eval", "table-bias"),
    (32, 8, 17, 17, "bfloat16", "batch-training", "causal-padding"),
]


@pytest.mark.parametrize(("heads", "head_dim", "seqlen", "seqlen_k", "dtype", "mode", "kind"), SHAPES)
def test_shapes(heads, head_dim, seqlen, seqlen_k, dtype, mode, kind):
    sizes = {"heads": heads, "head_dim": head_dim, "seqlen": seqlen, "seqlen_k": seqlen_k}
    assert_parity(mixing_problem(mode, kind, **sizes, dtype=FLOATS[dtype]), "cuda")


def head_counts():
    """With every dtype: two for compute capability 9.0, the third for 8.0."""
    counts = (1, 2, 3, 4, 6, 8, 12, 16, 17, 32)
    for (place, heads), (row, dtype) in itertools.product(enumerate(counts), enumerate(FLOATS)):
        yield 80 if (place + row) % 3 == 0 else 90, dtype, heads


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype", "heads"), list(head_counts()))
def test_every_head_count(arch, dtype, heads, compiled_for):
    """Modes, kinds of mask, head_dim and lengths in turn."""
    compiled_for(arch)
    turn = heads + list(FLOATS).index(dtype) + (arch == 80)
    mode, kind = list(MODES)[turn % 4], ["none", *KINDS][turn % (1 + len(KINDS))]
    seqlen, seqlen_k = ((17, 50), (33, 17))[turn % 2]
    sizes = {"heads": heads, "head_dim": (8, 32, 64, 128)[turn // 2 % 4], "seqlen": seqlen, "seqlen_k": seqlen_k}
    assert_parity(mixing_problem(mode, kind, **sizes, dtype=FLOATS[dtype]), "cuda")


def plan_cases():
    """Every cut; dtypes, modes and kinds of mask in turn."""
    for index, cut in enumerate(CUTS):
        dtypes = ("bfloat16", "float16") if CUTS[cut].rows == 32 else ("float16", "float32", "bfloat16")
        kind = ["none", *KINDS][3 * index % (1 + len(KINDS))]
        yield cut, dtypes[index % len(dtypes)], list(MODES)[index % 4], kind


@pytest.mark.parametrize(("cut", "dtype", "mode", "kind"), list(plan_cases()))
def test_plans(cut, dtype, mode, kind, use_cut):
    """In tiles of keys, and in parts of the workspace."""
    use_cut(cut)
    sizes = {"heads": 5, "head_dim": 33, "seqlen": 35, "seqlen_k": 70, "batch": 2 if kind == "padding" else 1}
    assert_parity(mixing_problem(mode, kind, **sizes, dtype=FLOATS[dtype]), "cuda")


@pytest.mark.parametrize(
    ("cut", "dtype", "heads"),
    [
        ("16 rows, all keys", "bfloat16", 3),
        ("16 rows, tiles of 16", "float32", 3),
        ("32 rows, all keys", "float16", 12),
    ],
)
def test_dropout(cut, dtype, heads, use_cut):
    """What is kept depends on the position alone: it is the same as without mixing."""
    sizes = {"heads": heads, "head_dim": 16, "seqlen": 35, "seqlen_k": 40, "batch": 1}
    keep = mask_of("cuda", **sizes)
    use_cut(cut)
    problem = mixing_problem("layer", **sizes, dtype=FLOATS[dtype], dropout_p=0.3)
    assert_parity(replace(problem, keep=keep), "cuda")


@emulated
@pytest.mark.parametrize(
    ("arch", "dtype", "cut"), [(75, "bfloat16", "32 rows, all keys"), (80, "float16", "16 rows, tiles of 64")]
)
def test_compute_capability(arch, dtype, cut, use_cut, request):
    request.addfinalizer(functools.partial(cuda_driver.use, cuda_driver.use(emulator.cuda.Driver(arch))))
    use_cut(cut)
    sizes = {"heads": 13, "seqlen": 19, "seqlen_k": 70, "batch": 1}
    assert_parity(mixing_problem("layer", "causal", **sizes, dtype=FLOATS[dtype]), "cuda")


@emulated
@pytest.mark.parametrize(
    ("cut", "dtype", "kind"), [("16 rows, tiles of 16", "float32", "none"), ("32 rows, all keys", "float16", "by-head")]
)
def test_order_of_blocks_changes_nothing(cut, dtype, kind, use_cut):
    """Bitwise."""
    problem = mixing_problem("layer", kind, seqlen=35, seqlen_k=40, dtype=FLOATS[dtype], dropout_p=0.1)
    use_cut(cut)
    expected = compute(problem, "cuda")
    random.Random(0).shuffle(blocks := list(range(1000)))
    with emulator.executing(blocks=blocks):
        assert_same(compute(problem, "cuda"), expected)


def test_what_is_launched(monkeypatch):
    """Of one part, one kernel more."""
    launched, launch = Counter(), cuda_driver.launch

    def count(loaded, *args):
        launched[loaded.kernel.function] += 1
        launch(loaded, *args)

    monkeypatch.setattr(cuda_driver, "launch", count)
    compute(mixing_problem(), "cuda")
    assert launched == dict.fromkeys(("forward", "backward", "unmix", "products", "unfold"), 1)


@pytest.mark.parametrize(
    ("kind", "cut", "dtype", "broken"),
    [
        ("padding", "16 rows, all keys", "float32", float("nan")),
        ("causal", "16 rows, tiles of 16", "bfloat16", float("nan")),
        ("by-row", "32 rows, all keys", "float16", float("nan")),
        ("by-head", "16 rows, all keys", "bfloat16", float("inf")),
    ],
)
def test_nothing_of_hidden_keys_arrives(kind, cut, dtype, broken, use_cut):
    """What is not finite in a key of one head and in its value reaches no query that does not see it, and every one
    that does, in all heads; nor does a query that sees nothing reach anything."""
    use_cut(cut)
    problem = mixing_problem("layer", kind, seqlen=19, seqlen_k=40, head_dim=24, batch=2, dtype=FLOATS[dtype])
    clean = compute(problem, "cuda")
    visible = torch.ones(2, 3, 19, 40, dtype=torch.bool, device=problem.grad.device)
    if problem.tensors["attn_mask"] is not None:
        visible = visible & problem["attn_mask"]
    if problem.options["is_causal"]:
        visible = visible.tril()
    visible = visible.any(1)  # in some head
    for seen_by_none in (True, False):
        number = visible[-1].sum(0)
        candidates = number == 0 if seen_by_none else (number > 0) & (number < 19)
        if not candidates.any():
            continue
        index = int(candidates.int().argmax())
        seen = visible[-1, :, index]
        tensors = {name: problem[name].clone() for name in ("key", "value")}
        for tensor in tensors.values():
            tensor[-1, 1, index, 3] = broken
        found = compute(problem.with_tensors(**tensors), "cuda")
        assert torch.equal(found["output"][0], clean["output"][0])
        for name in ("output", "query gradient"):
            assert torch.equal(found[name][-1, :, ~seen], clean[name][-1, :, ~seen]), name
        assert not found["output"][-1, 1, seen, 3].isfinite().any()
        if broken != broken and kind != "by-head":  # infinity may be the score of nobody
            assert found["output"][-1, :, seen].isnan().all()
        if seen_by_none:
            assert_same(found, clean)
    blind = ~visible[-1].any(-1)
    if blind.any():
        query = problem["query"].clone()
        query[-1, :, blind] = broken
        assert_same(compute(problem.with_tensors(query=query), "cuda"), clean)


@pytest.mark.parametrize("dtype", FLOATS)
def test_queries_and_keys_that_are_not_finite(dtype):
    """They reach what they reach in the definition, and nothing else."""
    clean = mixing_problem("none", heads=3, seqlen=20, seqlen_k=18, dtype=FLOATS[dtype])
    for name, broken in (("query", float("nan")), ("query", float("inf")), ("key", float("nan"))):
        tensor = clean[name].clone()
        tensor[0, 1, 5, 3] = broken
        problem = clean.with_tensors(**{name: tensor})
        found, expected = compute(problem, "cuda"), compute(problem, "reference")
        for result, right in expected.items():
            assert torch.equal(found[result].isnan(), right.isnan()), f"{name} {broken}: {result}"
        if name == "query":
            rows = found["output"].isnan()
            assert rows[0, :, 5].all() and rows.sum() == rows[0, :, 5].numel()


def test_a_head_that_sees_nothing():
    """Its queries and keys are in the scores of the others: they have gradients."""
    mask = torch.tensor([True, False, True], device=device_of("cuda"))[None, :, None, None]
    for dtype in ("float32", "bfloat16"):
        problem = mixing_problem("layer", seqlen_k=21, dtype=FLOATS[dtype]).with_tensors(attn_mask=mask)
        assert compute(problem, "cuda")["key gradient"][:, 1].abs().amax((1, 2)).min() > 0
        assert_parity(problem, "cuda")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_matrices_of_any_size(size, dtype):
    """Of which the scale makes scores of the usual size."""
    problem = mixing_problem("layer", heads=5, seqlen=17, dtype=FLOATS[dtype])
    expected = compute(problem, "cuda")
    problem = problem.with_tensors(pre_theta=problem["pre_theta"] * size, query=problem["query"] / 8)
    found = compute(problem.with_options(scale=2 / size) if dtype == "float32" else problem, "cuda")
    assert all(result.isfinite().all() for result in found.values())
    if dtype == "float32":
        torch.testing.assert_close(found["output"], expected["output"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_identity_changes_little(dtype):
    problem = make_problem("layer", heads=5, seqlen_k=33, dtype=FLOATS[dtype], device=device_of("cuda"), scale=-0.3)
    eye = torch.eye(5, device=problem.grad.device)
    found, expected = compute(problem.with_tensors(pre_theta=eye), "cuda"), compute(problem, "cuda")
    eps = torch.finfo(FLOATS[dtype]).eps
    for name, right in expected.items():
        if name != "bias gradient":  # which is zero but for rounding
            error, size = (found[name] - right).double().norm(), right.double().norm()
            assert error <= 8 * eps * size, f"{name}: {error / size / eps:.3g} eps"


@pytest.mark.parametrize("dtype", FLOATS)
def test_saturated_softmax(dtype):
    """One key has it all: nothing before the softmax has a gradient, in whatever rounding."""
    problem = mixing_problem("none", heads=4, seqlen=17, head_dim=32, dtype=FLOATS[dtype])
    query, key = problem["query"].clone(), problem["key"].clone()
    query[..., 0], key[..., 0], key[:, :, 3, 0] = 100, 0, 200
    found = compute(
        problem.with_tensors(query=query, key=key, pre_theta=problem["pre_theta"].abs() + 0.1),
        "cuda",
    )
    assert all(not found[f"{name} gradient"].any() for name in ("query", "key", "pre_theta"))
    assert found["theta gradient"].isfinite().all() and found["theta gradient"].any()
