"""``python -m benchmarks.gpu [check|tune|profile|tests]``: what `make gpu` runs, on a GPU that is there for minutes.

check    every kernel by itself, the operator against float64, times beside the forecasts
tune     which tiles of the Triton kernels are fastest
profile  hardware counters, compute-sanitizer, streams and graphs
tests    pytest, the tests that touch a GPU

Each ends within ``--seconds`` whatever hangs or crashes; what did not fit is listed. OUT/PART.json is written anew
after every job, and a table is printed at the end. check.json is what benchmarks/report.py reads. The exit status is 1
if anything that ran was not right.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu import cases, profile, table
from benchmarks.gpu.install import ROOT, Build, find_card, install
from benchmarks.gpu.pool import GROUP, LIVE, NO_TIME, NOT_RUN, Clock, Job, Pool, end_all, end_group, run_command

BUDGET = 280.0
# The shares of a run of `check`, in its seconds: what is not done by then is left out for what follows.
CORRECT_UNTIL = 0.46
BUILD_UNTIL = 0.6
TIMED_UNTIL = 0.96
COMPARE_SECONDS = 60.0


class TimeIsUp(Exception):
    """Of a run as a whole: what its stages should never come to."""


def _time_is_up(*_: Any) -> None:
    raise TimeIsUp


class Run:
    """One part: its clock, its folder, its processes, and what it found."""

    def __init__(self, options: argparse.Namespace, command: Sequence[str], now: Callable[[], float]) -> None:
        self.part, self.emulated, self.out = options.part, options.emulated, options.out
        self.clock = Clock(options.seconds, now)
        self.sizes = cases.EMULATED if self.emulated else cases.CARD
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = (self.out / f"{self.part}.log").open("w")
        # All but two cores compile, as the rest of the machine has something to do as well.
        self.pool = Pool(command, max(1, options.workers or (os.cpu_count() or 1) - 2), self.clock, self.log)
        self.found: dict[str, Any] = {"machine_info": {"reattn": {}}, "benchmarks": [], "gpu": {"part": self.part}}
        self.gpu = self.found["gpu"]
        self.jobs: list[Job] = []

    def write(self) -> None:
        """In one step: who reads it finds a whole file."""
        self.gpu |= {"seconds": round(self.clock.elapsed(), 1), "budget": self.clock.budget}
        self.gpu["jobs"] = [job.record() for job in self.jobs if job.result]
        partial = self.out / f"{self.part}.partial"
        partial.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(partial, self.out / f"{self.part}.json")

    def say(self, line: str) -> None:
        print(f"[{self.clock.elapsed():5.1f} s] {line}", flush=True)

    def stage(self, name: str, jobs: list[Job], until: float, **more: Any) -> None:
        """Jobs to the clock's second ``until``; the JSON is written as each ends."""
        self.jobs += jobs

        def done(job: Job) -> None:
            for entry in job.result.pop("benchmarks", ()):
                self.found["benchmarks"].append(entry)
            self.write()
            if job.result["status"] not in ("ok", NOT_RUN):
                self.say(f"{job.name}: {table.status(job.result).partition(chr(10))[0]}")

        begin = self.clock.elapsed()
        self.pool.run(jobs, until, done=done, **more)
        ok = sum(job.result["status"] == "ok" for job in jobs)
        self.gpu.setdefault("stages", {})[name] = {"from": round(begin, 1), "to": round(self.clock.elapsed(), 1)}
        self.say(f"{name}: {ok} of {len(jobs)} ok")
        self.write()

    def records(self, *kinds: str) -> list[dict[str, Any]]:
        return [job.record() for job in self.jobs if job.result and job.request["kind"] in kinds]

    def set_up(self) -> Build | None:
        """The card, the installation, and the extension's build begun; None where there is nothing to build."""
        if self.emulated:
            self.gpu["card"] = "emulated"
            return None
        card = find_card()
        self.gpu["card"] = card.name
        self.say(f"{card.name}, compute capability {card.capability}")
        installed = install(self.clock, self.log)
        self.gpu["install"] = installed
        self.write()
        if installed["status"] != "ok":
            raise RuntimeError(f"not installed: {table.status(installed)} (see {self.part}.log)")
        return Build(card, self.clock, self.out / "build.log").start()

    def built(self, build: Build | None, until: float) -> bool:
        """Waits for the extension, and notes what became of it."""
        if build is None:
            return True
        there = build.wait(until)
        self.gpu["build"] = build.result or {"status": NOT_RUN, "error": f"{NO_TIME}: not built yet"}
        self.say(f"CUDA extension: {table.status(self.gpu['build'])}")
        self.write()
        return there

    def print_table(self, *sections: tuple[str, list[str]]) -> None:
        """Then what is not right, and what was not run."""
        records = [job.record() for job in self.jobs if job.result]
        sections = (*sections, ("Not right", table.faults(records)), ("Not run", table.not_run(records)))
        card = "emulated: its times mean nothing" if self.emulated else self.gpu.get("card")
        print(f"\n== {card}, {self.part}, {self.clock.elapsed():.0f} of {self.clock.budget:.0f} s ==")
        for title, lines in sections:
            if lines:
                print("", title, *lines, sep="\n", flush=True)

    def right(self) -> bool:
        """Whether nothing that ran was wrong."""
        broken = self.gpu.get("build", {}).get("status", "ok") not in ("ok", NOT_RUN)
        return not broken and not any(
            job.result and job.result["status"] not in ("ok", NOT_RUN) or job.lost for job in self.jobs
        )


