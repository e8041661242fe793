"""Streams and graphs, accesses checked by compute-sanitizer, and hardware counters of launches by Nsight Compute."""

from __future__ import annotations

import csv
import json
import pathlib
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.gpu import cases, table
from benchmarks.gpu.pool import NO_TIME, NOT_RUN, Job, run_command
from benchmarks.gpu.run import Run

# What Triton and CUDA launch that takes most of a step.
PROFILED = ("forward", "grad_maps", "grad_query", "grad_key", "backward", "products")
SECTIONS = ("SpeedOfLight", "WarpStateStats", "LaunchStats", "Occupancy", "InstructionStats")
METRICS = (
    "gpu__time_duration.sum",
    "smsp__inst_executed.sum",
    "smsp__inst_issued.sum",
    "dram__bytes.sum",
    "lts__t_bytes.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "smsp__inst_executed_op_local_ld.sum",
    "smsp__inst_executed_op_local_st.sum",
)
TOOLS = ("memcheck", "racecheck", "initcheck")
# Of the budget; seconds of a tool, and of the counters of a backend.
WARM_UNTIL, WATCHED_UNTIL, SANITIZER_SECONDS, NCU_SECONDS = 0.4, 0.75, 60, 60
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
# Columns of the table, and what they are made of: nanoseconds and counts as `--print-units base` gives them.
SHOWN = {
    "us": ("gpu__time_duration.sum", 1e-3),
    "M instructions": ("smsp__inst_issued.sum", 1e-6),
    "M shared wavefronts": ("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum", 1e-6),
    "M bank conflicts": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", 1e-6),
    "device MB": ("dram__bytes.sum", 1e-6),
    "L2 MB": ("lts__t_bytes.sum", 1e-6),
    "registers": ("launch__registers_per_thread", 1.0),
}


