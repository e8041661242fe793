"""The kernels of csrc/cuda as PTX, compiled by NVRTC: from pip's ``nvidia-cuda-nvrtc``, with neither nvcc nor a GPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import re
import tempfile
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
CACHE = ROOT / "out" / "emulator" / "ptx"
# What the build has nvcc do, and lines of the sources for the emulator to name.
OPTIONS = (
    "--std=c++17",
    "-DNDEBUG",
    "--device-as-default-execution-space",  # NVRTC takes no function without one, constexpr or not
    "--generate-line-info",
)

# NVRTC has no standard headers. What the kernels use of them:
HEADERS = {
    "cstdint": """
#pragma once
using int32_t = int;
using int64_t = long;
using uint16_t = unsigned short;
using uint32_t = unsigned;
using uint64_t = unsigned long;
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
template <bool, class A, class B> struct conditional { using type = A; };
template <class A, class B> struct conditional<false, A, B> { using type = B; };
template <bool kFirst, class A, class B> using conditional_t = typename conditional<kFirst, A, B>::type;
}
""",
}


PACKAGE = "nvidia-cuda-nvrtc"


def _find_libraries() -> dict[str, Path]:
    """``libnvrtc`` and ``libnvrtc-builtins`` of pip's package; raises ImportError where they are not."""
    try:
        files = importlib.metadata.files(PACKAGE) or ()
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"pip's {PACKAGE} is not installed, which compiles csrc/cuda for the emulator") from None
    found = {match[1]: file for file in files if (match := re.match(r"(libnvrtc(?:-builtins)?)\.so", file.name))}
    if missing := {"libnvrtc", "libnvrtc-builtins"} - found.keys():
        raise ImportError(f"pip's {PACKAGE} holds no {' and no '.join(sorted(missing))}")
    return {name: Path(file.locate()) for name, file in found.items()}


LIBRARIES = _find_libraries()


@functools.cache
def _library() -> ctypes.CDLL:
    ctypes.CDLL(str(LIBRARIES["libnvrtc-builtins"]))  # the other one would look for it in the system's folders alone
    library = ctypes.CDLL(str(LIBRARIES["libnvrtc"]))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _call(function: str, *arguments: object) -> None:
    if status := getattr(_library(), function)(*arguments):
        raise RuntimeError(f"{function}: {_library().nvrtcGetErrorString(status).decode()}")


def _text(what: str, program: ctypes.c_void_p) -> str:
    """The program's ``PTX`` or its ``ProgramLog``."""
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _call(f"nvrtcGet{what}", program, buffer)
    return buffer.value.decode()


def version() -> tuple[int, int]:
    """NVRTC's, which is that of its CUDA toolkit."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile_text(text: str, name: str, arch: int, file: str = "kernel.cu") -> tuple[str, str]:
    """The PTX of a kernel and the name that it has there.

    ``text`` is CUDA C++ that may include the headers of csrc/cuda; ``name`` the kernel's, or an instantiation of a
    template as ``reattn::forward_kernel<reattn::Half, 16, 2, true>``; ``arch`` a compute capability, 90 for 9.0;
    ``file`` what the PTX's line numbers are said to be of. Raises RuntimeError with what NVRTC says of the source.
    """
    options = [*OPTIONS, f"--include-path={SOURCES}", f"--gpu-architecture=compute_{arch}"]

    def strings(texts: Collection[str]) -> ctypes.Array:
        return (ctypes.c_char_p * len(texts))(*(each.encode() for each in texts))

    program, lowered = ctypes.c_void_p(), ctypes.c_char_p()
    headers = strings(HEADERS.values()), strings(HEADERS.keys())
    _call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), file.encode(), len(HEADERS), *headers)
    try:
        _call("nvrtcAddNameExpression", program, name.encode())
        try:
            _call("nvrtcCompileProgram", program, len(options), strings(options))
        except RuntimeError as error:
            raise RuntimeError(f"{name} of {file}: {error}\n{_text('ProgramLog', program)}") from None
        _call("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(lowered))
        return _text("PTX", program), lowered.value.decode()
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))


@functools.cache
def fingerprint() -> hashlib._Hash:
    """Of everything that decides the PTX, but for the kernel and the architecture."""
    digest = hashlib.sha256(repr((version(), OPTIONS, HEADERS, SOURCES)).encode())
    for path in sorted([*SOURCES.iterdir(), *SOURCES.parent.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest


def compile_kernel(source: str, name: str, arch: int) -> tuple[str, str]:
    """The same of a kernel in ``csrc/cuda/<source>.cu``, from out/emulator/ptx where it has been compiled before."""
    digest = fingerprint().copy()
    digest.update(repr((source, name, arch)).encode())
    cached = CACHE / f"{digest.hexdigest()[:32]}.ptx"
    if not cached.exists():
        path = SOURCES / f"{source}.cu"
        ptx, entry = compile_text(path.read_text(), name, arch, str(path))
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as whole:
            whole.write(f"// {entry}\n{ptx}")
        os.replace(whole.name, cached)  # other processes see all of it or nothing
    first, ptx = cached.read_text().split("\n", 1)
    return ptx, first.removeprefix("// ")