# The parts


def gates(build: Build | None) -> dict[str, Any]:
    return {"build": (lambda: "") if build is None else build.gate}


def check(run: Run) -> None:
    build, budget, sizes = run.set_up(), run.clock.budget, run.sizes
    in_bfloat16, *others = cases.parity_jobs(sizes)
    correct = [*cases.kernel_jobs(sizes), *in_bfloat16, *cases.warm_jobs(sizes), *itertools.chain(*others)]
    # Those of the extension begin as soon as it is there.
    correct.sort(key=lambda job: not job.needs)
    run.stage("correctness", correct, CORRECT_UNTIL * budget, gates=gates(build))
    there = run.built(build, BUILD_UNTIL * budget)
    late = [job for job in correct if job.needs and job.result["status"] == NOT_RUN]
    if there and late and run.clock.elapsed() < BUILD_UNTIL * budget:
        for job in late:
            run.jobs.remove(job)
        run.stage("correctness of what was built late", late, (BUILD_UNTIL + 0.04) * budget, gates=gates(build))

    # From here on one process has the card to itself.
    run.pool.close()
    told = Job("the machine", {"kind": "machine"})
    run.stage("the machine", [told], run.clock.elapsed() + 40, workers=1)
    run.found["machine_info"]["reattn"] = told.result.get("machine", {})
    lost = unsafe(run)
    able = tuple(told.result.get("able", cases.BACKENDS if there else cases.BACKENDS[:1]))
    timing = cases.timing_jobs(sizes, able)
    for job in timing:
        names = "backends" if "backends" in job.request else "contenders"
        mode = cases.MODE_OF[job.request.get("norm", "batch")]
        job.request[names] = [name for name in job.request[names] if (name, mode) not in lost]
    if lost:
        run.gpu["not_timed"] = sorted(map(list, lost))
        run.say(f"not timed, since they hung or crashed: {', '.join(' '.join(each) for each in sorted(lost))}")
    forecast = Job("forecast", {"kind": "forecast", "card": run.gpu["card"]})
    run.stage("timing", timing, TIMED_UNTIL * budget, workers=1)
    run.stage("forecast", [forecast], budget - 1, workers=1)
    rows = table.beside_forecast(run.records("kernel_times"), forecast.result.get("forecasts", ()))
    run.gpu["kernels"] = rows
    run.write()
    run.print_table(
        ("Launches one by one", table.kernels(run.records("kernels"))),
        ("Right, of those that were run", table.parity(run.records("parity"))),
        ("Times", table.comparisons(run.records("operator", "model"))),
        ("Kernels, measured beside forecast", table.forecast_table(rows)),
    )


def unsafe(run: Run) -> set[tuple[str, str]]:
    """Backends and norms of which something hung or crashed: they are not timed."""
    found = set()
    for job in run.jobs:
        if job.request["kind"] in ("kernels", "parity") and (job.lost or job.result["status"] in ("hang", "crash")):
            found.add((job.request["backend"], job.request["mode"]))
    return found


