"""What the benchmarks share: their options, and a machine that is named in the results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import machine
from benchmarks.compare import CUDA, DEVICE
from benchmarks.machine import ceilings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small problems, once each: is all right, does it run")
    parser.addoption(
        "--every-peer", action="store_true", help="compile the eager forms for every problem, not only for some"
    )


def pytest_report_header() -> str:
    if CUDA:
        return f"reattn: benchmarks on {torch.cuda.get_device_name()}"
    return f"reattn: benchmarks on the CPU; those on a GPU are skipped, as torch {torch.__version__} sees none"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--quick"))


@pytest.fixture(scope="session", autouse=True)
def convolutions() -> Iterator[None]:
    """The kernels compute float32 products in float32: so do the peers' convolutions, by their best algorithm."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, cudnn.benchmark = False, True
    yield
    cudnn.allow_tf32, cudnn.benchmark = before


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["reattn"] = {**machine.machine_info(DEVICE), "ceilings": ceilings(DEVICE)}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict) -> None:
    """Results are kept in the repository: without single turns, and what name and ``extra_info`` say already."""
    for benchmark in output_json["benchmarks"]:
        del benchmark["stats"]["data"], benchmark["params"], benchmark["param"], benchmark["options"]
