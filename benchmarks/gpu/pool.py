"""Jobs in processes of their own, each with a time limit: one that hangs or crashes costs itself and no other.

A process (benchmarks/gpu/worker.py) reads jobs as JSON lines and answers with JSON lines: ``{"begin": step, "seconds":
limit, "optional": ...}`` before what may hang, ``{"result": ...}`` at a job's end. One that does not answer in time is
killed, one that dies is replaced. A job whose process was lost in an optional step is tried again without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

# In a group of its own, so that what it started ends with it, yet in the session of the caller, which may end all.
GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
# What runs, to be ended with everything else.
LIVE: set[subprocess.Popen] = set()
# How long a job may take to begin: a new process imports torch, then the job's kernels are compiled.
BEGIN_SECONDS = 90.0
# What is left of a stage must be at least as much for a job to begin.
LEAST_SECONDS = 3.0
NO_TIME = "no time"
NOT_RUN = "not run"


class Clock:
    """Seconds since it was made, and how many are left of a budget; ``now`` is a clock in seconds."""

    def __init__(self, budget: float, now: Callable[[], float] = time.monotonic) -> None:
        self.budget, self._now, self._begin = budget, now, now()

    def elapsed(self) -> float:
        return self._now() - self._begin

    def left(self, until: float = float("inf")) -> float:
        """Seconds to that second, or to the end of the budget if it comes first; not below 0."""
        return max(0.0, min(until, self.budget) - self.elapsed())


@dataclass
class Job:
    """What a worker is asked for: ``request``, with a ``kind``; and what became of it.

    ``result["status"]``: "ok"; "wrong", a result that is not exact enough; "failed", an exception; "hang", killed after
    its time limit; "crash", the process died; "not run".
    """

    name: str
    request: dict[str, Any]
    own_process: bool = False
    seconds: float = BEGIN_SECONDS
    result: dict[str, Any] = field(default_factory=dict)
    # By step in which a process was lost: "hang" or "crash". It is left out when the job is tried again.
    lost: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As it stands in the JSON."""
        kept = {name: value for name, value in self.request.items() if name != "without"}
        return {"name": self.name, **kept, **self.result, **({"lost": self.lost} if self.lost else {})}


class Process:
    """A worker; what it says goes into ``inbox`` as (process, message), and None once it is gone."""

    def __init__(self, command: Sequence[str], log: TextIO, inbox: queue.Queue, clock: Clock) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        self.popen = subprocess.Popen(command, **pipes, **GROUP)
        LIVE.add(self.popen)
        self.job: Job | None = None
        self.step, self.optional = "", False
        self.deadline = self.began = float("inf")
        self.jobs = 0
        self._clock = clock
        threading.Thread(target=self._read, args=(inbox,), daemon=True).start()

    def _read(self, inbox: queue.Queue) -> None:
        for line in self.popen.stdout:
            try:
                inbox.put((self, json.loads(line)))
            except ValueError:
                inbox.put((self, {"result": {"status": "failed", "error": f"not an answer: {line.strip()[:200]}"}}))
        inbox.put((self, None))

    def begin(self, job: Job) -> bool:
        """False if the process is gone already."""
        self.job, self.jobs = job, self.jobs + 1
        self.step, self.optional = "", False
        self.began = self._clock.elapsed()
        self.deadline = self.began + job.seconds
        try:
            self.popen.stdin.write(json.dumps({**job.request, "without": list(job.lost)}) + "\n")
            self.popen.stdin.flush()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        end_group(self.popen)


