"""Whether the kernels are right, how fast they are, and how fast they were expected to be."""

from __future__ import annotations

import itertools

from benchmarks.gpu import cases, table
from benchmarks.gpu.pool import Job
from benchmarks.gpu.run import Run

# Of the budget: what is not done by then is left out for what follows.
CORRECT_UNTIL = 0.5
TIMED_UNTIL = 0.96
# A kernel's candidates are compiled before anything of it is known.
TUNE_SECONDS = 60.0


def check(run: Run) -> None:
    run.set_up()
    budget, sizes = run.clock.budget, run.sizes
    in_bfloat16, *others = cases.parity_jobs(sizes)
    forecast = Job("forecast", {"kind": "forecast", "card": run.gpu["card"]})
    correct = [*cases.kernel_jobs(sizes), *in_bfloat16, *cases.warm_jobs(sizes), forecast, *itertools.chain(*others)]
    run.stage("correctness", correct, CORRECT_UNTIL * budget)

    # From here on one process has the card to itself.
    run.pool.close()
    told = Job("the machine", {"kind": "machine"})
    run.stage("the machine", [told], run.clock.elapsed() + 40, workers=1)
    run.found["machine_info"]["reattn"] = told.result.get("machine", {})
    lost = unsafe(run)
    able = tuple(told.result.get("able", cases.BACKENDS))
    timing = cases.timing_jobs(sizes, able)
    for job in timing:
        names = "backends" if "backends" in job.request else "contenders"
        mode = cases.MODE_OF[job.request.get("norm", "batch")]
        job.request[names] = [name for name in job.request[names] if (name, mode) not in lost]
    if lost:
        run.gpu["not_timed"] = sorted(map(list, lost))
        run.say(f"not timed, since they hung or crashed: {', '.join(' '.join(each) for each in sorted(lost))}")
    run.stage("timing", timing, TIMED_UNTIL * budget, workers=1)
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
        Job(each.name, {"kind": "tune", "job": each.name, "out": str(run.out)}, seconds=TUNE_SECONDS)
        for each in tuning.jobs()
    ]
    run.stage("tuning", jobs, run.clock.budget - 3, workers=1)
    run.print_table(("Tiles", [job.result["line"] for job in jobs if "line" in job.result]))
