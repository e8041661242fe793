"""The machine that figures come from: its names and versions, what it reaches in a product and a copy, its memory."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import pathlib
import re
import resource
import subprocess
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.measure import Call, time_in_turns

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def ceilings(device: torch.device) -> dict[str, Any]:
    """What the device reaches: ``flops_per_s`` by dtype in a large matrix product, ``bytes_per_s`` both ways in a copy.

    On a CPU the product is the faster of torch's and NumPy's, which are two libraries', and no dtype has less than
    float32, which 16 bits can be computed in.
    """
    flops_per_s = {str(dtype).removeprefix("torch."): _flops_per_s(device, dtype) for dtype in DTYPES}
    if device.type == "cpu":
        flops_per_s = {name: max(rate, flops_per_s["float32"]) for name, rate in flops_per_s.items()}
    return {"flops_per_s": flops_per_s, "bytes_per_s": _bytes_per_s(device)}


def _bytes_per_s(device: torch.device) -> float:
    source = torch.randn(2**26 if device.type == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * _fastest(device, {"copy": lambda: target.copy_(source)}))


def _flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192
    if device.type == "cpu":
        size = 1536 if dtype == torch.float32 else 256
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    calls: dict[str, Call] = {"torch": lambda: left @ right}
    if device.type == "cpu" and dtype == torch.float32:
        calls["numpy"] = lambda: left.numpy() @ right.numpy()
    return 2 * size**3 / (1e-3 * _fastest(device, calls))


def _fastest(device: torch.device, calls: dict[str, Call]) -> float:
    """Milliseconds of the best turn of the fastest call: a ceiling is what can be reached."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(torch.get_num_threads()):
        turns, _ = time_in_turns({name: [call] for name, call in calls.items()}, device, seconds=0.3, rounds=3)
    return min(min(series) for series in turns.values())


def machine_info(device: torch.device) -> dict[str, Any]:
    """What a committed figure must say about where it comes from."""
    from reattn.backends import cpu
    from reattn.info import info

    facts = info()
    kept = {name: facts[name] for name in ("reattn", "python", "torch", "triton", "cuda")}
    root = pathlib.Path(__file__).parent
    changes = _first_line("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    machine: dict[str, Any] = {
        **kept,
        "commit": _first_line("git", "-C", str(root), "rev-parse", "HEAD") or None,
        "modified": None if changes is None else bool(changes),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cpu":
        machine |= {"device": _cpu_name(), "instruction_set": cpu.instruction_set(), "team": cpu.threads_from()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return machine


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that a call holds at its peak beyond what was there before, results included.

    To be asked after a first call. On CUDA as the allocator counts them; on a CPU by the process's resident memory, and
    None where the kernel, not Linux, does not tell its peak.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    from reattn.backends import cpu

    # What earlier calls left, for malloc or in the backend, would not be counted.
    cpu.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        # Written 5, the peak starts anew: proc_pid_clear_refs(5).
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _status("VmRSS")
    kept = call()
    del kept
    return max(_status("VmHWM") - before, 0)


@contextlib.contextmanager
def memory_limit(device: torch.device) -> Iterator[None]:
    """On a CPU, allocations fail that would not fit into what is free now, where the process would be killed."""
    if device.type != "cpu" or (free := free_memory()) is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _status("VmSize") + int(0.9 * free)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def free_memory() -> int | None:
    """Bytes that the machine has left, or the control group if it has less; None where the kernel does not tell."""
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
    except OSError:
        return None
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1])
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        # Files that were read count as used, until their place is needed.
        cached = int(re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)[1])
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used) + cached)


def _status(field: str) -> int:
    """Bytes, of this process."""
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", text)[1])


def _cpu_name() -> str:
    """As the kernel tells it; "cpu" where it does not."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "cpu")


def _first_line(*command: str) -> str | None:
    """Of what a command prints; None where it is not installed or fails."""
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return printed.stdout.partition("\n")[0] if printed.returncode == 0 else None
