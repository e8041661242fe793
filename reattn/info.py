"""``python -m reattn.info``: what a report of a problem needs to say about the machine."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import reattn
from reattn.backends import cpu

_ENVIRONMENT = (
    "REATTN_BACKEND",
    "REATTN_AUTOTUNE",
    "REATTN_CACHE_DIR",
    "REATTN_CPU_ISA",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
)


def info() -> dict[str, Any]:
    """Versions, devices, backends and settings, as ``python -m reattn.info`` prints them.

    Returns:
        - ``reattn``, ``python``, ``platform``, ``torch``, ``triton``, ``cuda``: str, a version, or why there is none
        - ``cpu``: str, the CPU backend's instruction set and threads, or why it does not run
        - ``devices``: list of str, one for each CUDA device, empty without any
        - ``backends``: dict of name to list of str, see :func:`reattn.available_backends`
        - ``environment``: dict of variable to its value, None where it is not set
    """
    return {
        "reattn": reattn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "triton": _triton_version(),
        "cuda": torch.version.cuda or "none: torch is built without it",
        "cpu": _cpu(),
        "devices": _devices(),
        "backends": reattn.available_backends(),
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
    }


def _triton_version() -> str:
    try:
        import triton
    except ModuleNotFoundError as error:
        return f"not installed: {error}"
    # A broken installation is just what a report must show, whatever it raises.
    except Exception as error:
        return f"cannot be imported: {type(error).__name__}: {error}"
    return triton.__version__


def _cpu() -> str:
    reasons = cpu.unavailable(torch.device("cpu"))
    if reasons:
        return "; ".join(reasons)
    return f"{cpu.instruction_set()}, {torch.get_num_threads()} of {cpu.threads_from()}"


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"compute capability {device.major}.{device.minor}"
        devices.append(f"{device.name}, {capability}, {device.total_memory / 2**30:.1f} GiB")
    return devices


def _report(facts: dict[str, Any]) -> str:
    lines = [(name, facts[name]) for name in ("reattn", "python", "platform", "torch", "triton", "cuda", "cpu")]
    lines += [(f"device {index}", device) for index, device in enumerate(facts["devices"])]
    if not facts["devices"]:
        lines.append(("device", "no CUDA device"))
    for name, reasons in facts["backends"].items():
        lines += [(f"backend {name}", reason) for reason in reasons or ["available"]]
    lines += [(name, "not set" if value is None else value) for name, value in facts["environment"].items()]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


if __name__ == "__main__":
    print(_report(info()))
