"""``python tests/cuda/build.py FOLDER``: the CUDA backend's sources compiled for the host, to be run without a GPU.

The extension module that comes out has the name and the interface of the real one; tests/conftest.py puts it in that
one's place.
"""

import itertools
import sys
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import build_extensions as build  # noqa: E402

# No contraction: what rounds once on the device shall round once here. GCC does not know CUDA's pragmas.
FLAGS = (
    "-std=c++17 -O2 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"
    " -DREATTN_EMULATED"
)


def build_ninja(folder: Path, library: str) -> str:
    compiler = build.CpuExtension().find_compiler(folder)
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    includes.append(f"-I{ROOT / 'tests' / 'cuda'}")
    lines = [
        f"source = {str(ROOT / 'csrc' / 'cuda').replace('$', '$$')}",
        f"compiler = {build.in_ninja(*compiler)}",
        f"flags = {build.in_ninja(*FLAGS.split(), *includes)}",
        "rule compile",
        "  command = $compiler -MMD -MF $out.d $flags $own_flags -c $in -o $out",
        "  description = $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $compiler -shared $in -o $out",
        "  description = $out",
    ]
    objects = []
    for name in build.CudaExtension.host:
        objects.append(f"{name}.o")
        lines.append(f"build {objects[-1]}: compile $source/{name}.cpp")
    for kernel, element in itertools.product(build.CUDA_KERNELS, build.CUDA_ELEMENTS):
        objects.append(f"{kernel}_{element}.o")
        lines += [
            f"build {objects[-1]}: compile $source/{kernel}.cu",
            f"  own_flags = -x c++ -DREATTN_ELEMENT={element}",
        ]
    return "\n".join([*lines, f"build {library}: link {' '.join(objects)}", ""])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(build_ninja(folder, f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"))
    build.run_ninja(folder, "--quiet")
