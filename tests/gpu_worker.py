"""A worker of `make gpu` that computes nothing, and does what GPU_FAULTS says: hang, crash, or be wrong somewhere."""

import json
import os
import pathlib
import sys
import time

from benchmarks.gpu import worker

STEPS = {
    "layer": ("forward", "backward", "products", "unfold"),
    "batch-training": ("forward", "finish", "grad_sums", "add_up", "backward", "products", "unfold"),
    "none": ("forward", "backward", "products", "unfold"),
}
# [{"where": what the request must hold, "step": name, "do": "hang", "crash" or "wrong"}]
FAULTS = json.loads(os.environ.get("GPU_FAULTS", "[]"))
SECONDS = float(os.environ.get("GPU_SECONDS", "0"))


def begin(answers, step, request, optional=False):
    faults = [
        fault["do"]
        for fault in FAULTS
        if step == fault["step"] and all(request.get(name) == value for name, value in fault["where"].items())
    ]
    answers.begin(step, 0.7 if "hang" in faults else SECONDS + 5, optional)
    for fault in faults:
        if fault == "hang":
            time.sleep(600)
        if fault == "crash":
            os.abort()
        raise AssertionError("output: error 1, allowed 0.1")
    time.sleep(SECONDS)


def kernels(answers, without, **request):
    steps = [step for step in STEPS[request["mode"]] if step not in without]
    for step in steps:
        begin(answers, step, request, optional=True)
    return {"kernels": dict.fromkeys(steps, "ran" if without else "ok")}


def parity(answers, without, **request):
    begin(answers, "running", request)
    names = ("output", "query gradient", "key gradient", "value gradient")
    return {"errors": dict.fromkeys(names, 1e-3)}


def nothing(answers, without, **request):
    begin(answers, "running", request)
    return {}


def machine(answers, without):
    rates = {"flops_per_s": {"bfloat16": 1e15}, "bytes_per_s": 3e12}
    told = {"device": "NVIDIA Fake", "reattn": "0", "python": "3", "torch": "2", "triton": "3", "cuda": "13"}
    told |= {"compute_capability": "9.0", "multiprocessors": 132, "memory_bytes": 8e10, "l2_bytes": 5e7, "driver": "1"}
    return {"machine": {**told, "commit": None, "modified": None, "date": "now", "ceilings": rates}}


def kernel_times(answers, shape, norm, backends, without, **request):
    ms = {f"{backend} forward": 0.2 for backend in backends}
    return {"ms": ms, "launches": dict.fromkeys(ms, 7), "by_host": {}, "faults": {}}


def operator(answers, shape, norm, direction, contenders, without, of="operator", **request):
    ms = {}
    for name in contenders:
        if name not in without:
            begin(answers, name, {"norm": norm, "shape": shape, "direction": direction}, optional=True)
            ms[name] = 1.0 + len(ms)
    facts = dict(zip(("batch", "heads", "seqlen", "head_dim"), shape, strict=True))
    facts |= {"kind": of, "norm": norm, "dtype": "bfloat16", "direction": direction, "faults": {}}
    facts |= {"best_peer": "eager", "tflops": 1.0, "share_of_roofline": 0.1, "bound": "memory", "peak_bytes": 1}
    facts |= {"ratio_to_sdpa": 2.0, "ratio_to_best_peer": 0.5, "all_peak_bytes": {}, "all_ms": ms}
    facts |= {"host_us": 30.0, "graph_ms": 0.25}
    stats = {"median": 1e-3, "iqr": 1e-5, "rounds": 11}
    entries = [
        {"name": name, "group": "", "stats": stats}
        | {"extra_info": {**facts, "contender": name, "ours": name in ("triton", "cuda"), "ms": ms[name]}}
        for name in ms
    ]
    return {"benchmarks": entries, "ms": ms, "peak_bytes": dict.fromkeys(ms, 1e6), "faults": {}} | {
        "host_us": dict.fromkeys(ms, 30.0),
        "graph_ms": dict.fromkeys(ms, 0.25),
    }


def model(answers, contenders, without, **request):
    return {"ms": dict.fromkeys(contenders, 1.0), "peak_bytes": {}, "faults": {}}


def forecast(answers, card, without):
    told = {"backend": "triton", "kernel": "forward", "shape": "128x12x197x64", "norm": "layer"}
    return {"forecasts": [{**told, "seconds": 1e-4, "binding": "issue"}]}


if __name__ == "__main__":
    if folder := os.environ.get("GPU_PROCESSES"):
        pathlib.Path(folder, str(os.getpid())).touch()
    worker.set_up = lambda emulated: None
    fakes = (kernels, parity, machine, kernel_times, operator, model, forecast)
    worker.HANDLERS.update({fake.__name__: fake for fake in fakes})
    worker.HANDLERS.update(dict.fromkeys(("warm", "warm_step", "warm_compiled", "stream", "graph"), nothing))
    sys.exit(worker.serve())
