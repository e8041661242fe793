"""A plugin of pytest: a JSON line for every test as it begins and ends; a run that is cut off has told what it knew."""

from __future__ import annotations

import json
import os
import time

import pytest


class Lines:
    """Written by the process that the others report to."""

    def __init__(self, path: str) -> None:
        self._stream = open(path, "a")  # noqa: SIM115 (as long as the process)

    def _say(self, **line: object) -> None:
        self._stream.write(json.dumps({**line, "at": time.time()}) + "\n")
        self._stream.flush()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._say(test=nodeid, outcome="begun", seconds=0, said="")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            said = "" if report.outcome == "passed" else str(getattr(report, "longreprtext", ""))[-1500:]
            self._say(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), said=said)


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("REATTN_GPU_LINES")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Lines(path))


def pytest_collection_finish(session: pytest.Session) -> None:
    path = os.environ.get("REATTN_GPU_LINES")
    if path:
        # By every worker of pytest-xdist, each time the same.
        name = os.environ.get("PYTEST_XDIST_WORKER", "main")
        with open(f"{path}.{name}", "w") as stream:
            json.dump([item.nodeid for item in session.items], stream)
