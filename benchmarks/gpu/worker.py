"""A process that does one job after the other: see benchmarks/gpu/pool.py for what it is asked and answers.

``python -m benchmarks.gpu.worker [--emulated]`` reads jobs from its standard input; ``--job JSON`` does one and ends,
for programs that watch a process. ``--emulated``: on the CPU, with what stands for a GPU in the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pathlib
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TextIO

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What a kernel that ends at all needs at most, its float64 reference included.
RUN_SECONDS = 20.0
EMULATED = False
# By kernel what shows whether it was right.
RESULTS = {
    "forward": ("output",),
    "finish": ("output", "running_mean", "running_var"),
    "grad_maps": ("query gradient", "value gradient"),
    "grad_query": ("query gradient",),
    "grad_key": ("key gradient", "value gradient"),
    "backward": ("query gradient",),
    "products": ("key gradient", "value gradient"),
    "unfold": ("theta gradient", "bias gradient", "norm_weight gradient", "norm_bias gradient"),
}


class Answers:
    """What a job tells whoever asked for it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.step = ""

    def say(self, **message: Any) -> None:
        self._stream.write(json.dumps(message) + "\n")
        self._stream.flush()

    def begin(self, step: str, seconds: float = RUN_SECONDS, optional: bool = False) -> None:
        """Before what may hang; ``optional``: the job can be tried again without it."""
        self.step = step
        self.say(begin=step, seconds=20 * seconds if EMULATED else seconds, optional=optional)


Handler = Callable[..., dict[str, Any]]
HANDLERS: dict[str, Handler] = {}


def handler(function: Handler) -> Handler:
    """A kind of job, by the function's name: called with the answers and what the request holds."""
    HANDLERS[function.__name__] = function
    return function


def first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:600]


def do(answers: Answers, request: dict[str, Any]) -> dict[str, Any]:
    """The result of a job: that of its handler, or what went wrong."""
    arguments = {name: value for name, value in request.items() if name != "kind"}
    answers.step = ""
    try:
        return {"status": "ok", **HANDLERS[request["kind"]](answers, **arguments)}
    except AssertionError as error:  # as parity says it
        return {"status": "wrong", "error": str(error).strip()[:2000]}
    except Exception as error:
        import torch

        traceback.print_exc()
        where = f"in {answers.step}: " if answers.step else ""
        result = {"status": "failed", "error": where + first_line(error)}
        # After a fault of a kernel nothing works any more in this process.
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
            except Exception as fault:
                result |= {"error": first_line(fault), "fatal": True}
        return result


def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def able() -> tuple[str, ...]:
    """The fused backends of a GPU that can run, or that can be emulated."""
    from reattn.backends import BACKENDS

    return tuple(name for name in ("triton", "cuda") if not BACKENDS[name].unavailable(device()))


# Launches, one by one