def tune(run: Run) -> None:
    run.set_up()
    if run.emulated:
        run.say("tiles are tuned on a card alone")
        return
    from benchmarks import tune as tuning

    jobs = [
        Job(each.name, {"kind": "tune", "job": each.name, "out": str(run.out)}, seconds=COMPARE_SECONDS)
        for each in tuning.jobs()
    ]
    run.stage("tuning", jobs, run.clock.budget - 3, workers=1)
    run.print_table(("Tiles", [job.result["line"] for job in jobs if "line" in job.result]))


def profile_part(run: Run) -> None:
    build = run.set_up()
    there = run.built(build, BUILD_UNTIL * run.clock.budget)
    if not run.emulated:
        until = run.clock.elapsed() + 0.15 * run.clock.budget
        run.stage("streams and graphs", cases.stream_jobs(run.sizes), until, workers=4, gates=gates(build))
    run.pool.close()
    wanted = {"kind": "launches", "shape": run.sizes.profiled, "norm": "layer"}
    small = [
        {"mode": mode, "heads": 3, "head_dim": 32, "seqlen": 50, "dtype": dtype}
        for mode, dtype in (("layer", "bfloat16"), ("batch-training", "bfloat16"), ("layer", "float32"))
    ]
    for backend in cases.BACKENDS:
        job = Job(f"ncu {backend}", {**wanted, "backend": backend})
        run.jobs.append(job)
        job.result = watched(run, "ncu", there or not cases.needs(backend), lambda job=job: count(run, job))
        for kernel, metrics in job.result.get("metrics", {}).items():
            shown = Job(f"{backend} {kernel}", {"kind": "counters"})
            shown.result = {"status": "ok", "shown": profile.shown(metrics), "stalls": profile.stalls(metrics)}
            run.jobs.append(shown)
        run.write()
    for tool in ("memcheck", "racecheck"):
        job = Job(f"compute-sanitizer {tool}", {"kind": "sanitize", "tool": tool})
        run.jobs.append(job)
        job.result = watched(run, "compute-sanitizer", there, lambda tool=tool: sanitize(run, tool, small))
        run.say(f"{job.name}: {table.status(job.result)}")
        run.write()
    stalls = [
        f"{record['name']}: {', '.join(f'{name} {value:.2f}' for name, value in list(record['stalls'].items())[:6])}"
        for record in run.records("counters")
    ]
    run.print_table(
        ("Hardware counters", table.counters(run.records("counters"))),
        ("Warps stalled for each issue", stalls),
    )


