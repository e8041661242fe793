"""Validate, then time: what every benchmark here shares.

A contender is held to float64 before it is timed: its error may be twice that of eager arithmetic in the same dtype,
plus rounding. Times are medians, on CUDA between events, with inputs that rotate through more memory than the L2 cache
holds, on a CPU of contenders taking turns. Inputs are random, and lie in memory as a qkv projection leaves them.
"""

from __future__ import annotations

import datetime
import gc
import itertools
import math
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

import reattn
from benchmarks.peers import EAGER, EPS, MOMENTUM, Parameters, Peer

Call = Callable[[], object]
Result = TypeVar("Result")

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Problem:
    """What is measured; ``norm`` is a key of :data:`benchmarks.peers.EAGER`."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    norm: str
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """batch, heads, seqlen, head_dim"""
        return self.batch, self.heads, self.seqlen, self.head_dim

    def flops(self, backward: bool) -> int:
        """Multiplications and additions of the two products and of the mixing; a backward pass is twice its forward.

        What is computed again because no map is kept does not count.
        """
        maps = self.batch * self.heads * self.seqlen**2
        return (4 * self.head_dim + 2 * self.heads) * maps * (3 if backward else 1)

    def traffic(self, backward: bool) -> int:
        """Fewest bytes to and from memory: query, key, value and the output once.

        A backward pass reads query, key, value and the gradient of the output once more, and writes three gradients.
        """
        rows = self.batch * self.heads * self.seqlen * self.head_dim
        return rows * self.dtype.itemsize * (4 + 7 if backward else 4)

    def floor_ms(self, backward: bool, flops_per_s: float, bytes_per_s: float) -> float:
        """The time below which no implementation can go: that of its arithmetic or of its traffic."""
        return 1e3 * max(self.flops(backward) / flops_per_s, self.traffic(backward) / bytes_per_s)


class Inputs(NamedTuple):
    """``(batch, heads, seqlen, head_dim)`` each; ``grad`` is the gradient of the output."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor


def make_inputs(problem: Problem, device: torch.device, seed: int = 0, distinct: int | None = None) -> Inputs:
    """Views of a random qkv projection. With ``distinct``, a divisor of the batch, that many samples repeat to fill it.

    A batch of repeated samples has the outputs and the batch statistics of those samples alone, so a launch of full
    size can be held to a float64 computation that fits into memory.
    """
    generator = torch.Generator(device).manual_seed(seed)
    distinct = problem.batch if distinct is None else distinct
    if problem.batch % distinct:
        raise ValueError(f"distinct must divide the batch of {problem.batch}, got {distinct}")
    shape = (distinct, problem.seqlen, 4, problem.heads, problem.head_dim)
    rows = torch.randn(shape, generator=generator, device=device).to(problem.dtype)
    # The gradient of a loss is small; sums of a larger one overflow in eager float16.
    rows[:, :, 3] /= 32
    rows = rows.repeat(problem.batch // distinct, 1, 1, 1, 1)
    query, key, value = rows[:, :, :3].contiguous().permute(2, 0, 3, 1, 4).unbind(0)
    return Inputs(query, key, value, rows[:, :, 3].contiguous().transpose(1, 2))


def make_parameters(problem: Problem, device: torch.device, seed: int = 0) -> Parameters:
    """Random parameters in float32, near those of a model in training; running statistics near those of its maps."""
    generator = torch.Generator(device).manual_seed(seed)
    heads = problem.heads

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device) * 2 - 1

    theta = uniform(heads, heads) * heads**-0.5
    if problem.norm == "layer":
        return Parameters(theta, None, 1 + 0.1 * uniform(heads), 0.1 * uniform(heads))
    # Maps are about 1/seqlen: a bias as large as theta would leave eager 16-bit maps, and so the yardstick, few digits.
    bias = uniform(heads) / problem.seqlen
    if problem.norm == "none":
        return Parameters(theta, bias)
    mean = theta.sum(0) / problem.seqlen + bias
    var = (1 + 0.1 * uniform(heads)) / problem.seqlen**2
    return Parameters(theta, bias, 1 + 0.1 * uniform(heads), 0.1 * uniform(heads), mean, var)


