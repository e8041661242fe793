"""Kernels on a CUDA device: loaded once, launched through the driver. The emulator takes this one's place in tests."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from reattn.backends import cuda_compile
from reattn.backends.cuda_compile import Code, Kernel


def _install() -> str:
    """What brings the packages, of the CUDA release that torch is built for."""
    extra = "cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda"
    return f"pip install 'reattn[{extra}]' brings it"


class Loaded(NamedTuple):
    """A kernel that can be launched on a device; ``function``: what the driver launches."""

    kernel: Kernel
    function: Any


class Driver(Protocol):
    """What the backend asks of a device."""

    def target(self, device: int) -> str:
        """What its kernels are compiled for: see :func:`reattn.backends.cuda_compile.target`."""
        ...

    def describe(self, device: int) -> tuple[int, int]:
        """Bytes of shared memory that a block may have; multiprocessors."""
        ...

    def load(self, device: int, kernel: Kernel, code: Code) -> Any:
        """What :meth:`launch` takes as ``function``."""
        ...

    def launch(
        self,
        loaded: Loaded,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        params: ctypes.Structure,
        tensors: Sequence[Tensor | None],
    ) -> None:
        """On the current device. ``tensors``: all that the kernel may touch."""
        ...


class CudaDriver:
    """NVIDIA's, by way of cuda-bindings."""

    def __init__(self) -> None:
        self._contexts: dict[int, Any] = {}

    def target(self, device: int) -> str:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the CUDA backend cannot load a kernel while a CUDA graph is captured: a call like this one, gradients"
                " included, has to come before"
            )
        major, minor = torch.cuda.get_device_capability(device)
        target = cuda_compile.target(10 * major + minor)
        assert target, "find_faults knows"
        return target

    def describe(self, device: int) -> tuple[int, int]:
        driver = _bindings()
        attributes = driver.CUdevice_attribute
        handle = _check(driver.cuDeviceGet(device), "cuDeviceGet")
        shared_bytes, multiprocessors = (
            _check(driver.cuDeviceGetAttribute(attribute, handle), "cuDeviceGetAttribute")
            for attribute in (
                attributes.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
                attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )
        )
        return shared_bytes, multiprocessors

    def load(self, device: int, kernel: Kernel, code: Code) -> Any:
        driver = _bindings()
        self._make_current(device)
        module = _check(driver.cuModuleLoadData(code.image + b"\0"), kernel.name)  # text ends with a zero
        function = _check(driver.cuModuleGetFunction(module, code.entry.encode()), kernel.name)
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, most, self.describe(device)[0]), kernel.name)
        return function

    def _make_current(self, device: int) -> None:
        """torch's context. Where its guard had nothing to change, the thread need not have one yet."""
        driver = _bindings()
        if device not in self._contexts:
            handle = _check(driver.cuDeviceGet(device), "cuDeviceGet")
            self._contexts[device] = _check(driver.cuDevicePrimaryCtxRetain(handle), "cuDevicePrimaryCtxRetain")
        _check(driver.cuCtxSetCurrent(self._contexts[device]), "cuCtxSetCurrent")

    def launch(
        self,
        loaded: Loaded,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        params: ctypes.Structure,
        tensors: Sequence[Tensor | None],
    ) -> None:
        driver = _bindings()
        (x, y), arguments = grid, ctypes.c_void_p(ctypes.addressof(params))  # where the one argument is
        launch = (loaded.function, x, y, 1, threads, 1, 1, shared_bytes, stream, arguments, 0)
        result = driver.cuLaunchKernel(*launch)
        if result[0] and result[0] == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread that has none yet
            self._make_current(torch.cuda.current_device())
            result = driver.cuLaunchKernel(*launch)
        if result[0]:
            _check(result, loaded.kernel.name)


@functools.cache
def _bindings() -> Any:
    from cuda.bindings import driver

    return driver


