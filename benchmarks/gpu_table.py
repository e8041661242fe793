"""``python3 -m benchmarks.gpu_table --out DIR``: fused re-attention on a GPU against eager, torch.compile and plain attention.

Time and peak memory, forward and forward + backward, every contender validated before it is timed. Prints a table last, and
writes ``gpu_table.json`` and ``gpu_table.txt`` to DIR after every measurement, so that a run cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import measure, peers
from benchmarks.measure import Problem

CONTENDERS = ("fused", "eager", "compiled", "sdpa")
DIRECTIONS = ("forward", "forward+backward")
NO_TIME = "not measured: no time left"
# Nothing is started that would not fit; until one was measured, this long is expected of a contender at one problem.
FIRST_GUESS_S = {"fused": 20.0, "compiled": 30.0}


@dataclass(frozen=True)
class Plan:
    """What is measured, on which device, by which backend."""

    device: torch.device
    backend: str
    dtype: torch.dtype
    heads: int
    shapes: tuple[tuple[int, int, int], ...]  # (batch, seqlen, head_dim)
    launches: tuple[tuple[int, int, int], ...]
    distinct: int
    compiler: str
    norms: tuple[str, ...] = ("batch", "layer")

    def problems(self, shapes: tuple[tuple[int, int, int], ...]) -> Iterator[Problem]:
        for batch, seqlen, head_dim in shapes:
            for norm in self.norms:
                yield Problem(batch, self.heads, seqlen, head_dim, norm, self.dtype)


GPU = functools.partial(
    Plan,
    dtype=torch.bfloat16,
    heads=12,
    shapes=((128, 197, 32), (128, 197, 64), (32, 577, 32)),
    launches=((1, 197, 32), (8, 197, 32)),
    distinct=4,
    compiler="inductor",
)
# As small as it can be with every step taken; of compiling only the tracing, as there may be no C++ compiler.
SMOKE = functools.partial(
    Plan,
    dtype=torch.float32,
    heads=4,
    shapes=((4, 9, 8),),
    launches=((1, 9, 8),),
    distinct=2,
    compiler="aot_eager",
)


class Run:
    """Fills a report, measurement by measurement, until the time is up."""

    def __init__(self, plan: Plan, seconds: float, save: Callable[[dict[str, Any]], None]) -> None:
        self.plan = plan
        self.deadline = time.monotonic() + seconds
        self.save = save
        self.longest: dict[str, float] = {}
        self.report: dict[str, Any] = {
            "machine": measure.machine_info(plan.device),
            "settings": {
                "backend": plan.backend,
                "compiler": plan.compiler,
                "dtype": _name(plan.dtype),
                "heads": plan.heads,
                "seconds": seconds,
            },
            "ceilings": measure.ceilings(plan.device) if plan.device.type == "cuda" else None,
            "cases": [],
            "launches": [],
        }

    def measure(self) -> None:
        """The contenders without a long compilation first, at every problem; then torch.compile; then small batches."""
        cases = {problem: self._open_cases(problem) for problem in self.plan.problems(self.plan.shapes)}
        launches = {problem: self._open_launch(problem) for problem in self.plan.problems(self.plan.launches)}
        for contenders in (("fused", "eager", "sdpa"), ("compiled",)):
            for problem, by_direction in cases.items():
                oracle = None
                for contender in contenders:
                    if not self._fits(contender):
                        continue
                    begin = time.monotonic()
                    oracle = oracle or measure.Oracle(problem, self.plan.device, self._distinct(problem))
                    self._measure_case(oracle, contender, by_direction)
                    self._took(contender, begin)
                del oracle
                measure.release_memory()
        for problem, launch in launches.items():
            for contender in ("fused", "eager", "sdpa"):
                if self._fits(contender):
                    self._measure_launch(problem, contender, launch)
                    self.save(self.report)

    def _fits(self, contender: str) -> bool:
        expected = self.longest.get(contender, FIRST_GUESS_S.get(contender, 0.0))
        return time.monotonic() + expected < self.deadline

    def _took(self, contender: str, begin: float) -> None:
        self.longest[contender] = max(self.longest.get(contender, 0.0), time.monotonic() - begin)
        self.save(self.report)

    def _distinct(self, problem: Problem) -> int:
        return math.gcd(self.plan.distinct, problem.batch)

    def _open_cases(self, problem: Problem) -> dict[str, dict[str, Any]]:
        """The problem's entries in the report, one by direction, every contender not measured yet."""
        opened = {}
        for direction in DIRECTIONS:
            backward = direction != "forward"
            ceilings = self.report["ceilings"]
            opened[direction] = {
                **_described(problem),
                "direction": direction,
                "flops": problem.flops(backward),
                "traffic_bytes": problem.traffic(backward),
                "floor_ms": problem.floor_ms(backward, **ceilings) if ceilings else None,
                "contenders": {name: {"status": NO_TIME} for name in CONTENDERS},
            }
        self.report["cases"] += opened.values()
        return opened

    def _open_launch(self, problem: Problem) -> dict[str, Any]:
        contenders = {name: {"status": NO_TIME} for name in CONTENDERS if name != "compiled"}
        launch = {**_described(problem), "direction": "forward", "contenders": contenders}
        self.report["launches"].append(launch)
        return launch

    def _contender(self, name: str, norm: str) -> peers.Peer:
        if name == "fused":
            return measure.operator(norm, self.plan.backend)
        if name == "sdpa":
            return peers.sdpa
        if name == "compiled":
            # Every problem is a compilation of its own; too many of one function and dynamo gives up.
            torch.compiler.reset()
            return peers.compiled(peers.EAGER[norm], self.plan.compiler)
        return peers.EAGER[norm]

    def _measure_case(self, oracle: measure.Oracle, name: str, by_direction: dict[str, dict[str, Any]]) -> None:
        problem, device = oracle.problem, self.plan.device
        contender = self._contender(name, problem.norm)
        errors, status = self._validate(oracle, name, contender)
        for direction, case in by_direction.items():
            entry = case["contenders"][name] = {"status": status}
            if status != "ok":
                continue
            backward = direction != "forward"
            timed, entry["status"] = measure.attempt(lambda: self._time(problem, contender, backward))
            if timed is not None:
                ms, peak = timed
                entry |= {"ms": ms, "peak_bytes": peak, "tflops": problem.flops(backward) / ms / 1e9, "errors": errors}
        print(
            f"{self._progress(problem)}: {name}: {'; '.join(_brief(c['contenders'][name]) for c in by_direction.values())}"
        )
        assert device == self.plan.device

    def _validate(
        self, oracle: measure.Oracle, name: str, contender: peers.Peer
    ) -> tuple[dict[str, float] | None, str]:
        # Plain attention computes something else on purpose.
        if name == "sdpa":
            return None, "ok"
        return measure.attempt(lambda: oracle.check(name, contender, ours=name == "fused"))

    def _time(self, problem: Problem, contender: peers.Peer, backward: bool) -> tuple[float, int | None]:
        calls = self._calls(problem, contender, backward)
        ms = measure.time_cuda(calls) if self.plan.device.type == "cuda" else _time_cpu(calls[0])
        return ms, measure.peak_memory(calls[0], self.plan.device)

    def _calls(self, problem: Problem, contender: peers.Peer, backward: bool) -> list[measure.Call]:
        device = self.plan.device
        parameters = measure.make_parameters(problem, device)
        return [
            measure.make_call(contender, measure.make_inputs(problem, device, seed), parameters, backward)
            for seed in range(1, 1 + measure.rotations(problem, device))
        ]

    def _measure_launch(self, problem: Problem, name: str, launch: dict[str, Any]) -> None:
        contender = self._contender(name, problem.norm)
        oracle = measure.Oracle(problem, self.plan.device, self._distinct(problem))
        errors, status = self._validate(oracle, name, contender)
        entry = launch["contenders"][name] = {"status": status}
        if status != "ok":
            return
        timed, entry["status"] = measure.attempt(lambda: self._time(problem, contender, backward=False))
        if timed is None:
            return
        entry |= {"ms": timed[0], "errors": errors}
        if self.plan.device.type == "cuda":
            calls = self._calls(problem, contender, backward=False)[:32]
            entry["graph_ms"], entry["graph_status"] = measure.attempt(lambda: measure.time_graph(calls))
        print(f"{self._progress(problem)}: {name}: {_brief(entry)}")

    def _progress(self, problem: Problem) -> str:
        left = self.deadline - time.monotonic()
        shape = f"B={problem.batch} N={problem.seqlen} d={problem.head_dim} {problem.norm}"
        return f"[{left:4.0f} s left] {shape}"