def worker_command(request: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.worker", "--job", json.dumps(request)]


def ncu_command(request: dict[str, Any], log: pathlib.Path, metrics: Iterable[str] = METRICS) -> list[str]:
    """Profiled are the kernels' launches between the profiler's start and stop; the card's clocks stay as they are."""
    kernels = f"regex:^({'|'.join(PROFILED)})(_kernel)?$"
    options = ["--clock-control", "none", "--profile-from-start", "off", "--kernel-name", kernels]
    options += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
    for section in SECTIONS:
        options += ["--section", section]
    if chosen := ",".join(metrics):
        options += ["--metrics", chosen]
    return ["ncu", *options, *worker_command(request)]


def read_ncu(text: str) -> dict[str, dict[str, float | str]]:
    """By kernel every metric: the lines of CSV in what ncu wrote, a row of names, one of units, one a launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.reader(lines))
    if len(rows) < 3:
        return {}
    names, found = rows[0], {}
    for row in rows[2:]:
        values = dict(zip(names, row, strict=False))
        kernel = re.search(rf"\b({'|'.join(PROFILED)})(_kernel)?\b", values.get("Kernel Name", ""))
        if kernel:
            found[kernel[1]] = {name: _number(value) for name, value in values.items() if value != ""}
    return found


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def stalls(metrics: dict[str, Any]) -> dict[str, float]:
    """Warps stalled for each issue, by reason, the largest first."""
    found = {match[1]: value for name, value in metrics.items() if (match := STALL.fullmatch(name))}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def shown(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: metrics[metric] * factor for name, (metric, factor) in SHOWN.items() if metric in metrics}


def sanitizer_command(tool: str, problems: list[dict[str, Any]]) -> list[str]:
    """The kernels of torch are none of its business."""
    watched = worker_command({"kind": "step", "backend": "cuda", "cases": problems})
    # Bindings ask the driver for functions that it does not have, which is no error of ours.
    api = ["--report-api-errors", "no"] if tool == "memcheck" else []
    options = ["--tool", tool, *api, "--error-exitcode", "9", "--kernel-regex", "kns=reattn"]
    return ["compute-sanitizer", *options, *watched]


def read_sanitizer(text: str) -> tuple[int | None, list[str]]:
    """How many errors it found, None if it did not get to its summary; and its first lines."""
    summary = re.search(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    lines = [line for line in text.splitlines() if line.startswith("=========")]
    return (int(summary[1] or summary[2]) if summary else None), lines[:20]


def profile(run: Run) -> None:
    """All is compiled first. Then streams, graphs and compute-sanitizer's tools at once, as none is timed, and at last
    the counters of the longest launches, one backend at a time."""
    run.set_up()
    until = run.clock.elapsed() + WARM_UNTIL * run.clock.budget
    run.stage("compiling", cases.profile_warm_jobs(run.sizes), until)
    until = WATCHED_UNTIL * run.clock.budget
    sanitized = [Job(f"compute-sanitizer {tool}", {"kind": "sanitize", "tool": tool}) for tool in TOOLS]
    run.jobs += sanitized
    threads = [threading.Thread(target=sanitize, args=(run, job, until), daemon=True) for job in sanitized]
    for thread in threads:
        thread.start()
    if not run.emulated:
        run.stage("streams and graphs", cases.stream_jobs(run.sizes), until)
    run.pool.close()
    for thread in threads:
        thread.join()
    for job in sanitized:
        run.say(f"{job.name}: {table.status(job.result)}")
    run.write()
    wanted = {"kind": "launches", "shape": run.sizes.profiled, "norm": "layer"}
    for backend in cases.BACKENDS:
        job = Job(f"ncu {backend}", {**wanted, "backend": backend})
        run.jobs.append(job)
        job.result = watched(run, "ncu", lambda job=job: count(run, job))
        for kernel, metrics in job.result.get("metrics", {}).items():
            counted = Job(f"{backend} {kernel}", {"kind": "counters"})
            counted.result = {"status": "ok", "shown": shown(metrics), "stalls": stalls(metrics)}
            run.jobs.append(counted)
        run.say(f"{job.name}: {table.status(job.result)}")
        run.write()
    stalled = [
        f"{record['name']}: {', '.join(f'{name} {value:.2f}' for name, value in list(record['stalls'].items())[:6])}"
        for record in run.records("counters")
    ]
    run.print_table(
        ("Hardware counters", table.counters(run.records("counters"))),
        ("Warps stalled for each issue", stalled),
    )


def watched(run: Run, program: str, watch: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if run.emulated:
        return {"status": NOT_RUN, "error": "emulated"}
    if shutil.which(program) is None:
        return {"status": NOT_RUN, "error": f"{program} is not installed"}
    return watch()


def count(run: Run, job: Job) -> dict[str, Any]:
    """Counters of one backend's launches; without those metrics that this ncu may not know, if it refuses them."""
    path = run.out / f"{job.name.replace(' ', '-')}.csv"
    result: dict[str, Any] = {}
    for metrics in (METRICS, ()):
        result = run_command(ncu_command(job.request, path, metrics), min(NCU_SECONDS, run.clock.left() - 5), run.log)
        text = path.read_text(errors="replace") if path.is_file() else ""
        if metrics_by_kernel := read_ncu(text):
            return {**result, "metrics": metrics_by_kernel}
        if result["status"] == NOT_RUN:
            return result
        said = [line for line in text.splitlines() if line.startswith("==ERROR==")]
        said.append(f"no counters: {result.get('error', 'nothing read')}")
        result |= {"status": "failed", "error": said[0]}
    return result


def sanitize(run: Run, job: Job, until: float) -> None:
    tool = job.request["tool"]
    job.result = watched(run, "compute-sanitizer", lambda: read_tool(run, tool, until))


def read_tool(run: Run, tool: str, until: float) -> dict[str, Any]:
    path = run.out / f"{tool}.log"
    with path.open("w") as log:
        seconds = min(SANITIZER_SECONDS, run.clock.left(until))
        result = run_command(sanitizer_command(tool, cases.WATCHED), seconds, log)
    errors, lines = read_sanitizer(path.read_text(errors="replace"))
    if errors:
        return {**result, "status": "wrong", "error": f"{errors} reported: {' '.join(lines[1:4])}", "lines": lines}
    if result["status"] == "hang" and seconds < SANITIZER_SECONDS:
        return {**result, "status": NOT_RUN, "error": f"{NO_TIME}: cut off after {seconds:.0f} s"}
    if result["status"] == "ok" and errors is None:
        return {**result, "status": "failed", "error": "no summary"}
    return result
