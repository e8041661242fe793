"""Every GPU kernel as it is compiled, executed: every two of a head count, a dtype and a norm together, for compute
capability 9.0, and other threes, half as many, for 8.0. `make test-all` runs those for 9.0 with the oldest Triton too.

``test_parity.py`` runs the same kernels on fewer problems. What the compilers make of a kernel depends on heads,
head_dim, dtype, norm and architecture: Triton has miscompiled single head counts. head_dim, lengths, dropout and large
scores take turns.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from error_bound import estimate_errors
from parity import MODES, assert_parity, compute, drawn_mask, make_problem, sizes_of

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HEADS = (1, 2, 3, 4, 6, 8, 12, 16, 17, 32)
HEAD_DIMS = (8, 32, 33, 64, 80, 128)
# seqlen, seqlen_k: ragged, more than a tile, a single row, a single key
LENGTHS = ((17, 50), (70, 33), (1, 17), (17, 1), (33, 17))
ARCHS = (90, 80)


def cases():
    """(arch, heads, dtype, mode), and what takes turns: head_dim, lengths, dropout, a factor on the scores."""
    every = itertools.product(ARCHS, enumerate(HEADS), enumerate(FLOATS), enumerate(MODES))
    for number, (arch, (place, heads), (row, dtype), (column, mode)) in enumerate(every):
        if (place + row + column) % 3 != (0 if arch == 80 else 1) or (arch == 80 and (place + column) % 2):
            continue
        turn = number + number // (len(FLOATS) * len(MODES))  # another one at the next head count
        head_dim, (seqlen, seqlen_k) = HEAD_DIMS[turn % len(HEAD_DIMS)], LENGTHS[turn // 2 % len(LENGTHS)]
        dropout, large = turn % 5 == 1, turn % 7 == 3
        if mode == "batch-training":
            seqlen_k = max(seqlen_k, 2)
        name = f"sm_{arch}-{dtype}-{heads}x{head_dim}-{seqlen}x{seqlen_k}-{mode}"
        name += "-dropout" * dropout + "-large" * large
        yield pytest.param(arch, heads, head_dim, seqlen, seqlen_k, dtype, mode, dropout, large, id=name)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(
    ("arch", "heads", "head_dim", "seqlen", "seqlen_k", "dtype", "mode", "dropout", "large"), list(cases())
)
def test_every_kernel(
    arch, heads, head_dim, seqlen, seqlen_k, dtype, mode, dropout, large, backend, device, compiled_for
):  # fmt: skip
    compiled_for(arch)
    sizes = {"heads": heads, "head_dim": head_dim, "seqlen": seqlen, "seqlen_k": seqlen_k, "batch": 1}
    problem = make_problem(mode, **sizes, dtype=FLOATS[dtype], device=device)
    if large:
        problem = problem.with_tensors(**{name: problem[name] * 30 for name in ("query", "key")})
    if dropout:
        keep = drawn_mask(backend, **sizes)
        problem = replace(problem.with_options(dropout_p=0.3), keep=keep)
    assert_parity(problem, backend)


@pytest.fixture
def allow_tf32():
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    matmul.fp32_precision = before


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize("mode", ["layer", "batch-training"])
@pytest.mark.parametrize("heads", [1, 3, 8, 12, 17])
@pytest.mark.parametrize("arch", ARCHS)
def test_tf32(arch, heads, mode, device, compiled_for, allow_tf32):
    """As near as operands of ten digits let it be, and no nearer: full precision would be."""
    compiled_for(arch)
    sizes = {"heads": heads, "head_dim": 32, "seqlen": 17, "seqlen_k": 33}
    # float16 has ten digits too.
    problem = make_problem(mode, **sizes, dtype=torch.float16, device=device).to(torch.float32)
    found = compute(problem, "triton")
    exact = compute(problem.to(torch.float64), "reference")
    estimate = estimate_errors(problem, exact, sizes_of, tf32=True)
    for name, right in exact.items():
        size = sizes_of(right)
        for norm, error in sizes_of(found[name] - right).items():
            allowed = 2 * estimate[name][norm] + torch.finfo(torch.float32).eps * size[norm]
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} in norm {norm}"
            if name in ("output", "value gradient"):
                assert error > 2.0**-18 * size[norm], f"{name} in full precision"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("heads", HEADS)
def test_nan_stays_in_its_rows(heads, backend, device):
    """Rows share a dot where heads are few: a NaN in one of them must not reach another, at any head count."""
    dtype, mode = list(FLOATS)[HEADS.index(heads) % 3], ("layer", "none")[heads % 2]
    problem = make_problem(mode, heads=heads, seqlen=20, seqlen_k=18, dtype=FLOATS[dtype], device=device)
    query = problem["query"].clone()
    query[0, heads // 2, 5, 3] = float("nan")
    problem = problem.with_tensors(query=query)
    found, expected = compute(problem, backend), compute(problem, "reference")
    for name, right in expected.items():
        assert torch.equal(found[name].isnan(), right.isnan()), name
