"""What every test shares: backend and device, kernels that run without a GPU, and a choice of tiles."""

import functools
import gc
import importlib.machinery
import importlib.util
import os
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]

# The extension that `make sanitize` builds takes the place of the one in reattn/, in this process alone.
if folder := os.environ.get("REATTN_CPU_FOLDER"):
    spec = importlib.machinery.PathFinder.find_spec("reattn._cpu", [folder])
    sys.modules["reattn._cpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["reattn._cpu"])

# As in CI: what is missing fails the tests that need it, which else are skipped.
NO_SKIPS = os.environ.get("REATTN_TEST_NO_SKIPS") == "1"
# Compiled kernels are kept apart.
os.environ.setdefault("REATTN_CACHE_DIR", str(ROOT / "out" / "cuda"))
# Without a GPU, kernels are compiled for one and executed by the emulator.
EMULATED_ARCH = 90
_installers = []
_not_emulated = {}  # backend: why
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "out" / "triton"))
    try:
        import emulator.cuda
    except ImportError as error:
        _not_emulated["cuda"] = str(error)
    else:
        _installers.append(emulator.cuda.install)
        emulator.cuda.install(EMULATED_ARCH)
    try:
        from emulator import triton_driver
    except ImportError as error:
        _not_emulated["triton"] = str(error)
    else:
        from reattn.backends import triton as triton_backend

        _installers.append(triton_driver.install)
        triton_driver.install(EMULATED_ARCH)
        triton_backend.EMULATED = True

from parity import FUSED, device_of  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    from reattn.backends import cpu

    skipped = {}
    if not torch.cuda.is_available():
        skipped["gpu"] = "needs a CUDA GPU"
    if not NO_SKIPS:
        if cpu._import_error:
            skipped["extension"] = "needs the CPU extension"
        if "cuda" in _not_emulated:
            skipped["cuda"] = f"needs a GPU or the emulator: {_not_emulated['cuda']}"
    for item in items:
        if "triton" in _not_emulated and not NO_SKIPS and runs_triton(item):
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU or the emulator: {_not_emulated['triton']}"))
        if touches_gpu(item):
            item.add_marker("device")
        for marker in skipped.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=skipped[marker]))


def pytest_collection_finish():
    # Triton's compiler makes objects by the million, and none of them are garbage that keeps much: a tenth of its time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


def touches_gpu(item) -> bool:
    """Whether the test runs something on the GPU if there is one: it says so, or by its fixtures."""
    if {"cuda", "gpu"} & {mark.name for mark in item.iter_markers()}:
        return True
    params = item.callspec.params if hasattr(item, "callspec") else {}
    backend = params.get("backend", params.get("gpu_backend"))
    alone = backend is None and "device" not in params and "device" in getattr(item, "fixturenames", ())
    return backend == "triton" or alone


def runs_triton(item) -> bool:
    """Whether the test runs the Triton backend's kernels: it says so, or by its parameters or fixtures."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    markers = {mark.name for mark in item.iter_markers()}
    if "triton" in (params.get("backend"), params.get("gpu_backend")) or "triton" in markers:
        return True
    compiles = {"compiled_for", "use_tile"} & set(getattr(item, "fixturenames", ()))
    return bool(compiles) and not {"cuda", "extension"} & markers


@pytest.fixture(params=FUSED)
def backend(request) -> str:
    """Each fused backend in turn."""
    return request.param


@pytest.fixture
def device(request) -> torch.device:
    """Where the test's backend runs; without one, the GPU if there is one."""
    return device_of(request.getfixturevalue("backend") if "backend" in request.fixturenames else "triton")


@pytest.fixture
def compiled_for(request):
    """Has the emulator execute what is compiled for another compute capability, 80 for 8.0; skips on a GPU of
    another."""

    def choose(arch):
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            if arch != 10 * major + minor:
                pytest.skip(f"this GPU has compute capability {major}.{minor}")
            return
        for install in _installers:
            install(arch)
            request.addfinalizer(functools.partial(install, EMULATED_ARCH))

    return choose


@pytest.fixture
def forget_plans():
    """To be called where a test changes what the CUDA backend decides by; once more at its end."""
    from reattn.backends import cuda_driver

    yield cuda_driver.forget
    cuda_driver.forget()


@pytest.fixture
def use_tile(monkeypatch):
    """Cuts every kernel as the given tile says, or as a function of ``configs.tile``'s arguments does."""
    from reattn.backends import triton
    from reattn.kernels import configs

    def use(tile):
        choose = tile if callable(tile) else lambda *problem: tile

        def table_tile(kernel, problem):
            return choose(kernel, 80, problem.dtype.itemsize, problem.most_heads, problem.head_dim)

        monkeypatch.setattr(triton, "_table_tile", table_tile)

    assert configs.tile
    return use


@pytest.fixture
def fresh_compiler():
    """torch.compile compiles a function so many times and no more, whichever test it was for."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
