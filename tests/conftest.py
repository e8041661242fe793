"""What every test shares: the device, and kernels that run without a GPU."""

import os

import pytest
import torch

# Before anything imports reattn: Triton decides when its kernels are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def table_tiles(monkeypatch):
    """The tiles of the table, under the interpreter too."""
    monkeypatch.undo()


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    """Under the interpreter a tile costs milliseconds whatever its size: large ones, with all of head_dim.

    Those of the table are tested row by row in test_backends.py.
    """
    if not torch.cuda.is_available():
        from reattn.kernels import configs

        monkeypatch.setattr(configs, "tile", lambda *problem: configs.Tile(32, 32))
