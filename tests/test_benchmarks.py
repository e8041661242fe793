"""The benchmarks measure what they say: peers equal the reference, wrong results are refused, results complete."""

import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
from unittest import mock

import pytest
import torch

from benchmarks import compare, cpu_stages, machine, measure, peers, test_model, test_module, test_scaling, tune
from benchmarks.measure import Oracle, Problem
from reattn.kernels import configs

ROOT = pathlib.Path(__file__).parent.parent
CPU = torch.device("cpu")
ALL = tuple(peers.EAGER)


def problem(norm, batch=3, dtype=torch.float64, mask=None):
    return Problem(batch, 4, 7, 5, norm, dtype, mask)


def in_float64(norm, batch=3, mask=None):
    """Inputs and parameters of a problem, in float64."""
    case = problem(norm, batch, mask=mask)
    return measure.make_inputs(case, CPU), measure.make_parameters(case, CPU).double()


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


@pytest.mark.parametrize("mask", measure.MASKS)
@pytest.mark.parametrize("norm", ALL)
def test_masked_peers_equal_the_reference(norm, mask):
    inputs, parameters = in_float64(norm, batch=4, mask=mask)
    exact = measure.results(measure.operator(norm, "reference"), inputs, parameters)
    found = measure.results(peers.EAGER[norm], inputs, parameters)
    assert ("attn_mask gradient" in found) == (mask == "bias")
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    # It is the mask that makes the difference, and the contender without it leaves it out.
    bare = measure.results(measure.operator(norm, "reference"), *in_float64(norm, batch=4))
    assert not torch.allclose(bare["output"], exact["output"])
    without = peers.without_mask(measure.operator(norm, "reference"))
    assert torch.equal(measure.results(without, inputs, parameters, backward=False)["output"], bare["output"])


@pytest.mark.parametrize("mask", measure.MASKS)
def test_masks_of_a_batch_of_repeated_samples(mask):
    """They repeat as well; ours and peers are held to the same statistics, a contender without the mask is refused."""
    case = Problem(8, 4, 17, 8, "batch", torch.float32, mask)
    oracle = Oracle(case, CPU, distinct=measure.distinct_samples(case))
    ours = measure.operator("batch", "reference")
    assert oracle.check("ours", ours, ours=True).keys() == oracle.exact.keys()
    oracle.check("eager", peers.EAGER["batch"])
    with pytest.raises(measure.WrongResult, match="^mine: the error of the output is"):
        oracle.check("mine", peers.without_mask(ours), ours=True, backward=False)


@pytest.mark.parametrize("mask", measure.MASKS)
def test_sdpa_has_the_same_mask(mask):
    inputs, parameters = in_float64("none", batch=4, mask=mask)
    unmixed = parameters._replace(theta=torch.eye(4, dtype=torch.float64), bias=None)
    torch.testing.assert_close(peers.sdpa(*inputs[:3], parameters), peers.without_norm(*inputs[:3], unmixed))


def test_padding_is_of_60_to_100_percent():
    case = Problem(8, 4, 50, 8, "none", torch.float32, "padding")
    mask = measure.make_parameters(case, CPU).attn_mask
    assert mask.shape == (8, 1, 1, 50) and mask.sum((1, 2, 3)).tolist() == 2 * [30, 36, 43, 50]


def test_talking_heads_are_those_of_the_module():
    """Also where they are mixed before the softmax: held to float64 as the others are."""
    case = test_module.replace(test_module.QUICK, norm=test_module.TALKING_HEADS)
    reference, eager = test_module.make_eager(case)
    oracle = test_module.Oracle(reference, torch.randn(2, 50, 32), torch.randn(2, 50, 32), case.dtype)
    for name in ("reference", "eager"):
        oracle.check(name, test_module.build(name, case, reference, eager))
    assert case.flops(False) == test_module.QUICK.flops(False) + 2 * 4 * 2 * 4 * 50**2


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


