"""What the benchmarks share: one comparison for every problem, and a machine that is named in the results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import measure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-peer", action="store_true", help="compile the eager forms for every problem, not only for the first"
    )


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def true_float32() -> Iterator[None]:
    """The kernels compute float32 products in float32: the peers' convolutions shall do so as well."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["reattn"] = measure.machine_info(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
