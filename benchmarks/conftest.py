"""What the benchmarks share: their options, a time limit, and a machine that is named in the results."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from benchmarks import machine
from benchmarks.machine import ceilings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small problems, once each: is all right, does it run")
    parser.addoption(
        "--every-peer", action="store_true", help="compile the eager forms for every problem, not only for some"
    )
    parser.addoption("--seconds", type=float, help="begin no benchmark later than this after the first")


def pytest_report_header() -> str:
    if torch.cuda.is_available():
        return f"reattn: benchmarks on {torch.cuda.get_device_name()}"
    return f"reattn: benchmarks on the CPU; those on a GPU are skipped, as torch {torch.__version__} sees none"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--quick"))


@pytest.fixture(scope="session")
def deadline(pytestconfig: pytest.Config) -> float:
    seconds = pytestconfig.getoption("--seconds")
    return float("inf") if seconds is None else time.monotonic() + seconds


@pytest.fixture(autouse=True)
def within_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        pytest.skip("no time left")


@pytest.fixture(scope="session", autouse=True)
def true_float32() -> Iterator[None]:
    """The kernels compute float32 products in float32: the peers' convolutions shall do so as well."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info["reattn"] = {**machine.machine_info(device), "ceilings": ceilings(device)}
