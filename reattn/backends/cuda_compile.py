"""The kernels of csrc/cuda, compiled by NVRTC where they run, and kept on disk for the next process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.resources
import logging
import os
import pathlib
import stat
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from reattn.backends.cuda_plan import Params

logger = logging.getLogger("reattn")

OPTIONS = (
    "--std=c++17",
    "--device-as-default-execution-space",  # NVRTC takes no function without one, constexpr or not
    "--generate-line-info",  # for profilers, and for the emulator's reports
    f"-DREATTN_PARAMS_BYTES={ctypes.sizeof(Params)}",
)

# NVRTC has no standard headers. What the kernels use of them:
STANDARD_HEADERS = {
    "cstdint": """
#pragma once
using int32_t = int;
using int64_t = long long;
using uint16_t = unsigned short;
using uint32_t = unsigned;
using uint64_t = unsigned long long;
""",
    "cstring": "",  # memcpy and memset are built in
    "cmath": """
#pragma once
namespace std {
inline float sqrt(float x) { return ::sqrtf(x); }
inline double sqrt(double x) { return ::sqrt(x); }
}
""",
    "limits": """
#pragma once
namespace std {
template <class T> struct numeric_limits;
template <> struct numeric_limits<float> {
  static constexpr float infinity() { return __builtin_bit_cast(float, 0x7f800000); }
};
}
""",
    "type_traits": """
#pragma once
namespace std {
template <class A, class B> constexpr bool is_same_v = false;
template <class A> constexpr bool is_same_v<A, A> = true;
template <class T, T kValue> struct integral_constant { static constexpr T value = kValue; };
template <bool, class A, class B> struct conditional { using type = A; };
template <class A, class B> struct conditional<false, A, B> { using type = B; };
template <bool kFirst, class A, class B> using conditional_t = typename conditional<kFirst, A, B>::type;
}
""",
}


# Macros and what stands for them.
Constants = tuple[tuple[str, str | int], ...]


class Kernel(NamedTuple):
    """A kernel of ``csrc/cuda/<source>.cu``: its name in C++, and the macros that the source is compiled with."""

    source: str
    name: str
    constants: Constants = ()

    @property
    def function(self) -> str:
        """Its name without what stands around it, as in forward."""
        return self.name.rpartition("::")[2]


class Code(NamedTuple):
    """A compiled kernel: the name that it has there, and CUBIN or the text of PTX."""

    entry: str
    image: bytes


def _nvrtc() -> Any:
    from cuda.bindings import nvrtc

    return nvrtc


def _call(function: str, *arguments: Any) -> Any:
    nvrtc = _nvrtc()
    status, *results = getattr(nvrtc, function)(*arguments)
    if status:
        raise RuntimeError(f"{function}: {status.name}")
    return results[0] if results else None


def version() -> tuple[int, int]:
    """NVRTC's, which is that of its CUDA toolkit. Raises what there is to say where it is not installed."""
    status, major, minor = _nvrtc().nvrtcVersion()
    if status:
        raise RuntimeError(f"nvrtcVersion: {status.name}")
    return major, minor


@functools.cache
def known_archs() -> tuple[int, ...]:
    """Compute capabilities that NVRTC compiles for, ascending; 90 for 9.0."""
    return tuple(sorted(_call("nvrtcGetSupportedArchs")))


def target(arch: int) -> str | None:
    """What is compiled for a compute capability: its machine code, or PTX of the newest that NVRTC knows, which the
    driver compiles; None where that is newer."""
    older = [known for known in known_archs() if known <= arch]
    if not older:
        return None
    return f"sm_{arch}" if arch in older else f"compute_{older[-1]}"


_SUFFIXES = (".cu", ".cuh", ".h")


def folder() -> Any:
    """Of the sources."""
    return importlib.resources.files("reattn.csrc")


@functools.cache
def sources() -> dict[str, str]:
    """Every source by the name that csrc/cuda includes it by."""
    files = {f"../{file.name}": file for file in folder().iterdir() if file.name.endswith(".h")}
    files |= {file.name: file for file in (folder() / "cuda").iterdir() if file.name.endswith(_SUFFIXES)}
    return {name: file.read_text(encoding="utf-8") for name, file in sorted(files.items())}


@functools.cache
def _fingerprint() -> bytes:
    """Of everything that decides the code, but for the kernel and the target."""
    return hashlib.sha256(repr((version(), OPTIONS, STANDARD_HEADERS, sources())).encode()).digest()


def _bytes(what: str, program: Any) -> bytes:
    """The program's ``CUBIN``, ``PTX`` or ``ProgramLog``."""
    buffer = bytearray(_call(f"nvrtcGet{what}Size", program))
    _call(f"nvrtcGet{what}", program, buffer)
    return bytes(buffer)


def compile_text(text: str, name: str, target: str, file: str = "kernel.cu", constants: Constants = ()) -> Code:
    """A kernel of CUDA C++ that may include the headers of csrc/cuda, for ``sm_90`` as CUBIN, for ``compute_90`` as
    PTX; ``file`` is what line numbers are said to be of. Raises RuntimeError with what NVRTC says of the source."""
    return _compile_text(text, [name], target, file, constants)[0]