def end_group(popen: subprocess.Popen) -> None:
    """Ends a process and what it started. One that a driver holds may outlive this for a while; nothing waits long."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(2)
    LIVE.discard(popen)


def end_all() -> None:
    for popen in tuple(LIVE):
        end_group(popen)


class Pool:
    """``workers`` processes of ``command``; their standard error goes to ``log``."""

    def __init__(self, command: Sequence[str], workers: int, clock: Clock, log: TextIO) -> None:
        self.command, self.workers, self.clock, self.log = command, workers, clock, log
        self._inbox: queue.Queue = queue.Queue()
        self._processes: list[Process] = []

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        self._processes.clear()

    def run(
        self,
        jobs: Iterable[Job],
        until: float,
        workers: int | None = None,
        done: Callable[[Job], None] = lambda job: None,
    ) -> None:
        """Runs jobs in their order, to the clock's second ``until``.

        Every job has a result then: those that were not begun, or were cut off, "not run" and why.
        """
        waiting = list(jobs)
        workers = self.workers if workers is None else workers

        def finish(job: Job, **result: Any) -> None:
            job.result = result
            done(job)

        while waiting or any(process.job for process in self._processes):
            if self.clock.left(until) <= 0:
                break
            enough = self.clock.left(until) > LEAST_SECONDS
            while enough and waiting and sum(bool(process.job) for process in self._processes) < workers:
                job = waiting.pop(0)
                if not self._idle(job, workers).begin(job):
                    waiting.insert(0, job)
            if not enough and not any(process.job for process in self._processes):
                break
            self._wait(until, finish, waiting)
        for process in [process for process in self._processes if process.job]:
            finish(process.job, status=NOT_RUN, error=f"{NO_TIME}: cut off after {self._took(process):.0f} s")
            self._end(process)
        for job in waiting:
            finish(job, status=NOT_RUN, error=NO_TIME)

    def _took(self, process: Process) -> float:
        return self.clock.elapsed() - process.began

    def _idle(self, job: Job, workers: int) -> Process:
        """A process for the job: one without a job, else a new one."""
        idle = [process for process in self._processes if not process.job]
        fit = [process for process in idle if not (job.own_process and process.jobs)]
        if fit:
            return fit[0]
        if len(self._processes) >= workers and idle:
            self._end(idle[0])
        process = Process(self.command, self.log, self._inbox, self.clock)
        self._processes.append(process)
        return process

    def _end(self, process: Process) -> None:
        process.kill()
        self._processes.remove(process)

    def _wait(self, until: float, finish: Callable[..., None], waiting: list[Job]) -> None:
        """For one message, or for the first deadline."""
        deadline = min([until, *(process.deadline for process in self._processes if process.job)])
        with contextlib.suppress(queue.Empty):
            process, message = self._inbox.get(timeout=min(0.5, max(0.01, self.clock.left(deadline))))
            if process not in self._processes:
                return
            job = process.job
            if message is None:
                code = process.popen.wait()
                self._end(process)
                if job:
                    self._lose(job, process, "crash", f"the process ended with {_describe(code)}", finish, waiting)
            elif "begin" in message and job:
                process.step, process.optional = message["begin"], message.get("optional", False)
                process.deadline = self.clock.elapsed() + message["seconds"]
            elif "result" in message and job:
                took = round(self._took(process), 1)
                process.job, process.deadline = None, float("inf")
                fatal = message["result"].pop("fatal", False)
                if job.own_process or fatal:
                    self._end(process)
                if fatal:
                    self._lose(job, process, "crash", message["result"].get("error", ""), finish, waiting)
                else:
                    finish(job, **message["result"], seconds=took)
            return
        for process in [each for each in self._processes if each.job and self.clock.elapsed() >= each.deadline]:
            job, took = process.job, self._took(process)
            self._end(process)
            self._lose(job, process, "hang", f"killed after {took:.0f} s", finish, waiting)

    def _lose(
        self, job: Job, process: Process, status: str, error: str, finish: Callable[..., None], waiting: list[Job]
    ) -> None:
        """Tries the job again without the step in which the process was lost, if it is optional."""
        step, took = process.step, round(self._took(process), 1)
        process.job = None
        if process.optional:
            job.lost[step] = f"{status}: {error}"
            waiting.insert(0, job)
        else:
            finish(job, status=status, error=f"in {step}: {error}" if step else error, seconds=took)


def _describe(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"status {code}"


def run_command(
    command: Sequence[str],
    seconds: float,
    log: TextIO,
    environment: dict[str, str] | None = None,
    folder: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Runs a program, output to ``log``, as a result: "ok", "failed" with its status, "hang" if it was killed."""
    if seconds <= LEAST_SECONDS:
        return {"status": NOT_RUN, "error": NO_TIME}
    begin = time.monotonic()
    try:
        popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=folder, **GROUP
        )
    except OSError as error:
        return {"status": NOT_RUN, "error": f"{command[0]}: {error.strerror}"}
    LIVE.add(popen)
    try:
        code = popen.wait(seconds)
    except subprocess.TimeoutExpired:
        return {"status": "hang", "error": f"killed after {seconds:.0f} s", "seconds": round(seconds, 1)}
    finally:
        end_group(popen)
    result: dict[str, Any] = {"status": "ok", "seconds": round(time.monotonic() - begin, 1)}
    if code:
        result |= {"status": "failed", "error": f"it ended with {_describe(code)}"}
    return result