def test_wrong_modules_and_models_are_refused():
    torch.manual_seed(0)
    case = test_module.QUICK
    reference, eager = test_module.make_eager(case)
    x, grad = torch.randn(2, 50, 32), torch.randn(2, 50, 32)
    oracle = test_module.Oracle(reference, x, grad, case.dtype)
    module = test_module.build("eager", case, reference, eager)
    oracle.check("eager", module)
    module.theta.data = module.theta.data.mT.contiguous()
    with pytest.raises(measure.WrongResult, match="^eager: the error of the output is"):
        oracle.check("eager", module)

    model_oracle = test_model.Oracle(test_model.build("reference", "deepvit_16b", CPU, True), torch.randn(2, 3, 64, 64))
    model = test_model.build("eager", "deepvit_16b", CPU, True)
    model_oracle.check("eager", model)
    theta = model.blocks[0].attn.module.theta
    theta.data = theta.data.mT.contiguous()
    with pytest.raises(measure.WrongResult, match="^eager: the error of the logits is"):
        model_oracle.check("eager", model)


def test_large_sums_are_no_fault():
    """The sum of all outputs is beyond float16, each of them is not."""
    oracle = Oracle(Problem(512, 4, 20, 64, "layer", torch.float16), CPU, distinct=2)
    ours = measure.operator("layer", "reference")
    output = measure.results(ours, oracle.inputs, oracle.parameters, backward=False)["output"]
    assert output.isfinite().all() and not output.sum().isfinite()
    oracle.check("ours", ours, ours=True, backward=False)


def test_without_a_backward_pass_the_output_alone_is_held():
    oracle = Oracle(problem("layer", batch=6, dtype=torch.float32), CPU, distinct=2)
    assert oracle.check("mine", theta_not_differentiated, ours=True, backward=False).keys() == {"output"}


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


def test_long_sequences_are_held_to_some_rows(monkeypatch):
    """Every result is still compared: each of these is wrong in one of them."""
    monkeypatch.setattr(measure, "_WHOLE_SEQLEN", 100)
    long = Problem(2, 4, 300, 5, "layer", torch.float32)
    oracle = Oracle(long, CPU, distinct=1)
    assert 60 < len(oracle.rows) < 100
    oracle.check("a peer", peers.second_form)

    def wrong(**factors):
        def peer(query, key, value, parameters):
            tensors = {"query": query, "key": key, "value": value}
            for name, factor in factors.items():  # the value is kept, the gradient is not
                tensor = tensors[name]
                tensors[name] = factor * tensor + (1 - factor) * tensor.detach()
            return peers.second_form(**tensors, parameters=parameters)

        return peer

    for name in ("query", "key", "value"):
        with pytest.raises(measure.WrongResult, match=f"the error of the {name} gradient"):
            oracle.check("mine", wrong(**{name: 1.01}), ours=True)
    with pytest.raises(measure.WrongResult, match="the error of the output is nan"):
        oracle.check("mine", last_row_unwritten, ours=True)
    with pytest.raises(measure.WrongResult, match="the error of the output"):
        oracle.check("mine", theta_transposed, ours=True)


def test_failures_are_recorded():
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def out_of_cpu_memory():
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    def wrong():
        raise measure.WrongResult("mine: too far")

    def broken():
        raise ValueError("first line\nsecond line")

    assert measure.attempt(lambda: 3) == (3, "ok")
    assert measure.attempt(out_of_memory) == measure.attempt(out_of_cpu_memory) == (None, "out of memory")
    assert measure.attempt(wrong) == (None, "wrong: mine: too far")
    assert measure.attempt(broken) == (None, "failed: ValueError: first line")


