"""``python -m emulator.build_cuda_host FOLDER``: the extension module of csrc/cuda without its kernels, for the host.

It has the name and the interface of the real one; what it launches is handed to Python (emulator/cuda.py).
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import build_extensions as build  # noqa: E402

FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -DREATTN_EMULATED"


def build_ninja(library: str) -> str:
    compiler = build.CpuExtension().find_compiler(Path(library).parent)
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    includes += [f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{ROOT / 'emulator'}"]
    lines = [
        f"root = {str(ROOT).replace('$', '$$')}",
        f"compiler = {build.in_ninja(*compiler)}",
        f"flags = {build.in_ninja(*FLAGS.split(), *includes)}",
        "rule compile",
        "  command = $compiler -MMD -MF $out.d $flags -c $in -o $out",
        "  description = $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $compiler -shared $in -o $out",
        "  description = $out",
        "build cuda_host.o: compile $root/emulator/cuda_host.cpp",
    ]
    lines += [f"build {name}.o: compile $root/csrc/cuda/{name}.cpp" for name in build.CudaExtension.host]
    objects = " ".join(f"{name}.o" for name in ("cuda_host", *build.CudaExtension.host))
    return "\n".join([*lines, f"build {Path(library).name}: link {objects}", ""])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(build_ninja(str(folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}")))
    build.run_ninja(folder, "--quiet")