def operator(norm: str, backend: str) -> Peer:
    """``reattn.re_attention`` on one of its backends, as a peer."""

    def fused(query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> Tensor:
        return reattn.re_attention(
            query,
            key,
            value,
            parameters.theta,
            parameters.bias,
            norm=None if norm == "none" else norm.removesuffix("-eval"),
            norm_weight=parameters.norm_weight,
            norm_bias=parameters.norm_bias,
            running_mean=parameters.running_mean,
            running_var=parameters.running_var,
            training=not norm.endswith("-eval"),
            momentum=MOMENTUM,
            eps=EPS,
            backend=backend,
        )

    return fused


def default_backend(device: torch.device) -> str:
    """The fused backend worth timing: triton on CUDA; on a CPU the native one, as Triton only interprets there.

    Raises ``RuntimeError`` where that backend cannot run, or Triton is set to interpret its kernels on a CUDA machine.
    """
    from reattn.backends import BACKENDS, Request, triton

    name = "triton" if device.type == "cuda" else "cpu"
    if name == "triton" and triton.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels are for tests, their times mean nothing")
    reasons = BACKENDS[name].not_supported(Request(device))
    if reasons:
        raise RuntimeError(f"the {name} backend cannot run here: {'; '.join(reasons)}")
    return name


class WrongResult(RuntimeError):
    """A contender computes something else; its time would mean nothing."""


class Oracle:
    """The float64 result of a problem, and how far from it a contender may be.

    Computed for the first ``distinct`` samples, which the whole batch repeats.
    """

    def __init__(self, problem: Problem, device: torch.device, distinct: int) -> None:
        self.problem = problem
        self.inputs = make_inputs(problem, device, distinct=distinct)
        self.parameters = make_parameters(problem, device)
        self.repeats = problem.batch // distinct
        part = Inputs(*(tensor[:distinct] for tensor in self.inputs))
        reference, eager = operator(problem.norm, "reference"), EAGER[problem.norm]
        exact_inputs = Inputs(*(tensor.double() for tensor in part))
        exact_parameters = Parameters(*(None if p is None else p.double() for p in self.parameters))
        exact = results(reference, exact_inputs, exact_parameters)
        if problem.norm == "batch":
            # A shift before batch norm has no effect: what gradient it gets is rounding.
            del exact["bias gradient"]
        found = [results(form, part, self.parameters) for form in (reference, eager)]
        errors = [{name: _errors(result[name], exact[name]) for name in exact} for result in found]
        self.reference_errors = errors[0]
        self.eager_errors = {name: tuple(map(max, *(result[name] for result in errors))) for name in exact}
        if problem.norm == "batch":
            exact["running_var"] = self._running_var(exact["running_var"], distinct)
        self.exact = exact

    def check(self, name: str, contender: Peer, ours: bool = False) -> dict[str, float]:
        """The relative error of every result for the whole batch; raises :class:`WrongResult` if one is too large.

        ``ours`` is held to the error of the reference in the same dtype, which computes the norm in float32. A peer is
        held to the larger of that and the eager form's, and not in its gradients of parameters: PyTorch sums these over
        the whole batch with errors that grow with it.
        """
        yardstick = self.reference_errors if ours else self.eager_errors
        limit = f"twice {'the reference' if ours else 'the eager form'}'s in {self.problem.dtype}, plus rounding"
        found = results(contender, self.inputs, self.parameters)
        rounding = torch.finfo(self.problem.dtype).eps
        errors = {}
        for what, exact in self.exact.items():
            tensor, slack = found[what], rounding
            if exact.ndim == 4:
                tensor = tensor.unflatten(0, (self.repeats, -1))
            else:
                # Of a few numbers eager arithmetic may get every one nearly right by chance.
                slack = 8 * rounding
                if what.endswith("gradient"):
                    tensor = tensor / self.repeats
            errors[what] = _errors(tensor, exact)
            if exact.ndim < 4 and what.endswith("gradient") and not ours:
                continue
            for error, eager, kind in zip(errors[what], yardstick[what], ("in all", "at worst"), strict=True):
                allowed = 2 * eager + slack
                # Written so that NaN is refused, and infinity where eager arithmetic overflows as well.
                if not (error <= allowed and math.isfinite(error)):
                    raise WrongResult(
                        f"{name}: the error of the {what} is {error:.3g} {kind}, allowed is {allowed:.3g}: {limit}"
                    )
        return {what: error for what, (error, _) in errors.items()}

    def _running_var(self, updated: Tensor, distinct: int) -> Tensor:
        """Updated by an unbiased variance over the whole batch instead of ``distinct`` samples."""
        assert self.parameters.running_var is not None
        kept = (1 - MOMENTUM) * self.parameters.running_var.double()
        part, whole = (batch * self.problem.seqlen**2 for batch in (distinct, self.problem.batch))
        return kept + (updated - kept) * ((part - 1) / part) * (whole / (whole - 1))


def results(peer: Peer, inputs: Inputs, parameters: Parameters) -> dict[str, Tensor]:
    """The output, the gradient of every tensor that has one, and the running statistics afterwards, by name."""
    differentiated, fixed = _leaves(inputs, parameters)
    leaves = {**differentiated, **{name: tensor.clone() for name, tensor in fixed.items()}}
    output = peer(*_arguments(leaves))
    grads = torch.autograd.grad(output, list(differentiated.values()), inputs.grad)
    named = {f"{name} gradient": grad for name, grad in zip(differentiated, grads, strict=True)}
    return {"output": output.detach(), **named, **{name: leaves[name] for name in fixed}}


def _errors(tensor: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative error in the Frobenius norm, and of the worst element; ``exact`` is broadcast."""
    exact = exact.expand_as(tensor)
    difference = tensor.double() - exact
    return tuple(
        float(torch.linalg.vector_norm(difference, order) / torch.linalg.vector_norm(exact, order))
        for order in (2, math.inf)
    )


def _leaves(inputs: Inputs, parameters: Parameters) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is differentiated, as leaves of its own, and what is not (the running statistics), by name."""
    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value, **parameters._asdict()}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    fixed = {name: present.pop(name) for name in ("running_mean", "running_var") if name in present}
    return {name: tensor.detach().requires_grad_() for name, tensor in present.items()}, fixed


def _arguments(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Parameters]:
    query, key, value = (leaves[name] for name in ("query", "key", "value"))
    return query, key, value, Parameters(**{name: leaves.get(name) for name in Parameters._fields})


def make_call(peer: Peer, inputs: Inputs, parameters: Parameters, backward: bool) -> Call:
    """One forward pass without gradients, or one forward and backward pass, to be timed."""
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return peer(*inputs[:3], parameters)

        return forward
    differentiated, fixed = _leaves(inputs, parameters)
    arguments, wanted = _arguments({**differentiated, **fixed}), list(differentiated.values())

    def forward_and_backward() -> object:
        # Plain attention has no use for the parameters.
        return torch.autograd.grad(peer(*arguments), wanted, inputs.grad, allow_unused=True)

    return forward_and_backward


def rotations(problem: Problem, device: torch.device) -> int:
    """How many sets of inputs together are three times as large as the L2 cache; one on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(2, math.ceil(3 * cache / problem.traffic(backward=False))), 512)


def time_cuda(calls: Sequence[Call], samples: int = 11, sample_ms: float = 20.0) -> float:
    """Milliseconds a call: the median over samples of many calls in a row, which rotate through ``calls``."""
    rotation = itertools.cycle(calls)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(count: int) -> float:
        start.record()
        for _ in range(count):
            next(rotation)()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    # The first calls compile and allocate; the next tell how many fill a sample.
    sample(2)
    count = min(max(1, round(sample_ms / max(sample(3), 1e-3))), 1000)
    sample(2 * count)
    return statistics.median(sample(count) for _ in range(samples))


def time_interleaved(calls: dict[str, Call], seconds: float = 1.0, rounds: int = 5) -> dict[str, float]:
    """Milliseconds by name on a CPU: medians over turns, at least ``rounds`` and about ``seconds`` long in all.

    Whatever slows the machine for a while slows every contender, so ratios hold where times do not.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while len(min(times.values(), key=len)) < rounds or time.perf_counter() - begin < seconds:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(series) for name, series in times.items()}