def test_contenders_take_turns():
    order = []

    def fails():
        raise ValueError("never")

    def fails_later():
        order.append("later")
        if order.count("later") == 3:
            raise torch.OutOfMemoryError

    calls = {name: [lambda name=name, i=i: order.append(name + i) for i in "12"] for name in "ab"}
    turns, faults = measure.time_in_turns({**calls, "fails": [fails], "later": [fails_later]}, CPU, 0.0, rounds=3)
    assert order == ["a1", "b1", "later", "a2", "b2", "later", "a1", "b1", "later", "a2", "b2"]
    assert {name: len(series) for name, series in turns.items()} == {"a": 3, "b": 3}
    assert faults == {"fails": "failed: ValueError: never", "later": "out of memory"}
    assert all(ms >= 0 for series in turns.values() for ms in series)


def test_operations_and_traffic():
    case = Problem(2, 3, 5, 7, "layer", torch.bfloat16)
    products, mixing = 2 * (2 * 2 * 3 * 5 * 5 * 7), 2 * 2 * 3 * 3 * 5 * 5
    assert case.flops(backward=False) == products + mixing
    assert case.flops(backward=True) == 3 * (products + mixing)
    assert case.traffic(backward=False) == 4 * 2 * 3 * 5 * 7 * 2
    assert case.floor_ms(False, flops_per_s=products + mixing, bytes_per_s=float("inf")) == 1e3
    assert case.floor_ms(True, flops_per_s=float("inf"), bytes_per_s=case.traffic(backward=True)) == 1e3


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.extension
def test_peak_memory_on_a_cpu():
    def call():
        return torch.ones(25 * 2**20).add(1)  # 100 MB twice

    call()
    assert 190 < machine.peak_memory(call, CPU) / 2**20 < 210
    assert machine.peak_memory(lambda: None, CPU) < 2**20


@pytest.mark.skipif(machine.free_memory() is None, reason="needs Linux")
def test_what_does_not_fit_fails_instead_of_being_killed():
    too_much = machine.free_memory()
    with machine.memory_limit(CPU):
        assert measure.attempt(lambda: torch.empty(too_much, dtype=torch.uint8)) == (None, "out of memory")
    torch.empty(2**20, dtype=torch.uint8)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """The whole suite, in small."""
    path = tmp_path_factory.mktemp("quick") / "quick.json"
    finished = run_benchmarks("benchmarks", "--quick", f"--benchmark-json={path}")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(path.read_text())


def run_benchmarks(*arguments):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "REATTN_BACK", "PYTEST_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--benchmark-only", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.extension
@pytest.mark.slow
def test_results_of_a_quick_run(quick_run):
    told = quick_run["machine_info"]["reattn"]
    assert told.keys() >= {"device", "reattn", "torch", "triton", "commit", "modified", "date", "threads"}
    assert min(told["ceilings"]["flops_per_s"].values()) > 0 and told["ceilings"]["bytes_per_s"] > 0
    entries = quick_run["benchmarks"]
    assert {entry["extra_info"]["kind"] for entry in entries} == {"operator", "masks", "module", "model", "scaling"}
    for entry in entries:
        facts = entry["extra_info"]
        assert facts["faults"] == {}
        # What pytest-benchmark tabulates is what was measured in turns.
        assert entry["stats"]["median"] == pytest.approx(1e-3 * facts["ms"])
        assert facts["all_ms"][facts["contender"]] == facts["ms"] and facts["peak_bytes"] >= 0
        assert facts["ours"] == (facts["contender"] in compare.OURS)
        if facts["kind"] == "model":
            assert facts["images_per_s"] == pytest.approx(1e3 * facts["batch"] / facts["ms"])
            continue
        assert facts["ratio_to_sdpa"] == pytest.approx(facts["ms"] / facts["all_ms"]["sdpa"])
        floor = max(
            facts["flops"] / told["ceilings"]["flops_per_s"][facts["dtype"]],
            facts["traffic_bytes"] / told["ceilings"]["bytes_per_s"],
        )
        # The ceilings were measured once, before.
        assert facts["share_of_roofline"] == pytest.approx(1e3 * floor / facts["ms"])
        others = ("cpu", "cpu unmasked", "sdpa", "reference")
        peers_ms = [ms for name, ms in facts["all_ms"].items() if name not in others]
        if peers_ms:
            assert facts["ratio_to_best_peer"] == pytest.approx(facts["ms"] / min(peers_ms))
    masks = [entry["extra_info"] for entry in entries if entry["extra_info"]["kind"] == "masks"]
    assert {facts["mask"] for facts in masks} == set(measure.MASKS)
    for facts in masks:
        if facts["ours"]:
            assert facts["ratio_to_unmasked"] == pytest.approx(facts["ms"] / facts["all_ms"]["cpu unmasked"])
    operator = [entry["extra_info"] for entry in entries if entry["extra_info"]["kind"] == "operator"]
    assert {(facts["norm"], facts["direction"]) for facts in operator} == {
        (norm, direction) for norm in ALL for direction in ("forward", "forward+backward")
    }


