"""``python3 -m benchmarks.gpu_table --out DIR``: fused re-attention against eager, torch.compile and SDPA on a GPU.

Time and peak memory, forward and forward + backward, every contender validated before it is timed. Prints a table last,
and writes ``gpu_table.json`` and ``gpu_table.txt`` to DIR after every measurement: a run cut short leaves what it has.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import measure, peers
from benchmarks.measure import Oracle, Problem
from reattn.backends import BACKENDS, Request

# "fused" is the backend that "auto" takes first.
CONTENDERS = ("fused", "cuda", "eager", "compiled", "sdpa")
OURS = ("fused", "cuda")
DIRECTIONS = ("forward", "forward+backward")
NO_TIME = "not measured: no time left"
NOT_THERE = "not measured: "
# Nothing is started that would not fit: a contender is expected to take as long as its slowest problem so far, and this
# long, with kernels to compile, before any.
FIRST_GUESS_S = {"fused": 20.0, "cuda": 5.0, "eager": 5.0, "compiled": 30.0, "sdpa": 5.0}


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
    shapes=((128, 197, 32), (128, 197, 64), (128, 197, 33), (32, 577, 32)),
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
        self.without_cuda = "; ".join(BACKENDS["cuda"].not_supported(Request(plan.device)))
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
        """First what compiles quickly, at every problem; then torch.compile; then small batches."""
        quick = tuple(name for name in CONTENDERS if name != "compiled")
        large, small = self.plan.problems(self.plan.shapes), self.plan.problems(self.plan.launches)
        cases = [self._open(problem, "cases", DIRECTIONS, CONTENDERS) for problem in large]
        launches = [self._open(problem, "launches", DIRECTIONS[:1], quick) for problem in small]
        for opened, contenders in ((cases, quick), (cases, ("compiled",)), (launches, quick)):
            for problem, entries in opened:
                self._measure_problem(problem, entries, contenders, in_graphs=opened is launches)

    def _open(
        self, problem: Problem, group: str, directions: Sequence[str], contenders: Sequence[str]
    ) -> tuple[Problem, list[dict[str, Any]]]:
        """Enters a problem into the report, once by direction, no contender measured yet."""
        ceilings = self.report["ceilings"]
        entries = []
        for direction in directions:
            backward = direction != "forward"
            entries.append(
                {
                    **asdict(problem),
                    "dtype": _name(problem.dtype),
                    "direction": direction,
                    "flops": problem.flops(backward),
                    "traffic_bytes": problem.traffic(backward),
                    "floor_ms": problem.floor_ms(backward, **ceilings) if ceilings else None,
                    "contenders": {name: {"status": NO_TIME} for name in contenders},
                }
            )
        self.report[group] += entries
        return problem, entries

    def _measure_problem(
        self, problem: Problem, entries: list[dict[str, Any]], contenders: Sequence[str], in_graphs: bool
    ) -> None:
        oracle = None
        for name in contenders:
            if name == "cuda" and self.without_cuda:
                for entry in entries:
                    entry["contenders"][name] = {"status": NOT_THERE + self.without_cuda}
                continue
            begin = time.monotonic()
            if begin + self.longest.get(name, FIRST_GUESS_S[name]) > self.deadline:
                continue
            oracle = oracle or Oracle(problem, self.plan.device, math.gcd(self.plan.distinct, problem.batch))
            if name in OURS:
                contender = measure.operator(problem.norm, self.plan.backend if name == "fused" else name)
            else:
                contender = peers.by_name(name, problem.norm, self.plan.compiler)
            errors, status = None, "ok"
            # Plain attention computes something else on purpose.
            if name != "sdpa":
                errors, status = measure.attempt(functools.partial(oracle.check, name, contender, ours=name in OURS))
            for entry in entries:
                found: dict[str, Any] = {"status": status}
                entry["contenders"][name] = found
                if status == "ok":
                    backward = entry["direction"] != "forward"
                    timed, found["status"] = measure.attempt(
                        functools.partial(self._time, problem, contender, backward, in_graphs)
                    )
                    found |= timed or {}
                    found |= {"errors": errors} if timed and errors else {}
            self.longest[name] = max(time.monotonic() - begin, self.longest.get(name, 0.0))
            brief = ", ".join(_cell(entry["contenders"][name], "ms", ".3f") for entry in entries)
            left = self.deadline - time.monotonic()
            print(f"[{left:4.0f} s left] {_title(entries[0])} {name}: {brief} ms", flush=True)
            self.save(self.report)
        del oracle
        measure.release_memory()

    def _time(self, problem: Problem, contender: peers.Peer, backward: bool, in_graph: bool) -> dict[str, Any]:
        device = self.plan.device
        parameters = measure.make_parameters(problem, device)
        calls = [
            measure.make_call(contender, measure.make_inputs(problem, device, seed), parameters, backward)
            for seed in range(1, 1 + measure.rotations(problem, device))
        ]
        if device.type == "cuda":
            ms = measure.time_cuda(calls)
        else:
            ms = measure.time_interleaved({"call": calls[0]}, seconds=0.0)["call"]
        found: dict[str, Any] = {
            "ms": ms,
            "tflops": problem.flops(backward) / ms / 1e9,
            "peak_bytes": measure.peak_memory(calls[0], device),
        }
        if in_graph and device.type == "cuda":
            found["graph_ms"], found["graph_status"] = measure.attempt(functools.partial(measure.time_graph, calls))
        return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _title(entry: dict[str, Any]) -> str:
    return f"B={entry['batch']} N={entry['seqlen']} d={entry['head_dim']} {entry['norm']}"


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    machine, settings, ceilings = report["machine"], report["settings"], report["ceilings"]
    yield "  ".join(f"{name} {value}" for name, value in machine.items() if not name.endswith("bytes"))
    yield f"{settings['dtype']}, {settings['heads']} heads, backend {settings['backend']}, batch norm in training"
    if ceilings:
        yield (
            f"measured here: {ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s in a large bfloat16 product, "
            f"{ceilings['bytes_per_s'] / 1e12:.2f} TB/s in a large copy"
        )
    yield ""
    names = "".join(f"{name:>10}" for name in CONTENDERS)
    width = 10 * len(CONTENDERS)
    yield f"{'':36}|{'milliseconds':^{width}}|{'fused':^36}|{'peak MiB':^{width}}"
    yield (
        f"{'B':>4}{'N':>5}{'d':>4} {'norm':6}{'direction':16}|{names}|"
        f"{'/ sdpa':>9}{'speed-up':>9}{'/ floor':>9}{'TFLOP/s':>9}|{names}"
    )
    yield from map(_case_line, report["cases"])
    yield ""
    yield "speed-up: the faster of eager and compiled, where measured, over fused. sdpa: plain attention, no mixing."
    yield "floor: the larger of arithmetic and traffic at the measured rates. peak: allocated beyond the inputs."
    if report["launches"]:
        yield ""
        yield "small batches, forward: microseconds a call, issued from Python / replayed in a CUDA graph"
        yield from map(_launch_line, report["launches"])
    remarks = list(_remarks(report))
    if remarks:
        yield ""
        yield from remarks


def _case_line(case: dict[str, Any]) -> str:
    entries = [case["contenders"][name] for name in CONTENDERS]
    fused, _, eager, compiled, sdpa = (entry.get("ms") for entry in entries)
    rival = min((ms for ms in (eager, compiled) if ms is not None), default=None)
    ratios = (_ratio(fused, sdpa), _ratio(rival, fused), _ratio(fused, case["floor_ms"]))
    columns = (
        f"{case['batch']:>4}{case['seqlen']:>5}{case['head_dim']:>4} {case['norm']:6}{case['direction']:16}",
        "".join(f"{_cell(entry, 'ms', '.3f'):>10}" for entry in entries),
        "".join(f"{figure:>9}" for figure in (*ratios, _cell(entries[0], "tflops", ".1f"))),
        "".join(f"{_cell(entry, 'peak_bytes', '.1f', 2**20):>10}" for entry in entries),
    )
    return "|".join(columns)


def _launch_line(launch: dict[str, Any]) -> str:
    cells = (
        f"{name} {_cell(entry, 'ms', '.1f', 1e-3)} / {_cell(entry, 'graph_ms', '.1f', 1e-3)}"
        for name, entry in launch["contenders"].items()
    )
    return f"{launch['batch']:>4}{launch['seqlen']:>5}{launch['head_dim']:>4} {launch['norm']:6}" + "   ".join(cells)


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
            what = f"{_title(case)} {case['direction']} {name}"
            if entry["status"] != "ok":
                yield f"{what}: {entry['status']}"
            elif entry.get("graph_status", "ok") != "ok":
                yield f"{what}, in a CUDA graph: {entry['graph_status']}"


def faults(report: dict[str, Any]) -> list[str]:
    """What of the fused operator was measured and is wrong or failed; a peer's failure is no fault."""
    entries = (case["contenders"][name] for case in report["cases"] + report["launches"] for name in OURS)
    return sorted(
        {status for entry in entries if (status := entry["status"]) != "ok" and not status.startswith(NOT_THERE)}
    )


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

    if options.cpu_smoke:
        torch.set_num_threads(1)
    plan = (SMOKE if options.cpu_smoke else GPU)(device, backend)
    run = Run(plan, options.seconds, functools.partial(save, folder=options.out))
    status = 0
    try:
        run.measure()
    except KeyboardInterrupt:
        print("interrupted: what is missing was not measured", file=sys.stderr)
        status = 130
    finally:
        # Also when the device is lost: what was measured before that stays true.
        save(run.report, options.out)
        print("", *table(run.report), sep="\n", flush=True)
    return status or int(bool(faults(run.report)))


if __name__ == "__main__":
    sys.exit(main())
