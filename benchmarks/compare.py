"""Contenders side by side: held to float64, timed in turns, their memory measured; what the results say of each."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import measure, peers
from benchmarks.machine import ceilings, memory_limit, peak_memory
from benchmarks.measure import Call, Oracle, Problem

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
OURS = ("triton", "cuda", "cpu", "reference")
# What computes something else on purpose: the floor that no mixing can beat.
FLOORS = ("sdpa", "plain ViT")
# Ends the name of one of ours that leaves out the mask: what a mask costs.
UNMASKED = " unmasked"


def is_peer(name: str) -> bool:
    """Whether a contender computes the same as ours do and is not of this package."""
    return name.removesuffix(UNMASKED) not in (*OURS, *FLOORS)


class Playback:
    """pytest-benchmark's timer: it moves on by what was measured before, when the contenders took turns."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def time(self) -> float:
        return self._seconds

    def play(self, benchmark: BenchmarkFixture, milliseconds: Sequence[float]) -> None:
        turns = iter(milliseconds)

        def turn() -> None:
            self._seconds += 1e-3 * next(turns)

        benchmark.pedantic(turn, rounds=len(milliseconds))


PLAYBACK = Playback()
# For every module of benchmarks.
played_back = pytest.mark.benchmark(timer=PLAYBACK.time)


class Comparison:
    """Every contender timed, turn by turn, and measured for memory.

    Attributes:
        turns, ms: milliseconds of each turn by contender, and their median.
        faults: by contender why it has no time.
        peak_bytes: by contender what a call holds at its peak beyond its inputs, or None.
    """

    def __init__(
        self,
        calls: Mapping[str, Sequence[Call]],
        faults: Mapping[str, str],
        device: torch.device,
        seconds: float,
        rounds: int = 3,
    ) -> None:
        with memory_limit(device):
            self.turns, failed = measure.time_in_turns(calls, device, seconds, rounds)
            self.peak_bytes = {
                name: measure.attempt(functools.partial(peak_memory, calls[name][0], device))[0] for name in self.turns
            }
        self.faults = {**faults, **failed}
        self.ms = {name: statistics.median(series) for name, series in self.turns.items()}

    def ratio(self, name: str, other: str | None) -> float | None:
        """The median over the turns of what one took over what the other took right after or before.

        Where a machine changes its pace during a comparison, this holds and the ratio of two medians does not.
        """
        if other not in self.turns:
            return None
        return statistics.median(a / b for a, b in zip(self.turns[name], self.turns[other], strict=True))

    def facts(self, name: str) -> dict[str, Any]:
        """What the results say of a contender in any comparison."""
        return {
            "contender": name,
            "ours": name in OURS,
            "ms": self.ms[name],
            "all_ms": self.ms,
            "faults": self.faults,
            "peak_bytes": self.peak_bytes[name],
            "all_peak_bytes": self.peak_bytes,
        }

    def facts_of_problem(self, name: str, problem: Problem, backward: bool, device: torch.device) -> dict[str, Any]:
        """The same for one call of the operator: also what it takes at least, and how it stands to its peers."""
        rivals = {other: ms for other, ms in self.ms.items() if is_peer(other)}
        best = min(rivals, key=rivals.__getitem__, default=None)
        reached = ceilings(device)
        dtype = str(problem.dtype).removeprefix("torch.")
        rates = reached["flops_per_s"][dtype], reached["bytes_per_s"]
        flops, traffic, seconds = problem.flops(backward), problem.traffic(backward), 1e-3 * self.ms[name]
        return {
            **asdict(problem),
            "dtype": dtype,
            **self.facts(name),
            "flops": flops,
            "traffic_bytes": traffic,
            "tflops": 1e-12 * flops / seconds,
            "gbytes_per_s": 1e-9 * traffic / seconds,
            "bound": "compute" if flops / rates[0] > traffic / rates[1] else "memory",
            "share_of_roofline": problem.floor_ms(backward, *rates) / self.ms[name],
            "ratio_to_sdpa": self.ratio(name, "sdpa"),
            "ratio_to_unmasked": self.ratio(name, name + UNMASKED),
            "best_peer": best,
            "ratio_to_best_peer": self.ratio(name, best),
        }

    def report_problem(
        self, benchmark: BenchmarkFixture, kind: str, name: str, problem: Problem, direction: str, device: torch.device
    ) -> None:
        """:meth:`report` of one call of the operator, or of what is counted as one."""
        described = {"kind": kind, "direction": direction}
        if name in self.ms:
            described |= self.facts_of_problem(name, problem, direction != "forward", device)
        self.report(benchmark, name, f"{kind}-{label(problem, direction)}", described)

    def report(self, benchmark: BenchmarkFixture, name: str, group: str, facts: Mapping[str, Any]) -> None:
        """One contender's test: its turns and facts go into the results, or why it has none."""
        if name in self.faults:
            # What a peer cannot do is a result, and stands in the facts of the others.
            give_up = pytest.fail if name in OURS else pytest.skip
            give_up(self.faults[name])
        benchmark.group = group
        benchmark.extra_info.update(facts)
        PLAYBACK.play(benchmark, self.turns[name])


# Two: of a problem, and of the same without its mask.
@functools.lru_cache(maxsize=2)
def make_oracle(problem: Problem, device: torch.device) -> Oracle:
    return Oracle(problem, device, measure.distinct_samples(problem))


def make_contender(name: str, norm: str) -> peers.Peer:
    """Ours, with or without a mask, or one of :func:`benchmarks.peers.by_name`."""
    backend = name.removesuffix(UNMASKED)
    if backend not in OURS:
        return peers.by_name(name, norm)
    ours = measure.operator(norm, backend)
    return ours if name == backend else peers.without_mask(ours)


def validated(
    problem: Problem, backward: bool, names: tuple[str, ...], device: torch.device
) -> tuple[dict[str, peers.Peer], dict[str, str]]:
    """The contenders whose results are right, and by name what is the matter with the others."""
    right, faults = {}, {}
    with memory_limit(device):
        for name in names:
            contender = make_contender(name, problem.norm)
            if name not in FLOORS:
                oracle = make_oracle(replace(problem, mask=None) if name.endswith(UNMASKED) else problem, device)
                check = functools.partial(oracle.check, name, contender, not is_peer(name), backward)
                _, status = measure.attempt(check)
                if status != "ok":
                    faults[name] = status
                    continue
            right[name] = contender
    return right, faults


def compare_operator(
    problem: Problem, direction: str, names: tuple[str, ...], device: torch.device, seconds: float, rounds: int = 3
) -> Comparison:
    """Contenders by name, ours or of :func:`benchmarks.peers.by_name`, on one problem."""
    backward = direction != "forward"
    right, faults = validated(problem, backward, names, device)
    parameters = measure.make_parameters(problem, device)
    inputs = measure.rotating_inputs(problem, device)
    calls = {
        name: [measure.make_call(contender, each, parameters, backward) for each in inputs]
        for name, contender in right.items()
    }
    return Comparison(calls, faults, device, seconds, rounds)


def label(problem: Problem, direction: str) -> str:
    shape = "x".join(map(str, problem.shape))
    mask = "" if problem.mask is None else f"{problem.mask}-"
    return f"{shape}-{problem.norm}-{mask}{str(problem.dtype).removeprefix('torch.')}-{direction}"
