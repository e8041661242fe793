"""``python3 -m benchmarks.tune --out DIR``: which tiles of the Triton kernels are fastest on this GPU.

Every candidate of kernels/configs.py takes the table's place, kernel by kernel; its results are held to float64, and
the operator is timed with each, turn by turn. DIR/tuning.json is written after every kernel and problem, and what it
holds is not measured again: a run that ``--seconds`` cut short goes on where it stopped. Winners are put into
kernels/configs.py by hand: its table is short on purpose.
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
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from benchmarks import measure
from benchmarks.gpu import worker
from benchmarks.machine import machine_info
from benchmarks.measure import Call, Oracle, Problem
from reattn.backends.common import MAX_HEAD_DIM, MAX_HEADS
from reattn.kernels import configs
from reattn.kernels.configs import Tile

# By kernel the norm and the direction that run it.
WHERE = {
    "forward": ("layer", "forward"),
    "grad_maps": ("layer", "forward+backward"),
    "grad_query": ("layer", "forward+backward"),
    "grad_key": ("layer", "forward+backward"),
}
# batch, heads, seqlen, head_dim of the official models, and 64
SHAPES = ((128, 12, 197, 32), (128, 12, 197, 33), (128, 12, 197, 64))
COMPILERS = max(1, min(16, (os.cpu_count() or 2) - 2))


class Job(NamedTuple):
    kernel: str
    problem: Problem

    @property
    def direction(self) -> str:
        return WHERE[self.kernel][1]

    @property
    def name(self) -> str:
        return f"{self.kernel} {'x'.join(map(str, self.problem.shape))}"

    def candidates(self) -> list[Tile]:
        return configs.candidates(self.kernel, self.problem.dtype.itemsize, self.problem.heads)


def jobs() -> list[Job]:
    return [
        Job(kernel, Problem(*shape, norm, torch.bfloat16)) for shape in SHAPES for kernel, (norm, _) in WHERE.items()
    ]


@contextlib.contextmanager
def in_table(job: Job, tile: Tile) -> Iterator[None]:
    """The tile that the kernel takes for the job's dtype, whatever heads and head_dim."""
    rows = configs.TABLE[job.kernel]
    first = configs.Row(job.problem.dtype.itemsize, MAX_HEADS, MAX_HEAD_DIM, tile)
    configs.TABLE[job.kernel] = (first, *rows)
    try:
        yield
    finally:
        configs.TABLE[job.kernel] = rows


def with_tile(job: Job, tile: Tile, call: Callable[..., Any]) -> Callable[..., Any]:
    def tiled(*args: Any) -> Any:
        with in_table(job, tile):
            return call(*args)

    return tiled


def make_calls(job: Job, device: torch.device) -> list[Call]:
    contender = measure.operator(job.problem.norm, "triton")
    parameters = measure.make_parameters(job.problem, device)
    backward = job.direction != "forward"
    inputs = measure.rotating_inputs(job.problem, device)
    return [measure.make_call(contender, each, parameters, backward) for each in inputs]


def compile_tile(job: Job, tile: Tile) -> None:
    """Leaves the compiled kernel in Triton's cache on disk, and runs nothing; for a process of its own."""
    call = worker.operator_call(measure.operator(job.problem.norm, "triton"), job.problem, job.direction != "forward")
    with worker.compiled_only("triton"):
        measure.attempt(with_tile(job, tile, call))


def measure_job(
    job: Job,
    device: torch.device,
    without: Container[str] = (),
    begin: Callable[[str, float, bool], None] = lambda step, seconds, optional: None,
) -> dict[str, Any]:
    """Milliseconds of the operator by tile, and by tile why it has none.

    ``begin`` is told what comes next, how many seconds it may take, and whether it can be left out: the tiles
    ``without`` are.
    """
    begin("compiling", 200.0, False)
    tiles = job.candidates()
    with ProcessPoolExecutor(COMPILERS, mp_context=get_context("spawn")) as pool:
        # What was not compiled here is where it is checked.
        measure.attempt(lambda: list(pool.map(functools.partial(compile_tile, job), tiles)))
    oracle = Oracle(job.problem, device, distinct=4)
    calls = make_calls(job, device)
    contender = measure.operator(job.problem.norm, "triton")
    faults, right = {}, {}
    for tile in tiles:
        if _key(tile) in without:
            faults[_key(tile)] = "hung or crashed"
            continue
        begin(_key(tile), 20.0, True)
        check = functools.partial(oracle.check, str(tile), with_tile(job, tile, contender), ours=True)
        _, status = measure.attempt(check)
        if status == "ok":
            right[_key(tile)] = [with_tile(job, tile, call) for call in calls]
        else:
            faults[_key(tile)] = status
    begin("timing", 90.0, False)
    turns, failed = measure.time_in_turns(right, device)
    return {
        "ms": {key: statistics.median(series) for key, series in turns.items()},
        "faults": {**faults, **failed},
    }


def run(
    todo: Sequence[Job],
    path: pathlib.Path,
    seconds: float,
    device: torch.device,
    measure_one: Callable[[Job, torch.device], dict[str, Any]] = measure_job,
) -> dict[str, Any]:
    """Measures what ``path`` does not hold yet, until the time is up, and returns all of it."""
    begin = time.monotonic()
    report = {"machine": machine_info(device), "jobs": {}}
    if path.is_file():
        before = json.loads(path.read_text())
        if before["machine"]["device"] != report["machine"]["device"]:
            raise SystemExit(f"{path} is of a {before['machine']['device']}, this is a {report['machine']['device']}")
        report = before
    for job in todo:
        if job.name in report["jobs"] or time.monotonic() - begin > seconds:
            continue
        problem = {**asdict(job.problem), "dtype": str(job.problem.dtype)}
        report["jobs"][job.name] = {"kernel": job.kernel, "problem": problem, **measure_one(job, device)}
        print(line(job, report["jobs"][job.name], device), flush=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(partial, path)
    return report


def line(job: Job, found: dict[str, Any], device: torch.device) -> str:
    """The best tile, beside the table's."""
    if not found["ms"]:
        return f"{job.name}: no tile runs, {found['faults']}"
    best = min(found["ms"], key=found["ms"].__getitem__)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    arch = 10 * capability[0] + capability[1]
    now = _key(configs.tile(job.kernel, arch, job.problem.dtype.itemsize, job.problem.heads, job.problem.head_dim))
    return (
        f"{job.name}, {job.direction}: Tile({best}) {found['ms'][best]:.4f} ms, "
        f"the table's Tile({now}) {found['ms'].get(now, float('nan')):.4f} ms, {len(found['faults'])} do not run"
    )


def _key(tile: Tile) -> str:
    return ", ".join(map(str, tile))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for tuning.json")
    parser.add_argument("--seconds", type=float, default=480.0, help="begin nothing later than this (default 480)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"needs a CUDA device, and torch {torch.__version__} sees none")
    device = torch.device("cuda", torch.cuda.current_device())
    measure.fused_backends(device)
    options.out.mkdir(parents=True, exist_ok=True)
    todo = jobs()
    report = run(todo, options.out / "tuning.json", options.seconds, device)
    missing = [job.name for job in todo if job.name not in report["jobs"]]
    print(f"not measured yet, run again: {', '.join(missing)}" if missing else "all measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
