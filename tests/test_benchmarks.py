"""The benchmarks measure what they say: peers equal the reference, wrong results are refused, the table is complete."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu_table, measure, peers
from benchmarks.measure import Oracle, Problem

ROOT = pathlib.Path(__file__).parent.parent
CPU = torch.device("cpu")
ALL = tuple(peers.EAGER)


def problem(norm, batch=3, dtype=torch.float64):
    return Problem(batch, 4, 7, 5, norm, dtype)


def in_float64(norm, batch=3):
    """Inputs and parameters of a problem, in float64."""
    parameters = measure.make_parameters(problem(norm, batch), CPU)
    return (
        measure.make_inputs(problem(norm, batch), CPU),
        peers.Parameters(*(None if p is None else p.double() for p in parameters)),
    )


@pytest.mark.parametrize("form", ["eager", "one-sample-at-a-time", "compiled"])
@pytest.mark.parametrize("norm", ALL)
def test_peers_equal_the_reference(norm, form):
    inputs, parameters = in_float64(norm)
    # Inductor would need a C++ compiler; what it compiles is what is traced here.
    peer = peers.by_name(form, norm, compiler="aot_eager")
    exact = measure.results(measure.operator(norm, "reference"), inputs, parameters)
    found = measure.results(peer, inputs, parameters)
    assert found.keys() == exact.keys() >= {"output", "query gradient", "theta gradient"}
    assert ("running_var" in found) == norm.startswith("batch")
    for name in exact:
        torch.testing.assert_close(
            found[name], exact[name], rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("norm", ALL)
def test_peers_write_statistics_in_training_only(norm):
    inputs, parameters = in_float64(norm)
    found = measure.results(peers.EAGER[norm], inputs, parameters)
    for name in ("running_mean", "running_var"):
        if name in found:
            assert torch.equal(found[name], getattr(parameters, name)) == (norm == "batch-eval")


def test_sdpa_is_attention_without_mixing():
    inputs, parameters = in_float64("none")
    identity = peers.Parameters(torch.eye(4, dtype=torch.float64))
    expected = peers.without_norm(*inputs[:3], identity)
    torch.testing.assert_close(peers.sdpa(*inputs[:3], parameters), expected)


def test_inputs_are_views_of_a_projection_and_repeat():
    inputs = measure.make_inputs(problem("layer", batch=6), CPU, distinct=2)
    assert inputs.query.stride() == inputs.value.stride() == (7 * 3 * 4 * 5, 5, 3 * 4 * 5, 1)
    assert inputs.grad.transpose(1, 2).is_contiguous()
    for tensor in inputs:
        assert torch.equal(tensor, tensor[:2].repeat(3, 1, 1, 1))
        assert not torch.equal(tensor[0], tensor[1])
    with pytest.raises(ValueError, match="distinct must divide the batch of 6, got 4"):
        measure.make_inputs(problem("layer", batch=6), CPU, distinct=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("norm", ALL)
def test_a_batch_of_repeated_samples_is_held_to_those_samples(norm, dtype):
    oracle = Oracle(problem(norm, batch=6, dtype=dtype), CPU, distinct=2)
    errors = oracle.check("ours", measure.operator(norm, "reference"), ours=True)
    assert errors.keys() == oracle.exact.keys()
    assert ("bias gradient" in errors) == (norm in ("none", "batch-eval"))
    oracle.check("a peer", peers.by_name("one-sample-at-a-time", norm))


def last_key_forgotten(query, key, value, parameters):
    return peers.second_form(query, key[:, :, :-1], value[:, :, :-1], parameters)


def last_row_unwritten(query, key, value, parameters):
    output = peers.second_form(query, key, value, parameters)
    last = torch.arange(output.shape[2])[:, None] == output.shape[2] - 1
    return output.masked_fill(last, float("nan"))


def last_sample_of_the_batch_wrong(query, key, value, parameters):
    return torch.cat((peers.second_form(query, key, value, parameters)[:-1], value[-1:]))


def theta_transposed(query, key, value, parameters):
    return peers.second_form(query, key, value, parameters._replace(theta=parameters.theta.mT))


def theta_not_differentiated(query, key, value, parameters):
    """The forward pass is right; the gradient of theta is not."""
    constant = parameters.theta.detach() + 0 * parameters.theta
    return peers.second_form(query, key, value, parameters._replace(theta=constant))


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (last_key_forgotten, "output"),
        (last_row_unwritten, "output is nan"),
        (last_sample_of_the_batch_wrong, "output"),
        (theta_transposed, "output"),
        (theta_not_differentiated, "theta gradient"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_results_are_refused(wrong, what):
    oracle = Oracle(problem("layer", batch=6, dtype=torch.bfloat16), CPU, distinct=2)
    with pytest.raises(measure.WrongResult, match=f"^mine: the error of the {what}"):
        oracle.check("mine", wrong, ours=True)


def test_wrong_statistics_are_refused():
    def biased(query, key, value, parameters):
        output = peers.official(query, key, value, parameters)
        # Behind autograd's back, which has saved the statistics.
        parameters.running_var.data.mul_(1.01)
        return output

    oracle = Oracle(problem("batch", batch=6, dtype=torch.float32), CPU, distinct=2)
    with pytest.raises(measure.WrongResult, match="^mine: the error of the running_var"):
        oracle.check("mine", biased, ours=True)


def test_failures_are_recorded():
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def wrong():
        raise measure.WrongResult("mine: too far")

    def broken():
        raise ValueError("first line\nsecond line")

    assert measure.attempt(lambda: 3) == (3, "ok")
    assert measure.attempt(out_of_memory) == (None, "out of memory")
    assert measure.attempt(wrong) == (None, "wrong: mine: too far")
    assert measure.attempt(broken) == (None, "failed: ValueError: first line")


def test_interleaved_calls_take_turns():
    order = []
    times = measure.time_interleaved(
        {name: lambda name=name: order.append(name) for name in "ab"}, seconds=0.0, rounds=3
    )
    assert order == ["a", "b"] * 4  # one round warms up
    assert all(ms >= 0 for ms in times.values())


def test_operations_and_traffic():
    case = Problem(2, 3, 5, 7, "layer", torch.bfloat16)
    products, mixing = 2 * (2 * 2 * 3 * 5 * 5 * 7), 2 * 2 * 3 * 3 * 5 * 5
    assert case.flops(backward=False) == products + mixing
    assert case.flops(backward=True) == 3 * (products + mixing)
    assert case.traffic(backward=False) == 4 * 2 * 3 * 5 * 7 * 2
    assert case.floor_ms(False, flops_per_s=products + mixing, bytes_per_s=float("inf")) == 1e3


def run_table(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_table", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.extension
def test_table_on_a_cpu(tmp_path):
    finished = run_table("--cpu-smoke", "--out", str(tmp_path / "new"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads((tmp_path / "new" / "gpu_table.json").read_text())
    assert report.keys() == {"machine", "settings", "ceilings", "cases", "launches"}
    assert report["machine"].keys() >= {"device", "reattn", "torch", "triton", "commit", "modified", "date"}
    assert report["settings"]["backend"] == "cpu"
    assert [(case["norm"], case["direction"]) for case in report["cases"]] == [
        (norm, direction) for norm in ("batch", "layer") for direction in ("forward", "forward+backward")
    ]
    for case in report["cases"]:
        assert case["contenders"].keys() == {"fused", "cuda", "eager", "compiled", "sdpa"}
        assert case["contenders"].pop("cuda")["status"].startswith("not measured: ")
        for name, entry in case["contenders"].items():
            assert entry["status"] == "ok", (name, entry)
            assert entry["ms"] > 0 and entry["tflops"] > 0
            assert ("errors" in entry) == (name != "sdpa")
    assert [launch["batch"] for launch in report["launches"]] == [1, 1]
    table = (tmp_path / "new" / "gpu_table.txt").read_text()
    assert table in finished.stdout
    assert not list((tmp_path / "new").glob("*.partial"))


def test_table_says_what_is_missing_or_wrong():
    run = gpu_table.Run(gpu_table.SMOKE(CPU, "reference"), seconds=0.0, save=lambda report: None)
    run.without_cuda = "no GPU"
    run.measure()
    lines = list(gpu_table.table(run.report))
    assert sum(gpu_table.NO_TIME in line for line in lines) == 2 * 2 * 4 + 2 * 3
    assert gpu_table.faults(run.report) == []

    statuses = {
        "fused": "wrong: fused: the error",
        "cuda": "not measured: no GPU",
        "eager": "out of memory",
        "compiled": "failed: E: m",
        "sdpa": "ok",
    }
    run.report["cases"][0]["contenders"] = {name: {"status": status} for name, status in statuses.items()}
    run.report["cases"][0]["contenders"]["sdpa"]["ms"] = 2.0
    lines = list(gpu_table.table(run.report))
    assert any(line.split("|")[1].split() == ["WRONG", "-", "OOM", "failed", "2.000"] for line in lines if "|" in line)
    assert any("forward eager: out of memory" in line for line in lines)
    assert gpu_table.faults(run.report) == ["wrong: fused: the error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_table_needs_a_gpu(tmp_path):
    finished = run_table("--out", str(tmp_path))
    assert finished.returncode == 2
    assert "needs a CUDA device, and torch" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.extension
def test_interpreted_kernels_are_never_timed(monkeypatch):
    from reattn.backends import triton

    monkeypatch.setattr(triton, "INTERPRETED", True)
    assert measure.default_backend(CPU) == "cpu"
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        measure.default_backend(torch.device("cuda"))


@pytest.mark.gpu
def test_times_and_memory_on_a_gpu(device):
    small, large = (torch.randn(size, size, device=device) for size in (512, 4096))
    small_ms, large_ms = (measure.time_cuda([lambda m=m: m @ m], samples=5) for m in (small, large))
    assert 0 < small_ms < large_ms
    replayed_ms = measure.time_graph([lambda: large @ large] * 3, samples=5)
    assert 0.5 < replayed_ms / large_ms < 2.0
    assert large.nbytes <= measure.peak_memory(lambda: large @ large, device) < 3 * large.nbytes