def test_a_wrong_result_of_ours_fails_a_peers_is_skipped():
    comparison = object.__new__(compare.Comparison)
    comparison.faults = {"cpu": "wrong: cpu: too far", "eager": "out of memory"}
    with pytest.raises(pytest.fail.Exception, match="too far"):
        comparison.report(None, "cpu", "group", {})
    with pytest.raises(pytest.skip.Exception, match="out of memory"):
        comparison.report(None, "eager", "group", {})


def test_ratios_are_of_turns():
    """The second contender was slowed in the first two turns together with the first one."""
    comparison = object.__new__(compare.Comparison)
    comparison.turns = {"cpu": [4.0, 4.0, 2.0, 2.0, 2.0], "sdpa": [2.0, 2.0, 1.0, 1.0, 0.9]}
    assert comparison.ratio("cpu", "sdpa") == 2.0
    assert comparison.ratio("cpu", "eager") is None and comparison.ratio("cpu", None) is None


@pytest.mark.extension
def test_scaling_leaves_out_what_would_take_too_long(monkeypatch):
    monkeypatch.setattr(test_scaling, "TOO_LONG_MS", 0.0)
    test_scaling.compare.cache_clear()
    names = ("eager", "sdpa")
    assert test_scaling.compare(64, "forward", names, CPU, True).faults == {}
    later = test_scaling.compare(256, "forward", names, CPU, True)
    assert later.ms == {} and later.faults.keys() == set(names)
    assert all(fault.startswith("not measured: 64 took") for fault in later.faults.values())
    test_scaling.compare.cache_clear()


def test_tuning_puts_one_tile_into_the_table():
    job = tune.jobs()[0]
    key = ("forward", 90, 2, 12, 32)
    tile, before = configs.Tile(16, 64, 4, 3), {kernel: configs.tile(kernel, *key[1:]) for kernel in tune.WHERE}
    with tune.in_table(job, tile):
        assert {kernel: configs.tile(kernel, *key[1:]) for kernel in tune.WHERE} == {**before, "forward": tile}
        assert configs.tile("forward", 90, 4, 12, 32) != tile
    assert {kernel: configs.tile(kernel, *key[1:]) for kernel in tune.WHERE} == before


def test_tuning_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "machine_info", lambda device: {"device": "a card"})
    todo, path, measured = tune.jobs()[:3], tmp_path / "tuning.json", []

    def measure_one(job, device):
        measured.append(job)
        tiles = job.candidates()
        return {"ms": {tune._key(tile): 2.0 + i for i, tile in enumerate(tiles[1:])}, "faults": {"x": "wrong: x"}}

    assert tune.run(todo, path, -1.0, CPU, measure_one)["jobs"] == {} and not measured
    tune.run(todo[:2], path, 60.0, CPU, measure_one)
    report = tune.run(todo, path, 60.0, CPU, measure_one)
    assert measured == todo and list(report["jobs"]) == [job.name for job in todo]
    assert json.loads(path.read_text()) == report
    monkeypatch.setattr(tune, "machine_info", lambda device: {"device": "another card"})
    with pytest.raises(SystemExit, match="is of a a card, this is a another card"):
        tune.run(todo, path, 60.0, CPU, measure_one)
    best = tune._key(todo[0].candidates()[1])
    assert capsys.readouterr().out.startswith(f"{todo[0].name}, forward: Tile({best}) 2.0000 ms, the table's Tile(")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_tuning_needs_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--out", str(tmp_path)])
    assert "needs a CUDA device, and torch" in capsys.readouterr().err


