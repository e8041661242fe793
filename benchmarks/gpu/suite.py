"""The tests that touch a GPU, by pytest, until the time is up."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.gpu.install import ROOT
from benchmarks.gpu.pool import GROUP, LIVE, NO_TIME, NOT_RUN, Job, end_group
from benchmarks.gpu.run import Run

# One test's, its compilation included.
TEST_SECONDS = 60
# One that had begun as long before the run was cut off is called a hang.
HANG_SECONDS = 30.0


def tests(run: Run) -> None:
    """Those that carry the mark ``device``; what was not run, and what had begun and did not end, is listed."""
    run.set_up()
    lines = run.out / "tests.jsonl"
    for path in run.out.glob("tests.jsonl*"):
        path.unlink()
    environment = os.environ | {"REATTN_GPU_LINES": str(lines), "PYTHONPATH": str(ROOT)}
    popen = subprocess.Popen(pytest_command(run), cwd=ROOT, env=environment, stdout=run.log, stderr=run.log, **GROUP)
    LIVE.add(popen)
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(run.clock.left() - 6)
    code, end = popen.poll(), time.time()
    end_group(popen)
    collected: set[str] = set()
    for path in run.out.glob("tests.jsonl.*"):
        collected |= set(json.loads(path.read_text()))
        path.unlink()
    outcomes = read_lines(lines.read_text()) if lines.is_file() else {}

    def note(name: str, status: str, error: str, **more: Any) -> None:
        job = Job(name, {"kind": "test"})
        job.result = {"status": status, "error": error, **more}
        run.jobs.append(job)

    for name, each in outcomes.items():
        if each["outcome"] == "failed":
            note(name, "failed", each["said"].strip().rpartition("\n")[2], said=each["said"])
        elif each["outcome"] == "begun":
            took = end - each["at"]
            status, why = ("hang", "had not ended") if took >= HANG_SECONDS else (NOT_RUN, f"{NO_TIME}: cut off")
            note(name, status, why, seconds=round(took, 1))
    left = sorted(collected - outcomes.keys())
    for name in left:
        note(name, NOT_RUN, NO_TIME)
    if not collected or (code is not None and left):
        note("pytest", "failed", f"ended with {code}: see {run.part}.log")
    said = [each["outcome"] for each in outcomes.values()]
    counts = {name: said.count(name) for name in ("passed", "failed", "skipped")}
    counts |= {"had not ended": said.count("begun"), "not run": len(left)}
    run.gpu["tests"] = {**counts, "cut off": code is None}
    run.write()
    run.print_table(("Tests", [", ".join(f"{count} {name}" for name, count in counts.items())]))


def pytest_command(run: Run) -> list[str]:
    """In as many processes as there are workers, a test that hangs ending its process; as far as plugins are there."""
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-m", "device", "-p", "benchmarks.gpu.pytest_lines"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(run.pool.workers), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        return [*command, "--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    run.say("pytest-timeout is not installed: a test that hangs holds its process to the end of the run")
    return [*command, "-o", f"faulthandler_timeout={TEST_SECONDS}"]


def read_lines(text: str) -> dict[str, dict[str, Any]]:
    """By test what became of it: a failure counts most, and "begun" is what has not ended."""
    outcomes: dict[str, dict[str, Any]] = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # the last one, cut off
            each = json.loads(line)
            if outcomes.get(each["test"], {}).get("outcome") != "failed":
                outcomes[each["test"]] = each
    return outcomes
