"""Mixing before the softmax, no mixing after it, and another number of heads after it than before."""

import re

import pytest
import torch
import torch.nn.functional as F
from parity import FUSED, MODES, STATISTICS, assert_defined_by, compute, device_of, make_problem
from test_masks import KINDS, definition
from torch.autograd import gradcheck

from reattn import re_attention
from reattn.backends import choose
from reattn.problem import Problem

modes = pytest.mark.parametrize("mode", MODES)
fused = pytest.mark.parametrize("backend", FUSED)
HEADS = 3


def mixing_problem(mode, kind="none", *, heads_out=HEADS, pre=True, post=True, **sizes):
    """In float64, with every optional tensor."""
    sizes = {"heads": HEADS, "head_dim": 4, "seqlen": 7, "seqlen_k": 9, "batch": 2} | sizes
    problem = make_problem(mode, **sizes, dtype=torch.float64, parameter_dtype=torch.float64)
    wide = make_problem(
        mode, **sizes | {"heads": heads_out}, seed=1, dtype=torch.float64, parameter_dtype=torch.float64
    )
    draw = torch.Generator().manual_seed(2)
    pre_theta, pre_bias, theta = (
        torch.randn(*shape, dtype=torch.float64, generator=draw)
        for shape in ((HEADS, HEADS), (HEADS,), (HEADS, heads_out))
    )
    if heads_out != HEADS:
        of_heads_out = {name: wide[name] for name in wide.tensors if name not in ("query", "key", "theta")}
        problem = problem.with_tensors(**of_heads_out, theta=theta)
        problem.grad = wide.grad
    if pre:
        problem = problem.with_tensors(pre_theta=pre_theta, pre_bias=pre_bias)
    if not post:
        problem = problem.with_tensors(theta=None)
    if kind != "none":
        make, is_causal = KINDS[kind]
        mask = make(sizes["batch"], HEADS, sizes["seqlen"], sizes["seqlen_k"], draw)
        if mask is not None and mask.is_floating_point():
            mask = mask.double()
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
        out = re_attention(**problem.tensors, **problem.options, pre_theta=pre_theta)
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


@fused
@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("pre", "does not mix before the softmax (pre_theta)"),
        ("more-heads", "takes as many heads after mixing as before, got 3 and 5"),
    ],
)
def test_fused_backends_decline_the_rest(backend, setting, reason):
    device = device_of(backend)
    problem = mixing_problem("layer", **SETTINGS[setting]).to(torch.float32)
    arguments = {name: tensor.to(device) for name, tensor in problem.tensors.items()}
    with pytest.raises(RuntimeError, match=rf"'{backend}' cannot run this: .*{re.escape(reason)}"):
        re_attention(**arguments, **problem.options, backend=backend)
    found = re_attention(**arguments, **problem.options)
    torch.testing.assert_close(found, re_attention(**arguments, **problem.options, backend="reference"))


def test_the_automatic_choice_says_why(caplog):
    """One line, once for each set of reasons."""
    problem = Problem.of(torch.zeros(2, 4, 6, 8), pre_mixed=True, heads_out=8)
    for _ in range(2):
        assert choose("auto", problem, "any") == "reference"
    lines = [record.getMessage() for record in caplog.records if "heads after mixing" in record.getMessage()]
    assert len(lines) == 1 and "does not mix before the softmax (pre_theta)" in lines[0]


VALID = {
    "query": torch.zeros(2, 3, 5, 4),
    "key": torch.zeros(2, 3, 6, 4),
    "value": torch.zeros(2, 3, 6, 4),
    "theta": None,
}
WIDE = {"value": torch.zeros(2, 5, 6, 4), "theta": torch.zeros(3, 5)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"theta": [[1.0]]}, TypeError, "theta must be a Tensor, got list"),
        (
            {"value": torch.zeros(2, 5, 6, 4)},
            ValueError,
            "value must have shape (2, 3, 6, 4) to match query and key, got (2, 5, 6, 4)",
        ),
        (
            {"theta": torch.zeros(3, 5)},
            ValueError,
            "value must have shape (2, 5, 6, 4) to match query, key and theta, got (2, 3, 6, 4)",
        ),
        (
            WIDE | {"theta": torch.zeros(5, 3)},
            ValueError,
            "value must have shape (2, 3, 6, 4) to match query and key, got (2, 5, 6, 4)",
        ),
        (
            {"theta": torch.zeros(3, 0)},
            ValueError,
            "theta must have shape (3, 3) to match query's 3 heads, got (3, 0)",
        ),
        (
            WIDE | {"bias": torch.zeros(3)},
            ValueError,
            "bias must have shape (5,) to match value's 5 heads, got (3,)",
        ),
        (
            {"pre_theta": torch.zeros(3, 5)},
            ValueError,
            "pre_theta must have shape (3, 3) to match query's 3 heads, got (3, 5)",
        ),
        (
            WIDE | {"pre_theta": torch.eye(3), "pre_bias": torch.zeros(5)},
            ValueError,
            "pre_bias must have shape (3,) to match query's 3 heads, got (5,)",
        ),
        ({"pre_bias": torch.zeros(3)}, ValueError, "pre_bias must come with pre_theta, got pre_bias alone"),
        ({"pre_theta": 1.0}, TypeError, "pre_theta must be a Tensor, got float"),
        (
            {"pre_theta": torch.eye(3, dtype=torch.int64)},
            TypeError,
            "pre_theta must have a floating dtype, got torch.int64",
        ),
        (
            {"pre_theta": torch.eye(3, device="meta")},
            ValueError,
            "pre_theta must be on cpu, as query is, got meta",
        ),
        (
            WIDE | {"attn_mask": torch.ones(2, 3, 5, 6, dtype=torch.bool)},
            ValueError,
            "attn_mask must be one for all heads where theta makes 5 of 3, got (2, 3, 5, 6)",
        ),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        re_attention(**(VALID | changes))