def _compile_text(text: str, names: Sequence[str], target: str, file: str, constants: Constants) -> list[Code]:
    """Kernels of the same text: they share an image."""
    headers = STANDARD_HEADERS | {name: text for name, text in sources().items() if not name.endswith(".cu")}
    options = [*OPTIONS, f"--gpu-architecture={target}", *(f"-D{macro}={value}" for macro, value in constants)]
    as_bytes = [[each.encode() for each in texts] for texts in (headers.values(), headers.keys(), options)]
    program = _call("nvrtcCreateProgram", text.encode(), file.encode(), len(headers), *as_bytes[:2])
    try:
        for name in names:
            _call("nvrtcAddNameExpression", program, name.encode())
        try:
            _call("nvrtcCompileProgram", program, len(options), as_bytes[2])
        except RuntimeError as error:
            log = _bytes("ProgramLog", program).decode(errors="replace").rstrip("\0")
            raise RuntimeError(f"{', '.join(names)} of {file}: {error}\n{log}") from None
        entries = [_call("nvrtcGetLoweredName", program, name.encode()).decode() for name in names]
        image = _bytes("CUBIN", program) if target.startswith("sm_") else _bytes("PTX", program).rstrip(b"\0")
        return [Code(entry, image) for entry in entries]
    finally:
        _call("nvrtcDestroyProgram", program)


def _compile(kernels: Sequence[Kernel], target: str) -> list[Code]:
    """Kernels of one source and the same constants."""
    file = f"{kernels[0].source}.cu"
    return _compile_text(sources()[file], [kernel.name for kernel in kernels], target, file, kernels[0].constants)


def compiled(kernels: Sequence[Kernel], target: str) -> list[Code]:
    """Each kernel's code: from disk, or compiled, several at a time, and kept there."""
    cache = _cache_folder()
    keys = [_key(kernel, target) for kernel in kernels]
    codes = {key: code for key in keys if cache and (code := _read(cache, key))}
    missing = {key: kernel for key, kernel in zip(keys, kernels, strict=True) if key not in codes}
    if missing:
        # NVRTC compiles all of a source's kernels, whichever are asked for.
        by_source: dict[tuple[str, Constants], list[str]] = {}
        for key, kernel in missing.items():
            by_source.setdefault((kernel.source, kernel.constants), []).append(key)
        kept = f"once: they are kept in {cache}" if cache else "for this process alone"
        logger.info("compiling CUDA kernels for %s, %d of them, %s", target, len(missing), kept)
        with ThreadPoolExecutor(min(len(by_source), os.cpu_count() or 1)) as threads:
            new = threads.map(lambda group: _compile([missing[key] for key in group], target), by_source.values())
            for group, group_codes in zip(by_source.values(), new, strict=True):
                for key, code in zip(group, group_codes, strict=True):
                    codes[key] = code
                    if cache:
                        _write(cache, key, code)
    return [codes[key] for key in keys]


def _key(kernel: Kernel, target: str) -> str:
    return hashlib.sha256(_fingerprint() + repr((kernel, target)).encode()).hexdigest()


def cache_path() -> pathlib.Path:
    """Of the folder that holds compiled kernels: REATTN_CACHE_DIR, or by the platform's convention."""
    if named := os.environ.get("REATTN_CACHE_DIR"):
        return pathlib.Path(named).expanduser().absolute()
    if sys.platform == "win32":
        return pathlib.Path(os.environ.get("LOCALAPPDATA") or pathlib.Path.home() / "AppData" / "Local", "reattn")
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "reattn")


def _cache_folder() -> pathlib.Path | None:
    """The folder, made where it is not there yet; None, with a line in the log, where it is not to be trusted: what
    lies there is run."""
    try:
        path = cache_path()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fault = _distrust(os.stat(path))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        _log_uncached(str(error))
        return None
    if fault:
        _log_uncached(f"{path} {fault}")
        return None
    return path


def _distrust(status: os.stat_result) -> str | None:
    """Why a file or folder may hold what somebody else put there."""
    if sys.platform == "win32":
        return None  # its own part of the disk is the user's alone
    if status.st_uid != os.geteuid():
        return "belongs to another user (name another folder by REATTN_CACHE_DIR)"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "may be written by other users (chmod go-w, or name another folder by REATTN_CACHE_DIR)"
    return None


@functools.cache
def _log_uncached(reason: str) -> None:
    """Once for each reason."""
    logger.warning("compiled CUDA kernels are not kept on disk: %s", reason)


def _digest(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + content).digest()


def _read(cache: pathlib.Path, key: str) -> Code | None:
    """What was kept; None where nothing was, or not all of it, or somebody else may have changed it."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(cache / key, flags), "rb") as file:
            if _distrust(os.fstat(file.fileno())):
                return None
            content = file.read()
    except OSError:
        return None
    digest, content = content[:32], content[32:]
    if digest != _digest(key, content):
        return None
    entry, image = content.split(b"\0", 1)
    return Code(entry.decode(), image)


def _write(cache: pathlib.Path, key: str, code: Code) -> None:
    content = code.entry.encode() + b"\0" + code.image
    try:
        with tempfile.NamedTemporaryFile(dir=cache, delete=False) as whole:
            try:
                whole.write(_digest(key, content) + content)
                whole.close()
                os.replace(whole.name, cache / key)  # other processes see all of it or nothing
            except OSError:
                os.unlink(whole.name)
                raise
    except OSError as error:
        _log_uncached(str(error))
