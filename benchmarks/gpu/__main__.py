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
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.check import check, tune
from benchmarks.gpu.pool import end_all
from benchmarks.gpu.profile import profile
from benchmarks.gpu.run import Run
from benchmarks.gpu.suite import tests

BUDGET = 280.0
PARTS: dict[str, Callable[[Run], None]] = {"check": check, "tune": tune, "profile": profile, "tests": tests}


class TimeIsUp(Exception):
    """Of a run as a whole: what its stages should never come to."""


def _time_is_up(*_: Any) -> None:
    raise TimeIsUp


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