@contextlib.contextmanager
def hooked(backend: str, hook: Callable[[str, Callable[[], Any]], Any]) -> Iterator[None]:
    """Every launch of a backend goes through ``hook(kernel, launch)``."""
    from unittest import mock

    from reattn.backends import cuda_driver, triton

    if backend == "triton":
        run = triton._run

        def through(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
            name = getattr(kernel, "fn", kernel).__name__.removesuffix("_kernel")
            hook(name, functools.partial(run, kernel, grid, *args, **constants))

        with mock.patch.object(triton, "_run", through):
            yield
    else:
        run = cuda_driver.launch

        def through(loaded: Any, *how: Any) -> None:
            *where, stream, params, tensors = how
            kept = type(params).from_buffer_copy(params)  # the next launch may be given the same ones, changed

            def launch() -> None:
                run(loaded, *where, current_stream(stream), kept, tensors)

            hook(loaded.kernel.function, launch)

        with mock.patch.object(cuda_driver, "launch", through):
            yield


def current_stream(otherwise: int) -> int:
    """A launch that is made again may be on another stream, one that is captured."""
    import torch

    return torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else otherwise


@contextlib.contextmanager
def compiled_only(backend: str) -> Iterator[None]:
    """Kernels are compiled, and kept on disk, but not launched: what is computed means nothing."""

    def compile_it(name: str, launch: Any) -> None:
        if backend == "triton":
            kernel, grid, tile, *args = launch.args
            kernel.warmup(*args, grid=grid, num_warps=tile.num_warps, num_stages=tile.num_stages, **launch.keywords)

    with hooked(backend, compile_it):
        yield


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Correctness, by tests/parity.py


def drawn(like: Any, *shape: int) -> Any:
    """Random numbers, the same on every card."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(like.device, like.dtype)


def with_pre_theta(problem: Any, make: Any) -> Any:
    theta = problem["theta"]
    heads = theta.shape[0]
    return problem.with_tensors(pre_theta=drawn(theta, heads, heads) * heads**-0.5, pre_bias=drawn(theta, heads))


def with_padding(problem: Any, make: Any) -> Any:
    """The second sample has two thirds of the keys."""
    import torch

    batch, _, seqlen, _ = problem["key"].shape
    lengths = torch.tensor([seqlen, 2 * seqlen // 3])[:batch, None, None, None]
    return problem.with_tensors(attn_mask=(torch.arange(seqlen) < lengths).to(problem["key"].device))


def with_bias(problem: Any, make: Any) -> Any:
    _, heads, seqlen, _ = problem["key"].shape
    return problem.with_tensors(attn_mask=drawn(problem["key"], heads, seqlen, seqlen))


def with_heads_out(problem: Any, make: Any) -> Any:
    """Two heads more after mixing."""
    heads = problem["theta"].shape[0]
    wide = make(heads=heads + 2)
    after = {name: tensor for name, tensor in wide.tensors.items() if name not in ("query", "key", "theta")}
    theta = drawn(problem["theta"], heads, heads + 2) * heads**-0.5
    return replace(problem.with_tensors(**after, theta=theta), grad=wide.grad)


# What a problem is given more of than make_problem does; "causal" is an option.
FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "pre_theta": with_pre_theta,
    "padding": with_padding,
    "bias": with_bias,
    "causal": lambda problem, make: problem,
    "heads_out": with_heads_out,
}


def make_problem(
    mode: str, heads: int, head_dim: int, seqlen: int, dtype: str, dropout_p: float = 0.0, form: str = ""
) -> Any:
    import parity
    import torch

    options = {"dropout_p": dropout_p} if dropout_p else {}
    options |= {"is_causal": True} if form == "causal" else {}
    sizes = {"head_dim": head_dim, "seqlen": seqlen, "batch": 2, "dtype": getattr(torch, dtype), "device": device()}
    problem = parity.make_problem(mode, heads=heads, **sizes, seed=0, **options)
    for name in form.split():
        problem = FORMS[name](problem, functools.partial(parity.make_problem, mode, **sizes, seed=1))
    # As in benchmarks/measure.py: the sum of all rows that is the bias's gradient overflows in eager float16 otherwise.
    return replace(problem, grad=problem.grad / 32) if dtype == "float16" else problem


@handler
def parity(answers: Answers, backend: str, dropout_p: float = 0.0, without: Any = (), **sizes: Any) -> dict[str, Any]:
    """The operator on one problem: output, every gradient, running statistics."""
    import parity as measure

    problem = make_problem(dropout_p=dropout_p, **sizes)

    def mask() -> Any:
        given = {name: sizes[name] for name in ("heads", "head_dim", "seqlen")}
        return measure.drawn_mask(backend, **given, seqlen_k=sizes["seqlen"], dropout_p=dropout_p)

    answers.begin("compiling")
    with compiled_only(backend):
        measure.compute(problem, backend)
        if dropout_p:
            mask()
    answers.begin("running")
    if dropout_p:
        problem = replace(problem, keep=mask())
    return {"errors": measure.assert_parity(problem, backend)}


@handler
def kernels(answers: Answers, backend: str, without: Any = (), **sizes: Any) -> dict[str, Any]:
    """Every launch of a training step by itself: says which one it is in, and waits for its end. What depends on a
    kernel that is left out is not compared."""
    import parity as measure

    problem = make_problem(**sizes)
    answers.begin("compiling")
    with compiled_only(backend):
        measure.compute(problem, backend)
    ran: list[str] = []

    def one_by_one(name: str, launch: Callable[[], Any]) -> None:
        if name in without:
            return
        answers.begin(name, optional=True)
        launch()
        synchronize()
        ran.append(name)

    def run(problem: Any, backend: str) -> dict[str, Any]:
        with hooked(backend, one_by_one):
            found = measure.compute(problem, backend)
        answers.begin("comparing")
        return found

    try:
        if without:
            run(problem, backend)
        else:
            measure.assert_parity(problem, backend, run=run)
    except AssertionError as error:
        lines = str(error).strip().splitlines()
        status = {
            name: "wrong" if any(line.startswith(RESULTS.get(name, ("-",))) for line in lines) else "ok" for name in ran
        }
        return {"status": "wrong", "error": "\n".join(lines)[:2000], "kernels": status}
    return {"kernels": dict.fromkeys(ran, "ran" if without else "ok")}


# Compiling ahead of what is timed


def as_problem(shape: Any, norm: str, dtype: str = "bfloat16") -> Any:
    import torch

    from benchmarks.measure import Problem

    return Problem(*shape, norm, getattr(torch, dtype))


@handler
def warm(answers: Answers, shape: Any, norm: str, backends: Any = None, without: Any = ()) -> dict[str, Any]:
    """Our kernels of a problem that will be timed."""
    from benchmarks import measure

    problem = as_problem(shape, norm)
    for backend in backends or able():
        call = operator_call(measure.operator(norm, backend), problem, True)
        with compiled_only(backend):
            call()
    return {}


@handler
def warm_step(answers: Answers, backend: str, without: Any = (), **sizes: Any) -> dict[str, Any]:
    """Those of a problem that is held to another, or watched; also where copies of its tensors lie otherwise."""
    import parity as measure

    problem, step = training_step(backend, sizes)
    copies = {name: None if tensor is None else tensor.clone() for name, tensor in problem.tensors.items()}
    with compiled_only(backend):
        step()
        measure.compute(problem.with_tensors(**copies), backend)
    return {}


@handler
def warm_compiled(
    answers: Answers, shape: Any, norm: str, backward: bool, compiler: str, without: Any = ()
) -> dict[str, Any]:
    """torch.compile of the eager form, whose results Inductor keeps on disk."""
    from benchmarks import peers

    operator_call(peers.by_name("compiled", norm, compiler), as_problem(shape, norm), backward)()
    return {}


def operator_call(peer: Any, problem: Any, backward: bool) -> Callable[[], object]:
    from benchmarks import measure

    where = device()
    inputs = measure.make_inputs(problem, where, 1)
    return measure.make_call(peer, inputs, measure.make_parameters(problem, where), backward)


# Timing


@handler
def machine(answers: Answers, without: Any = ()) -> dict[str, Any]:
    """What the report has to know of the machine."""
    from benchmarks import machine as told

    if EMULATED:
        return {"machine": {"device": "emulated"}, "able": able()}
    found = told.machine_info(device())
    # A copy of the tree has no history: who made it can tell.
    if commit := os.environ.get("REATTN_COMMIT"):
        found |= {"commit": commit, "modified": False}
    return {"machine": {**found, "ceilings": told.ceilings(device())}, "able": able()}


def recorded(backend: str, problem: Any, inputs: Any, parameters: Any) -> tuple[dict[str, list[Any]], Any]:
    """The launches of a training step by kernel, to be repeated; and the tensors that they need. A backward pass whose
    maps do not fit the workspace launches its kernels for one part of it after the other."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from benchmarks.peers import EPS, MOMENTUM
    from reattn.backends import BACKENDS
    from reattn.backends.contract import Inputs
    from reattn.problem import Problem

    kept: list[Any] = []

    class Keep(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            kept.append(result)
            return result

    launches: dict[str, list[Any]] = {}

    def record(name: str, launch: Callable[[], Any]) -> None:
        launches.setdefault(name, []).append(launch)
        launch()

    training = not problem.norm.endswith("-eval")
    norm = None if problem.norm == "none" else problem.norm.removesuffix("-eval")
    given = Inputs(*inputs[:3], **{name: each.clone() for name, each in parameters.tensors().items()})
    options = {"norm": norm, "training": training and norm == "batch", "synchronised": False, "dropout_p": 0.0}
    call = Problem.of(
        inputs.query, **options, scale=problem.head_dim**-0.5, output_scale=1.0, eps=EPS, momentum=MOMENTUM
    )
    with torch.no_grad(), Keep(), hooked(backend, record):
        outputs = BACKENDS[backend].forward(call, given)
        gradients = BACKENDS[backend].backward(call, inputs.grad, given, outputs, None)
    return launches, (kept, inputs, given, outputs, gradients)


@handler
def kernel_times(
    answers: Answers, shape: Any, norm: str, backends: Any, seconds: float = 0.0, without: Any = ()
) -> dict[str, Any]:
    """Milliseconds of each kernel by itself, all its launches of a training step together, with query, key and value
    not in the L2 cache; from a CUDA graph, as a launch by the host may take longer than a small kernel."""
    from benchmarks import measure

    problem, where = as_problem(shape, norm), device()
    parameters, sets = measure.make_parameters(problem, where), measure.rotating_inputs(problem, where)
    calls: dict[str, list[Any]] = {}
    counts: dict[str, int] = {}
    kept = []
    for backend in backends:
        if backend in without:
            continue
        answers.begin(backend, BEGIN_TIMING, optional=True)
        for inputs in sets:
            launches, tensors = recorded(backend, problem, inputs, parameters)
            kept.append(tensors)
            for kernel, mine in launches.items():
                calls.setdefault(f"{backend} {kernel}", []).append(functools.partial(one_by_one, mine))
                counts[f"{backend} {kernel}"] = len(mine)
        synchronize()
    answers.begin("capturing", BEGIN_TIMING)
    by_host: dict[str, str] = {}
    for name, each in calls.items():
        graph, why = measure.attempt(functools.partial(measure.captured, each)) if where.type == "cuda" else (None, "")
        if graph is None:
            by_host[name] = why
        else:
            calls[name] = [graph]
    answers.begin("timing", 2 * BEGIN_TIMING)
    turns, faults = measure.time_in_turns(calls, where, seconds, rounds=3)
    repeats = {name: 1 if name in by_host else len(sets) for name in turns}
    ms = {name: statistics.median(series) / repeats[name] for name, series in turns.items()}
    return {"ms": ms, "launches": counts, "by_host": by_host, "faults": faults}


def one_by_one(launches: Any) -> None:
    for launch in launches:
        launch()


# Compiling what was not compiled ahead, and a float64 reference.
BEGIN_TIMING = 30.0


def entries(comparison: Any, kind: str, name: str, facts: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Every contender of a comparison as benchmarks/report.py reads it."""
    found = []
    for contender, turns in comparison.turns.items():
        seconds = [1e-3 * ms for ms in turns]
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        stats = {"median": statistics.median(seconds), "iqr": high - low, "rounds": len(seconds)}
        entry = {"name": f"test_{kind}[{name}-{contender}]", "group": f"{kind}-{name}", "stats": stats}
        found.append({**entry, "extra_info": {"kind": kind, **facts(contender)}})
    return found


@handler
def operator(
    answers: Answers,
    shape: Any,
    norm: str,
    direction: str,
    contenders: Any,
    compiler: str,
    seconds: float = 0.0,
    of: str = "operator",
    without: Any = (),
) -> dict[str, Any]:
    """The operator beside its peers, each held to float64 first. ``of``: which of the report's kinds it is."""
    from benchmarks import compare, measure, peers

    problem, where, backward = as_problem(shape, norm), device(), direction != "forward"
    right, faults = {}, {}
    with compare.memory_limit(where):
        answers.begin("the float64 reference", BEGIN_TIMING)
        oracle = compare.make_oracle(problem, where)
        for name in contenders:
            if name in without:
                faults[name] = "hung or crashed"
                continue
            answers.begin(name, BEGIN_TIMING * (2 if name == "compiled" else 1), optional=True)
            ours = name in compare.OURS
            peer = measure.operator(norm, name) if ours else peers.by_name(name, norm, compiler)
            if name not in compare.FLOORS:
                _, status = measure.attempt(functools.partial(oracle.check, name, peer, ours, backward))
                if status != "ok":
                    faults[name] = status
                    continue
            right[name] = peer
    answers.begin("timing", 2 * BEGIN_TIMING)
    parameters, inputs = measure.make_parameters(problem, where), measure.rotating_inputs(problem, where)
    calls = {name: [measure.make_call(p, each, parameters, backward) for each in inputs] for name, p in right.items()}
    comparison = compare.Comparison(calls, faults, where, seconds)
    host = {name: measure.host_us(calls[name][0], where) for name in comparison.ms}
    graphs: dict[str, float | None] = dict.fromkeys(comparison.ms)
    not_captured: dict[str, str] = {}
    for name in graphs:
        if (step := f"a graph of {name}") in without:
            not_captured[name] = "hung or crashed"
            continue
        answers.begin(step, BEGIN_TIMING, optional=True)
        graphs[name], status = measure.attempt(functools.partial(measure.graph_ms, calls[name], where))
        if status != "ok":
            not_captured[name] = status
    beside = {"peak_bytes": comparison.peak_bytes, "host_us": host, "graph_ms": graphs, "not_captured": not_captured}

    def facts(name: str) -> dict[str, Any]:
        described = comparison.facts_of_problem(name, problem, backward, where)
        return {"direction": direction, **described, "host_us": host[name], "graph_ms": graphs[name]}

    found = entries(comparison, of, compare.label(problem, direction), facts)
    return {"benchmarks": found, "ms": comparison.ms, **beside, "faults": comparison.faults}


@handler
def model(
    answers: Answers, model: str, batch: int, contenders: Any, small: bool, seconds: float = 0.0, without: Any = ()
) -> dict[str, Any]:
    """A training step of a whole model."""
    from benchmarks import test_model

    names = tuple(name for name in contenders if name not in without)

    def begin(name: str) -> None:
        answers.begin(name, BEGIN_TIMING, optional=name in contenders)

    comparison = test_model.make_comparison(model, batch, "training", names, device(), small, seconds, begin)
    described = functools.partial(test_model.facts_of_model, comparison, model, batch, "training")
    found = entries(comparison, "model", f"{model}-{batch}-training", described)
    return {"benchmarks": found, "ms": comparison.ms, "peak_bytes": comparison.peak_bytes, "faults": comparison.faults}


@handler
def forecast(answers: Answers, card: str, without: Any = ()) -> dict[str, Any]:
    """What the cost model says of this card's kernels."""
    from benchmarks import cost_model

    try:
        forecasts = cost_model.forecasts(card)
    except ValueError as error:  # of a card that it knows nothing of
        return {"status": "not run", "error": str(error)}
    found = []
    for each in forecasts:
        shape = "x".join(map(str, each.shape))
        told = {"backend": each.backend, "kernel": each.kernel, "shape": shape, "norm": each.norm}
        found.append({**told, "seconds": each.seconds, "binding": each.binding})
    return {"forecasts": found}


# Tuning


@handler
def tune(answers: Answers, job: str, out: str, without: Any = ()) -> dict[str, Any]:
    """One kernel and problem with every candidate of the tile table; DIR/tuning.json holds what came out."""
    from benchmarks import tune as tuning

    one = next(each for each in tuning.jobs() if each.name == job)

    def measured(job: Any, where: Any) -> dict[str, Any]:
        return tuning.measure_job(job, where, frozenset(without), answers.begin)

    path = pathlib.Path(out) / "tuning.json"
    report = tuning.run([one], path, float("inf"), device(), measured)
    return {"line": tuning.line(one, report["jobs"][job], device())}


# What streams and graphs do, and what programs watch


def training_step(backend: str, sizes: dict[str, Any]) -> tuple[Any, Callable[[], Any]]:
    import parity as measure

    problem = make_problem(**sizes)
    return problem, functools.partial(measure.compute, problem, backend)


def near(found: Any, expected: Any) -> None:
    """One order of sums is as good as another."""
    import torch

    for name, right in expected.items():
        difference = float(torch.linalg.vector_norm((found[name] - right).double()))
        size = float(torch.linalg.vector_norm(right.double()))
        assert difference <= 1e-3 * size, f"{name}: off by {difference:.3g} of {size:.3g}"


@handler
def stream(answers: Answers, backend: str, without: Any = (), **sizes: Any) -> dict[str, Any]:
    """Inputs that arrive late on a stream of their own, which nothing but the kernels' place in it makes them wait
    for."""
    import parity as measure
    import torch

    problem, step = training_step(backend, sizes)
    answers.begin("the default stream")
    expected = step()
    blank = {name: None if t is None else torch.full_like(t, float("nan")) for name, t in problem.tensors.items()}
    late = replace(problem.with_tensors(**blank), grad=torch.full_like(problem.grad, float("nan")))
    torch.cuda.synchronize()
    answers.begin("a stream of its own")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        for name, tensor in problem.tensors.items():
            if tensor is not None:
                late.tensors[name].copy_(tensor)
        late.grad.copy_(problem.grad)
        found = measure.compute(late, backend)
    torch.cuda.synchronize()
    near(found, expected)
    return {}


@handler
def graph(answers: Answers, backend: str, without: Any = (), **sizes: Any) -> dict[str, Any]:
    """Forward and backward captured once, and replayed with other inputs."""
    import parity as measure
    import torch

    from reattn import re_attention

    problem, step = training_step(backend, sizes)
    static = {name: None if t is None else t.detach().clone() for name, t in problem.tensors.items()}
    names = [name for name, t in static.items() if t is not None and name not in measure.STATISTICS]
    leaves = [static[name].requires_grad_() for name in names]

    def step_of_graph() -> tuple[Any, ...]:
        output = re_attention(**static, **problem.options, backend=backend)
        return output, *torch.autograd.grad(output, leaves, problem.grad, materialize_grads=True)

    answers.begin("warming up")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step_of_graph()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    answers.begin("capturing")
    captured_graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured_graph):
        captured = step_of_graph()
    other = problem.with_tensors(**{name: 0.7 * problem[name].flip(0) for name in names})
    with torch.no_grad():
        for name in names:
            static[name].copy_(other[name])
    answers.begin("replaying")
    captured_graph.replay()
    torch.cuda.synchronize()
    expected = measure.compute(other, backend)
    found = dict(zip(["output", *(f"{name} gradient" for name in names)], captured, strict=True))
    near({name: tensor.detach() for name, tensor in found.items()}, {name: expected[name] for name in found})
    return {}


@handler
def launches(answers: Answers, backend: str, shape: Any, norm: str, without: Any = ()) -> dict[str, Any]:
    """One training step of the operator; between the profiler's start and stop is the first launch of each kernel,
    which is of the largest part of a backward pass."""
    import torch

    from benchmarks import measure

    call = operator_call(measure.operator(norm, backend), as_problem(shape, norm), True)
    with compiled_only(backend):
        call()
    seen: set[str] = set()

    def first_of_each(name: str, launch: Callable[[], Any]) -> None:
        first = name not in seen
        seen.add(name)
        if first:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        launch()
        if first:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()

    with hooked(backend, first_of_each):
        call()
    torch.cuda.synchronize()
    return {}


@handler
def step(answers: Answers, backend: str, cases: Any, without: Any = ()) -> dict[str, Any]:
    """Training steps of small problems, for a program that looks at every access."""
    for sizes in cases:
        training_step(backend, sizes)[1]()
        synchronize()
    return {}


def set_up(emulated: bool) -> None:
    """Paths; and for the tests' emulation, what their configuration does before reattn is imported."""
    global EMULATED
    EMULATED = emulated
    sys.path.insert(0, str(ROOT / "tests"))
    # As many processes compile as there is room for.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if emulated:
        import conftest  # noqa: F401
    import torch

    if emulated:
        torch.set_num_threads(1)
    # As benchmarks/conftest.py has it.
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True


def serve(emulated: bool = False) -> None:
    """Does jobs until there are no more. What is printed goes to standard error: the other stream is for answers."""
    answers = Answers(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    try:
        set_up(emulated)
        trouble = ""
    except Exception as error:
        trouble = first_line(error)
    for line in sys.stdin:
        result = {"status": "failed", "error": trouble} if trouble else do(answers, json.loads(line))
        answers.say(result=result)
        if result.get("fatal"):
            # What waits for the device would not end.
            os._exit(1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker", description=__doc__.partition("\n")[0])
    parser.add_argument("--emulated", action="store_true", help="on the CPU, as in the tests")
    parser.add_argument("--job", type=json.loads, help="one job, as JSON; its result is printed")
    options = parser.parse_args(arguments)
    if options.job is None:
        serve(options.emulated)
        return 0
    set_up(options.emulated)
    result = do(Answers(sys.stderr), options.job)
    print(json.dumps(result))
    return int(result["status"] != "ok")


if __name__ == "__main__":
    sys.exit(main())
