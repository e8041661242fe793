"""Hardware counters of single launches, by Nsight Compute, and accesses checked by compute-sanitizer."""

from __future__ import annotations

import csv
import json
import pathlib
import re
import sys
from collections.abc import Iterable
from typing import Any

PROFILED = ("forward", "backward_query")
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
    kernels = f"regex:^({'|'.join(PROFILED)})_kernel"
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
        kernel = re.search("|".join(PROFILED), values.get("Kernel Name", ""))
        if kernel:
            found[kernel[0]] = {name: _number(value) for name, value in values.items() if value != ""}
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


def sanitizer_command(tool: str, cases: list[dict[str, Any]]) -> list[str]:
    """The kernels of torch are none of its business."""
    watched = worker_command({"kind": "step", "backend": "cuda", "cases": cases})
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=reattn", *watched]


def read_sanitizer(text: str) -> tuple[int | None, list[str]]:
    """How many errors it found, None if it did not get to its summary; and its first lines."""
    summary = re.search(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    lines = [line for line in text.splitlines() if line.startswith("=========")]
    return (int(summary[1] or summary[2]) if summary else None), lines[:20]
