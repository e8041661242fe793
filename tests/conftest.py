"""What every test shares: the device, kernels that run without a GPU, and a choice of tiles."""

import os

import pytest
import torch

# Before anything imports reattn: Triton decides when its kernels are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_configure(config):
    # Lanes that are masked when they are stored may overflow before; NumPy, which interprets the kernels, speaks of it.
    for what in ("overflow encountered", "invalid value encountered"):
        config.addinivalue_line("filterwarnings", f"ignore:{what}:RuntimeWarning")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def use_tile(monkeypatch):
    """Cuts every kernel as the given tile says, or as a function of ``configs.tile``'s arguments does."""
    from reattn.backends import triton
    from reattn.kernels import configs

    def use(tile):
        choose = tile if callable(tile) else lambda *problem: tile

        def tiled(kernel, query, launch):
            return launch(choose(kernel, 80, query.element_size(), query.shape[1], query.shape[3]))

        monkeypatch.setattr(triton, "_tiled", tiled)

    assert configs.tile
    return use