def test_interpreted_kernels_are_never_timed(monkeypatch):
    monkeypatch.setattr("reattn.backends.triton._interpreted", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("reattn.backends.cuda.unavailable", lambda device: ["no CUDA device"])
    with pytest.raises(RuntimeError, match="triton: TRITON_INTERPRET is set"):
        measure.fused_backends(torch.device("cuda"))


@pytest.mark.gpu
def test_times_and_memory_on_a_gpu(device):
    small, large = (torch.randn(size, size, device=device) for size in (512, 4096))
    turns, _ = measure.time_in_turns({"small": [lambda: small @ small], "large": [lambda: large @ large]}, device)
    small_ms, large_ms = (statistics.median(turns[name]) for name in ("small", "large"))
    assert 0 < small_ms < large_ms
    assert large.nbytes <= machine.peak_memory(lambda: large @ large, device) < 3 * large.nbytes
    # Many small products wait for the host, one by one, but not in a graph.
    assert 0 < measure.graph_ms([lambda: small @ small] * 5, device) < measure.graph_ms([lambda: large @ large], device)
    assert 0 < measure.host_us(lambda: large @ large, device) < 1e3 * large_ms


def test_a_graph_is_of_all_calls_and_says_what_it_cannot_hold(monkeypatch):
    told = []

    class Graph:
        def capture_begin(self):
            told.append("begin")

        def capture_end(self):
            told.append("end")
            if "fails" in told:
                raise RuntimeError("a previous error")

        def replay(self):
            told.append("replay")

    def fails():
        told.append("fails")
        raise ValueError("not while a graph is captured")

    stand_in = mock.MagicMock(CUDAGraph=Graph)
    monkeypatch.setattr(torch, "cuda", stand_in)
    measure.captured([lambda: told.append(1), lambda: told.append(2)])()
    assert told == ["begin", 1, 2, "end", "replay"]
    with pytest.raises(ValueError, match="not while"):
        measure.captured([fails])
    assert told[5:] == ["begin", "fails", "end"]


def test_without_a_gpu_there_is_neither_a_graph_nor_a_host():
    assert measure.graph_ms([lambda: None], CPU) is None and measure.host_us(lambda: None, CPU) is None


@pytest.mark.extension
def test_stages_of_the_cpu_kernels(monkeypatch, capfd):
    """Every stage is timed, and those of a pass are all of it; more threads take no longer."""
    monkeypatch.setenv("REATTN_CPU_ISA", "portable")
    options = ["--shape", "2", "3", "60", "16", "--norm", "batch", "--repetitions", "3"]
    monkeypatch.setattr(sys, "argv", ["cpu_stages", *options])
    cpu_stages.main()
    passes = capfd.readouterr().out.split("\nforward\n")[1].split("\nbackward\n")
    for lines, last in zip(passes, ("finish the output", "store gradients of keys, values"), strict=True):
        stages = {name: float(ms) for name, ms in re.findall(r"^  (\S.*?) {2,}(\d+\.\d+)", lines, re.MULTILINE)}
        threads = [stages.pop(name) for name in list(stages) if name.startswith("by ")]
        assert stages.pop("all") == pytest.approx(sum(stages.values()), abs=0.01 * len(stages))
        assert {"scores", last} <= set(stages)
        assert len(threads) == 3 and threads[0] >= threads[-1] > 0
