"""``assert_parity`` itself: what it allows is derived rightly, lets right computations pass, and no wrong one."""

import re
from dataclasses import replace

import pytest
import torch
from error_bound import estimate_errors, simulate
from parity import MODES, STATISTICS, assert_parity, compute, make_problem, sizes_of

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
modes = pytest.mark.parametrize("mode", MODES)
dtypes = pytest.mark.parametrize("dtype", FLOATS)
GRADIENTS = ("query", "key", "value", "theta", "bias", "norm_weight", "norm_bias")


def make(mode, dtype="float32", **options):
    return make_problem(mode, seqlen_k=35, dtype=FLOATS[dtype], seed=0, **options)


def results_of(mode):
    """The names of everything that a problem of that mode results in."""
    gradients = [f"{name} gradient" for name in make(mode).tensors if name in GRADIENTS]
    return ["output", *gradients, *STATISTICS * (mode == "batch-training")]


def step_of(result):
    """The step of the simulation that computes it."""
    names = {"output": "output", "norm_weight gradient": "grad_slope", "norm_bias gradient": "grad_shift"}
    return names.get(result, f"grad_{result.removesuffix(' gradient')}" if "gradient" in result else result)


def terms_of(problem, name, steps):
    """What a step sums up: a tensor whose last dimension is summed over, in the order of the keys or queries."""
    key, query, grad, value = (t.double() for t in (problem["key"], problem["query"], problem.grad, problem["value"]))
    if name == "output":
        return steps["normed"].unsqueeze(-2) * value.mT.unsqueeze(-3)
    if name == "grad_query":
        return steps["grad_scores"].unsqueeze(-2) * key.mT.unsqueeze(-3)
    if name == "grad_key":
        return steps["grad_scores"].mT.unsqueeze(-2) * query.mT.unsqueeze(-3)
    if name == "grad_value":
        return steps["normed"].mT.unsqueeze(-2) * grad.mT.unsqueeze(-3)
    by_head = {
        "grad_bias": lambda: steps["grad_mixed"],
        "grad_shift": lambda: steps["grad_normed"],
        "grad_slope": lambda: steps["grad_normed"] * steps["hat"],
        "running_mean": lambda: problem.options.get("momentum", 0.1) * averaged(steps["mixed"] + per_head(problem)),
        "running_var": lambda: problem.options.get("momentum", 0.1) * averaged(centred(steps["mixed"]).square()),
    }
    if name in by_head:
        return by_head[name]().transpose(0, 1).flatten(1)
    assert name == "grad_theta"
    maps, grads = (steps[step].transpose(0, 1).flatten(1) for step in ("dropped", "grad_mixed"))
    return maps.unsqueeze(1) * grads


def per_head(problem):
    return problem["bias"].double()[:, None, None]


def averaged(maps):
    return maps / (maps.numel() // maps.shape[1])


def centred(maps):
    return maps - maps.mean((0, 2, 3), keepdim=True)


def computing(problem, faults):
    """The eager computation with what those faults change in an exact one."""
    right, wrong = simulate(problem, None), simulate(problem, None, faults)

    def run(problem, backend):
        results = compute(problem, "reference")
        return {name: (r.double() + wrong[name] - right[name]).to(r.dtype) for name, r in results.items()}

    return run


def assert_found(problem, faults, result):
    """The fault is found, in that result."""
    with pytest.raises(AssertionError, match=f"(?m)^{re.escape(result)}: error"):
        assert_parity(problem, "faulty", run=computing(problem, faults))


@modes
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("optional", [True, False], ids=["all tensors", "no optional tensors"])
def test_simulation_is_the_operator(mode, dropout_p, optional):
    """Without rounding: its output, gradients and statistics are the reference's."""
    problem = make(mode, dropout_p=dropout_p, scale=0.3, output_scale=0.7, eps=1e-4)
    if dropout_p:
        keep = torch.rand(2, 3, 17, 35, generator=torch.Generator().manual_seed(0)) >= dropout_p
        problem = replace(problem, keep=keep)
    if not optional:
        absent = ("bias", "norm_weight", "norm_bias", *("running_mean", "running_var") * problem.options["training"])
        problem = problem.with_tensors(**dict.fromkeys(absent))
    expected, found = compute(problem.to(torch.float64), "reference"), simulate(problem, None)
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        torch.testing.assert_close(
            found[name], right, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}{text}"
        )


@modes
@dtypes
def test_right_computations_pass(mode, dtype):
    """Those that are simulated, from other random numbers than the estimate's, and the eager one."""
    problem = make(mode, dtype)
    for seed in (100, 101):
        simulated = simulate(problem, seed)
        rounded = {name: simulated[name].to(result.dtype) for name, result in compute(problem, "reference").items()}
        assert_parity(problem, "simulated", run=lambda *_, results=rounded: results)
    assert_parity(problem, "eager", run=computing(problem, {}))


