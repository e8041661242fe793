"""Validate, then time: what every benchmark here shares.

A contender is held to float64 before it is timed: its error may be twice that of eager arithmetic in the same dtype,
plus rounding. Times are medians, on CUDA between events, with inputs that rotate through more memory than the L2 cache
holds, on a CPU of contenders taking turns. Inputs are random, and lie in memory as a qkv projection leaves them.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

import reattn
from benchmarks.peers import EAGER, EPS, MOMENTUM, Parameters, Peer
from reattn.reference import visible_keys

Call = Callable[[], object]
Result = TypeVar("Result")

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Problem:
    """What is measured; ``norm`` is a key of :data:`benchmarks.peers.EAGER`, ``mask`` one of :data:`MASKS` or None."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    norm: str
    dtype: torch.dtype
    mask: str | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """batch, heads, seqlen, head_dim"""
        return self.batch, self.heads, self.seqlen, self.head_dim

    def flops(self, backward: bool) -> int:
        """Multiplications and additions of the two products and of the mixing; a backward pass is twice its forward.

        What is computed again because no map is kept does not count; what a mask hides does.
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


def distinct_samples(problem: Problem) -> int:
    """How many samples, repeated, a large batch is checked with."""
    return math.gcd(problem.batch, 4)


def _padding(problem: Problem, uniform: Callable[..., Tensor]) -> Tensor:
    """60 to 100 % of the keys of a sample, as many in those that repeat."""
    lengths = torch.linspace(0.6, 1, distinct_samples(problem)).mul(problem.seqlen).long()
    lengths = lengths.repeat(problem.batch // len(lengths))[:, None, None, None]
    return (torch.arange(problem.seqlen) < lengths).to(uniform(0).device)


def _by_row(problem: Problem, uniform: Callable[..., Tensor]) -> Tensor:
    """Every query sees another 70 % of the keys, itself among them."""
    mask = uniform(problem.seqlen, problem.seqlen) < 0.4
    return mask.logical_or_(torch.eye(problem.seqlen, dtype=torch.bool, device=mask.device))


def _bias(problem: Problem, uniform: Callable[..., Tensor]) -> Tensor:
    return uniform(problem.heads, problem.seqlen, problem.seqlen).to(problem.dtype)


# By name what makes ``attn_mask``, of a problem and of what draws from [-1, 1); "causal" has none.
MASKS: dict[str, Callable[[Problem, Callable[..., Tensor]], Tensor] | None] = {
    "padding": _padding,
    "by row": _by_row,
    "bias": _bias,
    "causal": None,
}


def make_parameters(problem: Problem, device: torch.device, seed: int = 0) -> Parameters:
    """Random parameters in float32, near those of a model in training; running statistics near those of its maps.
    Beside them the mask."""
    generator = torch.Generator(device).manual_seed(seed)
    heads = problem.heads

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device) * 2 - 1

    theta = uniform(heads, heads) * heads**-0.5
    if problem.mask is not None:
        make_mask, bare = MASKS[problem.mask], make_parameters(replace(problem, mask=None), device, seed)
        mask = None if make_mask is None else make_mask(problem, uniform)
        return bare._replace(attn_mask=mask, is_causal=problem.mask == "causal")
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
            attn_mask=parameters.attn_mask,
            is_causal=parameters.is_causal,
            backend=backend,
        )

    return fused


def fused_backends(device: torch.device) -> tuple[str, ...]:
    """Those worth timing, as "auto" orders them: on CUDA triton and cuda, on a CPU the native one: the others are
    only emulated there. Raises ``RuntimeError`` where none can run.
    """
    from reattn.backends import BACKENDS

    names = ("triton", "cuda") if device.type == "cuda" else ("cpu",)
    reasons = {name: BACKENDS[name].unavailable(device) for name in names}
    able = tuple(name for name, why in reasons.items() if not why)
    if not able:
        why = "; ".join(f"{name}: {', '.join(reasons[name])}" for name in names)
        raise RuntimeError(f"no fused backend can run here: {why}")
    return able


# Maps of longer sequences are not computed in float64 as a whole.
_WHOLE_SEQLEN = 1024


class WrongResult(RuntimeError):
    """A contender computes something else; its time would mean nothing."""


class Oracle:
    """The float64 result of a problem, and how far from it a contender may be.

    Computed for the first ``distinct`` samples, which the whole batch repeats, and, where maps of all query rows would
    not fit into memory, for some of these alone: the gradient of the output is zero in all others. Not so in training
    with batch norm, where all rows decide over each.
    """

    def __init__(self, problem: Problem, device: torch.device, distinct: int) -> None:
        """``distinct``: at most :func:`distinct_samples` of a problem with padding."""
        self.problem = problem
        self.inputs = make_inputs(problem, device, distinct=distinct)
        self.parameters = make_parameters(problem, device)
        self.repeats = problem.batch // distinct
        self.rows = torch.arange(problem.seqlen, device=device)
        if problem.norm != "batch" and problem.seqlen > _WHOLE_SEQLEN:
            self.rows = self.rows[:: problem.seqlen // 61]
            grad = torch.zeros_like(self.inputs.grad)
            grad[:, :, self.rows] = self.inputs.grad[:, :, self.rows]
            self.inputs = self.inputs._replace(grad=grad)
        query, key, value, grad = (tensor[:distinct] for tensor in self.inputs)
        part = Inputs(query[:, :, self.rows], key, value, grad[:, :, self.rows])
        parameters, mask = self.parameters, self.parameters.attn_mask
        if mask is not None and mask.ndim == 4:
            parameters = parameters._replace(attn_mask=mask[:distinct])
        reference, eager = operator(problem.norm, "reference"), EAGER[problem.norm]
        exact_inputs = Inputs(*(tensor.double() for tensor in part))
        exact = results(reference, exact_inputs, parameters.double())
        if problem.norm == "batch":
            # A shift before batch norm has no effect: what gradient it gets is rounding.
            del exact["bias gradient"]
        found = [results(form, part, parameters) for form in (reference, eager)]
        errors = [{name: _errors(result[name], exact[name]) for name in exact} for result in found]
        self.reference_errors = errors[0]
        self.eager_errors = {name: tuple(map(max, *(result[name] for result in errors))) for name in exact}
        if problem.norm == "batch":
            exact["running_var"] = self._running_var(exact["running_var"], distinct)
        self.exact = exact

    def check(self, name: str, contender: Peer, ours: bool = False, backward: bool = True) -> dict[str, float]:
        """The relative error of every result for the whole batch; raises :class:`WrongResult` if one is too large.

        Without ``backward`` of the output and the running statistics alone.

        ``ours`` is held to the error of the reference in the same dtype, which computes the norm in float32. A peer is
        held to the larger of that and the eager form's, and not in its gradients of parameters: PyTorch sums these over
        the whole batch with errors that grow with it.
        """
        yardstick = self.reference_errors if ours else self.eager_errors
        limit = f"twice {'the reference' if ours else 'the eager form'}'s in {self.problem.dtype}, plus rounding"
        found = results(contender, self.inputs, self.parameters, backward)
        rounding = torch.finfo(self.problem.dtype).eps
        errors = {}
        for what, exact in self.exact.items():
            if what not in found:
                continue
            tensor, slack = found[what], rounding
            if what in ("output", "query gradient"):
                # One NaN among the rows that are not compared is seen here.
                tensor = tensor[:, :, self.rows] * (1.0 if tensor.isfinite().all() else math.nan)
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
        query, key, *_ = self.inputs
        visible = visible_keys(self.parameters.attn_mask, self.parameters.is_causal, query, key)
        # Alike for all heads.
        share = 1.0 if visible is None else float(visible[:distinct].double().mean())
        part, whole = (share * batch * self.problem.seqlen**2 for batch in (distinct, self.problem.batch))
        return kept + (updated - kept) * ((part - 1) / part) * (whole / (whole - 1))


def results(peer: Peer, inputs: Inputs, parameters: Parameters, backward: bool = True) -> dict[str, Tensor]:
    """The output, with ``backward`` the gradient of whatever has one, and the running statistics after, by name."""
    differentiated, fixed = _leaves(inputs, parameters)
    leaves = {**differentiated, **{name: tensor.clone() for name, tensor in fixed.items()}}
    named = {}
    with torch.set_grad_enabled(backward):
        output = peer(*_arguments(leaves, parameters))
    if backward:
        grads = torch.autograd.grad(output, list(differentiated.values()), inputs.grad)
        named = {f"{name} gradient": grad for name, grad in zip(differentiated, grads, strict=True)}
    return {"output": output.detach(), **named, **{name: leaves[name] for name in fixed if name != "attn_mask"}}


def _errors(tensor: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative error in the Frobenius norm, and of the worst element; ``exact`` is broadcast."""
    exact = exact.expand_as(tensor)
    difference = tensor.double() - exact
    return tuple(
        float(torch.linalg.vector_norm(difference, order) / torch.linalg.vector_norm(exact, order))
        for order in (2, math.inf)
    )


