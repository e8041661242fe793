"""One part of `make gpu`: its clock, its folder, its processes, and what it found."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu import cases, table
from benchmarks.gpu.install import find_card, install
from benchmarks.gpu.pool import NOT_RUN, Clock, Job, Pool


class Run:
    """``command`` starts a worker; ``now`` is a clock in seconds."""

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
            entries = job.result.pop("benchmarks", ())
            if not self.emulated:
                self.found["benchmarks"] += entries
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

    def set_up(self) -> None:
        """The card and the installation."""
        if self.emulated:
            self.gpu["card"] = "emulated"
            return
        card = find_card()
        self.gpu["card"] = card.name
        self.say(f"{card.name}, compute capability {card.capability}")
        installed = install(self.clock, self.log)
        self.gpu["install"] = installed
        self.write()
        if installed["status"] != "ok":
            raise RuntimeError(f"not installed: {table.status(installed)} (see {self.part}.log)")

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
        return not any(job.result and job.result["status"] not in ("ok", NOT_RUN) or job.lost for job in self.jobs)