def watched(run: Run, program: str, there: bool, watch: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if run.emulated:
        return {"status": NOT_RUN, "error": "emulated"}
    if not there:
        return {"status": NOT_RUN, "error": "CUDA extension not built"}
    if shutil.which(program) is None:
        return {"status": NOT_RUN, "error": f"{program} is not installed"}
    return watch()


def count(run: Run, job: Job) -> dict[str, Any]:
    """Counters of one backend's launches; without those metrics that this ncu may not know, if it refuses them."""
    path = run.out / f"{job.name.replace(' ', '-')}.csv"
    result: dict[str, Any] = {}
    for metrics in (profile.METRICS, ()):
        result = run_command(profile.ncu_command(job.request, path, metrics), min(60, run.clock.left() - 5), run.log)
        text = path.read_text(errors="replace") if path.is_file() else ""
        if metrics_by_kernel := profile.read_ncu(text):
            return {**result, "metrics": metrics_by_kernel}
        if result["status"] == NOT_RUN:
            return result
        said = [line for line in text.splitlines() if line.startswith("==ERROR==")]
        said.append(f"no counters: {result.get('error', 'nothing read')}")
        result |= {"status": "failed", "error": said[0]}
    return result


def sanitize(run: Run, tool: str, small: list[dict[str, Any]]) -> dict[str, Any]:
    path = run.out / f"{tool}.log"
    with path.open("w") as log:
        result = run_command(profile.sanitizer_command(tool, small), min(80, run.clock.left() - 3), log)
    errors, lines = profile.read_sanitizer(path.read_text(errors="replace"))
    if errors:
        return {**result, "status": "wrong", "error": f"{errors} reported: {' '.join(lines[1:4])}", "lines": lines}
    if result["status"] == "ok" and errors is None:
        return {**result, "status": "failed", "error": "no summary"}
    return result


def tests(run: Run) -> None:
    """The tests that touch a GPU, until the time is up; each has its own limit."""
    build = run.set_up()
    there = run.built(build, BUILD_UNTIL * run.clock.budget)
    lines = run.out / "tests.jsonl"
    for path in run.out.glob("tests.jsonl*"):
        path.unlink()
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-m", "device", "-p", "benchmarks.gpu.pytest_lines"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(run.pool.workers), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "60", "--timeout-method", "thread"]
    else:
        run.say("pytest-timeout is not installed: a test that hangs ends with the whole run; the log has its stack")
        command += ["-o", "faulthandler_timeout=60"]
    environment = os.environ | {"REATTN_GPU_LINES": str(lines), "PYTHONPATH": str(ROOT)}
    if there and not run.emulated:
        environment["REATTN_BUILD_CPU"] = os.environ.get("REATTN_BUILD_CPU", "")
    popen = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=run.log, stderr=run.log, **GROUP)
    LIVE.add(popen)
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(run.clock.left() - 6)
    cut_off = popen.poll() is None
    end_group(popen)
    told = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
    collected = set()
    for path in run.out.glob("tests.jsonl.*"):
        collected |= set(json.loads(path.read_text()))
        path.unlink()
    outcomes: dict[str, dict[str, Any]] = {}
    for each in told:
        if outcomes.get(each["test"], {}).get("outcome") != "failed":
            outcomes[each["test"]] = each
    for name, each in outcomes.items():
        if each["outcome"] == "failed":
            job = Job(name, {"kind": "test"})
            job.result = {"status": "failed", "error": each["said"].strip().rpartition("\n")[2], "said": each["said"]}
            run.jobs.append(job)
    left = sorted(collected - outcomes.keys())
    said = [each["outcome"] for each in outcomes.values()]
    counts = {name: said.count(name) for name in ("passed", "failed", "skipped")}
    run.gpu["tests"] = {**counts, "not run": len(left), "cut off": cut_off, "left": left}
    if not collected or (not cut_off and left):
        job = Job("pytest", {"kind": "test"})
        job.result = {"status": "failed", "error": f"ended with {popen.returncode}: see {run.part}.log"}
        run.jobs.append(job)
    run.write()
    summary = ", ".join(f"{count} {name}" for name, count in counts.items())
    run.print_table(("Tests", [f"{summary}, {len(left)} not run{f': {NO_TIME}' if cut_off else ''}"]))


PARTS: dict[str, Callable[[Run], None]] = {"check": check, "tune": tune, "profile": profile_part, "tests": tests}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=about[2], formatter_class=form)
    parser.add_argument("part", nargs="?", choices=PARTS, default="check")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/gpu"), help="folder (default out/gpu)")
    parser.add_argument("--seconds", type=float, default=BUDGET, help=f"ended after that (default {BUDGET:.0f})")
    parser.add_argument("--workers", type=int, help="processes at once (default: all cores but two)")
    parser.add_argument("--emulated", action="store_true", help="the flow alone, small, on the CPU as in the tests")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    return options


def main(
    arguments: Sequence[str] | None = None,
    command: Sequence[str] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """The exit status. ``command``: another worker's."""
    options = parse(arguments)
    if command is None:
        command = [sys.executable, "-m", "benchmarks.gpu.worker", *(["--emulated"] if options.emulated else [])]
    run = Run(options, command, now)
    # Ended from outside, it ends what it started and has written what it knows.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)), signal.signal(signal.SIGALRM, _time_is_up)
    signal.setitimer(signal.ITIMER_REAL, options.seconds)
    try:
        PARTS[run.part](run)
    except TimeIsUp:
        run.gpu["error"] = "ended by its time"
        run.print_table()
        return 1
    except RuntimeError as error:
        run.gpu["error"] = str(error)
        print(f"make gpu: {error}", file=sys.stderr)
        return 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        run.write()
        run.pool.close()
        end_all()
        run.log.close()
        for number, handler in zip((signal.SIGTERM, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)
    return 0 if run.right() else 1


if __name__ == "__main__":
    sys.exit(main())
