"""What the benchmarks share: their options, a time limit, and a machine that is named in the results."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Iterator

import pytest
import torch

from benchmarks import machine
from benchmarks.compare import CUDA, DEADLINE, DEVICE
from benchmarks.machine import ceilings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small problems, once each: is all right, does it run")
    parser.addoption(
        "--every-peer", action="store_true", help="compile the eager forms for every problem, not only for some"
    )
    parser.addoption("--seconds", type=float, help="begin no comparison later than this after the first")
    parser.addoption("--measured", type=pathlib.Path, help="leave out what the results in this folder hold")


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the comparisons that the files of ``--measured`` hold, whole ones: their contenders go together."""
    folder = config.getoption("--measured")
    if folder is None:
        return
    done = set()
    for path in folder.glob("*.json"):
        # Empty is the file that this run will write, or one that was cut off.
        text = path.read_text()
        for benchmark in json.loads(text)["benchmarks"] if text else ():
            done.add(_comparison(benchmark["name"], benchmark["extra_info"]["contender"]))
    left_out = [item for item in items if _comparison(item.name, item.callspec.params["contender"]) in done]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _comparison(name: str, contender: str) -> str:
    return name.removesuffix(f"-{contender}]")


@pytest.fixture(scope="session", autouse=True)
def begun(pytestconfig: pytest.Config, device: torch.device) -> None:
    """The clock runs; and what the machine reaches is known, should it not get to the end."""
    ceilings(device)
    seconds = pytestconfig.getoption("--seconds")
    DEADLINE.seconds = float("inf") if seconds is None else time.monotonic() + seconds


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