@modes
def test_estimate_is_of_the_size_of_eager_errors(mode):
    """In float32. Of a sum over all maps less may be lost: the terms that it is made of are large and cancel."""
    problem = make(mode)
    exact, eager = compute(problem.to(torch.float64), "reference"), compute(problem, "reference")
    estimates = estimate_errors(problem, exact, sizes_of)
    for name in results_of(mode):
        for norm, error in sizes_of(eager[name] - exact[name]).items():
            least = 0.05 if exact[name].dim() == 4 else 0.0
            assert least <= error / estimates[name][norm] < 2, (name, norm)


def cases():
    """Every result of every mode."""
    for mode in MODES:
        for result in results_of(mode):
            yield pytest.param(mode, result, id=f"{mode}-{result.replace(' ', '-')}")


results = pytest.mark.parametrize(("mode", "result"), list(cases()))


def last_row(terms):
    """The index of the last sum."""
    return (-1,) * (terms.dim() - 1)


@results
@dtypes
def test_dropped_term(mode, result, dtype):
    """The last sum lacks its last term; in 16 bits, where rounding may be as large, that with the largest lacks it."""
    if dtype != "float32" and result in STATISTICS:
        pytest.skip("eager arithmetic in 16 bits loses as much of the statistics")
    problem = make(mode, dtype)

    def fault(right, steps):
        terms = terms_of(problem, step_of(result), steps)
        where = (*last_row(terms), -1)
        if dtype != "float32":
            where = tuple(index.item() for index in torch.unravel_index(terms.abs().argmax(), terms.shape))
        wrong = right.clone()
        wrong[where[:-1]] -= terms[where]
        return wrong

    assert_found(problem, {step_of(result): fault}, result)


@results
def test_accumulation_in_bfloat16(mode, result):
    """Of a float32 problem, the last sum alone."""
    problem = make(mode)

    def fault(right, steps):
        terms = terms_of(problem, step_of(result), steps)
        row = last_row(terms)
        total = torch.zeros((), dtype=torch.bfloat16)
        for term in terms[row]:
            total = (total + term).bfloat16()
        wrong = right.clone()
        wrong[row] += total - terms[row].sum()
        return wrong

    assert_found(problem, {step_of(result): fault}, result)


@results
def test_scale_of_the_last_element(mode, result):
    problem = make(mode)
    if result == "bias gradient" and mode == "batch-training":
        pytest.skip("it is zero, whatever its scale")

    def fault(right, steps):
        wrong = right.clone()
        wrong.view(-1)[-1] *= 1.01
        return wrong

    assert_found(problem, {step_of(result): fault}, result)


def without_delta(delta, steps):
    return delta * 0


def delta_without_the_last_key(delta, steps):
    """Of the last row of each head."""
    wrong = delta.clone()
    wrong[:, :, -1] -= steps["probs"][:, :, -1, -1:] * steps["grad_probs"][:, :, -1, -1:]
    return wrong


def sum_without_the_last_key(lse, steps):
    """The softmax's, of the last row of each head."""
    wrong = lse.clone()
    wrong[:, :, -1] = steps["scores"][:, :, -1, :-1].logsumexp(-1, keepdim=True)
    return wrong


def wrong_scale_of_the_last_score(scores, steps):
    wrong = scores.clone()
    wrong[..., -1, -1] *= 1.001
    return wrong


def map_in_float16(maps, steps):
    """As an operand of tensor cores."""
    return maps.half().double()


FORWARD = ("output", "query gradient", "key gradient", "value gradient", "theta gradient")
BACKWARD = ("query gradient", "key gradient")
# Which step, what happens to it, what is wrong then.
FAULTS = {
    "delta-left-out": ("delta", without_delta, BACKWARD),
    "delta-without-the-last-key": ("delta", delta_without_the_last_key, BACKWARD),
    "softmax-without-the-last-key": ("lse", sum_without_the_last_key, FORWARD),
    "scale-of-the-last-score": ("scores", wrong_scale_of_the_last_score, FORWARD),
    "softmax-in-float16": ("probs", map_in_float16, FORWARD),
    "normed-maps-in-float16": ("normed", map_in_float16, ("output", "value gradient")),
    "gradient-of-maps-in-float16": ("grad_mixed", map_in_float16, (*BACKWARD, "theta gradient")),
    "gradient-of-scores-in-float16": ("grad_scores", map_in_float16, BACKWARD),
}


@modes
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_within(mode, fault):
    """Of a float32 problem; every result that it reaches is wrong."""
    step, change, wrong = FAULTS[fault]
    problem = make(mode)
    for result in wrong:
        assert_found(problem, {step: change}, result)


@modes
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_delta_left_out_in_16_bits(mode, dtype):
    for result in BACKWARD:
        assert_found(make(mode, dtype), {"delta": without_delta}, result)