def _leaves(inputs: Inputs, parameters: Parameters) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is differentiated, as leaves of its own, and what is not (running statistics, boolean masks), by name."""
    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value, **parameters.tensors()}
    fixed = {
        name: tensor for name, tensor in tensors.items() if name.startswith("running") or not tensor.is_floating_point()
    }
    return {name: each.detach().requires_grad_() for name, each in tensors.items() if name not in fixed}, fixed


def _arguments(leaves: dict[str, Tensor], parameters: Parameters) -> tuple[Tensor, Tensor, Tensor, Parameters]:
    """What a peer takes: these tensors in place of the given ones."""
    leaves = dict(leaves)
    query, key, value = (leaves.pop(name) for name in ("query", "key", "value"))
    return query, key, value, parameters._replace(**leaves)


def make_call(peer: Peer, inputs: Inputs, parameters: Parameters, backward: bool) -> Call:
    """One forward pass without gradients, or one forward and backward pass, to be timed."""
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return peer(*inputs[:3], parameters)

        return forward
    differentiated, fixed = _leaves(inputs, parameters)
    arguments, wanted = _arguments({**differentiated, **fixed}, parameters), list(differentiated.values())

    def forward_and_backward() -> object:
        # Plain attention has no use for the parameters.
        return torch.autograd.grad(peer(*arguments), wanted, inputs.grad, allow_unused=True)

    return forward_and_backward


def rotations(problem: Problem, device: torch.device) -> int:
    """How many sets of query, key and value together are three times as large as the L2 cache; one on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(2, math.ceil(4 * cache / problem.traffic(backward=False))), 512)