def _check(result: tuple[Any, ...], what: str) -> Any:
    """What a call of the driver returned beside its status; raises RuntimeError where that is an error."""
    status, *values = result
    if status:
        _, text = _bindings().cuGetErrorString(status)
        raise RuntimeError(f"{what}: {status.name} ({text.decode() if text else 'unknown error'})")
    return values[0] if values else None


def find_faults(device: int) -> list[str]:
    """Why kernels cannot be compiled for this device, or not be launched on it; whatever the kernel."""
    try:
        driver = _bindings()
    except Exception as error:  # broken in whatever way, it is for the user to know
        return [f"needs pip's cuda-bindings, which cannot be imported ({error}): {_install()}"]
    try:
        toolkit = cuda_compile.version()
    except Exception as error:  # of what class depends on the release
        return [f"needs NVRTC, pip's nvidia-cuda-nvrtc, which cannot be loaded ({_first_line(error)}): {_install()}"]
    try:
        cuda_compile.sources()
    except (ImportError, OSError) as error:
        return [f"needs the kernels' sources, reattn.csrc, which are not installed ({error})"]
    try:
        version = _check(driver.cuDriverGetVersion(), "cuDriverGetVersion")
    except Exception as error:
        return [f"no CUDA device: no NVIDIA driver can be loaded ({_first_line(error)})"]
    # Drivers serve all of a major version.
    if version // 1000 < toolkit[0]:
        return [
            f"needs an NVIDIA driver for CUDA {toolkit[0]}, which NVRTC compiles for, or newer; the one installed is"
            f" for CUDA {version // 1000}.{version % 1000 // 10}"
        ]
    try:
        _check(driver.cuInit(0), "no CUDA device")
        if not _check(driver.cuDeviceGetCount(), "no CUDA device"):
            return ["no CUDA device"]
    except RuntimeError as error:
        return [str(error)]
    try:
        major, minor = torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError) as error:
        return [f"torch sees no CUDA device ({error})"]
    oldest = cuda_compile.known_archs()[0]
    if cuda_compile.target(10 * major + minor) is None:
        return [
            f"needs compute capability {oldest // 10}.{oldest % 10} or higher, which NVRTC"
            f" {toolkit[0]}.{toolkit[1]} compiles for, got {major}.{minor}"
        ]
    return []


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0] or type(error).__name__


# The one in use, and its way to launch; see ``use``.
current: Driver = CudaDriver()
launch = current.launch
_loaded: dict[tuple[Kernel, int], Loaded] = {}
_lock = threading.Lock()


def use(driver: Driver) -> Driver:
    """Has another driver load and launch from now on; returns the one before."""
    global current, launch
    before, current, launch = current, driver, driver.launch
    with _lock:
        _loaded.clear()
    forget()
    return before


P = ParamSpec("P")
R = TypeVar("R")
_caches: list[functools._lru_cache_wrapper[Any]] = []


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """Its results are kept, as long as this driver is in use."""
    cached = functools.lru_cache(4096)(function)
    _caches.append(cached)
    return cast(Callable[P, R], cached)


def forget() -> None:
    """All that is :func:`remembered`."""
    for cached in _caches:
        cached.cache_clear()


@remembered
def describe(device: int) -> tuple[int, int]:
    """Bytes of shared memory that a block may have; multiprocessors."""
    return current.describe(device)


@remembered
def kernels(specs: tuple[Kernel, ...], device: int) -> tuple[Loaded, ...]:
    """The kernels, on the current device; those that are not there yet are compiled, all at once, and loaded."""
    with _lock:
        missing = [kernel for kernel in dict.fromkeys(specs) if (kernel, device) not in _loaded]
        if missing:
            codes = cuda_compile.compiled(missing, current.target(device))
            for kernel, code in zip(missing, codes, strict=True):
                _loaded[kernel, device] = Loaded(kernel, current.load(device, kernel, code))
        return tuple(_loaded[kernel, device] for kernel in specs)