def _time_cpu(call: measure.Call) -> float:
    return measure.time_interleaved({"call": call}, seconds=0.0)["call"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(problem: Problem) -> dict[str, Any]:
    return {**asdict(problem), "dtype": _name(problem.dtype)}


def _brief(entry: dict[str, Any]) -> str:
    return f"{entry['ms']:.3f} ms" if "ms" in entry else entry["status"]


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    machine, settings, ceilings = report["machine"], report["settings"], report["ceilings"]
    yield "  ".join(f"{name} {value}" for name, value in machine.items() if not name.endswith("bytes"))
    yield f"{settings['dtype']}, {settings['heads']} heads, backend {settings['backend']}"
    if ceilings:
        yield (
            f"measured here: {ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s in a large bfloat16 product, "
            f"{ceilings['bytes_per_s'] / 1e12:.2f} TB/s in a large copy"
        )
    yield ""
    shape = f"{'B':>4}{'N':>5}{'d':>4} {'norm':6}{'direction':17}"
    names = "".join(f"{name:>10}" for name in CONTENDERS)
    yield f"{'':36}|{'milliseconds':^40}|{'fused':^33}|{'peak MiB':^40}"
    yield f"{shape}|{names}|{'/ sdpa':>8}{'speed-up':>9}{'/ floor':>8}{'TFLOP/s':>8}|{names}"
    for case in report["cases"]:
        entries = case["contenders"]
        times = [entries[name].get("ms") for name in CONTENDERS]
        fused, *rivals, floor = times
        best = min((ms for ms in rivals if ms is not None), default=None)
        yield (
            f"{case['batch']:>4}{case['seqlen']:>5}{case['head_dim']:>4} {case['norm']:6}{case['direction']:17}|"
            + "".join(f"{_cell(entries[name], 'ms', '.3f'):>10}" for name in CONTENDERS)
            + f"|{_ratio(fused, floor):>8}{_ratio(best, fused):>9}{_ratio(fused, case['floor_ms']):>8}"
            + f"{_cell(entries['fused'], 'tflops', '.1f'):>8}|"
            + "".join(f"{_cell(entries[name], 'peak_bytes', '.1f', 2**20):>10}" for name in CONTENDERS)
        )
    yield ""
    yield "speed-up: the faster of eager and compiled over fused. floor: the larger of arithmetic and traffic at the measured rates."
    yield "sdpa is plain attention without mixing, which no re-attention need match. peak: bytes allocated beyond the inputs."
    if report["launches"]:
        yield ""
        yield "small batches, forward: microseconds a call, issued from Python / replayed in a CUDA graph"
        for launch in report["launches"]:
            cells = (
                f"{name} {_cell(entry, 'ms', '.1f', 1e-3)} / {_cell(entry, 'graph_ms', '.1f', 1e-3)}"
                for name, entry in launch["contenders"].items()
            )
            yield f"{launch['batch']:>4}{launch['seqlen']:>5}{launch['head_dim']:>4} {launch['norm']:6}" + "   ".join(
                cells
            )
    remarks = list(_remarks(report))
    if remarks:
        yield ""
        yield from remarks


def _cell(entry: dict[str, Any], key: str, form: str, unit: float = 1.0) -> str:
    if entry.get(key) is not None:
        return format(entry[key] / unit, form)
    status = entry["status"]
    if status == measure.OUT_OF_MEMORY:
        return "OOM"
    return "WRONG" if status.startswith("wrong") else "failed" if status.startswith("failed") else "-"


def _ratio(numerator: float | None, denominator: float | None) -> str:
    return f"{numerator / denominator:.2f}" if numerator and denominator else "-"


def _remarks(report: dict[str, Any]) -> Iterator[str]:
    """Whatever is not a number in the table, and why."""
    for case in report["cases"] + report["launches"]:
        for name, entry in case["contenders"].items():
            what = (
                f"B={case['batch']} N={case['seqlen']} d={case['head_dim']} {case['norm']} {case['direction']} {name}"
            )
            if entry["status"] != "ok":
                yield f"{what}: {entry['status']}"
            elif entry.get("graph_status", "ok") != "ok":
                yield f"{what}, in a CUDA graph: {entry['graph_status']}"


def faults(report: dict[str, Any]) -> list[str]:
    """What of the fused operator was measured and is wrong or failed; a peer's failure is no fault."""
    entries = (case["contenders"]["fused"] for case in report["cases"] + report["launches"])
    return sorted({entry["status"] for entry in entries if entry["status"] not in ("ok", NO_TIME)})


def save(report: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes both files, each in one step: a process killed meanwhile leaves the previous ones whole."""
    texts = {"gpu_table.json": json.dumps(report, indent=1), "gpu_table.txt": "\n".join(table(report))}
    for name, text in texts.items():
        partial = folder / f"{name}.partial"
        partial.write_text(text + "\n")
        os.replace(partial, folder / name)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if the fused operator is wrong or fails anywhere, 130 if interrupted, else 0."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu_table", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for gpu_table.json and gpu_table.txt")
    parser.add_argument("--seconds", type=float, default=180.0, help="start nothing that would end later (default 180)")
    parser.add_argument("--cpu-smoke", action="store_true", help="try the machinery on a CPU; its times mean nothing")
    options = parser.parse_args(arguments)
    if not options.cpu_smoke and not torch.cuda.is_available():
        parser.error(
            f"needs a CUDA device, and torch {torch.__version__} sees none; --cpu-smoke tries the machinery on a CPU"
        )
    device = torch.device("cpu") if options.cpu_smoke else torch.device("cuda", torch.cuda.current_device())
    try:
        backend = measure.default_backend(device)
    except RuntimeError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)

    run = Run(
        (SMOKE if options.cpu_smoke else GPU)(device, backend),
        options.seconds,
        lambda report: save(report, options.out),
    )
    interrupted = False
    try:
        run.measure()
    except KeyboardInterrupt:
        interrupted = True
    save(run.report, options.out)
    print()
    print("\n".join(table(run.report)))
    if options.cpu_smoke:
        print("\nA trial on a CPU: these times mean nothing.")
    if interrupted:
        print("\nInterrupted: what is missing was not measured.", file=sys.stderr)
        return 130
    return 1 if faults(run.report) else 0


if __name__ == "__main__":
    sys.exit(main())