def time_graph(calls: Sequence[Call], samples: int = 11, sample_ms: float = 20.0) -> float:
    """Milliseconds a call on the device alone: every call once in a CUDA graph, whose replays are timed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return time_cuda([graph.replay], samples, sample_ms) / len(calls)


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that a call allocates at its peak beyond what was there before, results included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = call()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before


def attempt(action: Callable[[], Result]) -> tuple[Result | None, str]:
    """(result, "ok"), or None and why there is none: what a contender cannot do is a result as well."""
    try:
        return action(), "ok"
    except torch.OutOfMemoryError:
        reason = OUT_OF_MEMORY
    except WrongResult as error:
        reason = f"wrong: {error}"
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        reason = f"failed: {type(error).__name__}: {first_line}"
    # Only here are the frames gone that held the memory.
    release_memory()
    return None, reason


def release_memory() -> None:
    """Gives what is cached and no longer used back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def cpu_flops_per_s(threads: int) -> float:
    """What this CPU reaches in float32: the faster of torch's matrix product and NumPy's, which are two libraries'."""
    from threadpoolctl import threadpool_limits

    size = 1536
    left, right = torch.randn(size, size), torch.randn(size, size)
    with threadpool_limits(threads):
        ms = time_interleaved({"torch": lambda: left @ right, "numpy": lambda: left.numpy() @ right.numpy()})
    return 2 * size**3 / (1e-3 * min(ms.values()))


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device reaches: ``flops_per_s`` in a bfloat16 matrix product, ``bytes_per_s`` both ways in a copy."""
    size = 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_ms = time_cuda([lambda: left @ right])
    source = torch.randn(2**28, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_ms = time_cuda([lambda: target.copy_(source)])
    return {
        "flops_per_s": 2 * size**3 / (1e-3 * product_ms),
        "bytes_per_s": 2 * source.nbytes / (1e-3 * copy_ms),
    }


def machine_info(device: torch.device) -> dict[str, Any]:
    """What a committed figure must say about where it comes from."""
    from reattn.backends import cpu
    from reattn.info import info

    facts = info()
    kept = {name: facts[name] for name in ("reattn", "python", "torch", "triton", "cuda")}
    root = pathlib.Path(__file__).parent
    changes = _first_line("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    machine: dict[str, Any] = {
        **kept,
        "commit": _first_line("git", "-C", str(root), "rev-parse", "HEAD") or None,
        "modified": None if changes is None else bool(changes),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cpu":
        machine |= {"device": _cpu_name(), "instruction_set": cpu.instruction_set(), "team": cpu.threads_from()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return machine


def _cpu_name() -> str:
    """As the kernel tells it; "cpu" where it does not."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "cpu")


def _first_line(*command: str) -> str | None:
    """Of what a command prints; None where it is not installed or fails."""
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return printed.stdout.partition("\n")[0] if printed.returncode == 0 else None