def rotating_inputs(problem: Problem, device: torch.device) -> list[Inputs]:
    """As many sets as :func:`rotations` says."""
    return [make_inputs(problem, device, seed) for seed in range(1, 1 + rotations(problem, device))]


def time_in_turns(
    calls: Mapping[str, Sequence[Call]], device: torch.device, seconds: float = 1.0, rounds: int = 3
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds a call of every contender, turn by turn, and by name why a contender has none.

    Each contender rotates through its calls. The first call compiles and allocates and does not count. A turn is one
    call, on CUDA as many in a row, between events, as take 20 ms. There are at least ``rounds`` turns, on CUDA 11, and
    as many as fit into ``seconds``; whatever slows the machine for a while slows every contender, so ratios hold where
    times do not.
    """
    rotations = {name: itertools.cycle(each) for name, each in calls.items()}
    counts: dict[str, int] = {}
    series: dict[str, list[float]] = {}
    faults: dict[str, str] = {}
    for name, rotation in rotations.items():
        count, status = attempt(functools.partial(_warm_up, rotation, device))
        if count is None:
            faults[name] = status
        else:
            counts[name], series[name] = count, []
    least = 11 if device.type == "cuda" else rounds
    begin = time.perf_counter()
    done = 0
    while series and (done < least or time.perf_counter() - begin < seconds):
        for name in tuple(series):
            ms, status = attempt(functools.partial(_time, rotations[name], counts[name], device))
            if ms is None:
                faults[name] = status
                del series[name]
            else:
                series[name].append(ms)
        done += 1
    return series, faults


def _warm_up(rotation: Iterator[Call], device: torch.device, turn_ms: float = 20.0) -> int:
    """How many calls make a turn."""
    next(rotation)()
    if device.type != "cuda":
        return 1
    count = min(max(1, round(turn_ms / max(_time(rotation, 3, device), 1e-3))), 1000)
    _time(rotation, 2 * count, device)
    return count


def _time(rotation: Iterator[Call], count: int, device: torch.device) -> float:
    """Milliseconds a call, of so many in a row."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            next(rotation)()
        return 1e3 * (time.perf_counter() - start) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        next(rotation)()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


def captured(calls: Sequence[Call]) -> Call:
    """Calls that were made before, one after the other, as a CUDA graph: what replays it."""
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for call in calls:
                call()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # it would say no more than that something failed
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def graph_ms(calls: Sequence[Call], device: torch.device) -> float | None:
    """Milliseconds a call replayed from a CUDA graph of them, which takes the host no time; None without CUDA."""
    if device.type != "cuda":
        return None
    rotation = itertools.repeat(captured(calls))
    count = _warm_up(rotation, device, turn_ms=5.0)
    return statistics.median(_time(rotation, count, device) for _ in range(5)) / len(calls)


def host_us(call: Call, device: torch.device, number: int = 10) -> float | None:
    """Microseconds until a call has launched what it launches, on a device that is idle; None without CUDA."""
    if device.type != "cuda":
        return None
    series = []
    for _ in range(number):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        kept = call()
        series.append(1e6 * (time.perf_counter() - begin))
        del kept
    torch.cuda.synchronize(device)
    return statistics.median(series)


def attempt(action: Callable[[], Result]) -> tuple[Result | None, str]:
    """(result, "ok"), or None and why there is none: what a contender cannot do is a result as well."""
    try:
        return action(), "ok"
    except (torch.OutOfMemoryError, MemoryError):
        reason = OUT_OF_MEMORY
    except WrongResult as error:
        reason = f"wrong: {error}"
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        reason = f"failed: {type(error).__name__}: {first_line}"
        if "can't allocate memory" in str(error):  # torch on a CPU
            reason = OUT_OF_MEMORY
    # Only here are the frames gone that held the memory.
    release_memory()
    return None, reason


def release_memory() -> None:
    """Gives what is cached and no longer used back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
